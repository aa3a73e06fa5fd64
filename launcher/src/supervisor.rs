//! One app's supervisor: the one task that decides about the app's instances.
//!
//! It asks the CMDB's state machine before it acts, so what it does is what every reader of the CMDB sees. Nothing in
//! here waits for a container: each instance has a task of its own ([`crate::instance`]) that reports back.

mod adopt;
mod duties;
mod exclusive;
mod hosts;
mod leak;
mod moving;
mod orders;
mod rest;
mod room;
mod running;
mod scaling;
mod status;
mod tiers;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use cmdb::{App, AppRecord, Generation, Outcome, Transition};
use launcher_client::wire::{
    Activity, Decision, LogLine, Refusal, RefusalCode, ScaleOrder, Status, WakeTiming,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    clock::unix_ms,
    host::Host,
    instance::{Adoption, Launch, Live, Note, name},
    output::Output,
    reclaim::Reclaimed,
    tiers::{Candidate, Tier, WakeCosts},
};
use running::{Running, Stage};
use scaling::Scaling;
pub(crate) use status::absent;

/// How many finished starts can still be explained.
const TIMINGS_KEPT: usize = 16;

/// What a supervisor is told or asked.
#[derive(Debug)]
pub enum Message {
    /// Have an instance ready.
    Wake(oneshot::Sender<Result<Awake, Refusal>>),
    /// An instance of an earlier daemon runs: go on with it.
    Adopt(Generation, Box<Adoption>),
    /// From an instance's task.
    Note(Note),
    /// A proxy saw the instance's first response byte.
    FirstByte(Generation),
    /// What an instance did, as one proxy saw it.
    Report(u64, Activity),
    /// A proxy has nothing on that draining instance.
    Quiesced(u64, Generation),
    /// A proxy could not connect to it.
    Suspect(Generation, String),
    /// It was tried again: it does not accept connections.
    Deaf(Generation, String),
    /// A proxy that serves traffic has come.
    WatcherCame(u64),
    /// It has gone.
    WatcherGone(u64),
    /// Other limits, by the operator.
    Limit(Limits, oneshot::Sender<Result<(), Refusal>>),
    /// Another number of instances, or a pause, by the operator.
    Scale(ScaleOrder, oneshot::Sender<Result<(), Refusal>>),
    /// The app's configuration has changed.
    Spec(Arc<App>),
    /// The app is not configured any more.
    Removed,
    /// Its record has changed, and maybe not by this launcher.
    Look,
    /// End every instance; answered when they are gone.
    Stop(oneshot::Sender<()>),
    /// Replace every instance.
    Restart,
    /// Run the hooks of a signal; for how many instances they were begun.
    Signal(String, oneshot::Sender<Result<usize, Refusal>>),
    /// For `ps`.
    Status(oneshot::Sender<Vec<Status>>),
    /// The last lines of output.
    Logs(usize, oneshot::Sender<Vec<LogLine>>),
    /// What could sleep more deeply, for when memory is short.
    Candidates(oneshot::Sender<Vec<Candidate>>),
    /// Memory is short: that instance is to go down to this tier, and why.
    Descend(Generation, Tier, String),
    /// A frozen instance's memory has been taken back, and why; or why not.
    Reclaimed(Generation, Result<Reclaimed, String>, String),
    /// How a start went.
    Timing(Generation, oneshot::Sender<Option<WakeTiming>>),
    /// The launcher ends: end every instance; answered when they are gone.
    Shutdown(oneshot::Sender<()>),
}

/// Limits that the operator has set; what is `None` stays as it is.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// CPU quota in thousandths of a core.
    pub cpu: Option<u32>,
    /// Memory, bytes.
    pub memory: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u32>,
    /// Before that: back to the limits of the file.
    pub reset: bool,
}

/// An instance that is ready.
#[derive(Debug)]
pub struct Awake {
    /// The instance.
    pub live: Arc<Live>,
    /// How it came to be.
    pub timing: WakeTiming,
}

/// See the module.
pub struct Supervisor {
    host: Arc<Host>,
    /// What the vhost file says.
    file: Arc<App>,
    /// The same with the operator's overrides.
    app: Arc<App>,
    /// Whether the operator wants nothing to be scaled by itself.
    paused: bool,
    inbox: mpsc::UnboundedReceiver<Message>,
    own: mpsc::UnboundedSender<Message>,
    running: BTreeMap<Generation, Running>,
    wakers: Vec<oneshot::Sender<Result<Awake, Refusal>>>,
    stoppers: Vec<oneshot::Sender<()>>,
    output: Arc<Output>,
    timings: Vec<(Generation, WakeTiming)>,
    /// No replacement or `scale.min` start before this time, after one failed.
    retry_at: Option<Instant>,
    scaling: Scaling,
    leak: leak::Leak,
    /// What was last decided about the scaling.
    decision: Option<Decision>,
    /// What waking this app takes.
    costs: WakeCosts,
    removed: bool,
    ending: bool,
}

impl Supervisor {
    /// Begins the supervisor of `app`.
    pub fn begin(host: Arc<Host>, file: Arc<App>) -> mpsc::UnboundedSender<Message> {
        let (own, inbox) = mpsc::unbounded_channel();
        let overrides = host.overrides.of(&file.name);
        let supervisor = Self {
            host,
            app: Arc::new(overrides.of_file(&file)),
            file,
            paused: overrides.paused,
            inbox,
            own: own.clone(),
            running: BTreeMap::new(),
            wakers: Vec::new(),
            stoppers: Vec::new(),
            output: Arc::default(),
            timings: Vec::new(),
            retry_at: None,
            scaling: Scaling::new(),
            leak: leak::Leak::default(),
            decision: None,
            costs: WakeCosts::default(),
            removed: false,
            ending: false,
        };
        tokio::spawn(supervisor.run());
        own
    }

    async fn run(mut self) {
        self.keep_minimum().await;
        while !(self.running.is_empty() && (self.removed || self.ending)) {
            let deadline = self.next_duty();
            tokio::select! {
                message = self.inbox.recv() => match message {
                    // Boxed, as what follows: thousands of supervisors wait here, and need no room for what they will do.
                    Some(message) => Box::pin(self.handle(message)).await,
                    None => break, // cannot be: `own` is a sender
                },
                () = tokio::time::sleep_until(deadline) => {}
            }
            Box::pin(self.do_duties()).await;
        }
        self.answer_stoppers();
        self.inbox.close();
        while let Some(message) = self.inbox.recv().await {
            self.refuse(message);
        }
        if self.removed {
            self.host.free_ids(&self.app.name);
            self.host.governor.forget(&self.app.name);
        }
    }

    async fn handle(&mut self, message: Message) {
        match message {
            Message::Wake(reply) => self.wake(reply).await,
            Message::Adopt(generation, adoption) => self.adopt(generation, *adoption).await,
            Message::Note(note) => self.note(note).await,
            Message::FirstByte(generation) => self.first_byte(generation),
            Message::Report(watcher, activity) => self.report(watcher, &activity),
            Message::Quiesced(watcher, generation) => {
                if let Some(running) = self.running.get_mut(&generation) {
                    running.quiesced(watcher);
                }
            }
            Message::Suspect(generation, reason) => self.suspect(generation, &reason),
            Message::Deaf(generation, reason) => self.deaf(generation, &reason).await,
            Message::WatcherCame(watcher) => {
                self.running.values_mut().for_each(|r| r.watcher_came(watcher));
            }
            Message::WatcherGone(watcher) => {
                self.running.values_mut().for_each(|r| r.watcher_gone(watcher));
            }
            Message::Limit(limits, reply) => drop(reply.send(self.limit(limits))),
            Message::Scale(order, reply) => drop(reply.send(self.scale(order))),
            Message::Spec(app) => self.spec(app).await,
            Message::Look => self.look().await,
            Message::Removed => {
                self.removed = true;
                self.drain_all("the app was removed").await;
                self.refuse_wakers(&Refusal::new(RefusalCode::UnknownApp, "the app was removed"));
            }
            Message::Stop(reply) => {
                self.stoppers.push(reply);
                self.drain_all("stopped by the operator").await;
                // Whoever still waits asks again, and so begins another start; who has left does not.
                self.refuse_wakers(&Refusal::new(RefusalCode::Busy, "stopped by the operator"));
                self.answer_stoppers();
            }
            Message::Restart => self.replace_all("restarted by the operator"),
            Message::Signal(name, reply) => drop(reply.send(self.signal(&name))),
            Message::Status(reply) => drop(reply.send(self.status())),
            Message::Logs(count, reply) => drop(reply.send(self.output.last(count))),
            Message::Candidates(reply) => drop(reply.send(self.candidates())),
            Message::Descend(generation, to, why) => self.descend(generation, to, &why).await,
            Message::Reclaimed(generation, result, why) => self.reclaimed(generation, result, &why),
            Message::Timing(generation, reply) => {
                let found = self.timings.iter().find(|(g, _)| *g == generation).map(|(_, t)| t.clone());
                drop(reply.send(found));
            }
            Message::Shutdown(reply) => {
                self.ending = true;
                self.stoppers.push(reply);
                self.refuse_wakers(&Refusal::new(RefusalCode::Busy, "the launcher is ending"));
                self.give_up_all().await;
                self.terminate_all();
            }
        }
    }

    /// Joins the start that is under way, begins one, or says why not.
    async fn wake(&mut self, reply: oneshot::Sender<Result<Awake, Refusal>>) {
        if self.removed || self.ending {
            return drop(reply.send(Err(Refusal::new(RefusalCode::Busy, "the app is ending"))));
        }
        let start_timeout_ms = self.start_timeout_ms();
        // Twice: a record of an instance that this host does not have is cleared, and the second round decides.
        for _ in 0..2 {
            let transition = Transition::Wake { node: self.place(), start_timeout_ms, lost: self.lost() };
            if self.is_exclusive() {
                if !self.is_heard() {
                    let message = "the CMDB does not hear this host: its exclusive volume may be another's";
                    return drop(reply.send(Err(Refusal::new(RefusalCode::Busy, message))));
                }
                if self.is_taken(&self.record(), None) {
                    return self.wakers.push(reply);
                }
            }
            let (outcome, record) = match self.transit(transition).await {
                Ok((outcome, record)) => (Ok(outcome), record),
                Err(refusal) => (Err(refusal), Default::default()),
            };
            if let Ok(Outcome::Ready(generation) | Outcome::Join(generation) | Outcome::Own(generation)) =
                outcome
                && let Some(refusal) = self.elsewhere(&record, generation)
            {
                return self.refuse_or_stand_in(refusal, reply).await;
            }
            match outcome {
                Ok(Outcome::Ready(generation)) => match self.awake(generation).await {
                    Some(awake) => return drop(reply.send(Ok(awake))),
                    // It runs, and is only just being picked up from an earlier daemon.
                    None if self.running.get(&generation).is_some_and(Running::is_adopted) => {
                        return self.wakers.push(reply);
                    }
                    None => drop(self.apply(Transition::Gone { generation }).await),
                },
                Ok(Outcome::Join(generation)) if self.running.contains_key(&generation) => {
                    return self.wakers.push(reply);
                }
                // Another host has placed it here a moment ago; or it is of an earlier life.
                Ok(Outcome::Join(generation)) => {
                    if let Some(instance) = record.instances.get(&generation) {
                        self.take_up(instance).await;
                    }
                }
                // Another instance has begun to drain in this very moment.
                Ok(Outcome::Own(generation)) if self.is_taken(&record, Some(generation)) => {
                    self.wakers.push(reply);
                    return drop(self.apply(Transition::Gone { generation }).await);
                }
                Ok(Outcome::Own(generation)) => {
                    self.wakers.push(reply);
                    return self.launch(generation, None, "a request");
                }
                Ok(Outcome::Backoff { until_ms, reason }) => {
                    return drop(reply.send(Err(self.backing_off(until_ms, &reason))));
                }
                Ok(other) => {
                    let message = format!("the CMDB answered a wake with {other:?}");
                    return drop(reply.send(Err(Refusal::new(RefusalCode::Internal, message))));
                }
                Err(refusal) => return drop(reply.send(Err(refusal))),
            }
        }
        let message = "the CMDB names instances that this host does not have";
        drop(reply.send(Err(Refusal::new(RefusalCode::Internal, message))));
    }

    /// Begins an instance; `replaces` ends when it is ready.
    fn launch(&mut self, generation: Generation, replaces: Option<Generation>, cause: &str) {
        self.emit(
            "wake",
            generation,
            format!("{} is being started: {cause}", name(&self.app.name, generation)),
        );
        tokio::spawn(self.admit(generation, replaces).run());
    }

    /// Makes room for an instance; what it lives by.
    fn admit(&mut self, generation: Generation, replaces: Option<Generation>) -> Launch {
        let (control, inbox) = mpsc::unbounded_channel();
        let first = !self.running.values().any(|r| !r.is_ending());
        self.running.insert(generation, Running::starting(control, Arc::clone(&self.app), replaces));
        Launch {
            host: Arc::clone(&self.host),
            app: Arc::clone(&self.app),
            generation,
            first,
            output: Arc::clone(&self.output),
            supervisor: self.own.clone(),
            control: inbox,
        }
    }

    async fn note(&mut self, note: Note) {
        match note {
            Note::Waits { generation, why } => self.waits(generation, &why),
            Note::Admitted { generation, slot, waited } => self.admitted(generation, slot, waited),
            Note::Created { generation, pid, group, image } => {
                if let Some(running) = self.running.get_mut(&generation) {
                    running.created(pid, group, image);
                }
            }
            Note::Listens { live, timing } => self.listens(live, timing).await,
            Note::Ended { generation, end } => self.ended(generation, end).await,
        }
    }

    async fn listens(&mut self, live: Arc<Live>, timing: WakeTiming) {
        let generation = live.id.generation;
        let Some(running) = self.running.get_mut(&generation) else { return };
        if running.is_adopted() {
            return self.adopted(live, timing);
        }
        let replaces = running.replaces;
        // One that is draining already (the operator stopped the app while it started) must not come to serve.
        if !matches!(running.stage, Stage::Starting) {
            return;
        }
        match self.apply(Transition::Ready { generation, port: live.port }).await {
            Ok(Outcome::Done) => {}
            other => {
                tracing::warn!(
                    ?other,
                    generation = generation.0,
                    "the CMDB does not take an instance that is ready"
                );
                return self.drain(generation, "the CMDB does not know it").await;
            }
        }
        if let Some(running) = self.running.get_mut(&generation) {
            running.ready(Arc::clone(&live), timing.clone());
            running.woke = Some((Tier::Stopped, timing.total_us));
        }
        let took = Duration::from_micros(timing.total_us);
        let message = format!("{} listens on port {} after {took:.1?}", live.id, live.port);
        self.emit("ready", generation, message);
        for waker in self.wakers.drain(..) {
            let _ = waker.send(Ok(Awake { live: Arc::clone(&live), timing: timing.clone() }));
        }
        // All else can wait until the visitors have been answered.
        self.host.metrics.started(&timing);
        self.started(generation);
        self.retry_at = None;
        if self.timings.len() == TIMINGS_KEPT {
            self.timings.remove(0);
        }
        self.timings.push((generation, timing));
        if let Some(old) = replaces {
            self.drain(old, &format!("replaced by {generation}")).await;
        }
    }

    async fn ended(&mut self, generation: Generation, end: crate::instance::End) {
        let Some(running) = self.running.remove(&generation) else { return };
        self.remember_growth(&running);
        let id = name(&self.app.name, generation);
        let age = running.age();
        if running.never_listened() {
            let stopped = running.is_ending().then_some("stopped");
            self.host.metrics.not_started(stopped.unwrap_or(end.code.as_str()));
        }
        if running.is_ending() {
            drop(self.apply(Transition::Gone { generation }).await);
            self.emit("stopped", generation, format!("{id} ended after {age:.1?}: {}", running.why_ending()));
        } else if end.code == RefusalCode::Busy {
            self.no_room(generation, &running, end.reason).await;
        } else {
            let was_starting = matches!(running.stage, Stage::Starting);
            drop(self.apply(Transition::Failed { generation, reason: end.reason.clone() }).await);
            let words =
                self.output.last_words(generation).map_or(String::new(), |l| format!("; its last line: {l}"));
            let kind = match (end.oom, was_starting) {
                (true, _) => "oom",
                (false, true) => "start-failed",
                (false, false) => "exited",
            };
            let when = if was_starting { " before it listened" } else { "" };
            self.emit(kind, generation, format!("{id} {}{when} after {age:.1?}{words}", end.reason));
            self.tell_of_backoff(generation);
            if was_starting {
                // A replacement that fails leaves the old instance in place, to be tried again later.
                self.retry_at = Some(Instant::now() + self.backoff());
                if let Some(old) = running.replaces.and_then(|old| self.running.get_mut(&old)) {
                    old.replacement = None;
                }
            }
            if was_starting && running.replaces.is_none() {
                self.refuse_wakers(&Refusal::new(
                    end.code,
                    format!("{} {}{when}", self.app.name, end.reason),
                ));
            }
        }
        // A waker that came while the only start was being stopped wants another one.
        if !self.running.values().any(|r| matches!(r.stage, Stage::Starting)) {
            for waker in std::mem::take(&mut self.wakers) {
                Box::pin(self.wake(waker)).await;
            }
        }
        self.answer_stoppers();
    }

    async fn apply(&self, transition: Transition) -> Result<Outcome, Refusal> {
        self.transit(transition).await.map(|(outcome, _)| outcome)
    }

    async fn transit(&self, transition: Transition) -> Result<(Outcome, AppRecord), Refusal> {
        let done = self.host.store.apply(&self.app.name, transition).await;
        done.map_err(|error| Refusal::new(RefusalCode::Internal, error.to_string()))
    }

    fn tell_of_backoff(&self, generation: Generation) {
        let Some((_, record)) = self.host.store.get(&self.app.name) else { return };
        let wait = Duration::from_millis(record.backoff_until_ms.saturating_sub(unix_ms()));
        if !wait.is_zero() {
            let message = format!("no start for {wait:.1?} after {} failure(s) in a row", record.failures);
            self.emit("back-off", generation, message);
        }
    }

    fn backoff(&self) -> Duration {
        let until = self.host.store.get(&self.app.name).map_or(0, |(_, record)| record.backoff_until_ms);
        Duration::from_millis(until.saturating_sub(unix_ms()).max(1_000))
    }

    fn backing_off(&self, until_ms: u64, reason: &str) -> Refusal {
        let wait_ms = until_ms.saturating_sub(unix_ms());
        let message = format!(
            "{} {reason}; the next start is tried in {:.1?}",
            self.app.name,
            Duration::from_millis(wait_ms)
        );
        Refusal { retry_after_ms: Some(wait_ms), ..Refusal::new(RefusalCode::Backoff, message) }
    }

    fn refuse_wakers(&mut self, refusal: &Refusal) {
        for waker in self.wakers.drain(..) {
            let _ = waker.send(Err(refusal.clone()));
        }
    }

    fn answer_stoppers(&mut self) {
        if self.running.values().all(|r| !r.asked_to_stop) {
            for stopper in self.stoppers.drain(..) {
                let _ = stopper.send(());
            }
        }
    }

    /// Answers what came too late, when this supervisor has ended.
    fn refuse(&self, message: Message) {
        match message {
            Message::Wake(reply) => {
                let refusal = Refusal::new(RefusalCode::Busy, format!("{} is ending", self.app.name));
                drop(reply.send(Err(refusal)));
            }
            Message::Stop(reply) | Message::Shutdown(reply) => drop(reply.send(())),
            // The askers of the others see their channel close.
            _ => {}
        }
    }

    fn emit(&self, kind: &str, generation: Generation, message: String) {
        self.host.events.emit(kind, Some(&self.app.name), Some(generation), message);
    }

    /// How long a start may take at most: it may wait for a slot for as long as it may take from then on.
    fn start_timeout_ms(&self) -> u64 {
        u64::try_from(self.app.lifecycle.start_timeout.as_millis()).unwrap_or(u64::MAX).saturating_mul(2)
    }
}
