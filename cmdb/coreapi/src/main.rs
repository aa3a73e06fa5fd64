//! `fastcontainer-coreapi`: watches `conf.d/` and keeps the CMDB's configuration in step with it.
#![forbid(unsafe_code)]

mod applier;
mod privileges;
mod source;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use launcher_client::paths::{COREAPI_UID, DEFAULT_STATE, GROUP_ID, StateDir};

use applier::Applier;
use source::Source;

/// Watches a folder of vhost files and keeps the CMDB's configuration in step with it. `fastcontainer up` starts it.
#[derive(Debug, Parser)]
#[command(name = "fastcontainer-coreapi", version)]
struct Arguments {
    /// Folder with one vhost file per app.
    #[arg(long, default_value = "conf.d")]
    conf: PathBuf,
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
    let source = Source::open(&arguments.conf)?;
    privileges::drop_to(arguments.uid, arguments.gid)?;
    if arguments.die_with_parent {
        // After the change of user, which would undo it (prctl(2), PR_SET_PDEATHSIG).
        privileges::die_with_parent()?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime")?;
    runtime.block_on(Applier::new(source, StateDir::new(arguments.state)).run())
}
