//! The folder of vhost files: opened once while still root, watched, and read on each change.

use std::{
    fs::File,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use cmdb::vhost::{self, Loaded};
use notify::{RecursiveMode, Watcher as _};
use tokio::sync::Notify;

/// See the module.
#[derive(Debug)]
pub(crate) struct Source {
    /// As the operator knows it.
    path: PathBuf,
    folder: File,
}

impl Source {
    /// Opens the folder.
    ///
    /// # Errors
    /// There is no such folder, or it cannot be read.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let path =
            path.canonicalize().with_context(|| format!("the folder {} cannot be found", path.display()))?;
        let folder =
            File::open(&path).with_context(|| format!("the folder {} cannot be opened", path.display()))?;
        anyhow::ensure!(folder.metadata()?.is_dir(), "{} is no folder", path.display());
        Ok(Self { path, folder })
    }

    /// As the operator knows it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// All vhost files as they are now. Blocks on the disk; the caller has nothing else to do.
    pub(crate) fn load(&self) -> Loaded {
        let way = self.way();
        let base = self.path.parent().unwrap_or(Path::new("/"));
        let mut loaded = vhost::load_dir_from(&way, base);
        if way != self.path {
            for fault in &mut loaded.faults {
                if let Ok(rest) = fault.file.strip_prefix(&way) {
                    fault.file = self.path.join(rest);
                }
            }
        }
        loaded
    }

    /// Tells `changed` of each change in the folder, as long as what it returns is kept.
    ///
    /// # Errors
    /// The kernel's, for example when its inotify watches are used up.
    pub(crate) fn watch(&self, changed: Arc<Notify>) -> notify::Result<notify::RecommendedWatcher> {
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // An error (an overflow of the queue, say) means that something was missed: look as well.
            let of_interest = event.map_or(true, |event| !event.kind.is_access());
            if of_interest {
                changed.notify_one();
            }
        })?;
        watcher.watch(&self.way(), RecursiveMode::NonRecursive)?;
        Ok(watcher)
    }

    /// The folder's path where this user may walk it (so that a folder that was replaced is seen), else the
    /// descriptor that was opened by root; but not that of a deleted folder, which reads as one without any app.
    fn way(&self) -> PathBuf {
        let deleted = self.folder.metadata().is_ok_and(|folder| folder.nlink() == 0);
        if deleted || std::fs::read_dir(&self.path).is_ok() {
            self.path.clone()
        } else {
            PathBuf::from(format!("/proc/self/fd/{}", self.folder.as_raw_fd()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deleted_folder_is_a_fault_and_not_a_folder_without_apps() {
        let parent = std::env::temp_dir().join(format!("fastcontainer-source-{}", std::process::id()));
        let conf = parent.join("conf.d");
        std::fs::create_dir_all(&conf).unwrap();
        let source = Source::open(&conf).unwrap();
        assert!(source.load().faults.is_empty());

        std::fs::remove_dir_all(&parent).unwrap();

        let faults = source.load().faults;
        assert!(faults.iter().any(|fault| fault.file == *source.path()), "{faults:?}");
    }
}
