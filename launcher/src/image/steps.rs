//! What provisioning steps (`[[provision]]`) have made of an image: a layer for each, known by all that went into it, so that a
//! step is done once for each content of its image however many starts and apps there are.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use cmdb::{App, network::Network, provision::ProvisionStep};
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use super::cache::Key;
use super::layers::{ABOUT, IMAGE, Record, TREE};
use super::{
    Bounds, Digest, ImageError, ImageStore, Inner, Layers, OVER, Stage, UNPACKED, WrittenError, open_dir,
    remote, remove_tree, tempfile_in, written,
};

/// Names of what steps have made: this and the digest of what went into it.
pub(super) const STEP: &str = "step-";
/// Names of recipes among the names of images.
pub(super) const RECIPE: &str = "provision:";
/// How long what is there is good without a look; only a `dir:` image changes without telling.
const LOOK: std::time::Duration = std::time::Duration::from_secs(30);

/// How an app's image is to be provisioned.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Tells it apart from all others; not what it makes, which also depends on the image's content.
    pub key: String,
    /// See [`cmdb::app::Container`].
    pub base: Option<String>,
    /// See [`cmdb::app::Container`].
    pub image: String,
    /// In their order; not empty.
    pub steps: Vec<ProvisionStep>,
    network: Network,
}

impl Recipe {
    /// The app's; `None` when there is nothing to be done.
    #[must_use]
    pub fn of(app: &App) -> Option<Recipe> {
        let container = &app.container;
        if container.provision.is_empty() {
            return None;
        }
        let whole = (&container.base, &container.image, &container.provision, &app.network);
        Some(Recipe {
            key: format!("{RECIPE}{}", digest(&whole)),
            base: container.base.clone(),
            image: container.image.clone(),
            steps: container.provision.clone(),
            network: app.network.clone(),
        })
    }

    /// What the steps make of the image of that [`Layers::id`], in their order. A step's name and patience change nothing of
    /// what it makes.
    #[must_use]
    pub fn names(&self, image: &str) -> Vec<String> {
        let mut below = image.to_owned();
        let named = self.steps.iter().map(|step| {
            below = format!("{STEP}{}", digest(&(&below, &self.network, &step.run, &step.user, &step.env)));
            below.clone()
        });
        named.collect()
    }
}

fn digest(value: &impl serde::Serialize) -> String {
    // Plain data cannot fail to be written.
    Digest::of(&serde_json::to_vec(value).unwrap_or_default()).hex().to_owned()
}

/// Where a step writes, until it is kept; removed otherwise.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    upper: OwnedFd,
    id_base: u32,
}

const UPPER: &str = "upper";

impl Scratch {
    /// For [`crate::sandbox::PlanFds::upper`].
    ///
    /// # Errors
    /// The system's.
    pub fn open(&self) -> std::io::Result<OwnedFd> {
        open_dir(&self.path)
    }

    /// Looks how much was written; the container may be at it. Takes its time.
    ///
    /// # Errors
    /// More than the bounds allow.
    pub fn check(&self, bounds: &Bounds) -> Result<(), WrittenError> {
        written::measure(self.upper.as_fd(), bounds).map(drop)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove_tree(&self.path);
    }
}

/// A step's layer that has just been made.
#[derive(Clone, Copy, Debug)]
pub struct Made {
    /// On disk.
    pub bytes: u64,
}

impl ImageStore {
    /// What there is of an app's image, without asking anybody for a newer one; it is made ready if there is nothing.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub async fn at_hand(&self, recipe: &Recipe) -> Result<Layers, ImageError> {
        let one = async |image: &str| match self.inner.newest(image).filter(|_| remote::is_remote(image)) {
            Some(layers) => Ok(layers),
            None => self.resolve(image).await,
        };
        let image = one(&recipe.image).await?;
        match &recipe.base {
            Some(base) => Ok(image.over(one(base).await?)),
            None => Ok(image),
        }
    }

    /// What the steps make of the image as it is now, as far as that is known without asking anybody.
    #[must_use]
    pub fn wanted_steps(&self, recipe: &Recipe) -> Vec<String> {
        let id = match &recipe.base {
            Some(base) => {
                (|| Some(format!("{}{OVER}{}", self.inner.id_now(&recipe.image)?, self.inner.id_now(base)?)))(
                )
            }
            None => self.inner.id_now(&recipe.image),
        };
        id.map_or_else(Vec::new, |id| recipe.names(&id))
    }

    /// One at a time for each name.
    pub async fn turn(&self, name: &str) -> OwnedMutexGuard<()> {
        self.inner.flight(Path::new(name)).lock_owned().await
    }

    /// The image with what steps have made of it; `None` if one of them was not done.
    #[must_use]
    pub fn with_steps(&self, image: &Layers, names: &[String]) -> Option<Layers> {
        self.inner.with_steps(image.try_clone().ok()?, names)
    }

    /// What the recipe has made, perhaps of an older content of its image.
    #[must_use]
    pub fn newest_of(&self, recipe: &Recipe) -> Option<Layers> {
        let name = self.inner.lock_cache().newest(Path::new(&recipe.key))?;
        let record = self.inner.record(&name)?;
        let image = self.inner.by_id(&record.over?)?;
        self.inner.with_steps(image, &record.layers)
    }

    /// The room for what one step writes.
    ///
    /// # Errors
    /// None is left.
    pub fn step_bounds(&self) -> Result<Bounds, ImageError> {
        self.inner.room()
    }

    /// A place for a step to write to, whose ids begin at `id_base`.
    ///
    /// # Errors
    /// The system's.
    pub fn scratch(&self, id_base: u32) -> Result<Scratch, ImageError> {
        let dir = &self.inner.dir;
        let path = tempfile_in(dir).map_err(|error| ImageError::io(dir, "make a directory", error))?;
        let made = (|| {
            for name in [UPPER, "work"] {
                super::layers::make_root(&path.join(name))?;
            }
            // The root of what the container sees takes its owner from there.
            std::os::unix::fs::chown(path.join(UPPER), Some(id_base), Some(id_base))?;
            open_dir(&path.join(UPPER))
        })();
        match made {
            Ok(upper) => Ok(Scratch { path, upper, id_base }),
            Err(error) => {
                remove_tree(&path);
                Err(ImageError::io(dir, "make a directory", error))
            }
        }
    }

    /// Keeps what a step has written, under its name. Nobody may write there any more. Takes its time.
    ///
    /// # Errors
    /// What was written cannot be kept, or the system's error.
    pub fn keep(&self, scratch: &Scratch, name: &str, bounds: &Bounds) -> Result<Made, ImageError> {
        let inner = &self.inner;
        let amount = match written::clean(scratch.upper.as_fd(), scratch.id_base, bounds) {
            Err(WrittenError::Bounds { what: "bytes", most }) if most < inner.options.bounds.bytes => {
                return Err(inner.full());
            }
            other => other.map_err(|error| ImageError::Written { error })?,
        };
        let io = |what| move |error| ImageError::io(&scratch.path, what, error);
        remove_tree(&scratch.path.join("work"));
        std::fs::rename(scratch.path.join(UPPER), scratch.path.join(TREE)).map_err(io("rename"))?;
        let about = serde_json::json!({ "bytes": amount.bytes, "entries": amount.entries });
        std::fs::write(scratch.path.join(ABOUT), about.to_string()).map_err(io("write"))?;
        // What bears its final name must be whole, even after a crash of the host.
        rustix::fs::syncfs(&scratch.upper).map_err(|error| ImageError::io(&scratch.path, "sync", error))?;
        let place = inner.dir.join(name);
        remove_tree(&place);
        std::fs::rename(&scratch.path, &place).map_err(io("move into place"))?;
        Ok(Made { bytes: amount.bytes })
    }

    /// All steps of the recipe are done: the next start uses this.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn provisioned(&self, recipe: &Recipe, layers: &Layers, names: &[String]) -> Result<(), ImageError> {
        let (Some(last), Some((_, image))) = (names.last(), layers.id.split_once(OVER)) else {
            return Ok(());
        };
        let inner = &self.inner;
        let known = inner.lock_cache().newest(Path::new(&recipe.key));
        if known.as_deref() != Some(last) {
            let over = Some(image.to_owned());
            let record = Record { layers: names.to_vec(), config: layers.config.clone(), over };
            inner.write_record(last, &record)?;
            inner.lock_cache().put(Path::new(&recipe.key), Key::default(), last);
            inner.remove_unused();
        }
        inner.lock_states().ready(&recipe.key, &layers.id, LOOK);
        Ok(())
    }

    /// A step runs.
    pub fn provisions(&self, recipe: &Recipe, step: usize) {
        let name = recipe.steps.get(step).map_or(String::new(), |step| step.name.clone());
        let stage = Stage::Provisioning { step: step + 1, of: recipe.steps.len(), name };
        self.inner.lock_states().stage(&recipe.key, stage);
    }

    /// The recipe cannot be followed now; what it has made before stays in use.
    pub fn not_provisioned(&self, recipe: &Recipe, error: &str) {
        let usable = self.newest_of(recipe).map(|layers| layers.id);
        self.inner.lock_states().failed(&recipe.key, error, usable);
    }

    /// The image of a recipe may be another: it is looked at now.
    pub fn look_at(&self, recipe: &Recipe) {
        if self.inner.lock_states().look_by(&recipe.key, Instant::now()) {
            self.nudge();
        }
    }
}

impl Layers {
    fn try_clone(&self) -> std::io::Result<Layers> {
        Ok(Layers {
            fds: self.fds.iter().map(OwnedFd::try_clone).collect::<Result<_, _>>()?,
            id: self.id.clone(),
            config: self.config.clone(),
            lease: self.lease.clone(),
        })
    }
}

impl Inner {
    fn with_steps(&self, mut image: Layers, names: &[String]) -> Option<Layers> {
        for name in names {
            // Held before it is opened: from now on nobody moves it away.
            image.lease = image.lease.and([self.hold(name)]);
            image.fds.push(open_dir(&self.dir.join(name).join(TREE)).ok()?);
        }
        image.id = format!("{}{OVER}{}", names.last()?, image.id);
        Some(image)
    }

    /// The names in the store of an image and of all that it is made of.
    pub(super) fn all_of(&self, id: &str) -> Vec<String> {
        let mut names = Vec::new();
        for part in id.split(OVER) {
            names.push(part.to_owned());
            let Some(record) = self.record(part) else { continue };
            names.extend(record.layers);
            if let Some(over) = record.over.filter(|over| !over.starts_with(STEP)) {
                names.extend(self.all_of(&over));
            }
        }
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The image of a [`Layers::id`] that is in the store.
    fn by_id(&self, id: &str) -> Option<Layers> {
        let mut whole: Option<Layers> = None;
        for part in id.rsplit(OVER) {
            let layers = match part {
                part if part.starts_with(IMAGE) => self.recorded(part)?,
                part if part.starts_with(UNPACKED) => self.unpacked(part).ok()?,
                _ => return None,
            };
            whole = Some(match whole {
                Some(below) => layers.over(below),
                None => layers,
            });
        }
        whole
    }

    /// The [`Layers::id`] of an image as far as it is known without asking anybody.
    fn id_now(&self, image: &str) -> Option<String> {
        if let Some(path) = image.strip_prefix("dir:") {
            return super::folder_id(&open_dir(Path::new(path)).ok()?).ok();
        }
        let current = self.lock_states().get(image).map(|state| state.id.clone()).filter(|id| !id.is_empty());
        let source = image.strip_prefix("tar:").or_else(|| image.strip_prefix("oci:")).unwrap_or(image);
        current.or_else(|| self.lock_cache().newest(Path::new(source)))
    }
}
