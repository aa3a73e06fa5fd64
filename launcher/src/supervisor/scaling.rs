//! Scaling by itself: evidence in, a cure applied, its verdict awaited. What to do is decided in [`crate::scaler`].

use std::time::Duration;

use cmdb::{Generation, Outcome, Transition};
use launcher_client::wire::{Activity, Decision};
use tokio::time::Instant;

use super::{
    Stage, Supervisor,
    running::{Rest, Running},
};
use crate::{
    clock::unix_ms,
    instance::name,
    scaler::{self, Cause, Cure, Evidence, FEW, History, Kind, Policy, Verdict, cores},
};

/// How often an active app is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Not sooner than this, however many breaches are told.
const LOOK_AT_MOST: Duration = Duration::from_millis(20);
/// An app is looked at for so long after its last request.
const ACTIVE_FOR: Duration = Duration::from_secs(2);
/// A step is judged this long after it took effect.
const JUDGED_AFTER: Duration = Duration::from_secs(2);

/// What a supervisor knows about the scaling of its app.
#[derive(Debug)]
pub(super) struct Scaling {
    history: History,
    /// The quota in place of the configured one, thousandths of a core.
    raised: Option<u32>,
    trial: Option<Trial>,
    begun: Instant,
    /// Since when requests have been under way without a pause.
    loaded: Option<Instant>,
    looked: Instant,
    next: Instant,
    /// What was last said to be wrong without a cure, and when.
    said: Option<(Cause, Instant)>,
}

/// A step that waits for its verdict.
#[derive(Debug)]
struct Trial {
    kind: Kind,
    /// The worst until it took effect.
    before: Evidence,
    /// The instance that was added.
    added: Option<Generation>,
    /// `None` until it takes effect.
    judged_at: Option<Instant>,
}

impl Scaling {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            history: History::default(),
            raised: None,
            trial: None,
            begun: now,
            loaded: None,
            looked: now,
            next: now,
            said: None,
        }
    }
}

impl Supervisor {
    /// The quota that is in force, thousandths of a core; `None`: unlimited.
    pub(super) fn quota(&self) -> Option<u32> {
        self.scaling.raised.or(self.app.resources.cpu.map(|cpu| cpu.0))
    }

    /// Other limits or rules: what was learnt under the old ones is of no use, and the quota is the configured one.
    pub(super) fn begin_scaling_anew(&mut self) {
        let was_raised = self.scaling.raised.is_some();
        self.scaling = Scaling::new();
        if was_raised {
            self.set_quotas(None);
        }
    }

    /// A pause begins or ends: what was learnt is of no use, and the quota stays as it is.
    pub(super) fn forget_trial(&mut self) {
        self.scaling = Scaling { raised: self.scaling.raised, ..Scaling::new() };
    }

    /// When the app is to be looked at again, if it is.
    pub(super) fn scaling_due(&self) -> Option<Instant> {
        (!self.paused && self.has_something_to_scale() && Policy::of(&self.app).is_of_use())
            .then_some(self.scaling.next)
    }

    /// A report may show that the app has become too slow: then it is looked at now.
    pub(super) fn look_sooner(&mut self, activity: &Activity) {
        let slow = Policy::of(&self.app).response_time_us.is_some_and(|limit| activity.window.p90_us > limit);
        if slow && activity.window.count >= FEW {
            self.scaling.next = self.scaling.next.min(self.scaling.looked + LOOK_AT_MOST);
        }
    }

    /// Looks at the app when it is time, and does what is to be done.
    pub(super) async fn mind_scaling(&mut self, now: Instant) {
        if self.running.is_empty() {
            self.scaling.raised = None;
            // It cannot be judged any more, and must not keep the next step waiting.
            if let Some(trial) = self.scaling.trial.take() {
                self.scaling.history.judged(trial.kind, None);
            }
        }
        if self.removed || self.ending || self.scaling_due().is_none_or(|due| due > now) {
            return;
        }
        (self.scaling.looked, self.scaling.next) = (now, now + LOOK_EVERY);
        let policy = Policy::of(&self.app);
        self.watch_backlogs().await;
        let (evidence, slowest) = self.evidence(now);
        self.scaling.history.observe(&evidence, &policy);
        self.judge(&evidence, &policy, now).await;
        let decision = scaler::decide(&evidence, &policy, &self.scaling.history);
        if decision.cause == Cause::Fine && evidence.queue() == 0 {
            let forgets = |(_, at): &(Cause, Instant)| *at + self.app.scale.cool_down <= now;
            self.scaling.said.take_if(|said| forgets(said));
        }
        match decision.cure {
            Cure::Nothing => self.say_once(decision.cause, slowest, decision.words, now),
            Cure::Raise(to) | Cure::Lower(to) => {
                let kind = if matches!(decision.cure, Cure::Raise(_)) { "scale-up" } else { "scale-down" };
                self.decided(kind, decision.cause, slowest, decision.words);
                self.step(decision.cure, &evidence, &policy, None);
                self.set_quotas(Some(to));
            }
            Cure::Add => self.add(&evidence, &policy, &decision).await,
            Cure::Remove => {
                if let Some(youngest) = self.youngest() {
                    self.decided("scale-in", decision.cause, youngest, decision.words);
                    self.step(decision.cure, &evidence, &policy, None);
                    self.drain(youngest, "the load needs one instance less").await;
                }
            }
        }
    }

    fn decided(&mut self, kind: &'static str, cause: Cause, about: Generation, words: String) {
        self.host.metrics.decided(kind, cause);
        self.tell(kind, about, words);
    }

    /// Among the events, and in `ps` until the next one.
    fn tell(&mut self, kind: &str, about: Generation, words: String) {
        let at_unix_ms = unix_ms();
        self.decision = Some(Decision { at_unix_ms, kind: kind.to_owned(), words: words.clone() });
        self.emit(kind, about, words);
    }

    /// Each instance that serves has its listen queue watched. Without it, a lack of workers is not seen.
    async fn watch_backlogs(&mut self) {
        for running in self.running.values_mut() {
            let Some((live, _)) = running.live().filter(|_| running.backlog.is_none()) else { continue };
            let made = live.sockets.backlog(live.port).await;
            let made = made.and_then(|backlog| backlog.length().map(|_| backlog));
            if let Err(error) = &made {
                tracing::warn!(instance = %live.id, %error, "the length of its listen queue is not known");
            }
            running.backlog = Some(made);
        }
    }

    fn evidence(&mut self, now: Instant) -> (Evidence, Generation) {
        let load = self.host.meter.load(now.into_std());
        let mut slowest = self.running.last_key_value().map_or(Generation(0), |(generation, _)| *generation);
        let mut evidence = Evidence {
            at_ms: ms(now - self.scaling.begun),
            host_busy: load.busy,
            memory_stalled: load.memory_stalled,
            serving: self.serving(),
            starting: self.starting(),
            elsewhere: self.serving_elsewhere(),
            starting_elsewhere: self.starting_elsewhere(),
            other_host: self.best_elsewhere().is_some(),
            ..Evidence::default()
        };
        let mut held = std::collections::BTreeMap::new();
        let quota = self.quota();
        for (generation, running) in &mut self.running {
            let Some((live, _)) = running.live().filter(|_| running.rest == Rest::Awake) else { continue };
            evidence.in_flight += running.in_flight();
            if let Some(Ok(backlog)) = &running.backlog {
                evidence.backlog += backlog.length().unwrap_or(0);
            }
            for (watcher, activity) in running.recent_reports() {
                // Every report of an app's instances tells of the same queue.
                let most = held.entry(watcher).or_insert(0);
                *most = activity.held.max(*most);
                evidence.responses += activity.window.count;
                if activity.window.count >= FEW && activity.window.p90_us > evidence.p90_us {
                    (evidence.p50_us, evidence.p90_us) = (activity.window.p50_us, activity.window.p90_us);
                    slowest = *generation;
                }
            }
            running.monitor.sample(now.into_std(), &live.group);
            evidence.add_cpu(&running.monitor.cpu(), quota, !running.quota_applied);
        }
        evidence.held = held.values().sum();
        let loaded = (evidence.demand() > 0).then(|| self.scaling.loaded.unwrap_or(now));
        self.scaling.loaded = loaded;
        evidence.loaded_ms = loaded.map_or(0, |since| ms(now - since));
        (evidence, slowest)
    }

    /// One more instance, if the CMDB agrees.
    async fn add(&mut self, evidence: &Evidence, policy: &Policy, decision: &scaler::Decision) {
        let short = decision.cause == Cause::Host || self.lacks_room();
        if let Some(node) = self.best_elsewhere().filter(|_| short) {
            return self.add_elsewhere(node, evidence, policy, decision).await;
        }
        let transition = Transition::Add {
            node: self.host.node.clone(),
            start_timeout_ms: self.start_timeout_ms(),
            max: self.app.scale.max,
            replacing: false,
            lost: self.lost(),
        };
        match self.apply(transition).await {
            Ok(Outcome::Own(generation)) => {
                self.decided("scale-out", decision.cause, generation, decision.words.clone());
                self.step(Cure::Add, evidence, policy, Some(generation));
                self.launch(generation, None, "the load needs another instance");
            }
            // Another host was faster, or starts fail: there is a next time.
            Ok(outcome) => tracing::debug!(app = %self.app.name, ?outcome, "no instance is added"),
            Err(refusal) => tracing::warn!(app = %self.app.name, %refusal, "no instance is added"),
        }
    }

    /// One more instance on another host, for this one is short. Its verdict is not awaited: what it does there, and what it
    /// takes from here, is that host's to measure.
    async fn add_elsewhere(
        &mut self,
        node: String,
        evidence: &Evidence,
        policy: &Policy,
        decision: &scaler::Decision,
    ) {
        match self.begin_on(node.clone(), false, "this host is full").await {
            Ok(Outcome::Own(generation)) => {
                let words = format!("{} ({node})", decision.words);
                self.decided("scale-out", decision.cause, generation, words);
                self.scaling.history.stepped(Cure::Add, evidence, policy);
                self.scaling.history.judged(Kind::Add, None);
            }
            Ok(outcome) => tracing::debug!(app = %self.app.name, ?outcome, "no instance is added elsewhere"),
            Err(refusal) => tracing::warn!(app = %self.app.name, %refusal, "no instance is added elsewhere"),
        }
    }

    fn step(&mut self, cure: Cure, evidence: &Evidence, policy: &Policy, added: Option<Generation>) {
        self.scaling.history.stepped(cure, evidence, policy);
        let Some(kind) = Kind::of(cure).filter(|kind| *kind != Kind::Back) else { return };
        let judged_at = added.is_none().then(|| Instant::now() + JUDGED_AFTER);
        let before = self.scaling.history.before(evidence);
        self.scaling.trial = Some(Trial { kind, before, added, judged_at });
    }

    fn set_quotas(&mut self, quota: Option<u32>) {
        let configured = self.app.resources.cpu.map(|cpu| cpu.0);
        self.scaling.raised = quota.filter(|quota| Some(*quota) != configured);
        for generation in self.generations() {
            if self.running.get(&generation).is_some_and(|running| running.quota_applied) {
                self.apply_quota(generation);
            }
        }
    }

    /// Judges the step on trial when it is time; one that did not help is undone.
    async fn judge(&mut self, evidence: &Evidence, policy: &Policy, now: Instant) {
        let Some(trial) = &mut self.scaling.trial else { return };
        let added = trial.added.map(|generation| self.running.get(&generation).map(Running::is_ready));
        match (added, trial.judged_at) {
            // It failed to start, or was ended: there is nothing to judge, and for this load no other is tried.
            (Some(None), _) => {
                let (kind, demand) = (trial.kind, trial.before.demand());
                self.scaling.trial = None;
                return self.scaling.history.judged(kind, Some(demand));
            }
            (Some(Some(true)), None) => return trial.judged_at = Some(now + JUDGED_AFTER),
            (_, None) => {
                trial.before.p90_us = trial.before.p90_us.max(evidence.p90_us);
                trial.before.responses = trial.before.responses.max(evidence.responses);
                return;
            }
            (_, Some(at)) if at > now => return,
            _ => {}
        }
        let Some(trial) = self.scaling.trial.take() else { return };
        let verdict = scaler::judge(&trial.before, evidence, policy);
        let in_vain = verdict == Verdict::InVain;
        self.scaling.history.judged(trial.kind, in_vain.then(|| trial.before.demand()));
        let step = match trial.added {
            Some(added) => format!("adding {}", name(&self.app.name, added)),
            None => format!("raising the quota to {}", self.quota().map_or_else(|| "none".into(), cores)),
        };
        let figures = format!(
            "p90 {} ms before and {} ms now, {} and {} responses, {} and {} of a core used",
            trial.before.p90_us.div_ceil(1_000),
            evidence.p90_us.div_ceil(1_000),
            trial.before.responses,
            evidence.responses,
            cores(trial.before.used),
            cores(evidence.used),
        );
        let words = match verdict {
            Verdict::Helped => format!("{step} helped: {figures}"),
            Verdict::InVain => format!("{step} did not help: {figures}; it is undone"),
            Verdict::Unknown => {
                format!("{step} cannot be judged, the load has gone or the host is full: {figures}")
            }
        };
        let about = trial.added.or_else(|| self.running.keys().next_back().copied()).unwrap_or_default();
        self.host.metrics.judged(trial.added.is_some(), verdict);
        self.tell("verdict", about, words);
        match trial.added {
            _ if !in_vain => {}
            Some(added) => self.drain(added, "it did not help").await,
            None => self.set_quotas(None),
        }
    }

    /// What is wrong and cannot be mended here is said once, until it has been well for a while.
    fn say_once(&mut self, cause: Cause, about: Generation, words: String, now: Instant) {
        let cool_down = self.app.scale.cool_down;
        let is_known = |(said, at): (Cause, Instant)| said == cause || at + cool_down > now;
        if words.is_empty() || self.scaling.said.is_some_and(is_known) {
            return;
        }
        self.scaling.said = Some((cause, now));
        self.decided("scale-none", cause, about, words);
    }

    fn has_something_to_scale(&self) -> bool {
        let now = Instant::now();
        let active = |running: &Running| {
            running.is_ready() && (running.in_flight() > 0 || running.last_active + ACTIVE_FOR > now)
        };
        // Asleep it needs no quota, and says nothing about it.
        let awake = |running: &Running| running.is_ready() && running.rest == Rest::Awake;
        self.scaling.trial.is_some()
            || (self.scaling.raised.is_some() && self.running.values().any(awake))
            || self.serving() > self.app.scale.min.max(1)
            || self.running.values().any(active)
    }

    fn starting(&self) -> u32 {
        let starting = self.running.values().filter(|running| matches!(running.stage, Stage::Starting));
        u32::try_from(starting.count()).unwrap_or(u32::MAX)
    }

    /// The youngest instance that serves and is not meant to replace, or be replaced by, another.
    fn youngest(&self) -> Option<Generation> {
        let free = |running: &Running| running.is_ready() && running.replacement.is_none();
        self.running.iter().rev().find(|(_, running)| free(running)).map(|(generation, _)| *generation)
    }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
