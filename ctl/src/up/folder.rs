//! The state folder: making it, and having it for oneself.

use std::{
    fs::{self, File, OpenOptions, Permissions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use launcher_client::paths::{GROUP_ID, StateDir};

use crate::failure::Failure;

/// Makes the folder and what the daemons expect in it; returns its canonical path.
pub(crate) fn make(state: &Path) -> Result<PathBuf, Failure> {
    make_dir(state, 0o755, None)?;
    let root = fs::canonicalize(state).map_err(|error| fault(state, &error))?;
    let dirs = StateDir::new(&root);
    make_dir(&dirs.launcher(), 0o700, Some((0, 0)))?;
    make_dir(&dirs.run(), 0o711, Some((0, GROUP_ID)))?;
    Ok(root)
}

fn make_dir(path: &Path, mode: u32, owner: Option<(u32, u32)>) -> Result<(), Failure> {
    let made = fs::create_dir_all(path)
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(mode)))
        .and_then(|()| owner.map_or(Ok(()), |(uid, gid)| chown(path, Some(uid), Some(gid))));
    made.map_err(|error| fault(path, &error))
}

fn fault(path: &Path, error: &io::Error) -> Failure {
    Failure::failed(format!("the state folder {} cannot be made: {error}", path.display()))
}

/// The lock of a state folder; the file goes with it.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Takes the lock and writes our pid into it.
    pub(crate) fn take(root: &Path) -> Result<Self, Failure> {
        let path = root.join("lock");
        loop {
            let failed = |error: io::Error| Failure::failed(format!("{}: {error}", path.display()));
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o644);
            let mut file = options.open(&path).map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    return Err(Failure::failed(format!(
                        "FastContainer runs already with the state folder {} (pid {}); stop it, or choose another --state",
                        root.display(),
                        holder(&mut file),
                    )));
                }
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
            // The one before us may have removed the file between our opening and our locking it.
            let same = fs::metadata(&path)
                .is_ok_and(|now| file.metadata().is_ok_and(|ours| now.ino() == ours.ino()));
            if same {
                let write = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
                write.map_err(failed)?;
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let _ = file.rewind().and_then(|()| file.take(32).read_to_string(&mut text));
    let text = text.trim();
    if text.is_empty() { "unknown".to_owned() } else { text.to_owned() }
}

/// Waits until the launcher of an `up` that was killed has ended too: it holds its own lock.
pub(crate) async fn wait_for_former_launcher(root: &Path, patience: Duration) -> Result<(), Failure> {
    let path = StateDir::new(root).launcher().join("lock");
    let deadline = tokio::time::Instant::now() + patience;
    let mut told = false;
    loop {
        let Ok(mut file) = File::open(&path) else { return Ok(()) };
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(_) if tokio::time::Instant::now() >= deadline => {
                return Err(Failure::failed(format!(
                    "a launcher (pid {}) of an earlier run still holds {}; end it first",
                    holder(&mut file),
                    path.display()
                )));
            }
            Err(_) => {}
        }
        if !told {
            tracing::info!("waiting for the launcher of an earlier run to end");
            told = true;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The name of our cgroup: its own for each state folder, the same in each run.
pub(crate) fn cgroup_name(root: &Path) -> String {
    if root == Path::new(launcher_client::paths::DEFAULT_STATE) {
        return "fastcontainer".to_owned();
    }
    // FNV-1a: stable across versions and machines, unlike the standard library's hasher.
    let hash = root
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    format!("fastcontainer-{hash:08x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_up_is_told_who_has_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let lock = Lock::take(dir.path()).unwrap();

        let refused = Lock::take(dir.path()).unwrap_err().to_string();
        drop(lock);

        assert!(refused.contains(&format!("(pid {})", std::process::id())), "{refused}");
        assert!(!dir.path().join("lock").exists());
        Lock::take(dir.path()).unwrap();
    }

    #[test]
    fn each_state_folder_has_its_own_cgroup() {
        assert_eq!(cgroup_name(Path::new("/var/lib/fastcontainer")), "fastcontainer");
        assert_eq!(cgroup_name(Path::new("/a")), cgroup_name(Path::new("/a")));
        assert_ne!(cgroup_name(Path::new("/a")), cgroup_name(Path::new("/b")));
        assert_eq!(cgroup_name(Path::new("/a")).len(), "fastcontainer-".len() + 8);
    }
}
