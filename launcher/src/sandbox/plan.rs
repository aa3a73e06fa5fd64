//! What the daemon asks the spawner to make: everything about one container that is known before it exists.
//!
//! A plan is plain data, complete and already checked; file descriptors travel beside it in [`PlanFds`] because a
//! path can change between check and use and a descriptor cannot.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

/// Names one container for the whole of its life: the app and its generation, which is never used twice.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct ContainerId {
    /// The app's name (the vhost file's name without `.toml`).
    pub app: String,
    /// The instance's generation.
    pub generation: u64,
}

/// One container, as the spawner is to make it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Plan {
    /// Which container this is.
    pub id: ContainerId,
    /// UTS host name inside.
    pub hostname: String,
    /// Program and arguments; `argv[0]` is looked up in `PATH` of `env` inside the container's root.
    pub argv: Vec<String>,
    /// Environment as `NAME=value`.
    pub env: Vec<String>,
    /// Working directory inside.
    pub workdir: String,
    /// Whom the program runs as: `""` (root of the container), `"www-data"`, `"33"`, `"33:33"`, looked up in the
    /// image's own `/etc/passwd` and `/etc/group` (read with a size limit).
    pub user: String,
    /// TCP port that means "ready"; `None` takes the first one on which the app listens.
    pub port: Option<u16>,
    /// First host id of the 65,536 that the container's user namespace maps.
    pub id_base: u32,
    /// Size limit of the writable layer (tmpfs), bytes.
    pub upper_bytes: u64,
    /// Size limit of `/dev/shm`, bytes.
    pub shm_bytes: u64,
    /// RLIMIT_NOFILE (soft and hard) inside.
    pub nofile: u64,
    /// The DataPool: the folder of the host beneath which the volumes are (absolute).
    #[serde(default)]
    pub datapool: Option<String>,
    /// Volumes, in mount order.
    pub volumes: Vec<VolumePlan>,
    /// What a container that may connect out has besides; `None` for one that may not.
    #[serde(default)]
    pub network: Option<NetworkPlan>,
    /// What the daemon wants to be told when it finds the container again; nobody else reads it.
    #[serde(default)]
    pub note: String,
    /// An empty directory of the host where the new root is staged, inside the container's private mount namespace.
    pub staging: String,
    /// A step that is to fail; for tests. The daemon plans none in a release build, and nobody else makes plans.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
}

/// A failure that a test wants at one step of a creation, to see that nothing is left behind.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Fault {
    /// Name of the step, as [`StepTiming`] and [`StepError`] have it.
    pub step: String,
    /// The system's error number that it is to fail with.
    pub errno: i32,
    /// Whether the step does its work before it fails, so that there is something to be undone.
    pub done: bool,
}

/// One volume of a [`Plan`].
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct VolumePlan {
    /// Where it is beneath [`Plan::datapool`].
    pub source: String,
    /// Most that it may hold, bytes.
    pub quota: Option<u64>,
    /// Where it appears inside (absolute).
    pub target: String,
    /// Whether writing is refused.
    pub read_only: bool,
}

/// The network of a [`Plan`]; the link itself is the daemon's work, see [`PlanFds::gate`].
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct NetworkPlan {
    /// The text of `/etc/resolv.conf`, whatever the image has there.
    pub resolv_conf: String,
}

/// The descriptors that go with a [`Plan`]; all are close-on-exec.
#[derive(Debug)]
pub struct PlanFds {
    /// Image layers (directories), lowest first, mounted read-only and id-mapped.
    pub layers: Vec<OwnedFd>,
    /// cgroup v1: the `tasks` files (open for writing) of the container's cgroups, joined by the child itself.
    pub cgroup_tasks: Vec<OwnedFd>,
    /// cgroup v2 (also of a hybrid): the container's directory, for `CLONE_INTO_CGROUP`.
    pub cgroup_dir: Option<OwnedFd>,
    /// A file of the host that becomes `/etc/hosts`, read-only: the daemon rewrites it when a host has moved.
    pub hosts: Option<OwnedFd>,
    /// A directory of the host with two empty ones in it, `upper` and `work`: what is written goes there and outlives the
    /// container, instead of into memory. `upper` belongs to [`Plan::id_base`], as does all that is written into it.
    pub upper: Option<OwnedFd>,
    /// The read end of a pipe: the program starts only when a byte has arrived, which says that the network is there.
    pub gate: Option<OwnedFd>,
    /// Standard output and error of the app: the write ends of the daemon's pipes.
    pub stdout: OwnedFd,
    /// See `stdout`.
    pub stderr: OwnedFd,
    /// The read ends of those pipes, for the spawner to hold: while one is open, an app whose daemon has died may write.
    pub outputs: Vec<OwnedFd>,
}

/// Where making a container failed: the step and the system's error.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, thiserror::Error)]
#[error("{step}{}: {}", if detail.is_empty() { String::new() } else { format!(" ({detail})") }, std::io::Error::from_raw_os_error(*errno))]
pub struct StepError {
    /// The step of `sandbox::create`, for example `mount overlay`.
    pub step: String,
    /// The system's error number.
    pub errno: i32,
    /// What it was about, for example a path; may be empty.
    pub detail: String,
}

/// How long the steps took; kept with the instance and shown by `why`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct StepTiming {
    /// Name of the step.
    pub step: String,
    /// Microseconds that it took.
    pub us: u64,
}
