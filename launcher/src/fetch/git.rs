//! A tree of a Git repository as an image of one layer. The `git` program does the fetching; what comes of it is an
//! archive, which is unpacked as carefully as any other.

use std::fs;
use std::io::{self, Read as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::json;

use super::{Order, Word, tell};
use crate::image::{Digest, hash_file};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const REPOSITORY: &str = "repository";
/// As much of `git`'s complaints as is told.
const MAX_WORDS: usize = 600;

/// Why a tree cannot be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum GitError {
    #[error("git cannot be run: {0}; is the package git installed?")]
    Run(io::Error),
    #[error("git {what}: {words}")]
    Git { what: &'static str, words: String },
    #[error("it is larger than {0} bytes")]
    TooLarge(u64),
    #[error("{what}: {error}")]
    Io { what: &'static str, error: io::Error },
}

/// Fetches the tree into a layout in the working directory; the commit.
pub(super) fn fetch(
    order: &Order,
    url: &str,
    revision: &str,
    folder: &str,
    into: &str,
) -> Result<String, GitError> {
    prepare()?;
    let wanted = if revision.is_empty() { "HEAD" } else { revision };
    run("init", &["init", "--quiet", "--bare", REPOSITORY])?;
    let shallow = in_repository("fetch", &["fetch", "--quiet", "--depth=1", "--no-tags", url, wanted]);
    let commit = match shallow {
        Ok(_) => "FETCH_HEAD".to_owned(),
        // Most servers do not hand out a commit by its number: then it is somewhere in what they do hand out.
        Err(_) if is_commit(wanted) => {
            in_repository("fetch", &["fetch", "--quiet", url, "+refs/*:refs/fetched/*"])?;
            wanted.to_owned()
        }
        Err(error) => return Err(error),
    };
    let commit =
        said(&in_repository("rev-parse", &["rev-parse", "--verify", &format!("{commit}^{{commit}}")])?);
    let tree = format!("{commit}:{}", folder.trim_matches('/'));
    let tree = said(&in_repository("rev-parse", &["rev-parse", "--verify", &tree])?);
    // A commit of the tree, dated as the commit that it comes from: the same content gives the same archive.
    let date = said(&in_repository("show", &["show", "--no-patch", "--format=%ct", &commit])?);
    let dated = said(&checked("commit-tree", {
        let mut command = git(&["-C", REPOSITORY, "commit-tree", &tree, "-m", "tree"]);
        let at = format!("{date} +0000");
        command.env("GIT_AUTHOR_DATE", &at).env("GIT_COMMITTER_DATE", &at);
        command
    })?);
    archive(&dated, into)?;
    let size = fs::metadata("layer.tar").map_err(|error| io_error("read the archive", error))?.len();
    if size > order.bytes {
        return Err(GitError::TooLarge(order.bytes));
    }
    layout(size)?;
    tell(&Word::Progress { bytes: size, of: size });
    Ok(commit)
}

/// Settings of our own, and of nobody else.
fn prepare() -> Result<(), GitError> {
    // A repository on this host belongs to somebody else than the fetcher, which only reads it.
    fs::write(".gitconfig", "[safe]\n\tdirectory = *\n")
        .map_err(|error| io_error("write .gitconfig", error))?;
    fs::create_dir_all("blobs/sha256").map_err(|error| io_error("make a folder", error))
}

fn archive(commit: &str, into: &str) -> Result<(), GitError> {
    let mut arguments = vec!["-C", REPOSITORY, "-c", "tar.umask=0022", "archive", "--format=tar"];
    let prefix = format!("--prefix={}/", into.trim_matches('/'));
    if prefix != "--prefix=/" {
        arguments.push(&prefix);
    }
    arguments.extend(["--output=../layer.tar", commit]);
    checked("archive", git(&arguments)).map(drop)
}

/// An image of the one layer `layer.tar`.
fn layout(size: u64) -> Result<(), GitError> {
    let file = fs::File::open("layer.tar").map_err(|error| io_error("read the archive", error))?;
    let layer = hash_file(file).map_err(|error| io_error("read the archive", error))?;
    let place = Path::new("blobs/sha256").join(layer.hex());
    fs::rename("layer.tar", place).map_err(|error| io_error("move the archive", error))?;
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = blob(
        CONFIG,
        &json!({
            "architecture": architecture,
            "os": "linux",
            "rootfs": { "type": "layers", "diff_ids": [layer.to_string()] },
        }),
    )?;
    let manifest = blob(
        MANIFEST,
        &json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config,
            "layers": [{ "mediaType": LAYER, "digest": layer.to_string(), "size": size }],
        }),
    )?;
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write("index.json", index.to_string()).map_err(|error| io_error("write the index", error))
}

fn blob(media_type: &str, content: &serde_json::Value) -> Result<serde_json::Value, GitError> {
    let text = content.to_string();
    let digest = Digest::of(text.as_bytes());
    fs::write(Path::new("blobs/sha256").join(digest.hex()), &text)
        .map_err(|error| io_error("write a blob", error))?;
    Ok(json!({ "mediaType": media_type, "digest": digest.to_string(), "size": text.len() }))
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

fn in_repository(what: &'static str, arguments: &[&str]) -> Result<Output, GitError> {
    checked(what, git(&[&["-C", REPOSITORY], arguments].concat()))
}

fn run(what: &'static str, arguments: &[&str]) -> Result<Output, GitError> {
    checked(what, git(arguments))
}

fn git(arguments: &[&str]) -> Command {
    let here = std::env::current_dir().unwrap_or_default();
    let mut command = Command::new("git");
    command
        .args([
            "-c",
            "protocol.allow=never",
            "-c",
            "protocol.https.allow=always",
            "-c",
            "protocol.file.allow=always",
        ])
        .args(arguments)
        .env("HOME", here)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_ASKPASS", "/bin/false")
        .env("LC_ALL", "C")
        .envs(["AUTHOR", "COMMITTER"].iter().flat_map(|who| {
            [
                (format!("GIT_{who}_NAME"), "fastcontainer"),
                (format!("GIT_{who}_EMAIL"), "fastcontainer@localhost"),
            ]
        }))
        .stdin(Stdio::null());
    command
}

fn checked(what: &'static str, mut command: Command) -> Result<Output, GitError> {
    let output = command.output().map_err(GitError::Run)?;
    if output.status.success() {
        return Ok(output);
    }
    let mut words = String::new();
    let _ = output.stderr.take(1 << 16).read_to_string(&mut words);
    let words: String = words.trim().replace('\n', "; ").chars().take(MAX_WORDS).collect();
    Err(GitError::Git { what, words })
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn io_error(what: &'static str, error: io::Error) -> GitError {
    GitError::Io { what, error }
}
