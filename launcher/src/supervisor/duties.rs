//! What time brings: quotas, idleness, lifetimes, drains; and what configuration changes.

use std::{sync::Arc, time::Duration};

use cmdb::{App, Generation, Outcome, Transition, hook::When};
use launcher_client::wire::{Activity, Refusal, RefusalCode};
use tokio::time::Instant;

use super::{Message, Stage, Supervisor, running::Rest};
use crate::{
    cgroup::{CpuQuota, CpuWeight, Group},
    hooks::Subject,
    instance::{fingerprint, name},
    ready,
};

/// The quota begins this long after the instance is ready even when no proxy has told of a first byte.
const QUOTA_AT_LATEST: Duration = Duration::from_secs(1);
/// An instance with a request within this time is busy: at its lifetime's end it is replaced, not just ended.
const BUSY_WITHIN: Duration = Duration::from_secs(1);
/// When nothing is due; any message wakes the supervisor sooner.
const NOTHING_DUE: Duration = Duration::from_secs(3600);
/// How long a suspect instance has to accept a connection.
const EXAMINATION: Duration = Duration::from_secs(1);
/// Longest time from SIGTERM to SIGKILL when the whole launcher ends.
const END_GRACE: Duration = Duration::from_secs(3);

impl Supervisor {
    /// When the next duty is due.
    pub(super) fn next_duty(&self) -> Instant {
        let idle = self.app.lifecycle.idle_timeout;
        let may_end = self.may_end_when_idle();
        let mut next = Instant::now() + NOTHING_DUE;
        for running in self.running.values() {
            let mut due = |at: Instant| next = next.min(at);
            match &running.stage {
                Stage::Ready { since, expires, .. } => {
                    if !running.quota_applied {
                        due(*since + QUOTA_AT_LATEST);
                    }
                    if let Some(idle) = idle.filter(|_| may_end && running.in_flight() == 0) {
                        due(running.last_active + idle);
                    }
                    if let Some(at) = self.rest_due(running) {
                        due(at);
                    }
                    if let Some(expires) = expires.filter(|_| running.replacement.is_none()) {
                        due(expires.max(self.retry_at.unwrap_or(expires)));
                    }
                }
                Stage::Draining { deadline, .. } => due(*deadline),
                Stage::Starting | Stage::Stopping { .. } => {}
            }
        }
        next = next.min(self.scaling_due().unwrap_or(next));
        next = next.min(self.moving_due().unwrap_or(next));
        next = next.min(self.exclusive_due().unwrap_or(next));
        match self.retry_at {
            Some(retry) if self.lacks_some() || self.wants_replacement() => next.min(retry),
            _ => next,
        }
    }

    /// Does all that is due.
    pub(super) async fn do_duties(&mut self) {
        let now = Instant::now();
        for generation in self.generations() {
            let Some(running) = self.running.get_mut(&generation) else { continue };
            if running.is_drained(now) {
                let reason = running.why_ending().to_owned();
                let grace = running.app.lifecycle.stop_timeout;
                running.terminate(&reason, grace);
                continue;
            }
            let Stage::Ready { since, expires, .. } = &running.stage else { continue };
            let (since, expires) = (*since, *expires);
            if !running.quota_applied && since + QUOTA_AT_LATEST <= now {
                self.apply_quota(generation);
            }
            self.end_if_idle(generation, now).await;
            self.mind_rest(generation, now).await;
            if expires.is_some_and(|at| at <= now) {
                self.end_lifetime(generation, now).await;
            }
        }
        self.mind_exclusive().await;
        self.mind_moving(now).await;
        self.replace_those_that_want_it(now).await;
        self.keep_minimum().await;
        self.keep_maximum().await;
        self.mind_scaling(now).await;
    }

    async fn end_if_idle(&mut self, generation: Generation, now: Instant) {
        let Some(idle) = self.app.lifecycle.idle_timeout else { return };
        let Some(running) = self.running.get(&generation) else { return };
        let is_idle = running.is_ready() && running.in_flight() == 0 && running.last_active + idle <= now;
        if is_idle && self.may_end_when_idle() {
            self.drain(generation, &format!("idle for {idle:?}")).await;
        }
    }

    /// Whether one that is ready may go without leaving too few. One that starts does not serve yet, and may never.
    pub(super) fn may_end_when_idle(&self) -> bool {
        let fewest = if self.removed || self.ending { 0 } else { self.app.scale.min };
        let fewest = usize::try_from(fewest).unwrap_or(usize::MAX);
        let ready = self.running.values().filter(|running| running.is_ready()).count();
        fewest == 0 || ready + usize::try_from(self.ready_elsewhere()).unwrap_or(usize::MAX) > fewest
    }

    async fn end_lifetime(&mut self, generation: Generation, now: Instant) {
        // One of the fewest that shall serve is replaced even when it is idle: there is no gap.
        let needed = !self.may_end_when_idle();
        let Some(running) = self.running.get_mut(&generation).filter(|r| r.is_ready()) else { return };
        let busy = running.in_flight() > 0 || running.last_active + BUSY_WITHIN > now;
        if busy || needed || running.replacement.is_some() {
            running.wants_replacement.get_or_insert_with(|| "its lifetime is over".to_owned());
        } else {
            self.drain(generation, "its lifetime is over and it is idle").await;
        }
    }

    async fn replace_those_that_want_it(&mut self, now: Instant) {
        if self.removed || self.ending || self.is_draining() || self.retry_at.is_some_and(|at| at > now) {
            return;
        }
        for old in self.generations() {
            let Some(running) = self.running.get(&old) else { continue };
            let Some(reason) = running.wants_replacement.clone().filter(|_| running.is_ready()) else {
                continue;
            };
            if running.replacement.is_some() {
                continue;
            }
            if running.rest != Rest::Awake || self.is_exclusive() {
                // Nobody is served by it, so nobody needs another one yet; or the other one needs what this one has.
                self.drain(old, &reason).await;
                continue;
            }
            let transition = Transition::Add {
                node: self.host.node.clone(),
                start_timeout_ms: self.start_timeout_ms(),
                max: self.app.scale.max,
                replacing: true,
                lost: self.lost(),
            };
            match self.apply(transition).await {
                Ok(Outcome::Own(generation)) => {
                    if let Some(running) = self.running.get_mut(&old) {
                        running.replacement = Some(generation);
                    }
                    self.launch(generation, Some(old), &format!("{old} is to be replaced: {reason}"));
                }
                // Another replacement is under way, or starts fail: this one has time.
                Ok(_) => self.retry_at = Some(now + Duration::from_millis(500)),
                Err(refusal) => {
                    tracing::warn!(app = %self.app.name, %refusal, "an instance could not be replaced");
                    self.retry_at = Some(now + Duration::from_secs(1));
                }
            }
        }
    }

    /// Starts instances until `scale.min` serve.
    pub(super) async fn keep_minimum(&mut self) {
        let now = Instant::now();
        while self.lacks_some() && self.retry_at.is_none_or(|at| at <= now) {
            match self.begin_on(self.best_for_more(), false, "scale.min").await {
                Ok(Outcome::Own(_)) => {}
                _ => self.retry_at = Some(now + self.backoff()),
            }
        }
    }

    /// Drains instances until no more than `scale.max` serve.
    async fn keep_maximum(&mut self) {
        for last in self.surplus() {
            self.drain(last, &format!("no more than {} instance(s) shall run", self.app.scale.max)).await;
        }
    }

    /// Takes an instance out of service; it ends when its requests have ended.
    pub(super) async fn drain(&mut self, generation: Generation, reason: &str) {
        let Some(running) = self.running.get(&generation) else { return };
        if running.is_ending() {
            return;
        }
        let was_ready = running.is_ready();
        drop(self.apply(Transition::Drain { generation }).await);
        // After the transition: a proxy that connects from now on sees the instance as draining from the start.
        let waits_for = if was_ready { self.host.watchers.present() } else { Default::default() };
        if let Some(running) = self.running.get_mut(&generation) {
            running.drain(reason, waits_for);
        }
        self.emit("draining", generation, format!("{}: {reason}", name(&self.app.name, generation)));
    }

    pub(super) async fn drain_all(&mut self, reason: &str) {
        for generation in self.generations() {
            if let Some(running) = self.running.get_mut(&generation) {
                running.asked_to_stop = true;
            }
            self.drain(generation, reason).await;
        }
    }

    pub(super) fn replace_all(&mut self, reason: &str) {
        for running in self.running.values_mut().filter(|r| r.is_ready()) {
            running.wants_replacement.get_or_insert_with(|| reason.to_owned());
        }
    }

    pub(super) fn terminate_all(&mut self) {
        for running in self.running.values_mut() {
            running.asked_to_stop = true;
            let grace = running.app.lifecycle.stop_timeout.min(END_GRACE);
            running.terminate("the launcher ends", grace);
        }
    }

    pub(super) fn first_byte(&mut self, generation: Generation) {
        if self.running.get(&generation).is_some_and(|r| !r.quota_applied) {
            self.emit(
                "first-byte",
                generation,
                format!("{} sent its first byte", name(&self.app.name, generation)),
            );
            self.apply_quota(generation);
        }
    }

    pub(super) fn report(&mut self, watcher: u64, activity: &Activity) {
        if let Some(running) = self.running.get_mut(&activity.generation) {
            running.report(watcher, activity);
            self.look_sooner(activity);
            self.learn_from(activity);
            self.look_for_leak(activity.generation);
        }
    }

    /// A proxy could not connect: see whether the instance accepts a connection of ours.
    pub(super) fn suspect(&mut self, generation: Generation, reason: &str) {
        let Some(running) = self.running.get_mut(&generation) else { return };
        let Some((live, _)) = running.live().filter(|_| !running.examined) else { return };
        running.examined = true;
        let message = format!("a proxy could not connect to {}: {reason}", live.id);
        self.emit("suspect", generation, message);
        let own = self.own.clone();
        tokio::spawn(async move {
            let found = tokio::time::timeout(EXAMINATION, ready::probe(&live.sockets, live.port)).await;
            let verdict = match found {
                Ok(Ok(_)) => String::new(),
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("nothing accepts connections on port {} any more", live.port),
            };
            let _ = own.send(Message::Deaf(generation, verdict));
        });
    }

    /// The examination's verdict; empty: it accepts connections.
    pub(super) async fn deaf(&mut self, generation: Generation, verdict: &str) {
        if let Some(running) = self.running.get_mut(&generation) {
            running.examined = false;
        }
        if !verdict.is_empty() {
            self.drain(generation, verdict).await;
        }
    }

    /// Runs the hooks of a signal for every instance that is ready.
    pub(super) fn signal(&self, name: &str) -> Result<usize, Refusal> {
        let wanted = When::Signal(name.to_owned());
        if !self.app.hooks.iter().any(|hook| hook.when == wanted) {
            let message = format!("{} has no [[hook]] with on-signal = \"{name}\"", self.app.name);
            return Err(Refusal::new(RefusalCode::BadRequest, message));
        }
        let mut begun = 0;
        for running in self.running.values() {
            let Some((live, _)) = running.live() else { continue };
            let subject = Subject {
                app: Arc::clone(&self.app),
                generation: live.id.generation,
                output: Arc::clone(&self.output),
                pid: Some(live.pid),
                port: Some(live.port),
                group: Some(Arc::clone(&live.group)),
                end: None,
            };
            self.host.hooks.signal(&wanted, &subject);
            begun += 1;
        }
        Ok(begun)
    }

    /// New configuration: limits change at once, what runs is replaced if it is to run differently.
    pub(super) async fn spec(&mut self, file: Arc<App>) {
        if file == self.file {
            return;
        }
        self.file = file;
        let old = self.take_overrides();
        // Back-off is about a configuration that failed; this is another one.
        drop(self.apply(Transition::ResetBackoff).await);
        self.retry_at = None;
        if old.resources != self.app.resources || old.scale != self.app.scale {
            self.begin_scaling_anew();
        }
        if old.resources != self.app.resources {
            // Told in the events; the configuration holds for the next start all the same.
            let _ = self.apply_limits();
        }
        if fingerprint(&old) != fingerprint(&self.app) {
            self.replace_all("its configuration changed");
            let starting: Vec<_> = self
                .running
                .iter()
                .filter(|(_, r)| matches!(r.stage, Stage::Starting))
                .map(|(g, _)| *g)
                .collect();
            // What is starting the old way would never be wanted; who waits for it gets the new one.
            for generation in starting {
                self.drain(generation, "its configuration changed while it started").await;
            }
        }
    }

    pub(super) fn apply_limits(&mut self) -> Result<(), Refusal> {
        let resources = &self.app.resources;
        let mut result = Ok(());
        for (generation, running) in &self.running {
            let Some(group) = &running.group else { continue };
            let outcome = group
                .set_memory(resources.memory.0)
                .and_then(|()| group.set_pids(u64::from(resources.pids)))
                .and_then(|()| if running.quota_applied { set_quota(group, self.quota()) } else { Ok(()) });
            let id = name(&self.app.name, *generation);
            let message = match outcome {
                Ok(()) => format!("the limits of {id} were changed while it runs"),
                Err(error) => {
                    let message = format!("the limits of {id} could not be changed: {error}");
                    result = Err(Refusal::new(RefusalCode::Internal, message.clone()));
                    message
                }
            };
            self.emit("limits", *generation, message);
        }
        result
    }

    pub(super) fn apply_quota(&mut self, generation: Generation) {
        let Some(running) = self.running.get_mut(&generation) else { return };
        let begins = !std::mem::replace(&mut running.quota_applied, true);
        let Some(group) = running.group.clone() else { return };
        running.monitor.forget();
        if begins && let Err(error) = group.set_weight(CpuWeight::Usual) {
            tracing::warn!(container = group.name(), %error, "it goes on giving way to others");
        }
        if let Err(error) = set_quota(&group, self.quota()) {
            self.emit("limits", generation, format!("its CPU quota could not be set: {error}"));
        }
    }

    /// Instances that serve or are about to.
    pub(super) fn serving(&self) -> u32 {
        u32::try_from(self.running.values().filter(|r| !r.is_ending()).count()).unwrap_or(u32::MAX)
    }

    pub(super) fn minimum(&self) -> u32 {
        let nobody = self.removed || self.ending || self.app.scale.min == 0 || !self.is_home();
        if nobody { 0 } else { self.app.scale.min }
    }

    /// Whether fewer serve than shall, and it is this host that has to mend it.
    fn lacks_some(&self) -> bool {
        let minimum = self.minimum();
        minimum > 0 && self.serving_everywhere() < minimum && !self.is_taken(&self.record(), None)
    }

    fn wants_replacement(&self) -> bool {
        self.running
            .values()
            .any(|r| r.is_ready() && r.wants_replacement.is_some() && r.replacement.is_none())
    }

    pub(super) fn generations(&self) -> Vec<Generation> {
        self.running.keys().copied().collect()
    }
}

fn set_quota(group: &Group, quota: Option<u32>) -> Result<(), crate::cgroup::CgroupError> {
    group.set_cpu(quota.map_or(CpuQuota::Unlimited, CpuQuota::from_millicores))
}
