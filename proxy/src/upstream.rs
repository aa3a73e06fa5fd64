//! One instance as the proxy sees it: may it be picked, and who is on it.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use cmdb::{AppName, Generation};
use pingora::upstreams::peer::{HttpPeer, HttpUpstreamRequestPolicy};
use tokio::sync::mpsc;

use crate::{
    balance,
    config::Config,
    link::Command,
    measure::Window,
    nodes::Remote,
    stock::{Dialler, Stock},
};

/// Most held requests that are on their way to an instance and not answered yet: more would overflow the app's accept
/// queue, and a connection that does not fit there stalls for a second.
const BURST: u32 = 100;
/// Fewest responses that make a breach: one slow request says little.
const BREACH_RESPONSES: u32 = 4;
/// An instance's breach is told this often at most.
const BREACH_EVERY_MS: u64 = 50;
/// How long an instance is passed over whose host says that it does not have it, ms.
const MISSING_MS: u64 = 2_000;
/// Tells two instances apart in Pingora's connection pool, whose key knows nothing of namespaces: never the same twice in a process.
static NEXT_GROUP_KEY: AtomicU64 = AtomicU64::new(1);

/// Whether an instance may be picked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Fitness {
    /// Yes.
    Ready = 0,
    /// No: connecting to it failed.
    Suspect = 1,
    /// No, it has to be thawed.
    Frozen = 2,
    /// No more.
    Draining = 3,
    /// It is no more.
    Gone = 4,
}

/// One instance.
#[derive(Debug)]
pub struct Upstream {
    /// Its app.
    pub app: AppName,
    /// Its generation.
    pub generation: Generation,
    /// Since when this proxy knows it.
    pub known: Instant,
    /// Whether it became ready while others served: its share of the requests grows over the app's `scale.slow-start`.
    pub is_added: bool,
    /// First-byte times.
    pub window: Window,
    /// Requests since the last report.
    pub requests: AtomicU32,
    /// Responses in the second before the last report.
    pub rate: AtomicU32,
    /// Whether it is on the reporter's list.
    pub listed: AtomicBool,
    /// When a breach was last looked for, ms since [`Self::known`] plus one; 0: never.
    examined: AtomicU64,
    fitness: AtomicU8,
    in_flight: AtomicU32,
    opening: AtomicU32,
    progress: AtomicBool,
    answered: AtomicBool,
    quiesced: AtomicBool,
    reach: Reach,
    commands: mpsc::UnboundedSender<Command>,
}

/// How an instance is reached.
#[derive(Debug)]
enum Reach {
    /// It runs on this host: through sockets that were born in its network namespace.
    Here { stock: Arc<Stock>, peer: Box<HttpPeer>, upgrade_peer: Box<HttpPeer> },
    /// By way of the dispatcher of the host that it runs on. Its launcher hears of it from there.
    There {
        remote: Arc<Remote>,
        /// Until when it is passed over, ms since [`Upstream::known`]; 0: it is not.
        missing_until: AtomicU64,
    },
}

/// A key of Pingora's connection pool that nobody else has.
pub(crate) fn next_group_key() -> u64 {
    NEXT_GROUP_KEY.fetch_add(1, Relaxed)
}

impl Upstream {
    /// An instance of this host that listens on `port`.
    #[must_use]
    pub fn new(
        app: &AppName,
        generation: Generation,
        port: u16,
        fitness: Fitness,
        config: &Config,
        commands: mpsc::UnboundedSender<Command>,
    ) -> Self {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let stock = Arc::new(Stock::new(app, generation, address, commands.clone()));
        let peer = |upgrade| {
            let mut peer = HttpPeer::new(address, false, String::new());
            peer.group_key = next_group_key();
            peer.options.custom_l4 = Some(Arc::new(Dialler::new(Arc::clone(&stock), upgrade)));
            peer.options.connection_timeout = Some(config.connect_timeout);
            peer.options.total_connection_timeout = Some(config.connect_timeout);
            peer.options.read_timeout = Some(config.read_timeout);
            peer.options.write_timeout = Some(config.write_timeout);
            peer.options.idle_timeout = Some(if upgrade { Duration::ZERO } else { config.idle_timeout });
            peer.options.http_upstream_request_policy = HttpUpstreamRequestPolicy::standard();
            Box::new(peer)
        };
        let (peer, upgrade_peer) = (peer(false), peer(true));
        Self::reached_by(Reach::Here { stock, peer, upgrade_peer }, app, generation, fitness, commands)
    }

    /// An instance of another host.
    #[must_use]
    pub fn elsewhere(
        app: &AppName,
        generation: Generation,
        remote: Arc<Remote>,
        fitness: Fitness,
        commands: mpsc::UnboundedSender<Command>,
    ) -> Self {
        let reach = Reach::There { remote, missing_until: AtomicU64::new(0) };
        Self::reached_by(reach, app, generation, fitness, commands)
    }

    fn reached_by(
        reach: Reach,
        app: &AppName,
        generation: Generation,
        fitness: Fitness,
        commands: mpsc::UnboundedSender<Command>,
    ) -> Self {
        Self {
            app: app.clone(),
            generation,
            known: Instant::now(),
            is_added: false,
            window: Window::default(),
            requests: AtomicU32::new(0),
            rate: AtomicU32::new(0),
            listed: AtomicBool::new(false),
            examined: AtomicU64::new(0),
            fitness: AtomicU8::new(fitness as u8),
            in_flight: AtomicU32::new(0),
            opening: AtomicU32::new(0),
            progress: AtomicBool::new(false),
            answered: AtomicBool::new(false),
            quiesced: AtomicBool::new(false),
            reach,
            commands,
        }
    }

    /// Whether it may be picked.
    #[must_use]
    pub fn fitness(&self) -> Fitness {
        match self.fitness.load(SeqCst) {
            0 if !self.is_within_reach() => Fitness::Suspect,
            0 => Fitness::Ready,
            1 => Fitness::Suspect,
            2 => Fitness::Frozen,
            3 => Fitness::Draining,
            _ => Fitness::Gone,
        }
    }

    /// Requests on it.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(SeqCst)
    }

    /// Its share of the requests at `now`, of [`balance::FULL_SHARE`].
    #[must_use]
    pub fn share(&self, now: Instant, slow_start: Duration) -> u32 {
        if self.is_added {
            balance::share(now.saturating_duration_since(self.known), slow_start)
        } else {
            balance::FULL_SHARE
        }
    }

    /// Takes a place among at most `limit` requests; `held`: for a request that waited. Whoever gets one calls [`Self::leave`].
    #[must_use]
    pub fn enter(&self, limit: u32, held: bool) -> bool {
        if self.fitness() != Fitness::Ready {
            return false;
        }
        let burst = |now| if now < BURST { Some(now + 1) } else { None };
        if held && self.opening.fetch_update(SeqCst, SeqCst, burst).is_err() {
            return false;
        }
        // Not add-and-undo: while a place too many is taken, another's place could look taken as well.
        let entered = self
            .in_flight
            .fetch_update(SeqCst, SeqCst, |now| if now < limit { Some(now + 1) } else { None })
            .is_ok();
        // The drain may have begun between the look and the step; who begins it looks at `in_flight` after saying so.
        if entered && self.fitness() == Fitness::Ready {
            return true;
        }
        if held {
            self.opened();
        }
        if entered {
            self.leave();
        }
        false
    }

    /// A held request is answered (or given up): another may follow.
    pub fn opened(&self) {
        self.progress.store(true, Relaxed);
        let _ = self.opening.fetch_update(SeqCst, SeqCst, |now| now.checked_sub(1));
    }

    /// Called four times a second while requests wait: when none of the last burst was answered since (they may be long polls), lets another
    /// follow.
    pub fn allow_burst(&self) {
        if !self.progress.swap(false, SeqCst) {
            self.opening.store(0, SeqCst);
        }
    }

    /// Gives a place back.
    pub fn leave(&self) {
        let left = self.in_flight.fetch_sub(1, SeqCst) - 1;
        if left > 0 {
            return;
        }
        match self.fitness() {
            Fitness::Draining | Fitness::Gone => self.quiesce(),
            Fitness::Frozen => self.tell_quiesced(),
            Fitness::Ready | Fitness::Suspect => {}
        }
    }

    /// It may be picked (again), unless it is ending.
    pub fn revive(&self) -> bool {
        if let Reach::There { missing_until, .. } = &self.reach {
            missing_until.store(0, Relaxed);
        }
        self.fitness
            .fetch_update(SeqCst, SeqCst, |now| {
                (now <= Fitness::Frozen as u8).then_some(Fitness::Ready as u8)
            })
            .is_ok()
    }

    /// Its host says that it does not have it (any more): it is passed over until the CMDB has told, or for a moment.
    pub fn is_missing(&self) {
        if let Reach::There { missing_until, .. } = &self.reach {
            missing_until.store(self.age_ms() + MISSING_MS, Relaxed);
        }
    }

    fn is_within_reach(&self) -> bool {
        match &self.reach {
            Reach::Here { .. } => true,
            Reach::There { remote, missing_until } => {
                let until = missing_until.load(Relaxed);
                remote.is_fit() && (until == 0 || self.age_ms() >= until)
            }
        }
    }

    fn age_ms(&self) -> u64 {
        u64::try_from(self.known.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Connecting to it failed. Returns whether it was thought fit.
    pub fn suspect(&self, reason: String) -> bool {
        let changed = self.swap_from_ready(Fitness::Suspect);
        if changed {
            let (app, generation) = (self.app.clone(), self.generation);
            let _ = self.commands.send(Command::Suspect { app, generation, reason });
        }
        changed
    }

    /// The freezer is to have it: no new requests until it is woken. Tells the launcher when none is left, for a request must not be
    /// frozen with its instance.
    pub fn freeze(&self) {
        if self.swap_from_ready(Fitness::Frozen) && self.in_flight() == 0 {
            self.tell_quiesced();
        }
    }

    /// No new requests. Tells the launcher when none is left.
    pub fn drain(&self) {
        let before = self.fitness.fetch_max(Fitness::Draining as u8, SeqCst);
        if before < Fitness::Draining as u8 && self.in_flight() == 0 {
            self.quiesce();
        }
    }

    /// It is not to end after all: its launcher died before it had ended it, and the next one goes on with it. Returns
    /// false if it was given up already, with the sockets that were in stock.
    pub fn go_on(&self) -> bool {
        let (from, to) = (Fitness::Draining as u8, Fitness::Ready as u8);
        self.fitness.compare_exchange(from, to, SeqCst, SeqCst).is_ok() && !self.quiesced.load(SeqCst)
    }

    /// It is no more.
    pub fn gone(&self) {
        self.fitness.fetch_max(Fitness::Gone as u8, SeqCst);
        self.close();
    }

    /// Tells a launcher that has not heard it yet.
    pub fn repeat_quiesced(&self) {
        if self.in_flight() > 0 {
            return;
        }
        match self.fitness() {
            Fitness::Draining => {
                self.quiesced.store(false, SeqCst);
                self.quiesce();
            }
            Fitness::Frozen => self.tell_quiesced(),
            _ => {}
        }
    }

    /// Its first response byte came; the launcher hears of the first one.
    pub fn first_byte(&self, tick: u64, us: u64) {
        if cfg!(feature = "measure") {
            self.window.record(tick, us);
        }
        self.answered();
    }

    /// Whether more than one in ten first bytes of the last second came later than `limit_us`; `false` when it was asked a
    /// moment ago. Asked only after a response that was slower than that, so that the others pay nothing.
    #[must_use]
    pub fn breaches(&self, tick: u64, limit_us: u64) -> bool {
        let now = u64::try_from(self.known.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1;
        let last = self.examined.load(Relaxed);
        if last != 0 && now < last + BREACH_EVERY_MS {
            return false;
        }
        if self.examined.compare_exchange(last, now, Relaxed, Relaxed).is_err() {
            return false;
        }
        let summary = self.window.summary(tick);
        summary.count >= BREACH_RESPONSES && summary.p90_us > limit_us
    }

    /// It answered; the launcher hears of the first time.
    pub fn answered(&self) {
        if !self.answered.load(Relaxed) && !self.answered.swap(true, SeqCst) && self.is_here() {
            let (app, generation) = (self.app.clone(), self.generation);
            let _ = self.commands.send(Command::FirstByte { app, generation });
        }
    }

    /// Where Pingora is to connect to; `upgrade` for WebSocket handshakes. `None`: its host is not known any more.
    #[must_use]
    pub fn peer(&self, upgrade: bool) -> Option<Box<HttpPeer>> {
        match &self.reach {
            Reach::Here { upgrade_peer, .. } if upgrade => Some(upgrade_peer.clone()),
            Reach::Here { peer, .. } => Some(peer.clone()),
            Reach::There { remote, .. } => remote.peer(upgrade),
        }
    }

    /// Its sockets, if it is on this host.
    #[must_use]
    pub fn stock(&self) -> Option<&Arc<Stock>> {
        match &self.reach {
            Reach::Here { stock, .. } => Some(stock),
            Reach::There { .. } => None,
        }
    }

    /// The host that it is on, if that is another one.
    #[must_use]
    pub fn remote(&self) -> Option<&Arc<Remote>> {
        match &self.reach {
            Reach::Here { .. } => None,
            Reach::There { remote, .. } => Some(remote),
        }
    }

    /// Whether it is on this host.
    #[must_use]
    pub fn is_here(&self) -> bool {
        self.remote().is_none()
    }

    fn close(&self) {
        if let Some(stock) = self.stock() {
            stock.close();
        }
    }

    fn swap_from_ready(&self, to: Fitness) -> bool {
        self.fitness.compare_exchange(Fitness::Ready as u8, to as u8, SeqCst, SeqCst).is_ok()
    }

    fn tell_quiesced(&self) {
        if !self.is_here() {
            return;
        }
        let (app, generation) = (self.app.clone(), self.generation);
        let _ = self.commands.send(Command::Quiesced { app, generation });
    }

    fn quiesce(&self) {
        if self.fitness() == Fitness::Draining && !self.quiesced.swap(true, SeqCst) {
            // Spare sockets would keep the instance's network namespace alive.
            self.close();
            self.tell_quiesced();
        }
    }
}

#[cfg(test)]
mod tests {
    use cmdb::compute::{Compute, Node};

    use super::*;
    use crate::{config::Cluster, nodes::Hosts};

    fn upstream() -> (Upstream, mpsc::UnboundedReceiver<Command>) {
        let (commands, heard) = mpsc::unbounded_channel();
        let config = Config::new(launcher_client::paths::StateDir::new("/nowhere"));
        let app = "blog".parse().unwrap();
        (Upstream::new(&app, Generation(7), 80, Fitness::Ready, &config, commands), heard)
    }

    #[test]
    fn a_drain_is_quiet_only_when_the_last_request_has_left() {
        let (upstream, mut heard) = upstream();
        assert!(upstream.enter(2, false));
        assert!(upstream.enter(2, false));
        assert!(!upstream.enter(2, false), "full");
        upstream.drain();
        assert!(heard.try_recv().is_err());
        upstream.leave();
        assert!(!upstream.enter(2, false), "draining");
        assert!(heard.try_recv().is_err());
        upstream.leave();
        assert!(matches!(heard.try_recv(), Ok(Command::Quiesced { .. })));
        assert!(!upstream.revive(), "who drains never comes back");
    }

    #[test]
    fn an_idle_drain_is_quiet_at_once_and_said_once() {
        let (upstream, mut heard) = upstream();
        upstream.drain();
        upstream.drain();
        assert!(matches!(heard.try_recv(), Ok(Command::Quiesced { .. })));
        assert!(heard.try_recv().is_err());
        upstream.repeat_quiesced();
        assert!(matches!(heard.try_recv(), Ok(Command::Quiesced { .. })), "a new launcher is told again");
    }

    #[test]
    fn a_drain_that_races_picks_never_loses_one() {
        for _ in 0..200 {
            let (upstream, mut heard) = upstream();
            let picked = std::thread::scope(|scope| {
                let picking = scope.spawn(|| (0..50).filter(|_| upstream.enter(u32::MAX, false)).count());
                upstream.drain();
                picking.join().unwrap()
            });
            for _ in 0..picked {
                assert!(upstream.in_flight() > 0);
                upstream.leave();
            }
            assert!(matches!(heard.try_recv(), Ok(Command::Quiesced { .. })));
            assert_eq!(upstream.in_flight(), 0);
        }
    }

    #[test]
    fn held_requests_come_in_bursts() {
        let (upstream, _heard) = upstream();
        assert_eq!((0..1000).filter(|_| upstream.enter(u32::MAX, true)).count(), 100);
        assert!(upstream.enter(u32::MAX, false), "who was not held is not slowed");
        upstream.opened();
        assert!(upstream.enter(u32::MAX, true));
        upstream.allow_burst();
        assert!(!upstream.enter(u32::MAX, true), "some were answered, others follow one by one");
        upstream.allow_burst();
        assert!(upstream.enter(u32::MAX, true), "none was answered for a while: they may be long polls");
    }

    #[test]
    fn an_instance_that_its_host_does_not_have_is_passed_over_until_it_is_found() {
        let (commands, mut heard) = mpsc::unbounded_channel();
        let config = Config::new(launcher_client::paths::StateDir::new("/nowhere"));
        let hosts = Hosts::new(&Config { cluster: Some(Cluster::default()), ..config }, Instant::now());
        let there = hosts.remote("b");
        let app = "blog".parse().unwrap();
        let there = Upstream::elsewhere(&app, Generation(7), there, Fitness::Ready, commands);
        assert!(!there.enter(9, false), "nobody has told of its host");
        let compute = Compute { name: "b".into(), dispatch: "192.0.2.1:1".into(), ..Compute::default() };
        hosts.learn([Node { compute, alive: true, ..Node::default() }].into());
        assert!(there.enter(9, false));
        there.is_missing();
        assert!(!there.enter(9, false));
        assert!(there.revive() && there.enter(9, false));
        there.drain();
        there.leave();
        there.leave();
        assert!(heard.try_recv().is_err(), "its own host tells its launcher");
    }

    #[test]
    fn no_two_instances_share_pooled_connections() {
        let (one, _a) = upstream();
        let (other, _b) = upstream();
        let key = |one: &Upstream, upgrade| one.peer(upgrade).unwrap().group_key;
        assert_ne!(key(&one, false), key(&other, false));
        assert_ne!(key(&one, false), key(&one, true));
    }
}
