//! The spawner's loop: one thread, one epoll, nothing that blocks.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::net::SocketFlags;
use rustix::process::Signal;

use super::container::Container;
use super::listen;
use super::peer::Peer;
use super::wire::{self, Event, FdCounts, Listening, Request, monotonic_us};
use crate::sandbox::notify::Listener;
use crate::sandbox::{self, ContainerId, Plan, Report, StepError, UserNs, start};

/// With neither a daemon nor a container the spawner waits so long for a daemon, then it ends.
const LONELY: Duration = Duration::from_secs(5);

/// What an epoll event is about; the rest of its 64 bits is the container's key.
const LISTENER: u64 = 0;
const PEER: u64 = 1;
const PIDFD: u64 = 2;
const REPORT: u64 = 3;
const NOTIFY: u64 = 4;
const KINDS: u64 = 8;

pub(super) struct Server {
    epoll: OwnedFd,
    listener: OwnedFd,
    peer: Option<Peer>,
    userns: HashMap<u32, UserNs>,
    containers: HashMap<u64, Container>,
    keys: HashMap<ContainerId, u64>,
    last_key: u64,
    lonely_since: Option<Instant>,
    leaving: bool,
}

impl Server {
    pub(super) fn new(listener: OwnedFd) -> io::Result<Server> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
        Ok(Server {
            epoll,
            listener,
            peer: None,
            userns: HashMap::new(),
            containers: HashMap::new(),
            keys: HashMap::new(),
            last_key: 0,
            lonely_since: Some(Instant::now()),
            leaving: false,
        })
    }

    /// Serves until it is told to end or nothing is left to serve.
    pub(super) fn run(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(64);
        loop {
            let alive = self.containers.values().any(|container| container.exited.is_none());
            if self.leaving && !alive {
                return Ok(());
            }
            let timeout = if alive || self.peer.is_some() {
                self.lonely_since = None;
                None
            } else {
                let left =
                    LONELY.saturating_sub(self.lonely_since.get_or_insert_with(Instant::now).elapsed());
                if left.is_zero() && !self.accept() {
                    return Ok(());
                }
                Timespec::try_from(left).ok()
            };
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            for event in events.drain(..) {
                let token = event.data.u64();
                self.handle(token % KINDS, token / KINDS, event.flags);
            }
        }
    }

    fn handle(&mut self, kind: u64, key: u64, flags: epoll::EventFlags) {
        match kind {
            LISTENER => drop(self.accept()),
            PEER => self.hear(flags),
            PIDFD => self.ended(key),
            REPORT => self.reports(key),
            _ => self.notified(key, flags),
        }
    }

    /// Takes the next daemon; a new one replaces the old. `false` when there is none.
    fn accept(&mut self) -> bool {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(socket) = rustix::net::accept_with(&self.listener, flags) else { return false };
        if !listen::is_root(socket.as_fd()) {
            return false;
        }
        self.drop_peer();
        if self.watch(&socket, PEER).is_ok() {
            self.peer = Some(Peer::new(socket));
        }
        true
    }

    fn drop_peer(&mut self) {
        if let Some(peer) = self.peer.take() {
            let _ = epoll::delete(&self.epoll, &peer);
        }
    }

    fn hear(&mut self, flags: epoll::EventFlags) {
        if flags.contains(epoll::EventFlags::OUT) {
            let flushed = self.peer.as_mut().map_or(Ok(()), Peer::flush);
            if flushed.is_err() {
                return self.drop_peer();
            }
            self.arm_peer();
        }
        let Some(peer) = &self.peer else { return };
        match wire::receive::<Request>(peer.as_fd()) {
            Ok(Some((request, fds))) => self.serve(request, fds),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(None) => self.drop_peer(),
            Err(error) => {
                tracing::warn!(%error, "the daemon's words are not understood");
                self.drop_peer();
            }
        }
    }

    fn serve(&mut self, request: Request, fds: Vec<OwnedFd>) {
        match request {
            Request::Create { plan, fds: counts } => self.create(&plan, counts, fds),
            Request::Adopt { id, pid, port, listening, notify, note } => {
                let mut fds = fds.into_iter();
                let Some(pidfd) = fds.next() else { return };
                let mut container = Container::new(id, pid, pidfd, port);
                container.execed = true;
                container.listening = listening;
                container.notify = if notify { fds.next().map(Listener::new) } else { None };
                container.note = note;
                container.outputs = fds.collect();
                self.keep(container);
            }
            Request::Kill { id, signal } => {
                if let (Some(container), Some(signal)) = (self.find(&id), Signal::from_named_raw(signal)) {
                    container.signal(signal);
                }
            }
            Request::List => self.list(),
            Request::Forget { id } => {
                if let Some(&key) = self.keys.get(&id)
                    && let Some(container) = self.containers.get_mut(&key)
                {
                    container.forgotten = true;
                    self.bury(key);
                }
            }
            Request::Shutdown => {
                self.leaving = true;
                for container in self.containers.values() {
                    container.signal(Signal::KILL);
                }
            }
        }
    }

    fn create(&mut self, plan: &Plan, counts: FdCounts, fds: Vec<OwnedFd>) {
        let id = plan.id.clone();
        match self.start(plan, counts, fds) {
            Err(error) => self.tell(&Event::Failed { id, error }, &[]),
            Ok(container) => {
                let at_us = monotonic_us();
                let event = Event::Created { id, pid: container.pid, at_us };
                // Told before it is kept: nothing else can be told of it earlier.
                if let Some(peer) = &mut self.peer
                    && let Err(error) = peer.tell(&event, &[container.pidfd.as_fd()])
                {
                    tracing::warn!(%error, "telling the daemon");
                    self.drop_peer();
                }
                self.keep(container);
            }
        }
    }

    fn start(&mut self, plan: &Plan, counts: FdCounts, fds: Vec<OwnedFd>) -> Result<Container, StepError> {
        let failed =
            |errno, detail: &str| StepError { step: "ask".to_owned(), errno, detail: detail.to_owned() };
        if self.leaving || self.keys.contains_key(&plan.id) {
            return Err(failed(libc::EEXIST, "the container exists already"));
        }
        let mut fds =
            counts.unpack(fds).ok_or_else(|| failed(libc::EBADF, "not the descriptors of the plan"))?;
        let userns = match self.userns.entry(plan.id_base) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(UserNs::new(plan.id_base)?),
        };
        let outputs = std::mem::take(&mut fds.outputs);
        let started = start(plan, fds, userns)?;
        let mut container = Container::new(plan.id.clone(), started.pid, started.pidfd, plan.port);
        if let Err(errno) = rustix::io::ioctl_fionbio(&started.report, true) {
            container.signal(Signal::KILL);
            tracing::error!(%errno, "a report socket cannot be made non-blocking");
        }
        container.report = Some(started.report);
        container.lent = Some(started.lent);
        container.note.clone_from(&plan.note);
        container.outputs = outputs.into_iter().map(sandbox::shelve).collect();
        Ok(container)
    }

    fn keep(&mut self, container: Container) {
        self.last_key += 1;
        let key = self.last_key;
        let watched = self.watch(&container.pidfd, key * KINDS + PIDFD).and_then(|()| {
            let report = container.report.as_ref().map_or(Ok(()), |fd| self.watch(fd, key * KINDS + REPORT));
            report.and_then(|()| {
                container.notify.as_ref().map_or(Ok(()), |fd| self.watch(fd, key * KINDS + NOTIFY))
            })
        });
        if let Err(error) = watched {
            tracing::error!(%error, "a container cannot be watched");
            container.signal(Signal::KILL);
        }
        self.keys.insert(container.id.clone(), key);
        self.containers.insert(key, container);
    }

    fn list(&mut self) {
        let Some(peer) = &mut self.peer else { return };
        peer.informed = true;
        let mut told = Ok(());
        for container in self.containers.values().filter(|container| !container.forgotten) {
            let (present, fds) = container.present();
            told = told.and_then(|()| peer.tell(&Event::Present(Box::new(present)), &fds));
        }
        let end = Event::Listed { version: wire::VERSION, pid: std::process::id() };
        if told.and_then(|()| peer.tell(&end, &[])).is_err() {
            self.drop_peer();
        }
        self.arm_peer();
    }

    /// The first process speaks on its way to exec.
    fn reports(&mut self, key: u64) {
        loop {
            let Some(container) = self.containers.get_mut(&key) else { return };
            let Some(report) = &container.report else { return };
            let id = container.id.clone();
            let heard = Report::recv(report.as_fd());
            if !matches!(&heard, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
                container.lent = None;
            }
            match heard {
                Ok(Some(Report::Notify(fd))) => {
                    let fd = sandbox::shelve(fd);
                    let token = epoll::EventData::new_u64(key * KINDS + NOTIFY);
                    if let Err(error) = epoll::add(&self.epoll, &fd, token, epoll::EventFlags::IN) {
                        tracing::error!(%error, "a container's calls cannot be watched");
                        container.signal(Signal::KILL);
                    }
                    let dup = fd.try_clone();
                    container.notify = Some(Listener::new(fd));
                    if let Ok(dup) = dup {
                        self.tell(&Event::Notify { id }, &[dup.as_fd()]);
                    }
                }
                Ok(Some(Report::NoNotify)) => {}
                Ok(Some(Report::Execed { timings })) => container.timings = Some(timings),
                Ok(Some(Report::Failed(error))) => {
                    container.failed = Some(error.clone());
                    self.tell(&Event::Failed { id, error }, &[]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                ended => {
                    if let Err(error) = ended {
                        tracing::warn!(%error, app = id.app, "a container's report");
                    }
                    return self.reported(key);
                }
            }
        }
    }

    /// The report's end: the program runs, or never will.
    fn reported(&mut self, key: u64) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        if let Some(report) = container.report.take() {
            let _ = epoll::delete(&self.epoll, &report);
        }
        if container.failed.is_some() {
            return;
        }
        let id = container.id.clone();
        if let Some(timings) = container.timings.take() {
            container.execed = true;
            let notify = container.notify.is_some();
            self.tell(&Event::Execed { id, timings, notify, at_us: monotonic_us() }, &[]);
        } else {
            // Killed on the way, by us or by the out-of-memory killer.
            let error = StepError {
                step: "create".to_owned(),
                errno: libc::ECANCELED,
                detail: "ended on the way".to_owned(),
            };
            container.failed = Some(error.clone());
            self.tell(&Event::Failed { id, error }, &[]);
        }
    }

    /// A thread of the container waits in `listen()`, or none is left that could.
    fn notified(&mut self, key: u64, flags: epoll::EventFlags) {
        // Exec has happened; let it be told first.
        self.reports(key);
        if !flags.contains(epoll::EventFlags::IN) {
            // Receiving now would wait for ever.
            return self.end_notify(key);
        }
        let Some(container) = self.containers.get_mut(&key) else { return };
        let Some(notify) = &container.notify else { return };
        match listen::answer(notify, container.port, container.listening.is_some()) {
            Ok(None) => {}
            Ok(Some(listening)) => {
                container.listening = Some(listening);
                let id = container.id.clone();
                self.tell_listening(id, listening);
            }
            Err(error) => {
                tracing::warn!(%error, app = container.id.app, "answering a container's listen()");
                self.end_notify(key);
            }
        }
    }

    fn tell_listening(&mut self, id: ContainerId, listening: Listening) {
        self.tell(&Event::Listening { id, listening }, &[]);
    }

    fn end_notify(&mut self, key: u64) {
        if let Some(notify) = self.containers.get_mut(&key).and_then(|container| container.notify.take()) {
            // Explicitly: the daemon's duplicate would keep it in the epoll.
            let _ = epoll::delete(&self.epoll, &notify);
        }
    }

    fn ended(&mut self, key: u64) {
        if let Some(container) = self.containers.get_mut(&key) {
            // It may have ended without a word.
            container.lent = None;
        }
        self.reports(key);
        let Some(container) = self.containers.get_mut(&key) else { return };
        let exit = match container.reap() {
            Ok(None) => return,
            Ok(Some(exit)) => exit,
            Err(error) => {
                tracing::error!(%error, app = container.id.app, "burying a container");
                wire::Exit::Unknown
            }
        };
        container.exited = Some(exit);
        let _ = epoll::delete(&self.epoll, &container.pidfd);
        if container.report.is_some() {
            self.reported(key);
        }
        self.end_notify(key);
        if let Some(container) = self.containers.get(&key).filter(|container| !container.forgotten) {
            let id = container.id.clone();
            self.tell(&Event::Exited { id, exit }, &[]);
        }
        self.bury(key);
    }

    /// Drops the record of a container that has ended and of which the daemon knows.
    fn bury(&mut self, key: u64) {
        if self
            .containers
            .get(&key)
            .is_some_and(|container| container.forgotten && container.exited.is_some())
            && let Some(container) = self.containers.remove(&key)
        {
            self.keys.remove(&container.id);
        }
    }

    fn find(&self, id: &ContainerId) -> Option<&Container> {
        self.containers.get(self.keys.get(id)?)
    }

    fn tell(&mut self, event: &Event, fds: &[BorrowedFd<'_>]) {
        let Some(peer) = self.peer.as_mut().filter(|peer| peer.informed) else { return };
        if let Err(error) = peer.tell(event, fds) {
            tracing::warn!(%error, "telling the daemon");
            self.drop_peer();
        }
        self.arm_peer();
    }

    /// Asks for room in the socket's buffer only while something waits for it.
    fn arm_peer(&self) {
        let Some(peer) = &self.peer else { return };
        let mut flags = epoll::EventFlags::IN;
        if peer.is_waiting() {
            flags |= epoll::EventFlags::OUT;
        }
        let _ = epoll::modify(&self.epoll, peer, epoll::EventData::new_u64(PEER), flags);
    }

    fn watch(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN)?;
        Ok(())
    }
}
