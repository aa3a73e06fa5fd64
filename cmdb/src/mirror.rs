//! What a store holds, in memory, and who watches it: the part that all homes of the CMDB share.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::sync::mpsc;

use crate::{
    app::{App, AppName, HostPattern},
    compute::Nodes,
    store::{Change, StoreError},
    transition::AppRecord,
};

/// A loss of more than half of more than this many apps at once is more likely a mishap than somebody's wish.
const MASS_REMOVAL: usize = 20;
/// Changes that may wait for a slow watcher, beyond the apps that there are; then its watch is cut.
const WATCHER_LAG: usize = 4_096;

/// See the module. Whoever owns it holds a lock around it, so that no change can come between a snapshot and what
/// follows it.
#[derive(Debug, Default)]
pub(crate) struct Mirror {
    apps: BTreeMap<AppName, Entry>,
    owners: HashMap<HostPattern, AppName>,
    watchers: Vec<mpsc::Sender<Change>>,
    nodes: Nodes,
    /// Rises with each change that is published.
    version: u64,
}

/// Whether the loss of `missing` of `all` apps at once is to be distrusted.
pub(crate) fn is_mishap(missing: usize, all: usize) -> bool {
    all > MASS_REMOVAL && missing * 2 > all
}

/// Ms since the Unix epoch, by this host's clock.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// An app and its instances.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) app: Arc<App>,
    pub(crate) record: Arc<AppRecord>,
}

impl Mirror {
    pub(crate) fn get(&self, app: &AppName) -> Option<&Entry> {
        self.apps.get(app)
    }

    /// By name.
    pub(crate) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.apps.values()
    }

    /// All that there is and then every change.
    pub(crate) fn watch(&mut self) -> mpsc::Receiver<Change> {
        let (sender, receiver) = mpsc::channel(self.apps.len() + WATCHER_LAG);
        for entry in self.apps.values() {
            let _ = sender.try_send(entry.change());
        }
        if !self.nodes.is_empty() {
            let _ = sender.try_send(Change::Nodes(Arc::clone(&self.nodes)));
        }
        let _ = sender.try_send(Change::Synced);
        self.watchers.push(sender);
        receiver
    }

    /// Whether no other app has one of the app's names.
    pub(crate) fn check_names(&self, app: &App) -> Result<(), StoreError> {
        for name in &app.server_names {
            if let Some(owner) = self.owners.get(name).filter(|owner| **owner != app.name) {
                let (app, owner) = (app.name.clone(), owner.clone());
                return Err(StoreError::DuplicateName { name: name.to_string(), app, owner });
            }
        }
        Ok(())
    }

    /// Takes the app's names for it before the app itself is put in place.
    pub(crate) fn claim_names(&mut self, app: &App) {
        for name in &app.server_names {
            self.owners.insert(name.clone(), app.name.clone());
        }
    }

    /// The app has the names of its last good configuration again, and no others.
    pub(crate) fn reclaim_names(&mut self, app: &AppName) {
        self.owners.retain(|_, owner| owner != app);
        if let Some(entry) = self.apps.get(app).cloned() {
            self.claim_names(&entry.app);
        }
    }

    /// The app is so from now on; its record stays.
    pub(crate) fn put(&mut self, app: Arc<App>) -> Result<(), StoreError> {
        let record = self.apps.get(&app.name).map(|e| Arc::clone(&e.record)).unwrap_or_default();
        self.put_both(app, record)
    }

    /// The app and its record are so from now on.
    pub(crate) fn put_both(&mut self, app: Arc<App>, record: Arc<AppRecord>) -> Result<(), StoreError> {
        self.check_names(&app)?;
        let known = self.apps.get(&app.name);
        if known.is_some_and(|known| known.app.server_names != app.server_names) {
            self.owners.retain(|_, owner| *owner != app.name);
        }
        self.claim_names(&app);
        let entry = Entry { app: Arc::clone(&app), record };
        self.publish(&entry.change());
        self.apps.insert(app.name.clone(), entry);
        Ok(())
    }

    /// The app is gone; returns what was known of it.
    pub(crate) fn remove(&mut self, app: &AppName) -> Option<Entry> {
        let entry = self.apps.remove(app)?;
        self.owners.retain(|_, owner| *owner != *app);
        self.publish(&Change::Removed(app.clone()));
        Some(entry)
    }

    /// Rises with each change.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// The hosts that there are.
    pub(crate) fn nodes(&self) -> Nodes {
        Arc::clone(&self.nodes)
    }

    /// The hosts are these from now on; watchers are told what is `noticeable`.
    pub(crate) fn set_nodes(&mut self, nodes: Nodes, noticeable: bool) {
        self.nodes = Arc::clone(&nodes);
        if noticeable {
            self.publish(&Change::Nodes(nodes));
        }
    }

    /// The app's instances are so from now on. Nothing happens when there is no such app.
    pub(crate) fn set_record(&mut self, app: &AppName, record: Arc<AppRecord>) {
        if let Some(entry) = self.apps.get_mut(app) {
            entry.record = record;
            let change = entry.change();
            self.publish(&change);
        }
    }

    /// A watcher that has fallen too far behind is cut: it begins again, and nobody waits for it.
    fn publish(&mut self, change: &Change) {
        self.version += 1;
        self.watchers.retain(|watcher| watcher.try_send(change.clone()).is_ok());
    }
}

impl Entry {
    fn change(&self) -> Change {
        Change::Put { app: Arc::clone(&self.app), record: Arc::clone(&self.record) }
    }
}
