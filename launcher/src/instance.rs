//! One instance's life: a task that owns its container, from the image to the removed cgroup.

mod admission;
mod adoption;
mod hooking;
mod plan;

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use cmdb::{App, AppName, Generation, InstanceId, hook::Point};
use launcher_client::wire::{RefusalCode, Step, WakeTiming};
use nix::libc::{ECANCELED, SIGKILL};
use tokio::{sync::mpsc, time::Instant};

use crate::{
    cgroup::{Group, Limits},
    clock::unix_us,
    governor::{Slot, Why},
    host::{Host, lock},
    image::Lease,
    keeper::{Exit, KeeperError, KeeperEvent, Listening},
    network::NetSockets,
    outbound::Link,
    output::{Capture, Output},
    ready,
    sandbox::{ContainerId, PlanFds, StepTiming},
    supervisor::Message,
    trace::Trace,
};
pub use adoption::{Adoption, Tag, fingerprint};
use hooking::Then;

/// What a supervisor may do with an instance.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Control {
    /// SIGTERM, and SIGKILL after this time.
    Terminate(Duration),
}

/// An instance that listens.
#[derive(Debug)]
pub struct Live {
    /// Which.
    pub id: InstanceId,
    /// Its first process, as the host sees it.
    pub pid: i32,
    /// Its limits.
    pub group: Arc<Group>,
    /// Makes sockets in its network namespace.
    pub sockets: NetSockets,
    /// Where it listens.
    pub port: u16,
}

/// What an instance's task tells its supervisor.
#[derive(Debug)]
pub enum Note {
    /// It waits for a start slot.
    Waits {
        /// Which.
        generation: Generation,
        /// Why.
        why: Why,
    },
    /// It has one.
    Admitted {
        /// Which.
        generation: Generation,
        /// Held until it listens or ends.
        slot: Slot,
        /// How long it has waited, if it has.
        waited: Option<Duration>,
    },
    /// Its process exists.
    Created {
        /// Which.
        generation: Generation,
        /// Its first process.
        pid: i32,
        /// Its limits.
        group: Arc<Group>,
        /// What it runs.
        image: String,
    },
    /// It listens.
    Listens {
        /// The instance.
        live: Arc<Live>,
        /// How it came to be.
        timing: WakeTiming,
    },
    /// It is gone, and nothing of it is left.
    Ended {
        /// Which.
        generation: Generation,
        /// How.
        end: End,
    },
}

/// How an instance ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct End {
    /// Of which kind it is when it is a failed start.
    pub code: RefusalCode,
    /// In words: `exited with status 3`.
    pub reason: String,
    /// Whether its memory limit was the cause.
    pub oom: bool,
}

/// Everything that one start needs.
#[derive(Debug)]
pub struct Launch {
    /// The daemon.
    pub host: Arc<Host>,
    /// What to run.
    pub app: Arc<App>,
    /// Which generation this is.
    pub generation: Generation,
    /// Whether nothing of the app runs, so that somebody waits for this start.
    pub first: bool,
    /// Where its output is kept.
    pub output: Arc<Output>,
    /// Whom to tell.
    pub supervisor: mpsc::UnboundedSender<Message>,
    /// What the supervisor wants.
    pub control: mpsc::UnboundedReceiver<Control>,
}

/// A container whose process exists.
struct Made {
    pid: i32,
    group: Arc<Group>,
    sockets: NetSockets,
    trace: Trace,
    /// Its addresses are nobody else's as long as this is held.
    _link: Option<Link>,
    /// As long as this is held, a newer version of the image does not displace the unpacked layers.
    _image: Lease,
    /// Where it is to listen, by its vhost file or its image.
    port: Option<u16>,
    /// What asks it to end.
    stop_signal: i32,
    /// Where it listens already: it is one that an earlier daemon started.
    listens: Option<u16>,
}

impl Launch {
    /// Lives the instance's whole life; ends when nothing of it is left.
    pub async fn run(mut self) {
        let begun_us = unix_us();
        let container = self.container();
        let mut events = self.route(&container);
        let mut captures = Vec::new();
        let mut trace = Trace::begin();
        let end = match self.enter(&mut trace).await {
            Ok(()) => self.start(&container, trace, &mut captures, &mut events).await,
            Err(end) => end,
        };
        self.over(&container, begun_us, captures, end).await;
    }

    async fn start(
        &mut self,
        container: &ContainerId,
        trace: Trace,
        captures: &mut Vec<Capture>,
        events: &mut mpsc::UnboundedReceiver<KeeperEvent>,
    ) -> End {
        let deadline = Instant::now() + self.app.lifecycle.start_timeout;
        // Boxed: an instance lives long after it was made, and what making it needs is to be free by then.
        let making = Box::pin(self.make(trace, captures, events));
        match tokio::time::timeout_at(deadline, making).await {
            Ok(Ok(made)) => self.live(made, events, deadline).await,
            Ok(Err(end)) => end,
            Err(_) => {
                // `create` may have come to pass all the same: then it is ended like any other.
                self.host.keeper.kill(container, SIGKILL);
                self.timed_out(&self.why_not_made())
            }
        }
    }

    /// Lives on the life of an instance that an earlier daemon began.
    pub async fn adopt(mut self, adoption: Adoption) {
        let container = self.container();
        let mut events = self.route(&container);
        let begun_us = adoption.tag.begun_us;
        let mut captures = Vec::new();
        let end = match self.take_over(adoption, &mut captures).await {
            Ok(made) => self.live(made, &mut events, Instant::now()).await,
            Err(end) => {
                self.host.keeper.kill(&container, SIGKILL);
                end
            }
        };
        self.over(&container, begun_us, captures, end).await;
    }

    fn route(&self, container: &ContainerId) -> mpsc::UnboundedReceiver<KeeperEvent> {
        let (route, events) = mpsc::unbounded_channel();
        lock(&self.host.routes).insert(container.clone(), route);
        events
    }

    async fn over(self, container: &ContainerId, begun_us: u64, captures: Vec<Capture>, end: End) {
        lock(&self.host.live).remove(&self.id());
        lock(&self.host.routes).remove(container);
        self.hooks_before_exit(&end).await;
        self.remove_group(container, begun_us).await;
        for capture in captures {
            capture.finish().await;
        }
        self.hooks_after_exit(&end);
        self.tell(Note::Ended { generation: self.generation, end });
    }

    /// Image, cgroup, pipes, plan, process.
    async fn make(
        &self,
        mut trace: Trace,
        captures: &mut Vec<Capture>,
        events: &mut mpsc::UnboundedReceiver<KeeperEvent>,
    ) -> Result<Made, End> {
        self.hooks_before(Point::BeforeCreate, &self.subject(), &mut trace).await?;
        let resolved = crate::provision::resolve(&self.host, &self.app).await;
        let image = resolved.map_err(|e| self.cannot(&e))?;
        trace.lap("image");

        let limits = Limits {
            memory: Some(self.app.resources.memory.0),
            pids: Some(u64::from(self.app.resources.pids)),
        };
        let container = self.container();
        let group = self.host.cgroups.create(&container, &limits).map_err(|e| self.cannot(&e))?;
        self.give_way(&group);
        let (cgroup_tasks, cgroup_dir) = group.join_fds().map_err(|e| self.cannot(&e))?;
        trace.lap("cgroup");
        let group = Arc::new(group);
        let subject = crate::hooks::Subject { group: Some(Arc::clone(&group)), ..self.subject() };
        self.host.hooks.after(Point::AfterCreate, &subject);
        self.hooks_before(Point::BeforeStart, &subject, &mut trace).await?;

        let mut link = self.host.outbound.prepare(&self.app).await.map_err(|e| self.cannot(&e))?;
        let (gate, opener) = gate(link.is_some()).map_err(|e| self.cannot(&e))?;
        let (stdout, spare_out, capture) =
            self.output.capture(self.generation, "stdout").map_err(|e| self.cannot(&e))?;
        captures.push(capture);
        let (stderr, spare_err, capture) =
            self.output.capture(self.generation, "stderr").map_err(|e| self.cannot(&e))?;
        captures.push(capture);
        let plan = self.plan(trace.begun_unix_us(), &image, link.as_ref())?;
        let (port, stop_signal) = (plan.port, image.config.stop_signal());
        let outputs = vec![spare_out, spare_err];
        let hosts = link.as_mut().and_then(|link| link.hosts.take());
        let fds = PlanFds {
            layers: image.fds,
            cgroup_tasks,
            cgroup_dir,
            hosts,
            upper: None,
            gate,
            stdout,
            stderr,
            outputs,
        };
        let created = self.host.keeper.create(plan, fds).await.map_err(|e| self.not_created(&e))?;

        let pid = created.pid;
        let sockets = match self.host.netns.open(created.pidfd).await {
            Ok(sockets) => sockets,
            Err(error) => {
                self.host.keeper.kill(&container, SIGKILL);
                return Err(self.why_not(events, &error).await);
            }
        };
        let note =
            Note::Created { generation: self.generation, pid, group: Arc::clone(&group), image: image.id };
        self.tell(note);
        if let (Some(link), Some(opener)) = (&link, opener) {
            // The container is being made meanwhile, and waits for this before the app begins.
            let attached = link.attach(&sockets).await.map_err(std::io::Error::other);
            if let Err(error) = attached.and_then(|()| Ok(rustix::io::write(&opener, &[1]).map(drop)?)) {
                self.host.keeper.kill(&container, SIGKILL);
                return Err(self.why_not(events, &error).await);
            }
        }
        Ok(Made {
            pid,
            group,
            sockets,
            trace,
            _link: link,
            _image: image.lease,
            port,
            stop_signal,
            listens: None,
        })
    }

    fn why_not_made(&self) -> String {
        let why_not = |image: &String| Some((image.clone(), self.host.images.preparation(image)?.why_not()?));
        if let Some((image, why)) = crate::preparation::images_of(&self.app).find_map(why_not) {
            return format!("was not made: image {image} {why};");
        }
        let recipe = crate::image::Recipe::of(&self.app);
        let why = recipe.and_then(|recipe| self.host.images.preparation(&recipe.key)?.why_not());
        why.map_or_else(|| "was not made".to_owned(), |why| format!("was not made: its image {why};"))
    }

    /// A process that ended before its network could be entered has a cause of its own to tell.
    async fn why_not(
        &self,
        events: &mut mpsc::UnboundedReceiver<KeeperEvent>,
        error: &std::io::Error,
    ) -> End {
        let cause = async {
            while let Some(event) = events.recv().await {
                match event {
                    // Our own kill is no cause.
                    KeeperEvent::Failed { error, .. } if error.errno == ECANCELED => {}
                    KeeperEvent::Failed { error, .. } => return Some(self.cannot(&error)),
                    KeeperEvent::Exited { .. } => return None,
                    _ => {}
                }
            }
            None
        };
        let cause = tokio::time::timeout(Duration::from_millis(500), cause).await;
        cause.ok().flatten().unwrap_or_else(|| self.cannot(error))
    }

    /// From the process's birth to its end.
    async fn live(
        &mut self,
        made: Made,
        events: &mut mpsc::UnboundedReceiver<KeeperEvent>,
        start_deadline: Instant,
    ) -> End {
        let container = self.container();
        let mut trace = made.trace.clone();
        let mut failure: Option<End> = None;
        let mut listens = made.listens.is_some();
        let mut runs = listens;
        let mut attendants = self.attendants(&made);
        if let Some(port) = made.listens {
            self.publish(&made, port, trace.unknown());
            attendants.goes_on(port, trace.begun_unix_us());
        }
        let mut kill_at: Option<Instant> = None;
        let mut kills = 0;
        let mut probe: Option<tokio::task::JoinHandle<std::io::Result<ready::Ready>>> = None;
        loop {
            let deadline = kill_at.or((!listens && failure.is_none()).then_some(start_deadline));
            tokio::select! {
                event = events.recv() => match event {
                    Some(KeeperEvent::Execed { timings, notify, at_us, .. }) => {
                        runs = true;
                        trace.execed(timings.into_iter().map(step), at_us);
                        attendants.started();
                        if !notify && let Some(port) = made.port {
                            let sockets = made.sockets.clone();
                            probe = Some(tokio::spawn(async move { ready::probe(&sockets, port).await }));
                        } else if !notify {
                            failure = Some(self.failed("cannot be told when it listens on this host; set container.port"));
                            self.host.keeper.kill(&container, SIGKILL);
                        }
                    }
                    Some(KeeperEvent::Failed { error, .. }) => {
                        // What made us kill it says more than that it was killed.
                        failure.get_or_insert_with(|| self.failed(&format!("could not be started: {error}")));
                    }
                    Some(KeeperEvent::Listening { listening, .. })
                        if !listens && failure.is_none() && !attendants.delays_readiness() =>
                    {
                        if only_v6_loopback(&listening) {
                            failure = Some(self.failed("listens only on [::1]; have it listen on 127.0.0.1 or on all addresses"));
                            self.host.keeper.kill(&container, SIGKILL);
                        } else if attendants.may_be_ready(listening.port, listening.at_us) {
                            listens = true;
                            self.publish(&made, listening.port, trace.ready(listening.at_us));
                            attendants.ready();
                        }
                    }
                    Some(KeeperEvent::Exited { exit, .. }) => {
                        if let Some(probe) = probe.take() { probe.abort(); }
                        let end = self.ended(&made.group, exit, failure);
                        attendants.ended(&end);
                        return end;
                    }
                    Some(_) => {}
                    None => return failure.unwrap_or_else(|| self.failed("was lost: the spawner has ended")),
                },
                found = joined(&mut probe) => {
                    probe = None;
                    match (found, made.port) {
                        (Ok(found), Some(port)) => {
                            if attendants.may_be_ready(port, found.at_us) {
                                listens = true;
                                self.publish(&made, port, trace.ready(found.at_us));
                                attendants.ready();
                            }
                        }
                        (Err(error), _) => {
                            failure = Some(self.failed(&format!("could not be probed: {error}")));
                            self.host.keeper.kill(&container, SIGKILL);
                        }
                        (Ok(_), None) => {}
                    }
                }
                passed = attendants.passed() => match passed {
                    Ok(Then::Ready(port, at_us)) if failure.is_none() => {
                        listens = true;
                        self.publish(&made, port, trace.ready(at_us));
                        attendants.ready();
                    }
                    Ok(Then::Ready(..)) => {}
                    Ok(Then::Stop(grace)) => kill_at = Some(self.tell_to_end(&made, grace)),
                    Err(reason) => {
                        failure = Some(self.failed(&format!("could not be started: {reason}")));
                        self.host.keeper.kill(&container, SIGKILL);
                    }
                },
                wish = self.control.recv(), if kill_at.is_none() && !attendants.delays_the_stop() => match wish {
                    Some(Control::Terminate(grace)) => {
                        if attendants.may_be_stopped(grace) {
                            kill_at = Some(self.tell_to_end(&made, grace));
                        }
                    }
                    // A supervisor that is gone wants no instance.
                    None => kill_at = Some(self.tell_to_end(&made, Duration::ZERO)),
                },
                () = sleep_until(deadline) => {
                    if kill_at.is_none() {
                        let held = attendants.delays_readiness();
                        failure = Some(match runs {
                            true if held => self.timed_out("was held up by its hooks"),
                            true => self.timed_out("does not listen"),
                            false => self.not_made_in_time(made.pid),
                        });
                    }
                    kills += 1;
                    if kills == 2 {
                        self.tell_that_it_stays(&made.group);
                    }
                    self.host.keeper.kill(&container, SIGKILL);
                    kill_at = Some(Instant::now() + Duration::from_secs(5));
                }
            }
        }
    }

    /// It was killed a while ago and is still there: something in it waits where no signal ends the wait.
    fn tell_that_it_stays(&self, group: &Group) {
        let waiting = group.uninterruptible().map_or(String::new(), |(pid, program, place)| {
            format!(": process {pid} ({program}) waits in the kernel{place}")
        });
        let storage = if self.app.volumes.is_empty() { "" } else { "; does the DataPool hang?" };
        let id = name(&self.app.name, self.generation);
        let message = format!("{id} was killed and does not end{waiting}{storage}");
        self.host.events.emit("does-not-end", Some(&self.app.name), Some(self.generation), message);
    }

    /// Its stop signal; returns when SIGKILL is to follow.
    fn tell_to_end(&self, made: &Made, grace: Duration) -> Instant {
        let container = self.container();
        if !grace.is_zero() && handles(made.pid, made.stop_signal) {
            self.host.keeper.kill(&container, made.stop_signal);
            return Instant::now() + grace;
        }
        // Without a handler the kernel drops the signal for the first process of a pid namespace: waiting would be in vain.
        self.host.keeper.kill(&container, SIGKILL);
        Instant::now() + Duration::from_secs(5)
    }

    fn publish(&self, made: &Made, port: u16, timing: WakeTiming) {
        let live = Arc::new(Live {
            id: self.id(),
            pid: made.pid,
            group: Arc::clone(&made.group),
            sockets: made.sockets.clone(),
            port,
        });
        lock(&self.host.live).insert(self.id(), Arc::clone(&live));
        self.tell(Note::Listens { live, timing });
        // After the note, on which requests wait.
        self.host.ledger.watch(self.container(), made.trace.begun_unix_us(), Arc::clone(&made.group));
    }

    async fn remove_group(&self, container: &ContainerId, begun_us: u64) {
        let Ok(group) = self.host.cgroups.open(container) else { return };
        // What is left in there after the first process has ended is dying already; this makes sure.
        if let Err(error) = group.kill() {
            tracing::warn!(container = %group.name(), %error, "ending what is left in the cgroup");
        }
        if let Some(cpu_us) = group.final_usage_us().await {
            self.host.ledger.settle(container.clone(), begun_us, cpu_us);
        }
        if let Err(error) = group.remove().await {
            self.host.events.emit(
                "leak",
                Some(&self.app.name),
                Some(self.generation),
                format!("its cgroup could not be removed: {error}"),
            );
        }
    }

    fn ended(&self, group: &Group, exit: Exit, failure: Option<End>) -> End {
        let memory = group.memory().unwrap_or_default();
        self.host.governor.learn(&self.app.name, memory.peak.unwrap_or(memory.current));
        let oom = memory.oom_kills > 0;
        let how = match exit {
            Exit::Code(code) => format!("exited with status {code}"),
            Exit::Signal(SIGKILL) if oom => {
                format!("ran out of memory (limit {}) and was killed", self.app.resources.memory)
            }
            Exit::Signal(signal) => match nix::sys::signal::Signal::try_from(signal) {
                Ok(name) => format!("was ended by {name}"),
                Err(_) => format!("was ended by signal {signal}"),
            },
            Exit::Unknown => "ended; how is not known, for its spawner had died before it".to_owned(),
        };
        failure.unwrap_or(End { code: RefusalCode::StartFailed, reason: how, oom })
    }

    fn not_created(&self, error: &KeeperError) -> End {
        match error {
            KeeperError::Step { error, .. } => self.failed(&format!("could not be started: {error}")),
            other => self.cannot(other),
        }
    }

    fn cannot(&self, error: &dyn std::fmt::Display) -> End {
        self.failed(&format!("could not be started: {error}"))
    }

    fn failed(&self, reason: &str) -> End {
        End { code: RefusalCode::StartFailed, reason: reason.to_owned(), oom: false }
    }

    fn timed_out(&self, what: &str) -> End {
        let limit = self.app.lifecycle.start_timeout;
        let port = self.app.container.port.map_or(String::new(), |p| format!(" on port {p}"));
        let reason = format!("{what}{port} within its start-timeout of {limit:?}");
        End { code: RefusalCode::StartTimeout, reason, oom: false }
    }

    /// The container's first process is still on its way to the app's program.
    fn not_made_in_time(&self, pid: i32) -> End {
        let limit = self.app.lifecycle.start_timeout;
        let waits = std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
        let waits =
            if waits.len() > 1 { format!(" (it waits in the kernel's {waits})") } else { String::new() };
        let volumes = if self.app.volumes.is_empty() { "" } else { "; does the DataPool hang?" };
        let reason = format!("was not made within its start-timeout of {limit:?}{waits}{volumes}");
        End { code: RefusalCode::StartTimeout, reason, oom: false }
    }

    fn tell(&self, note: Note) {
        // A supervisor ends only after its last instance.
        let _ = self.supervisor.send(Message::Note(note));
    }

    fn container(&self) -> ContainerId {
        ContainerId { app: self.app.name.to_string(), generation: self.generation.0 }
    }

    fn id(&self) -> InstanceId {
        InstanceId { app: self.app.name.clone(), generation: self.generation }
    }
}

fn step(timing: StepTiming) -> Step {
    Step { name: timing.step, us: timing.us }
}

fn only_v6_loopback(listening: &Listening) -> bool {
    listening.address.is_ipv6() && listening.address.is_loopback()
}

/// Whether the process catches a signal (proc_pid_status(5), `SigCgt`); when that cannot be read, it is assumed.
fn handles(pid: i32, signal: i32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { return true };
    let caught = status.lines().find_map(|l| l.strip_prefix("SigCgt:"));
    caught
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_none_or(|mask| mask & 1_u64.unbounded_shl(u32::try_from(signal - 1).unwrap_or(u32::MAX)) != 0)
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

async fn joined(
    probe: &mut Option<tokio::task::JoinHandle<std::io::Result<ready::Ready>>>,
) -> std::io::Result<ready::Ready> {
    match probe {
        Some(task) => task.await.unwrap_or_else(|e| Err(std::io::Error::other(e))),
        None => std::future::pending().await,
    }
}

/// For messages: `app.generation` in short.
pub(crate) fn name(app: &AppName, generation: Generation) -> String {
    format!("{app}.{generation}")
}

/// A pipe at which the container waits for its network, if it is to have one: its end and ours.
pub(crate) fn gate(wanted: bool) -> std::io::Result<(Option<OwnedFd>, Option<OwnedFd>)> {
    if !wanted {
        return Ok((None, None));
    }
    let (wait, open) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok((Some(wait), Some(open)))
}
