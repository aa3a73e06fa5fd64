//! Control groups: the limits of a container, its meters, and the means to stop, freeze and end all of it.
//!
//! One interface for cgroup v1, v2 and a hybrid of both. All of ours lives beneath one parent group, so that a fresh
//! start can find and end whatever an earlier life left behind.

mod files;
mod group;
mod layout;
mod life;
mod quota;
mod reclaim;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;

use crate::sandbox::ContainerId;
pub use group::{CpuStat, Group, MemoryStat};
pub use layout::{Layout, Version};
pub use quota::{CpuQuota, CpuWeight};

/// Limits that hold from the start; the CPU quota comes later ([`Group::set_cpu`]).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Limits {
    /// Memory, in bytes.
    pub memory: Option<u64>,
    /// Number of tasks.
    pub pids: Option<u64>,
}

/// Our parent group in every hierarchy that we use; cheap to clone.
#[derive(Clone, Debug)]
pub struct Cgroups {
    layout: Arc<Layout>,
    parent: Arc<str>,
    quarantine: Arc<Mutex<Vec<PathBuf>>>,
}

/// What [`Cgroups::sweep`] did.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Sweep {
    /// Directories removed.
    pub removed: usize,
    /// Directories that would not go.
    pub stuck: Vec<PathBuf>,
    /// Names of the groups that were there, and the CPU time that each has used at its end, µs.
    pub used: Vec<(String, u64)>,
}

/// Why control groups cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file of the system that describes the hierarchies.
    #[error("{path}: {error}")]
    Detect {
        /// Which file.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
    /// A controller that is needed is nowhere.
    #[error("no usable cgroup controller for {0}: neither on cgroup v1 nor on cgroup v2")]
    Missing(&'static str),
    /// The name cannot name a group.
    #[error("{0:?} cannot name a cgroup")]
    Name(String),
    /// A controller of v2 cannot be handed down.
    #[error("{path}: cannot enable {controller}: {error}{}", if error.raw_os_error() == Some(libc::EBUSY) { " (processes live in that group itself; start the launcher in a host's root cgroup namespace or in a delegated, empty group)" } else { "" })]
    Enable {
        /// Which `cgroup.subtree_control`.
        path: PathBuf,
        /// Which controller.
        controller: &'static str,
        /// The system's error.
        error: io::Error,
    },
    /// A directory or file operation.
    #[error("{path}: {what}: {error}")]
    Io {
        /// Which file or directory.
        path: PathBuf,
        /// Doing what.
        what: &'static str,
        /// The system's error.
        error: io::Error,
    },
    /// Groups that would not be removed in time; they are in quarantine until the next sweep.
    #[error("cgroups would not go and are in quarantine: {0:?}")]
    Stuck(Vec<PathBuf>),
}

impl CgroupError {
    /// Whether the group, or that file of it, is not there (any more).
    pub fn is_gone(&self) -> bool {
        matches!(self, CgroupError::Io { error, .. } if error.kind() == io::ErrorKind::NotFound)
    }

    fn io(path: &Path, what: &'static str, error: impl Into<io::Error>) -> CgroupError {
        CgroupError::Io { path: path.to_owned(), what, error: error.into() }
    }
}

impl Cgroups {
    /// Finds the hierarchies of this host and makes our parent group (`parent`, a name or a relative path such as
    /// `system.slice/fastcontainer`) in each that is used.
    ///
    /// # Errors
    /// When a controller is missing or cannot be handed down, or the group cannot be made.
    pub fn detect(parent: &str) -> Result<Cgroups, CgroupError> {
        let parts: Vec<&str> = parent.split('/').collect();
        if parts.iter().any(|part| !is_group_name(part)) {
            return Err(CgroupError::Name(parent.to_owned()));
        }
        let layout = Layout::of_this_host()?;
        for mount in layout.mounts() {
            files::make_path(mount, &parts, layout.handed_down(mount))?;
        }
        Ok(Cgroups { layout: Arc::new(layout), parent: parent.into(), quarantine: Arc::default() })
    }

    /// What was found.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Makes the groups of a container, `<parent>/<app>.<generation>`, and writes its limits.
    ///
    /// # Errors
    /// When a group exists already or cannot be made, or a limit is refused; then nothing is left behind.
    pub fn create(&self, id: &ContainerId, limits: &Limits) -> Result<Group, CgroupError> {
        let name = group_name(id)?;
        let group = Group::create(&self.layout, &self.parent, &name, self.quarantine.clone())?;
        let set = limits
            .memory
            .map_or(Ok(()), |bytes| group.set_memory(bytes))
            .and_then(|()| limits.pids.map_or(Ok(()), |count| group.set_pids(count)));
        match set {
            Ok(()) => Ok(group),
            Err(error) => {
                group.remove_now();
                Err(error)
            }
        }
    }

    /// Opens the groups of a container that an earlier daemon made.
    ///
    /// # Errors
    /// When they are not (all) there.
    pub fn open(&self, id: &ContainerId) -> Result<Group, CgroupError> {
        Group::open(&self.layout, &self.parent, &group_name(id)?, self.quarantine.clone())
    }

    /// CPU time of all that is and was in our parent group, µs; `None` when it cannot be read.
    pub fn usage_us(&self) -> Option<u64> {
        let parent = Group::open(&self.layout, "", &self.parent, self.quarantine.clone()).ok()?;
        parent.usage_us().ok()
    }

    /// Names of the groups beneath our parent, without repetition.
    pub fn leftovers(&self) -> Vec<String> {
        let mut names: Vec<String> =
            self.layout.mounts().flat_map(|mount| files::children(&mount.join(&*self.parent))).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Directories that would not go when they were removed.
    pub fn quarantined(&self) -> Vec<PathBuf> {
        self.quarantine.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Kills and removes everything beneath our parent group but the groups of `wanted`. For a start after an end that
    /// was not clean; must not run while other containers are wanted.
    pub async fn sweep(&self, wanted: &[ContainerId]) -> Sweep {
        let mut done = Sweep::default();
        let wanted: Vec<String> = wanted.iter().filter_map(|id| group_name(id).ok()).collect();
        for name in self.leftovers().into_iter().filter(|name| !wanted.contains(name)) {
            if let Ok(group) =
                Group::open_what_is_there(&self.layout, &self.parent, &name, self.quarantine.clone())
            {
                if let Err(error) = group.kill() {
                    tracing::warn!(group = name, %error, "cannot kill what is left in a cgroup");
                }
                if let Some(us) = group.final_usage_us().await {
                    done.used.push((name.clone(), us));
                }
                done.removed += group.directories().len();
                if let Err(CgroupError::Stuck(stuck)) = group.remove().await {
                    done.removed -= stuck.len();
                    done.stuck.extend(stuck);
                }
            }
        }
        self.quarantine.lock().unwrap_or_else(PoisonError::into_inner).retain(|path| path.exists());
        done
    }

    /// Removes our parent group everywhere; what lies above it stays.
    ///
    /// # Errors
    /// When something is still in it.
    pub async fn remove_parent(&self) -> Result<(), CgroupError> {
        let mut stuck = Vec::new();
        for mount in self.layout.mounts() {
            let path = mount.join(&*self.parent);
            if !remove_dir(&path, Duration::from_secs(1)).await {
                stuck.push(path);
            }
        }
        if stuck.is_empty() { Ok(()) } else { Err(CgroupError::Stuck(stuck)) }
    }
}

/// Removes one group's directory, waiting for its last task to be buried. `false` when it would not go.
async fn remove_dir(path: &Path, patience: Duration) -> bool {
    let mut pause = Duration::from_millis(1);
    let mut waited = Duration::ZERO;
    loop {
        match std::fs::remove_dir(path) {
            Ok(()) => return true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return true,
            Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) && waited < patience => {}
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a cgroup would not be removed");
                return false;
            }
        }
        tokio::time::sleep(pause).await;
        waited += pause;
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

fn group_name(id: &ContainerId) -> Result<String, CgroupError> {
    let name = format!("{}.{}", id.app, id.generation);
    if is_group_name(&name) { Ok(name) } else { Err(CgroupError::Name(name)) }
}

/// One path component, not hidden, short, without a control character.
fn is_group_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 200
        && !name.starts_with('.')
        && !name.chars().any(|c| c == '/' || c.is_control())
}
