//! The image store: turns the name of an image into directories that a container's root is laid over.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Where images come from and where unpacked ones are kept.
#[derive(Clone, Debug)]
pub struct ImageStore {
    dir: PathBuf,
}

/// The layers of one image, ready to be mounted.
#[derive(Debug)]
pub struct Layers {
    /// Directories, lowest first.
    pub fds: Vec<OwnedFd>,
    /// What exactly this is: `sha256-<digest>` of an archive, or device, inode and modification time of a directory.
    pub id: String,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Neither `dir:/absolute/path` nor `tar:/absolute/path`.
    #[error("image {image:?}: expected dir:/absolute/path or tar:/absolute/path")]
    Scheme {
        /// As it was given.
        image: String,
    },
    /// An operation on a path failed.
    #[error("image {path}: {what}: {error}")]
    Io {
        /// About which path.
        path: PathBuf,
        /// Doing what.
        what: &'static str,
        /// The system's error.
        error: io::Error,
    },
}

impl ImageStore {
    /// A store that keeps unpacked archives in `dir`.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new(dir: &Path) -> Result<ImageStore, ImageError> {
        std::fs::create_dir_all(dir).map_err(|error| ImageError::Io {
            path: dir.to_owned(),
            what: "make the store",
            error,
        })?;
        Ok(ImageStore { dir: dir.to_owned() })
    }

    /// Finds an image, unpacking it if that has not been done.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub async fn resolve(&self, image: &str) -> Result<Layers, ImageError> {
        Err(ImageError::Scheme { image: image.to_owned() })
    }
}
