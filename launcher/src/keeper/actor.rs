//! The task behind [`Keeper`](super::Keeper): connection, table of containers, replacement of a dead spawner.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::link::{Link, Listed};
use super::{Command, Created, Found, KeeperError, KeeperEvent, Place, SharedFd};
use crate::sandbox::{ContainerId, Plan, PlanFds};
use crate::spawner::wire::{Event, Exit, FdCounts, Listening, Request};

/// Pause before the n-th attempt to get a spawner again.
const PAUSES: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(10), Duration::from_millis(100), Duration::from_secs(1)];
/// How long the spawner may take to end everything.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(10);

struct Actor {
    place: Place,
    link: Option<Link>,
    /// How often it could not be had since it was lost, and when to try next.
    failures: usize,
    retry_at: Instant,
    table: HashMap<ContainerId, Entry>,
    commands: mpsc::WeakUnboundedSender<Command>,
    outbox: mpsc::UnboundedSender<KeeperEvent>,
    leaving: Option<oneshot::Sender<()>>,
}

#[derive(Debug)]
struct Entry {
    pid: i32,
    port: Option<u16>,
    pidfd: Option<SharedFd>,
    notify: Option<OwnedFd>,
    /// For the next spawner, which is to hold and tell them as this one does: [`Plan::note`], [`PlanFds::outputs`].
    note: String,
    outputs: Vec<OwnedFd>,
    execed: bool,
    listening: Option<Listening>,
    /// Its maker is gone: how it ends cannot be known.
    orphan: bool,
    /// Its pidfd says that it has ended.
    dead: bool,
    pending: Option<oneshot::Sender<Result<Created, KeeperError>>>,
}

/// Connects or starts, and sets the actor to work.
pub(super) async fn start(
    place: Place,
    inbox: mpsc::UnboundedReceiver<Command>,
    commands: mpsc::WeakUnboundedSender<Command>,
    outbox: mpsc::UnboundedSender<KeeperEvent>,
) -> io::Result<(Vec<Found>, u32)> {
    let (link, listed) = Link::open(&place).await?;
    let pid = link.pid;
    let mut actor = Actor {
        place,
        link: Some(link),
        failures: 0,
        retry_at: Instant::now(),
        table: HashMap::new(),
        commands,
        outbox,
        leaving: None,
    };
    let mut found = Vec::new();
    for Listed { state, pidfd, notify, outputs } in listed {
        let shared = match &pidfd {
            Some(pidfd) => Some(Arc::new(pidfd.try_clone()?)),
            None => None,
        };
        let kept: io::Result<Vec<OwnedFd>> = outputs.iter().map(OwnedFd::try_clone).collect();
        if state.exited.is_some() || shared.is_none() {
            actor.tell(&Request::Forget { id: state.id.clone() }).await;
        } else {
            let entry = Entry {
                pid: state.pid,
                port: state.port,
                pidfd: shared,
                notify,
                note: state.note.clone(),
                outputs: kept?,
                execed: state.execed,
                listening: state.listening,
                orphan: false,
                dead: false,
                pending: None,
            };
            actor.table.insert(state.id.clone(), entry);
        }
        found.push(Found { state, pidfd, outputs });
    }
    tokio::spawn(actor.run(inbox));
    Ok((found, pid))
}

impl Actor {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Command>) {
        let mut leave_by: Option<Instant> = None;
        loop {
            let deadline = leave_by.unwrap_or_else(Instant::now);
            tokio::select! {
                command = inbox.recv(), if leave_by.is_none() => match command {
                    None => return,
                    Some(Command::Create { plan, fds, reply }) => self.create(plan, fds, reply).await,
                    Some(Command::Kill { id, signal }) => self.kill(&id, signal).await,
                    Some(Command::Dead { id }) => self.dead(id),
                    Some(Command::Shutdown { reply }) => {
                        leave_by = Some(Instant::now() + SHUTDOWN_PATIENCE);
                        self.leaving = Some(reply);
                        self.tell(&Request::Shutdown).await;
                        if self.link.is_none() {
                            return self.leave().await;
                        }
                    }
                },
                got = receive(self.link.as_ref()) => match got {
                    Ok(Some((event, fds))) => self.hear(event, fds).await,
                    Ok(None) | Err(_) if leave_by.is_some() => return self.leave().await,
                    Ok(None) => self.lose("it closed the connection"),
                    Err(error) => self.lose(&error.to_string()),
                },
                () = tokio::time::sleep_until(self.retry_at), if self.link.is_none() => self.regain().await,
                () = tokio::time::sleep_until(deadline), if leave_by.is_some() => return self.leave().await,
            }
        }
    }

    async fn create(
        &mut self,
        plan: Box<Plan>,
        fds: PlanFds,
        reply: oneshot::Sender<Result<Created, KeeperError>>,
    ) {
        let id = plan.id.clone();
        let port = plan.port;
        let Slot::Vacant(slot) = self.table.entry(id.clone()) else {
            let _ = reply.send(Err(KeeperError::Exists { id }));
            return;
        };
        let outputs: io::Result<Vec<OwnedFd>> = fds.outputs.iter().map(OwnedFd::try_clone).collect();
        let outputs = match outputs {
            Ok(outputs) => outputs,
            Err(error) => return drop(reply.send(Err(KeeperError::Send { id, error }))),
        };
        let note = plan.note.clone();
        let (counts, row) = FdCounts::pack(fds);
        let borrowed: Vec<_> = row.iter().map(AsFd::as_fd).collect();
        let sent = match &self.link {
            Some(link) => link.send(&Request::Create { plan, fds: counts }, &borrowed).await,
            None => Err(io::Error::new(io::ErrorKind::NotConnected, "the spawner is being restarted")),
        };
        match sent {
            Ok(()) => {
                slot.insert(Entry {
                    pid: 0,
                    port,
                    pidfd: None,
                    notify: None,
                    note,
                    outputs,
                    execed: false,
                    listening: None,
                    orphan: false,
                    dead: false,
                    pending: Some(reply),
                });
            }
            Err(error) => {
                let _ = reply.send(Err(KeeperError::Send { id, error }));
            }
        }
    }

    /// The daemon holds a pidfd itself: no need to trouble the spawner, unless the container is still being made.
    async fn kill(&mut self, id: &ContainerId, signal: i32) {
        let Some(entry) = self.table.get(id) else { return };
        match (&entry.pidfd, Signal::from_named_raw(signal)) {
            (Some(pidfd), Some(signal)) => {
                if let Err(error) = pidfd_send_signal(pidfd, signal)
                    && error != Errno::SRCH
                {
                    tracing::warn!(app = id.app, generation = id.generation, %error, "cannot signal a container");
                }
            }
            _ => self.tell(&Request::Kill { id: id.clone(), signal }).await,
        }
    }

    async fn hear(&mut self, event: Event, fds: Vec<OwnedFd>) {
        let mut fds = fds.into_iter();
        match event {
            Event::Created { id, pid, at_us } => self.created(id, pid, at_us, fds.next()).await,
            Event::Notify { id } => {
                if let Some(entry) = self.table.get_mut(&id) {
                    entry.notify = fds.next();
                }
            }
            Event::Execed { id, timings, notify, at_us } => {
                if let Some(entry) = self.table.get_mut(&id) {
                    entry.execed = true;
                    self.emit(KeeperEvent::Execed { id, timings, notify, at_us });
                }
            }
            Event::Failed { id, error } => match self.table.get_mut(&id).map(|entry| entry.pending.take()) {
                None => {}
                Some(None) => self.emit(KeeperEvent::Failed { id, error }),
                Some(Some(reply)) => {
                    // No process was made, so nothing else will be told of it.
                    self.table.remove(&id);
                    let _ = reply.send(Err(KeeperError::Step { id, error }));
                }
            },
            Event::Listening { id, listening } => self.listening(id, listening),
            Event::Exited { id, exit } => {
                self.tell(&Request::Forget { id: id.clone() }).await;
                self.finish(id, exit);
            }
            Event::Present(_) | Event::Listed { .. } => {}
        }
    }

    async fn created(&mut self, id: ContainerId, pid: i32, at_us: u64, pidfd: Option<OwnedFd>) {
        let Some(entry) = self.table.get_mut(&id) else { return };
        let Some(reply) = entry.pending.take() else { return };
        let kept = pidfd.as_ref().map(|fd| fd.try_clone().map(Arc::new));
        let (Some(pidfd), Some(Ok(kept))) = (pidfd, kept) else {
            // Out of descriptors: such a container cannot be watched, so it may not be.
            self.table.remove(&id);
            self.tell(&Request::Kill { id: id.clone(), signal: Signal::KILL.as_raw() }).await;
            self.tell(&Request::Forget { id: id.clone() }).await;
            let error = io::Error::from(Errno::MFILE);
            let _ = reply.send(Err(KeeperError::Send { id, error }));
            return;
        };
        entry.pid = pid;
        entry.pidfd = Some(kept);
        // Who asked may have left; the events will still come, and `kill` ends it.
        let _ = reply.send(Ok(Created { pid, pidfd, at_us }));
    }

    fn listening(&mut self, id: ContainerId, listening: Listening) {
        if let Some(entry) = self.table.get_mut(&id)
            && entry.listening.is_none()
        {
            entry.listening = Some(listening);
            self.emit(KeeperEvent::Listening { id, listening });
        }
    }

    /// A pidfd that is watched here, because the spawner died, says that its container has ended.
    fn dead(&mut self, id: ContainerId) {
        if let Some(entry) = self.table.get_mut(&id) {
            entry.dead = true;
            if entry.orphan {
                self.finish(id, Exit::Unknown);
            }
        }
    }

    fn finish(&mut self, id: ContainerId, exit: Exit) {
        if self.table.remove(&id).is_some() {
            self.emit(KeeperEvent::Exited { id, exit });
        }
    }

    fn emit(&self, event: KeeperEvent) {
        // A daemon that does not listen any more is on its way out.
        let _ = self.outbox.send(event);
    }

    /// Says something to the spawner; a failure shows as the loss of the connection.
    async fn tell(&mut self, request: &Request) {
        if let Some(link) = &self.link
            && let Err(error) = link.send(request, &[]).await
        {
            tracing::debug!(%error, "telling the spawner");
        }
    }

    fn lose(&mut self, why: &str) {
        tracing::error!(why, "the spawner is lost; containers live on, starting another");
        if let Some(link) = self.link.take() {
            link.lose();
        }
        self.failures = 0;
        self.retry_at = Instant::now();
        self.emit(KeeperEvent::SpawnerLost);
        let lost: Vec<ContainerId> = self
            .table
            .iter()
            .filter(|(_, entry)| entry.pending.is_some())
            .map(|(id, _)| id.clone())
            .collect();
        for id in lost {
            if let Some(reply) = self.table.remove(&id).and_then(|entry| entry.pending) {
                let _ = reply.send(Err(KeeperError::Lost { id }));
            }
        }
        for (id, entry) in &self.table {
            if let Some(pidfd) = entry.pidfd.clone().filter(|_| !entry.orphan) {
                tokio::spawn(watch(pidfd, id.clone(), self.commands.clone()));
            }
        }
    }

    async fn regain(&mut self) {
        match Link::open(&self.place).await {
            Ok((link, listed)) => {
                self.link = Some(link);
                self.reconcile(listed).await;
                self.emit(KeeperEvent::SpawnerBack);
            }
            Err(error) => {
                self.failures += 1;
                self.retry_at = Instant::now() + PAUSES[self.failures.min(PAUSES.len() - 1)];
                tracing::error!(%error, failures = self.failures, "cannot start the spawner");
                if self.failures >= PAUSES.len() - 1 {
                    let dead: Vec<_> =
                        self.table.iter().filter(|(_, entry)| entry.dead).map(|(id, _)| id.clone()).collect();
                    for id in dead {
                        self.finish(id, Exit::Unknown);
                    }
                }
            }
        }
    }

    /// Brings the table and what the spawner has into line: it may be the old one after a broken connection, or a
    /// fresh one that knows nothing.
    async fn reconcile(&mut self, listed: Vec<Listed>) {
        let mut orphans: HashMap<ContainerId, ()> = self.table.keys().map(|id| (id.clone(), ())).collect();
        for Listed { state, notify, .. } in listed {
            let id = state.id.clone();
            orphans.remove(&id);
            let Some(entry) = self.table.get_mut(&id) else {
                // Made for a request whose asker was told that it is lost.
                self.tell(&Request::Kill { id: id.clone(), signal: Signal::KILL.as_raw() }).await;
                self.tell(&Request::Forget { id }).await;
                continue;
            };
            let has_notify = notify.is_some() || entry.notify.is_some();
            if notify.is_some() {
                entry.notify = notify;
            }
            if state.execed && !entry.execed {
                entry.execed = true;
                let at_us = super::monotonic_us();
                self.emit(KeeperEvent::Execed {
                    id: id.clone(),
                    timings: Vec::new(),
                    notify: has_notify,
                    at_us,
                });
            }
            if let Some(listening) = state.listening {
                self.listening(id.clone(), listening);
            }
            if let Some(error) = state.failed {
                self.emit(KeeperEvent::Failed { id: id.clone(), error });
            }
            if let Some(exit) = state.exited {
                self.tell(&Request::Forget { id: id.clone() }).await;
                self.finish(id, exit);
            }
        }
        for (id, ()) in orphans {
            self.adopt(id).await;
        }
    }

    async fn adopt(&mut self, id: ContainerId) {
        let Some(entry) = self.table.get_mut(&id) else { return };
        entry.orphan = true;
        let (false, Some(pidfd)) = (entry.dead, &entry.pidfd) else {
            return self.finish(id, Exit::Unknown);
        };
        let request = Request::Adopt {
            id: id.clone(),
            pid: entry.pid,
            port: entry.port,
            listening: entry.listening,
            notify: entry.notify.is_some(),
            note: entry.note.clone(),
        };
        let mut fds = vec![pidfd.as_fd()];
        fds.extend(entry.notify.as_ref().map(AsFd::as_fd));
        fds.extend(entry.outputs.iter().map(AsFd::as_fd));
        if let Some(link) = &self.link
            && let Err(error) = link.send(&request, &fds).await
        {
            tracing::error!(app = id.app, generation = id.generation, %error, "cannot hand a container over");
        }
        // Whether it was still being made is not known to anybody; what it does next shows it.
        if let Some(entry) = self.table.get_mut(&id)
            && !entry.execed
        {
            entry.execed = true;
            let event = KeeperEvent::Execed {
                id,
                timings: Vec::new(),
                notify: entry.notify.is_some(),
                at_us: super::monotonic_us(),
            };
            self.emit(event);
        }
    }

    /// The end: whatever the spawner did not end is ended here.
    async fn leave(mut self) {
        for entry in self.table.values() {
            if let Some(pidfd) = &entry.pidfd {
                let _ = pidfd_send_signal(pidfd, Signal::KILL);
            }
        }
        let ids: Vec<_> = self.table.keys().cloned().collect();
        for id in ids {
            self.finish(id, Exit::Unknown);
        }
        if let Some(link) = self.link.take() {
            link.close().await;
        }
        if let Some(reply) = self.leaving.take() {
            let _ = reply.send(());
        }
    }
}

async fn receive(link: Option<&Link>) -> io::Result<Option<(Event, Vec<OwnedFd>)>> {
    match link {
        Some(link) => link.receive().await,
        None => std::future::pending().await,
    }
}

/// Waits for the end of a process that is not the current spawner's child.
async fn watch(pidfd: SharedFd, id: ContainerId, commands: mpsc::WeakUnboundedSender<Command>) {
    let watched =
        pidfd.try_clone().and_then(|fd| crate::asyncfd::register(fd, tokio::io::Interest::READABLE));
    match watched {
        Ok(watched) => {
            let _ = watched.readable().await;
        }
        Err(error) => {
            tracing::error!(app = id.app, generation = id.generation, %error, "cannot watch a container");
            return;
        }
    }
    if let Some(commands) = commands.upgrade() {
        let _ = commands.send(Command::Dead { id });
    }
}
