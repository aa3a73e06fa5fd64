//! Descriptors on the async runtime.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers an owned, non-blocking descriptor with the runtime.
///
/// # Errors
/// The system's.
#[expect(
    deprecated,
    reason = "its successor is unsafe; an OwnedFd gives what it asks: it stays open while registered"
)]
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, interest)
}
