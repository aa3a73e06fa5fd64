//! The mirror of a CMDB in Redis, what it was made from, and what Redis has yet to be told.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

use tokio::sync::mpsc;

use super::{
    heartbeats::{Drain, Heartbeats, News},
    remembered::{Identity, Known, Remembered},
    stored::Stored,
};
use crate::{
    app::{App, AppName, HostPattern},
    compute::Nodes,
    instance::Generation,
    mirror::{Mirror, is_mishap, unix_ms},
    store::{Change, StoreError},
    transition::{AppRecord, Outcome, Transition},
};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct State {
    mirror: Mirror,
    /// Who is there.
    pub(super) heartbeats: Heartbeats,
    /// What Redis holds, as far as is known; also of apps that were removed.
    known: HashMap<AppName, Stored>,
    /// Apps whose record here is ahead of what Redis holds, with the number of the last change.
    untold: HashMap<AppName, u64>,
    changes: u64,
    /// Generations that were given out here while Redis was away, and by another host, too, which has told of it first:
    /// whoever runs one here may say nothing more of it.
    disowned: HashSet<(AppName, Generation)>,
    /// Apps of which a server-name is another's: each gets its names when the other leaves them.
    shadowed: HashSet<AppName>,
    /// The Redis with which all this was last compared.
    pub(super) identity: Identity,
    /// The server's clock (ms since the Unix epoch) at a moment of ours.
    clock: Option<(Instant, u64)>,
}

/// What Redis must be told of an app.
pub(super) struct Untold {
    /// Its instances as they are here.
    pub(super) record: Arc<AppRecord>,
    /// Its configuration as it is here, should Redis have lost it.
    pub(super) spec: Arc<App>,
    /// Revision of the configuration that Redis had, once.
    pub(super) srev: u64,
    /// Number of the last change.
    pub(super) stamp: u64,
}

impl State {
    /// `own`: the host on which this process runs instances.
    pub(super) fn new(own: Option<&str>) -> Self {
        Self { heartbeats: Heartbeats::new(own.map(str::to_owned)), ..Self::default() }
    }

    /// The hosts are these. Returns what Redis has to be told of them.
    pub(super) fn take_hosts(&mut self, news: News) -> Vec<(String, Drain)> {
        self.mirror.set_nodes(news.nodes, news.noticeable);
        news.forgotten
    }

    pub(super) fn get(&self, app: &AppName) -> Option<(Arc<App>, Arc<AppRecord>)> {
        self.mirror.get(app).map(|e| (Arc::clone(&e.app), Arc::clone(&e.record)))
    }

    pub(super) fn list(&self) -> Vec<(Arc<App>, Arc<AppRecord>)> {
        self.mirror.entries().map(|e| (Arc::clone(&e.app), Arc::clone(&e.record))).collect()
    }

    pub(super) fn nodes(&self) -> Nodes {
        self.mirror.nodes()
    }

    pub(super) fn watch(&mut self) -> mpsc::Receiver<Change> {
        self.mirror.watch()
    }

    /// Takes in what was known when this process last ran. Anything that Redis has of an app takes its place.
    pub(super) fn recall(&mut self, remembered: Remembered) {
        self.identity = remembered.identity;
        for known in remembered.apps {
            let name = known.app.name.clone();
            self.install_whatever(&name, known.into_stored());
        }
        let news = self.heartbeats.recall(&remembered.nodes, tokio::time::Instant::now());
        self.take_hosts(news);
    }

    /// What is known now, for the next start.
    pub(super) fn remember(&self) -> Remembered {
        let known = |stored: &Stored| {
            let (rev, srev) = (stored.rev.clone(), stored.srev.clone());
            Some(Known { rev, srev, record: Arc::clone(&stored.record), app: stored.app.clone()? })
        };
        Remembered {
            identity: self.identity.clone(),
            apps: self.known.values().filter_map(known).collect(),
            nodes: self.nodes(),
            number: 0,
        }
    }

    /// Rises with all that others are told.
    pub(super) fn version(&self) -> u64 {
        self.mirror.version()
    }

    pub(super) fn check_names(&self, app: &App) -> Result<(), StoreError> {
        self.mirror.check_names(app)
    }

    pub(super) fn has_name(&self, app: &AppName, name: &HostPattern) -> bool {
        self.mirror.get(app).is_some_and(|entry| entry.app.server_names.contains(name))
    }

    pub(super) fn known(&self, app: &AppName) -> Option<&Stored> {
        self.known.get(app)
    }

    /// The server's clock, ms since the Unix epoch; our own where it has not told it yet.
    pub(super) fn now_ms(&self) -> u64 {
        match self.clock {
            Some((at, server)) => server + u64::try_from(at.elapsed().as_millis()).unwrap_or(0),
            None => unix_ms(),
        }
    }

    pub(super) fn set_clock(&mut self, server_ms: u64) {
        self.clock = Some((Instant::now(), server_ms));
    }

    /// Above the one before it, and above any that was forgotten with an expired key.
    pub(super) fn next_spec_revision(&self, app: &AppName) -> String {
        let last = self.known.get(app).map_or(0, Stored::spec_revision);
        (last + 1).max(self.now_ms()).to_string()
    }

    /// We have written this.
    pub(super) fn took(&mut self, app: &AppName, written: Stored) {
        let record = Arc::clone(&written.record);
        if self.install(app, written) && self.untold.contains_key(app) {
            // What is still to be told is told with this change, which is as much ours.
            self.mirror.set_record(app, record);
        }
    }

    /// Redis holds this. Returns `false`, and does nothing, when something newer is known: revisions only rise.
    pub(super) fn install(&mut self, app: &AppName, theirs: Stored) -> bool {
        if let Some(known) = self.known.get(app) {
            let older =
                theirs.record.rev < known.record.rev || theirs.spec_revision() < known.spec_revision();
            if older {
                return false;
            }
            if theirs.rev == known.rev && theirs.srev == known.srev {
                return true;
            }
        }
        self.install_whatever(app, theirs);
        true
    }

    /// Redis holds this, be it older than what was known: it was restored, or its primary changed.
    pub(super) fn install_whatever(&mut self, app: &AppName, theirs: Stored) {
        let record = match self.mirror.get(app) {
            // What runs here is ours to tell.
            Some(mine) if self.untold.contains_key(app) => Arc::clone(&mine.record),
            _ => Arc::clone(&theirs.record),
        };
        match theirs.app.clone() {
            Some(spec) => self.show(spec, record),
            None => self.hide(app),
        }
        self.known.insert(app.clone(), theirs);
    }

    /// The app is not in Redis at all.
    pub(super) fn forget(&mut self, app: &AppName) {
        self.known.remove(app);
        self.hide(app);
    }

    /// A change that Redis must be told; `record`: what it is now, where it changed here.
    pub(super) fn set_untold(&mut self, app: &AppName, record: Option<Arc<AppRecord>>) {
        self.changes += 1;
        self.untold.insert(app.clone(), self.changes);
        if let Some(record) = record {
            self.mirror.set_record(app, record);
        }
    }

    pub(super) fn is_untold(&self, app: &AppName) -> bool {
        self.untold.contains_key(app)
    }

    pub(super) fn all_untold(&self) -> Vec<AppName> {
        self.untold.keys().cloned().collect()
    }

    pub(super) fn untold(&self, app: &AppName) -> Option<Untold> {
        let stamp = *self.untold.get(app)?;
        let known = self.known.get(app);
        let (shown, record) = self.get(app)?;
        let spec = known.and_then(|known| known.app.clone()).unwrap_or(shown);
        Some(Untold { record, spec, srev: known.map_or(0, Stored::spec_revision), stamp })
    }

    /// Redis has been told, and holds this now. What has changed since then is still to be told.
    pub(super) fn settle(&mut self, app: &AppName, stamp: u64, settled: Stored, disowned: Vec<Generation>) {
        for generation in disowned {
            tracing::warn!(%app, %generation, "two hosts that were apart gave out one generation; this one ends its instance");
            self.disowned.insert((app.clone(), generation));
        }
        if self.untold.get(app) == Some(&stamp) {
            self.untold.remove(app);
        }
        // Not if somebody has been faster since.
        self.install(app, settled);
    }

    /// The answer to a transition of an instance that is another host's now.
    pub(super) fn refused(&self, app: &AppName, transition: &Transition) -> Option<(Outcome, AppRecord)> {
        let generation = transition.generation()?;
        if self.disowned.is_empty() || !self.disowned.contains(&(app.clone(), generation)) {
            return None;
        }
        let record = self.mirror.get(app).map(|entry| AppRecord::clone(&entry.record));
        Some((Outcome::Fenced, record.unwrap_or_default()))
    }

    /// Apps that a whole reading of Redis has not `seen`.
    pub(super) fn missing(&self, seen: &HashSet<AppName>) -> Vec<AppName> {
        self.mirror.entries().map(|e| &e.app.name).filter(|name| !seen.contains(*name)).cloned().collect()
    }

    /// Whether the loss of these apps at once is more likely a mishap than somebody's wish.
    pub(super) fn is_mishap(&self, gone: &[AppName]) -> bool {
        let shown = gone.iter().filter(|app| self.mirror.get(app).is_some()).count();
        is_mishap(shown, self.mirror.entries().count())
    }

    /// Whether a restored Redis lacks something of an app that is known here: its configuration is older, or what `node`
    /// runs is not as it is.
    pub(super) fn knows_better(&self, app: &AppName, theirs: &Stored, node: Option<&str>) -> bool {
        let (Some(mine), Some(known)) = (self.mirror.get(app), self.known.get(app)) else { return false };
        let on_node = |record: &AppRecord| {
            let here = record.instances.values().filter(|i| Some(i.node.as_str()) == node);
            here.cloned().collect::<Vec<_>>()
        };
        theirs.spec_revision() < known.spec_revision()
            || on_node(&mine.record) != on_node(&theirs.record)
            || mine.record.generation > theirs.record.generation
    }

    fn show(&mut self, app: Arc<App>, record: Arc<AppRecord>) {
        let names = |mirror: &Mirror| mirror.get(&app.name).map(|e| e.app.server_names.clone());
        let before = names(&self.mirror);
        let shown = self.without_names_of_others(&app);
        if let Err(error) = self.mirror.put_both(shown, record) {
            tracing::error!(app = %app.name, %error, "an app of the CMDB is left as it was");
        }
        if before.is_some_and(|before| before != app.server_names) {
            self.show_shadowed();
        }
    }

    fn hide(&mut self, app: &AppName) {
        self.shadowed.remove(app);
        self.untold.remove(app);
        if self.mirror.remove(app).is_some() {
            self.show_shadowed();
        }
    }

    /// Whoever had a name first keeps it.
    fn without_names_of_others(&mut self, app: &Arc<App>) -> Arc<App> {
        let Err(error) = self.mirror.check_names(app) else {
            self.shadowed.remove(&app.name);
            return Arc::clone(app);
        };
        if self.shadowed.insert(app.name.clone()) {
            tracing::error!(app = %app.name, %error, "two apps of the CMDB claim one server-name; the first keeps it");
        }
        let mut shown = App::clone(app);
        shown.server_names.retain(|name| {
            let one = App { server_names: vec![name.clone()], ..App::clone(app) };
            self.mirror.check_names(&one).is_ok()
        });
        Arc::new(shown)
    }

    fn show_shadowed(&mut self) {
        for name in std::mem::take(&mut self.shadowed) {
            let spec = self.known.get(&name).and_then(|known| known.app.clone());
            let record = self.mirror.get(&name).map(|entry| Arc::clone(&entry.record));
            if let (Some(spec), Some(record)) = (spec, record) {
                let shown = self.without_names_of_others(&spec);
                let _ = self.mirror.put_both(shown, record);
            }
        }
    }
}
