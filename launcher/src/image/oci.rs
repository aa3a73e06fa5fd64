//! Images in the form of the Open Container Initiative: index → manifest → configuration and layers
//! (OCI image specification 1.1). Every digest is verified before anything is believed.

mod config;
#[cfg(test)]
mod fixture;
mod layout;
mod pick;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

use oci_spec::image::{Descriptor, ImageConfiguration, ImageManifest, MediaType};

use super::digest::{Digest, DigestError};
use super::unpack::Refused;
pub use config::ImageConfig;
pub(crate) use layout::Layout;

/// An index, manifest or configuration is no larger, bytes; registries allow 4 MiB.
pub(crate) const MAX_JSON: u64 = 4 << 20;
/// Layers of one image; Docker makes at most 127.
const MAX_LAYERS: usize = 128;

/// Why an OCI image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// Not a layout at all.
    #[error("it has no index.json and so is no OCI image layout (`skopeo copy … oci:PATH` makes one)")]
    NoIndex,
    /// An archive of a layout that is compressed, or no archive.
    #[error(
        "it cannot be read as a plain tar archive of an OCI image layout: {0} (a compressed one must be unpacked first)"
    )]
    Archive(io::Error),
    /// The archive has too many entries to be an image layout.
    #[error("it has more than {0} entries and so is no archive of an OCI image layout")]
    Entries(usize),
    /// A JSON document that is too large, wrong, or cut off.
    #[error("its {what} cannot be understood: {why}")]
    Json {
        /// Which document.
        what: &'static str,
        /// The parser's words.
        why: String,
    },
    /// A digest that is none.
    #[error(transparent)]
    NoDigest(#[from] DigestError),
    /// Something that it names is not there.
    #[error("its {what} {digest} is missing")]
    Missing {
        /// What is missing.
        what: &'static str,
        /// Its digest.
        digest: Digest,
    },
    /// Something has not the size that is told of it.
    #[error("its {what} {digest} has {found} bytes instead of {told}")]
    Size {
        /// What it is.
        what: &'static str,
        /// Its digest.
        digest: Digest,
        /// Bytes that it should have.
        told: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// Something is not what its digest says.
    #[error("its {what} {told} is damaged or forged: its digest is {found}")]
    Digest {
        /// What it is.
        what: &'static str,
        /// The digest under which it is known.
        told: Digest,
        /// The digest that it has.
        found: Digest,
    },
    /// There is no image of that name in it.
    #[error("it holds no image {wanted:?}; it holds {}", list(held))]
    NoSuchImage {
        /// The tag or digest.
        wanted: String,
        /// What there is instead.
        held: Vec<String>,
    },
    /// There are several images for this machine.
    #[error("it holds several images: name one, as in oci:PATH:TAG; it holds {}", list(held))]
    Several {
        /// Their names.
        held: Vec<String>,
    },
    /// No image for this kind of machine.
    #[error("it holds no image for {wanted}, only for {}", list(held))]
    Platform {
        /// What this machine is.
        wanted: String,
        /// What there is instead.
        held: Vec<String>,
    },
    /// Something of a kind that is no part of an image.
    #[error("its {what} is of the kind {media_type:?}, which is not understood")]
    Kind {
        /// What is of that kind.
        what: &'static str,
        /// The kind.
        media_type: String,
    },
    /// Indexes within indexes.
    #[error("its indexes lie too deep within one another")]
    Deep,
    /// No layer, or too many.
    #[error("it has {0} layers; from 1 to {MAX_LAYERS} are possible")]
    Layers(usize),
    /// Manifest and configuration do not agree.
    #[error("its manifest names {layers} layers, its configuration {diff_ids}")]
    Disagree {
        /// In the manifest.
        layers: usize,
        /// In the configuration.
        diff_ids: usize,
    },
    /// A layer that cannot be, or will not be, unpacked.
    #[error("its layer {digest}: {refused}")]
    Layer {
        /// Which layer.
        digest: Digest,
        /// Why.
        refused: Refused,
    },
    /// Something in it that the launcher cannot follow.
    #[error("its configuration: {0}")]
    Config(String),
    /// The system's error.
    #[error("{what}: {error}")]
    Io {
        /// Doing what.
        what: &'static str,
        /// The system's error.
        error: io::Error,
    },
}

/// What is to be had of an image: its layers, lowest first, and how it wants to be run.
#[derive(Debug)]
pub(crate) struct Image {
    /// Of the manifest.
    pub(crate) digest: Digest,
    pub(crate) layers: Vec<LayerBlob>,
    pub(crate) config: ImageConfig,
}

/// A layer as it is kept in the layout.
#[derive(Clone, Debug)]
pub(crate) struct LayerBlob {
    /// Of the bytes as they are kept.
    pub(crate) digest: Digest,
    /// Bytes.
    pub(crate) size: u64,
    /// Of the archive without its compression.
    pub(crate) diff_id: Digest,
}

/// `oci:PATH[:TAG|@sha256:DIGEST]`, without the `oci:`.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Reference {
    pub(super) path: PathBuf,
    /// A tag, or a digest with its `sha256:`; without one the layout must hold a single image for this machine.
    pub(super) wanted: Option<String>,
}

impl Reference {
    /// Only the path's last part is looked at: folders may have colons in their names.
    pub(super) fn parse(text: &str) -> Reference {
        let last = text.rfind('/').map_or(0, |slash| slash + 1);
        let cut = text[last..].find("@sha256:").or_else(|| text[last..].find(':')).map(|at| last + at);
        match cut {
            Some(at) if at > last => {
                Reference { path: text[..at].into(), wanted: Some(text[at + 1..].to_owned()) }
            }
            _ => Reference { path: text.into(), wanted: None },
        }
    }
}

/// Finds the image in a layout that is wanted on this machine.
pub(crate) fn find(layout: &Layout, wanted: Option<&str>) -> Result<Image, OciError> {
    let manifest = pick::manifest(layout, wanted)?;
    let (digest, manifest) = layout.json::<ImageManifest>("manifest", &manifest)?;
    let (_, config) = layout.json::<ImageConfiguration>("configuration", manifest.config())?;
    pick::check_platform(config.architecture(), config.os())?;
    let layers = layers(&manifest, &config)?;
    Ok(Image { digest, layers, config: ImageConfig::of(&config)? })
}

fn layers(manifest: &ImageManifest, config: &ImageConfiguration) -> Result<Vec<LayerBlob>, OciError> {
    let (layers, diff_ids) = (manifest.layers(), config.rootfs().diff_ids());
    if layers.is_empty() || layers.len() > MAX_LAYERS {
        return Err(OciError::Layers(layers.len()));
    }
    if layers.len() != diff_ids.len() {
        return Err(OciError::Disagree { layers: layers.len(), diff_ids: diff_ids.len() });
    }
    layers
        .iter()
        .zip(diff_ids)
        .map(|(layer, diff_id)| {
            check_layer_kind(layer)?;
            let digest = digest_of(layer)?;
            Ok(LayerBlob { digest, size: layer.size(), diff_id: diff_id.parse()? })
        })
        .collect()
}

/// Which compression it is, its first bytes tell; that it is an archive at all, only its kind.
fn check_layer_kind(layer: &Descriptor) -> Result<(), OciError> {
    match layer.media_type() {
        MediaType::ImageLayer
        | MediaType::ImageLayerGzip
        | MediaType::ImageLayerZstd
        | MediaType::ImageLayerNonDistributable
        | MediaType::ImageLayerNonDistributableGzip
        | MediaType::ImageLayerNonDistributableZstd => Ok(()),
        MediaType::Other(other) if DOCKER_LAYERS.contains(&other.as_str()) => Ok(()),
        other => Err(OciError::Kind { what: "layer", media_type: other.to_string() }),
    }
}

const DOCKER_LAYERS: [&str; 5] = [
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];

fn digest_of(descriptor: &Descriptor) -> Result<Digest, OciError> {
    Ok(descriptor.digest().to_string().parse()?)
}

fn list(held: &[String]) -> String {
    const SHOWN: usize = 10;
    if held.is_empty() {
        return "none".to_owned();
    }
    let more = if held.len() > SHOWN { format!(" and {} more", held.len() - SHOWN) } else { String::new() };
    format!("{}{more}", held[..held.len().min(SHOWN)].join(", "))
}

/// For errors that name the layout's own path already.
fn io_error(what: &'static str, error: impl Into<io::Error>) -> OciError {
    OciError::Io { what, error: error.into() }
}

/// The path of a blob in a layout.
fn blob_path(digest: &Digest) -> PathBuf {
    Path::new("blobs/sha256").join(digest.hex())
}
