//! Images of several layers: each layer is unpacked once, whatever number of images has it, and a record for each image
//! says which layers it is made of and how it wants to be run.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::oci::{self, ImageConfig, LayerBlob, Layout, OciError, Reference};
use super::tree::OPAQUE;
use super::unpack::{Bounds, Form};
use super::{
    ImageError, Inner, Layers, Refused, Stage, UNFINISHED, archive, key_of, open_dir, remove_tree,
    tempfile_in,
};

/// Names of unpacked layers in the store: this and the digest of the layer as it was kept.
pub(super) const LAYER: &str = "layer-";
/// Names of images in the store: this and the digest of the manifest. The record is a file of that name with `.json`.
pub(super) const IMAGE: &str = "oci-";
pub(super) const TREE: &str = "tree";
pub(super) const ABOUT: &str = "about.json";

/// What an image is made of; written when all of it is there.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Record {
    /// Names of layers in the store, lowest first.
    pub(super) layers: Vec<String>,
    pub(super) config: ImageConfig,
    /// The image, see [`Layers::id`], over which these layers belong; `None`: they are the whole of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) over: Option<String>,
}

/// What is known of an unpacked layer.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct About {
    diff_id: Digest,
    bytes: u64,
    entries: u64,
}

impl Inner {
    /// `oci:`: finds the image in a layout, and unpacks those of its layers that are not there yet.
    pub(super) fn oci(&self, text: &str) -> Result<Layers, ImageError> {
        let reference = Reference::parse(text);
        let path = &reference.path;
        let refused = |error| ImageError::Oci { path: path.clone(), error };
        let meta = fs::metadata(path).map_err(|error| ImageError::open(path, error))?;
        // The index of a folder, or the whole archive, tells whether anything has changed.
        let mut layout = None;
        let watched = if meta.is_dir() {
            let folder = Layout::of_folder(path).map_err(|error| ImageError::open(path, error))?;
            let index = folder.index_file().map_err(refused)?;
            layout = Some(folder);
            index
        } else {
            fs::File::open(path).map_err(|error| ImageError::open(path, error))?
        };
        let key = key_of(path, &watched)?;
        let source = PathBuf::from(text);
        let known = self.lock_cache().find(&source, &key);
        if let Some(layers) = known.and_then(|name| self.recorded(&name)) {
            return Ok(layers);
        }
        self.lock_states().stage(&format!("oci:{text}"), Stage::Unpacking);
        let layout = match layout {
            Some(layout) => layout,
            None => Layout::of_archive(watched).map_err(refused)?,
        };
        let name = self.install(path, &layout, reference.wanted.as_deref())?;
        let index = layout.index_file().map_err(refused)?;
        if key_of(path, &index)? != key {
            return Err(ImageError::Changed { path: path.clone() });
        }
        let layers = self.recorded(&name).ok_or_else(|| {
            ImageError::io(&self.dir.join(&name), "open the image", io::ErrorKind::NotFound)
        })?;
        self.lock_cache().put(&source, key, &name);
        self.remove_unused();
        Ok(layers)
    }

    /// Brings an image into the store; its name there.
    pub(super) fn install(
        &self,
        path: &Path,
        layout: &Layout,
        wanted: Option<&str>,
    ) -> Result<String, ImageError> {
        let refused = |error| ImageError::Oci { path: path.to_owned(), error };
        let image = oci::find(layout, wanted).map_err(refused)?;
        let name = format!("{IMAGE}{}", image.digest.hex());
        let layers: Vec<String> =
            image.layers.iter().map(|layer| format!("{LAYER}{}", layer.digest.hex())).collect();
        // Held until the record is there, which holds them from then on.
        let _leases: Vec<_> = layers.iter().chain([&name]).map(|name| self.hold(name)).collect();
        let mut left = self.options.bounds;
        for (layer, name) in image.layers.iter().zip(&layers) {
            let about = self.layer(path, layout, layer, name, &left)?;
            left.bytes = left.bytes.saturating_sub(about.bytes);
            left.entries = left.entries.saturating_sub(about.entries);
        }
        let record = Record { layers, config: image.config, over: None };
        self.write_record(&name, &record)?;
        Ok(name)
    }

    /// Has a layer in the store, unpacked and verified.
    fn layer(
        &self,
        path: &Path,
        layout: &Layout,
        layer: &LayerBlob,
        name: &str,
        bounds: &Bounds,
    ) -> Result<About, ImageError> {
        let refused = |error| ImageError::Oci { path: path.to_owned(), error };
        let place = self.dir.join(name);
        // Two images that are being unpacked may have the same layer.
        let turn = self.flight(&place);
        let _turn = turn.blocking_lock();
        let about = match fs::read(place.join(ABOUT)).ok().and_then(|text| serde_json::from_slice(&text).ok())
        {
            Some(about) => about,
            None => self.unpack_layer(path, layout, layer, &place, bounds)?,
        };
        check_content(layer, &about.diff_id).map_err(refused)?;
        Ok(about)
    }

    fn unpack_layer(
        &self,
        path: &Path,
        layout: &Layout,
        layer: &LayerBlob,
        place: &Path,
        bounds: &Bounds,
    ) -> Result<About, ImageError> {
        let refused = |error| ImageError::Oci { path: path.to_owned(), error };
        let unfinished =
            tempfile_in(&self.dir).map_err(|error| ImageError::io(&self.dir, "make a directory", error))?;
        let filled = (|| {
            let tree = unfinished.join(TREE);
            make_root(&tree).map_err(|error| ImageError::io(&tree, "make", error))?;
            let root = open_dir(&tree).map_err(|error| ImageError::io(&tree, "open", error))?;
            let blob = layout.layer(layer).map_err(refused)?;
            let room = self.room()?;
            let scarce = room.bytes < bounds.bytes;
            let bounds = Bounds { bytes: bounds.bytes.min(room.bytes), ..*bounds };
            let unpacked = archive::unpack_from(blob, root.as_fd(), &bounds, Form::Layer);
            let unpacked = unpacked.map_err(|why| match why {
                Refused::Bounds { what: "bytes", .. } if scarce => self.full(),
                why => refused(OciError::Layer { digest: layer.digest.clone(), refused: why }),
            })?;
            if unpacked.digest != layer.digest {
                let (told, found) = (layer.digest.clone(), unpacked.digest);
                return Err(refused(OciError::Digest { what: "layer", told, found }));
            }
            check_content(layer, &unpacked.content).map_err(refused)?;
            let report = unpacked.report;
            let about = About { diff_id: unpacked.content, bytes: report.bytes, entries: report.entries };
            let text = serde_json::to_vec(&about).unwrap_or_default();
            let file = unfinished.join(ABOUT);
            fs::write(&file, text).map_err(|error| ImageError::io(&file, "write", error))?;
            // What bears its final name must be whole, even after a crash of the host.
            rustix::fs::syncfs(&root).map_err(|error| ImageError::io(&tree, "sync", error))?;
            // What a damaged store may have left there.
            remove_tree(place);
            fs::rename(&unfinished, place)
                .map_err(|error| ImageError::io(place, "move into place", error))?;
            Ok(about)
        })();
        filled.inspect_err(|_| remove_tree(&unfinished))
    }

    pub(super) fn write_record(&self, name: &str, record: &Record) -> Result<(), ImageError> {
        let file = self.dir.join(format!("{name}.json"));
        let new = self.dir.join(format!("{UNFINISHED}{name}.json"));
        let text = serde_json::to_vec(record).unwrap_or_default();
        fs::write(&new, text)
            .and_then(|()| fs::rename(&new, &file))
            .map_err(|error| ImageError::io(&file, "write", error))
    }

    pub(super) fn record(&self, name: &str) -> Option<Record> {
        let text = fs::read(self.dir.join(format!("{name}.json"))).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// The layers of an image in the store; `None` if it is not, or not all of it is, there.
    pub(super) fn recorded(&self, name: &str) -> Option<Layers> {
        // Held before it is looked for: from then on nobody removes it.
        let image = self.hold(name);
        let record = self.record(name)?;
        let lease = image.and(record.layers.iter().map(|layer| self.hold(layer)));
        let mut fds = Vec::new();
        for layer in &record.layers {
            let tree = open_dir(&self.dir.join(layer).join(TREE)).ok()?;
            if is_opaque(&tree) {
                // overlayfs does not look for the mark on a layer's root.
                fds.clear();
            }
            fds.push(tree);
        }
        (!fds.is_empty()).then(|| Layers { fds, id: name.to_owned(), config: record.config, lease })
    }
}

fn check_content(layer: &LayerBlob, found: &Digest) -> Result<(), OciError> {
    if *found == layer.diff_id {
        return Ok(());
    }
    let (told, found) = (layer.diff_id.clone(), found.clone());
    Err(OciError::Digest { what: "layer (without its compression)", told, found })
}

fn is_opaque(tree: impl std::os::fd::AsFd) -> bool {
    let mut value = [0; 4];
    matches!(rustix::fs::fgetxattr(tree, OPAQUE, &mut value), Ok(1)) && value[0] == b'y'
}

/// The root of a layer, as accessible as a root is, whatever the umask.
pub(super) fn make_root(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::create_dir(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}
