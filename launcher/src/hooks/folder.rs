//! The folder of the operator's programs. Vhost files may be written by tenants' tools, so what they may have run is only
//! what root has put there: everything on the way to a program belongs to root and can be written to by nobody else.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, openat};

/// The folder, opened once and checked.
#[derive(Debug)]
pub struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

/// Why a program is not run.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// It cannot be opened; a symbolic link neither.
    #[error("{path}: {error}")]
    Open {
        /// Which file or folder.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
    /// Its name leads out of the folder.
    #[error("{0:?} does not name a program in the hooks folder")]
    Name(String),
    /// Others than root could change it.
    #[error("{0} does not belong to root alone (`chown root {0} && chmod go-w {0}` if you trust it)")]
    Loose(PathBuf),
    /// It is no program.
    #[error("{0} is no file that may be executed (`chmod 755 {0}`)")]
    NoProgram(PathBuf),
}

impl Folder {
    /// Opens the folder at `path`.
    ///
    /// # Errors
    /// It is not there, or others than root could change it.
    pub fn open(path: &Path) -> Result<Self, FolderError> {
        let at = |error: rustix::io::Errno| FolderError::Open { path: path.to_owned(), error: error.into() };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(at)?;
        if !is_roots(&fstat(&fd).map_err(at)?) {
            return Err(FolderError::Loose(path.to_owned()));
        }
        Ok(Self { fd, path: path.to_owned() })
    }

    /// Makes sure that `program` may be run: only root can change it, or put another in its place.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, program: &str) -> Result<(), FolderError> {
        let mut path = self.path.clone();
        let mut folder: Option<OwnedFd> = None;
        let mut parts = Path::new(program).components().peekable();
        if parts.peek().is_none() {
            return Err(FolderError::Name(program.to_owned()));
        }
        while let Some(part) = parts.next() {
            let Component::Normal(name) = part else { return Err(FolderError::Name(program.to_owned())) };
            path.push(name);
            let at = |error: rustix::io::Errno| FolderError::Open { path: path.clone(), error: error.into() };
            let dir: BorrowedFd<'_> = folder.as_ref().map_or(self.fd.as_fd(), OwnedFd::as_fd);
            // Never through a symbolic link: then what was checked is what is run.
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = openat(dir, name, flags, Mode::empty()).map_err(at)?;
            let stat = fstat(&fd).map_err(at)?;
            if !is_roots(&stat) {
                return Err(FolderError::Loose(path));
            }
            let kind = FileType::from_raw_mode(stat.st_mode);
            let is_program = kind == FileType::RegularFile && stat.st_mode & 0o111 != 0;
            match parts.peek() {
                Some(_) if kind == FileType::Directory => folder = Some(fd),
                None if is_program => return Ok(()),
                _ => return Err(FolderError::NoProgram(path)),
            }
        }
        Err(FolderError::Name(program.to_owned()))
    }

    /// A path that leads to the folder that was opened, whatever its name is now; good while `self` lives.
    pub fn link(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd()).into()
    }
}

fn is_roots(stat: &Stat) -> bool {
    stat.st_uid == 0
        && (FileType::from_raw_mode(stat.st_mode) == FileType::Symlink || stat.st_mode & 0o022 == 0)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs as unix};

    use super::*;

    fn program(path: &Path, mode: u32) {
        fs::write(path, "#!/bin/sh\n").unwrap();
        fs::set_permissions(path, unix::PermissionsExt::from_mode(mode)).unwrap();
    }

    #[test]
    fn only_what_belongs_to_root_alone_is_run() {
        assert!(nix::unistd::geteuid().is_root(), "this test gives files away: run the tests as root");
        let place = tempfile::tempdir().unwrap();
        let root = place.path();
        fs::set_permissions(root, unix::PermissionsExt::from_mode(0o755)).unwrap();
        fs::create_dir(root.join("more")).unwrap();
        fs::create_dir(root.join("loose")).unwrap();
        fs::set_permissions(root.join("loose"), unix::PermissionsExt::from_mode(0o777)).unwrap();
        for (name, mode) in [
            ("good", 0o755),
            ("more/good", 0o755),
            ("loose/good", 0o755),
            ("group", 0o775),
            ("all", 0o757),
            ("data", 0o644),
        ] {
            program(&root.join(name), mode);
        }
        program(&root.join("theirs"), 0o755);
        unix::chown(root.join("theirs"), Some(1000), None).unwrap();
        unix::symlink("/bin/sh", root.join("link")).unwrap();

        let folder = Folder::open(root).unwrap();
        assert!(folder.check("good").is_ok());
        assert!(folder.check("more/good").is_ok());
        for name in [
            "",
            "/bin/sh",
            "../good",
            "more/../good",
            "more",
            "link",
            "loose/good",
            "group",
            "all",
            "theirs",
            "data",
            "none",
        ] {
            let refused = folder.check(name).expect_err(name).to_string();
            assert!(!refused.is_empty());
        }
        assert!(folder.check("group").unwrap_err().to_string().contains("chmod go-w"));
        assert!(Folder::open(&root.join("loose")).is_err());
    }
}
