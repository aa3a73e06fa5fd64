//! Mounts made and attached by descriptor: no path that an image or a tenant controls is ever followed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use super::step::{About, Failure};
use super::sys::{self, MountAttr};

const RDONLY: u64 = 0x1;
const NOSUID: u64 = 0x2;
const NODEV: u64 = 0x4;
const NOEXEC: u64 = 0x8;
const IDMAP: u64 = 0x0010_0000;
const PRIVATE: u64 = libc::MS_PRIVATE;

/// A new instance of a file system, not yet attached; the descriptor is open at its root.
pub(super) fn new_file_system(
    kind: &str,
    options: &[(&str, &str)],
    attributes: MountAttrFlags,
) -> Result<OwnedFd, Failure> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).about(kind)?;
    for (key, value) in options {
        fsconfig_set_string(&context, *key, *value).about(format!("{kind}: {key}={value}"))?;
    }
    fsconfig_create(&context).about(kind)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).about(kind)
}

/// A second view of the tree at `directory`, not yet attached, without the mounts beneath it.
///
/// `directory` must be of the caller's own mount namespace, so trees that come from outside are opened by the parent.
pub(super) fn detached_copy(directory: BorrowedFd<'_>) -> Result<OwnedFd, Failure> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(directory, "", flags).about("open_tree")
}

/// A read-only copy of an image's layer whose files belong to the container's ids.
pub(super) fn image_layer(directory: BorrowedFd<'_>, userns: BorrowedFd<'_>) -> Result<OwnedFd, Failure> {
    let mount = detached_copy(directory)?;
    map_ids(mount.as_fd(), userns, RDONLY | NOSUID | NODEV)?;
    Ok(mount)
}

/// A view of the directory that a container's writable layer is to lie in. Its owners are the host's ids: those of the
/// container's range.
pub(super) fn upper_layer(directory: BorrowedFd<'_>) -> Result<OwnedFd, Failure> {
    let mount = detached_copy(directory)?;
    let attr = MountAttr { set: NOSUID | NODEV, propagation: PRIVATE, ..MountAttr::default() };
    sys::mount_setattr(mount.as_fd(), attr).about("mount_setattr")?;
    Ok(mount)
}

/// A copy of a volume for the container.
///
/// A file system that knows no id-mapped mounts (NFS; tmpfs before Linux 6.3) is bound as it is: files inside then
/// show the host's ids, and only those that belong to the app's range can be written. That is never more than an
/// id-mapped mount would allow.
pub(super) fn volume(
    directory: BorrowedFd<'_>,
    userns: BorrowedFd<'_>,
    read_only: bool,
) -> Result<OwnedFd, Failure> {
    let attributes = NOSUID | NODEV | if read_only { RDONLY } else { 0 };
    let mount = detached_copy(directory)?;
    match map_ids(mount.as_fd(), userns, attributes) {
        Err(failure) if failure.errno() == libc::EINVAL => {
            let attr = MountAttr { set: attributes, propagation: PRIVATE, ..MountAttr::default() };
            sys::mount_setattr(mount.as_fd(), attr).about("mount_setattr")?;
        }
        other => other?,
    }
    Ok(mount)
}

/// A read-only view of one file of the host.
pub(super) fn host_file(file: BorrowedFd<'_>) -> Result<OwnedFd, Failure> {
    let mount = detached_copy(file)?;
    let attr =
        MountAttr { set: RDONLY | NOSUID | NODEV | NOEXEC, propagation: PRIVATE, ..MountAttr::default() };
    sys::mount_setattr(mount.as_fd(), attr).about("mount_setattr")?;
    Ok(mount)
}

/// Makes a copy private as well, lest mounts that the host makes beneath the source appear inside.
fn map_ids(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>, attributes: u64) -> Result<(), Failure> {
    let attr = MountAttr {
        set: attributes | IDMAP,
        propagation: PRIVATE,
        userns_fd: sys::fd_number(userns),
        ..MountAttr::default()
    };
    sys::mount_setattr(mount, attr).about("mount_setattr IDMAP")
}

/// Allows device nodes on a mount, and forbids programs.
pub(super) fn for_devices(mount: BorrowedFd<'_>) -> Result<(), Failure> {
    let attr = MountAttr { set: NOSUID | NOEXEC, clear: NODEV, ..MountAttr::default() };
    sys::mount_setattr(mount, attr).about("mount_setattr")
}

/// Forbids everything but looking.
pub(super) fn frozen(mount: BorrowedFd<'_>) -> Result<(), Failure> {
    let attr = MountAttr { set: RDONLY | NOSUID | NODEV | NOEXEC, ..MountAttr::default() };
    sys::mount_setattr(mount, attr).about("mount_setattr")
}

/// Attaches a mount on an open directory.
pub(super) fn attach(mount: BorrowedFd<'_>, directory: BorrowedFd<'_>) -> Result<(), Failure> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", directory, "", flags).about("move_mount")
}

/// Attaches a mount on a directory of the host that nobody but root can change.
pub(super) fn attach_at_host_path(mount: BorrowedFd<'_>, path: &str) -> Result<(), Failure> {
    move_mount(mount, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).about(path)
}
