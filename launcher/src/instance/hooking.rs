//! Where the operator's hooks come into an instance's life.

use std::{sync::Arc, time::Duration};

use cmdb::hook::Point;
use tokio::task::JoinHandle;

use super::{End, Launch, Made};
use crate::{
    clock::unix_us,
    hooks::{Clocks, Hooks, Subject, has},
    trace::Trace,
};

/// What comes when the hooks before it have ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Then {
    /// It gets requests: its port, and when it began to listen.
    Ready(u16, u64),
    /// It is told to end, and has so long.
    Stop(Duration),
}

/// The hooks of one instance whose process exists.
#[derive(Debug)]
pub(super) struct Attendants {
    hooks: Arc<Hooks>,
    subject: Subject,
    clocks: Clocks,
    pending: Option<(JoinHandle<Result<(), String>>, Then)>,
    told_to_stop: bool,
}

impl Launch {
    /// Lets the hooks of a point before the process exists run; `trace` tells how long that took.
    pub(super) async fn hooks_before(
        &self,
        point: Point,
        subject: &Subject,
        trace: &mut Trace,
    ) -> Result<(), End> {
        if !has(&self.app, point) {
            return Ok(());
        }
        let outcome = self.host.hooks.before(point, subject).await;
        trace.lap(point.as_str());
        outcome.map_err(|reason| self.failed(&format!("could not be started: {reason}")))
    }

    /// What hooks are told of this instance while nothing of it is there.
    pub(super) fn subject(&self) -> Subject {
        Subject {
            app: Arc::clone(&self.app),
            generation: self.generation,
            output: Arc::clone(&self.output),
            pid: None,
            port: None,
            group: None,
            end: None,
        }
    }

    pub(super) fn attendants(&self, made: &Made) -> Attendants {
        let mut subject = self.subject();
        subject.pid = Some(made.pid);
        subject.group = Some(Arc::clone(&made.group));
        Attendants {
            hooks: Arc::clone(&self.host.hooks),
            subject,
            clocks: Clocks::default(),
            pending: None,
            told_to_stop: false,
        }
    }

    /// The processes have ended, the cgroup is there.
    pub(super) async fn hooks_before_exit(&self, end: &End) {
        if has(&self.app, Point::BeforeExit) {
            // A start that has not come so far has nothing that ends, and its visitors wait for the answer.
            let Ok(group) = self.host.cgroups.open(&self.container()) else { return };
            let mut subject = self.subject();
            subject.end = Some(end.reason.clone());
            subject.group = Some(Arc::new(group));
            // It cannot be kept from ending: a failure is told of, and that is all.
            drop(self.host.hooks.before(Point::BeforeExit, &subject).await);
        }
    }

    /// Nothing of the instance is left.
    pub(super) fn hooks_after_exit(&self, end: &End) {
        if has(&self.app, Point::AfterExit) {
            let mut subject = self.subject();
            subject.end = Some(end.reason.clone());
            self.host.hooks.after(Point::AfterExit, &subject);
        }
    }
}

impl Attendants {
    /// The program runs.
    pub(super) fn started(&self) {
        self.hooks.after(Point::AfterStart, &self.subject);
    }

    /// It listens: `true` when it may get requests at once, otherwise [`Self::passed`] tells when.
    pub(super) fn may_be_ready(&mut self, port: u16, at_us: u64) -> bool {
        self.subject.port = Some(port);
        !self.waits(Point::BeforeReady, Then::Ready(port, at_us))
    }

    /// It gets requests.
    pub(super) fn ready(&mut self) {
        self.hooks.after(Point::AfterReady, &self.subject);
        self.clocks = self.hooks.clocks(&self.subject, Duration::ZERO);
    }

    /// It has got requests since an earlier daemon started it.
    pub(super) fn goes_on(&mut self, port: u16, begun_us: u64) {
        self.subject.port = Some(port);
        let age = Duration::from_micros(unix_us().saturating_sub(begun_us));
        self.clocks = self.hooks.clocks(&self.subject, age);
    }

    /// It is to end: `true` when it may be told at once, otherwise [`Self::passed`] tells when.
    pub(super) fn may_be_stopped(&mut self, grace: Duration) -> bool {
        self.told_to_stop = true;
        self.clocks = Clocks::default();
        !self.waits(Point::BeforeStop, Then::Stop(grace))
    }

    /// Whether its end waits for hooks.
    pub(super) fn delays_the_stop(&self) -> bool {
        matches!(self.pending, Some((_, Then::Stop(_))))
    }

    /// Whether its readiness waits for hooks.
    pub(super) fn delays_readiness(&self) -> bool {
        matches!(self.pending, Some((_, Then::Ready(..))))
    }

    /// Resolves when hooks that are waited for have ended, with what comes now, or why it does not.
    pub(super) async fn passed(&mut self) -> Result<Then, String> {
        match &mut self.pending {
            None => std::future::pending().await,
            Some((task, then)) => {
                let then = *then;
                let outcome = task.await.unwrap_or_else(|error| Err(error.to_string()));
                self.pending = None;
                outcome.map(|()| then)
            }
        }
    }

    /// Its processes have ended.
    pub(super) fn ended(&mut self, end: &End) {
        self.clocks = Clocks::default();
        self.subject.end = Some(end.reason.clone());
        self.subject.pid = None;
        if end.oom {
            self.hooks.after(Point::Oom, &self.subject);
        }
        if self.told_to_stop {
            self.hooks.after(Point::AfterStop, &self.subject);
        }
    }

    fn waits(&mut self, point: Point, then: Then) -> bool {
        if !has(&self.subject.app, point) {
            return false;
        }
        let (hooks, subject) = (Arc::clone(&self.hooks), self.subject.clone());
        let task = tokio::spawn(async move { hooks.before(point, &subject).await });
        self.pending = Some((task, then));
        true
    }
}
