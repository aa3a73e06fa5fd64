//! Sleep without an end: an idle instance is stopped by the freezer, and thawed by the next request.
//!
//! No request may be frozen with its instance. So it is taken out of service first, as for a drain: the CMDB says
//! `frozen`, the proxies pick it no more and tell when none of their requests is left on it; then the freezer has it.

use std::time::Duration;

use cmdb::{Generation, Transition};
use launcher_client::wire::{Step, WakeTiming};
use tokio::time::Instant;

use super::{
    Awake, Supervisor,
    running::{Rest, Running},
};
use crate::{instance::name, keeper::monotonic_us, tiers::Tier};

/// How long the proxies may take to finish with an idle instance; one that is not idle after all stays awake.
const DOZE: Duration = Duration::from_secs(1);

impl Supervisor {
    /// When something is due about an instance's sleep.
    pub(super) fn rest_due(&self, running: &Running) -> Option<Instant> {
        match &running.rest {
            Rest::Awake if running.in_flight() == 0 => {
                self.app.lifecycle.freeze_after.map(|after| running.last_active + after)
            }
            Rest::Dozing { until, .. } => Some(*until),
            Rest::Frozen if running.sleeps_in() == Some(Tier::Frozen) => {
                self.app.lifecycle.reclaim_after.map(|after| running.last_active + after)
            }
            Rest::Awake | Rest::Frozen => None,
        }
    }

    /// Does what is due.
    pub(super) async fn mind_rest(&mut self, generation: Generation, now: Instant) {
        let due = self.running.get(&generation).filter(|r| r.is_ready()).and_then(|r| self.rest_due(r));
        let Some(running) = self.running.get_mut(&generation) else { return };
        match &running.rest {
            Rest::Dozing { waits_for, .. } if waits_for.is_empty() => self.freeze(generation),
            Rest::Dozing { until, .. } if *until <= now => {
                running.last_active = now;
                self.awaken(generation).await;
            }
            Rest::Awake if due.is_some_and(|due| due <= now) => self.doze(generation, now).await,
            Rest::Frozen if due.is_some_and(|due| due <= now) => {
                let idle = now.saturating_duration_since(running.last_active);
                self.reclaim(generation, &format!("idle for {idle:.0?}"));
            }
            _ => {}
        }
    }

    /// Takes it out of service; it is frozen when the proxies have nothing on it.
    pub(super) async fn doze(&mut self, generation: Generation, now: Instant) {
        drop(self.apply(Transition::Freeze { generation }).await);
        // After the transition: a proxy that connects from now on sees it frozen from the start.
        let waits_for = self.host.watchers.present();
        if let Some(running) = self.running.get_mut(&generation) {
            running.rest = Rest::Dozing { waits_for, until: now + DOZE };
        }
    }

    /// A ready instance for a request, thawed if need be.
    pub(super) async fn awake(&mut self, generation: Generation) -> Option<Awake> {
        let (live, timing) = self.running.get(&generation)?.live()?;
        let begun = monotonic_us();
        let slept = self.running.get(&generation).is_some_and(|r| r.rest != Rest::Awake);
        let tier = self.running.get(&generation).and_then(Running::sleeps_in);
        let mut timing = WakeTiming { warm: true, ..timing };
        if slept {
            self.awaken(generation).await;
            let us = monotonic_us().saturating_sub(begun);
            timing.steps = vec![Step { name: "thaw".into(), us }];
            timing.total_us = us;
            if let Some(running) = self.running.get_mut(&generation) {
                running.woke = tier.map(|tier| (tier, us));
            }
        }
        Some(Awake { live, timing })
    }

    async fn awaken(&mut self, generation: Generation) {
        let Some(running) = self.running.get_mut(&generation) else { return };
        let was_frozen = running.rest == Rest::Frozen;
        let reclaimed = if running.is_reclaimed() { "; its memory had been reclaimed" } else { "" };
        running.thaw();
        running.last_active = Instant::now();
        drop(self.apply(Transition::Thaw { generation }).await);
        if was_frozen {
            self.emit(
                "thawed",
                generation,
                format!("{} runs again{reclaimed}", name(&self.app.name, generation)),
            );
        }
    }

    fn freeze(&mut self, generation: Generation) {
        let Some(running) = self.running.get_mut(&generation) else { return };
        let Some(group) = running.group.clone() else { return };
        // Known before it is done, so that whatever comes of it is undone by a thaw.
        running.rest = Rest::Frozen;
        match group.freeze() {
            Ok(()) => {
                self.emit("frozen", generation, format!("{} is frozen", name(&self.app.name, generation)))
            }
            Err(error) => {
                self.emit(
                    "frozen",
                    generation,
                    format!("{} cannot be frozen: {error}", name(&self.app.name, generation)),
                );
            }
        }
    }
}
