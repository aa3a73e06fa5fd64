//! What all parts of the daemon share: the store, the spawner, cgroups, images, and who is connected.

use std::{
    collections::{BTreeSet, HashMap},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use cmdb::{App, AppName, Generation, InstanceId, Store, redis::DEAD_AFTER};
use launcher_client::wire::{Refusal, RefusalCode};
use tokio::sync::mpsc;

use crate::{
    cgroup::Cgroups,
    events::Events,
    faults::Faults,
    governor::Governor,
    hooks::Hooks,
    image::ImageStore,
    instance::Live,
    keeper::{Keeper, KeeperEvent},
    ledger::Ledger,
    metrics::Metrics,
    monitor::HostMeter,
    network::NetNs,
    outbound::{self, Outbound},
    overrides::Overrides,
    provision::Provisioner,
    sandbox::ContainerId,
    supervisor::{Message, Supervisor},
};

/// First host id of the ranges that user namespaces map; above what distributions give to people and services, below
/// 2³¹ for the sake of programs that keep ids in signed integers.
const ID_FLOOR: u32 = 0x4000_0000;
/// Ids in a range.
const ID_RANGE: u32 = 0x1_0000;
/// Ranges that there are.
const ID_RANGES: u32 = 0x3fff;

/// What a proxy could not reach is of no interest after this time.
pub const UNREACHED_FOR: Duration = Duration::from_secs(30);
/// Most hosts that a proxy may name at a time.
const UNREACHED_MAX: usize = 1_000;

/// Shared by every task of the daemon.
#[derive(Debug)]
pub struct Host {
    /// This host's name in the CMDB.
    pub node: String,
    /// The CMDB is that of several hosts.
    pub several: bool,
    /// The CMDB.
    pub store: Arc<dyn Store>,
    /// Makes containers.
    pub keeper: Keeper,
    /// Limits them.
    pub cgroups: Cgroups,
    /// Where their files come from.
    pub images: ImageStore,
    /// Makes sockets in their network namespaces.
    pub netns: NetNs,
    /// What happened.
    pub events: Arc<Events>,
    /// What was used.
    pub ledger: Ledger,
    /// The network of those that may connect out.
    pub outbound: Outbound,
    /// Runs provisioning steps.
    pub provisioner: Provisioner,
    /// Runs the operator's programs.
    pub hooks: Arc<Hooks>,
    /// An empty directory on which each container stages its root, in its own mount namespace.
    pub staging: PathBuf,
    /// The DataPool; `None` where none is configured.
    pub datapool: Option<PathBuf>,
    /// Events of the spawner find their instance's task here.
    pub routes: Mutex<HashMap<ContainerId, mpsc::UnboundedSender<KeeperEvent>>>,
    /// Instances that listen.
    pub live: Mutex<HashMap<InstanceId, Arc<Live>>>,
    /// Starts that fail on purpose; none but in tests.
    pub faults: Faults,
    /// Proxies that serve traffic now.
    pub watchers: Watchers,
    /// How busy this host is.
    pub meter: HostMeter,
    /// Admits starts.
    pub governor: Arc<Governor>,
    /// What the operator has set in place of vhost files.
    pub overrides: Overrides,
    /// What is counted.
    pub metrics: Metrics,
    /// When this daemon began, ms since the Unix epoch.
    pub begun_unix_ms: u64,
    /// When the heartbeat was sent that the CMDB acknowledged last; before the first one, when this daemon began.
    heard: Mutex<Instant>,
    /// When a proxy could not reach other hosts, last.
    unreached: Mutex<HashMap<String, Instant>>,
    /// Since when other hosts are thought dead.
    lost_since: Mutex<HashMap<String, Instant>>,
    supervisors: Mutex<HashMap<AppName, mpsc::UnboundedSender<Message>>>,
    ids: Mutex<IdRanges>,
    ending: std::sync::atomic::AtomicBool,
}

/// The connections of proxies that serve traffic: an instance that drains waits for each of them.
#[derive(Debug, Default)]
pub struct Watchers {
    next: AtomicU64,
    present: Mutex<BTreeSet<u64>>,
}

/// Ranges of ids, one for each app, kept for the daemon's life.
#[derive(Debug, Default)]
struct IdRanges {
    by_app: HashMap<AppName, u32>,
    free: Vec<u32>,
    next: u32,
}

/// What a [`Host`] is made of.
#[derive(Debug)]
pub struct Parts {
    /// See [`Host::node`].
    pub node: String,
    /// See [`Host::several`].
    pub several: bool,
    /// See [`Host::store`].
    pub store: Arc<dyn Store>,
    /// See [`Host::keeper`].
    pub keeper: Keeper,
    /// See [`Host::cgroups`].
    pub cgroups: Cgroups,
    /// See [`Host::images`].
    pub images: ImageStore,
    /// See [`Host::events`].
    pub events: Arc<Events>,
    /// See [`Host::ledger`].
    pub ledger: Ledger,
    /// See [`Host::hooks`].
    pub hooks: Hooks,
    /// See [`Host::staging`].
    pub staging: PathBuf,
    /// See [`Host::datapool`].
    pub datapool: Option<PathBuf>,
    /// See [`Host::governor`].
    pub governor: Arc<Governor>,
    /// See [`Host::overrides`].
    pub overrides: Overrides,
    /// How [`Host::outbound`] is to be done.
    pub outbound: outbound::Config,
}

impl Host {
    /// Puts the parts together.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        Self {
            node: parts.node,
            several: parts.several,
            heard: Mutex::new(Instant::now()),
            unreached: Mutex::default(),
            lost_since: Mutex::default(),
            begun_unix_ms: crate::clock::unix_ms(),
            store: parts.store,
            keeper: parts.keeper,
            cgroups: parts.cgroups,
            images: parts.images,
            netns: NetNs::new(),
            ledger: parts.ledger,
            outbound: Outbound::new(parts.outbound, Arc::clone(&parts.events)),
            events: parts.events,
            provisioner: Provisioner::default(),
            hooks: Arc::new(parts.hooks),
            staging: parts.staging,
            datapool: parts.datapool,
            routes: Mutex::default(),
            live: Mutex::default(),
            faults: Faults::from_env(),
            watchers: Watchers::default(),
            meter: HostMeter::default(),
            governor: parts.governor,
            overrides: parts.overrides,
            metrics: Metrics::default(),
            supervisors: Mutex::default(),
            ids: Mutex::default(),
            ending: std::sync::atomic::AtomicBool::new(false),
        }
    }

    /// The supervisor of `app`, begun if need be.
    ///
    /// # Errors
    /// No such app, or the launcher is ending.
    pub fn supervisor(self: &Arc<Self>, app: &AppName) -> Result<mpsc::UnboundedSender<Message>, Refusal> {
        let mut supervisors = lock(&self.supervisors);
        if self.ending.load(Ordering::SeqCst) {
            return Err(Refusal::new(RefusalCode::Busy, "the launcher is ending"));
        }
        if let Some(sender) = supervisors.get(app).filter(|s| !s.is_closed()) {
            return Ok(sender.clone());
        }
        let Some((spec, _)) = self.store.get(app) else {
            return Err(Refusal::new(RefusalCode::UnknownApp, format!("no app is called \"{app}\"")));
        };
        let sender = Supervisor::begin(Arc::clone(self), spec);
        supervisors.insert(app.clone(), sender.clone());
        Ok(sender)
    }

    /// Names of other hosts that are thought dead.
    pub fn lost(&self) -> Vec<String> {
        self.lost_for(Duration::ZERO)
    }

    /// Names of other hosts that have been thought dead for so long. A host that is itself not heard knows nothing of others,
    /// and gives nobody up.
    pub fn lost_for(&self, time: Duration) -> Vec<String> {
        if !self.several || self.unheard_for() > DEAD_AFTER {
            return Vec::new();
        }
        let mut lost = cmdb::compute::lost(&self.store.nodes());
        let since = lock(&self.lost_since);
        let long = |node: &String| time.is_zero() || since.get(node).is_some_and(|at| at.elapsed() >= time);
        lost.retain(|node| *node != self.node && long(node));
        lost
    }

    /// A proxy could not reach these hosts a moment ago.
    pub fn cannot_reach(&self, nodes: impl IntoIterator<Item = String>) {
        let mut unreached = lock(&self.unreached);
        unreached.retain(|_, at| at.elapsed() < UNREACHED_FOR);
        unreached.extend(nodes.into_iter().take(UNREACHED_MAX).map(|node| (node, Instant::now())));
    }

    /// Whether a proxy could not reach that host within so long.
    pub fn could_not_reach(&self, node: &str, within: Duration) -> bool {
        lock(&self.unreached).get(node).is_some_and(|at| at.elapsed() < within)
    }

    /// These are the hosts that are thought dead now.
    pub fn are_lost(&self, lost: &[String]) {
        let mut since = lock(&self.lost_since);
        since.retain(|node, _| lost.contains(node));
        for node in lost {
            since.entry(node.clone()).or_insert_with(Instant::now);
        }
    }

    /// The CMDB has acknowledged the heartbeat that was sent then.
    pub fn heard_at(&self, sent: Instant) {
        *lock(&self.heard) = sent;
    }

    /// How long the CMDB has acknowledged no heartbeat.
    pub fn unheard_for(&self) -> Duration {
        lock(&self.heard).elapsed()
    }

    /// Whether instances of `app` are to run though nobody asks for it.
    pub fn keeps_instances(&self, app: &App) -> bool {
        self.overrides.of(&app.name).of_file(app).scale.min > 0
    }

    /// The supervisor of `app` if it has begun.
    pub fn running_supervisor(&self, app: &AppName) -> Option<mpsc::UnboundedSender<Message>> {
        lock(&self.supervisors).get(app).filter(|s| !s.is_closed()).cloned()
    }

    /// Every supervisor that has begun.
    pub fn supervisors(&self) -> Vec<mpsc::UnboundedSender<Message>> {
        lock(&self.supervisors).values().cloned().collect()
    }

    /// Whether nothing is to begin any more.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// No supervisor begins from now on.
    pub fn end(&self) {
        let _order = lock(&self.supervisors);
        self.ending.store(true, Ordering::SeqCst);
    }

    /// The instance, if it listens.
    pub fn live(&self, app: &AppName, generation: Generation) -> Option<Arc<Live>> {
        lock(&self.live).get(&InstanceId { app: app.clone(), generation }).cloned()
    }

    /// First id of the range of `app`, given to it for the daemon's life.
    pub fn id_base(&self, app: &AppName) -> Option<u32> {
        let mut ids = lock(&self.ids);
        if let Some(range) = ids.by_app.get(app) {
            return Some(ID_FLOOR + range * ID_RANGE);
        }
        let range = match ids.free.pop() {
            Some(range) => range,
            None if ids.next < ID_RANGES => {
                ids.next += 1;
                ids.next - 1
            }
            None => return None,
        };
        ids.by_app.insert(app.clone(), range);
        Some(ID_FLOOR + range * ID_RANGE)
    }

    /// The range that begins at `base` is that app's already: an instance of an earlier daemon runs with it. `false`
    /// when it is none of ours, or another app's.
    pub fn claim_ids(&self, app: &AppName, base: u32) -> bool {
        let Some(range) = base.checked_sub(ID_FLOOR).filter(|offset| offset.is_multiple_of(ID_RANGE)) else {
            return false;
        };
        let range = range / ID_RANGE;
        let mut ids = lock(&self.ids);
        if let Some(own) = ids.by_app.get(app) {
            return *own == range;
        }
        if range >= ID_RANGES || ids.by_app.values().any(|other| *other == range) {
            return false;
        }
        while ids.next <= range {
            let skipped = ids.next;
            ids.free.push(skipped);
            ids.next += 1;
        }
        ids.free.retain(|free| *free != range);
        ids.by_app.insert(app.clone(), range);
        true
    }

    /// The app is gone and nothing of it runs: its ids may be another's.
    pub fn free_ids(&self, app: &AppName) {
        let mut ids = lock(&self.ids);
        if let Some(range) = ids.by_app.remove(app) {
            ids.free.push(range);
        }
    }

    /// Hands an event of the spawner to the instance's task.
    pub fn route(&self, event: KeeperEvent) {
        let id = match &event {
            KeeperEvent::Execed { id, .. }
            | KeeperEvent::Failed { id, .. }
            | KeeperEvent::Listening { id, .. }
            | KeeperEvent::Exited { id, .. } => id.clone(),
            KeeperEvent::SpawnerLost => {
                let message = "the spawner died; a new one is being started; running apps go on";
                return self.events.emit("spawner-lost", None, None, message.into());
            }
            KeeperEvent::SpawnerBack => {
                let message = "a spawner answers again and has taken over the running apps";
                return self.events.emit("spawner-back", None, None, message.into());
            }
        };
        match lock(&self.routes).get(&id) {
            // The task ends only after `Exited`, so a closed channel means that nothing more is to be done.
            Some(task) => drop(task.send(event)),
            None => tracing::debug!(?event, "the spawner tells of a container that is nobody's"),
        }
    }
}

impl Watchers {
    /// A proxy that serves traffic has come; the number is its connection's name.
    pub fn add(&self) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        lock(&self.present).insert(id);
        id
    }

    /// It has gone.
    pub fn remove(&self, id: u64) {
        lock(&self.present).remove(&id);
    }

    /// Those present now.
    pub fn present(&self) -> BTreeSet<u64> {
        lock(&self.present).clone()
    }
}

/// A poisoned lock guards data that is whole all the same: each critical section here is one operation of a map.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
