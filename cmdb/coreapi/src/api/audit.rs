//! Who did what: a JSON line for each change that was asked for, and for those who were turned away.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde::Serialize;

/// At this size the log is moved to `audit.log.1`, in place of the one that was there.
const LARGEST: u64 = 16 << 20;
/// Of those who were turned away, so many are written down each minute: nobody can wash the log away by knocking.
const REFUSALS: u32 = 120;

/// One line.
#[derive(Debug, Serialize)]
pub(crate) struct Entry<'a> {
    /// ms since the Unix epoch.
    pub(crate) at_unix_ms: u64,
    /// As in the answer's `x-request-id`.
    pub(crate) request_id: &'a str,
    /// The token's name; `-` for nobody.
    pub(crate) who: &'a str,
    /// Its role.
    pub(crate) role: &'a str,
    /// From where.
    pub(crate) from: &'a str,
    /// Method and path with its query.
    pub(crate) what: &'a str,
    /// The answer's status.
    pub(crate) status: u16,
    /// Why it was not done; empty when it was.
    pub(crate) detail: &'a str,
    /// How long it took, ms.
    pub(crate) took_ms: u64,
}

/// The file.
#[derive(Debug)]
pub(crate) struct Audit {
    path: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    size: u64,
    minute: Instant,
    refusals: u32,
    unwritten: u32,
}

impl Audit {
    /// Opens the log at `path`, or makes it.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        let size = file.metadata()?.len();
        let inner = Inner { file, size, minute: Instant::now(), refusals: 0, unwritten: 0 };
        Ok(Self { path: path.to_owned(), inner: Mutex::new(inner) })
    }

    /// Writes one line. A log that cannot be written to stops nobody, and is told of.
    pub(crate) fn write(&self, entry: &Entry<'_>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        if (400..500).contains(&entry.status) {
            if inner.minute.elapsed() >= Duration::from_secs(60) {
                if inner.unwritten > 0 {
                    text = format!(
                        "{{\"at_unix_ms\":{},\"refusals_not_written\":{}}}\n",
                        entry.at_unix_ms, inner.unwritten
                    );
                }
                (inner.minute, inner.refusals, inner.unwritten) = (Instant::now(), 0, 0);
            }
            if inner.refusals >= REFUSALS {
                inner.unwritten += 1;
                return;
            }
            inner.refusals += 1;
        }
        text.push_str(&serde_json::to_string(entry).unwrap_or_default());
        text.push('\n');
        if let Err(error) = self.append(&mut inner, &text) {
            tracing::error!(%error, "{} cannot be written to", self.path.display());
        }
    }

    fn append(&self, inner: &mut Inner, text: &str) -> io::Result<()> {
        let length = u64::try_from(text.len()).unwrap_or(u64::MAX);
        if inner.size > 0 && inner.size.saturating_add(length) > LARGEST {
            fs::rename(&self.path, self.path.with_extension("log.1"))?;
            inner.file = open(&self.path)?;
            inner.size = 0;
        }
        inner.file.write_all(text.as_bytes())?;
        inner.size += length;
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(status: u16, detail: &str) -> Entry<'_> {
        Entry {
            at_unix_ms: 1,
            request_id: "r",
            who: "bob",
            role: "admin",
            from: "127.0.0.1",
            what: "DELETE /v1/apps/blog",
            status,
            detail,
            took_ms: 2,
        }
    }

    #[test]
    fn the_log_is_bounded_and_those_who_knock_cannot_wash_it_away() {
        let folder = std::env::temp_dir().join(format!("fastcontainer-audit-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("audit.log");
        let audit = Audit::open(&path).unwrap();
        for _ in 0..500 {
            audit.write(&entry(401, "no such token"));
        }
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), usize::try_from(REFUSALS).unwrap());

        let long = "x".repeat(1 << 20);
        for _ in 0..40 {
            audit.write(&entry(200, &long));
        }
        let size = |name: &str| fs::metadata(folder.join(name)).unwrap().len();
        assert!(size("audit.log") <= LARGEST && size("audit.log.1") <= LARGEST);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 2);
        fs::remove_dir_all(&folder).unwrap();
    }
}
