//! A user namespace prepared before any container needs it.

use std::os::fd::{AsFd, OwnedFd};

use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use rustix::fs::{Mode, OFlags};
use rustix::process::pidfd_send_signal;

use super::plan::StepError;
use super::step::{About, Failure};
use super::sys::{self, Cloned};

/// How many ids a container has: 0 to 65,535.
pub const IDS: u32 = 65_536;

/// A user namespace that maps the ids 0 to 65,535 to a range of the host's.
///
/// One is made per app and kept open. Containers enter it *last*, when all their other namespaces exist: so their
/// root owns no namespace but this one, and cannot mount, configure the network or change the host name.
#[derive(Debug)]
pub struct UserNs {
    /// The namespace.
    pub fd: OwnedFd,
    /// The host's id that is 0 inside.
    pub id_base: u32,
}

impl UserNs {
    /// Makes the namespace. Call it from a single-threaded process, as root.
    pub fn new(id_base: u32) -> Result<UserNs, StepError> {
        create(id_base).map_err(|failure| failure.at("make user namespace"))
    }
}

fn create(id_base: u32) -> Result<UserNs, Failure> {
    // The host's own users must never be inside: neither its root nor the overflow at the end of the id space.
    if id_base < IDS || id_base.checked_add(IDS).is_none() {
        return Err(Failure::new(libc::EINVAL, format!("ids from {id_base}")));
    }
    // It uses no descriptor, so it needs no copy of them.
    let flags = (libc::CLONE_NEWUSER | libc::CLONE_FILES) as u64 | sys::CLONE_CLEAR_SIGHAND;
    // No exit signal: the child is ours alone, and a caller that waits for its containers never meets it.
    match sys::clone3(flags, 0, None).about("clone3")? {
        Cloned::Child => pause_until_killed(),
        Cloned::Parent { pid, pidfd } => {
            let fd = map(pid, id_base);
            let ended = pidfd_send_signal(&pidfd, rustix::process::Signal::KILL).about("kill");
            let reaped =
                waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::__WALL).about("reap");
            let fd = sys::shelve(fd?);
            ended?;
            reaped?;
            Ok(UserNs { fd, id_base })
        }
    }
}

fn pause_until_killed() -> ! {
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    loop {
        nix::unistd::pause();
    }
}

/// Writes the maps and opens the namespace; `setgroups` stays allowed because we are privileged.
fn map(pid: i32, id_base: u32) -> Result<OwnedFd, Failure> {
    let line = format!("0 {id_base} {IDS}");
    for file in ["uid_map", "gid_map"] {
        let path = format!("/proc/{pid}/{file}");
        let open = rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).about(&path)?;
        rustix::io::write(&open, line.as_bytes()).about(&path)?;
    }
    let path = format!("/proc/{pid}/ns/user");
    rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).about(&path)
}
