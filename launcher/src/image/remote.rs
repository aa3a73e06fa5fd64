//! Images from registries and Git repositories: named, fetched by a process without privileges ([`crate::fetch`]), and
//! taken over from the layout that it leaves.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};

use super::Options;
use crate::fetch::{Order, Source, Word};

/// Longest time for one image.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// Longest time without a word from the fetcher: it gives up by itself much earlier.
const SILENCE: Duration = Duration::from_secs(300);
/// Longest line of the fetcher, bytes.
const MAX_WORD: u64 = 64 << 10;
/// Largest file of credentials, bytes.
const MAX_AUTH: u64 = 1 << 20;
/// Largest file of certificates, bytes; it is part of an order.
const MAX_AUTHORITIES: u64 = 512 << 10;

/// Why an image cannot be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The fetcher's own words.
    #[error("{0}")]
    Failed(String),
    /// The fetcher ended without saying how it went.
    #[error("the fetcher ended without a word ({0})")]
    Silent(String),
    /// It took too long.
    #[error("it took longer than {0:?}")]
    Timeout(Duration),
    /// The file of credentials cannot be used.
    #[error("the credentials in {path}: {why}")]
    Credentials {
        /// The file.
        path: PathBuf,
        /// What is wrong with it; nothing of its content.
        why: String,
    },
    /// The file of certificates cannot be used.
    #[error("the certificates in {path}: {why}")]
    Authorities {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The name of a remote image makes no sense.
    #[error("{0}")]
    Name(&'static str),
    /// The system's error.
    #[error("{what}: {error}")]
    Io {
        /// Doing what.
        what: &'static str,
        /// The system's error.
        error: io::Error,
    },
}

/// A folder that is removed at the end, whatever happens.
#[derive(Debug)]
pub(super) struct Scratch(pub(super) PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        super::remove_tree(&self.0);
    }
}

/// Whether an image of that name is fetched from elsewhere.
pub(super) fn is_remote(image: &str) -> bool {
    image.starts_with("docker://") || image.starts_with("git+")
}

/// What the fetcher is asked for an image of that name.
pub(super) fn source(image: &str, options: &Options) -> Result<Source, FetchError> {
    if let Some(reference) = image.strip_prefix("docker://") {
        let (host, rest) = reference.split_once('/').unwrap_or((reference, ""));
        let host = if rest.is_empty() || !is_host(host) { "docker.io" } else { host };
        let plain_http = is_loopback(host) || options.insecure_registries.iter().any(|other| other == host);
        let credentials = credentials(host, options)?;
        let (reference, authorities) = (reference.to_owned(), authorities(options)?);
        return Ok(Source::Registry { reference, credentials, plain_http, authorities });
    }
    let text = image.strip_prefix("git+").ok_or(FetchError::Name("it is no name of a remote image"))?;
    let (url, fragment) = text.split_once('#').unwrap_or((text, ""));
    let (revision, rest) = fragment.split_once(':').unwrap_or((fragment, ""));
    let (folder, into) = rest.split_once(':').unwrap_or((rest, ""));
    if revision.starts_with('-') || revision.contains(char::is_whitespace) {
        return Err(FetchError::Name("its revision is no branch, tag or commit"));
    }
    if [folder, into].iter().any(|path| path.split('/').any(|part| part == ".." || part == ".")) {
        return Err(FetchError::Name("its folders must not contain \".\" or \"..\""));
    }
    Ok(Source::Git {
        url: url.to_owned(),
        revision: revision.to_owned(),
        folder: folder.trim_matches('/').to_owned(),
        into: into.trim_matches('/').to_owned(),
    })
}

/// Docker's rule: the first part is a host if it looks like one, else part of a name on Docker's own registry.
fn is_host(text: &str) -> bool {
    text.contains(['.', ':']) || text == "localhost"
}

fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The file of `docker login`: user and password in base64 for each registry.
#[derive(Deserialize)]
struct AuthFile {
    #[serde(default)]
    auths: std::collections::HashMap<String, AuthEntry>,
}

#[derive(Deserialize)]
struct AuthEntry {
    #[serde(default)]
    auth: String,
}

fn credentials(host: &str, options: &Options) -> Result<Option<(String, String)>, FetchError> {
    let Some(path) = &options.registry_auth else { return Ok(None) };
    let wrong = |why: String| FetchError::Credentials { path: path.clone(), why };
    let meta = fs::metadata(path).map_err(|error| wrong(error.to_string()))?;
    if !meta.is_file() || meta.len() > MAX_AUTH {
        return Err(wrong("this is no file of credentials".to_owned()));
    }
    let text = fs::read(path).map_err(|error| wrong(error.to_string()))?;
    // The parser's own words could hold a piece of a password.
    let file: AuthFile = serde_json::from_slice(&text)
        .map_err(|error| wrong(format!("line {} is no valid JSON", error.line())))?;
    let names = match host {
        "docker.io" => vec!["docker.io", "https://index.docker.io/v1/", "index.docker.io"],
        other => vec![other],
    };
    let Some(entry) = names.iter().find_map(|name| file.auths.get(*name)) else { return Ok(None) };
    let decoded = base64(&entry.auth).and_then(|bytes| String::from_utf8(bytes).ok());
    match decoded.as_deref().and_then(|text| text.split_once(':')) {
        Some((user, password)) => Ok(Some((user.to_owned(), password.to_owned()))),
        None => Err(wrong(format!("\"auth\" of {host} is not user:password in base64"))),
    }
}

/// Read anew each time: certificates are renewed.
fn authorities(options: &Options) -> Result<String, FetchError> {
    let Some(path) = &options.registry_ca else { return Ok(String::new()) };
    let wrong = |why: String| FetchError::Authorities { path: path.clone(), why };
    let meta = fs::metadata(path).map_err(|error| wrong(error.to_string()))?;
    if !meta.is_file() || meta.len() > MAX_AUTHORITIES {
        return Err(wrong("this is no file of certificates".to_owned()));
    }
    let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    match text.contains("-----BEGIN CERTIFICATE-----") {
        true => Ok(text),
        false => Err(wrong("it holds no certificate in PEM".to_owned())),
    }
}

fn base64(text: &str) -> Option<Vec<u8>> {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.decode(text.trim()).ok()
}

/// Has an image fetched into a layout; `progress` gets bytes fetched and to be fetched. The layout's folder, and where
/// exactly it is from.
pub(super) async fn fetch(
    options: &Options,
    order: &Order,
    progress: impl Fn(u64, u64) + Send,
) -> Result<(Scratch, String), FetchError> {
    let scratch =
        scratch(options, order).map_err(|error| io_error("make a folder for the fetcher", error))?;
    let mut child = spawn(options, &scratch.0).map_err(|error| io_error("start the fetcher", error))?;
    let talk = converse(&mut child, order, progress);
    let outcome = match tokio::time::timeout(FETCH_TIMEOUT, talk).await {
        Ok(outcome) => outcome,
        Err(_) => Err(FetchError::Timeout(FETCH_TIMEOUT)),
    };
    // With what it has started, such as git's own helpers: nothing writes into the layout from now on.
    if let Some(leader) = child.id().and_then(|id| i32::try_from(id).ok()) {
        let _ = killpg(Pid::from_raw(leader), Signal::SIGKILL);
    }
    let status = child.wait().await.map_err(|error| io_error("wait for the fetcher", error))?;
    match outcome {
        Ok(Some(version)) => Ok((scratch, version)),
        Ok(None) => Err(FetchError::Silent(status.to_string())),
        Err(error) => Err(error),
    }
}

fn scratch(options: &Options, order: &Order) -> io::Result<Scratch> {
    let path = super::tempfile_in(&options.fetch_dir)?;
    let scratch = Scratch(path);
    std::os::unix::fs::chown(&scratch.0, Some(order.uid), Some(order.gid))?;
    Ok(scratch)
}

fn spawn(options: &Options, folder: &Path) -> io::Result<Child> {
    let mut command = Command::new(&options.exe);
    command.arg("fetch").current_dir(folder).env_clear();
    for name in [
        "PATH",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "NO_PROXY",
        "https_proxy",
        "http_proxy",
        "no_proxy",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
    ] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // With whatever it starts, so that all of it can be ended.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

/// Gives the order and listens; `None` when the fetcher ends without having said how it went.
async fn converse(
    child: &mut Child,
    order: &Order,
    progress: impl Fn(u64, u64) + Send,
) -> Result<Option<String>, FetchError> {
    let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else { return Ok(None) };
    let mut line = serde_json::to_vec(order).map_err(|error| io_error("write the order", error.into()))?;
    line.push(b'\n');
    input.write_all(&line).await.map_err(|error| io_error("write the order", error))?;
    let mut output = BufReader::new(output);
    loop {
        let mut line = Vec::new();
        let mut bounded = (&mut output).take(MAX_WORD);
        let read = tokio::time::timeout(SILENCE, bounded.read_until(b'\n', &mut line)).await;
        let read = read.map_err(|_| FetchError::Timeout(SILENCE))?;
        if read.map_err(|error| io_error("listen to the fetcher", error))? == 0 {
            return Ok(None);
        }
        match serde_json::from_slice(&line) {
            Ok(Word::Progress { bytes, of }) => progress(bytes, of),
            Ok(Word::Done { version }) => return Ok(Some(version)),
            Ok(Word::Failed { why }) => return Err(FetchError::Failed(why)),
            Err(error) => return Err(io_error("understand the fetcher", error.into())),
        }
    }
}

fn io_error(what: &'static str, error: io::Error) -> FetchError {
    FetchError::Io { what, error }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(image: &str, options: &Options) -> Source {
        source(image, options).unwrap()
    }

    #[test]
    fn plain_http_is_for_loopback_and_for_what_is_named() {
        let options = Options { insecure_registries: vec!["lab:5000".into()], ..Options::for_tests() };
        let plain = |image: &str| match of(image, &options) {
            Source::Registry { plain_http, .. } => plain_http,
            Source::Git { .. } => panic!("a registry"),
        };
        for image in [
            "docker://127.0.0.1:5000/a",
            "docker://localhost/a:1",
            "docker://[::1]:5000/a",
            "docker://lab:5000/a",
        ] {
            assert!(plain(image), "{image}");
        }
        for image in [
            "docker://nginx",
            "docker://lab/a",
            "docker://127.0.0.1.evil.example/a",
            "docker://10.0.0.1:5000/a",
        ] {
            assert!(!plain(image), "{image}");
        }
    }

    #[test]
    fn credentials_are_those_of_the_registry_and_are_never_told() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("auth.json");
        // user:secret
        fs::write(&path, r#"{"auths":{"registry.example:5000":{"auth":"dXNlcjpzZWNyZXQ="}}}"#).unwrap();
        let options = Options { registry_auth: Some(path.clone()), ..Options::for_tests() };

        let Source::Registry { credentials, .. } = of("docker://registry.example:5000/a/b:1", &options)
        else {
            panic!("a registry")
        };
        assert_eq!(credentials, Some(("user".into(), "secret".into())));
        assert!(!format!("{:?}", of("docker://registry.example:5000/a", &options)).contains("secret"));
        let Source::Registry { credentials: None, .. } = of("docker://registry.example/a/b:1", &options)
        else {
            panic!("another registry")
        };

        fs::write(&path, r#"{"auths":{"registry.example:5000":{"auth":"c2VjcmV0"}}} secret"#).unwrap();
        let error = source("docker://registry.example:5000/a", &options).unwrap_err().to_string();
        assert!(error.contains("no valid JSON") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn git_trees_have_a_revision_a_folder_and_a_place() {
        let Source::Git { url, revision, folder, into } =
            of("git+https://git.example/site.git#v1:public/:/var/www/html", &Options::for_tests())
        else {
            panic!("git")
        };
        assert_eq!(
            [url, revision, folder, into],
            ["https://git.example/site.git", "v1", "public", "var/www/html"]
        );
        for image in
            ["git+https://x/y#--upload-pack=evil", "git+https://x/y#v1:../..", "git+https://x/y#v1:a:/../b"]
        {
            assert!(source(image, &Options::for_tests()).is_err(), "{image}");
        }
    }
}
