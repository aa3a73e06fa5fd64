//! The spawner: the small process that makes containers and is the parent of each of them.

pub mod wire;

use std::io;

pub use wire::{Exit, Listening, Present, monotonic_us};

/// The life of the spawner's process, `fastcontainer-launcher spawner`: serves the listening socket that it finds as
/// its standard input until it is told to end, or until neither a daemon nor a container is left.
///
/// # Errors
/// When standard input is no listening socket, or the system refuses what a spawner cannot be without.
pub fn run() -> io::Result<()> {
    Err(io::Error::from(io::ErrorKind::Unsupported))
}
