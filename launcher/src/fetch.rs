//! Fetching images from elsewhere: a process of its own, without any privilege, that speaks with registries and runs
//! `git`, and leaves an OCI image layout in its working directory. Nothing of what a network sends is understood by root
//! but the layout, whose every digest is verified again.

mod confine;
mod git;
mod registry;

use std::io::{self, BufRead as _, Read as _, Write as _};
use std::process::ExitCode;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::getpgrp;
use serde::{Deserialize, Serialize};

use crate::image::Digest;

/// Longest order, bytes.
const MAX_ORDER: u64 = 1 << 20;

/// What is to be fetched, as the daemon writes it to the fetcher's standard input: one line of JSON. The fetcher ends when
/// its standard input does.
#[derive(Debug, Deserialize, Serialize)]
pub struct Order {
    /// From where.
    pub source: Source,
    /// Most bytes of all blobs together, as they are sent.
    pub bytes: u64,
    /// Layers that need not be fetched, by the digest under which they are kept.
    pub have: Vec<Digest>,
    /// Whom to become.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// Where an image comes from.
#[derive(Deserialize, Serialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum Source {
    /// A registry (OCI distribution specification).
    Registry {
        /// `host[:port]/name[:tag|@digest]`.
        reference: String,
        /// User and password.
        credentials: Option<(String, String)>,
        /// Whether to speak HTTP without TLS.
        plain_http: bool,
        /// Authorities whose certificates are believed besides the system's (PEM).
        #[serde(default)]
        authorities: String,
    },
    /// A tree of a Git repository.
    Git {
        /// `https://…` or `file://…`.
        url: String,
        /// A branch, tag or commit; empty: what the repository's HEAD is.
        revision: String,
        /// A folder in the repository; empty: all of it.
        folder: String,
        /// Where the tree is to lie in the image; empty: it is the root.
        into: String,
    },
}

impl std::fmt::Debug for Source {
    /// Without the credentials.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Registry { reference, .. } => write!(f, "registry {reference}"),
            Source::Git { url, revision, .. } => write!(f, "git {url}#{revision}"),
        }
    }
}

/// What the fetcher tells on its standard output, a line of JSON for each.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "word", rename_all = "snake_case")]
pub enum Word {
    /// It gets on.
    Progress {
        /// Bytes fetched.
        bytes: u64,
        /// Of how many.
        of: u64,
    },
    /// The layout is whole.
    Done {
        /// Where exactly it is from, in words: a digest or a commit.
        version: String,
    },
    /// It cannot be fetched.
    Failed {
        /// Why.
        why: String,
    },
}

/// Runs the fetcher: becomes nobody, fetches into the working directory, tells how it went.
#[must_use]
pub fn run() -> ExitCode {
    let outcome = take_order().and_then(|order| {
        confine::become_nobody(&order).map_err(|error| format!("the fetcher cannot be confined: {error}"))?;
        end_with_the_daemon();
        fetch(&order)
    });
    match outcome {
        Ok(version) => {
            tell(&Word::Done { version });
            ExitCode::SUCCESS
        }
        Err(why) => {
            tell(&Word::Failed { why: why.chars().take(2000).collect() });
            ExitCode::FAILURE
        }
    }
}

fn take_order() -> Result<Order, String> {
    let mut line = String::new();
    io::stdin()
        .lock()
        .take(MAX_ORDER)
        .read_line(&mut line)
        .map_err(|error| format!("its order cannot be read: {error}"))?;
    serde_json::from_str(&line).map_err(|error| format!("its order cannot be understood: {error}"))
}

/// Nobody is there to be served any more when standard input ends.
fn end_with_the_daemon() {
    std::thread::spawn(|| {
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        // With what it has started; it leads a process group of its own.
        let _ = killpg(getpgrp(), Signal::SIGKILL);
    });
}

fn fetch(order: &Order) -> Result<String, String> {
    match &order.source {
        Source::Registry { reference, credentials, plain_http, authorities } => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| error.to_string())?;
            let fetched = registry::fetch(order, reference, credentials.as_ref(), *plain_http, authorities);
            runtime.block_on(fetched).map_err(|error| error.to_string())
        }
        Source::Git { url, revision, folder, into } => {
            git::fetch(order, url, revision, folder, into).map_err(|error| error.to_string())
        }
    }
}

/// Nobody may be listening; then the process is about to end.
fn tell(word: &Word) {
    let mut text = serde_json::to_vec(word).unwrap_or_default();
    text.push(b'\n');
    let _ = io::stdout().lock().write_all(&text);
}
