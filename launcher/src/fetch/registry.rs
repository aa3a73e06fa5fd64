//! Pulling from a registry into a layout.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::str::FromStr as _;
use std::task::{Context, Poll};
use std::time::Duration;

use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::manifest::{
    IMAGE_MANIFEST_LIST_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE,
    OCI_IMAGE_MEDIA_TYPE, OciDescriptor,
};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use serde_json::json;
use tokio::io::AsyncWrite;

use super::{Order, Word, tell};
use crate::image::oci::{self, Image, Layout, MAX_JSON, OciError};
use crate::image::{Digest, DigestError};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Without a single byte.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Documents before the layers: index, manifest, configuration, and some more indexes.
const MAX_DOCUMENTS: usize = 8;
/// One word of progress for so many bytes.
const PROGRESS_STEP: u64 = 1 << 20;
const MANIFESTS: [&str; 4] = [
    OCI_IMAGE_INDEX_MEDIA_TYPE,
    IMAGE_MANIFEST_LIST_MEDIA_TYPE,
    OCI_IMAGE_MEDIA_TYPE,
    IMAGE_MANIFEST_MEDIA_TYPE,
];

/// Why an image cannot be pulled.
#[derive(Debug, thiserror::Error)]
pub(super) enum PullError {
    #[error("{reference:?} is no name of an image: {why}")]
    Reference { reference: String, why: String },
    #[error("the registry {registry} refuses the image: {why}; {mend}")]
    Refused { registry: String, why: String, mend: &'static str },
    #[error("the registry {registry} has no image {image}")]
    NotFound { registry: String, image: String },
    #[error("the registry {registry}: {error}")]
    Registry { registry: String, error: String },
    #[error("it is larger than {most} bytes, of which {needed} would be needed")]
    TooLarge { needed: u64, most: u64 },
    #[error(transparent)]
    Image(#[from] OciError),
    #[error(transparent)]
    Digest(#[from] DigestError),
    #[error("{what}: {error}")]
    Io { what: &'static str, error: io::Error },
}

struct Pull<'a> {
    client: Client,
    reference: Reference,
    auth: RegistryAuth,
    order: &'a Order,
}

/// Pulls the image for this machine into the working directory; the digest that its tag stands for.
pub(super) async fn fetch(
    order: &Order,
    reference: &str,
    credentials: Option<&(String, String)>,
    plain_http: bool,
    authorities: &str,
) -> Result<String, PullError> {
    let bad = |why: String| PullError::Reference { reference: reference.to_owned(), why };
    let parsed = Reference::from_str(reference).map_err(|error| bad(error.to_string()))?;
    // Fails only when there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let registry = parsed.resolve_registry().to_owned();
    let config = ClientConfig {
        protocol: if plain_http {
            ClientProtocol::HttpsExcept(vec![registry.clone()])
        } else {
            ClientProtocol::Https
        },
        connect_timeout: Some(CONNECT_TIMEOUT),
        read_timeout: Some(READ_TIMEOUT),
        extra_root_certificates: certificates(authorities),
        user_agent: concat!("fastcontainer/", env!("CARGO_PKG_VERSION")),
        ..ClientConfig::default()
    };
    let client = Client::try_from(config)
        .map_err(|error| PullError::Registry { registry, error: error.to_string() })?;
    let auth = match credentials {
        Some((user, password)) => RegistryAuth::Basic(user.clone(), password.clone()),
        None => RegistryAuth::Anonymous,
    };
    Pull { client, reference: parsed, auth, order }.run().await
}

/// Each certificate of a PEM text.
fn certificates(pem: &str) -> Vec<Certificate> {
    const END: &str = "-----END CERTIFICATE-----";
    let whole = pem.split_inclusive(END).filter(|part| part.ends_with(END));
    whole.map(|part| Certificate { encoding: CertificateEncoding::Pem, data: part.into() }).collect()
}

impl Pull<'_> {
    async fn run(&self) -> Result<String, PullError> {
        fs::create_dir_all("blobs/sha256").map_err(|error| io_error("make a folder", error))?;
        let top = self.manifest(&self.reference).await?;
        let layout = Layout::of_folder(Path::new(".")).map_err(|error| io_error("open the layout", error))?;
        let image = self.complete(&layout).await?;
        let mut layers = image.layers;
        layers.retain(|layer| !self.order.have.contains(&layer.digest));
        let of = layers.iter().fold(0_u64, |sum, layer| sum.saturating_add(layer.size));
        if of > self.order.bytes {
            return Err(PullError::TooLarge { needed: of, most: self.order.bytes });
        }
        tell(&Word::Progress { bytes: 0, of });
        let mut bytes = 0;
        for layer in layers {
            self.blob(&layer.digest, layer.size, Some((bytes, of))).await?;
            bytes += layer.size;
        }
        Ok(top.to_string())
    }

    /// Fetches document after document until all are there that say what the image is.
    async fn complete(&self, layout: &Layout) -> Result<Image, PullError> {
        for _ in 0..MAX_DOCUMENTS {
            match oci::find(layout, None) {
                Err(OciError::Missing { what: "configuration", digest }) => {
                    self.blob(&digest, MAX_JSON, None).await?;
                }
                Err(OciError::Missing { digest, .. }) => {
                    self.manifest(&self.reference.clone_with_digest(digest.to_string())).await?;
                }
                other => return Ok(other?),
            }
        }
        Err(OciError::Deep.into())
    }

    /// Fetches a manifest or index; the first becomes the layout's only image.
    async fn manifest(&self, reference: &Reference) -> Result<Digest, PullError> {
        let pulled = self.client.pull_manifest_raw(reference, &self.auth, &MANIFESTS).await;
        let (bytes, _) = pulled.map_err(|error| self.failure(reference, &error))?;
        let digest = Digest::of(&bytes);
        if reference.digest().is_some_and(|told| told != digest.to_string()) {
            let told = reference.digest().unwrap_or_default().parse()?;
            return Err(OciError::Digest { what: "manifest", told, found: digest }.into());
        }
        write(&blob_path(&digest), &bytes)?;
        if !Path::new("index.json").exists() {
            let media_type = media_type(&bytes);
            let index = json!({
                "schemaVersion": 2,
                "manifests": [{ "mediaType": media_type, "digest": digest.to_string(), "size": bytes.len() }],
            });
            write(Path::new("index.json"), index.to_string().as_bytes())?;
        }
        Ok(digest)
    }

    async fn blob(&self, digest: &Digest, most: u64, progress: Option<(u64, u64)>) -> Result<(), PullError> {
        let descriptor = OciDescriptor { digest: digest.to_string(), ..OciDescriptor::default() };
        let file = tokio::fs::File::create(blob_path(digest)).await;
        let file = file.map_err(|error| io_error("make a blob's file", error))?;
        let out = Counted { file, written: 0, most, progress, told: 0 };
        let pulled = self.client.pull_blob(&self.reference, &descriptor, out).await;
        pulled.map_err(|error| self.failure(&self.reference, &error))
    }

    fn failure(&self, reference: &Reference, error: &OciDistributionError) -> PullError {
        let registry = reference.resolve_registry().to_owned();
        let mend = match self.auth {
            RegistryAuth::Anonymous => "name it with user and password in the file of --registry-auth",
            _ => "are user and password in the file of --registry-auth right?",
        };
        let refused =
            |why: &str| PullError::Refused { registry: registry.clone(), why: why.to_owned(), mend };
        let not_found =
            || PullError::NotFound { registry: registry.clone(), image: reference.whole().to_owned() };
        match error {
            OciDistributionError::UnauthorizedError { .. } => refused("not authorized"),
            OciDistributionError::AuthenticationFailure(_) => refused("authentication failed"),
            OciDistributionError::ImageManifestNotFoundError(_) => not_found(),
            OciDistributionError::ServerError { code: 404, .. } => not_found(),
            OciDistributionError::RegistryError { envelope, .. }
                if envelope.errors.iter().any(|e| {
                    matches!(
                        e.code,
                        OciErrorCode::ManifestUnknown | OciErrorCode::NameUnknown | OciErrorCode::NotFound
                    )
                }) =>
            {
                not_found()
            }
            OciDistributionError::RegistryError { envelope, .. }
                if envelope
                    .errors
                    .iter()
                    .any(|e| matches!(e.code, OciErrorCode::Unauthorized | OciErrorCode::Denied)) =>
            {
                refused("not authorized")
            }
            other => PullError::Registry { registry, error: chain(other) },
        }
    }
}

/// An error with its causes: the outermost of `reqwest` only says that something failed.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

/// As the document says itself, else by its form (OCI allows that to be left out).
fn media_type(bytes: &[u8]) -> String {
    let document: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
    let by_form =
        if document.get("manifests").is_some() { OCI_IMAGE_INDEX_MEDIA_TYPE } else { OCI_IMAGE_MEDIA_TYPE };
    document["mediaType"].as_str().unwrap_or(by_form).to_owned()
}

fn blob_path(digest: &Digest) -> PathBuf {
    Path::new("blobs/sha256").join(digest.hex())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), PullError> {
    fs::write(path, bytes).map_err(|error| io_error("write a blob", error))
}

fn io_error(what: &'static str, error: io::Error) -> PullError {
    PullError::Io { what, error }
}

/// Writes no more than was announced, and tells how it gets on.
struct Counted {
    file: tokio::fs::File,
    written: u64,
    most: u64,
    /// Bytes of the layers before this one, and of all.
    progress: Option<(u64, u64)>,
    told: u64,
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.written.saturating_add(bytes.len() as u64) > self.most {
            return Poll::Ready(Err(io::Error::other("the registry sends more than it announced")));
        }
        let written = std::task::ready!(Pin::new(&mut self.file).poll_write(context, bytes))?;
        self.written += written as u64;
        if let Some((before, of)) = self.progress
            && self.written - self.told >= PROGRESS_STEP
        {
            self.told = self.written;
            tell(&Word::Progress { bytes: before + self.written, of });
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.file).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.file).poll_shutdown(context)
    }
}
