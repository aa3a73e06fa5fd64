//! The kernel's file systems inside: `/proc`, `/dev` and `/sys`, each made for this container alone.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use super::mount;
use super::plan::Plan;
use super::root::{Staging, give};
use super::step::{About, Failure};

/// Name, major and minor of every device node inside.
const NODES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// Symbolic links of `/dev`, as POSIX programs expect them.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// The group of terminals, by old custom.
const TTY_GROUP: u32 = 5;

/// What `/sys` shows of the machine and no app needs.
const MASKED: [&str; 3] = ["firmware", "devices/virtual/powercap", "devices/virtual/dmi"];

fn harmless() -> MountAttrFlags {
    MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC
}

/// Processes only: with `subset=pid` there is no `/proc/sys`, `kcore`, `keys`, `sysrq-trigger` … to mask.
pub(super) fn mount_proc(point: BorrowedFd<'_>) -> Result<(), Failure> {
    let proc = mount::new_file_system("proc", &[("subset", "pid")], harmless())?;
    mount::attach(proc.as_fd(), point)
}

/// Fills the staged `/dev` with nodes, links and places for mounts, and attaches it.
pub(super) fn mount_dev(staging: &Staging, point: BorrowedFd<'_>, id_base: u32) -> Result<OwnedFd, Failure> {
    let directory = staging.dev()?;
    let dev = mount::detached_copy(directory.as_fd())?;
    mount::for_devices(dev.as_fd())?;
    for (name, major, minor) in NODES {
        make_node(dev.as_fd(), name, major, minor)?;
        give(dev.as_fd(), name, id_base)?;
    }
    for (name, target) in LINKS {
        rustix::fs::symlinkat(target, &dev, name).about(name)?;
    }
    for name in ["pts", "shm"] {
        rustix::fs::mkdirat(&dev, name, Mode::from_raw_mode(0o755)).about(name)?;
        give(dev.as_fd(), name, id_base)?;
    }
    mount::attach(dev.as_fd(), point)?;
    Ok(dev)
}

/// Makes a node and looks at what is there now: runc has been led to use another file as `/dev/null`.
fn make_node(dev: BorrowedFd<'_>, name: &str, major: u32, minor: u32) -> Result<(), Failure> {
    let number = rustix::fs::makedev(major, minor);
    let mode = Mode::from_raw_mode(0o666);
    rustix::fs::mknodat(dev, name, FileType::CharacterDevice, mode, number).about(name)?;
    let found = rustix::fs::statat(dev, name, AtFlags::SYMLINK_NOFOLLOW).about(name)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::CharacterDevice || found.st_rdev != number {
        return Err(Failure::new(libc::ENXIO, format!("{name} is not device {major}:{minor}")));
    }
    Ok(())
}

/// Terminals of the container's own.
pub(super) fn mount_devpts(dev: BorrowedFd<'_>, id_base: u32) -> Result<(), Failure> {
    let group = (id_base + TTY_GROUP).to_string();
    let options = [("mode", "0620"), ("ptmxmode", "0666"), ("gid", group.as_str())];
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let pts = mount::new_file_system("devpts", &options, attributes)?;
    mount::attach(pts.as_fd(), beneath(dev, "pts").about("pts")?.as_fd())
}

/// Shared memory of the container's own, with its own limit.
pub(super) fn mount_shm(dev: BorrowedFd<'_>, plan: &Plan) -> Result<(), Failure> {
    let (size, id) = (plan.shm_bytes.to_string(), plan.id_base.to_string());
    let options = [("size", size.as_str()), ("mode", "1777"), ("uid", &id), ("gid", &id)];
    let shm = mount::new_file_system("tmpfs", &options, harmless())?;
    mount::attach(shm.as_fd(), beneath(dev, "shm").about("shm")?.as_fd())
}

/// The devices of the container's network namespace and the machine's processors, read-only.
pub(super) fn mount_sys(staging: &Staging, point: BorrowedFd<'_>) -> Result<(), Failure> {
    let sys = mount::new_file_system("sysfs", &[], harmless() | MountAttrFlags::MOUNT_ATTR_RDONLY)?;
    mount::attach(sys.as_fd(), point)?;
    for path in MASKED {
        match beneath(sys.as_fd(), path) {
            Ok(place) => mount::attach(staging.mask()?.as_fd(), place.as_fd()).about(path)?,
            Err(Errno::NOENT) => {} // this machine has no such thing
            Err(errno) => return Err(errno).about(path),
        }
    }
    Ok(())
}

fn beneath(directory: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat2(
        directory,
        path,
        flags,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )
}
