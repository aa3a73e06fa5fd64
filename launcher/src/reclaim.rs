//! Taking the memory of a frozen instance back, by a process of its own.
//!
//! The kernel works inside one `write` that may take a second, and on a group that runs again it may take for ever: what is
//! reclaimed is read back at once. So the write is done by a short-lived process that can be killed in the middle, which is
//! what happens when the instance is woken. It ends with the daemon, too.

use std::{io, process::ExitCode, process::Stdio, sync::Arc, time::Duration};

use rustix::process::Signal;
use tokio::process::Command;

use crate::cgroup::{CgroupError, Group};

/// The kernel gives up by itself long before.
const PATIENCE: Duration = Duration::from_secs(30);

/// What became of an instance's memory.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Reclaimed {
    /// Bytes that it held before.
    pub before: u64,
    /// Bytes that it holds now.
    pub after: u64,
    /// Bytes of it that are in swap.
    pub swap: u64,
}

/// Why it could not be reclaimed.
#[derive(Debug, thiserror::Error)]
pub enum ReclaimError {
    /// The group's files.
    #[error(transparent)]
    Group(#[from] CgroupError),
    /// The process that does the work.
    #[error("the process that reclaims memory: {0}")]
    Process(#[from] io::Error),
    /// It did not come to an end.
    #[error("the kernel was not done after {PATIENCE:?}")]
    Timeout,
}

/// Reclaims what can be. Dropping the future ends the work where it is.
///
/// # Errors
/// See [`ReclaimError`].
pub async fn reclaim(group: Arc<Group>) -> Result<Reclaimed, ReclaimError> {
    let before = group.memory()?.current;
    let (file, order) = group.reclaim_order()?;
    let swap = SwapAllowed::begin(&group)?;
    // The program may have been replaced on disk; the kernel knows the one that runs.
    let mut worker = Command::new("/proc/self/exe")
        .args(["reclaim", &order])
        .stdin(Stdio::null())
        .stdout(file)
        .kill_on_drop(true)
        .spawn()?;
    // How it ended says little: "not everything could be reclaimed" is the usual end. What is left tells.
    tokio::time::timeout(PATIENCE, worker.wait()).await.map_err(|_| ReclaimError::Timeout)??;
    drop(swap);
    Ok(Reclaimed { before, after: group.memory()?.current, swap: group.swap().unwrap_or(0) })
}

/// As long as it is held, the group's memory may go to swap.
struct SwapAllowed<'a>(&'a Group);

impl<'a> SwapAllowed<'a> {
    fn begin(group: &'a Group) -> Result<Self, CgroupError> {
        group.allow_swap(true)?;
        Ok(Self(group))
    }
}

impl Drop for SwapAllowed<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.allow_swap(false) {
            tracing::warn!(cgroup = self.0.name(), %error, "an instance may go on using swap");
        }
    }
}

/// The life of that process, `fastcontainer-launcher reclaim ORDER`.
#[must_use]
pub fn run(order: &str) -> ExitCode {
    let ends_with_daemon = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    // Whoever serves comes first.
    let _ = rustix::process::nice(10);
    match ends_with_daemon.and_then(|()| rustix::io::write(io::stdout(), order.as_bytes())) {
        Ok(_) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
