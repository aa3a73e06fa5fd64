//! One running (or starting, or ending) container of an app.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::app::AppName;

/// An instance's generation: unique within its app, only ever rises, never used twice (law 4).
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

/// The name of one instance for ever.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct InstanceId {
    /// Its app.
    pub app: AppName,
    /// Its generation.
    pub generation: Generation,
}

/// Where an instance is in its life (DESIGN.md §5). `absent` is the lack of an instance.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Made, not listening yet: gets no requests.
    Starting,
    /// Listens: gets requests.
    Ready,
    /// Stopped by the freezer; a request thaws it.
    Frozen,
    /// Gets no new requests; ends when those under way have ended.
    Draining,
}

/// What the CMDB knows of one instance.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Instance {
    /// Its generation.
    pub generation: Generation,
    /// Where it is in its life.
    pub state: State,
    /// The host that runs it.
    pub node: String,
    /// TCP port inside its network namespace; 0 until it listens.
    pub port: u16,
    /// When this state began, ms since the Unix epoch, by the store's clock.
    pub since_ms: u64,
    /// Until when the start must have succeeded, ms since the Unix epoch; 0 once ready.
    pub deadline_ms: u64,
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.app, self.generation)
    }
}

impl State {
    /// As shown to operators and written in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Frozen => "frozen",
            Self::Draining => "draining",
        }
    }
}
