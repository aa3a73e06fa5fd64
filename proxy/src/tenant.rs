//! One app at run time: what its operator asked for, its ready instances, its waiting room, and whether it is being woken.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use cmdb::{
    App, AppName, AppRecord, Generation, State,
    app::Pick,
    cache::{CmCache, Tenant},
};
use launcher_client::{Woken, wire::WakeTiming};

use crate::{
    balance,
    bill::Bill,
    config::Config,
    guests::Guests,
    hold::WaitingRoom,
    house::House,
    lease::Lease,
    link::Command,
    metrics::AppCounts,
    pages::Fault,
    telemetry::{micros, millis},
    upstream::{Fitness, Upstream},
    waiting::Progress,
};

/// What a waiting request is answered with.
#[derive(Debug)]
pub enum Answer {
    /// A place on an instance.
    Lease(Lease),
    /// There will be none.
    Refused(Fault),
    /// There are more urgent ones: the proxy holds as many as it may, and this app more of them than another that came.
    Shed,
}

/// The cache's handle on an app.
#[derive(Debug)]
pub struct AppTenant(Arc<AppRuntime>);

/// One app.
#[derive(Debug)]
pub struct AppRuntime {
    /// Its name.
    pub name: AppName,
    /// What its operator asked for.
    pub spec: ArcSwap<App>,
    /// Requests that wait for an instance.
    pub room: Arc<WaitingRoom<Answer>>,
    /// Those of them that another host's proxy sent here; made when the first one comes.
    guests: OnceLock<Guests>,
    /// What was counted of its requests.
    pub counts: AppCounts,
    /// What its visitors did.
    pub bill: Arc<Bill>,
    /// How the last start that this proxy saw went.
    pub last_wake: ArcSwap<(Generation, WakeTiming)>,
    house: Arc<House>,
    ready: ArcSwap<Box<[Arc<Upstream>]>>,
    /// Copies of `scale.concurrency` and `scale.pick`, for the warm path.
    limit: AtomicU32,
    /// `scale.response-time` in µs; `u64::MAX`: not judged.
    slow_us: AtomicU64,
    pick: AtomicU8,
    /// `scale.slow-start` in µs; 0: none.
    slow_start_us: AtomicU64,
    /// Whether an instance may still have less than a full share.
    ramping: AtomicBool,
    waking: AtomicBool,
    /// When the last wake began, ms on the house's clock.
    waking_since: AtomicU64,
    removed: AtomicBool,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    record: Arc<AppRecord>,
    upstreams: BTreeMap<Generation, (Arc<Upstream>, Instant)>,
}

impl AppTenant {
    /// The app.
    #[must_use]
    pub fn runtime(&self) -> &Arc<AppRuntime> {
        &self.0
    }
}

impl Tenant for AppTenant {
    fn new(app: Arc<App>, record: Arc<AppRecord>) -> Self {
        let house = House::admitting().unwrap_or_else(|| {
            // Only a caller that goes round `House::admit`, such as a test of the cache: nobody listens there.
            House::new(Config::new(launcher_client::paths::StateDir::new("")), CmCache::new()).0
        });
        let runtime = Arc::new(AppRuntime::new(app, house));
        runtime.house.tenants().insert(runtime.name.clone(), Arc::downgrade(&runtime));
        runtime.house.metrics.app_came(&runtime.counts);
        runtime.learn(record);
        Self(runtime)
    }

    fn update(&self, app: Arc<App>, record: Arc<AppRecord>) {
        self.0.configure(app);
        self.0.learn(record);
    }

    fn removed(&self) {
        self.0.remove();
    }
}

impl AppRuntime {
    fn new(app: Arc<App>, house: Arc<House>) -> Self {
        let runtime = Self {
            name: app.name.clone(),
            spec: ArcSwap::new(Arc::clone(&app)),
            room: WaitingRoom::new(),
            guests: OnceLock::new(),
            counts: AppCounts::default(),
            bill: house.bills.of(&app.name),
            last_wake: ArcSwap::new(Arc::default()),
            house,
            ready: ArcSwap::new(Arc::new(Box::default())),
            limit: AtomicU32::new(0),
            slow_us: AtomicU64::new(u64::MAX),
            pick: AtomicU8::new(0),
            slow_start_us: AtomicU64::new(0),
            ramping: AtomicBool::new(false),
            waking: AtomicBool::new(false),
            waking_since: AtomicU64::new(0),
            removed: AtomicBool::new(false),
            known: Mutex::new(Known { record: Arc::default(), upstreams: BTreeMap::new() }),
        };
        runtime.configure(app);
        runtime
    }

    /// A place on a ready instance, if there is one; `held`: for a request that waited; `here`: on this host only.
    #[must_use]
    pub fn acquire(self: &Arc<Self>, held: bool, here: bool) -> Option<Lease> {
        let limit = self.limit.load(Relaxed);
        let how = if self.pick.load(Relaxed) == 0 { Pick::Random } else { Pick::P2c };
        let ready = self.ready.load();
        let load = Upstream::in_flight;
        let enter = |one: &Upstream| (!here || one.is_here()) && one.enter(limit, held);
        let upstream = if self.ramping.load(Relaxed) {
            let share = self.shares(&ready);
            balance::pick(&ready, how, |one| load(one), Some(&share), |one| enter(one))?
        } else {
            balance::pick(&ready, how, |one| load(one), None, |one| enter(one))?
        };
        Some(self.lease(upstream, held))
    }

    /// A place on the instance of this host that another host's proxy picked, or on another one of this host.
    #[must_use]
    pub fn acquire_for_guest(self: &Arc<Self>, picked: Generation) -> Option<Lease> {
        if self.guests.get().is_some_and(|guests| !guests.room.is_empty()) {
            return None;
        }
        let limit = self.limit.load(Relaxed);
        let ready = self.ready.load();
        match ready.iter().find(|one| one.generation == picked && one.is_here() && one.enter(limit, false)) {
            Some(upstream) => Some(self.lease(upstream, false)),
            None => self.acquire(false, true),
        }
    }

    fn lease(self: &Arc<Self>, upstream: &Arc<Upstream>, held: bool) -> Lease {
        upstream.requests.fetch_add(1, Relaxed);
        if !upstream.listed.load(Relaxed) && upstream.is_here() && !upstream.listed.swap(true, SeqCst) {
            self.house.active.push(Arc::clone(upstream));
        }
        Lease { upstream: Arc::clone(upstream), app: Arc::clone(self), opening: AtomicBool::new(held) }
    }

    /// Each instance's share at this moment, while some of them grow.
    fn shares(&self, ready: &[Arc<Upstream>]) -> impl Fn(&Arc<Upstream>) -> u32 + use<> {
        let (now, slow_start) = (Instant::now(), Duration::from_micros(self.slow_start_us.load(Relaxed)));
        let share = move |one: &Arc<Upstream>| one.share(now, slow_start);
        if ready.iter().all(|one| share(one) == balance::FULL_SHARE) {
            self.ramping.store(false, Relaxed);
        }
        share
    }

    /// Whether an instance is ready.
    #[must_use]
    pub fn is_warm(&self) -> bool {
        self.ready.load().iter().any(|one| one.fitness() == Fitness::Ready)
    }

    /// Whether anybody waits.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        !self.room.is_empty() || self.guests.get().is_some_and(|guests| !guests.room.is_empty())
    }

    /// Where a request waits; `guest`: it came from another host's proxy.
    #[must_use]
    pub fn room_for(&self, guest: bool) -> &Arc<WaitingRoom<Answer>> {
        if guest { &self.guests.get_or_init(Guests::new).room } else { &self.room }
    }

    /// Seconds until those who wait now may have been served: as fast as the instances answer at the moment, or as long as the
    /// last start took. Never longer than anybody would be held.
    #[must_use]
    pub fn retry_after(&self) -> u64 {
        let per_second: u64 = self.ready.load().iter().map(|one| u64::from(one.rate.load(Relaxed))).sum();
        let waiting = self.room.len() as u64;
        let start = self.usual_start().map_or(0, |start| micros(start).div_ceil(1_000_000));
        let longest = self.spec.load().hold.timeout.as_secs().max(1);
        waiting.checked_div(per_second).map_or(start, |seconds| seconds + 1).clamp(1, longest)
    }

    /// How far its start is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let now = self.house.begun.elapsed();
        let since = now.saturating_sub(Duration::from_millis(self.waking_since.load(Relaxed)));
        Progress { since, usual: self.usual_start() }
    }

    /// How long the last start took that this proxy saw.
    fn usual_start(&self) -> Option<Duration> {
        let last = self.last_wake.load();
        (last.1.total_us > 0 && !last.1.warm).then(|| Duration::from_micros(last.1.total_us))
    }

    /// For whoever has just begun to wait: serves those who can be served, and has an instance woken if there is none.
    pub fn knock(self: &Arc<Self>) {
        if self.removed.load(SeqCst) {
            self.refuse(&Fault::UnknownHost);
            return;
        }
        if self.house.stopping.load(SeqCst) {
            self.refuse(&Fault::Stopping);
            return;
        }
        self.serve();
        if !self.room.is_empty() && !self.is_warm() && !self.waking.swap(true, SeqCst) {
            self.waking_since.store(millis(self.house.begun.elapsed()), Relaxed);
            self.house.command(Command::Wake(Arc::clone(self)));
        }
        let Some(guests) = self.guests.get() else { return };
        let warm = || self.ready.load().iter().any(|one| one.is_here() && one.fitness() == Fitness::Ready);
        if !guests.room.is_empty() && !warm() && guests.begin_waking() {
            self.house.command(Command::WakeForGuests(Arc::clone(self)));
        }
    }

    /// Gives places to those who wait, in their order, as far as there are any.
    pub fn serve(self: &Arc<Self>) {
        self.serve_in(&self.room, false);
        if let Some(guests) = self.guests.get() {
            self.serve_in(&guests.room, true);
        }
    }

    fn serve_in(self: &Arc<Self>, room: &WaitingRoom<Answer>, here: bool) {
        while !room.is_empty() {
            let Some(lease) = self.acquire(true, here) else { return };
            // When everybody has left meanwhile, dropping the lease gives the place back.
            if room.serve(Answer::Lease(lease)).is_err() {
                return;
            }
        }
    }

    /// Tells everybody who waits that there will be no instance.
    pub fn refuse(&self, fault: &Fault) {
        self.refuse_in(false, fault);
        self.refuse_in(true, fault);
    }

    /// The same to the guests, or to all others.
    pub fn refuse_in(&self, guests: bool, fault: &Fault) {
        let room = if guests { self.guests.get().map(|guests| &guests.room) } else { Some(&self.room) };
        if let Some(room) = room {
            room.serve_all(|| Answer::Refused(fault.clone()));
        }
    }

    /// The waker found or made an instance. Returns false when the instance is known to have ended since.
    pub fn woken(self: &Arc<Self>, woken: Woken) -> bool {
        let mut known = self.known();
        let ended = known.record.generation >= woken.generation
            && !known.record.instances.contains_key(&woken.generation);
        if ended {
            return false;
        }
        let beside = self.is_beside_others(&known);
        let (upstream, _) = known.upstreams.entry(woken.generation).or_insert_with(|| {
            let upstream = self.upstream_here(woken.generation, woken.port, Fitness::Ready, beside);
            (Arc::new(upstream), Instant::now())
        });
        if !upstream.revive() {
            return false;
        }
        if let Some(stock) = upstream.stock() {
            stock.expect(woken.sockets.len());
            stock.put(woken.sockets);
        }
        self.last_wake.store(Arc::new((woken.generation, woken.timing)));
        self.publish(&known);
        drop(known);
        self.serve();
        true
    }

    /// Another host found or made an instance. Returns false when the instance is known to have ended since.
    pub fn woken_elsewhere(self: &Arc<Self>, node: &str, generation: Generation, timing: WakeTiming) -> bool {
        let mut known = self.known();
        let ended =
            known.record.generation >= generation && !known.record.instances.contains_key(&generation);
        if ended {
            return false;
        }
        let beside = self.is_beside_others(&known);
        let (upstream, _) = known.upstreams.entry(generation).or_insert_with(|| {
            let upstream = self.upstream(generation, node, 0, Fitness::Ready, beside);
            (Arc::new(upstream), Instant::now())
        });
        if !upstream.revive() {
            return false;
        }
        self.last_wake.store(Arc::new((generation, timing)));
        self.publish(&known);
        drop(known);
        self.serve();
        true
    }

    /// The waker has ended, successfully or not; `guests`: theirs.
    pub fn wake_ended(self: &Arc<Self>, guests: bool) {
        match self.guests.get().filter(|_| guests) {
            Some(guests) => guests.end_waking(),
            None => self.waking.store(false, SeqCst),
        }
        // Who came between the answer and this line has not started a waker.
        if self.is_waited_for() {
            self.knock();
        }
    }

    /// Connecting to an instance failed: it is not picked until the launcher says that it is well, or for two seconds. On
    /// another host: none of that host is.
    pub fn unreachable(self: &Arc<Self>, upstream: &Upstream, reason: String) {
        match upstream.remote() {
            Some(remote) => remote.suspect(&reason),
            None => self.suspect(upstream, reason),
        }
    }

    fn suspect(self: &Arc<Self>, upstream: &Upstream, reason: String) {
        if upstream.suspect(reason) {
            let mut known = self.known();
            if let Some((_, since)) = known.upstreams.get_mut(&upstream.generation) {
                *since = Instant::now();
            }
            self.publish(&known);
        }
    }

    /// Every quarter of a second: lets further held requests follow, and forgives old suspicions.
    pub fn tick(self: &Arc<Self>) {
        let mut known = self.known();
        let mut forgiven = false;
        for (upstream, since) in known.upstreams.values_mut() {
            if upstream.fitness() == Fitness::Suspect && since.elapsed().as_secs() >= 2 {
                forgiven |= upstream.revive();
            }
            if self.is_waited_for() {
                upstream.allow_burst();
            }
        }
        if forgiven {
            self.publish(&known);
        }
        drop(known);
        if self.is_waited_for() {
            self.knock();
        }
    }

    /// How many wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.room.len() + self.guests.get().map_or(0, |guests| guests.room.len())
    }

    /// What the CMDB knew last of its instances.
    #[must_use]
    pub fn record(&self) -> Arc<AppRecord> {
        Arc::clone(&self.known().record)
    }

    /// All instances that this proxy knows.
    #[must_use]
    pub fn upstreams(&self) -> Vec<Arc<Upstream>> {
        self.known().upstreams.values().map(|(upstream, _)| Arc::clone(upstream)).collect()
    }

    /// Whether its response time is judged.
    #[must_use]
    pub fn is_judged(&self) -> bool {
        self.slow_us.load(Relaxed) != u64::MAX
    }

    /// `scale.response-time` in µs; `u64::MAX`: not judged.
    pub(crate) fn slow_us(&self) -> u64 {
        self.slow_us.load(Relaxed)
    }

    /// The house it belongs to.
    #[must_use]
    pub fn house(&self) -> &Arc<House> {
        &self.house
    }

    fn configure(&self, app: Arc<App>) {
        self.limit.store(app.scale.concurrency.unwrap_or(u32::MAX), Relaxed);
        self.slow_us.store(app.scale.response_time.map_or(u64::MAX, micros), Relaxed);
        self.pick.store(u8::from(app.scale.pick == Pick::P2c), Relaxed);
        self.slow_start_us.store(app.scale.slow_start.map_or(0, micros), Relaxed);
        self.spec.store(app);
    }

    /// Takes over what the CMDB knows of the instances.
    fn learn(self: &Arc<Self>, record: Arc<AppRecord>) {
        let mut known = self.known();
        known.upstreams.retain(|generation, (upstream, _)| {
            // A record from before the instance's begin says nothing about it: the waker's answer overtook it.
            let kept = record.instances.contains_key(generation) || record.generation < *generation;
            if !kept {
                upstream.gone();
            }
            kept
        });
        for instance in record.instances.values() {
            let fitness = match instance.state {
                // Whoever was woken knows better than a record from before.
                State::Starting => continue,
                State::Ready => Fitness::Ready,
                State::Frozen => Fitness::Frozen,
                State::Draining => Fitness::Draining,
            };
            // In one launcher's life nothing that drains is ever ready again.
            if fitness == Fitness::Ready
                && let Some((upstream, _)) = known.upstreams.get(&instance.generation)
                && upstream.fitness() == Fitness::Draining
                && !upstream.go_on()
            {
                upstream.gone();
                known.upstreams.remove(&instance.generation);
            }
            match known.upstreams.get(&instance.generation) {
                Some((upstream, _)) => match fitness {
                    Fitness::Ready if upstream.fitness() == Fitness::Frozen => {
                        upstream.revive();
                    }
                    Fitness::Frozen => upstream.freeze(),
                    Fitness::Draining => upstream.drain(),
                    _ => {}
                },
                None => {
                    let begun = if fitness == Fitness::Draining { Fitness::Ready } else { fitness };
                    let beside = begun == Fitness::Ready && self.is_beside_others(&known);
                    let (node, port) = (&instance.node, instance.port);
                    let upstream = Arc::new(self.upstream(instance.generation, node, port, begun, beside));
                    if fitness == Fitness::Draining {
                        upstream.drain();
                    }
                    known.upstreams.insert(instance.generation, (upstream, Instant::now()));
                }
            }
        }
        known.record = record;
        self.publish(&known);
        drop(known);
        if self.is_waited_for() {
            self.knock();
        }
    }

    fn remove(self: &Arc<Self>) {
        self.removed.store(true, SeqCst);
        self.house.metrics.app_gone(&self.counts);
        let known = self.known();
        for (upstream, _) in known.upstreams.values() {
            upstream.drain();
        }
        self.publish(&known);
        drop(known);
        self.refuse(&Fault::UnknownHost);
        let mut tenants = self.house.tenants();
        // The same name may have come back meanwhile.
        if tenants.get(&self.name).is_some_and(|other| std::ptr::eq(other.as_ptr(), Arc::as_ptr(self))) {
            tenants.remove(&self.name);
        }
    }

    /// Whether an instance that becomes ready now does so while others serve. The first one has nobody to leave requests to,
    /// and those that a sync brings may have served for long.
    fn is_beside_others(&self, known: &Known) -> bool {
        self.house.synced.load(SeqCst)
            && known.upstreams.values().any(|(other, _)| other.fitness() == Fitness::Ready)
    }

    fn publish(&self, known: &Known) {
        let ready = known
            .upstreams
            .values()
            .filter(|(upstream, _)| upstream.fitness() == Fitness::Ready)
            .map(|(upstream, _)| Arc::clone(upstream))
            .collect();
        self.ready.store(Arc::new(ready));
        let ramping = self.slow_start_us.load(Relaxed) > 0
            && known.upstreams.values().any(|(upstream, _)| upstream.is_added);
        self.ramping.store(ramping, Relaxed);
    }

    fn upstream(
        &self,
        generation: Generation,
        node: &str,
        port: u16,
        fitness: Fitness,
        beside: bool,
    ) -> Upstream {
        if self.house.hosts.is_own(node) {
            return self.upstream_here(generation, port, fitness, beside);
        }
        let remote = self.house.hosts.remote(node);
        let commands = self.house.commands.clone();
        self.begun(Upstream::elsewhere(&self.name, generation, remote, fitness, commands), beside)
    }

    fn upstream_here(&self, generation: Generation, port: u16, fitness: Fitness, beside: bool) -> Upstream {
        let commands = self.house.commands.clone();
        self.begun(Upstream::new(&self.name, generation, port, fitness, &self.house.config, commands), beside)
    }

    fn begun(&self, mut upstream: Upstream, beside: bool) -> Upstream {
        upstream.is_added = beside;
        if !self.house.informed.load(SeqCst) {
            // What the first sync brings was there before this proxy.
            upstream.known = self.house.begun;
        }
        upstream
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
