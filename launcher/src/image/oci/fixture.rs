//! Writes OCI image layouts for tests, byte by byte, without the code that reads them.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// How a layer is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pack {
    Plain,
    Gzip,
    Zstd,
}

/// A layer that is in the layout.
#[derive(Clone, Debug)]
pub(crate) struct Blob {
    pub(crate) descriptor: Value,
    pub(crate) diff_id: String,
}

/// A layout that is being written.
pub(crate) struct Layout {
    pub(crate) path: PathBuf,
    manifests: Vec<Value>,
}

impl Layout {
    pub(crate) fn new(path: &Path) -> Layout {
        fs::create_dir_all(path.join("blobs/sha256")).unwrap();
        fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Layout { path: path.to_owned(), manifests: Vec::new() }
    }

    /// Puts bytes into the layout; their descriptor.
    pub(crate) fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let hex = hex(bytes);
        fs::write(self.path.join("blobs/sha256").join(&hex), bytes).unwrap();
        json!({ "mediaType": media_type, "digest": format!("sha256:{hex}"), "size": bytes.len() })
    }

    pub(crate) fn layer(&self, archive: &[u8], pack: Pack) -> Blob {
        let (kind, bytes) = match pack {
            Pack::Plain => ("", archive.to_vec()),
            Pack::Gzip => ("+gzip", gzip(archive)),
            Pack::Zstd => ("+zstd", zstd::encode_all(archive, 1).unwrap()),
        };
        let media_type = format!("application/vnd.oci.image.layer.v1.tar{kind}");
        Blob { descriptor: self.blob(&media_type, &bytes), diff_id: format!("sha256:{}", hex(archive)) }
    }

    /// A manifest of these layers for this machine; `run` is the configuration's `config`.
    pub(crate) fn manifest(&self, layers: &[Blob], run: Value) -> Value {
        self.manifest_for(architecture(), layers, run)
    }

    pub(crate) fn manifest_for(&self, architecture: &str, layers: &[Blob], run: Value) -> Value {
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "config": run,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config =
            self.blob("application/vnd.oci.image.config.v1+json", &serde_json::to_vec(&config).unwrap());
        let layers: Vec<&Value> = layers.iter().map(|layer| &layer.descriptor).collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers,
        });
        self.blob("application/vnd.oci.image.manifest.v1+json", &serde_json::to_vec(&manifest).unwrap())
    }

    /// Lists a manifest (or index) in the layout's index, with a name if it has one.
    pub(crate) fn list(&mut self, mut descriptor: Value, name: &str) -> &mut Layout {
        if !name.is_empty() {
            descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        }
        self.manifests.push(descriptor);
        self.write_index(&index(&self.manifests));
        self
    }

    /// A single image without a name.
    pub(crate) fn image(&mut self, layers: &[Blob], run: Value) -> String {
        let manifest = self.manifest(layers, run);
        let digest = manifest["digest"].as_str().unwrap().to_owned();
        self.manifests.clear();
        self.list(manifest, "");
        digest
    }

    pub(crate) fn write_index(&self, index: &Value) {
        let new = self.path.join("index.new");
        fs::write(&new, serde_json::to_vec(index).unwrap()).unwrap();
        fs::rename(new, self.path.join("index.json")).unwrap();
    }

    /// The whole layout as an archive.
    pub(crate) fn archive(&self, path: &Path) {
        let mut builder = tar::Builder::new(fs::File::create(path).unwrap());
        builder.append_dir_all("", &self.path).unwrap();
        builder.finish().unwrap();
    }
}

pub(crate) fn index(manifests: &[Value]) -> Value {
    json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests })
}

/// The name of this kind of machine.
pub(crate) fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

/// An archive of files with their contents; a name that ends in `/` is a folder.
pub(crate) fn tar_of(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in entries {
        let mut header = tar::Header::new_gnu();
        let folder = name.ends_with('/');
        header.set_entry_type(if folder { tar::EntryType::Directory } else { tar::EntryType::Regular });
        header.set_mode(0o755);
        header.set_mtime(1_000_000);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
