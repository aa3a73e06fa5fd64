//! `fastcontainer-coreapi`: watches `conf.d/` and keeps the CMDB's configuration in step with it; serves the API.
#![forbid(unsafe_code)]
#![allow(
    clippy::result_large_err,
    reason = "a problem is made once, where a request has failed, and goes straight into its answer"
)]

mod api;
mod applier;
mod link;
mod privileges;
mod put_all;
mod source;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::Parser;
use cmdb::Origin;
use launcher_client::paths::{COREAPI_UID, DEFAULT_STATE, GROUP_ID, StateDir};

use tokio::signal::unix::{SignalKind, signal};

use applier::Applier;
use link::Link;
use source::Source;

/// Watches a folder of vhost files and keeps the CMDB's configuration in step with it; serves the API. `fastcontainer up`
/// starts it.
#[derive(Debug, Parser)]
#[command(name = "fastcontainer-coreapi", version)]
struct Arguments {
    /// Folder with one vhost file per app; without it this host brings no configuration of its own.
    #[arg(long)]
    conf: Option<PathBuf>,
    /// This host's name among several, so that the apps of its folder are known as its own.
    #[arg(long, default_value = "")]
    node: String,
    /// Address of the API, for example 127.0.0.1:8070; off without it.
    #[arg(long, value_name = "IP:PORT")]
    api: Option<SocketAddr>,
    /// Who may use the API: a file with a line `ROLE NAME SHA256` for each token. Without it whoever is on this host may look.
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
    /// State folder of the launcher.
    #[arg(long, env = "FASTCONTAINER_STATE", default_value = DEFAULT_STATE)]
    state: PathBuf,
    /// User to become when started as root.
    #[arg(long, default_value_t = COREAPI_UID)]
    uid: u32,
    /// Group to become when started as root.
    #[arg(long, default_value_t = GROUP_ID)]
    gid: u32,
    /// End when the process that started this one ends.
    #[arg(long)]
    die_with_parent: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    match start(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: Arguments) -> anyhow::Result<()> {
    // Opened as root, read as nobody in particular: the folder may lie beneath one that only root may enter.
    let source = arguments.conf.as_deref().map(Source::open).transpose()?;
    let listener = match arguments.api {
        Some(address) => Some(api::listen(address, arguments.tokens.as_deref())?),
        None => None,
    };
    let state = StateDir::new(&arguments.state);
    let socket = state.api_socket();
    for folder in [Some(state.coreapi().as_path()), socket.parent()].into_iter().flatten() {
        make_own(folder, &arguments)?;
    }
    privileges::drop_to(arguments.uid, arguments.gid)?;
    if arguments.die_with_parent {
        // After the change of user, which would undo it (prctl(2), PR_SET_PDEATHSIG).
        privileges::die_with_parent()?;
    }
    // Two: a folder of thousands of files is read beside the requests of the API.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.context("no runtime")?.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be handled")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be handled")?;
        let link = Link::open(&state);
        let base = source.as_ref().and_then(|source| source.path().parent()).unwrap_or(Path::new("/"));
        let settings = api::Settings {
            listener,
            socket: socket.clone(),
            tokens: arguments.tokens,
            audit: state.coreapi().join("audit.log"),
            base: base.to_owned(),
        };
        let served = api::serve(settings, link.clone());
        let applied = async {
            match source {
                Some(source) => Applier::new(source, link, Origin::conf_d(&arguments.node)).run().await,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
            ended = served => ended,
            ended = applied => ended,
        };
        // It may never have been made.
        let _ = std::fs::remove_file(&socket);
        ended
    })
}

/// A folder for this program alone.
fn make_own(folder: &Path, arguments: &Arguments) -> anyhow::Result<()> {
    use std::os::unix::fs::{PermissionsExt as _, chown};
    let make = || {
        std::fs::create_dir_all(folder)?;
        if nix::unistd::geteuid().is_root() {
            std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))?;
            chown(folder, Some(arguments.uid), Some(arguments.gid))?;
        }
        Ok(())
    };
    make().map_err(|error: std::io::Error| anyhow::anyhow!("cannot make {}: {error}", folder.display()))
}
