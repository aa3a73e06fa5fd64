//! The CMDB of one host: in memory, the configuration journalled to a redb file, owned by the launcher.
//!
//! Durable are the apps and the *generation ceiling*: a number above every generation that was ever given out. It is
//! kept some minutes ahead of the clock, so that a wake never waits for the disk, and it is the floor of all
//! generations after the next start: none is used twice, even when the daemon is killed and the clock is set back.
//! Instances are not durable: after a start the launcher says what runs (law 3).

mod journal;

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::{
    app::{App, AppName},
    instance::Generation,
    mirror::{Mirror, unix_ms},
    store::{Change, Store, StoreError},
    transition::{AppRecord, Outcome, Transition},
};
use journal::Journal;

/// How far the ceiling is kept ahead of the clock, in ms.
const CEILING_AHEAD_MS: u64 = 600_000;
/// It is raised when it is less far ahead than this, in ms.
const CEILING_LOW_MS: u64 = 300_000;

/// See the module.
#[derive(Debug)]
pub struct EmbeddedStore {
    inner: Mutex<Inner>,
    journal: Journal,
}

#[derive(Debug, Default)]
struct Inner {
    mirror: Mirror,
    /// What the journal holds, or is about to hold.
    ceiling: u64,
    /// Floor of every generation: the ceiling as it was found.
    floor: u64,
    /// Numbers the changes of the configuration, in the journal's order.
    changes: u64,
    /// The last change of each app that is on its way to the disk: only that one may take effect, for those before it
    /// are outdated by then.
    pending: HashMap<AppName, u64>,
}

impl EmbeddedStore {
    /// Opens the journal at `path`, or makes it. One that cannot be read is moved aside (never deleted) and an empty
    /// one begun: the CoreAPI brings the configuration back from `conf.d`.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when another process has it open or the file system refuses.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let (journal, found) = Journal::open(path)?;
        let mut inner = Inner { ceiling: found.ceiling, floor: found.ceiling, ..Inner::default() };
        for (name, stored) in found.apps {
            match serde_json::from_slice::<App>(&stored) {
                Ok(app) => {
                    if let Err(error) = inner.mirror.put(Arc::new(app)) {
                        tracing::warn!(app = name, %error, "an app of the journal is left out");
                    }
                }
                // One bad record is one app's trouble; the CoreAPI puts it anew.
                Err(error) => {
                    tracing::warn!(app = name, %error, "an app of the journal cannot be read and is left out")
                }
            }
        }
        let store = Self { inner: Mutex::new(inner), journal };
        // Before the first generation is given out, for nothing above the ceiling may be.
        let ceiling = store.lock().ceiling.max(unix_ms()) + CEILING_AHEAD_MS;
        store.journal.raise_ceiling_now(ceiling)?;
        store.lock().ceiling = ceiling;
        Ok(store)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Poisoned by a panic between two map operations at worst: every entry is whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Raises the ceiling in the background when it comes near; at once, and durably, in the odd case that a
    /// generation reaches it (the clock jumped ahead).
    fn mind_ceiling(&self, inner: &mut Inner, generation: u64, now_ms: u64) -> Result<(), StoreError> {
        let highest = generation.max(now_ms);
        if highest >= inner.ceiling {
            let ceiling = highest + CEILING_AHEAD_MS;
            self.journal.raise_ceiling_now(ceiling)?;
            inner.ceiling = ceiling;
        } else if inner.ceiling - highest < CEILING_LOW_MS {
            let ceiling = highest + CEILING_AHEAD_MS;
            // Until it is durable the old ceiling holds, and nothing above that has been given out.
            self.journal.raise_ceiling_soon(ceiling);
        }
        inner.ceiling = inner.ceiling.max(self.journal.ceiling());
        Ok(())
    }
}

#[async_trait]
impl Store for EmbeddedStore {
    async fn apply(&self, app: &AppName, transition: Transition) -> Result<(Outcome, AppRecord), StoreError> {
        let now_ms = unix_ms();
        let mut inner = self.lock();
        let floor = inner.floor;
        let Some(entry) = inner.mirror.get(app) else { return Err(StoreError::UnknownApp(app.clone())) };
        let mut record = AppRecord::clone(&entry.record);
        // The floor is applied here and not at the start, so that a record that is new has it too.
        record.generation = record.generation.max(Generation(floor));
        let outcome = record.apply(&transition, now_ms);
        if record.rev != entry.record.rev {
            self.mind_ceiling(&mut inner, record.generation.0, now_ms)?;
            inner.mirror.set_record(app, Arc::new(record.clone()));
        }
        Ok((outcome, record))
    }

    async fn put_app(&self, app: App) -> Result<(), StoreError> {
        let app = Arc::new(app);
        let stored = serde_json::to_vec(&*app)
            .map_err(|e| StoreError::Corrupt { app: app.name.to_string(), reason: e.to_string() })?;
        let (change, durable) = {
            let mut inner = self.lock();
            inner.mirror.check_names(&app)?;
            // Claimed before they are durable, so that of two apps that ask at once one is refused.
            inner.mirror.claim_names(&app);
            // Sent under the lock: the journal's order is that of the numbers.
            (inner.number(&app.name), self.journal.put(app.name.to_string(), stored)?)
        };
        let written = durable.wait().await;
        let mut inner = self.lock();
        match (inner.settle(&app.name, change), written) {
            (true, Ok(())) => inner.mirror.put(app),
            (true, Err(error)) => {
                inner.mirror.reclaim_names(&app.name);
                Err(error)
            }
            (false, written) => written,
        }
    }

    async fn remove_app(&self, app: &AppName) -> Result<(), StoreError> {
        let (change, durable) = {
            let mut inner = self.lock();
            (inner.number(app), self.journal.remove(app.to_string())?)
        };
        let written = durable.wait().await;
        let mut inner = self.lock();
        if inner.settle(app, change) && written.is_ok() {
            inner.remove(app);
        }
        written
    }

    async fn watch(&self) -> Result<mpsc::Receiver<Change>, StoreError> {
        Ok(self.lock().mirror.watch())
    }

    fn get(&self, app: &AppName) -> Option<(Arc<App>, Arc<AppRecord>)> {
        let inner = self.lock();
        let entry = inner.mirror.get(app)?;
        Some((Arc::clone(&entry.app), Arc::clone(&entry.record)))
    }

    fn list(&self) -> Vec<(Arc<App>, Arc<AppRecord>)> {
        self.lock().mirror.entries().map(|e| (Arc::clone(&e.app), Arc::clone(&e.record))).collect()
    }
}

impl Inner {
    /// The number of a change of the app's configuration that begins now.
    fn number(&mut self, app: &AppName) -> u64 {
        self.changes += 1;
        self.pending.insert(app.clone(), self.changes);
        self.changes
    }

    /// Whether that change is still the app's last, now that it has been written.
    fn settle(&mut self, app: &AppName, change: u64) -> bool {
        let last = self.pending.get(app) == Some(&change);
        if last {
            self.pending.remove(app);
        }
        last
    }

    fn remove(&mut self, app: &AppName) {
        if let Some(entry) = self.mirror.remove(app) {
            // If it comes back under this name its generations go on above those that it had.
            self.floor = self.floor.max(entry.record.generation.0);
        }
    }
}
