//! One step: a container of its own, from the place where it writes to the layer that is kept.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cmdb::{App, Generation, provision::ProvisionStep};
use nix::libc::{ECANCELED, SIGKILL};
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::time::Instant;

use crate::{
    cgroup::{CgroupError, CpuQuota, Group, Limits},
    clock::unix_us,
    host::{Host, lock},
    image::{Bounds, ImageError, Layers, Made, Recipe, StepScratch, WrittenError},
    instance::gate,
    keeper::{Exit, KeeperError, KeeperEvent},
    network::NetSockets,
    outbound::Link,
    output::{Capture, Output},
    sandbox::{ContainerId, NetworkPlan, Plan, PlanFds, StepError},
};

/// CPU that a step may use, thousandths of a core.
const CPU: u32 = 1000;
/// How often it is looked at how much it has written, and whether it is still wanted.
const LOOK: Duration = Duration::from_millis(500);
/// How long the end of a killed container may take.
const END: Duration = Duration::from_secs(10);
/// Lines of its output that are told when it fails.
const LAST_LINES: usize = 5;
const NOFILE: u64 = 8192;
const SHM_BYTES: u64 = 64 << 20;
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a step has failed. What it said itself is for its operator, not for visitors: it is not among the words.
#[derive(Debug, thiserror::Error)]
pub enum StepFailure {
    /// By its own account.
    #[error("it exited with status {status}")]
    Status {
        /// Not 0.
        status: i32,
        /// The last that it said.
        words: String,
    },
    /// By a signal.
    #[error("it was ended by {signal}")]
    Signal {
        /// Its name.
        signal: String,
        /// The last that it said.
        words: String,
    },
    /// Its memory did not suffice.
    #[error("it ran out of memory ([resources] memory, {limit}) and was killed")]
    Memory {
        /// What it had.
        limit: cmdb::units::Bytes,
        /// The last that it said.
        words: String,
    },
    /// It was too slow.
    #[error("it did not end within its timeout of {limit:?} and was killed")]
    TimedOut {
        /// How long it had.
        limit: Duration,
        /// The last that it said.
        words: String,
    },
    /// It could not be begun.
    #[error("it could not be started: {0}")]
    Step(StepError),
    /// No container could be made for it.
    #[error("it could not be started: {0}")]
    Keeper(#[from] KeeperError),
    /// What it wrote is too much.
    #[error("{0}")]
    Written(#[from] WrittenError),
    /// What it wrote cannot be kept.
    #[error("{0}")]
    Image(#[from] ImageError),
    /// Its limits could not be set.
    #[error("it could not be started: {0}")]
    Cgroup(#[from] CgroupError),
    /// Its network could not be made.
    #[error("it could not be started: its network: {0}")]
    Network(String),
    /// The system's error.
    #[error("it could not be started: {0}")]
    Io(#[from] std::io::Error),
    /// No ids are left.
    #[error("it could not be started: no range of user ids is left on this host")]
    Ids,
    /// No app has it any more.
    #[error("no app has it any more")]
    Unwanted,
    /// The spawner was lost while it ran.
    #[error("how it ended is not known, for the spawner died before it")]
    Lost,
    /// The daemon ends.
    #[error("the launcher is ending")]
    Ending,
}

impl StepFailure {
    /// The last that the step said, for the operator; may be empty.
    pub(super) fn words(&self) -> &str {
        match self {
            Self::Status { words, .. }
            | Self::Signal { words, .. }
            | Self::Memory { words, .. }
            | Self::TimedOut { words, .. } => words,
            _ => "",
        }
    }
}

/// Runs a step over the layers `below`, and keeps what it writes as `place`.
pub(super) async fn run(
    host: &Arc<Host>,
    app: &Arc<App>,
    recipe: &Recipe,
    below: &Layers,
    step: &ProvisionStep,
    place: &str,
) -> Result<Made, StepFailure> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    if host.is_ending() {
        return Err(StepFailure::Ending);
    }
    // `~` is in no app's name: nobody takes this for an instance. No number is used twice, also by the next daemon.
    let id = ContainerId {
        app: format!("{}~provision", app.name),
        generation: unix_us().wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)),
    };
    let id_base = host.id_base(&app.name).ok_or(StepFailure::Ids)?;
    let bounds = host.images.step_bounds()?;
    let scratch = Arc::new(host.images.scratch(id_base)?);
    let resources = &app.resources;
    let limits = Limits { memory: Some(resources.memory.0), pids: Some(u64::from(resources.pids)) };
    let group = host.cgroups.create(&id, &limits)?;
    let (route, events) = mpsc::unbounded_channel();
    lock(&host.routes).insert(id.clone(), route);
    let mut job =
        Job { host, app, recipe, step, id, group, events, output: Arc::default(), captures: Vec::new() };
    let outcome = job.live(below, &scratch, id_base, &bounds).await;
    job.end().await;
    outcome?;
    let (images, place) = (host.images.clone(), place.to_owned());
    let kept = tokio::task::spawn_blocking(move || images.keep(&scratch, &place, &bounds)).await;
    Ok(kept.map_err(std::io::Error::other)??)
}

/// A step that runs.
struct Job<'a> {
    host: &'a Arc<Host>,
    app: &'a Arc<App>,
    recipe: &'a Recipe,
    step: &'a ProvisionStep,
    id: ContainerId,
    group: Group,
    events: UnboundedReceiver<KeeperEvent>,
    output: Arc<Output>,
    captures: Vec<Capture>,
}

impl Job<'_> {
    async fn live(
        &mut self,
        below: &Layers,
        scratch: &Arc<StepScratch>,
        id_base: u32,
        bounds: &Bounds,
    ) -> Result<(), StepFailure> {
        self.group.set_cpu(CpuQuota::from_millicores(CPU))?;
        let _link = match self.make(below, scratch, id_base).await {
            Ok(link) => link,
            Err(failure) => {
                self.host.keeper.kill(&self.id, SIGKILL);
                return Err(self.cause(failure).await);
            }
        };
        let exit = match self.watch(scratch, bounds).await {
            Ok(exit) => exit,
            Err(failure) => {
                self.kill().await;
                return Err(self.with_words(failure).await);
            }
        };
        let oom = self.group.memory().is_ok_and(|memory| memory.oom_kills > 0);
        let words = String::new();
        let failure = match exit {
            Exit::Code(0) => return Ok(()),
            _ if oom => StepFailure::Memory { limit: self.app.resources.memory, words },
            Exit::Code(status) => StepFailure::Status { status, words },
            Exit::Signal(signal) => {
                let name = nix::sys::signal::Signal::try_from(signal);
                let signal = name.map_or_else(|_| format!("signal {signal}"), |name| name.to_string());
                StepFailure::Signal { signal, words }
            }
            Exit::Unknown => StepFailure::Lost,
        };
        Err(self.with_words(failure).await)
    }

    /// From the plan to the process, and its network.
    async fn make(
        &mut self,
        below: &Layers,
        scratch: &StepScratch,
        id_base: u32,
    ) -> Result<Option<Link>, StepFailure> {
        let host = self.host;
        let network = |error: &dyn std::fmt::Display| StepFailure::Network(error.to_string());
        let mut link = host.outbound.prepare(self.app).await.map_err(|error| network(&error))?;
        let (gate, opener) = gate(link.is_some())?;
        let (cgroup_tasks, cgroup_dir) = self.group.join_fds()?;
        // One pipe for both: the order in which it says things is to be kept.
        let (stdout, spare, capture) = self.output.capture(Generation(0), "provision")?;
        self.captures.push(capture);
        let stderr = stdout.try_clone()?;
        let fds = PlanFds {
            layers: below.fds.iter().map(OwnedFd::try_clone).collect::<Result<_, _>>()?,
            cgroup_tasks,
            cgroup_dir,
            hosts: link.as_mut().and_then(|link| link.hosts.take()),
            upper: Some(scratch.open()?),
            gate,
            stdout,
            stderr,
            outputs: vec![spare],
        };
        let created = host.keeper.create(self.plan(below, link.as_ref(), id_base), fds).await?;
        if let (Some(link), Some(opener)) = (&link, opener) {
            let sockets: NetSockets = host.netns.open(created.pidfd).await?;
            link.attach(&sockets).await.map_err(|error| network(&error))?;
            rustix::io::write(&opener, &[1]).map_err(std::io::Error::from)?;
        }
        Ok(link)
    }

    fn plan(&self, below: &Layers, link: Option<&Link>, id_base: u32) -> Plan {
        let mut env = below.config.env.iter().cloned().collect::<std::collections::BTreeMap<_, _>>();
        env.extend(self.step.env.clone());
        let mut env: Vec<String> = env.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
        if !env.iter().any(|entry| entry.starts_with("PATH=")) {
            env.push(PATH.to_owned());
        }
        Plan {
            id: self.id.clone(),
            // Of no earlier daemon's interest: the next one ends it.
            note: String::new(),
            hostname: self.app.name.to_string(),
            argv: self.step.run.clone(),
            env,
            workdir: below.config.workdir.clone(),
            user: self.step.user.clone(),
            port: None,
            id_base,
            upper_bytes: self.app.resources.disk.0,
            shm_bytes: SHM_BYTES,
            nofile: NOFILE,
            datapool: None,
            volumes: Vec::new(),
            network: link.map(|link| NetworkPlan { resolv_conf: link.resolv_conf.clone() }),
            staging: self.host.staging.to_string_lossy().into_owned(),
            fault: self.host.faults.of(&self.id),
        }
    }

    /// Until it ends, takes too long, writes too much, or nobody wants it any more.
    async fn watch(&mut self, scratch: &Arc<StepScratch>, bounds: &Bounds) -> Result<Exit, StepFailure> {
        let deadline = Instant::now() + self.step.timeout;
        let mut next = Instant::now() + LOOK;
        loop {
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(KeeperEvent::Failed { error, .. }) => return Err(StepFailure::Step(error)),
                    Some(KeeperEvent::Exited { exit, .. }) => return Ok(exit),
                    Some(_) => {}
                    None => return Err(StepFailure::Lost),
                },
                () = tokio::time::sleep_until(deadline) => {
                    return Err(StepFailure::TimedOut { limit: self.step.timeout, words: String::new() });
                }
                () = tokio::time::sleep_until(next) => {
                    if !self.is_wanted() {
                        return Err(StepFailure::Unwanted);
                    }
                    let begun = Instant::now();
                    let (scratch, bounds) = (Arc::clone(scratch), *bounds);
                    let looked = tokio::task::spawn_blocking(move || scratch.check(&bounds)).await;
                    looked.map_err(std::io::Error::other)??;
                    // Looking takes a small part of the time, however much there is.
                    next = Instant::now() + LOOK.max(begun.elapsed() * 10);
                }
            }
        }
    }

    /// Whether any app still has the recipe.
    fn is_wanted(&self) -> bool {
        let has = |app: &App| Recipe::of(app).is_some_and(|recipe| recipe.key == self.recipe.key);
        match self.host.store.get(&self.app.name) {
            // Usually it is this one.
            Some((app, _)) if has(&app) => true,
            // The ids that it runs with are that app's.
            _ => false,
        }
    }

    /// A container that could not be entered has a cause of its own to tell.
    async fn cause(&mut self, failure: StepFailure) -> StepFailure {
        let cause = async {
            while let Some(event) = self.events.recv().await {
                match event {
                    KeeperEvent::Failed { error, .. } if error.errno == ECANCELED => {}
                    KeeperEvent::Failed { error, .. } => return Some(StepFailure::Step(error)),
                    KeeperEvent::Exited { .. } => return None,
                    _ => {}
                }
            }
            None
        };
        tokio::time::timeout(LOOK, cause).await.ok().flatten().unwrap_or(failure)
    }

    async fn kill(&mut self) {
        self.host.keeper.kill(&self.id, SIGKILL);
        let ended = async {
            while let Some(event) = self.events.recv().await {
                if matches!(event, KeeperEvent::Exited { .. }) {
                    return;
                }
            }
        };
        if tokio::time::timeout(END, ended).await.is_err() {
            tracing::warn!(app = %self.app.name, "the container of a provisioning step does not end");
        }
    }

    /// Puts the last that it said with why it failed.
    async fn with_words(&mut self, failure: StepFailure) -> StepFailure {
        for capture in std::mem::take(&mut self.captures) {
            capture.finish().await;
        }
        let lines = self.output.last(LAST_LINES);
        let lines: Vec<&str> =
            lines.iter().map(|line| line.line.trim()).filter(|line| !line.is_empty()).collect();
        let said = if lines.is_empty() { String::new() } else { lines.join(" / ") };
        match failure {
            StepFailure::Status { status, .. } => StepFailure::Status { status, words: said },
            StepFailure::Signal { signal, .. } => StepFailure::Signal { signal, words: said },
            StepFailure::Memory { limit, .. } => StepFailure::Memory { limit, words: said },
            StepFailure::TimedOut { limit, .. } => StepFailure::TimedOut { limit, words: said },
            other => other,
        }
    }

    /// Nothing of it is left, and what it used is on the app's account.
    async fn end(self) {
        lock(&self.host.routes).remove(&self.id);
        if let Err(error) = self.group.kill() {
            tracing::warn!(cgroup = self.group.name(), %error, "ending what a provisioning step has left running");
        }
        if let Some(cpu_us) = self.group.final_usage_us().await {
            self.host.ledger.charge(&self.app.name, cpu_us);
        }
        if let Err(error) = self.group.remove().await {
            let message = format!("the cgroup of a provisioning step could not be removed: {error}");
            self.host.events.emit("leak", Some(&self.app.name), None, message);
        }
        for capture in self.captures {
            capture.finish().await;
        }
    }
}
