//! CMCache: the whole routing state in the memory of a proxy, kept fresh by a watch.
//!
//! Reading takes one atomic load and one look-up in one of 64 immutable maps; a change of an app's instances touches
//! no map at all, and a change of host names copies one sixty-fourth of them.

mod host;
mod last_known_good;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ahash::RandomState;
use arc_swap::ArcSwap;

use crate::{
    app::{App, AppName, HostPattern},
    mirror::is_mishap,
    store::Change,
    transition::AppRecord,
};
pub use host::{CanonicalHost, HostFault, canonical_host};
pub use last_known_good::{LastKnownGood, LastKnownGoodError};

const SHARDS: usize = 64;

/// What a proxy keeps for one app; a look-up of a host leads straight to it.
pub trait Tenant: Send + Sync + 'static {
    /// An app has come.
    fn new(app: Arc<App>, record: Arc<AppRecord>) -> Self;
    /// The app or its record has changed.
    fn update(&self, app: Arc<App>, record: Arc<AppRecord>);
    /// The app has gone; requests that found it before may still hold it.
    fn removed(&self);
}

/// See the module.
#[derive(Debug)]
pub struct CmCache<T> {
    shards: Box<[ArcSwap<Shard<T>>]>,
    hasher: RandomState,
    writer: Mutex<Writer<T>>,
}

#[derive(Debug)]
struct Shard<T> {
    exact: HashMap<Box<str>, Arc<T>, RandomState>,
    /// Keyed by the name without its `*.`.
    wildcard: HashMap<Box<str>, Arc<T>, RandomState>,
}

#[derive(Debug)]
struct Writer<T> {
    apps: HashMap<AppName, Known<T>>,
    /// While a watch brings what is there: the apps that it has brought so far.
    seen: Option<HashSet<AppName>>,
    /// Host names to be put or taken out, in order; applied in one go when the sync ends.
    edits: Vec<Edit<T>>,
    /// Apps that a distrusted resync would have removed.
    doubted: Vec<AppName>,
    /// Rises with each change of an app (not of its record).
    version: u64,
}

/// A change of one host name.
#[derive(Debug)]
enum Edit<T> {
    /// It is this tenant's from now on.
    Give(HostPattern, Arc<T>),
    /// It is this tenant's no more; where another one was given it meanwhile (an app was renamed, a name moved), it stays
    /// with that one, in whichever order a resync tells of the two.
    Take(HostPattern, Arc<T>),
}

impl<T> Edit<T> {
    fn pattern(&self) -> &HostPattern {
        match self {
            Self::Give(pattern, _) | Self::Take(pattern, _) => pattern,
        }
    }

    fn give<'a>(app: &'a App, tenant: &'a Arc<T>) -> impl Iterator<Item = Self> + 'a {
        app.server_names.iter().map(|name| Self::Give(name.clone(), Arc::clone(tenant)))
    }

    fn take<'a>(app: &'a App, tenant: &'a Arc<T>) -> impl Iterator<Item = Self> + 'a {
        app.server_names.iter().map(|name| Self::Take(name.clone(), Arc::clone(tenant)))
    }
}

#[derive(Debug)]
struct Known<T> {
    app: Arc<App>,
    tenant: Arc<T>,
    rev: u64,
}

impl<T: Tenant> Default for CmCache<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Tenant> CmCache<T> {
    /// An empty cache, as before the first sync.
    #[must_use]
    pub fn new() -> Self {
        let hasher = RandomState::new();
        let empty = || ArcSwap::from_pointee(Shard::empty(&hasher));
        let shards = (0..SHARDS).map(|_| empty()).collect();
        let writer =
            Writer { apps: HashMap::new(), seen: None, edits: Vec::new(), doubted: Vec::new(), version: 0 };
        Self { shards, hasher, writer: Mutex::new(writer) }
    }

    /// Whose requests for `host` are (canonical, see [`canonical_host`]): the exact name's, else the longest wildcard's.
    #[must_use]
    pub fn lookup(&self, host: &str) -> Option<Arc<T>> {
        if let Some(tenant) = self.shard(host).load().exact.get(host) {
            return Some(Arc::clone(tenant));
        }
        let mut rest = host;
        while let Some((_, zone)) = rest.split_once('.') {
            if let Some(tenant) = self.shard(zone).load().wildcard.get(zone) {
                return Some(Arc::clone(tenant));
            }
            rest = zone;
        }
        None
    }

    /// The app of that name.
    #[must_use]
    pub fn find(&self, app: &AppName) -> Option<Arc<T>> {
        self.writer().apps.get(app).map(|known| Arc::clone(&known.tenant))
    }

    /// Every app, in no order; for the last-known-good file.
    #[must_use]
    pub fn apps(&self) -> Vec<Arc<App>> {
        self.writer().apps.values().map(|known| Arc::clone(&known.app)).collect()
    }

    /// Rises with each change of what [`CmCache::apps`] returns.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.writer().version
    }

    /// A new watch begins: it brings all that there is, and [`Change::Synced`] ends that.
    pub fn begin_sync(&self) {
        self.writer().seen = Some(HashSet::new());
    }

    /// Takes in one step of a watch.
    pub fn apply(&self, change: Change) {
        let mut writer = self.writer();
        match change {
            Change::Put { app, record } => {
                if let Some(seen) = &mut writer.seen {
                    seen.insert(app.name.clone());
                }
                writer.doubted.retain(|doubted| *doubted != app.name);
                writer.put(app, record);
            }
            Change::Removed(name) => writer.remove(&name),
            // Of no matter for routes by name; whoever forwards to other hosts keeps them.
            Change::Nodes(_) => {}
            Change::Synced => {
                let seen = writer.seen.take().unwrap_or_default();
                writer.remove_unseen(&seen);
            }
        }
        if writer.seen.is_none() {
            self.publish(&mut writer);
        }
    }

    /// The operator says that a distrusted mass removal was meant; returns how many apps it removed.
    pub fn confirm_removals(&self) -> usize {
        let mut writer = self.writer();
        let doubted = std::mem::take(&mut writer.doubted);
        for name in &doubted {
            writer.remove(name);
        }
        self.publish(&mut writer);
        doubted.len()
    }

    fn publish(&self, writer: &mut Writer<T>) {
        let mut by_shard: HashMap<usize, Vec<Edit<T>>> = HashMap::new();
        for edit in writer.edits.drain(..) {
            by_shard.entry(self.index(key(edit.pattern()))).or_default().push(edit);
        }
        for (index, edits) in by_shard {
            let mut shard = Shard::clone(&self.shards[index].load());
            for edit in edits {
                shard.edit(edit);
            }
            self.shards[index].store(Arc::new(shard));
        }
    }

    fn shard(&self, key: &str) -> &ArcSwap<Shard<T>> {
        &self.shards[self.index(key)]
    }

    fn index(&self, key: &str) -> usize {
        // The top bits: the maps use the lower ones.
        usize::try_from(self.hasher.hash_one(key) >> 58).unwrap_or(0) % SHARDS
    }

    fn writer(&self) -> MutexGuard<'_, Writer<T>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Tenant> Writer<T> {
    fn put(&mut self, app: Arc<App>, record: Arc<AppRecord>) {
        let Some(known) = self.apps.get_mut(&app.name) else {
            let tenant = Arc::new(T::new(Arc::clone(&app), Arc::clone(&record)));
            self.edits.extend(Edit::give(&app, &tenant));
            self.version += 1;
            self.apps.insert(app.name.clone(), Known { app, tenant, rev: record.rev });
            return;
        };
        if *known.app != *app {
            self.version += 1;
            if known.app.server_names != app.server_names {
                self.edits.extend(Edit::take(&known.app, &known.tenant));
                self.edits.extend(Edit::give(&app, &known.tenant));
            }
        }
        known.app = Arc::clone(&app);
        known.rev = record.rev;
        known.tenant.update(app, record);
    }

    fn remove(&mut self, name: &AppName) {
        if let Some(known) = self.apps.remove(name) {
            self.edits.extend(Edit::take(&known.app, &known.tenant));
            self.version += 1;
            known.tenant.removed();
        }
    }

    fn remove_unseen(&mut self, seen: &HashSet<AppName>) {
        let gone: Vec<AppName> = self.apps.keys().filter(|name| !seen.contains(name)).cloned().collect();
        if is_mishap(gone.len(), self.apps.len()) {
            tracing::error!(
                "the CMDB has lost {} of {} apps at once; they are kept until the operator confirms their removal",
                gone.len(),
                self.apps.len()
            );
            self.doubted = gone;
            return;
        }
        for name in gone {
            self.remove(&name);
        }
    }
}

impl<T> Shard<T> {
    fn empty(hasher: &RandomState) -> Self {
        let map = || HashMap::with_hasher(hasher.clone());
        Self { exact: map(), wildcard: map() }
    }

    fn edit(&mut self, edit: Edit<T>) {
        match edit {
            Edit::Give(HostPattern::Exact(name), tenant) => drop(self.exact.insert(name, tenant)),
            Edit::Give(HostPattern::Wildcard(zone), tenant) => drop(self.wildcard.insert(zone, tenant)),
            Edit::Take(HostPattern::Exact(name), tenant) => take(&mut self.exact, &name, &tenant),
            Edit::Take(HostPattern::Wildcard(zone), tenant) => take(&mut self.wildcard, &zone, &tenant),
        }
    }
}

fn take<T>(map: &mut HashMap<Box<str>, Arc<T>, RandomState>, key: &str, from: &Arc<T>) {
    if map.get(key).is_some_and(|owner| Arc::ptr_eq(owner, from)) {
        map.remove(key);
    }
}

impl<T> Clone for Shard<T> {
    fn clone(&self) -> Self {
        Self { exact: self.exact.clone(), wildcard: self.wildcard.clone() }
    }
}

fn key(pattern: &HostPattern) -> &str {
    match pattern {
        HostPattern::Exact(name) | HostPattern::Wildcard(name) => name,
    }
}
