//! The bookkeeping of a creation: each step has a name, and leaves either its duration or its failure.

use std::time::Instant;

use super::plan::{Fault, StepError, StepTiming};

/// What went wrong inside a step; the step's name is added by [`Steps::run`].
#[derive(Debug)]
pub(super) struct Failure {
    errno: i32,
    detail: String,
}

impl Failure {
    /// A failure that we found ourselves, expressed as the error number that says it best.
    pub(super) fn new(errno: i32, detail: impl Into<String>) -> Failure {
        Failure { errno, detail: detail.into() }
    }

    /// The system's error number.
    pub(super) fn errno(&self) -> i32 {
        self.errno
    }

    /// Completes the failure with the name of its step.
    pub(super) fn at(self, step: &str) -> StepError {
        StepError { step: step.to_owned(), errno: self.errno, detail: self.detail }
    }
}

impl From<rustix::io::Errno> for Failure {
    fn from(errno: rustix::io::Errno) -> Failure {
        Failure::new(errno.raw_os_error(), "")
    }
}

impl From<nix::errno::Errno> for Failure {
    fn from(errno: nix::errno::Errno) -> Failure {
        Failure::new(errno as i32, "")
    }
}

impl From<capctl::Error> for Failure {
    fn from(error: capctl::Error) -> Failure {
        Failure::new(error.code(), "")
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        let detail = if error.raw_os_error().is_some() { String::new() } else { error.to_string() };
        Failure::new(error.raw_os_error().unwrap_or(libc::EIO), detail)
    }
}

/// Says what a failing call was about.
pub(super) trait About<T> {
    /// Adds the path or value to the failure.
    fn about(self, detail: impl AsRef<str>) -> Result<T, Failure>;
}

impl<T, E: Into<Failure>> About<T> for Result<T, E> {
    fn about(self, detail: impl AsRef<str>) -> Result<T, Failure> {
        self.map_err(|error| {
            let inner: Failure = error.into();
            let detail = detail.as_ref();
            let detail = if inner.detail.is_empty() {
                detail.to_owned()
            } else {
                format!("{detail}: {}", inner.detail)
            };
            Failure { errno: inner.errno, detail }
        })
    }
}

/// The names of all steps of a container without network, in the order of execution. One with has besides `open hosts`,
/// `mount hosts` and `wait for network`.
pub const STEPS: [&str; 43] = [
    "check plan",
    "open layers",
    "read oom score",
    "open report socket",
    "clone",
    "die with parent",
    "close inherited descriptors",
    "join cgroups",
    "unshare cgroup namespace",
    "new session",
    "reset oom score",
    "make mounts private",
    "open volumes",
    "mount staging",
    "attach layers",
    "provide files",
    "mount overlay",
    "check image directories",
    "look up user",
    "write sysctls",
    "loopback up",
    "mount volumes",
    "mount proc",
    "mount dev",
    "mount devpts",
    "mount shm",
    "mount sys",
    "pivot root",
    "set hostname",
    "set limits",
    "new keyring",
    "connect output",
    "enter user namespace",
    "limit capabilities",
    "become user",
    "drop capabilities",
    "no new privileges",
    "enter workdir",
    "prepare exec",
    "install seccomp",
    "report listener",
    "report timings",
    "exec",
];

/// Runs steps and remembers how long each took.
pub(super) struct Steps<'a> {
    lap: Instant,
    fault: Option<&'a Fault>,
    timings: Vec<StepTiming>,
}

impl<'a> Steps<'a> {
    /// Starts the clock of the first step; a test may want one of them to fail.
    pub(super) fn begin(fault: Option<&'a Fault>) -> Steps<'a> {
        Steps { lap: Instant::now(), fault, timings: Vec::with_capacity(48) }
    }

    /// Runs one step; its time includes whatever passed since the step before, so that the sum is the whole.
    pub(super) fn run<T>(
        &mut self,
        name: &str,
        step: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<T, StepError> {
        self.fail_on_purpose(name, false)?;
        let value = step().map_err(|failure| failure.at(name))?;
        self.fail_on_purpose(name, true)?;
        self.lap(name);
        Ok(value)
    }

    /// Fails if the plan's fault is for this step: before the work is done, or after it.
    pub(super) fn fail_on_purpose(&self, name: &str, done: bool) -> Result<(), StepError> {
        match self.fault {
            Some(fault) if fault.done == done && fault.step == name => {
                Err(Failure::new(fault.errno, "on purpose").at(name))
            }
            _ => Ok(()),
        }
    }

    /// Ends a step that is not a closure, such as the clone itself.
    pub(super) fn lap(&mut self, name: &str) {
        let now = Instant::now();
        let us = u64::try_from(now.duration_since(self.lap).as_micros()).unwrap_or(u64::MAX);
        self.timings.push(StepTiming { step: name.to_owned(), us });
        self.lap = now;
    }

    /// The durations so far.
    pub(super) fn timings(&self) -> &[StepTiming] {
        &self.timings
    }
}
