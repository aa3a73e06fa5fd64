//! What a supervisor knows of one of its instances.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    sync::Arc,
    time::Duration,
};

use cmdb::{App, Generation, State};
use launcher_client::wire::{Activity, WakeTiming};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::leak::Growth;
use crate::{
    backlog::Backlog,
    cgroup::Group,
    governor::Slot,
    instance::{Control, Live},
    monitor::Monitor,
    tiers::Tier,
};

use super::tiers::Reclaim;

/// A proxy's figures are about the last second, and say nothing about the one after.
const REPORTS_HOLD: Duration = Duration::from_secs(1);

/// One instance.
#[derive(Debug)]
pub(super) struct Running {
    /// Where it is in its life.
    pub(super) stage: Stage,
    /// What it was started with.
    pub(super) app: Arc<App>,
    /// It takes the place of this one.
    pub(super) replaces: Option<Generation>,
    /// This one is to take its place.
    pub(super) replacement: Option<Generation>,
    /// Its host is to be emptied: the instance on another host that is to take its place, if one could be begun, and when
    /// that was looked at last.
    pub(super) moves_to: Option<(Option<Generation>, Instant)>,
    /// It should be replaced, and why.
    pub(super) wants_replacement: Option<String>,
    /// The operator, or the end of the app or launcher, waits for its end.
    pub(super) asked_to_stop: bool,
    /// Its first process.
    pub(super) pid: Option<i32>,
    /// Its limits.
    pub(super) group: Option<Arc<Group>>,
    /// What it runs.
    pub(super) image: String,
    /// Requests that it got.
    pub(super) requests: u64,
    /// When it last had a request under way.
    pub(super) last_active: Instant,
    /// Its place among the starts under way, until it listens.
    pub(super) slot: Option<Slot>,
    /// Why it has none yet; empty: it has, or had.
    pub(super) waits: String,
    /// Whether its CPU quota is in force.
    pub(super) quota_applied: bool,
    /// Whether it sleeps while it is ready.
    pub(super) rest: Rest,
    /// What has become of its memory while it is frozen.
    pub(super) reclaim: Reclaim,
    /// The tier from which it was woken last, and how long that took, µs, until its first byte completes the figure.
    pub(super) woke: Option<(Tier, u64)>,
    /// Whether a proxy's suspicion is being looked into.
    pub(super) examined: bool,
    /// How its memory grows.
    pub(super) growth: Growth,
    adopted: bool,
    /// See [`crate::instance::Adoption::under_way`].
    adoption: Option<oneshot::Sender<()>>,
    listened: bool,
    /// What it got of the CPU.
    pub(super) monitor: Monitor,
    /// Its listen queue, from the first look on; an error is told once.
    pub(super) backlog: Option<io::Result<Backlog>>,
    control: mpsc::UnboundedSender<Control>,
    begun: Instant,
    /// Of each proxy: what it last told, and when.
    reports: HashMap<u64, (Activity, Instant)>,
}

/// Whether a ready instance sleeps.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) enum Rest {
    /// It runs.
    #[default]
    Awake,
    /// It gets no new requests, and is frozen when the proxies have none on it.
    Dozing {
        /// Proxies that may still have requests on it.
        waits_for: BTreeSet<u64>,
        /// When it is left awake after all.
        until: Instant,
    },
    /// The freezer has it.
    Frozen,
}

/// Where an instance is in its life.
#[derive(Debug)]
pub(super) enum Stage {
    /// Made, not listening.
    Starting,
    /// Listens.
    Ready {
        /// The instance.
        live: Arc<Live>,
        /// How it came to be.
        timing: WakeTiming,
        /// Since when.
        since: Instant,
        /// When its lifetime is over.
        expires: Option<Instant>,
    },
    /// Gets no new requests.
    Draining {
        /// Why.
        reason: String,
        /// Proxies that may still have requests on it.
        waits_for: BTreeSet<u64>,
        /// When it is ended all the same.
        deadline: Instant,
    },
    /// Told to end.
    Stopping {
        /// Why.
        reason: String,
    },
}

impl Running {
    pub(super) fn starting(
        control: mpsc::UnboundedSender<Control>,
        app: Arc<App>,
        replaces: Option<Generation>,
    ) -> Self {
        let now = Instant::now();
        Self {
            stage: Stage::Starting,
            app,
            replaces,
            replacement: None,
            moves_to: None,
            wants_replacement: None,
            asked_to_stop: false,
            pid: None,
            group: None,
            image: String::new(),
            requests: 0,
            last_active: now,
            slot: None,
            waits: String::new(),
            quota_applied: false,
            examined: false,
            rest: Rest::Awake,
            reclaim: Reclaim::No,
            woke: None,
            growth: Growth::default(),
            adopted: false,
            adoption: None,
            listened: false,
            monitor: Monitor::default(),
            backlog: None,
            control,
            begun: now,
            reports: HashMap::new(),
        }
    }

    pub(super) fn created(&mut self, pid: i32, group: Arc<Group>, image: String) {
        self.pid = Some(pid);
        self.group = Some(group);
        self.image = image;
    }

    /// It was started by an earlier daemon.
    pub(super) fn adopted(&mut self, pid: i32, image: String, under_way: Option<oneshot::Sender<()>>) {
        self.adopted = true;
        self.adoption = under_way;
        self.pid = Some(pid);
        self.image = image;
    }

    pub(super) fn is_adopted(&self) -> bool {
        self.adopted
    }

    pub(super) fn ready(&mut self, live: Arc<Live>, timing: WakeTiming) {
        let since = Instant::now();
        let expires =
            self.app.lifecycle.lifetime.map(|lifetime| since + jittered(lifetime, live.id.generation));
        self.last_active = since;
        self.adoption = None;
        self.listened = true;
        self.stage = Stage::Ready { live, timing, since, expires };
    }

    /// The instance and how it came to be, while it is ready.
    pub(super) fn live(&self) -> Option<(Arc<Live>, WakeTiming)> {
        match &self.stage {
            Stage::Ready { live, timing, .. } => Some((Arc::clone(live), timing.clone())),
            _ => None,
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        matches!(self.stage, Stage::Ready { .. })
    }

    /// Whether its start has not come to its end.
    pub(super) fn never_listened(&self) -> bool {
        !self.adopted && !self.listened
    }

    pub(super) fn is_ending(&self) -> bool {
        matches!(self.stage, Stage::Draining { .. } | Stage::Stopping { .. })
    }

    pub(super) fn why_ending(&self) -> &str {
        match &self.stage {
            Stage::Draining { reason, .. } | Stage::Stopping { reason } => reason,
            Stage::Starting | Stage::Ready { .. } => "",
        }
    }

    /// As `ps` shows it. One that was told to end shows as draining: it gets nothing and is on its way out.
    pub(super) fn state(&self) -> State {
        match self.stage {
            Stage::Starting => State::Starting,
            Stage::Ready { .. } if self.rest == Rest::Awake => State::Ready,
            Stage::Ready { .. } => State::Frozen,
            Stage::Draining { .. } | Stage::Stopping { .. } => State::Draining,
        }
    }

    pub(super) fn drain(&mut self, reason: &str, waits_for: BTreeSet<u64>) {
        let deadline = Instant::now() + self.app.lifecycle.drain_timeout;
        self.stage = Stage::Draining { reason: reason.to_owned(), waits_for, deadline };
    }

    /// Whether a draining instance has nothing left to wait for.
    pub(super) fn is_drained(&self, now: Instant) -> bool {
        match &self.stage {
            Stage::Draining { waits_for, deadline, .. } => waits_for.is_empty() || *deadline <= now,
            _ => false,
        }
    }

    /// Tells it to end; SIGKILL follows after `grace`.
    pub(super) fn terminate(&mut self, reason: &str, grace: Duration) {
        if !matches!(self.stage, Stage::Stopping { .. }) {
            // A frozen process handles no signal.
            self.thaw();
            self.stage = Stage::Stopping { reason: reason.to_owned() };
            // A closed channel: the task is ending already and will report.
            let _ = self.control.send(Control::Terminate(grace));
        }
    }

    /// Lets it run again, if it was frozen.
    pub(super) fn thaw(&mut self) {
        if let Reclaim::UnderWay(task) = std::mem::take(&mut self.reclaim) {
            task.abort();
        }
        if std::mem::take(&mut self.rest) == Rest::Frozen
            && let Some(group) = &self.group
            && let Err(error) = group.thaw()
        {
            tracing::error!(cgroup = group.name(), %error, "an instance cannot be thawed");
        }
    }

    pub(super) fn report(&mut self, watcher: u64, activity: &Activity) {
        self.requests += u64::from(activity.requests);
        self.reports.insert(watcher, (activity.clone(), Instant::now()));
        if activity.requests > 0 || activity.in_flight > 0 {
            self.last_active = Instant::now();
        }
    }

    pub(super) fn quiesced(&mut self, watcher: u64) {
        self.reports.remove(&watcher);
        if let Some(waits_for) = self.waits_for() {
            waits_for.remove(&watcher);
        }
    }

    pub(super) fn watcher_came(&mut self, watcher: u64) {
        if let Some(waits_for) = self.waits_for() {
            waits_for.insert(watcher);
        }
    }

    /// Proxies that are waited for, when any are.
    fn waits_for(&mut self) -> Option<&mut BTreeSet<u64>> {
        match (&mut self.stage, &mut self.rest) {
            (Stage::Draining { waits_for, .. }, _)
            | (Stage::Ready { .. }, Rest::Dozing { waits_for, .. }) => Some(waits_for),
            _ => None,
        }
    }

    pub(super) fn watcher_gone(&mut self, watcher: u64) {
        self.quiesced(watcher);
    }

    /// Requests under way, over all proxies.
    pub(super) fn in_flight(&self) -> u32 {
        self.reports.values().fold(0, |sum, (last, _)| sum.saturating_add(last.in_flight))
    }

    /// What the proxies told within the last second.
    pub(super) fn recent_reports(&self) -> impl Iterator<Item = (u64, &Activity)> {
        let now = Instant::now();
        let recent = self.reports.iter().filter(move |(_, (_, at))| *at + REPORTS_HOLD > now);
        recent.map(|(watcher, (activity, _))| (*watcher, activity))
    }

    pub(super) fn age(&self) -> Duration {
        self.begun.elapsed()
    }
}

/// ±10 % of the lifetime, so that instances born together do not end together; fixed by the generation.
fn jittered(lifetime: Duration, generation: Generation) -> Duration {
    let scattered = generation.0.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    let share = u32::try_from(scattered % 201).unwrap_or(100);
    lifetime * (900 + share) / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_differ_by_no_more_than_a_tenth() {
        let lifetime = Duration::from_secs(100);
        let all: BTreeSet<_> = (0..50).map(|n| jittered(lifetime, Generation(1_000 + n))).collect();
        assert!(all.len() > 25, "{all:?}");
        assert!(all.iter().all(|l| (90..=110).contains(&l.as_secs())), "{all:?}");
    }
}
