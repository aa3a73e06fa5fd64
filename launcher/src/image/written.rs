//! What a container has written on this host's disk: hostile until it has been looked at.
//!
//! The kernel's overlay has kept it in order: there is nothing but what the container's ids may make. What is more (sockets,
//! fifos, attributes, ids) is taken away or mapped here, so that the tree may lie beneath other containers.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, RenameFlags, Stat, Uid};
use rustix::io::Errno;

use super::tree::OPAQUE;
use super::unpack::Bounds;
use crate::sandbox::IDS;

/// What a tree holds.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Amount {
    /// On disk; each file once, however many names it has.
    pub(super) bytes: u64,
    pub(super) entries: u64,
}

/// Why what was written is not kept.
#[derive(Debug, thiserror::Error)]
pub enum WrittenError {
    /// More than is allowed.
    #[error("it wrote more than {most} {what}")]
    Bounds {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        most: u64,
    },
    /// An owner that no container has.
    #[error("it left {name:?}, which belongs to the host's user or group {id}")]
    Owner {
        /// Its last name.
        name: String,
        /// Who.
        id: u32,
    },
    /// The system's error.
    #[error("{what}: {error}")]
    Io {
        /// Doing what.
        what: &'static str,
        /// The system's error.
        error: io::Error,
    },
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> WrittenError {
    move |error| WrittenError::Io { what, error: error.into() }
}

/// Walks a tree by descriptors; what is counted once has been seen.
struct Walk<'b> {
    bounds: &'b Bounds,
    amount: Amount,
    seen: HashSet<u64>,
}

impl<'b> Walk<'b> {
    fn new(bounds: &'b Bounds) -> Walk<'b> {
        Walk { bounds, amount: Amount::default(), seen: HashSet::new() }
    }

    /// Counts an entry; `false` when its file was there under another name.
    fn count(&mut self, stat: &Stat, depth: usize) -> Result<bool, WrittenError> {
        let bounds = self.bounds;
        if depth > bounds.depth {
            let most = u64::try_from(bounds.depth).unwrap_or(u64::MAX);
            return Err(WrittenError::Bounds { what: "directories within one another", most });
        }
        self.amount.entries += 1;
        if self.amount.entries > bounds.entries {
            return Err(WrittenError::Bounds { what: "files", most: bounds.entries });
        }
        let several = stat.st_nlink > 1 && kind(stat) != FileType::Directory;
        if several && !self.seen.insert(stat.st_ino) {
            return Ok(false);
        }
        self.amount.bytes += u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
        if self.amount.bytes > bounds.bytes {
            return Err(WrittenError::Bounds { what: "bytes", most: bounds.bytes });
        }
        Ok(true)
    }

    /// Counts while it may still be written to: what vanishes meanwhile is no error.
    fn measure(&mut self, directory: &OwnedFd, depth: usize) -> Result<(), WrittenError> {
        let Ok(entries) = Dir::read_from(directory) else { return Ok(()) };
        for entry in entries.flatten().filter(|entry| is_entry(entry.file_name())) {
            let Ok(stat) = rustix::fs::statat(directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            self.count(&stat, depth)?;
            if kind(&stat) == FileType::Directory
                && let Ok(inner) = open_directory(directory.as_fd(), entry.file_name())
            {
                self.measure(&inner, depth + 1)?;
            }
        }
        Ok(())
    }
}

/// How much there is in a tree, up to the bounds.
///
/// # Errors
/// [`WrittenError::Bounds`].
pub(super) fn measure(root: BorrowedFd<'_>, bounds: &Bounds) -> Result<Amount, WrittenError> {
    let root = open_directory(root, c".").map_err(failed("look at what it wrote"))?;
    let mut walk = Walk::new(bounds);
    walk.measure(&root, 1)?;
    Ok(walk.amount)
}

/// Makes a layer of an overlay's upper directory to which nobody writes any more: owners become those inside (0 to 65,535),
/// what is no file, directory, symbolic link or whiteout goes, and so do all attributes but the mark of an opaque directory.
pub(super) fn clean(root: BorrowedFd<'_>, id_base: u32, bounds: &Bounds) -> Result<Amount, WrittenError> {
    // First without keeping any names: whoever wrote this may have made very many.
    measure(root, bounds)?;
    let root = open_directory(root, c".").map_err(failed("look at what it wrote"))?;
    forget_given_files(&root).map_err(failed("take out the launcher's own files"))?;
    let mut walk = Walk::new(bounds);
    clean_directory(&mut walk, &root, id_base, 1)?;
    let stat = rustix::fs::fstat(&root).map_err(failed("look at what it wrote"))?;
    own(&root, c"/", &stat, id_base)?;
    strip(&root, false).map_err(failed("take its attributes away"))?;
    Ok(walk.amount)
}

fn clean_directory(
    walk: &mut Walk<'_>,
    directory: &OwnedFd,
    id_base: u32,
    depth: usize,
) -> Result<(), WrittenError> {
    for name in names(directory, usize::MAX).map_err(failed("read a directory"))? {
        let name = name.as_c_str();
        let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed("look at what it wrote"))?;
        let first = walk.count(&stat, depth)?;
        match kind(&stat) {
            FileType::Directory => {
                let inner = open_directory(directory.as_fd(), name).map_err(failed("open a directory"))?;
                clean_directory(walk, &inner, id_base, depth + 1)?;
                own(&inner, name, &stat, id_base)?;
                strip(&inner, true).map_err(failed("take its attributes away"))?;
            }
            FileType::RegularFile if first => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = rustix::fs::openat(directory, name, flags, Mode::empty())
                    .map_err(failed("open a file"))?;
                own(&file, name, &stat, id_base)?;
                strip(&file, false).map_err(failed("take its attributes away"))?;
            }
            FileType::Symlink if first => {
                let (uid, gid) = inside(name, &stat, id_base)?;
                rustix::fs::chownat(directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(failed("give a link its owner"))?;
            }
            FileType::RegularFile | FileType::Symlink => {}
            FileType::CharacterDevice if stat.st_rdev == 0 => {}
            _ => {
                rustix::fs::unlinkat(directory, name, AtFlags::empty()).map_err(failed("remove a device"))?
            }
        }
    }
    Ok(())
}

/// Owner first: a change of owner clears the set-user-id bit, which `no_new_privs` makes void in a container.
fn own(file: &OwnedFd, name: &CStr, stat: &Stat, id_base: u32) -> Result<(), WrittenError> {
    let (uid, gid) = inside(name, stat, id_base)?;
    rustix::fs::fchown(file, Some(uid), Some(gid)).map_err(failed("give it its owner"))?;
    rustix::fs::fchmod(file, Mode::from_raw_mode(stat.st_mode & 0o7777)).map_err(failed("give it its mode"))
}

/// The owner as the container saw it.
fn inside(name: &CStr, stat: &Stat, id_base: u32) -> Result<(Uid, Gid), WrittenError> {
    let map = |id: u32| match id.checked_sub(id_base) {
        Some(inner) if inner < IDS => Ok(inner),
        _ => Err(WrittenError::Owner { name: name.to_string_lossy().into_owned(), id }),
    };
    Ok((Uid::from_raw(map(stat.st_uid)?), Gid::from_raw(map(stat.st_gid)?)))
}

/// Removes extended attributes: capabilities, access lists with the host's ids, and the overlay's notes.
fn strip(file: &OwnedFd, may_be_opaque: bool) -> Result<(), Errno> {
    let mut list = vec![0; 64 << 10];
    let length = match rustix::fs::flistxattr(file, &mut list) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => return Ok(()),
        Err(errno) => return Err(errno),
    };
    for name in list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = [0; 4];
        let opaque = may_be_opaque
            && name == OPAQUE.as_bytes()
            && rustix::fs::fgetxattr(file, OPAQUE, &mut value) == Ok(1)
            && value[0] == b'y';
        if !opaque {
            rustix::fs::fremovexattr(file, name)?;
        }
    }
    Ok(())
}

/// Every container gets these anew: those of the step's own container must not stay.
fn forget_given_files(root: &OwnedFd) -> Result<(), Errno> {
    let etc = match open_directory(root.as_fd(), c"etc") {
        Ok(etc) => etc,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
        Err(errno) => return Err(errno),
    };
    for name in crate::sandbox::GIVEN_FILES {
        match rustix::fs::unlinkat(&etc, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT | Errno::ISDIR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Names that are held in memory while a tree is removed.
const AT_A_TIME: usize = 4096;

/// Removes a tree of any depth, with a fixed number of descriptors and without recursion: what lies deep is moved up first.
/// Symbolic links are not followed. Nobody may write to it any more.
pub(super) fn wipe(root: &OwnedFd) -> Result<(), Errno> {
    let mut moved = 0_u64;
    loop {
        let names = names(root, AT_A_TIME)?;
        if names.is_empty() {
            return Ok(());
        }
        for name in names {
            if remove(root, &name)? {
                continue;
            }
            let inner = open_directory(root.as_fd(), &name)?;
            for deep in self::names(&inner, AT_A_TIME)? {
                if !remove(&inner, &deep)? {
                    lift(&inner, &deep, root, &mut moved)?;
                }
            }
            remove(root, &name)?;
        }
    }
}

/// Whether it is gone: a directory that is not empty is not.
fn remove(directory: &OwnedFd, name: &CStr) -> Result<bool, Errno> {
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(true),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(errno),
    }
    match rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn lift(from: &OwnedFd, name: &CStr, to: &OwnedFd, moved: &mut u64) -> Result<(), Errno> {
    loop {
        *moved += 1;
        let place = format!("{moved}.moved");
        match rustix::fs::renameat_with(from, name, to, place, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {}
            other => return other,
        }
    }
}

fn names(directory: &OwnedFd, most: usize) -> Result<Vec<CString>, Errno> {
    let entries = Dir::read_from(directory)?;
    let named = entries.map(|entry| entry.map(|entry| entry.file_name().to_owned()));
    named.filter(|name| name.as_ref().map_or(true, |name| is_entry(name))).take(most).collect()
}

fn is_entry(name: &CStr) -> bool {
    !matches!(name.to_bytes(), b"." | b"..")
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn open_directory(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// Bytes on disk of a tree of ours, or one that is being written.
pub(super) fn bytes(root: &OwnedFd) -> u64 {
    let bounds = Bounds { entries: u64::MAX, bytes: u64::MAX, depth: 256 };
    let mut walk = Walk::new(&bounds);
    // One that is too deep is being written, and is about to be refused.
    let _ = walk.measure(root, 0);
    walk.amount.bytes
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, lchown, symlink};
    use std::path::Path;

    use rustix::fs::XattrFlags;

    use super::*;

    const BASE: u32 = 0x4000_0000;

    fn open(path: &Path) -> OwnedFd {
        rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
    }

    /// As a container whose ids begin at [`BASE`] may have left it.
    fn upper() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        chown(folder.path(), Some(BASE), Some(BASE)).unwrap();
        folder
    }

    fn file(root: &Path, name: &str, owner: u32, mode: u32) {
        let path = root.join(name);
        fs::write(&path, "x").unwrap();
        chown(&path, Some(BASE + owner), Some(BASE + owner)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    }

    fn attribute(path: &Path, name: &str, value: &[u8]) {
        rustix::fs::setxattr(path, name, value, XattrFlags::empty()).unwrap();
    }

    #[test]
    fn what_was_written_becomes_a_layer_with_the_owners_that_it_had_inside() {
        let folder = upper();
        let root = folder.path();
        file(root, "program", 0, 0o4755);
        fs::hard_link(root.join("program"), root.join("again")).unwrap();
        fs::create_dir_all(root.join("etc")).unwrap();
        chown(root.join("etc"), Some(BASE), Some(BASE + 5)).unwrap();
        attribute(&root.join("etc"), OPAQUE, b"y");
        attribute(&root.join("etc"), "trusted.overlay.origin", b"somewhere");
        file(root, "etc/hosts", 0, 0o644);
        file(root, "etc/secret", 33, 0o600);
        attribute(&root.join("etc/secret"), "user.note", b"x");
        symlink("/etc/shadow", root.join("link")).unwrap();
        lchown(root.join("link"), Some(BASE + 33), Some(BASE + 33)).unwrap();
        let device = |name: &str, kind, number| {
            rustix::fs::mknodat(rustix::fs::CWD, root.join(name), kind, Mode::RUSR, number).unwrap();
        };
        device("whiteout", FileType::CharacterDevice, 0);
        device("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
        device("fifo", FileType::Fifo, 0);

        clean(open(root).as_fd(), BASE, &Bounds::default()).unwrap();

        let owner = |name: &str| {
            let found = fs::symlink_metadata(root.join(name)).unwrap();
            (found.uid(), found.gid(), found.mode() & 0o7777)
        };
        assert_eq!(owner("program"), (0, 0, 0o4755));
        assert_eq!(owner("again"), (0, 0, 0o4755));
        assert_eq!(owner("etc").1, 5);
        assert_eq!(owner("etc/secret"), (33, 33, 0o600));
        assert_eq!(owner("link").0, 33);
        assert_eq!(fs::metadata(root).unwrap().uid(), 0);
        for gone in ["null", "fifo", "etc/hosts"] {
            assert!(fs::symlink_metadata(root.join(gone)).is_err(), "{gone}");
        }
        assert!(fs::symlink_metadata(root.join("whiteout")).is_ok());
        let mut list = [0; 1024];
        let listed = |name: &str, list: &mut [u8]| {
            let length = rustix::fs::listxattr(root.join(name), &mut *list).unwrap();
            String::from_utf8(list[..length].to_vec()).unwrap()
        };
        assert_eq!(listed("etc", &mut list), format!("{OPAQUE}\0"));
        assert_eq!(listed("etc/secret", &mut list), "");
    }

    #[test]
    fn what_belongs_to_the_host_is_refused_whatever_it_is() {
        for owner in [0, 1000, BASE - 1, BASE + IDS, u32::MAX - 1] {
            let folder = upper();
            file(folder.path(), "evil", 0, 0o644);
            chown(folder.path().join("evil"), Some(owner), Some(BASE)).unwrap();
            let refused = clean(open(folder.path()).as_fd(), BASE, &Bounds::default());
            assert!(matches!(refused, Err(WrittenError::Owner { id, .. }) if id == owner), "{refused:?}");
        }
    }

    #[test]
    fn more_than_the_bounds_allow_is_refused() {
        let folder = upper();
        (0..20).for_each(|n| file(folder.path(), &n.to_string(), 0, 0o644));
        fs::create_dir_all(folder.path().join("a/b/c/d")).unwrap();
        let root = open(folder.path());
        let with = |bounds: Bounds| measure(root.as_fd(), &bounds).map(|_| ()).unwrap_err().to_string();
        assert!(with(Bounds { entries: 10, ..Bounds::default() }).contains("10 files"));
        assert!(with(Bounds { bytes: 4096, ..Bounds::default() }).contains("4096 bytes"));
        assert!(with(Bounds { depth: 3, ..Bounds::default() }).contains("3 directories"));
        // A file full of nothing takes no room.
        let sparse = fs::File::create(folder.path().join("sparse")).unwrap();
        sparse.set_len(1 << 40).unwrap();
        assert!(measure(root.as_fd(), &Bounds::default()).unwrap().bytes < 1 << 20);
    }

    #[test]
    fn the_deepest_tree_is_removed() {
        let folder = upper();
        let mut here = open(folder.path());
        for depth in 0..400 {
            rustix::fs::mkdirat(&here, "d", Mode::RWXU).unwrap();
            // Names that the removal would like to use itself.
            rustix::fs::mkdirat(&here, format!("{depth}.moved"), Mode::RWXU).unwrap();
            here = open_directory(here.as_fd(), c"d").unwrap();
        }
        wipe(&open(folder.path())).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
