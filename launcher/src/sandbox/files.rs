//! Files that programs expect in `/etc`, for images that lack them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;

use super::plan::Plan;
use super::root::{give, open_directory};
use super::step::{About, Failure};

/// Files of `/etc` that are a container's own: what its writable layer holds under these names means nothing to another.
pub const GIVEN_FILES: [&str; 3] = ["hosts", "hostname", "resolv.conf"];

/// Writes `hosts`, `hostname` and `resolv.conf` into the upper layer where the image has nothing or an empty file of
/// that name (as images made from a running container do). What the image has otherwise stays, and covers nothing:
/// a link is never followed. A container that may connect out has a `resolv.conf` of ours, and perhaps `hosts`, whatever the
/// image has: those of the image are of where it was made.
///
/// This happens before the overlay is mounted: through it the same would take four times as long.
pub(super) fn provide(
    upper: BorrowedFd<'_>,
    layers: &[OwnedFd],
    plan: &Plan,
    own_hosts: bool,
) -> Result<(), Failure> {
    let mut etcs = Vec::new();
    for layer in layers.iter().rev() {
        match open_directory(layer.as_fd(), "etc") {
            Ok(etc) => etcs.push(etc),
            Err(Errno::NOENT) => {}
            // Not a directory: hidden by those above, or else refused when the image's directories are checked.
            Err(_) if etcs.is_empty() => return Ok(()),
            Err(_) => break,
        }
    }
    let hosts =
        format!("127.0.0.1\tlocalhost {0}\n::1\tlocalhost ip6-localhost ip6-loopback {0}\n", plan.hostname);
    let hostname = format!("{}\n", plan.hostname);
    let network = plan.network.as_ref();
    let resolv_conf =
        network.map_or("# no name server is reachable from here\n", |network| &network.resolv_conf);
    let mut files = vec![
        ("hosts", hosts.as_str(), own_hosts),
        ("hostname", hostname.as_str(), false),
        ("resolv.conf", resolv_conf, network.is_some()),
    ];
    if network.is_some() {
        // Without it some C libraries ask name servers before they look into `hosts`.
        files.push(("nsswitch.conf", "hosts: files dns\n", false));
    }
    let mut target = None;
    for (name, text, always) in files {
        if !always && !is_lacking(&etcs, name).about(name)? {
            continue;
        }
        if target.is_none() {
            target = Some(upper_etc(upper, &etcs, plan.id_base)?);
        }
        if let Some(etc) = &target {
            write(etc.as_fd(), name, text, plan.id_base)?;
        }
    }
    Ok(())
}

/// Whether the image, seen from above, has nothing worth keeping under a name.
fn is_lacking(etcs: &[OwnedFd], name: &str) -> Result<bool, Errno> {
    for etc in etcs {
        match rustix::fs::statat(etc, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => return Ok(is_empty_file(&found) || is_whiteout(&found)),
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(true)
}

fn is_empty_file(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::RegularFile && found.st_size == 0
}

/// A file that a higher layer has removed.
fn is_whiteout(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice && found.st_rdev == 0
}

/// Makes `/etc` in the upper layer look as the image's, which it will be merged with.
fn upper_etc(upper: BorrowedFd<'_>, etcs: &[OwnedFd], id_base: u32) -> Result<OwnedFd, Failure> {
    let (mode, user, group) = match etcs.first() {
        Some(etc) => {
            let found = rustix::fs::fstat(etc).about("/etc")?;
            (found.st_mode & 0o7777, found.st_uid, found.st_gid)
        }
        None => (0o755, id_base, id_base),
    };
    rustix::fs::mkdirat(upper, "etc", Mode::from_raw_mode(mode)).about("/etc")?;
    let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
    rustix::fs::chownat(upper, "etc", Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW).about("/etc")?;
    open_directory(upper, "etc").about("/etc")
}

fn write(etc: BorrowedFd<'_>, name: &str, text: &str, owner: u32) -> Result<(), Failure> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(etc, name, flags, Mode::from_raw_mode(0o644)).about(name)?;
    rustix::io::write(&file, text.as_bytes()).about(name)?;
    give(etc, name, owner)
}
