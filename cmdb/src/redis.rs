//! The CMDB of many hosts: in Redis (6.2 or newer, or Valkey), mirrored in the memory of every process that uses it.
//!
//! One hash per app holds its spec and the record of its instances. Every change is decided by the one state machine
//! ([`crate::transition`]) on the mirror and carried out by one script that refuses when the hash is not as the mirror
//! thinks; then the mirror is corrected by what the script returned and the change decided again. So a transition costs
//! one round trip when nobody else was faster, and there is no second state machine in Lua that could differ.
//!
//! While Redis cannot be reached a launcher goes on with its own instances (law 1) and tells Redis afterwards; it is
//! the authority about what runs on its node (law 3), so whatever Redis has forgotten comes back.

mod address;
mod commands;
mod dirty;
mod follow;
mod heartbeats;
mod hosts;
mod mint;
mod remembered;
mod state;
mod stored;

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
};

use crate::{
    app::{App, AppName},
    compute::{Compute, Load, Nodes},
    fingerprint::fnv1a,
    instance::Generation,
    store::{Change, Store, StoreError},
    transition::{AppRecord, Outcome, Transition},
};
use address::Address;
pub use address::AddressError;
use commands::{Commands, Swap, Swapped};
use hosts::Hosts;
use state::State;
use stored::Stored;

/// How often a change is decided anew because somebody else was faster.
const ATTEMPTS: usize = 64;

/// How often a host tells that it is there.
pub const HEARTBEAT: Duration = Duration::from_millis(250);
/// A host whose heartbeat has not changed for so long is taken for dead.
pub const DEAD_AFTER: Duration = Duration::from_millis(1_500);
/// The longest that a request may be kept waiting by Redis; then its host goes on without.
pub const BUDGET: Duration = Duration::from_millis(150);

/// Apps share so many locks.
const TURNS: usize = 64;

/// What a process is to the CMDB.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Role {
    /// It only reads: a proxy.
    Reader,
    /// It brings the configuration: the CoreAPI.
    Configurer,
    /// It runs instances under this node name: a launcher.
    Node(String),
}

/// See the module.
#[derive(Debug)]
pub struct RedisStore {
    shared: Arc<Shared>,
    followers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    commands: Commands,
    hosts: Hosts,
    role: Role,
    state: Mutex<State>,
    link: watch::Sender<Link>,
    /// Something has changed here that Redis has not been told.
    untold: Notify,
    /// One change of an app at a time, of those that this process makes: from the moment when Redis has taken a change in
    /// until the mirror has, the two differ, and what is told in between would undo it.
    turns: Box<[tokio::sync::Mutex<()>]>,
}

/// How the mirror stands to Redis.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Link {
    /// The mirror has been filled at least once, from Redis or from what was remembered.
    pub filled: bool,
    /// It is told of every change at this time.
    pub connected: bool,
}

impl RedisStore {
    /// Begins to follow the CMDB at `address` (`redis://…`, `rediss://…`, `redis+unix://…`, `redis-sentinel://…`). Returns
    /// at once, whether Redis can be reached or not; see [`RedisStore::link`]. To be called within a tokio runtime.
    ///
    /// `budget`: the longest that one transition may wait for Redis, [`BUDGET`] for requests' sake.
    ///
    /// # Errors
    /// When the address cannot be understood.
    pub fn open(address: &str, role: Role, budget: Duration) -> Result<Self, AddressError> {
        Self::begin(address, role, budget, None)
    }

    /// As [`RedisStore::open`], and remembers in the file at `path` what it knows: apps, records and hosts. That is what the
    /// next start finds there, at once, whether Redis can be reached by then or not. Reads the file; blocks for that long.
    ///
    /// # Errors
    /// When the address cannot be understood. A file that cannot be used is as good as none.
    pub fn open_remembering(
        address: &str,
        role: Role,
        budget: Duration,
        path: &Path,
    ) -> Result<Self, AddressError> {
        Self::begin(address, role, budget, Some(path))
    }

    fn begin(address: &str, role: Role, budget: Duration, path: Option<&Path>) -> Result<Self, AddressError> {
        let shared = Arc::new(Shared {
            commands: Commands::new(Address::parse(address)?, budget),
            hosts: Hosts::new(Address::parse(address)?, role.node()),
            state: Mutex::new(State::new(role.node())),
            role,
            link: watch::Sender::default(),
            untold: Notify::new(),
            turns: (0..TURNS).map(|_| tokio::sync::Mutex::default()).collect(),
        });
        let mut followers = Vec::new();
        if let Some(path) = path {
            let remembered = remembered::read(path);
            if !remembered.apps.is_empty() {
                shared.hosts.set_number(remembered.number);
                shared.lock().recall(remembered);
                shared.link.send_modify(|link| link.filled = true);
            }
            followers.push(tokio::spawn(remembered::keep(Arc::clone(&shared), path.to_owned())));
        }
        followers.push(tokio::spawn(follow::follow(Arc::clone(&shared))));
        followers.push(tokio::spawn(hosts::follow(Arc::clone(&shared))));
        Ok(Self { shared, followers })
    }

    /// Follows how the mirror stands to Redis.
    #[must_use]
    pub fn link(&self) -> watch::Receiver<Link> {
        self.shared.link.subscribe()
    }
}

/// Whether an address can be understood, for those who open the store later.
///
/// # Errors
/// It cannot.
pub fn check(address: &str) -> Result<(), AddressError> {
    Address::parse(address).map(drop)
}

impl Drop for RedisStore {
    fn drop(&mut self) {
        self.followers.iter().for_each(JoinHandle::abort);
    }
}

#[async_trait]
impl Store for RedisStore {
    async fn apply(&self, app: &AppName, transition: Transition) -> Result<(Outcome, AppRecord), StoreError> {
        let _turn = self.shared.turn(app).await;
        match self.shared.apply(app, &transition).await {
            Err(StoreError::Unavailable(why)) => {
                let here = self.shared.apply_here(app, &transition);
                here.unwrap_or(Err(StoreError::Unavailable(why)))
            }
            done => done,
        }
    }

    async fn put_app(&self, app: App) -> Result<(), StoreError> {
        let app = Arc::new(app);
        let _turn = self.shared.turn(&app.name).await;
        self.shared.claim_names(&app).await?;
        let before = self.shared.lock().known(&app.name).and_then(|known| known.app.clone());
        self.shared.put_spec(&app).await?;
        for name in before.iter().flat_map(|before| &before.server_names) {
            if !app.server_names.contains(name) {
                self.shared.commands.give_back(name, &app.name).await?;
            }
        }
        Ok(())
    }

    async fn remove_app(&self, app: &AppName) -> Result<(), StoreError> {
        let _turn = self.shared.turn(app).await;
        let Some(removed) = self.shared.remove_spec(app).await? else { return Ok(()) };
        for name in &removed.server_names {
            self.shared.commands.give_back(name, app).await?;
        }
        Ok(())
    }

    /// Waits until the mirror has been filled.
    async fn watch(&self) -> Result<mpsc::Receiver<Change>, StoreError> {
        let ended = |_| StoreError::Unavailable("the CMDB is not followed any more".to_owned());
        self.shared.link.subscribe().wait_for(|link| link.filled).await.map_err(ended)?;
        Ok(self.shared.lock().watch())
    }

    fn get(&self, app: &AppName) -> Option<(Arc<App>, Arc<AppRecord>)> {
        self.shared.lock().get(app)
    }

    fn list(&self) -> Vec<(Arc<App>, Arc<AppRecord>)> {
        self.shared.lock().list()
    }

    /// Acknowledged by Redis when it returns. While Redis is away this host is known at least to its own process.
    async fn beat(&self, compute: &Compute, load: Load) -> Result<(), StoreError> {
        self.shared.beat(compute, load).await
    }

    async fn set_draining(&self, node: &str, draining: bool) -> Result<(), StoreError> {
        self.shared.set_draining(node, draining).await
    }

    async fn forget_node(&self, node: &str) -> Result<(), StoreError> {
        self.shared.forget_node(node).await
    }

    async fn confirm_removals(&self) -> Result<(), StoreError> {
        self.shared.commands.confirm_removals().await
    }

    fn nodes(&self) -> Nodes {
        self.shared.lock().nodes()
    }
}

impl Role {
    fn node(&self) -> Option<&str> {
        match self {
            Self::Node(node) => Some(node),
            Self::Reader | Self::Configurer => None,
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Poisoned by a panic between two map operations at worst: every entry is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be held while an app is changed.
    async fn turn(&self, app: &AppName) -> tokio::sync::MutexGuard<'_, ()> {
        let hash = fnv1a(app.as_str().as_bytes());
        self.turns[usize::try_from(hash % TURNS as u64).unwrap_or(0)].lock().await
    }

    fn node(&self) -> Option<&str> {
        self.role.node()
    }

    async fn apply(
        &self,
        app: &AppName,
        transition: &Transition,
    ) -> Result<(Outcome, AppRecord), StoreError> {
        if self.lock().is_untold(app) {
            self.tell(app).await?;
        }
        if let Some(refused) = self.lock().refused(app, transition) {
            return Ok(refused);
        }
        for _ in 0..ATTEMPTS {
            let from = self.known(app).await?;
            if from.app.is_none() {
                return Err(StoreError::UnknownApp(app.clone()));
            }
            let now_ms = self.lock().now_ms();
            let mut record = AppRecord::clone(&from.record);
            let outcome = self.decide(&mut record, transition, now_ms);
            // What is refused changes nothing; that it was rightly refused is confirmed all the same.
            let to = if record.rev == from.record.rev { Vec::new() } else { record_fields(app, &record)? };
            let swap = Swap { app, from: &from, now_ms: Some(now_ms), to };
            if self.swap(&swap).await? {
                if !swap.to.is_empty() {
                    let rev = record.rev.to_string();
                    let written = Stored { rev, record: Arc::new(record.clone()), ..from };
                    self.lock().took(app, written);
                }
                return Ok((outcome, record));
            }
        }
        Err(StoreError::Unavailable(format!("\"{app}\" changes too quickly to be changed")))
    }

    fn decide(&self, record: &mut AppRecord, transition: &Transition, now_ms: u64) -> Outcome {
        if matches!(transition, Transition::Wake { .. } | Transition::Add { .. }) {
            mint::prepare(record, self.hosts.number(), now_ms);
        }
        record.apply(transition, now_ms)
    }

    /// While Redis cannot be reached the node goes on by itself.
    fn apply_here(
        &self,
        app: &AppName,
        transition: &Transition,
    ) -> Option<Result<(Outcome, AppRecord), StoreError>> {
        let node = self.node()?;
        let mut state = self.lock();
        let Some((spec, record)) = state.get(app) else {
            return Some(Err(StoreError::UnknownApp(app.clone())));
        };
        if let Some(refused) = state.refused(app, transition) {
            return Some(Ok(refused));
        }
        let mut record = AppRecord::clone(&record);
        let rev = record.rev;
        if let Transition::Wake { node: on, .. } | Transition::Add { node: on, .. } = transition
            && on != node
        {
            let why = format!("\"{on}\" cannot be told to start anything while Redis is away");
            return Some(Err(StoreError::Unavailable(why)));
        }
        let outcome = self.decide(&mut record, transition, state.now_ms());
        let exclusive = spec.volumes.iter().any(|volume| volume.exclusive);
        if exclusive && matches!(outcome, Outcome::Own(_)) {
            // Nobody can know whether another host has it.
            let why = format!("\"{app}\" has an exclusive volume and does not start while Redis is away");
            return Some(Err(StoreError::Unavailable(why)));
        }
        if record.rev != rev {
            state.set_untold(app, Some(Arc::new(record.clone())));
            self.untold.notify_one();
        }
        Some(Ok((outcome, record)))
    }

    /// Tells Redis what has changed here while it could not be reached, or what it has lost. In the app's turn.
    async fn tell(&self, app: &AppName) -> Result<(), StoreError> {
        for _ in 0..ATTEMPTS {
            if !self.lock().is_untold(app) {
                return Ok(());
            }
            let theirs = self.read(app).await?;
            // Only now: what is told must not be older than what it takes the place of.
            let Some(untold) = self.lock().untold(app) else { return Ok(()) };
            let lost = theirs.spec_revision() < untold.srev;
            if theirs.app.is_none() && !lost {
                // It was removed meanwhile: what runs of it here is ended by whoever watches.
                self.lock().settle(app, untold.stamp, theirs, Vec::new());
                return Ok(());
            }
            let mut merged = AppRecord::clone(&theirs.record);
            let node = self.node().unwrap_or_default();
            merged.take_over(&untold.record, node);
            let disowned: Vec<Generation> = merged.disowned(&untold.record, node).collect();
            let mut to = record_fields(app, &merged)?;
            let mut settled =
                Stored { rev: merged.rev.to_string(), record: Arc::new(merged), ..theirs.clone() };
            if lost {
                settled.srev = self.lock().next_spec_revision(app);
                to.extend(spec_fields(&untold.spec, &settled.srev)?);
                settled.app = Some(untold.spec);
            }
            if self.swap(&Swap { app, from: &theirs, now_ms: None, to }).await? {
                self.lock().settle(app, untold.stamp, settled, disowned);
                return Ok(());
            }
        }
        Err(StoreError::Unavailable(format!("\"{app}\" changes too quickly to be told")))
    }

    async fn put_spec(&self, app: &Arc<App>) -> Result<(), StoreError> {
        for _ in 0..ATTEMPTS {
            let from = self.known(&app.name).await?;
            let srev = self.lock().next_spec_revision(&app.name);
            let to = spec_fields(app, &srev)?;
            if self.swap(&Swap { app: &app.name, from: &from, now_ms: None, to }).await? {
                let written = Stored { srev, app: Some(Arc::clone(app)), ..from };
                self.lock().took(&app.name, written);
                return Ok(());
            }
        }
        Err(StoreError::Unavailable(format!("\"{}\" changes too quickly to be put", app.name)))
    }

    /// What remains are the revisions and the highest generation: should the app come back, both go on rising.
    async fn remove_spec(&self, app: &AppName) -> Result<Option<Arc<App>>, StoreError> {
        for _ in 0..ATTEMPTS {
            let from = self.known(app).await?;
            let Some(removed) = from.app.clone() else { return Ok(None) };
            let record = AppRecord {
                rev: from.record.rev + 1,
                generation: from.record.generation,
                ..AppRecord::default()
            };
            let srev = self.lock().next_spec_revision(app);
            let mut to = record_fields(app, &record)?;
            to.extend([("spec", String::new()), ("srev", srev.clone())]);
            if self.swap(&Swap { app, from: &from, now_ms: None, to }).await? {
                let rev = record.rev.to_string();
                self.lock().took(app, Stored { rev, srev, record: Arc::new(record), app: None });
                return Ok(Some(removed));
            }
        }
        Err(StoreError::Unavailable(format!("\"{app}\" changes too quickly to be removed")))
    }

    /// Of two apps that ask for a name at once one is refused, whoever they ask.
    async fn claim_names(&self, app: &App) -> Result<(), StoreError> {
        self.lock().check_names(app)?;
        for name in &app.server_names {
            let mut owner = self.commands.claim(name, &app.name, None).await?;
            if owner != app.name.as_str() {
                // Claimed by an app that has left it, or never came to have it: its process ended in between.
                let left = owner.parse().ok().filter(|left| !self.lock().has_name(left, name));
                if let Some(left) = left {
                    owner = self.commands.claim(name, &app.name, Some(&left)).await?;
                }
            }
            if owner != app.name.as_str() {
                let owner = owner.parse().map_err(|_| StoreError::Corrupt {
                    app: app.name.to_string(),
                    reason: format!("the server-name \"{name}\" belongs to something that is no app"),
                })?;
                return Err(StoreError::DuplicateName {
                    name: name.to_string(),
                    app: app.name.clone(),
                    owner,
                });
            }
        }
        Ok(())
    }

    /// Carries out a swap; `false` when what is known had to be corrected first.
    async fn swap(&self, swap: &Swap<'_>) -> Result<bool, StoreError> {
        match self.commands.swap(swap).await? {
            Swapped::Done(now) => {
                self.lock().set_clock(now);
                Ok(true)
            }
            Swapped::Otherwise(now, fields) => {
                let theirs = decode(swap.app, &fields)?;
                let mut state = self.lock();
                state.set_clock(now);
                let same = theirs.rev == swap.from.rev && theirs.srev == swap.from.srev;
                let overtaken = state
                    .known(swap.app)
                    .is_some_and(|known| known.rev != swap.from.rev || known.srev != swap.from.srev);
                if !same && !overtaken && !state.install(swap.app, theirs) {
                    // Redis has forgotten what it had acknowledged; the follower will see that, and mend it.
                    return Err(StoreError::Unavailable("Redis has lost what it knew".to_owned()));
                }
                Ok(false)
            }
        }
    }

    /// The app's hash as the mirror knows it; as Redis does, where the mirror knows nothing.
    async fn known(&self, app: &AppName) -> Result<Stored, StoreError> {
        if let Some(known) = self.lock().known(app).cloned() {
            return Ok(known);
        }
        let theirs = self.read(app).await?;
        self.lock().install(app, theirs.clone());
        Ok(theirs)
    }

    async fn read(&self, app: &AppName) -> Result<Stored, StoreError> {
        decode(app, &self.commands.read(app).await?)
    }
}

fn decode(app: &AppName, fields: &[Vec<u8>]) -> Result<Stored, StoreError> {
    Stored::decode(app, fields).map_err(|reason| StoreError::Corrupt { app: app.to_string(), reason })
}

fn record_fields(app: &AppName, record: &AppRecord) -> Result<Vec<(&'static str, String)>, StoreError> {
    let text = serde_json::to_string(record).map_err(|e| corrupt(app, &e))?;
    if text.len() > stored::RECORD_MAX {
        return Err(StoreError::Corrupt {
            app: app.to_string(),
            reason: format!("{} bytes of instances; {} are allowed", text.len(), stored::RECORD_MAX),
        });
    }
    Ok(vec![("record", text), ("rev", record.rev.to_string())])
}

fn spec_fields(app: &App, srev: &str) -> Result<Vec<(&'static str, String)>, StoreError> {
    let text = serde_json::to_string(app).map_err(|e| corrupt(&app.name, &e))?;
    if text.len() > stored::SPEC_MAX {
        return Err(StoreError::Corrupt {
            app: app.name.to_string(),
            reason: format!("{} bytes of configuration; {} are allowed", text.len(), stored::SPEC_MAX),
        });
    }
    Ok(vec![("spec", text), ("srev", srev.to_owned())])
}

fn corrupt(app: &AppName, error: &serde_json::Error) -> StoreError {
    StoreError::Corrupt { app: app.to_string(), reason: error.to_string() }
}
