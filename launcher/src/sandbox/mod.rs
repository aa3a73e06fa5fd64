//! Making one container: namespaces, root, mounts, cgroup, network, seccomp, in the order of execution.
//!
//! [`start`] is called by the spawner, a small single-threaded process. It opens what must be opened in the host's
//! own mount namespace, clones the container's first process and returns at once; [`child`] is that process's way to
//! exec. What happens there arrives as [`Report`]s on [`Started::report`].
#![allow(unsafe_code)]

mod child;
mod exec;
mod files;
mod kernelfs;
mod mount;
pub mod notify;
mod plan;
mod process;
mod quota;
mod report;
mod root;
mod seccomp;
mod start;
mod step;
mod sys;
mod user;
mod userns;
mod volumes;

pub use files::GIVEN_FILES;
pub use plan::{ContainerId, Fault, NetworkPlan, Plan, PlanFds, StepError, StepTiming, VolumePlan};
pub use report::Report;
pub use start::{Lent, Started, start};
pub use step::STEPS;
pub use userns::{IDS, UserNs};

/// Moves a descriptor that is held for long out of the way of those of a creation: see [`Started::lent`].
#[must_use]
pub fn shelve(fd: std::os::fd::OwnedFd) -> std::os::fd::OwnedFd {
    sys::shelve(fd)
}

/// Marks every descriptor but the standard three close-on-exec.
///
/// # Errors
/// The system's.
pub fn close_on_exec() -> std::io::Result<()> {
    sys::close_on_exec_from(3)
}
