//! Putting many apps in place.

use cmdb::{AppName, vhost::LoadedApp};
use launcher_client::{ClientError, wire::Refusal};
use tokio::task::JoinSet;

use crate::link::Connected;

/// Apps that are put at a time: the CMDB writes them to the disk together.
const AT_ONCE: usize = 256;

/// What came of it.
#[derive(Debug, Default)]
pub(crate) struct Put {
    /// How many are in place.
    pub(crate) applied: usize,
    /// Which are not, and why.
    pub(crate) refused: Vec<(LoadedApp, Refusal)>,
}

/// Puts apps in place, in rounds: a server-name that moves from one app to another is free only after the one has been
/// put, and moves may form a chain. A round that gets no further is the last.
///
/// # Errors
/// The connection's; then some may be in place.
pub(crate) async fn put_all(connected: &Connected, mut wanted: Vec<LoadedApp>) -> Result<Put, ClientError> {
    let mut put = Put::default();
    loop {
        let asked = wanted.len();
        let mut refused = Vec::new();
        let mut puts = JoinSet::new();
        let mut queue = std::mem::take(&mut wanted).into_iter();
        loop {
            while puts.len() < AT_ONCE
                && let Some(loaded) = queue.next()
            {
                let connected = connected.clone();
                puts.spawn(async move { (connected.put(loaded.app.clone(), false).await, loaded) });
            }
            let Some(outcome) = puts.join_next().await else { break };
            // A task of ours does not panic, and nobody aborts it.
            let Ok((outcome, loaded)) = outcome else { continue };
            match outcome {
                Ok(()) => put.applied += 1,
                Err(ClientError::Refused(refusal)) => refused.push((loaded, refusal)),
                Err(error) => return Err(error),
            }
        }
        if refused.is_empty() || refused.len() == asked {
            put.refused = refused;
            return Ok(put);
        }
        wanted.extend(refused.into_iter().map(|(loaded, _)| loaded));
    }
}

/// Removes apps of one origin; those that are refused, and why.
///
/// # Errors
/// The connection's.
pub(crate) async fn remove_all(
    connected: &Connected,
    names: Vec<AppName>,
    origin: &cmdb::Origin,
) -> Result<Vec<(AppName, Refusal)>, ClientError> {
    let mut refused = Vec::new();
    for name in names {
        match connected.remove(&name, Some(origin.clone())).await {
            Ok(()) => {}
            Err(ClientError::Refused(refusal)) => refused.push((name, refusal)),
            Err(error) => return Err(error),
        }
    }
    Ok(refused)
}
