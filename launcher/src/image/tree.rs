//! A tree that is being written and cannot be left: every path is resolved beneath the root, without symbolic links.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags,
    openat2,
};
use rustix::io::Errno;

/// Longest target of a symbolic link, bytes.
const MAX_TARGET: usize = 4095;

/// Who owns an object, and what may be done with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Permission bits, set-user-id and the like included: `no_new_privs` makes them void in a container.
    pub(super) mode: u32,
    /// Seconds since 1970.
    pub(super) mtime: i64,
}

/// Why an object cannot be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum TreeError {
    #[error("it leads through a symbolic link or something else that is no directory")]
    NotThrough,
    #[error("it would replace a directory that is not empty")]
    Replaces,
    #[error("it replaces the root")]
    Root,
    #[error("it links to {0:?}, which is not a file of this archive")]
    Target(PathBuf),
    #[error("the target of the symbolic link is empty or too long")]
    SymlinkTarget,
    #[error("its content is cut off")]
    CutOff,
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl From<Errno> for TreeError {
    fn from(errno: Errno) -> TreeError {
        TreeError::Io(errno.into())
    }
}

pub(super) struct Tree<'a> {
    root: BorrowedFd<'a>,
    /// The directory used last: archives list a directory's entries one after the other.
    last: Option<(PathBuf, OwnedFd)>,
    /// Directories get their times when nothing is put into them any more.
    times: Vec<(PathBuf, i64)>,
}

impl<'a> Tree<'a> {
    pub(super) fn new(root: BorrowedFd<'a>) -> Tree<'a> {
        Tree { root, last: None, times: Vec::new() }
    }

    /// Makes a directory, or gives one that is there another owner.
    pub(super) fn directory(&mut self, path: &Path, owner: &Owner) -> Result<(), TreeError> {
        let directory = match split(path) {
            None => self.root.try_clone_to_owned()?,
            Some((parent, name)) => {
                let parent = self.parent(parent)?.try_clone_to_owned()?;
                let found = kind_of(&parent, name)?;
                if found != Some(FileType::Directory) {
                    self.make_way(&parent, name)?;
                    rustix::fs::mkdirat(&parent, name, Mode::RWXU)?;
                }
                let directory = open_directory(parent.as_fd(), Path::new(name))?;
                if found == Some(FileType::CharacterDevice) {
                    make_opaque(&directory)?;
                }
                directory
            }
        };
        own(directory.as_fd(), owner)?;
        self.times.push((path.to_owned(), owner.mtime));
        Ok(())
    }

    /// Makes a file of exactly `size` bytes.
    pub(super) fn file(
        &mut self,
        path: &Path,
        owner: &Owner,
        content: &mut impl Read,
        size: u64,
    ) -> Result<(), TreeError> {
        let (parent, name) = self.place(path)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&parent, name, flags, Mode::RUSR | Mode::WUSR)?;
        let mut file = File::from(fd);
        let copied = io::copy(&mut content.take(size), &mut file)?;
        if copied != size {
            return Err(TreeError::CutOff);
        }
        file.flush()?;
        own(file.as_fd(), owner)?;
        rustix::fs::futimens(&file, &times(owner.mtime))?;
        Ok(())
    }

    /// Makes a symbolic link. Its target is looked at by nobody but the container.
    pub(super) fn symlink(&mut self, path: &Path, target: &OsStr, owner: &Owner) -> Result<(), TreeError> {
        if target.is_empty() || target.len() > MAX_TARGET {
            return Err(TreeError::SymlinkTarget);
        }
        let (parent, name) = self.place(path)?;
        rustix::fs::symlinkat(target, &parent, name)?;
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        rustix::fs::chownat(&parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        rustix::fs::utimensat(&parent, name, &times(owner.mtime), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }

    /// Makes another name of a file or symbolic link that this archive has brought before.
    pub(super) fn hard_link(&mut self, path: &Path, target: &Path) -> Result<(), TreeError> {
        let no_target = || TreeError::Target(target.to_owned());
        let (directory, old) = split(target).ok_or_else(no_target)?;
        let source = open_directory(self.root, directory).map_err(|_| no_target())?;
        if !matches!(kind_of(&source, old)?, Some(FileType::RegularFile | FileType::Symlink)) {
            return Err(no_target());
        }
        if path == target {
            return Ok(());
        }
        let (parent, name) = self.place(path)?;
        rustix::fs::linkat(&source, old, &parent, name, AtFlags::empty())?;
        Ok(())
    }

    /// Hides what lower layers have under that name, in overlayfs's form: a character device 0:0. What this layer itself
    /// brings under the name stays, whether it came before or comes later.
    pub(super) fn whiteout(&mut self, path: &Path) -> Result<(), TreeError> {
        let (parent, name) = split(path).ok_or(TreeError::Root)?;
        let parent = self.parent(parent)?.try_clone_to_owned()?;
        match kind_of(&parent, name)? {
            None => Ok(rustix::fs::mknodat(&parent, name, FileType::CharacterDevice, Mode::empty(), 0)?),
            Some(FileType::Directory) => make_opaque(&open_directory(parent.as_fd(), Path::new(name))?),
            Some(_) => Ok(()),
        }
    }

    /// Hides everything that lower layers have in a directory.
    pub(super) fn opaque(&mut self, path: &Path) -> Result<(), TreeError> {
        let directory = self.parent(path)?.try_clone_to_owned()?;
        make_opaque(&directory)
    }

    /// Sets the directories' times, the last given first.
    pub(super) fn finish(&mut self) {
        for (path, mtime) in std::mem::take(&mut self.times).into_iter().rev() {
            // One that has been replaced since has no time to be set.
            if let Ok(directory) = open_directory(self.root, &path) {
                let _ = rustix::fs::futimens(&directory, &times(mtime));
            }
        }
    }

    /// A free place for an object that is no directory: what bears its name goes.
    fn place<'p>(&mut self, path: &'p Path) -> Result<(OwnedFd, &'p OsStr), TreeError> {
        let (parent, name) = split(path).ok_or(TreeError::Root)?;
        let parent = self.parent(parent)?.try_clone_to_owned()?;
        self.make_way(&parent, name)?;
        Ok((parent, name))
    }

    fn make_way(&mut self, parent: &OwnedFd, name: &OsStr) -> Result<(), TreeError> {
        let flags = match kind_of(parent, name)? {
            None => return Ok(()),
            Some(FileType::Directory) => AtFlags::REMOVEDIR,
            Some(_) => AtFlags::empty(),
        };
        self.last = None;
        match rustix::fs::unlinkat(parent, name, flags) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => Err(TreeError::Replaces),
            other => Ok(other?),
        }
    }

    /// The directory of an object; directories that the archive did not name are made as `tar` makes them.
    fn parent(&mut self, path: &Path) -> Result<BorrowedFd<'_>, TreeError> {
        if self.last.as_ref().is_none_or(|(last, _)| last != path) {
            let opened = match open_directory(self.root, path) {
                Err(TreeError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                    self.make_directories(path)?
                }
                // Perhaps a whiteout stands in the way; if it is anything else, this fails again.
                Err(TreeError::NotThrough) => self.make_directories(path)?,
                other => other?,
            };
            self.last = Some((path.to_owned(), opened));
        }
        self.last.as_ref().map(|(_, fd)| fd.as_fd()).ok_or(TreeError::Root)
    }

    fn make_directories(&self, path: &Path) -> Result<OwnedFd, TreeError> {
        let mut current = self.root.try_clone_to_owned()?;
        for name in path {
            match rustix::fs::mkdirat(&current, name, Mode::from_raw_mode(0o755)) {
                Ok(()) => {
                    let made = open_directory(current.as_fd(), Path::new(name))?;
                    // Whatever the umask of this process is.
                    rustix::fs::fchmod(&made, Mode::from_raw_mode(0o755))?;
                    current = made;
                }
                // A directory after all, with nothing of the lower layers in it.
                Err(Errno::EXIST) if kind_of(&current, name)? == Some(FileType::CharacterDevice) => {
                    rustix::fs::unlinkat(&current, name, AtFlags::empty())?;
                    rustix::fs::mkdirat(&current, name, Mode::from_raw_mode(0o755))?;
                    current = open_directory(current.as_fd(), Path::new(name))?;
                    rustix::fs::fchmod(&current, Mode::from_raw_mode(0o755))?;
                    make_opaque(&current)?;
                }
                Err(Errno::EXIST) => current = open_directory(current.as_fd(), Path::new(name))?,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(current)
    }
}

/// overlayfs's mark of a directory that covers those of lower layers.
pub(super) const OPAQUE: &str = "trusted.overlay.opaque";

fn make_opaque(directory: &OwnedFd) -> Result<(), TreeError> {
    Ok(rustix::fs::fsetxattr(directory, OPAQUE, b"y", XattrFlags::empty())?)
}

fn split(path: &Path) -> Option<(&Path, &OsStr)> {
    Some((path.parent()?, path.file_name()?))
}

fn open_directory(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, TreeError> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    loop {
        match openat2(root, path, flags, Mode::empty(), resolve) {
            Ok(fd) => return Ok(fd),
            // The kernel could not be sure because of a rename elsewhere.
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::LOOP | Errno::NOTDIR | Errno::XDEV) => return Err(TreeError::NotThrough),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn kind_of(parent: &OwnedFd, name: &OsStr) -> Result<Option<FileType>, TreeError> {
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Owner first: a change of owner clears the set-user-id bit.
fn own(fd: BorrowedFd<'_>, owner: &Owner) -> Result<(), TreeError> {
    rustix::fs::fchown(fd, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))?;
    rustix::fs::fchmod(fd, Mode::from_raw_mode(owner.mode))?;
    Ok(())
}

fn times(mtime: i64) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: mtime, tv_nsec: 0 },
    }
}
