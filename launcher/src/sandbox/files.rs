//! Files that programs expect in `/etc`, for images that lack them.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::plan::Plan;
use super::root::{Root, give};
use super::step::{About, Failure};

/// Writes `hosts`, `hostname` and `resolv.conf` where the image has nothing or an empty file of that name (as images
/// made from a running container do). What the image has otherwise stays: a link, too, is never followed.
pub(super) fn provide(root: &Root, plan: &Plan) -> Result<(), Failure> {
    let etc = root.resolve("/etc", OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW).about("/etc")?;
    let hosts =
        format!("127.0.0.1\tlocalhost {0}\n::1\tlocalhost ip6-localhost ip6-loopback {0}\n", plan.hostname);
    provide_file(etc.as_fd(), "hosts", &hosts, root.id_base())?;
    provide_file(etc.as_fd(), "hostname", &format!("{}\n", plan.hostname), root.id_base())?;
    provide_file(etc.as_fd(), "resolv.conf", "# no name server is reachable from here\n", root.id_base())
}

fn provide_file(etc: BorrowedFd<'_>, name: &str, text: &str, owner: u32) -> Result<(), Failure> {
    if !is_wanted(etc, name).about(name)? {
        return Ok(());
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat2(etc, name, flags, Mode::from_raw_mode(0o644), confined()).about(name)?;
    rustix::io::write(&file, text.as_bytes()).about(name)?;
    give(etc, name, owner)
}

fn is_wanted(etc: BorrowedFd<'_>, name: &str) -> Result<bool, Errno> {
    match rustix::fs::statat(etc, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => {
            let kind = rustix::fs::FileType::from_raw_mode(found.st_mode);
            Ok(kind == rustix::fs::FileType::RegularFile && found.st_size == 0)
        }
        Err(Errno::NOENT) => Ok(true),
        Err(errno) => Err(errno),
    }
}

fn confined() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS
}
