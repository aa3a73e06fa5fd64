//! The operator's programs at points of an instance's life, on a signal, or in time (`[[hook]]`).
//!
//! A hook runs outside of the container, as an unprivileged user with no way back to root, in a session and a cgroup of its
//! own, with a time limit for all that it starts; what it uses is on the app's account. Each run is a task of its own,
//! so that a hook that hangs holds up nobody but who waits for it: the start or the end at a `before-` point.

mod exec;
mod folder;

use std::{
    io,
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cmdb::{
    App, Generation,
    hook::{Hook, OnFailure, Point, When},
};
use serde::Serialize;
use tokio::{io::AsyncWriteExt as _, process::Command, time::Instant};

use crate::{
    cgroup::{Cgroups, CpuQuota, Group, Limits},
    clock::unix_ms,
    events::Events,
    ledger::Ledger,
    output::Output,
    sandbox::ContainerId,
};
pub use exec::{Exec, exec};
pub use folder::{Folder, FolderError};

/// Memory that all processes of one run may have.
const MEMORY: u64 = 128 << 20;
/// How many there may be.
const PIDS: u64 = 64;
/// CPU that they may use, thousandths of a core.
const CPU: u32 = 500;
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What runs hooks; one for the daemon.
#[derive(Debug)]
pub struct Hooks {
    folder: Option<Folder>,
    uid: u32,
    gid: u32,
    exe: PathBuf,
    cgroups: Cgroups,
    ledger: Ledger,
    events: Arc<Events>,
    node: String,
    /// Numbers the runs, so that each has a cgroup of its own.
    next: AtomicU64,
}

/// What a [`Hooks`] is made of.
#[derive(Debug)]
pub struct Parts {
    /// Where the programs are; `None`: hooks cannot be run.
    pub folder: Option<Folder>,
    /// Whom they run as.
    pub uid: u32,
    /// And its group.
    pub gid: u32,
    /// This program, to be started as `hook-exec`.
    pub exe: PathBuf,
    /// Limits them.
    pub cgroups: Cgroups,
    /// Counts what they use.
    pub ledger: Ledger,
    /// Hears of failures.
    pub events: Arc<Events>,
    /// This host's name.
    pub node: String,
}

/// The instance that a hook is about.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Its app, as it was started.
    pub app: Arc<App>,
    /// Which.
    pub generation: Generation,
    /// Where the hook's own output goes.
    pub output: Arc<Output>,
    /// Its first process, once there is one.
    pub pid: Option<i32>,
    /// Where it listens, once it does.
    pub port: Option<u16>,
    /// Its cgroup, while there is one.
    pub group: Option<Arc<Group>>,
    /// How it ended, once it has.
    pub end: Option<String>,
}

/// What a hook reads on its standard input: one JSON object. Keys are only ever added.
#[derive(Serialize)]
struct About<'a> {
    when: String,
    app: &'a str,
    generation: u64,
    server_names: Vec<String>,
    node: &'a str,
    image: &'a str,
    pid: Option<i32>,
    port: Option<u16>,
    /// Its directories, one in each hierarchy.
    cgroups: Vec<String>,
    memory_limit: u64,
    /// How it ended.
    end: Option<&'a str>,
    at_unix_ms: u64,
}

/// Why a run has failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("no hooks folder is configured on this host (see `up --hooks`)")]
    NoFolder,
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error("it cannot be confined: {0}")]
    Cgroup(#[from] crate::cgroup::CgroupError),
    #[error("it cannot be run: {0}")]
    Run(#[from] io::Error),
    #[error("it did not end within {0:?} and was killed")]
    TimedOut(Duration),
    #[error("it ended with {0}")]
    Status(std::process::ExitStatus),
}

impl Hooks {
    /// Puts the parts together.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        Self {
            folder: parts.folder,
            uid: parts.uid,
            gid: parts.gid,
            exe: parts.exe,
            cgroups: parts.cgroups,
            ledger: parts.ledger,
            events: parts.events,
            node: parts.node,
            next: AtomicU64::new(1),
        }
    }

    /// Runs the hooks of a `before-` point, one after the other.
    ///
    /// # Errors
    /// One failed whose failure is to abort what comes; in words.
    pub async fn before(self: &Arc<Self>, point: Point, subject: &Subject) -> Result<(), String> {
        if !has(&subject.app, point) {
            return Ok(());
        }
        let (hooks, subject) = (Arc::clone(self), subject.clone());
        // A task of its own, so that what it began is cleaned up even if nobody waits any more.
        let ran = tokio::spawn(async move { hooks.run_all(&When::On(point), &subject).await }).await;
        ran.unwrap_or_else(|error| Err(error.to_string()))
    }

    /// Begins the hooks of another point; they delay nothing.
    pub fn after(self: &Arc<Self>, point: Point, subject: &Subject) {
        if has(&subject.app, point) {
            let (hooks, subject) = (Arc::clone(self), subject.clone());
            tokio::spawn(async move { hooks.run_all(&When::On(point), &subject).await });
        }
    }

    /// Begins the hooks of a signal.
    pub fn signal(self: &Arc<Self>, when: &When, subject: &Subject) {
        let (hooks, when, subject) = (Arc::clone(self), when.clone(), subject.clone());
        tokio::spawn(async move { hooks.run_all(&when, &subject).await });
    }

    /// Begins the clocks of an instance that is ready since `age`; they stop when what is returned is dropped.
    pub fn clocks(self: &Arc<Self>, subject: &Subject, age: Duration) -> Clocks {
        let mut clocks = Clocks(Vec::new());
        for hook in &subject.app.hooks {
            let (hooks, subject, hook) = (Arc::clone(self), subject.clone(), hook.clone());
            let task = match hook.when {
                When::After(after) => match after.checked_sub(age) {
                    Some(rest) => tokio::spawn(async move { hooks.once(&subject, hook, rest).await }),
                    // It has run: an earlier daemon saw to it.
                    None => continue,
                },
                When::Every(every) => tokio::spawn(async move { hooks.again(&subject, hook, every).await }),
                When::On(_) | When::Signal(_) => continue,
            };
            clocks.0.push(task.abort_handle());
        }
        clocks
    }

    async fn once(self: Arc<Self>, subject: &Subject, hook: Hook, after: Duration) {
        tokio::time::sleep(after).await;
        let outcome = self.run_apart(subject, &hook).await;
        self.tell(subject, &hook, &outcome);
    }

    async fn again(self: Arc<Self>, subject: &Subject, hook: Hook, every: Duration) {
        let mut next = Instant::now();
        let mut ailing = false;
        loop {
            next = (next + every).max(Instant::now());
            tokio::time::sleep_until(next).await;
            if subject.group.as_ref().is_some_and(|group| group.slept().1) {
                continue;
            }
            let outcome = self.run_apart(subject, &hook).await;
            // Every few seconds the same line would drown all others.
            if outcome.is_err() != ailing {
                self.tell(subject, &hook, &outcome);
                ailing = outcome.is_err();
            }
        }
    }

    /// As [`Self::run`], in a task of its own: when its clock is stopped, the run goes on to its end.
    async fn run_apart(self: &Arc<Self>, subject: &Subject, hook: &Hook) -> Result<Duration, Failure> {
        let (hooks, subject, hook) = (Arc::clone(self), subject.clone(), hook.clone());
        let ran = tokio::spawn(async move { hooks.run(&subject, &hook).await }).await;
        ran.unwrap_or_else(|error| Err(Failure::Run(io::Error::other(error))))
    }

    async fn run_all(&self, when: &When, subject: &Subject) -> Result<(), String> {
        for hook in subject.app.hooks.iter().filter(|hook| hook.when == *when) {
            let outcome = self.run(subject, hook).await;
            self.tell(subject, hook, &outcome);
            if let (Err(failure), OnFailure::Abort) = (&outcome, hook.on_failure) {
                let words = self.last_words(subject);
                return Err(format!("its hook \"{}\" at {when} failed: {failure}{words}", name_of(hook)));
            }
        }
        Ok(())
    }

    fn tell(&self, subject: &Subject, hook: &Hook, outcome: &Result<Duration, Failure>) {
        let (name, when) = (name_of(hook), &hook.when);
        let (kind, message) = match outcome {
            Ok(took) => ("hook", format!("hook \"{name}\" ({when}) is done after {took:.1?}")),
            Err(failure) => {
                let words = self.last_words(subject);
                ("hook-failed", format!("hook \"{name}\" ({when}) failed: {failure}{words}"))
            }
        };
        self.events.emit(kind, Some(&subject.app.name), Some(subject.generation), message);
    }

    fn last_words(&self, subject: &Subject) -> String {
        let line = subject.output.last_words_of(subject.generation, "hook");
        line.map_or(String::new(), |line| format!("; its last line: {line}"))
    }

    /// One run, from the cgroup to its removal.
    async fn run(&self, subject: &Subject, hook: &Hook) -> Result<Duration, Failure> {
        let begun = Instant::now();
        let folder = self.folder.as_ref().ok_or(Failure::NoFolder)?;
        folder.check(name_of(hook))?;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        // `~` is in no app's name: nobody takes this for an instance.
        let id = ContainerId {
            app: format!("{}~hook{number}", subject.app.name),
            generation: subject.generation.0,
        };
        let group = self.cgroups.create(&id, &Limits { memory: Some(MEMORY), pids: Some(PIDS) })?;
        let outcome = self.run_in(folder, &group, subject, hook).await;
        // Whatever it has left running was not to outlive it.
        if let Err(error) = group.kill() {
            tracing::warn!(cgroup = group.name(), %error, "ending what a hook has left running");
        }
        if let Some(cpu_us) = group.final_usage_us().await {
            self.ledger.charge(&subject.app.name, cpu_us);
        }
        if let Err(error) = group.remove().await {
            let message = format!("the cgroup of a hook could not be removed: {error}");
            self.events.emit("leak", Some(&subject.app.name), Some(subject.generation), message);
        }
        outcome.map(|()| begun.elapsed())
    }

    async fn run_in(
        &self,
        folder: &Folder,
        group: &Group,
        subject: &Subject,
        hook: &Hook,
    ) -> Result<(), Failure> {
        group.set_cpu(CpuQuota::from_millicores(CPU))?;
        let (write, spare, capture) = subject.output.capture(subject.generation, "hook")?;
        drop(spare);
        let mut child = self
            .command(folder, group, subject, hook)
            .stdin(Stdio::piped())
            .stdout(write.try_clone()?)
            .stderr(write)
            .kill_on_drop(true)
            .spawn()?;
        let about = self.about(subject, hook);
        let stdin = child.stdin.take();
        let whole = async {
            if let Some(mut stdin) = stdin {
                // One that does not read it has closed it; that is its own affair.
                let _ = stdin.write_all(&about).await;
            }
            child.wait().await
        };
        let ended = tokio::time::timeout(hook.timeout, whole).await;
        let outcome = match ended {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(Failure::Status(status)),
            Ok(Err(error)) => Err(Failure::Run(error)),
            Err(_) => Err(Failure::TimedOut(hook.timeout)),
        };
        if outcome.is_err() {
            // The group first: else those that it has started would go on for a moment.
            let _ = group.kill();
            let _ = child.kill().await;
        }
        capture.finish().await;
        outcome
    }

    fn command(&self, folder: &Folder, group: &Group, subject: &Subject, hook: &Hook) -> Command {
        let mut command = Command::new(&self.exe);
        command.current_dir(folder.link()).env_clear();
        command.args(["hook-exec", "--uid", &self.uid.to_string(), "--gid", &self.gid.to_string()]);
        for file in group.join_files() {
            command.arg("--join").arg(file);
        }
        let env = [
            ("PATH", PATH.to_owned()),
            ("HOME", "/".to_owned()),
            ("FC_HOOK", hook.when.to_string()),
            ("FC_APP", subject.app.name.to_string()),
            ("FC_GENERATION", subject.generation.to_string()),
        ];
        for (name, value) in env {
            command.arg("--env").arg(format!("{name}={value}"));
        }
        command.arg("--").args(&hook.run);
        command
    }

    fn about(&self, subject: &Subject, hook: &Hook) -> Vec<u8> {
        let group = subject.group.as_deref();
        let cgroups = group.map_or(Vec::new(), |group| {
            group.directories().iter().map(|path| path.to_string_lossy().into_owned()).collect()
        });
        let about = About {
            when: hook.when.to_string(),
            app: subject.app.name.as_str(),
            generation: subject.generation.0,
            server_names: subject.app.server_names.iter().map(ToString::to_string).collect(),
            node: &self.node,
            image: &subject.app.container.image,
            pid: subject.pid,
            port: subject.port,
            cgroups,
            memory_limit: subject.app.resources.memory.0,
            end: subject.end.as_deref(),
            at_unix_ms: unix_ms(),
        };
        // Plain data cannot fail to be written.
        let mut text = serde_json::to_vec(&about).unwrap_or_default();
        text.push(b'\n');
        text
    }
}

/// The clocks of one instance.
#[derive(Debug, Default)]
pub struct Clocks(Vec<tokio::task::AbortHandle>);

impl Drop for Clocks {
    fn drop(&mut self) {
        self.0.iter().for_each(tokio::task::AbortHandle::abort);
    }
}

/// Whether the app has hooks there.
#[must_use]
pub fn has(app: &App, point: Point) -> bool {
    app.hooks.iter().any(|hook| hook.when == When::On(point))
}

fn name_of(hook: &Hook) -> &str {
    hook.run.first().map_or("", String::as_str)
}
