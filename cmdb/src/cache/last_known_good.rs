//! The last-known-good file: what a proxy routes by when it starts while the CMDB cannot be reached.
//!
//! The proxy's holds apps only: which instances run is its launcher's to say. A store that has no launcher remembers more
//! ([`crate::redis`]).

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Serialize, de::DeserializeOwned};

use crate::{app::App, fingerprint::fnv1a};

/// First line: this word, the schema, the checksum and the length of what follows. The checksum is there against torn and
/// rotten files, not against forgers: the folder is the proxy's own.
const MAGIC: &str = "fastcontainer-last-known-good";
const SCHEMA: u32 = 1;

/// Where the file is.
#[derive(Clone, Debug)]
pub struct LastKnownGood {
    path: PathBuf,
}

/// Why the file cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum LastKnownGoodError {
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is damaged, or of another version.
    #[error("{path} is damaged or of another version ({what}); it is ignored")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}

impl LastKnownGood {
    /// The file at `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Replaces the file in one step, and makes that durable. Blocks: not for an async thread.
    ///
    /// # Errors
    /// The file system's; the old file is then still whole.
    pub fn write(&self, apps: &[Arc<App>]) -> Result<(), LastKnownGoodError> {
        self.write_all(&apps)
    }

    /// As [`LastKnownGood::write`], for whatever is to be remembered.
    pub(crate) fn write_all(&self, what: &impl Serialize) -> Result<(), LastKnownGoodError> {
        let body = serde_json::to_vec(what).map_err(|e| self.io(io::Error::other(e)))?;
        let temporary = self.path.with_extension("new");
        let write = || -> io::Result<()> {
            // Environment variables of apps may hold secrets: for the proxy's user only.
            let mut options = fs::OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            writeln!(file, "{MAGIC} {SCHEMA} {:016x} {}", fnv1a(&body), body.len())?;
            file.write_all(&body)?;
            file.sync_data()?;
            fs::rename(&temporary, &self.path)?;
            // The name is durable only when its directory is.
            fs::File::open(self.path.parent().unwrap_or(Path::new(".")))?.sync_all()
        };
        write().map_err(|e| self.io(e))
    }

    /// What was written last; nothing when there is no file.
    ///
    /// # Errors
    /// [`LastKnownGoodError::Damaged`] for anything that was not written by [`LastKnownGood::write`].
    pub fn read(&self) -> Result<Vec<Arc<App>>, LastKnownGoodError> {
        self.read_all().map(Option::unwrap_or_default)
    }

    /// What [`LastKnownGood::write_all`] wrote.
    pub(crate) fn read_all<T: DeserializeOwned>(&self) -> Result<Option<T>, LastKnownGoodError> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.io(error)),
        };
        let end = bytes.iter().position(|b| *b == b'\n').ok_or_else(|| self.damaged("no first line"))?;
        let (header, body) = (&bytes[..end], &bytes[end + 1..]);
        let expected = format!("{MAGIC} {SCHEMA} {:016x} {}", fnv1a(body), body.len());
        if header != expected.as_bytes() {
            return Err(self.damaged("the checksum does not match"));
        }
        serde_json::from_slice(body).map(Some).map_err(|_| self.damaged("it holds something else"))
    }

    fn io(&self, source: io::Error) -> LastKnownGoodError {
        LastKnownGoodError::Io { path: self.path.clone(), source }
    }

    fn damaged(&self, what: &'static str) -> LastKnownGoodError {
        LastKnownGoodError::Damaged { path: self.path.clone(), what }
    }
}
