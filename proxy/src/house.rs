//! What all apps of one proxy share.

use std::{
    cell::RefCell,
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic::AtomicBool},
    time::Instant,
};

use cmdb::{AppName, cache::CmCache, compute::Nodes};
use crossbeam_queue::SegQueue;
use tokio::sync::mpsc;

use crate::{
    bill::Bills,
    config::Config,
    hold::Seats,
    link::Command,
    measure,
    metrics::Metrics,
    nodes::Hosts,
    telemetry::Telemetry,
    tenant::{Answer, AppRuntime, AppTenant},
    upstream::Upstream,
    wake::Errands,
};

/// What all apps of one proxy share.
#[derive(Debug)]
pub struct House {
    /// The settings.
    pub config: Config,
    /// Host name → app.
    pub cache: CmCache<AppTenant>,
    /// Who waits, in all apps together.
    pub seats: Arc<Seats<Answer>>,
    /// Instances with activity that the reporter does not know yet.
    pub active: SegQueue<Arc<Upstream>>,
    /// Figures for Prometheus.
    pub metrics: Metrics,
    /// Access log and recent requests.
    pub telemetry: Telemetry,
    /// When the windows' clock began.
    pub begun: Instant,
    /// Whether the launcher can be reached.
    pub linked: AtomicBool,
    /// Whether the launcher has confirmed the routing state since the connection to it was made.
    pub synced: AtomicBool,
    /// Whether the routing state is known (from the launcher, or the last known good).
    pub informed: AtomicBool,
    /// Whether the proxy is about to end: nobody may begin to wait.
    pub stopping: AtomicBool,
    /// What each app's visitors did.
    pub bills: Bills,
    /// The hosts.
    pub hosts: Hosts,
    /// Wakes that other hosts have asked for.
    pub errands: Errands,
    pub(crate) commands: mpsc::UnboundedSender<Command>,
    tenants: Mutex<HashMap<AppName, Weak<AppRuntime>>>,
}

thread_local! {
    /// In which house the cache makes tenants; the cache's `Tenant::new` has no room for it.
    static HOUSE: RefCell<Option<Arc<House>>> = const { RefCell::new(None) };
}

impl House {
    /// A house without apps, and where its commands to the launcher come out.
    #[must_use]
    pub fn new(config: Config, cache: CmCache<AppTenant>) -> (Arc<Self>, mpsc::UnboundedReceiver<Command>) {
        let (commands, receiver) = mpsc::unbounded_channel();
        let begun = Instant::now();
        let house = Self {
            hosts: Hosts::new(&config, begun),
            errands: Errands::default(),
            seats: Seats::new(config.hold_limit),
            cache,
            active: SegQueue::new(),
            metrics: Metrics::default(),
            telemetry: Telemetry::new(config.access_log),
            begun,
            linked: AtomicBool::new(false),
            synced: AtomicBool::new(false),
            informed: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            bills: Bills::default(),
            commands,
            tenants: Mutex::new(HashMap::new()),
            config,
        };
        (Arc::new(house), receiver)
    }

    /// Runs `change`, which may have the cache make tenants, so that they belong to this house.
    pub fn admit<R>(self: &Arc<Self>, change: impl FnOnce(&CmCache<AppTenant>) -> R) -> R {
        let before = HOUSE.replace(Some(Arc::clone(self)));
        let result = change(&self.cache);
        HOUSE.set(before);
        result
    }

    /// All apps.
    #[must_use]
    pub fn apps(&self) -> Vec<Arc<AppRuntime>> {
        self.tenants().values().filter_map(Weak::upgrade).collect()
    }

    /// The app of that name.
    #[must_use]
    pub fn app(&self, name: &AppName) -> Option<Arc<AppRuntime>> {
        self.tenants().get(name).and_then(Weak::upgrade)
    }

    /// The tick of the windows' clock at `now`.
    #[must_use]
    pub fn tick(&self, now: Instant) -> u64 {
        measure::tick(now.duration_since(self.begun))
    }

    /// The hosts are these from now on.
    pub fn learn_hosts(&self, nodes: Nodes) {
        self.hosts.learn(nodes);
        // Whoever waits for an instance of one that has died waits for another from now on.
        self.apps().iter().filter(|app| app.is_waited_for()).for_each(AppRuntime::knock);
    }

    /// Sends the launcher something, by way of the link.
    pub fn command(&self, command: Command) {
        // The link outlives all requests; when it is gone, so is the proxy.
        let _ = self.commands.send(command);
    }

    pub(crate) fn tenants(&self) -> MutexGuard<'_, HashMap<AppName, Weak<AppRuntime>>> {
        self.tenants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The house whose [`Self::admit`] is under way.
    pub(crate) fn admitting() -> Option<Arc<Self>> {
        HOUSE.with_borrow(Clone::clone)
    }
}
