//! Remembers which content an archive had when it looked as it looks now, so that a warm start reads nothing of it.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

const FILE: &str = "index.json";

/// What changes when the content of a file does.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Key {
    pub(super) dev: u64,
    pub(super) ino: u64,
    pub(super) size: u64,
    pub(super) mtime: (i64, i64),
    pub(super) ctime: (i64, i64),
}

/// The newest content of each archive. A loss costs an unpacking, nothing else: so it is written without ceremony.
#[derive(Debug, Default)]
pub(super) struct Cache {
    file: PathBuf,
    known: BTreeMap<PathBuf, (Key, String)>,
}

impl Cache {
    pub(super) fn load(dir: &Path) -> Cache {
        let file = dir.join(FILE);
        let text = std::fs::read(&file).unwrap_or_default();
        let mut known: BTreeMap<PathBuf, (Key, String)> = serde_json::from_slice(&text).unwrap_or_default();
        // Of those from elsewhere what there is holds, should they be away: who wants none of it says so with `retain`.
        known.retain(|source, _| {
            let name = source.to_string_lossy();
            super::remote::is_remote(&name)
                || name.starts_with(super::steps::RECIPE)
                || super::source_exists(source)
        });
        Cache { file, known }
    }

    pub(super) fn find(&self, path: &Path, key: &Key) -> Option<String> {
        self.known.get(path).filter(|(known, _)| known == key).map(|(_, name)| name.clone())
    }

    /// The newest content of something that has no key: an image from elsewhere.
    pub(super) fn newest(&self, source: &Path) -> Option<String> {
        self.known.get(source).map(|(_, name)| name.clone())
    }

    /// Forgets all but these.
    pub(super) fn retain(&mut self, wanted: impl Fn(&Path) -> bool) {
        self.known.retain(|source, _| wanted(source));
    }

    pub(super) fn put(&mut self, path: &Path, key: Key, name: &str) {
        self.known.insert(path.to_owned(), (key, name.to_owned()));
        let text = serde_json::to_vec(&self.known).unwrap_or_default();
        let new = self.file.with_extension("new");
        if let Err(error) = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &self.file)) {
            tracing::warn!(path = %self.file.display(), %error, "the index of images cannot be written");
        }
    }

    pub(super) fn names(&self) -> HashSet<String> {
        self.known.values().map(|(_, name)| name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_fetched_from_elsewhere_is_known_after_a_restart_and_what_is_gone_here_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (remote, gone) = (Path::new("docker://registry.example.com/blog:1"), Path::new("/gone/blog.tar"));
        let mut cache = Cache::load(folder.path());
        cache.put(remote, Key::default(), "oci-1");
        cache.put(gone, Key::default(), "sha256-1");

        let cache = Cache::load(folder.path());

        assert_eq!(cache.newest(remote).as_deref(), Some("oci-1"));
        assert_eq!(cache.newest(gone), None);
    }
}
