//! The tenant's directories, from the DataPool.
//!
//! They are opened by the container's own first process: a network file system that hangs holds up nobody else, and a kill
//! ends the wait.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use super::mount;
use super::plan::{Plan, VolumePlan};
use super::quota;
use super::root::Root;
use super::step::{About, Failure};

/// Opens every volume beneath the DataPool, sets its quota, and makes a detached mount of it.
///
/// To be called in the mount namespace of the container, while the host's tree is still there: the copy of a mount must be
/// made of the caller's own.
pub(super) fn open(plan: &Plan, userns: BorrowedFd<'_>) -> Result<Vec<OwnedFd>, Failure> {
    if plan.volumes.is_empty() {
        return Ok(Vec::new());
    }
    let Some(path) = &plan.datapool else { return Err(Failure::new(libc::EINVAL, "no DataPool")) };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let pool = rustix::fs::openat(CWD, path, flags, Mode::empty()).about(format!("the DataPool {path}"))?;
    let volumes = plan.volumes.iter().map(|volume| {
        let words = format!("volume \"{}\" beneath the DataPool {path}", volume.source);
        open_one(&pool, volume, userns).about(words)
    });
    volumes.collect()
}

fn open_one(pool: &OwnedFd, volume: &VolumePlan, userns: BorrowedFd<'_>) -> Result<OwnedFd, Failure> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = beneath(pool.as_fd(), &volume.source, flags).map_err(|errno| {
        let mend = match errno {
            rustix::io::Errno::NOENT => "make the folder, or is the DataPool not mounted?",
            rustix::io::Errno::XDEV => "a link leads out of the DataPool",
            _ => "",
        };
        Failure::new(errno.raw_os_error(), mend)
    })?;
    // What was opened, not what bears the name by now.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(&directory, c".", flags, Mode::empty());
    match (volume.quota, opened) {
        (Some(bytes), opened) => quota::limit(opened?.as_fd(), bytes)?,
        (None, Ok(opened)) => quota::lift(opened.as_fd()),
        // Root may not read it there (NFS with root_squash): it has no quota of ours either.
        (None, Err(_)) => {}
    }
    mount::volume(directory.as_fd(), userns, volume.read_only)
}

/// Opens a path that cannot lead out of the directory.
fn beneath(directory: BorrowedFd<'_>, path: &str, flags: OFlags) -> Result<OwnedFd, rustix::io::Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(directory, path, flags, Mode::empty(), resolve)
}

/// Attaches what was opened, each at its place in the container's root.
pub(super) fn attach(root: &Root, plan: &Plan, volumes: &[OwnedFd]) -> Result<(), Failure> {
    for (volume, mount) in plan.volumes.iter().zip(volumes) {
        let target = root.directory(&volume.target)?;
        mount::attach(mount.as_fd(), target.as_fd()).about(&volume.target)?;
    }
    Ok(())
}
