//! `why`.
use crate::{cli::{self, Global}, failure::Failure, output::Output};

/// Runs the command.
pub(crate) async fn run(_global: &Global, _options: &cli::Why, _out: &mut Output) -> Result<(), Failure> {
    Err(Failure::failed("`why` waits for the proxy's admin socket"))
}
