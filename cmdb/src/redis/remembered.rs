//! What a process remembers of the CMDB over its own restarts: apps, their records and the hosts, so that one that starts
//! while Redis is away serves what is warm, and knows where to start what is cold.

use std::{path::PathBuf, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::{Shared, stored::Stored};
use crate::{
    app::App,
    cache::{LastKnownGood, LastKnownGoodError},
    compute::Nodes,
    transition::AppRecord,
};

/// The file is written so long after a change at the earliest, for changes come in crowds.
const WRITE_AFTER: Duration = Duration::from_secs(2);
/// A hundred thousand apps take long to write: it is never done for more than one part in so many of the time.
const WRITE_SHARE: u32 = 50;

/// What the file holds.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(super) struct Remembered {
    /// Which Redis it was: with another one, what is missing is lost and not removed.
    pub(super) identity: Identity,
    pub(super) apps: Vec<Known>,
    pub(super) nodes: Nodes,
    /// The number of this process's own host; 0: none.
    #[serde(default)]
    pub(super) number: u64,
}

/// Which Redis this is: its epoch, which is lost with what it holds, and its replication history.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Identity {
    pub(super) epoch: String,
    pub(super) history: String,
}

/// An app as Redis held it.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Known {
    pub(super) rev: String,
    pub(super) srev: String,
    pub(super) record: Arc<AppRecord>,
    pub(super) app: Arc<App>,
}

/// What is in the file at `path`. One that is damaged is as good as none.
pub(super) fn read(path: &std::path::Path) -> Remembered {
    let read: Result<Option<Remembered>, LastKnownGoodError> = LastKnownGood::new(path).read_all();
    read.unwrap_or_else(|error| {
        tracing::warn!(%error, "what was known of the CMDB is lost");
        None
    })
    .unwrap_or_default()
}

/// Writes the file whenever something has changed. Never returns; the store aborts it.
pub(super) async fn keep(shared: Arc<Shared>, path: PathBuf) {
    let mut written = 0;
    let mut rest = WRITE_AFTER;
    let mut well = true;
    loop {
        sleep(rest).await;
        // What came from the file need not go back into it.
        if !shared.link.borrow().connected {
            continue;
        }
        let (changes, remembered) = {
            let state = shared.lock();
            if state.version() == written {
                continue;
            }
            (state.version(), Remembered { number: shared.hosts.number_told(), ..state.remember() })
        };
        let file = LastKnownGood::new(&path);
        let began = Instant::now();
        let done = tokio::task::spawn_blocking(move || file.write_all(&remembered)).await;
        rest = WRITE_AFTER.max(began.elapsed() * WRITE_SHARE);
        match done {
            Ok(Ok(())) => {
                written = changes;
                well = true;
            }
            Ok(Err(error)) if std::mem::replace(&mut well, false) => {
                tracing::warn!(%error, "what is known of the CMDB is not kept for the next start");
            }
            Ok(Err(_)) | Err(_) => {}
        }
    }
}

impl Known {
    pub(super) fn into_stored(self) -> Stored {
        Stored { rev: self.rev, srev: self.srev, record: self.record, app: Some(self.app) }
    }
}
