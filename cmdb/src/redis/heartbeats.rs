//! Which hosts there are and which of them live: judged from heartbeats that change, on this process's own clock.
//!
//! Pure: the time comes from the caller. Whoever reads at other moments comes to the same view a moment later.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use tokio::time::Instant;

use super::DEAD_AFTER;
use crate::{
    compute::{Compute, Load, Node, Nodes, is_name},
    placement,
};

/// Nobody is declared dead for so long after Redis could be reached (again): the others have to come back, too.
pub(super) const GRACE: Duration = Duration::from_secs(3);
/// After so long without Redis nobody knows any more what another host has left.
const STALE: Duration = Duration::from_secs(2);
/// More hosts than this are not taken in.
const HOSTS_MAX: usize = 4_096;
/// Most bytes of what a host says of itself.
const SAID_MAX: usize = 16_384;

/// Everything that Redis holds of hosts, as it is written there, by host's name.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// [`Compute`] as JSON; empty for a host that the operator has forgotten.
    pub(super) registered: HashMap<String, Vec<u8>>,
    /// See [`Drain`].
    pub(super) drains: HashMap<String, Vec<u8>>,
    /// See [`beat`].
    pub(super) beats: HashMap<String, Vec<u8>>,
}

/// What the operator has last said: whether a host is to be empty. Written as `1 STAMP` or `0 STAMP`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Drain {
    pub(super) on: bool,
    /// The later word has the higher stamp: ms since the Unix epoch, by Redis's clock.
    pub(super) stamp: u64,
}

/// What was learned.
#[derive(Debug, Default)]
pub(super) struct News {
    pub(super) nodes: Nodes,
    /// Something of it matters to others.
    pub(super) noticeable: bool,
    /// Redis has lost these words of the operator.
    pub(super) forgotten: Vec<(String, Drain)>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Heartbeats {
    hosts: BTreeMap<String, Host>,
    /// What others were last told.
    told: Nodes,
    /// Redis could be reached at the last attempt.
    in_touch: bool,
    /// When it was reached last.
    touched: Option<Instant>,
    grace_until: Option<Instant>,
    /// This process's own host: it lives.
    own: Option<String>,
}

#[derive(Debug)]
struct Host {
    /// As written, so that it is decoded only when it has changed.
    said: Vec<u8>,
    node: Node,
    drain: Drain,
    /// The part of its heartbeat that differs from one to the next.
    beat: String,
    /// When it changed last.
    changed: Instant,
}

/// A heartbeat as it is written: what makes it differ from every other, and what the host has left.
pub(super) fn beat(boot: u64, number: u64, load: Load) -> String {
    let load = serde_json::to_string(&load).unwrap_or_default();
    format!("{boot:016x}.{number} {load}")
}

/// Whether that heartbeat is of this life of a process.
pub(super) fn is_of(boot: u64, beat: &[u8]) -> bool {
    beat.starts_with(format!("{boot:016x}.").as_bytes())
}

impl Drain {
    pub(super) fn parse(written: &[u8]) -> Option<Self> {
        let (on, stamp) = std::str::from_utf8(written).ok()?.split_once(' ')?;
        Some(Self { on: on == "1", stamp: stamp.parse().ok()? })
    }
}

impl Heartbeats {
    /// `own`: the host on which this process runs instances.
    pub(super) fn new(own: Option<String>) -> Self {
        Self { own, ..Self::default() }
    }

    /// Redis cannot be reached: nothing can be said of anybody, so everybody stays as they were. Only their load is not known
    /// any more, lest those who know it from different moments choose different hosts.
    pub(super) fn out_of_touch(&mut self, now: Instant) -> News {
        self.in_touch = false;
        if self.is_stale(now) {
            self.hosts.values_mut().for_each(|host| host.node.load = Load::default());
        }
        self.news(Vec::new())
    }

    fn is_stale(&self, now: Instant) -> bool {
        !self.in_touch && self.touched.is_none_or(|touched| now - touched >= STALE)
    }

    /// What was known of hosts before this process began; each is alive until the contrary is shown.
    pub(super) fn recall(&mut self, nodes: &[Node], now: Instant) -> News {
        for node in nodes.iter().take(HOSTS_MAX).filter(|node| is_name(node.name())) {
            let node = Node { alive: true, load: Load::default(), ..node.clone() };
            let host = Host { node, ..Host::new(now) };
            self.hosts.entry(host.node.compute.name.clone()).or_insert(host);
        }
        self.news(Vec::new())
    }

    /// This process's own host has said so, whether Redis has heard it or not.
    pub(super) fn own(&mut self, compute: &Compute, load: Load, now: Instant) -> News {
        let load = if self.is_stale(now) { Load::default() } else { load };
        let host = self.hosts.entry(compute.name.clone()).or_insert_with(|| Host::new(now));
        host.node = Node { compute: compute.clone(), load, alive: true, draining: host.node.draining };
        host.said.clear();
        self.news(Vec::new())
    }

    /// The operator has said this of a host. Whether it was the last word.
    pub(super) fn drain(&mut self, name: &str, drain: Drain) -> News {
        if let Some(host) = self.hosts.get_mut(name).filter(|host| host.drain.stamp < drain.stamp) {
            host.set_drain(name, drain);
        }
        self.news(Vec::new())
    }

    pub(super) fn drain_of(&self, name: &str) -> Option<Drain> {
        self.hosts.get(name).map(|host| host.drain)
    }

    pub(super) fn forget(&mut self, name: &str) -> News {
        self.hosts.remove(name);
        self.news(Vec::new())
    }

    /// Redis has been read at `now`, which took `trip`.
    pub(super) fn take_in(&mut self, written: &Written, now: Instant, trip: Duration) -> News {
        if !std::mem::replace(&mut self.in_touch, true) {
            self.grace_until = Some(now + GRACE);
        }
        self.touched = Some(now);
        for (name, said) in &written.registered {
            self.hear(name, said, now);
        }
        // What takes long to be read takes long to be written.
        let dead_after = DEAD_AFTER + trip * 2;
        let grace = self.grace_until.is_some_and(|until| now < until);
        let mut forgotten = Vec::new();
        for (name, host) in &mut self.hosts {
            let own = self.own.as_ref() == Some(name);
            let beat = written.beats.get(name).filter(|beat| beat.len() <= SAID_MAX);
            if beat.is_some_and(|beat| host.has_beaten(beat, now)) && !host.node.alive {
                tracing::info!(host = %name, "a host is there");
                host.node.alive = true;
            } else if host.node.alive && !own && !grace && now - host.changed >= dead_after {
                let silent = (now - host.changed).as_millis();
                tracing::warn!(host = %name, "a host is taken for dead: no heartbeat for {silent} ms");
                host.node.alive = false;
            }
            let drain = written.drains.get(name).and_then(|drain| Drain::parse(drain)).unwrap_or_default();
            if drain.stamp > host.drain.stamp {
                host.set_drain(name, drain);
            } else if drain.stamp < host.drain.stamp {
                forgotten.push((name.clone(), host.drain));
            }
        }
        self.news(forgotten)
    }

    /// What a host says of itself. One that Redis lacks altogether is not forgotten: Redis may have been emptied.
    fn hear(&mut self, name: &str, said: &[u8], now: Instant) {
        let own = self.own.as_deref() == Some(name);
        if said.is_empty() && !own {
            self.hosts.remove(name);
            return;
        }
        let known = self.hosts.get(name);
        let full = known.is_none() && self.hosts.len() >= HOSTS_MAX;
        if known.is_some_and(|host| host.said == said) || own {
            return;
        }
        if full || !is_name(name) || said.len() > SAID_MAX {
            return;
        }
        match serde_json::from_slice::<Compute>(said) {
            Ok(compute) if compute.name == name => {
                let host = self.hosts.entry(name.to_owned()).or_insert_with(|| Host::new(now));
                host.node.compute = compute;
                host.said = said.to_vec();
            }
            // Asked again each time, said once: what is known of it stays.
            _ => {
                if let Some(host) = self.hosts.get_mut(name) {
                    host.said = said.to_vec();
                }
                tracing::debug!(host = name, "what Redis holds of a host cannot be read");
            }
        }
    }

    fn news(&mut self, forgotten: Vec<(String, Drain)>) -> News {
        let nodes: Nodes = self.hosts.values().map(|host| host.node.clone()).collect();
        let same =
            nodes.len() == self.told.len() && nodes.iter().zip(&*self.told).all(|(a, b)| is_alike(a, b));
        if !same {
            self.told = nodes.clone();
        }
        News { nodes, noticeable: !same, forgotten }
    }
}

/// Whether what differs of two views of a host matters to nobody.
fn is_alike(one: &Node, other: &Node) -> bool {
    one.compute == other.compute
        && (one.alive, one.draining) == (other.alive, other.draining)
        && placement::parts(one) == placement::parts(other)
}

impl Host {
    fn new(now: Instant) -> Self {
        Self {
            said: Vec::new(),
            node: Node::default(),
            drain: Drain::default(),
            beat: String::new(),
            changed: now,
        }
    }

    /// Whether this is another heartbeat than the last.
    fn has_beaten(&mut self, written: &[u8], now: Instant) -> bool {
        let Some((beat, load)) = std::str::from_utf8(written).ok().and_then(|text| text.split_once(' '))
        else {
            return false;
        };
        if beat == self.beat {
            return false;
        }
        beat.clone_into(&mut self.beat);
        self.changed = now;
        if let Ok(load) = serde_json::from_str(load) {
            self.node.load = load;
        }
        true
    }

    fn set_drain(&mut self, name: &str, drain: Drain) {
        if drain.on != self.node.draining {
            tracing::info!(host = %name, "a host {}", if drain.on { "is to be emptied" } else { "takes apps again" });
        }
        self.drain = drain;
        self.node.draining = drain.on;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Redis and a clock, as a test moves them.
    struct Scene {
        heartbeats: Heartbeats,
        written: Written,
        now: Instant,
        number: u64,
    }

    impl Scene {
        fn new(own: Option<&str>) -> Self {
            let heartbeats = Heartbeats::new(own.map(str::to_owned));
            Self { heartbeats, written: Written::default(), now: Instant::now(), number: 0 }
        }

        fn beat(&mut self, name: &str) {
            self.beat_with(name, Load::default());
        }

        fn beat_with(&mut self, name: &str, load: Load) {
            self.number += 1;
            let compute = Compute { name: name.into(), cpu: 8_000, memory: 8 << 30, ..Compute::default() };
            self.written.registered.insert(name.into(), serde_json::to_vec(&compute).unwrap());
            self.written.beats.insert(name.into(), beat(1, self.number, load).into_bytes());
        }

        fn pass(&mut self, ms: u64) {
            self.now += Duration::from_millis(ms);
        }

        fn look(&mut self) -> News {
            self.heartbeats.take_in(&self.written, self.now, Duration::ZERO)
        }

        /// Looks for `ms`, each half second, while these beat.
        fn go_on(&mut self, ms: u64, beating: &[&str]) -> News {
            let mut last = News::default();
            for _ in 0..ms / 500 {
                self.pass(500);
                beating.iter().for_each(|name| self.beat(name));
                last = self.look();
            }
            last
        }

        fn alive(&mut self) -> Vec<String> {
            let nodes = self.heartbeats.news(Vec::new()).nodes;
            nodes.iter().filter(|node| node.alive).map(|node| node.name().to_owned()).collect()
        }
    }

    #[test]
    fn a_host_lives_from_its_first_heartbeat_until_it_is_silent() {
        let mut scene = Scene::new(None);
        scene.beat("a");
        scene.look();
        scene.go_on(4_000, &["a"]);
        scene.beat("b");
        let news = scene.look();
        assert!(news.noticeable && news.nodes.len() == 2 && news.nodes.iter().all(|node| node.alive));

        scene.go_on(1_000, &["a"]);
        assert_eq!(scene.alive(), ["a", "b"]);
        let news = scene.go_on(500, &["a"]);
        assert!(news.noticeable);
        assert_eq!(scene.alive(), ["a"]);
        assert_eq!(crate::compute::lost(&news.nodes), ["b"]);

        scene.beat("b");
        assert!(scene.look().noticeable);
        assert_eq!(scene.alive(), ["a", "b"]);
    }

    #[test]
    fn nobody_dies_because_redis_is_away_nor_right_after() {
        let mut scene = Scene::new(None);
        scene.beat("a");
        scene.look();
        scene.go_on(4_000, &["a"]);

        scene.heartbeats.out_of_touch(scene.now);
        scene.pass(600_000);
        scene.heartbeats.out_of_touch(scene.now);
        assert_eq!(scene.alive(), ["a"]);
        assert!(!scene.look().noticeable, "its last heartbeat is ten minutes old");
        scene.go_on(2_500, &[]);
        assert_eq!(scene.alive(), ["a"]);
        scene.go_on(500, &[]);
        assert!(scene.alive().is_empty(), "it has not come back");
    }

    #[test]
    fn an_emptied_redis_forgets_no_host_and_no_word_of_the_operator() {
        let mut scene = Scene::new(None);
        ["a", "b"].iter().for_each(|name| scene.beat(name));
        scene.written.drains.insert("a".into(), b"1 1000".to_vec());
        scene.written.drains.insert("b".into(), b"0 999".to_vec());
        scene.look();
        scene.go_on(4_000, &["a", "b"]);

        scene.written = Written::default();
        let news = scene.look();

        assert!(!news.noticeable);
        let drain = |on, stamp| Drain { on, stamp };
        assert_eq!(news.forgotten, [("a".into(), drain(true, 1_000)), ("b".into(), drain(false, 999))]);
        scene.written.drains.insert("a".into(), b"0 1001".to_vec());
        let news = scene.go_on(500, &["a", "b"]);
        assert!(!news.nodes[0].draining, "the later word wins");
    }

    #[test]
    fn without_redis_all_hosts_have_equal_room_to_all() {
        let mut scene = Scene::new(Some("here"));
        let load = |free| Load { free_cpu: free, free_memory: u64::from(free) << 20, instances: 1 };
        scene.beat_with("a", load(8_000));
        scene.beat_with("b", load(1_000));
        let here = Compute { name: "here".into(), cpu: 8_000, memory: 8 << 30, ..Compute::default() };
        scene.heartbeats.own(&here, load(8_000), scene.now);
        scene.look();

        assert!(!scene.heartbeats.out_of_touch(scene.now).noticeable);
        scene.pass(2_000);
        assert!(scene.heartbeats.out_of_touch(scene.now).noticeable);

        let news = scene.heartbeats.own(&here, load(8_000), scene.now);
        assert!(news.nodes.iter().all(|node| node.alive && placement::parts(node) == (0, 0)), "{news:?}");
        scene.beat_with("a", load(8_000));
        assert_eq!(scene.look().nodes[0].load, load(8_000));
    }

    #[test]
    fn a_slow_redis_gives_more_time() {
        let mut scene = Scene::new(None);
        scene.beat("a");
        scene.look();
        scene.go_on(4_000, &["a"]);
        scene.pass(2_500);
        scene.heartbeats.take_in(&scene.written, scene.now, Duration::from_millis(600));
        assert_eq!(scene.alive(), ["a"]);
    }

    #[test]
    fn only_what_matters_is_noticed() {
        let mut scene = Scene::new(None);
        let load = |free| Load { free_cpu: 8_000, free_memory: free, instances: 3 };
        scene.beat_with("a", load(7 << 30));
        scene.look();
        scene.beat_with("a", load((7 << 30) + 4_096));
        let news = scene.look();
        assert!(!news.noticeable);
        assert_eq!(news.nodes[0].load, load((7 << 30) + 4_096), "whoever asks gets the newest");
        scene.beat_with("a", load(5 << 30));
        assert!(scene.look().noticeable);
    }

    #[test]
    fn a_hosts_own_launcher_knows_that_it_lives() {
        let mut scene = Scene::new(Some("here"));
        let compute = Compute { name: "here".into(), dispatch: "10.0.0.1:8443".into(), ..Compute::default() };
        let news = scene.heartbeats.own(&compute, Load::default(), scene.now);
        assert!(news.noticeable && news.nodes[0].alive);
        scene.beat("here");
        scene.look();
        scene.go_on(10_000, &[]);
        assert_eq!(scene.alive(), ["here"]);
        assert_eq!(scene.heartbeats.news(Vec::new()).nodes[0].compute, compute);
    }

    #[test]
    fn what_is_no_host_of_ours_is_left_out_and_harms_nobody() {
        let mut scene = Scene::new(None);
        scene.beat("a");
        let junk: [(&str, &[u8]); 5] = [
            ("../x", b"{\"name\":\"../x\"}"),
            ("other", b"{\"name\":\"a\"}"),
            ("list", b"[1]"),
            ("text", b"\xff\xfe"),
            ("big", &[b' '; SAID_MAX + 1]),
        ];
        for (name, said) in junk {
            scene.written.registered.insert(name.into(), said.to_vec());
            scene.written.beats.insert(name.into(), b"\xff no beat".to_vec());
            scene.written.drains.insert(name.into(), b"1 99999999999999999999999".to_vec());
        }
        scene.look();
        scene.written.registered.insert("a".into(), b"{".to_vec());
        scene.written.beats.insert("a".into(), b"2.1 {".to_vec());
        let news = scene.look();
        assert_eq!(news.nodes.len(), 1);
        assert!(news.nodes[0].alive && news.nodes[0].compute.cpu == 8_000, "the last good stays");
    }

    #[test]
    fn a_forgotten_host_is_gone_until_it_comes_back() {
        let mut scene = Scene::new(None);
        scene.beat("a");
        scene.look();
        scene.written.registered.insert("a".into(), Vec::new());
        scene.written.beats.remove("a");
        assert!(scene.look().nodes.is_empty());
        scene.beat("a");
        assert!(scene.look().nodes[0].alive);
    }
}
