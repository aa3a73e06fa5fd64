//! `[[hook]]`: a program of the operator's that runs at a point of an instance's life, on a signal, or in time.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

/// One hook.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Hook {
    /// When it runs.
    pub when: When,
    /// Program, a relative path beneath the launcher's hooks folder, and arguments; not empty.
    pub run: Vec<String>,
    /// It, and all that it started, is ended after so long.
    pub timeout: Duration,
    /// What its failure means.
    pub on_failure: OnFailure,
}

/// When a hook runs.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// At a point of the instance's life.
    On(Point),
    /// When the operator sends the app this signal; a name without `SIG`.
    Signal(String),
    /// So long after the instance was ready.
    After(Duration),
    /// Again and again while the instance is ready and awake.
    Every(Duration),
}

/// A point of an instance's life, in the order in which they come.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Point {
    /// Nothing of the instance is there. The start waits.
    BeforeCreate,
    /// Its cgroup is there, with its limits.
    AfterCreate,
    /// Before its process is made. The start waits.
    BeforeStart,
    /// Its program runs.
    AfterStart,
    /// It listens; it gets no requests yet. They wait.
    BeforeReady,
    /// It gets requests.
    AfterReady,
    /// It is to end, and was not told yet. Its end waits.
    BeforeStop,
    /// It has ended as it was told.
    AfterStop,
    /// It ran out of memory.
    Oom,
    /// Its processes have ended, for whatever reason; its cgroup is still there. Its end waits.
    BeforeExit,
    /// Nothing of it is left.
    AfterExit,
}

/// What the failure of a hook means.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// An event tells of it.
    #[default]
    Warn,
    /// The start has failed.
    Abort,
}

/// Signals that mean nothing but what an operator makes of them.
pub const SIGNALS: [&str; 5] = ["HUP", "INT", "USR1", "USR2", "WINCH"];

impl Point {
    /// All, in their order.
    pub const ALL: [Self; 11] = [
        Self::BeforeCreate,
        Self::AfterCreate,
        Self::BeforeStart,
        Self::AfterStart,
        Self::BeforeReady,
        Self::AfterReady,
        Self::BeforeStop,
        Self::AfterStop,
        Self::Oom,
        Self::BeforeExit,
        Self::AfterExit,
    ];

    /// Its name, as in the vhost file.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BeforeCreate => "before-create",
            Self::AfterCreate => "after-create",
            Self::BeforeStart => "before-start",
            Self::AfterStart => "after-start",
            Self::BeforeReady => "before-ready",
            Self::AfterReady => "after-ready",
            Self::BeforeStop => "before-stop",
            Self::AfterStop => "after-stop",
            Self::Oom => "oom",
            Self::BeforeExit => "before-exit",
            Self::AfterExit => "after-exit",
        }
    }

    /// Whether a hook that fails there can make the start fail.
    #[must_use]
    pub fn can_abort(self) -> bool {
        matches!(self, Self::BeforeCreate | Self::BeforeStart | Self::BeforeReady)
    }
}

impl FromStr for Point {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|point| point.as_str() == text).ok_or(())
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::On(point) => point.fmt(f),
            Self::Signal(name) => write!(f, "SIG{name}"),
            Self::After(time) => write!(f, "after {time:?}"),
            Self::Every(time) => write!(f, "every {time:?}"),
        }
    }
}
