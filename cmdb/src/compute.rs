//! The hosts that run instances, as everybody else knows them.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

/// Most bytes of a host's name.
pub const NAME_MAX: usize = 63;

/// What a host says of itself when it joins.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Compute {
    /// Its name, unique among all: see [`is_name`].
    pub name: String,
    /// Where its dispatcher takes requests from the edges of other hosts, `IP:port`; empty: nowhere.
    pub dispatch: String,
    /// Where its CoreAPI serves, `IP:port`; empty: nowhere.
    pub api: String,
    /// What the operator says of it, such as `zone=a`.
    pub labels: BTreeMap<String, String>,
    /// CPU that it has, thousandths of a core.
    pub cpu: u32,
    /// Memory that it has, bytes.
    pub memory: u64,
}

/// What it has left; told with each heartbeat. All zero when nobody knows: while the CMDB cannot be reached.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Load {
    /// CPU that nobody uses, thousandths of a core.
    pub free_cpu: u32,
    /// Memory that is available, bytes.
    pub free_memory: u64,
    /// Instances that it runs.
    pub instances: u32,
}

/// A host as this process knows it now.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Node {
    /// What it said when it joined.
    pub compute: Compute,
    /// What it said last.
    pub load: Load,
    /// Its heartbeat changes, judged by this process's own clock (its own host's time may be wrong).
    pub alive: bool,
    /// The operator wants it empty: nothing is placed there.
    pub draining: bool,
}

/// All hosts, by name. Empty where there is only one, which the embedded store serves.
pub type Nodes = Arc<[Node]>;

impl Node {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.compute.name
    }

    /// Whether something may be started there.
    #[must_use]
    pub fn takes(&self) -> bool {
        self.alive && !self.draining
    }
}

/// Whether a host may be called so: letters, digits, `-`, `.` and `_`, 1 to [`NAME_MAX`] of them, a letter or digit first.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    name.len() <= NAME_MAX
        && name.bytes().all(fine)
        && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
}

/// The host of that name.
#[must_use]
pub fn find<'a>(nodes: &'a [Node], name: &str) -> Option<&'a Node> {
    nodes.iter().find(|node| node.name() == name)
}

/// Names of hosts whose heartbeat is missing.
#[must_use]
pub fn lost(nodes: &[Node]) -> Vec<String> {
    nodes.iter().filter(|node| !node.alive).map(|node| node.name().to_owned()).collect()
}
