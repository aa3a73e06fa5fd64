//! The state folder: making it, and having it for oneself.

use std::{
    fs::{self, File, OpenOptions, Permissions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use cmdb::fingerprint::fnv1a;
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

/// A folder that the launcher is to use, if there is one: a chosen one must be there, the state folder's own need not.
pub(crate) fn own_or_chosen(
    root: &Path,
    name: &str,
    chosen: Option<&Path>,
) -> Result<Option<PathBuf>, Failure> {
    let own = root.join(name);
    let path = chosen.unwrap_or(&own);
    let found = fs::canonicalize(path).and_then(|found| match found.is_dir() {
        true => Ok(found),
        false => Err(io::ErrorKind::NotADirectory.into()),
    });
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if chosen.is_none() && error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => {
            Err(Failure::failed(format!("the {name} folder {} cannot be used: {error}", path.display())))
        }
    }
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

/// How long an `up` that was just asked to end may take to say so in its lock.
const HESITATION: Duration = Duration::from_millis(500);
/// What the lock says after the pid once its holder ends.
const ENDING: &str = "ending";

/// The lock of a state folder; the file goes with it.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    file: File,
}

impl Lock {
    /// Takes the lock and writes our pid into it; waits up to `patience` for a holder that is ending.
    pub(crate) async fn take(root: &Path, patience: Duration) -> Result<Self, Failure> {
        let path = root.join("lock");
        let begun = tokio::time::Instant::now();
        let mut told = false;
        loop {
            let failed = |error: io::Error| Failure::failed(format!("{}: {error}", path.display()));
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o644);
            let mut file = options.open(&path).map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let holder = holder(&mut file);
                    let (pid, ending) = match holder.strip_suffix(ENDING) {
                        Some(pid) => (pid.trim_end(), true),
                        None => (holder.as_str(), false),
                    };
                    if begun.elapsed() >= if ending { patience } else { HESITATION.min(patience) } {
                        return Err(Failure::failed(format!(
                            "FastContainer runs already with the state folder {} (pid {pid}{}); stop it, or choose another --state",
                            root.display(),
                            if ending { ", which is ending" } else { "" },
                        )));
                    }
                    if ending && !told {
                        tracing::info!("waiting for the earlier run (pid {pid}) to end");
                        told = true;
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
            // The one before us may have removed the file between our opening and our locking it.
            let same = fs::metadata(&path)
                .is_ok_and(|now| file.metadata().is_ok_and(|ours| now.ino() == ours.ino()));
            if same {
                let write = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
                write.map_err(failed)?;
                return Ok(Self { path, file });
            }
        }
    }

    /// Says that we end, so that whoever comes next waits for it.
    pub(crate) fn ending(&mut self) {
        // Appended, so that no reader ever sees the pid missing. Without the word the next one is refused, no worse.
        let written = self.file.seek(io::SeekFrom::End(-1)).and_then(|_| writeln!(self.file, " {ENDING}"));
        if let Err(error) = written {
            tracing::debug!("{}: {error}", self.path.display());
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
    // Half of it is enough to tell the state folders of one host apart, and keeps the name short.
    let hash = fnv1a(root.as_os_str().as_encoded_bytes()) >> 32;
    format!("fastcontainer-{hash:08x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_second_up_is_told_who_has_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let lock = Lock::take(dir.path(), PATIENCE).await.unwrap();

        let refused = Lock::take(dir.path(), PATIENCE).await.unwrap_err().to_string();
        drop(lock);

        assert!(refused.contains(&format!("(pid {})", std::process::id())), "{refused}");
        assert!(!dir.path().join("lock").exists());
        Lock::take(dir.path(), PATIENCE).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_up_waits_for_one_that_is_ending() {
        let dir = tempfile::tempdir().unwrap();
        let mut lock = Lock::take(dir.path(), PATIENCE).await.unwrap();
        lock.ending();

        let (taken, ()) = tokio::join!(Lock::take(dir.path(), PATIENCE), async {
            tokio::time::sleep(2 * HESITATION).await;
            drop(lock);
        });

        assert!(taken.is_ok(), "{taken:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_does_not_finish_ending_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut lock = Lock::take(dir.path(), PATIENCE).await.unwrap();
        lock.ending();

        let refused = Lock::take(dir.path(), Duration::ZERO).await.unwrap_err().to_string();

        assert!(refused.contains(&format!("(pid {}, which is ending)", std::process::id())), "{refused}");
    }

    #[test]
    fn a_datapool_is_chosen_or_the_state_folders_own_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        let (own, other, file) = (root.join("datapool"), root.join("other"), root.join("file"));
        assert_eq!(own_or_chosen(&root, "datapool", None).unwrap(), None);

        fs::create_dir(&own).unwrap();
        fs::create_dir(&other).unwrap();
        fs::write(&file, "").unwrap();

        assert_eq!(own_or_chosen(&root, "datapool", None).unwrap(), Some(own));
        assert_eq!(own_or_chosen(&root, "datapool", Some(&other)).unwrap(), Some(other));
        for wrong in [root.join("absent"), file] {
            let refused = own_or_chosen(&root, "datapool", Some(&wrong)).unwrap_err().to_string();
            assert!(refused.contains(&wrong.display().to_string()), "{refused}");
        }
    }

    #[test]
    fn each_state_folder_has_its_own_cgroup() {
        assert_eq!(cgroup_name(Path::new("/var/lib/fastcontainer")), "fastcontainer");
        assert_eq!(cgroup_name(Path::new("/a")), cgroup_name(Path::new("/a")));
        assert_ne!(cgroup_name(Path::new("/a")), cgroup_name(Path::new("/b")));
        assert_eq!(cgroup_name(Path::new("/a")).len(), "fastcontainer-".len() + 8);
    }
}
