//! `fastcontainer`: the operator's command.
#![forbid(unsafe_code)]

mod apply;
mod ca;
mod check;
mod cli;
mod control;
mod events;
mod failure;
mod images;
mod launcher;
mod logs;
mod metrics;
mod nodes;
mod output;
mod ps;
mod remote;
mod table;
mod target;
mod text;
mod token;
mod up;
mod usage;
mod why;

use std::{io::IsTerminal, process::ExitCode};

use clap::Parser;

use crate::{
    cli::{Cli, Command},
    failure::Failure,
    output::Output,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr(cli.global.verbose);
    // One thread: the children that `up` starts die with the *thread* that started them, so it must be the main one.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::failed(format!("cannot start: {error}")).report(),
    };
    match runtime.block_on(run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

async fn run(cli: Cli) -> Result<(), Failure> {
    let global = &cli.global;
    let mut out = Output::new(global.json);
    match cli.command {
        Command::Up(options) => up::run(global, &options, &mut out).await?,
        Command::Check(options) => check::run(&options, &mut out)?,
        Command::Ps(options) => ps::run(global, options, &mut out).await?,
        Command::Events(options) => events::run(global, &options, &mut out).await?,
        Command::Ca(command) => ca::run(&command, &mut out)?,
        Command::Nodes(options) => nodes::nodes(global, &options.remote, &mut out).await?,
        Command::Drain(options) => nodes::drain(global, &options, &mut out).await?,
        Command::Forget(options) => nodes::forget(global, &options, &mut out).await?,
        Command::Uncordon(options) => nodes::uncordon(global, &options, &mut out).await?,
        Command::Logs(options) => logs::run(global, options, &mut out).await?,
        Command::Wake(options) => control::wake(global, options, &mut out).await?,
        Command::Stop(options) => control::stop(global, options, &mut out).await?,
        Command::Restart(options) => control::restart(global, options, &mut out).await?,
        Command::Limit(options) => control::limit(global, options, &mut out).await?,
        Command::Scale(options) => control::scale(global, options, &mut out).await?,
        Command::Signal(options) => control::signal(global, options, &mut out).await?,
        Command::Usage(options) => usage::run(global, options, &mut out).await?,
        Command::Images(options) => images::run(global, &options.remote, &mut out).await?,
        Command::Metrics => metrics::run(global, &mut out).await?,
        Command::Apply(options) => apply::run(global, &options, &mut out).await?,
        Command::Diff(options) => apply::diff(global, &options, &mut out).await?,
        Command::Token(options) => token::run(&options, &mut out)?,
        Command::Why(options) => why::run(global, &options, &mut out).await?,
    }
    out.flush()
}

fn log_to_stderr(verbose: bool) {
    let default = if verbose { "debug" } else { "info" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| default.into());
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(
            std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()),
        )
        .with_target(false)
        .with_env_filter(filter)
        // A terminal that was closed must not bring `up` down in the middle of its cleaning.
        .log_internal_errors(false)
        .init();
}
