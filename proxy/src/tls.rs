//! Mutual TLS between the proxies of a cluster: each shows a certificate of the cluster's own authority (`fastcontainer ca`),
//! and whoever connects sees to it that the other end is the host that is meant.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use pingora::{
    listeners::tls::TlsSettings,
    protocols::tls::CaType,
    upstreams::peer::HttpPeer,
    utils::tls::{CertKey, WrappedX509, parse_x509},
};
use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier as _},
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// The authority's certificate.
pub const CA: &str = "ca.pem";
/// This host's certificate.
pub const CERTIFICATE: &str = "node.pem";
/// Its key.
pub const KEY: &str = "node.key";

/// What a proxy shows to others, and what it believes of them.
pub struct ClusterTls {
    /// As Pingora wants it for connecting.
    ca: Arc<CaType>,
    own: Arc<CertKey>,
    /// As rustls wants it for listening.
    verifier: Arc<dyn ClientCertVerifier>,
    resolver: Arc<SingleCertAndKey>,
}

/// Why a folder gives no certificates.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or is something else.
    #[error("{path}: {reason}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Others would not believe the certificate.
    #[error("{path} is of no use here: {reason}; `fastcontainer ca issue` makes another one")]
    Useless {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// The name by which a host's certificate knows it.
#[must_use]
pub fn name_of(node: &str) -> String {
    format!("{node}.node.fastcontainer")
}

impl ClusterTls {
    /// Reads [`CA`], [`CERTIFICATE`] and [`KEY`] from a folder, and sees whether others will believe them. `node`: this host.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn read(folder: &Path, node: Option<&str>) -> Result<Self, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let path = folder.join(CERTIFICATE);
        let useless =
            |reason: &dyn fmt::Display| TlsError::Useless { path: path.clone(), reason: reason.to_string() };
        let (authorities, chain) = (certificates(&folder.join(CA))?, certificates(&path)?);
        let key = folder.join(KEY);
        let key = PrivateKeyDer::from_pem_file(&key)
            .map_err(|error| TlsError::File { path: key.clone(), reason: error.to_string() })?;
        let mut roots = RootCertStore::empty();
        for authority in &authorities {
            roots
                .add(authority.clone())
                .map_err(|error| TlsError::File { path: folder.join(CA), reason: error.to_string() })?;
        }
        let roots = Arc::new(roots);
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| useless(&error))?;
        let (leaf, rest) = chain.split_first().ok_or_else(|| useless(&"it holds no certificate"))?;
        verifier.verify_client_cert(leaf, rest, UnixTime::now()).map_err(|error| useless(&error))?;
        if let Some(node) = node {
            let name = ServerName::try_from(name_of(node)).map_err(|error| useless(&error))?;
            WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider))
                .build()
                .map_err(|error| useless(&error))?
                .verify_server_cert(leaf, rest, &name, &[], UnixTime::now())
                .map_err(|error| useless(&error))?;
        }
        // Pingora panics on what its own parser does not take; the check above need not have looked at all of them.
        for one in authorities.iter().chain(&chain) {
            X509Certificate::from_der(one).map_err(|error| useless(&error))?;
        }
        let ca = authorities.iter().map(|one| WrappedX509::new(one.to_vec(), parse_x509)).collect();
        let own = CertKey::new(chain.iter().map(|one| one.to_vec()).collect(), key.secret_der().to_vec());
        let certified = CertifiedKey::from_der(chain, key, &provider).map_err(|error| useless(&error))?;
        Ok(Self { ca, own: Arc::new(own), verifier, resolver: Arc::new(SingleCertAndKey::from(certified)) })
    }

    /// For a listener that takes nobody but those who have a certificate.
    ///
    /// # Errors
    /// None in practice.
    pub fn settings(&self) -> pingora::Result<TlsSettings> {
        let mut settings = TlsSettings::intermediate("", "")?;
        settings.set_cert_resolver(Arc::<SingleCertAndKey>::clone(&self.resolver));
        settings.set_client_cert_verifier(Arc::clone(&self.verifier));
        Ok(settings)
    }

    /// For connecting to a host's dispatcher.
    pub(crate) fn prepare(&self, peer: &mut HttpPeer) {
        peer.options.ca = Some(Arc::clone(&self.ca));
        peer.client_cert_key = Some(Arc::clone(&self.own));
    }
}

impl fmt::Debug for ClusterTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterTls(…)")
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let fail = |reason: String| TlsError::File { path: path.to_owned(), reason };
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| fail(error.to_string()))?;
    if certificates.is_empty() { Err(fail("it holds no certificate".to_owned())) } else { Ok(certificates) }
}
