//! Quotas of directories: project quotas of ext4 and XFS (xfs_quota(8), quotactl_fd(2), ioctl_xfs_fsgetxattr(2)).
//!
//! Every file of a directory carries its project's number, which new files inherit; the file system counts and limits what
//! carries the number. A container cannot change it: that takes the host's own user namespace.

use std::ffi::OsStr;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags};

use super::step::{About, Failure};

/// `struct fsxattr` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Attributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

/// `struct if_dqblk` of the kernel.
#[repr(C)]
#[derive(Default)]
struct Limits {
    /// In blocks of 1 KiB.
    hard: u64,
    soft: u64,
    used: u64,
    files: [u64; 3],
    times: [u64; 2],
    valid: u32,
    padding: u32,
}

/// `FS_IOC_FSGETXATTR`: `_IOR('X', 31, struct fsxattr)`.
const GET_ATTRIBUTES: libc::Ioctl = 0x801c_581f;
/// `FS_IOC_FSSETXATTR`: `_IOW('X', 32, struct fsxattr)`.
const SET_ATTRIBUTES: libc::Ioctl = 0x401c_5820;
/// `FS_XFLAG_PROJINHERIT`.
const INHERIT: u32 = 0x200;
/// `QCMD(Q_SETQUOTA, PRJQUOTA)`.
const SET_QUOTA: libc::c_uint = (0x80_0008 << 8) | 2;
/// `QIF_BLIMITS`.
const BLOCK_LIMITS: u32 = 1;
/// Numbers of projects that we give; below are those that people choose.
const FIRST_PROJECT: u64 = 0x10_0000;
const PROJECTS: u64 = 0x7fe0_0000;
/// Deeper trees are no web app's.
const DEEPEST: usize = 64;

/// Limits what the directory, with all beneath it, may hold. The first time everything that is there is counted in, which takes
/// a moment for each file.
pub(super) fn limit(directory: BorrowedFd<'_>, bytes: u64) -> Result<(), Failure> {
    let impossible = "the file system keeps no project quotas: mount it with prjquota, or take \"quota\" out";
    let about = |error: io::Error| match error.raw_os_error() {
        Some(libc::ENOTTY | libc::EOPNOTSUPP | libc::ENOSYS | libc::ESRCH | libc::EINVAL) => {
            Failure::new(error.raw_os_error().unwrap_or(libc::EOPNOTSUPP), impossible)
        }
        _ => Failure::from(error),
    };
    let attributes = attributes(directory).map_err(about)?;
    let own = project_of(directory)?;
    // One that people have chosen holds; one of ours that is not its own was inherited from the volume around it.
    let chosen = (1..FIRST_PROJECT).contains(&u64::from(attributes.project));
    let marked = attributes.flags & INHERIT != 0 && (chosen || attributes.project == own);
    let project = if marked { attributes.project } else { own };
    set_quota(directory, project, bytes).map_err(about)?;
    if !marked {
        count_in(directory, project, 0).about("counting in what is there")?;
    }
    Ok(())
}

/// Takes away the limit that [`limit`] has set earlier, if it has. A project that people have chosen is theirs, and where there
/// are no quotas there is no limit: none of that is an error.
pub(super) fn lift(directory: BorrowedFd<'_>) {
    if let (Ok(attributes), Ok(own)) = (attributes(directory), project_of(directory))
        && attributes.flags & INHERIT != 0
        && attributes.project == own
    {
        // 0: as much as the file system holds.
        let _ = set_quota(directory, own, 0);
    }
}

/// A number of the directory's own, from its inode: no other has it on a file system of fewer than two thousand million.
fn project_of(directory: BorrowedFd<'_>) -> Result<u32, Failure> {
    let inode = rustix::fs::fstat(directory).about("fstat")?.st_ino;
    Ok(u32::try_from(FIRST_PROJECT + inode % PROJECTS).unwrap_or(u32::MAX))
}

/// Marks everything beneath, the directory itself last: a walk that is cut short begins anew.
fn count_in(directory: BorrowedFd<'_>, project: u32, depth: usize) -> Result<(), Failure> {
    if depth > DEEPEST {
        return Err(Failure::new(libc::ELOOP, format!("more than {DEEPEST} folders deep")));
    }
    for entry in Dir::read_from(directory).about("reading a folder")? {
        let entry = entry.about("reading a folder")?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let path = || OsStr::from_bytes(name.to_bytes()).to_string_lossy().into_owned();
        let kind = entry.file_type();
        if kind != FileType::Directory && kind != FileType::RegularFile {
            continue; // links, pipes and sockets hold nothing
        }
        match inside(directory, name) {
            Ok(file) if kind == FileType::Directory => {
                count_in(file.as_fd(), project, depth + 1).about(path())?
            }
            Ok(file) => mark(file.as_fd(), project, 0).about(path())?,
            // Gone meanwhile, or something else by now, or another file system.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::LOOP | rustix::io::Errno::XDEV) => {}
            Err(errno) => return Err(errno).about(path()),
        }
    }
    mark(directory, project, INHERIT).about("marking")
}

fn inside(directory: BorrowedFd<'_>, name: &std::ffi::CStr) -> Result<OwnedFd, rustix::io::Errno> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(directory, name, flags, Mode::empty(), resolve)
}

/// Only a folder has what others inherit: of a file ext4 would refuse it.
fn mark(file: BorrowedFd<'_>, project: u32, inherit: u32) -> io::Result<()> {
    let mut attributes = attributes(file)?;
    attributes.project = project;
    attributes.flags |= inherit;
    // SAFETY: the structure is the one that this request reads, and outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), SET_ATTRIBUTES, &raw const attributes) }.into())
}

fn attributes(file: BorrowedFd<'_>) -> io::Result<Attributes> {
    let mut attributes = Attributes::default();
    // SAFETY: the structure is the one that this request fills, and outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), GET_ATTRIBUTES, &raw mut attributes) }.into())?;
    Ok(attributes)
}

fn set_quota(directory: BorrowedFd<'_>, project: u32, bytes: u64) -> io::Result<()> {
    let limits = Limits { hard: bytes.div_ceil(1024), valid: BLOCK_LIMITS, ..Limits::default() };
    const { assert!(size_of::<Limits>() == 72) };
    // SAFETY: the structure is the one that Q_SETQUOTA reads, and outlives the call.
    check(unsafe {
        libc::syscall(libc::SYS_quotactl_fd, directory.as_raw_fd(), SET_QUOTA, project, &raw const limits)
    })
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
