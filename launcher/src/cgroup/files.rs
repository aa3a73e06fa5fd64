//! Small reads and writes relative to a group's directory.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags};

use super::CgroupError;

/// Makes `mount/parts…`, and hands the controllers down along the way, to the children of the last part.
pub(super) fn make_path(
    mount: &Path,
    parts: &[&str],
    controllers: Vec<&'static str>,
) -> Result<(), CgroupError> {
    let mut path = mount.to_owned();
    hand_down(&path, &controllers)?;
    for part in parts {
        path.push(part);
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(CgroupError::io(&path, "make the group", error));
            }
            _ => hand_down(&path, &controllers)?,
        }
    }
    Ok(())
}

fn hand_down(path: &Path, controllers: &[&'static str]) -> Result<(), CgroupError> {
    if controllers.is_empty() {
        return Ok(());
    }
    let path = path.join("cgroup.subtree_control");
    let enabled = std::fs::read_to_string(&path).map_err(|error| CgroupError::io(&path, "read", error))?;
    for controller in controllers {
        if !enabled.split_whitespace().any(|c| c == *controller) {
            std::fs::write(&path, format!("+{controller}")).map_err(|error| CgroupError::Enable {
                path: path.clone(),
                controller,
                error,
            })?;
        }
    }
    Ok(())
}

/// Names of the groups right beneath `path`; none when it is not there.
pub(super) fn children(path: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(path) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// Opens a group's directory.
pub(super) fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Opens a file of a group for writing.
pub(super) fn open_write(dir: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(dir, name, OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())?)
}

/// Opens a file of a group for reading.
pub(super) fn open_read(dir: BorrowedFd<'_>, name: &str) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?.into())
}

/// Writes a value in one go.
pub(super) fn write(dir: BorrowedFd<'_>, name: &str, value: &str) -> io::Result<()> {
    let file = open_write(dir, name)?;
    rustix::io::write(&file, value.as_bytes())?;
    Ok(())
}

/// Writes a value to a file that this kernel may not have; `false` then.
pub(super) fn write_if_there(dir: BorrowedFd<'_>, name: &str, value: &str) -> io::Result<bool> {
    match write(dir, name, value) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a group has such a file.
pub(super) fn exists(dir: BorrowedFd<'_>, name: &str) -> bool {
    rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
}

/// Reads a small file from its beginning.
pub(super) fn read(dir: BorrowedFd<'_>, name: &str) -> io::Result<String> {
    read_file(&open_read(dir, name)?)
}

/// Reads a small open file again from its beginning: one `pread`.
pub(super) fn read_file(file: &File) -> io::Result<String> {
    let mut bytes = [0; 4096];
    let length = rustix::io::pread(file.as_fd(), &mut bytes, 0)?;
    Ok(String::from_utf8_lossy(&bytes[..length]).into_owned())
}

/// The value of `key` in a file of `key value` lines.
pub(super) fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// A number, or `None` for `max` and for v1's way of saying "no limit".
pub(super) fn limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|bytes| *bytes < 1 << 62)
}

/// All processes of a group: a list may be longer than one page.
pub(super) fn processes(dir: BorrowedFd<'_>) -> io::Result<Vec<i32>> {
    let text = io::read_to_string(open_read(dir, "cgroup.procs")?)?;
    Ok(text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).collect())
}
