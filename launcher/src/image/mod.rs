//! The image store: turns the name of an image into directories that a container's root is laid over.
//!
//! `dir:/path` is used where it lies. `tar:/path` (plain, gzip or zstd) is unpacked once for each content that it has
//! had, into `sha256-<digest>`; each start uses the newest. The layers of `oci:/path` are unpacked once each, into
//! `layer-<digest>`, and shared by all images that have them. What an archive says is trusted in nothing.

mod archive;
mod cache;
mod digest;
#[cfg(test)]
mod hostile;
mod layers;
pub(crate) mod oci;
mod options;
mod remote;
mod state;
mod steps;
mod tree;
mod unpack;
mod usage;
mod written;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::fs::{Dir, Mode, OFlags};

pub(crate) use archive::hash_file;
use cache::{Cache, Key};
pub use digest::{Digest, DigestError};
use layers::{IMAGE, LAYER};
pub use oci::{ImageConfig, OciError};
pub use options::Options;
pub use remote::FetchError;
use state::States;
pub use state::{Preparation, Stage};
use steps::STEP;
pub use steps::{Made, Recipe, Scratch as StepScratch};
pub use unpack::{Bounds, Refused};
pub use written::WrittenError;

/// Names of directories that are being filled or emptied; whatever bears them at a start is rubbish.
const UNFINISHED: &str = ".unfinished-";
/// Names of unpacked archives: this and their digest.
const UNPACKED: &str = "sha256-";

/// Where images come from and where unpacked ones are kept; cheap to clone.
#[derive(Clone, Debug)]
pub struct ImageStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    options: Options,
    cache: Mutex<Cache>,
    states: Mutex<States>,
    /// Bytes of what is unpacked, by name; content that has a name does not change.
    sizes: Mutex<HashMap<String, u64>>,
    /// Something is to be prepared.
    due: tokio::sync::Notify,
    /// One unpacking at a time for each archive.
    flights: Mutex<HashMap<PathBuf, Arc<tokio::sync::Mutex<()>>>>,
    /// What steps have made that is wanted though no image that is whole has it.
    kept: Mutex<HashSet<String>>,
    /// Unpacked versions that somebody uses.
    leases: Mutex<HashMap<String, Weak<str>>>,
}

/// The layers of one image, ready to be mounted.
#[derive(Debug)]
pub struct Layers {
    /// Directories, lowest first.
    pub fds: Vec<OwnedFd>,
    /// What exactly this is: `sha256-<digest>` of an archive, `oci-<digest>` of a manifest, or device, inode and
    /// modification time of a directory.
    pub id: String,
    /// How the image wants to be run.
    pub config: ImageConfig,
    /// To be held for as long as a container uses the layers.
    pub lease: Lease,
}

/// Between the ids of images that are laid over one another, the upper one first.
const OVER: char = '+';

impl Layers {
    pub(crate) fn over(self, below: Layers) -> Layers {
        let config = if self.config == ImageConfig::default() { below.config } else { self.config };
        let mut fds = below.fds;
        fds.extend(self.fds);
        let id = format!("{}{OVER}{}", self.id, below.id);
        Layers { fds, id, config, lease: self.lease.and([below.lease]) }
    }
}

/// Keeps an unpacked version from being removed when a newer one takes its place.
#[derive(Clone, Debug)]
pub struct Lease {
    names: Vec<Arc<str>>,
}

impl Lease {
    fn and(mut self, others: impl IntoIterator<Item = Lease>) -> Lease {
        self.names.extend(others.into_iter().flat_map(|other| other.names));
        self
    }
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Of no kind that is known.
    #[error("image {image:?}: expected dir:, tar: or oci: and an absolute path")]
    Scheme {
        /// As it was given.
        image: String,
    },
    /// Nothing is there.
    #[error("image {path} does not exist")]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// A directory was expected.
    #[error("image {path} is not a directory")]
    NotDirectory {
        /// What is not.
        path: PathBuf,
    },
    /// An archive was expected.
    #[error("image {path} is not a regular file")]
    NotFile {
        /// What is not.
        path: PathBuf,
    },
    /// A directory or archive without content.
    #[error("image {path} is empty")]
    Empty {
        /// Which.
        path: PathBuf,
    },
    /// An archive that cannot be, or will not be, unpacked.
    #[error("image {path}: {refused}")]
    Refused {
        /// Which archive.
        path: PathBuf,
        /// Why.
        refused: Refused,
    },
    /// An OCI image that cannot be used.
    #[error("image {path}: {error}")]
    Oci {
        /// Where it is.
        path: PathBuf,
        /// Why not.
        error: OciError,
    },
    /// An image from elsewhere that cannot be had.
    #[error("image {image}: {error}")]
    Fetch {
        /// Which.
        image: String,
        /// Why not.
        error: FetchError,
    },
    /// What a provisioning step has written cannot be kept.
    #[error("{error}")]
    Written {
        /// Why not.
        error: WrittenError,
    },
    /// No room is left.
    #[error(
        "the images would take more than {space} bytes (`up --image-space`), of which {used} are used; `fastcontainer images` shows by what"
    )]
    Space {
        /// Bytes that all images may take.
        space: u64,
        /// Bytes that they take.
        used: u64,
    },
    /// The archive was written to while it was read.
    #[error("image {path} changed while it was being unpacked; move a finished archive into place instead")]
    Changed {
        /// Which archive.
        path: PathBuf,
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

impl ImageError {
    fn io(path: &Path, what: &'static str, error: impl Into<io::Error>) -> ImageError {
        ImageError::Io { path: path.to_owned(), what, error: error.into() }
    }

    /// For opening what the image's name points to.
    fn open(path: &Path, error: io::Error) -> ImageError {
        match error.kind() {
            io::ErrorKind::NotFound => ImageError::Missing { path: path.to_owned() },
            io::ErrorKind::NotADirectory => ImageError::NotDirectory { path: path.to_owned() },
            _ => ImageError::io(path, "open", error),
        }
    }
}

impl ImageStore {
    /// A store that keeps unpacked images in `dir`. Removes what an earlier life left unfinished there.
    ///
    /// # Errors
    /// When the directory cannot be made or read.
    pub fn new(dir: &Path, options: Options) -> Result<ImageStore, ImageError> {
        for dir in [dir, &options.fetch_dir] {
            std::fs::create_dir_all(dir).map_err(|error| ImageError::io(dir, "make the store", error))?;
            let entries =
                std::fs::read_dir(dir).map_err(|error| ImageError::io(dir, "read the store", error))?;
            for entry in entries.flatten() {
                if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                    remove_tree(&entry.path());
                }
            }
        }
        let inner = Inner {
            dir: dir.to_owned(),
            options,
            cache: Mutex::new(Cache::load(dir)),
            states: Mutex::default(),
            sizes: Mutex::default(),
            due: tokio::sync::Notify::new(),
            flights: Mutex::default(),
            kept: Mutex::default(),
            leases: Mutex::default(),
        };
        Ok(ImageStore { inner: Arc::new(inner) })
    }

    /// Finds an image, fetching and unpacking it if that has not been done. Of any number of callers at the same time one
    /// does the work, which goes on when they leave.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub async fn resolve(&self, image: &str) -> Result<Layers, ImageError> {
        if !remote::is_remote(image) {
            return self.local(image).await;
        }
        if let Some(layers) = self.inner.newest(image) {
            self.look_soon(image);
            return Ok(layers);
        }
        self.remote(image, false).await
    }

    /// An image laid over another.
    ///
    /// # Errors
    /// See [`ImageError`]; the first of the two that cannot be used.
    pub async fn resolve_over(&self, base: Option<&str>, image: &str) -> Result<Layers, ImageError> {
        let Some(base) = base else { return self.resolve(image).await };
        let (below, above) = tokio::try_join!(self.resolve(base), self.resolve(image))?;
        Ok(above.over(below))
    }

    /// As [`ImageStore::resolve`], and asks again whoever has the image for a newer one.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub async fn refresh(&self, image: &str) -> Result<Layers, ImageError> {
        if remote::is_remote(image) { self.remote(image, true).await } else { self.local(image).await }
    }

    async fn local(&self, image: &str) -> Result<Layers, ImageError> {
        match image.split_once(':') {
            Some(("dir", path)) if path.starts_with('/') => self.directory(Path::new(path)).await,
            Some(("tar", path)) if path.starts_with('/') => {
                let path = PathBuf::from(path);
                self.one_at_a_time(path.clone(), image, move |inner| inner.archive(&path)).await
            }
            Some(("oci", text)) if text.starts_with('/') => {
                let text = text.to_owned();
                self.one_at_a_time(PathBuf::from(&text), image, move |inner| inner.oci(&text)).await
            }
            _ => Err(ImageError::Scheme { image: image.to_owned() }),
        }
    }

    /// Holds the image of that [`Layers::id`], for a container that was made from it earlier.
    #[must_use]
    pub fn lease(&self, id: &str) -> Lease {
        let names = self.inner.all_of(id);
        Lease { names: Vec::new() }.and(names.iter().map(|name| self.inner.hold(name)))
    }

    /// A directory is opened, not copied: in a blocking thread, because it may lie on a network file system.
    async fn directory(&self, path: &Path) -> Result<Layers, ImageError> {
        let path = path.to_owned();
        blocking(path.clone(), move || {
            let fd = open_dir(&path).map_err(|error| ImageError::open(&path, error))?;
            let entries = Dir::read_from(&fd).map_err(|error| ImageError::io(&path, "read", error))?;
            let mut names =
                entries.flatten().filter(|entry| !matches!(entry.file_name().to_bytes(), b"." | b".."));
            if names.next().is_none() {
                return Err(ImageError::Empty { path });
            }
            let id = folder_id(&fd).map_err(|error| ImageError::io(&path, "stat", error))?;
            let lease = Lease { names: Vec::new() };
            Ok(Layers { fds: vec![fd], id, config: ImageConfig::default(), lease })
        })
        .await
    }

    /// Of any number of callers for the same path, one works at a time; the others find what it did.
    async fn one_at_a_time(
        &self,
        path: PathBuf,
        image: &str,
        work: impl FnOnce(&Inner) -> Result<Layers, ImageError> + Send + 'static,
    ) -> Result<Layers, ImageError> {
        let inner = self.inner.clone();
        let image = image.to_owned();
        // The lock goes along: if the caller leaves, the unpacking is finished all the same, and still by one.
        let turn = inner.flight(&path).lock_owned().await;
        blocking(path, move || {
            let layers = work(&inner);
            inner.note(&image, &layers);
            drop(turn);
            layers
        })
        .await
    }
}

impl Inner {
    fn flight(&self, path: &Path) -> Arc<tokio::sync::Mutex<()>> {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        flights.retain(|_, flight| Arc::strong_count(flight) > 1);
        flights.entry(path.to_owned()).or_default().clone()
    }

    fn archive(&self, path: &Path) -> Result<Layers, ImageError> {
        let file = File::open(path).map_err(|error| ImageError::open(path, error))?;
        let key = key_of(path, &file)?;
        let known = self.lock_cache().find(path, &key);
        if let Some(name) = known
            && let Ok(layers) = self.unpacked(&name)
        {
            return Ok(layers);
        }
        self.lock_states().stage(&format!("tar:{}", path.display()), Stage::Unpacking);
        let name = self.unpack(path, file, &key)?;
        let layers = self.unpacked(&name)?;
        self.lock_cache().put(path, key, &name);
        self.remove_unused();
        Ok(layers)
    }

    /// Fills a directory of another name, which becomes visible when it is whole.
    fn unpack(&self, path: &Path, file: File, key: &Key) -> Result<String, ImageError> {
        let unfinished =
            tempfile_in(&self.dir).map_err(|error| ImageError::io(&self.dir, "make a directory", error))?;
        let filled = self.fill(path, file, key, &unfinished);
        let moved = filled.and_then(|digest| {
            let name = format!("{UNPACKED}{}", digest.hex());
            let place = self.dir.join(&name);
            match std::fs::rename(&unfinished, &place) {
                Ok(()) => Ok(name),
                // The same content under another file name or with another date.
                Err(_) if place.is_dir() => {
                    remove_tree(&unfinished);
                    Ok(name)
                }
                Err(error) => Err(ImageError::io(&place, "move into place", error)),
            }
        });
        moved.inspect_err(|_| remove_tree(&unfinished))
    }

    fn fill(&self, path: &Path, file: File, key: &Key, place: &Path) -> Result<Digest, ImageError> {
        let root = open_dir(place).map_err(|error| ImageError::io(place, "open", error))?;
        let again = file.try_clone().map_err(|error| ImageError::io(path, "duplicate", error))?;
        let (digest, report) =
            archive::unpack(file, root.as_fd(), &self.room()?).map_err(|refused| match refused {
                Refused::Empty => ImageError::Empty { path: path.to_owned() },
                refused if self.is_full(&refused) => self.full(),
                refused => ImageError::Refused { path: path.to_owned(), refused },
            })?;
        if key_of(path, &again)? != *key {
            return Err(ImageError::Changed { path: path.to_owned() });
        }
        if report.skipped > 0 {
            tracing::info!(image = %path.display(), skipped = report.skipped, "device nodes and fifos were left out");
        }
        // What bears its final name must be whole, even after a crash of the host.
        rustix::fs::syncfs(&root).map_err(|error| ImageError::io(place, "sync", error))?;
        Ok(digest)
    }

    fn hold(&self, name: &str) -> Lease {
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        let held = leases.get(name).and_then(Weak::upgrade).unwrap_or_else(|| {
            let held: Arc<str> = name.into();
            leases.insert(name.to_owned(), Arc::downgrade(&held));
            held
        });
        Lease { names: vec![held] }
    }

    fn unpacked(&self, name: &str) -> Result<Layers, ImageError> {
        let place = self.dir.join(name);
        // Held before it is opened: from now on nobody moves it away.
        let lease = self.hold(name);
        let fd = open_dir(&place).map_err(|error| ImageError::io(&place, "open", error))?;
        Ok(Layers { fds: vec![fd], id: name.to_owned(), config: ImageConfig::default(), lease })
    }

    /// Removes unpacked versions that are neither the newest of an image nor used by anybody.
    fn remove_unused(&self) {
        let mut wanted = HashSet::new();
        for name in self.lock_cache().names() {
            wanted.extend(self.all_of(&name));
        }
        wanted.extend(self.kept.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned());
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return };
        for entry in entries.flatten() {
            let file = entry.file_name().to_string_lossy().into_owned();
            let name = file.strip_suffix(".json").unwrap_or(&file);
            if ![UNPACKED, LAYER, IMAGE, STEP].iter().any(|kind| name.starts_with(kind))
                || wanted.contains(name)
            {
                continue;
            }
            let aside = self.dir.join(format!("{UNFINISHED}{file}"));
            {
                let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
                if leases.get(name).is_some_and(|lease| lease.strong_count() > 0) {
                    continue;
                }
                leases.remove(name);
                // Under the lock: nobody can open it by its name any more.
                if std::fs::rename(entry.path(), &aside).is_err() {
                    continue;
                }
            }
            remove_tree(&aside);
        }
    }

    fn lock_states(&self) -> std::sync::MutexGuard<'_, States> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the file or folder of a `tar:` or `oci:` image is still there.
fn source_exists(source: &Path) -> bool {
    source.exists() || oci::Reference::parse(&source.to_string_lossy()).path.exists()
}

/// What a `dir:` image is, as far as its own directory tells.
fn folder_id(folder: &OwnedFd) -> io::Result<String> {
    let stat = rustix::fs::fstat(folder)?;
    Ok(format!("dir-{}-{}-{}", stat.st_dev, stat.st_ino, stat.st_mtime))
}

async fn blocking<T: Send + 'static>(
    path: PathBuf,
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ImageError::io(&path, "read", io::Error::other(error))),
    }
}

fn key_of(path: &Path, file: &File) -> Result<Key, ImageError> {
    let meta = file.metadata().map_err(|error| ImageError::io(path, "stat", error))?;
    if !meta.is_file() {
        return Err(ImageError::NotFile { path: path.to_owned() });
    }
    Ok(Key {
        dev: meta.dev(),
        ino: meta.ino(),
        size: meta.size(),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        ctime: (meta.ctime(), meta.ctime_nsec()),
    })
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

fn tempfile_in(dir: &Path) -> io::Result<PathBuf> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = dir.join(format!("{UNFINISHED}{}-{count}", std::process::id()));
    std::fs::DirBuilder::new().mode(0o755).create(&path)?;
    // Whatever the umask: it becomes the root of containers whose users are not root.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// Removes a tree of ours, whatever a container has made of it; symbolic links are not followed.
fn remove_tree(path: &Path) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let removed = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(tree) => written::wipe(&tree).map_err(io::Error::from).and_then(|()| std::fs::remove_dir(path)),
        Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => std::fs::remove_file(path),
        Err(errno) => Err(errno.into()),
    };
    if let Err(error) = removed
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a directory of the image store cannot be removed");
    }
}
