//! How a store is to work.

use std::path::PathBuf;

use launcher_client::paths::{FETCH_UID, GROUP_ID};

use super::Bounds;

/// How an image store is to work.
#[derive(Clone, Debug)]
pub struct Options {
    /// What one image may hold at most.
    pub bounds: Bounds,
    /// Bytes that all unpacked images together may take.
    pub space: u64,
    /// This program, to be started as the fetcher.
    pub exe: PathBuf,
    /// Where fetchers work: a folder that any user may walk through.
    pub fetch_dir: PathBuf,
    /// User and group of fetchers.
    pub fetch_as: (u32, u32),
    /// User and password for registries, in the form of `docker login`'s file.
    pub registry_auth: Option<PathBuf>,
    /// Authorities whose certificates registries may have besides the system's (PEM).
    pub registry_ca: Option<PathBuf>,
    /// Registries that are spoken to without TLS, as `host:port`; those of the loopback are anyway.
    pub insecure_registries: Vec<String>,
}

impl Options {
    /// The usual bounds, with these paths.
    #[must_use]
    pub fn new(exe: PathBuf, fetch_dir: PathBuf) -> Options {
        Options {
            bounds: Bounds::default(),
            space: u64::MAX,
            exe,
            fetch_dir,
            fetch_as: (FETCH_UID, GROUP_ID),
            registry_auth: None,
            registry_ca: None,
            insecure_registries: Vec::new(),
        }
    }

    /// For tests that fetch nothing.
    #[cfg(test)]
    pub(super) fn for_tests() -> Options {
        Options::new("/nonexistent".into(), std::env::temp_dir())
    }
}
