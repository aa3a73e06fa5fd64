//! The hosts, as this proxy knows them, and the ways to their dispatchers.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use cmdb::compute::{Node, Nodes};
use pingora::upstreams::peer::HttpPeer;

use crate::{
    config::Config,
    remote::{self, Way},
    telemetry::millis,
};

/// How long the instances of a host that could not be reached are passed over.
const SUSPICION: Duration = Duration::from_secs(2);

/// All hosts.
#[derive(Debug)]
pub struct Hosts {
    config: Config,
    begun: Instant,
    list: ArcSwap<Nodes>,
    remotes: Mutex<HashMap<String, Arc<Remote>>>,
}

/// Another host.
#[derive(Debug)]
pub struct Remote {
    /// Its name.
    pub name: String,
    begun: Instant,
    /// How it is reached; `None` while it is not known where.
    way: ArcSwapOption<Way>,
    alive: AtomicBool,
    /// Until when it is passed over, ms on the house's clock; 0: it is not.
    suspect_until: AtomicU64,
    /// Whether it is this proxy that could not reach it.
    first_hand: AtomicBool,
}

impl Hosts {
    /// None known.
    #[must_use]
    pub fn new(config: &Config, begun: Instant) -> Self {
        let (list, remotes) = (ArcSwap::default(), Mutex::default());
        Self { config: config.clone(), begun, list, remotes }
    }

    /// Whether that host's instances are reached through the launcher here.
    #[must_use]
    pub fn is_own(&self, node: &str) -> bool {
        match &self.config.cluster {
            None => true,
            Some(cluster) => cluster.node.as_deref() == Some(node),
        }
    }

    /// All that are known; empty where there is only this one.
    #[must_use]
    pub fn list(&self) -> Arc<Nodes> {
        self.list.load_full()
    }

    /// Another host. One that nobody has told of yet cannot be reached until somebody does.
    #[must_use]
    pub fn remote(&self, name: &str) -> Arc<Remote> {
        let mut remotes = self.remotes();
        if let Some(remote) = remotes.get(name) {
            return Arc::clone(remote);
        }
        let remote = Arc::new(Remote::new(name.to_owned(), self.begun));
        remotes.insert(name.to_owned(), Arc::clone(&remote));
        remote
    }

    /// The hosts are these from now on.
    pub fn learn(&self, nodes: Nodes) {
        // When not one is alive it is more likely that this proxy does not hear them. Trying costs nothing then.
        let deaf = !nodes.iter().any(|node| node.alive);
        let nodes: Nodes =
            nodes.iter().map(|node| Node { alive: node.alive || deaf, ..node.clone() }).collect();
        for node in nodes.iter().filter(|node| !self.is_own(node.name())) {
            self.remote(node.name()).learn(node, &self.config);
        }
        self.remotes().retain(|name, remote| {
            let there = nodes.iter().any(|node| node.name() == name);
            if !there {
                remote.alive.store(false, SeqCst);
            }
            there || Arc::strong_count(remote) > 1
        });
        self.list.store(Arc::new(nodes));
    }

    /// Those that could not be reached a moment ago, from here or from another host.
    #[must_use]
    pub fn suspects(&self) -> Vec<String> {
        self.names_of(Remote::is_suspect)
    }

    /// Those that this proxy itself could not reach: what is told to other hosts, for hearsay would never end.
    #[must_use]
    pub fn unreached(&self) -> Vec<String> {
        self.names_of(|remote| remote.is_suspect() && remote.first_hand.load(Relaxed))
    }

    fn names_of(&self, which: impl Fn(&Remote) -> bool) -> Vec<String> {
        self.remotes().values().filter(|remote| which(remote)).map(|remote| remote.name.clone()).collect()
    }

    fn remotes(&self) -> MutexGuard<'_, HashMap<String, Arc<Remote>>> {
        self.remotes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Remote {
    fn new(name: String, begun: Instant) -> Self {
        Self {
            name,
            begun,
            way: ArcSwapOption::empty(),
            alive: AtomicBool::new(false),
            suspect_until: AtomicU64::new(0),
            first_hand: AtomicBool::new(false),
        }
    }

    /// Whether requests may be sent there.
    #[must_use]
    pub fn is_fit(&self) -> bool {
        self.alive.load(SeqCst) && !self.is_suspect() && self.way.load().is_some()
    }

    /// Whether it could not be reached a moment ago.
    #[must_use]
    pub fn is_suspect(&self) -> bool {
        let until = self.suspect_until.load(Relaxed);
        until != 0 && millis(self.begun.elapsed()) < until
    }

    /// It could not be reached: its instances are passed over for a moment.
    pub fn suspect(&self, reason: &str) {
        if !self.is_suspect() {
            tracing::warn!(
                node = self.name,
                reason,
                "another host cannot be reached; its instances are passed over for 2 s"
            );
        }
        self.first_hand.store(true, Relaxed);
        self.suspect_until.store(millis(self.begun.elapsed() + SUSPICION), Relaxed);
    }

    /// Another host could not reach it. That makes no suspicion last longer.
    pub fn suspect_by_hearsay(&self) {
        if !self.is_suspect() {
            self.first_hand.store(false, Relaxed);
            self.suspect_until.store(millis(self.begun.elapsed() + SUSPICION), Relaxed);
        }
    }

    /// It answered.
    pub fn forgive(&self) {
        self.suspect_until.store(0, Relaxed);
    }

    /// Where Pingora is to connect to; `upgrade` for WebSocket handshakes.
    #[must_use]
    pub fn peer(&self, upgrade: bool) -> Option<Box<HttpPeer>> {
        self.way.load().as_ref().map(|way| way.peer(upgrade))
    }

    fn learn(&self, node: &Node, config: &Config) {
        let address: Option<SocketAddr> = node.compute.dispatch.parse().ok();
        let known = self.way.load().as_ref().map(|way| way.address);
        if address != known {
            self.way.store(address.map(|address| Arc::new(remote::way(address, &self.name, config))));
        }
        let was = self.alive.swap(node.alive, SeqCst);
        if was != node.alive {
            if node.alive {
                self.forgive();
                tracing::info!(node = self.name, dispatch = node.compute.dispatch, "another host is there");
            } else {
                tracing::warn!(node = self.name, "another host is taken for dead: it gets no requests");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use cmdb::compute::Compute;
    use launcher_client::paths::StateDir;

    use super::*;
    use crate::config::Cluster;

    fn hosts() -> Hosts {
        let cluster = Cluster { node: Some("a".to_owned()), ..Cluster::default() };
        let config = Config { cluster: Some(cluster), ..Config::new(StateDir::new("/nowhere")) };
        Hosts::new(&config, Instant::now())
    }

    fn node(name: &str, alive: bool) -> Node {
        let compute =
            Compute { name: name.to_owned(), dispatch: "192.0.2.7:9080".to_owned(), ..Compute::default() };
        Node { compute, alive, ..Node::default() }
    }

    #[test]
    fn a_host_is_fit_while_it_is_alive_and_nobody_suspects_it() {
        let hosts = hosts();
        let remote = hosts.remote("b");
        assert!(!remote.is_fit(), "nobody has told of it");
        hosts.learn([node("a", true), node("b", true)].into());
        assert!(remote.is_fit() && hosts.is_own("a") && !hosts.is_own("b"));
        remote.suspect_by_hearsay();
        assert!(!remote.is_fit() && hosts.unreached().is_empty(), "what was only heard is not told on");
        remote.suspect("no route");
        assert!(!remote.is_fit() && hosts.unreached() == ["b"]);
        remote.forgive();
        assert!(remote.is_fit());
        hosts.learn([node("a", true), node("b", false)].into());
        assert!(!remote.is_fit());
        hosts.learn([node("a", true)].into());
        assert!(!hosts.remote("b").is_fit(), "it is gone");
    }

    #[test]
    fn when_all_seem_dead_it_is_this_proxy_that_hears_nothing() {
        let hosts = hosts();
        hosts.learn([node("a", false), node("b", false)].into());
        assert!(hosts.remote("b").is_fit());
        assert!(hosts.list().iter().all(|node| node.alive));
    }

    #[test]
    fn a_host_that_moved_is_reached_at_its_new_address_with_new_connections() {
        let hosts = hosts();
        hosts.learn([node("b", true)].into());
        let before = hosts.remote("b").peer(false).unwrap();
        hosts.learn([node("b", true)].into());
        assert_eq!(hosts.remote("b").peer(false).unwrap().group_key, before.group_key);
        let mut moved = node("b", true);
        moved.compute.dispatch = "192.0.2.8:9080".to_owned();
        hosts.learn([moved].into());
        assert_ne!(hosts.remote("b").peer(false).unwrap().group_key, before.group_key);
    }
}
