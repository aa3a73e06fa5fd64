//! The parent's half of a creation: check, open, clone.

use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::child::{Inheritance, become_container};
use super::mount;
use super::plan::{Plan, PlanFds, StepError};
use super::process;
use super::report::Reporter;
use super::seccomp::Filters;
use super::step::{About, Failure, Steps};
use super::sys::{self, Cloned};
use super::userns::UserNs;

/// The exit code of a first process that did not get as far as exec.
const FAILED: i32 = 125;

/// All namespaces but two: user (entered late) and cgroup (left when the cgroups are joined).
const NAMESPACES: i32 =
    libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC | libc::CLONE_NEWNET;

/// A container whose first process has been cloned; it goes on by itself up to exec.
#[derive(Debug)]
pub struct Started {
    /// The first process, as the caller sees it.
    pub pid: i32,
    /// Refers to the first process; readable when it has ended. Close-on-exec.
    pub pidfd: OwnedFd,
    /// A blocking `SOCK_SEQPACKET` on which [`super::Report`]s arrive; it ends at exec, if `lent` has been dropped. Close-on-exec.
    pub report: OwnedFd,
    /// To be dropped when the first report has come or the process has ended.
    pub lent: Lent,
}

/// What parent and child share until the child has descriptors of its own.
#[derive(Debug)]
pub struct Lent {
    _descriptors: Vec<OwnedFd>,
}

/// Builds everything up to the clone, clones, and returns without waiting for the child.
///
/// Must be called by a single-threaded root process in the mount namespace to which the plan's directories belong. The
/// first process is the caller's child (SIGCHLD) and has to be reaped. If it fails before exec, it says so on `report`
/// and exits with 125; all that was made of the container but its cgroups ends with it.
pub fn start(plan: &Plan, fds: PlanFds, userns: &UserNs) -> Result<Started, StepError> {
    let mut steps = Steps::begin(plan.fault.as_ref());
    steps.run("check plan", || check(plan, &fds, userns))?;
    let filters = Filters::prepared();
    let layers = steps.run("open layers", || open_layers(&fds, userns))?;
    let hosts = match &fds.hosts {
        Some(hosts) => Some(steps.run("open hosts", || mount::host_file(hosts.as_fd()))?),
        None => None,
    };
    let upper = match &fds.upper {
        Some(upper) => Some(steps.run("open upper layer", || mount::upper_layer(upper.as_fd()))?),
        None => None,
    };
    let protected = steps.run("read oom score", process::is_protected_from_oom)?;
    let (report, reporter) = steps.run("open report socket", || {
        let pair =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        pair.about("socketpair")
    })?;

    // The one that is kept has a high number; see `sys::own_descriptors`.
    let userns = userns.fd.try_clone().map_err(|error| Failure::from(error).at("clone"))?;

    steps.fail_on_purpose("clone", false)?;
    // Sharing descriptors at first: of the parent's thousands the child is to have a dozen.
    let flags = u64::try_from(NAMESPACES | libc::CLONE_FILES).unwrap_or(0) | sys::CLONE_CLEAR_SIGHAND;
    let cloned = sys::clone3(flags, libc::SIGCHLD, fds.cgroup_dir.as_ref().map(AsFd::as_fd));
    let cloned = cloned.map_err(|error| Failure::from(error).at("clone"))?;
    let PlanFds { cgroup_tasks, gate, stdout, stderr, cgroup_dir, layers: folders, upper: place, .. } = fds;
    match cloned {
        Cloned::Parent { pid, pidfd } => {
            let lists = [layers, cgroup_tasks, folders, vec![stdout, stderr, userns, reporter]];
            let single = [hosts, gate, cgroup_dir, upper, place];
            let lent = lists.into_iter().flatten().chain(single.into_iter().flatten()).collect();
            Ok(Started { pid, pidfd: sys::shelve(pidfd), report, lent: Lent { _descriptors: lent } })
        }
        Cloned::Child => {
            let given = Inheritance {
                plan,
                layers,
                hosts,
                upper,
                gate,
                cgroup_tasks,
                stdout,
                stderr,
                userns,
                filters,
                protected,
            };
            let reporter = Reporter::new(reporter);
            if let Err(error) = given.own(&reporter) {
                reporter.failed(error.at("own descriptors"));
                sys::exit_now(FAILED);
            }
            run_child(given, &reporter, steps)
        }
    }
}

/// The child's life; not even a panic leads from here back into the spawner's code.
fn run_child(given: Inheritance<'_>, reporter: &Reporter, mut steps: Steps<'_>) -> ! {
    steps.lap("clone");
    let error = catch_unwind(AssertUnwindSafe(|| become_container(given, reporter, steps)));
    let error = error.unwrap_or_else(|_| Failure::new(libc::EFAULT, "a panic in the launcher").at("create"));
    reporter.failed(error);
    sys::exit_now(FAILED)
}

fn open_layers(fds: &PlanFds, userns: &UserNs) -> Result<Vec<OwnedFd>, Failure> {
    let layers = fds.layers.iter().enumerate();
    let opened = layers.map(|(index, layer)| {
        mount::image_layer(layer.as_fd(), userns.fd.as_fd()).about(format!("layer {index}"))
    });
    opened.collect()
}

/// Refuses plans that contradict themselves or would undo the isolation. The daemon checks plans with better messages;
/// this is the last door.
fn check(plan: &Plan, fds: &PlanFds, userns: &UserNs) -> Result<(), Failure> {
    let invalid = |why: &str| Err(Failure::new(libc::EINVAL, why));
    if plan.argv.first().is_none_or(String::is_empty) {
        return invalid("no program");
    }
    if fds.layers.is_empty() {
        return invalid("no image layer");
    }
    if plan.id_base != userns.id_base {
        return invalid("the ids are not those of the user namespace");
    }
    if plan.hostname.is_empty() || plan.hostname.len() > 64 || plan.hostname.contains(char::is_whitespace) {
        return invalid("host name");
    }
    for volume in &plan.volumes {
        if !is_volume_target(&volume.target) {
            return Err(Failure::new(libc::EINVAL, format!("volume target {}", volume.target)));
        }
    }
    Ok(())
}

/// An absolute path without `.` and `..`, neither the root nor anything of the kernel's file systems.
fn is_volume_target(target: &str) -> bool {
    let mut names = target.split('/').filter(|name| !name.is_empty()).peekable();
    let reserved = names.peek().is_none_or(|first| ["proc", "sys", "dev"].contains(first));
    target.starts_with('/') && !reserved && !names.any(|name| name == "." || name == "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_go_anywhere_but_where_they_would_break_the_container() {
        for target in ["/data", "/var/www/html/", "/developer", "/a//b", "/etc/app", "/tmp"] {
            assert!(is_volume_target(target), "{target}");
        }
        for target in
            ["", "/", "//", "data", "/proc", "/proc/1", "/sys/x", "//dev/shm", "/a/../b", "/a/./b", "/.."]
        {
            assert!(!is_volume_target(target), "{target}");
        }
    }
}
