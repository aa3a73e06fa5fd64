//! The cluster's own certificate authority, for mutual TLS between proxies: two files, and one command for each host.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use jiff::{Timestamp, ToSpan as _, tz::TimeZone};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

use crate::{
    cli::{Ca, CaInit, CaIssue},
    failure::Failure,
    output::Output,
};

/// The authority's certificate, which every host gets.
const CERTIFICATE: &str = "ca.pem";
/// The authority's key, which no host needs.
const KEY: &str = "ca.key";
/// How long the authority's certificate is good, days.
const AUTHORITY_DAYS: i64 = 3_650;

/// Why a certificate could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaError {
    /// There is an authority already.
    #[error(
        "{0} exists: another authority in its place would make every certificate of this one worthless; choose another --dir"
    )]
    Exists(PathBuf),
    /// The folder holds no authority.
    #[error("{path}: {source}; is it the folder of `fastcontainer ca init`?")]
    NoAuthority { path: PathBuf, source: io::Error },
    /// A file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    /// No such name can be in a certificate.
    #[error("no certificate can name a host \"{0}\": take \"_\" out of its name")]
    Name(String),
    /// The key is none, or the like.
    #[error("{path}: {source}")]
    Make { path: PathBuf, source: rcgen::Error },
}

/// `fastcontainer ca …`
pub(crate) fn run(command: &Ca, out: &mut Output) -> Result<(), Failure> {
    let said = match command {
        Ca::Init(options) => init(options),
        Ca::Issue(options) => issue(options),
    };
    let said = said.map_err(|error| Failure::failed(error.to_string()))?;
    out.line(&said)
}

fn init(options: &CaInit) -> Result<String, CaError> {
    let (certificate, key) = (options.dir.join(CERTIFICATE), options.dir.join(KEY));
    if let Some(there) = [&certificate, &key].into_iter().find(|path| path.exists()) {
        return Err(CaError::Exists(there.clone()));
    }
    let fail = |source| CaError::Make { path: certificate.clone(), source };
    let pair = KeyPair::generate().map_err(fail)?;
    let made = authority().self_signed(&pair).map_err(fail)?;
    make_folder(&options.dir)?;
    write(&key, &pair.serialize_pem(), 0o600)?;
    write(&certificate, &made.pem(), 0o644)?;
    Ok(format!(
        "{} and {} are written. The key makes anybody a host of this cluster: keep it where no host is.",
        certificate.display(),
        key.display()
    ))
}

fn issue(options: &CaIssue) -> Result<String, CaError> {
    let (certificate, key) = (options.dir.join(CERTIFICATE), options.dir.join(KEY));
    let read = |path: &Path| {
        fs::read_to_string(path).map_err(|source| CaError::NoAuthority { path: path.to_owned(), source })
    };
    let (authority_pem, authority_key) = (read(&certificate)?, read(&key)?);
    if options.node.contains('_') {
        return Err(CaError::Name(options.node.clone()));
    }
    let fail = |source| CaError::Make { path: key.clone(), source };
    let issuer = Issuer::new(authority(), KeyPair::from_pem(&authority_key).map_err(fail)?);
    let pair = KeyPair::generate().map_err(fail)?;
    let name = format!("{}.node.fastcontainer", options.node);
    let mut params = CertificateParams::new(vec![name]).map_err(|_| CaError::Name(options.node.clone()))?;
    params.distinguished_name.push(DnType::CommonName, options.node.as_str());
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let until = valid(&mut params, i64::from(options.days));
    let made = params.signed_by(&pair, &issuer).map_err(fail)?;
    make_folder(&options.out)?;
    write(&options.out.join("node.key"), &pair.serialize_pem(), 0o600)?;
    write(&options.out.join("node.pem"), &made.pem(), 0o644)?;
    write(&options.out.join("ca.pem"), &authority_pem, 0o644)?;
    Ok(format!(
        "{} holds what {} needs, good until {until}: copy it there, owned by root, and give it as --cluster-tls.",
        options.out.display(),
        options.node
    ))
}

/// The authority as its certificate describes it.
fn authority() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "FastContainer cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid(&mut params, AUTHORITY_DAYS);
    params
}

/// From yesterday, for clocks differ, and for so many days; returns the last one.
fn valid(params: &mut CertificateParams, days: i64) -> String {
    let today = Timestamp::now().to_zoned_datetime(TimeZone::UTC).date();
    let day = |offset: i64| today.saturating_add(offset.days());
    let ymd = |date: jiff::civil::Date| {
        let part = |number: i8| number.unsigned_abs();
        date_time_ymd(date.year().into(), part(date.month()), part(date.day()))
    };
    (params.not_before, params.not_after) = (ymd(day(-1)), ymd(day(days)));
    day(days).to_string()
}

fn make_folder(path: &Path) -> Result<(), CaError> {
    fs::create_dir_all(path).map_err(|source| CaError::Write { path: path.to_owned(), source })
}

/// Replaces the file in one step.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), CaError> {
    let hidden = path.with_extension("new");
    let write = || {
        // Another one's mode would stay.
        match fs::remove_file(&hidden) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&hidden)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&hidden, path)
    };
    write().map_err(|source| CaError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn an_authority_issues_certificates_and_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let (dir, out) = (folder.path().join("ca"), folder.path().join("web1"));
        let issue_to =
            |node: &str| CaIssue { node: node.into(), dir: dir.clone(), out: out.clone(), days: 30 };
        assert!(matches!(issue(&issue_to("web1")), Err(CaError::NoAuthority { .. })));
        init(&CaInit { dir: dir.clone() }).unwrap();
        assert!(matches!(init(&CaInit { dir: dir.clone() }), Err(CaError::Exists(_))));
        assert!(matches!(issue(&issue_to("a_b")), Err(CaError::Name(_))));
        let said = issue(&issue_to("web1")).unwrap();
        assert!(said.contains("--cluster-tls"), "{said}");
        // Once more: that is how one is renewed.
        issue(&issue_to("web1")).unwrap();
        for key in [dir.join("ca.key"), out.join("node.key")] {
            assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600, "{}", key.display());
        }
        assert_eq!(fs::read(dir.join("ca.pem")).unwrap(), fs::read(out.join("ca.pem")).unwrap());
        assert!(!out.join("ca.key").exists());
    }
}
