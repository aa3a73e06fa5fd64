//! What every home of the CMDB offers: apps, their records, transitions, and a watch without gaps.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::{
    app::{App, AppName},
    compute::{Compute, Load, Nodes},
    transition::{AppRecord, Outcome, Transition},
};

/// A home of the CMDB.
#[async_trait]
pub trait Store: std::fmt::Debug + Send + Sync + 'static {
    /// Carries out one transition of one app; returns the outcome and the record after it.
    async fn apply(&self, app: &AppName, transition: Transition) -> Result<(Outcome, AppRecord), StoreError>;

    /// Puts an app in place or replaces it. Durable when it returns.
    async fn put_app(&self, app: App) -> Result<(), StoreError>;

    /// Removes an app; its instances are the launcher's to end. Durable when it returns. Unknown names are fine.
    async fn remove_app(&self, app: &AppName) -> Result<(), StoreError>;

    /// Everything there is, as [`Change::Put`]s, then [`Change::Synced`], then each change as it happens. When the
    /// channel ends the watch was lost (or its reader too slow): begin again.
    async fn watch(&self) -> Result<mpsc::Receiver<Change>, StoreError>;

    /// The app and its record, as this process knows them now; no I/O.
    fn get(&self, app: &AppName) -> Option<(Arc<App>, Arc<AppRecord>)>;

    /// Every app and its record, by name, as this process knows them now; no I/O.
    fn list(&self) -> Vec<(Arc<App>, Arc<AppRecord>)>;

    /// Tells all others that this host is there, and what it has left; to be called again every
    /// [`HEARTBEAT`](crate::redis::HEARTBEAT). Where there is only one host nobody needs to be told.
    async fn beat(&self, _: &Compute, _: Load) -> Result<(), StoreError> {
        Ok(())
    }

    /// Has a host emptied, or not any more.
    async fn set_draining(&self, _: &str, _: bool) -> Result<(), StoreError> {
        Err(StoreError::OneHost)
    }

    /// Deletes what is known of a host that is not alive and gives up its instances, for one that will not come back.
    async fn forget_node(&self, _: &str) -> Result<(), StoreError> {
        Err(StoreError::OneHost)
    }

    /// So many apps are missing in the CMDB at once that nobody believes it; the operator says that it was meant.
    async fn confirm_removals(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Every host, as this process knows them now; no I/O. Empty where there is only one.
    fn nodes(&self) -> Nodes {
        Nodes::default()
    }
}

/// One step of a watch.
#[derive(Clone, Debug)]
pub enum Change {
    /// This app is now so. `record.rev` orders changes of one app's record.
    Put {
        /// What the operator asked for.
        app: Arc<App>,
        /// Its instances.
        record: Arc<AppRecord>,
    },
    /// This app is not there any more.
    Removed(AppName),
    /// The hosts are these from now on. Comes before [`Change::Synced`] where there are several, and when a host has come,
    /// gone, been drained or has noticeably more or less room.
    Nodes(Nodes),
    /// All that was there when the watch began has been sent.
    Synced,
}

/// Why a store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No such app.
    #[error("no app is called \"{0}\"")]
    UnknownApp(AppName),
    /// The store cannot be reached or is broken.
    #[error("the CMDB cannot be reached: {0}")]
    Unavailable(String),
    /// There is but one host, so nothing can be asked of several.
    #[error("there is only this host: the CMDB is the embedded one (see --cmdb)")]
    OneHost,
    /// No such host.
    #[error("no host is called \"{0}\"")]
    UnknownNode(String),
    /// It cannot be forgotten.
    #[error("the host \"{0}\" is alive; drain it, end its launcher, then forget it")]
    NodeAlive(String),
    /// Two launchers run under one name, and each would end the other's instances.
    #[error("another host uses the name \"{0}\" as well; give each its own (--node)")]
    NodeTwice(String),
    /// What is stored cannot be read.
    #[error("the CMDB's record of \"{app}\" cannot be read: {reason}")]
    Corrupt {
        /// Whose record.
        app: String,
        /// Why.
        reason: String,
    },
    /// A server-name belongs to another app already.
    #[error("the server-name \"{name}\" of \"{app}\" belongs to \"{owner}\" already")]
    DuplicateName {
        /// The name.
        name: String,
        /// Who asks for it.
        app: AppName,
        /// Who has it.
        owner: AppName,
    },
}
