//! An instance's way down the tiers of sleep, by itself when it is idle for long or because the host's memory is short.

use std::sync::Arc;

use cmdb::{Generation, units::Bytes};
use launcher_client::wire::Activity;
use tokio::{task::AbortHandle, time::Instant};

use super::{Message, Running, Stage, Supervisor, running::Rest};
use crate::{
    instance::name,
    reclaim::{self, Reclaimed},
    tiers::{Candidate, LEAST_IDLE, Tier},
};

/// What has become of a frozen instance's memory.
#[derive(Debug, Default)]
pub(super) enum Reclaim {
    /// It is where it was.
    #[default]
    No,
    /// It is being taken back.
    UnderWay(AbortHandle),
    /// What could be taken back has been.
    Done,
}

impl Running {
    /// Where it is; `None` while it is only beginning, or on its way.
    fn tier(&self) -> Option<Tier> {
        match (&self.stage, &self.rest, &self.reclaim) {
            (Stage::Ready { .. }, Rest::Awake, _) => Some(Tier::Running),
            (Stage::Ready { .. }, Rest::Frozen, Reclaim::No) => Some(Tier::Frozen),
            (Stage::Ready { .. }, Rest::Frozen, Reclaim::Done) => Some(Tier::Reclaimed),
            _ => None,
        }
    }

    /// Whether its memory has been taken back while it sleeps.
    pub(super) fn is_reclaimed(&self) -> bool {
        self.tier() == Some(Tier::Reclaimed)
    }

    /// From where a request wakes it.
    pub(super) fn sleeps_in(&self) -> Option<Tier> {
        match (&self.rest, &self.reclaim) {
            (Rest::Frozen, Reclaim::No) => Some(Tier::Frozen),
            (Rest::Frozen, _) => Some(Tier::Reclaimed),
            _ => None,
        }
    }

    fn may_descend(&self) -> bool {
        self.is_ready() && self.in_flight() == 0 && self.last_active.elapsed() >= LEAST_IDLE
    }
}

impl Supervisor {
    /// What could go down a tier, or is on its way.
    pub(super) fn candidates(&self) -> Vec<Candidate> {
        let may_stop = self.may_end_when_idle();
        let listed = self.running.iter().filter(|(_, running)| !matches!(running.stage, Stage::Starting));
        let of = |(generation, running): (&Generation, &Running)| {
            let tier = running.tier();
            let here = tier.unwrap_or(Tier::Stopped);
            let memory = running.group.as_ref().and_then(|group| group.memory_current().ok());
            Candidate {
                app: self.app.name.clone(),
                generation: *generation,
                tier: here,
                idle: running.last_active.elapsed(),
                in_flight: running.in_flight(),
                memory: memory.unwrap_or(0),
                descends: tier.is_none(),
                may_stop,
                wake_us: here.next().map_or(0, |next| self.costs.of(next)),
            }
        };
        listed.map(of).collect()
    }

    /// Memory is short: down with it by one tier, if it is still as idle as it was when that was decided.
    pub(super) async fn descend(&mut self, generation: Generation, to: Tier, why: &str) {
        let Some(running) = self.running.get(&generation).filter(|running| running.may_descend()) else {
            return;
        };
        let here = running.tier();
        if here.and_then(Tier::next) != Some(to) {
            return;
        }
        match to {
            Tier::Running => {}
            Tier::Frozen => {
                let idle = running.last_active.elapsed();
                let message = format!(
                    "{}, idle for {idle:.0?}, is to be frozen: {why}",
                    name(&self.app.name, generation)
                );
                self.emit("descent", generation, message);
                self.doze(generation, Instant::now()).await;
            }
            Tier::Reclaimed => self.reclaim(generation, why),
            Tier::Stopped if self.may_end_when_idle() => self.drain(generation, why).await,
            Tier::Stopped => {}
        }
    }

    /// Begins to take a frozen instance's memory back; a wake ends that where it is.
    pub(super) fn reclaim(&mut self, generation: Generation, why: &str) {
        let Some(running) = self.running.get_mut(&generation) else { return };
        let Some(group) = running.group.clone().filter(|_| running.tier() == Some(Tier::Frozen)) else {
            return;
        };
        let (own, why) = (self.own.clone(), why.to_owned());
        let task = tokio::spawn(async move {
            let result = reclaim::reclaim(Arc::clone(&group)).await.map_err(|error| error.to_string());
            let _ = own.send(Message::Reclaimed(generation, result, why));
        });
        running.reclaim = Reclaim::UnderWay(task.abort_handle());
    }

    pub(super) fn reclaimed(&mut self, generation: Generation, result: Result<Reclaimed, String>, why: &str) {
        let under_way = |running: &&mut Running| matches!(running.reclaim, Reclaim::UnderWay(_));
        // Woken in the very moment in which it was done: it is using its memory again.
        let Some(running) = self.running.get_mut(&generation).filter(under_way) else { return };
        // Also when it failed: it would fail again, and the next tier gives all of it back.
        running.reclaim = Reclaim::Done;
        let id = name(&self.app.name, generation);
        let message = match result {
            Ok(done) => {
                let freed = Bytes(done.before.saturating_sub(done.after));
                let swap =
                    if done.swap > 0 { format!(", {} in swap", Bytes(done.swap)) } else { String::new() };
                format!(
                    "the memory of {id} is reclaimed, {why}: {freed} given back, {} held{swap}",
                    Bytes(done.after)
                )
            }
            Err(error) => format!("the memory of {id} cannot be reclaimed: {error}"),
        };
        self.emit("reclaimed", generation, message);
    }

    /// The first responses after a wake tell what it has cost its visitors.
    pub(super) fn learn_from(&mut self, activity: &Activity) {
        if activity.window.count == 0 {
            return;
        }
        let woke = self.running.get_mut(&activity.generation).and_then(|running| running.woke.take());
        if let Some((tier, us)) = woke {
            self.costs.learn(tier, us.saturating_add(activity.window.mean_us));
        }
    }
}
