//! The hosts that there are, in Redis: small hashes beside the tracked keys, read whole by everybody each
//! [`HEARTBEAT`]. One connection of their own, so that neither a request waits for them nor they for a request.

use std::{
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use redis::Script;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{
    HEARTBEAT, Role, Shared,
    address::Address,
    commands::Commands,
    heartbeats::{self, Drain, News, Written},
};
use crate::{
    compute::{self, Compute, Load},
    fingerprint::fnv1a,
    store::StoreError,
    transition::Transition,
};

/// What hosts say of themselves, by name. One slot of a Cluster for all of these.
const REGISTERED: &str = "fch:{hosts}:registered";
/// Which hosts the operator wants to be empty.
const DRAINS: &str = "fch:{hosts}:drains";
/// Their heartbeats.
const BEATS: &str = "fch:{hosts}:beats";
/// Their numbers, see [`super::mint`].
const NUMBERS: &str = "fch:{hosts}:numbers";
/// The longest that a heartbeat or a reading of them may take.
const WITHIN: Duration = Duration::from_secs(1);

static NUMBER: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("number.lua")));
static DRAIN: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("drain.lua")));

/// This process's way to them.
#[derive(Debug)]
pub(super) struct Hosts {
    commands: Commands,
    /// Tells this life of this process from every other.
    boot: u64,
    beats: AtomicU64,
    /// A heartbeat of this life has arrived.
    heard: AtomicBool,
    /// Of this process's own host; 0 until Redis has given it one.
    number: AtomicU64,
    /// In its place until then.
    provisional: u64,
}

impl Hosts {
    pub(super) fn new(address: Address, own: Option<&str>) -> Self {
        Self {
            commands: Commands::untiring(address, WITHIN),
            boot: ahash::RandomState::new().hash_one(0),
            beats: AtomicU64::new(0),
            heard: AtomicBool::new(false),
            number: AtomicU64::new(0),
            provisional: own.map_or(0, |own| fnv1a(own.as_bytes())),
        }
    }

    /// The number of this process's own host.
    pub(super) fn number(&self) -> u64 {
        match self.number_told() {
            0 => self.provisional,
            number => number,
        }
    }

    /// There is another primary.
    pub(super) async fn leave(&self) {
        self.commands.leave().await;
    }

    /// As Redis has given it; 0: it has not.
    pub(super) fn number_told(&self) -> u64 {
        self.number.load(Relaxed)
    }

    pub(super) fn set_number(&self, number: u64) {
        self.number.store(number, Relaxed);
    }
}

/// Never returns; the store aborts it.
pub(super) async fn follow(shared: Arc<Shared>) {
    let mut every = interval(HEARTBEAT);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut well = true;
    loop {
        every.tick().await;
        let looked = shared.look_at_hosts().await;
        if let (true, Err(error)) = (well, &looked) {
            tracing::warn!(%error, "the hosts' heartbeats cannot be read; each is taken for what it was last");
        }
        well = looked.is_ok();
    }
}

impl Shared {
    /// Reads who is there.
    pub(super) async fn look_at_hosts(&self) -> Result<(), StoreError> {
        let began = Instant::now();
        let mut pipe = redis::pipe();
        pipe.hgetall(REGISTERED).hgetall(DRAINS).hgetall(BEATS);
        let read = self.hosts.commands.call(async |mut to| pipe.query_async(&mut to).await).await;
        let forgotten = {
            let mut state = self.lock();
            let now = Instant::now();
            let (registered, drains, beats) = match read {
                Ok(read) => read,
                Err(error) => {
                    let news = state.heartbeats.out_of_touch(now);
                    state.take_hosts(news);
                    return Err(error);
                }
            };
            let written = Written { registered, drains, beats };
            let news = state.heartbeats.take_in(&written, now, now - began);
            state.take_hosts(news)
        };
        if self.role != Role::Reader {
            for (name, drain) in forgotten {
                let word = self.keep_word(&name, drain, false).await?;
                tracing::info!(
                    host = name,
                    draining = word.on,
                    "Redis had lost whether a host is to be empty"
                );
            }
        }
        Ok(())
    }

    pub(super) async fn beat(&self, compute: &Compute, load: Load) -> Result<(), StoreError> {
        let hosts = &self.hosts;
        let said = serde_json::to_vec(compute).map_err(|e| StoreError::Unavailable(e.to_string()))?;
        {
            let mut state = self.lock();
            let news = state.heartbeats.own(compute, load, Instant::now());
            state.take_hosts(news);
        }
        let name = compute.name.as_str();
        let mut pipe = redis::pipe();
        pipe.hget(BEATS, name).hget(NUMBERS, name);
        pipe.hset(REGISTERED, name, &said).ignore();
        pipe.hset(BEATS, name, heartbeats::beat(hosts.boot, hosts.beats.fetch_add(1, Relaxed), load))
            .ignore();
        let (before, number): (Option<Vec<u8>>, Option<u64>) =
            hosts.commands.call(async |mut to| pipe.query_async(&mut to).await).await?;
        match number {
            Some(number) => hosts.set_number(number),
            None => self.take_number(name).await?,
        }
        let mine = before.is_none_or(|before| heartbeats::is_of(hosts.boot, &before));
        // The first finds the one of this host's life before.
        if hosts.heard.swap(true, Relaxed) && !mine {
            return Err(StoreError::NodeTwice(name.to_owned()));
        }
        Ok(())
    }

    /// Gets this process's own host a number, the one that it has had if that is free.
    pub(super) async fn take_number(&self, name: &str) -> Result<(), StoreError> {
        let mut call = NUMBER.key(NUMBERS);
        call.arg(name).arg(self.hosts.number_told());
        let number = self.hosts.commands.call(async |mut to| call.invoke_async(&mut to).await).await?;
        self.hosts.set_number(number);
        Ok(())
    }

    pub(super) async fn set_draining(&self, name: &str, on: bool) -> Result<(), StoreError> {
        let known = self.lock().heartbeats.drain_of(name);
        let Some(known) = known else { return Err(StoreError::UnknownNode(name.to_owned())) };
        let word = self.keep_word(name, Drain { on, ..known }, true).await?;
        let mut state = self.lock();
        let news = state.heartbeats.drain(name, word);
        state.take_hosts(news);
        Ok(())
    }

    /// Its instances are given up, and whatever was said of it is deleted. Should it come back, it registers anew.
    pub(super) async fn forget_node(&self, name: &str) -> Result<(), StoreError> {
        let nodes = self.lock().nodes();
        let Some(node) = compute::find(&nodes, name) else {
            return Err(StoreError::UnknownNode(name.to_owned()));
        };
        if node.alive {
            return Err(StoreError::NodeAlive(name.to_owned()));
        }
        let apps = self.lock().list();
        let has = |node: &str| node == name;
        for (app, _) in apps.iter().filter(|(_, record)| record.instances.values().any(|i| has(&i.node))) {
            let _turn = self.turn(&app.name).await;
            self.apply(&app.name, &Transition::GiveUp { lost: vec![name.to_owned()] }).await?;
        }
        let mut pipe = redis::pipe();
        pipe.hset(REGISTERED, name, "").ignore();
        pipe.hdel(BEATS, name).ignore().hdel(DRAINS, name).ignore().hdel(NUMBERS, name).ignore();
        self.hosts.commands.call(async |mut to| pipe.query_async::<()>(&mut to).await).await?;
        let mut state = self.lock();
        let News { nodes, noticeable, .. } = state.heartbeats.forget(name);
        state.take_hosts(News { nodes, noticeable, ..News::default() });
        Ok(())
    }

    /// Returns the word that holds.
    async fn keep_word(&self, name: &str, word: Drain, new: bool) -> Result<Drain, StoreError> {
        let mut call = DRAIN.key(DRAINS);
        call.arg(name).arg(u8::from(word.on)).arg(word.stamp).arg(u8::from(new));
        let held: Vec<u8> = self.hosts.commands.call(async |mut to| call.invoke_async(&mut to).await).await?;
        Drain::parse(&held)
            .ok_or_else(|| StoreError::Unavailable("Redis answered a script with something else".to_owned()))
    }
}
