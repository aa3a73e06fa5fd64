//! How much room images take, what is known of them, and what becomes of those that nobody wants.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::sync::PoisonError;
use std::time::Duration;

use cmdb::App;
use tokio::time::Instant;

use super::cache::Key;
use super::layers::LAYER;
use super::remote::{self, Scratch};
use super::steps::{Recipe, STEP};
use super::{
    Bounds, ImageError, ImageStore, Inner, Layers, OVER, Preparation, Refused, Stage, UNFINISHED, UNPACKED,
    open_dir, written,
};
use crate::fetch::Order;
use crate::image::oci::Layout;

/// How often somebody else is asked for a newer image.
const REMOTE_LOOK: Duration = Duration::from_secs(600);
/// The same when the app starts: each start is to find the newest before long.
const REMOTE_LOOK_AT_START: Duration = Duration::from_secs(10);
/// How often a file of this host is looked at, so that a change is unpacked ahead of the next start.
const LOCAL_LOOK: Duration = Duration::from_secs(30);

impl ImageStore {
    /// What is known of the preparation of an image.
    #[must_use]
    pub fn preparation(&self, image: &str) -> Option<Preparation> {
        self.inner.lock_states().get(image).cloned()
    }

    /// What the next start of an app uses, see [`Layers::id`]; `None` when that is not known without looking.
    #[must_use]
    pub fn current(&self, app: &App) -> Option<String> {
        if let Some(recipe) = Recipe::of(app) {
            return self.current_of(&recipe.key);
        }
        let container = &app.container;
        let image = self.current_of(&container.image)?;
        match &container.base {
            Some(base) => Some(format!("{image}{OVER}{}", self.current_of(base)?)),
            None => Some(image),
        }
    }

    fn current_of(&self, image: &str) -> Option<String> {
        self.inner.lock_states().get(image).map(|state| state.id.clone()).filter(|id| !id.is_empty())
    }

    /// Bytes that an image takes unpacked, shared layers included; `None` for what is not unpacked.
    #[must_use]
    pub fn bytes(&self, id: &str) -> Option<u64> {
        let kinds = [UNPACKED, LAYER, STEP];
        let mut names = self.inner.all_of(id);
        // The record of an image takes no room worth telling; that of a step has the name of its layer.
        names.retain(|name| kinds.iter().any(|kind| name.starts_with(kind)));
        (!names.is_empty()).then(|| names.iter().map(|name| self.inner.size(name)).sum())
    }

    /// Bytes that all unpacked images take.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.inner.used()
    }

    /// Forgets all images and recipes but these, and removes what is neither newest, nor made by these steps, nor used by an
    /// instance.
    pub fn retain(&self, wanted: &BTreeSet<String>, steps: HashSet<String>) {
        *self.inner.kept.lock().unwrap_or_else(PoisonError::into_inner) = steps;
        self.inner.lock_states().retain(|image| wanted.contains(image));
        let is_wanted = |source: &Path| {
            let source = source.to_string_lossy();
            wanted.contains(&*source)
                || ["tar:", "oci:"].iter().any(|kind| wanted.contains(&format!("{kind}{source}")))
        };
        self.inner.lock_cache().retain(is_wanted);
        self.inner.remove_unused();
    }

    /// Something about the images that are wanted has changed.
    pub fn nudge(&self) {
        self.inner.due.notify_one();
    }

    /// Resolves when [`ImageStore::nudge`] was called.
    pub async fn nudged(&self) {
        self.inner.due.notified().await;
    }

    /// An app starts with the image: a newer one is to be there for the next start.
    pub(super) fn look_soon(&self, image: &str) {
        let at = Instant::now() + REMOTE_LOOK_AT_START;
        if self.inner.lock_states().look_by(image, at) {
            self.nudge();
        }
    }

    /// Fetches an image; `again`: also when there is one already.
    pub(super) async fn remote(&self, image: &str, again: bool) -> Result<Layers, ImageError> {
        let inner = self.inner.clone();
        let name = image.to_owned();
        let work = tokio::spawn(async move {
            let _turn = inner.flight(Path::new(&name)).lock_owned().await;
            if let Some(layers) = inner.newest(&name).filter(|_| !again) {
                return Ok(layers);
            }
            let fetched = inner.fetch(&name).await;
            let outcome = match fetched {
                Ok(scratch) => {
                    let (inner, name) = (inner.clone(), name.clone());
                    super::blocking(name.clone().into(), move || inner.take_over(&name, &scratch)).await
                }
                Err(error) => Err(error),
            };
            inner.note(&name, &outcome);
            outcome
        });
        match work.await {
            Ok(outcome) => outcome,
            Err(error) => Err(ImageError::io(Path::new(image), "fetch", std::io::Error::other(error))),
        }
    }
}

impl Inner {
    /// What there is of an image from elsewhere.
    pub(super) fn newest(&self, image: &str) -> Option<Layers> {
        let name = self.lock_cache().newest(Path::new(image))?;
        self.recorded(&name)
    }

    async fn fetch(&self, image: &str) -> Result<Scratch, ImageError> {
        let failed = |error| ImageError::Fetch { image: image.to_owned(), error };
        let source = remote::source(image, &self.options).map_err(failed)?;
        let names = self.layer_names();
        // Nobody removes meanwhile what is not fetched again.
        let _leases: Vec<_> = names.iter().map(|name| self.hold(name)).collect();
        let have = names
            .iter()
            .filter_map(|name| format!("sha256:{}", name.strip_prefix(LAYER)?).parse().ok())
            .collect();
        let (uid, gid) = self.options.fetch_as;
        let order = Order { source, bytes: self.room()?.bytes, have, uid, gid };
        let fetching = |bytes, of| self.lock_states().stage(image, Stage::Fetching { bytes, of });
        if self.newest(image).is_none() {
            fetching(0, 0);
        }
        let (scratch, _) = remote::fetch(&self.options, &order, fetching).await.map_err(failed)?;
        Ok(scratch)
    }

    /// Takes over what a fetcher has left.
    fn take_over(&self, image: &str, scratch: &Scratch) -> Result<Layers, ImageError> {
        let path = &scratch.0;
        self.lock_states().stage(image, Stage::Unpacking);
        let layout = Layout::of_folder(path).map_err(|error| ImageError::open(path, error))?;
        let name = self.install(Path::new(image), &layout, None)?;
        let layers = self.recorded(&name).ok_or_else(|| {
            ImageError::io(Path::new(image), "open the image", std::io::ErrorKind::NotFound)
        })?;
        self.lock_cache().put(Path::new(image), Key::default(), &name);
        self.remove_unused();
        Ok(layers)
    }

    /// Remembers how a preparation went.
    pub(super) fn note(&self, image: &str, outcome: &Result<Layers, ImageError>) {
        let next = if remote::is_remote(image) { REMOTE_LOOK } else { LOCAL_LOOK };
        match outcome {
            Ok(layers) => self.lock_states().ready(image, &layers.id, next),
            Err(error) => {
                let usable =
                    if remote::is_remote(image) { self.lock_cache().newest(Path::new(image)) } else { None };
                self.lock_states().failed(image, &error.to_string(), usable);
            }
        }
    }

    /// The bounds of one more image.
    pub(super) fn room(&self) -> Result<Bounds, ImageError> {
        let left = self.options.space.saturating_sub(self.used());
        if left == 0 {
            return Err(self.full());
        }
        Ok(Bounds { bytes: self.options.bounds.bytes.min(left), ..self.options.bounds })
    }

    /// Whether it was the room for all images that did not suffice.
    pub(super) fn is_full(&self, refused: &Refused) -> bool {
        matches!(refused, Refused::Bounds { what: "bytes", most } if *most < self.options.bounds.bytes)
            && self.options.space < u64::MAX
    }

    pub(super) fn full(&self) -> ImageError {
        ImageError::Space { space: self.options.space, used: self.used() }
    }

    fn used(&self) -> u64 {
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return 0 };
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        names
            .filter(|name| {
                [LAYER, UNPACKED, UNFINISHED].iter().any(|kind| name.starts_with(kind))
                    || (name.starts_with(STEP) && !name.ends_with(".json"))
            })
            .map(|name| self.size(&name))
            .sum()
    }

    fn layer_names(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return Vec::new() };
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with(LAYER)).collect()
    }

    fn size(&self, name: &str) -> u64 {
        let unfinished = name.starts_with(UNFINISHED);
        let known = |inner: &Inner| {
            let sizes = inner.sizes.lock().unwrap_or_else(PoisonError::into_inner);
            sizes.get(name).copied()
        };
        if let Some(bytes) = known(self) {
            return bytes;
        }
        let bytes = open_dir(&self.dir.join(name)).map_or(0, |tree| written::bytes(&tree));
        if !unfinished {
            self.sizes.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), bytes);
        }
        bytes
    }
}
