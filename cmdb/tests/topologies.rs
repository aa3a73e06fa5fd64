//! The CMDB in Redis as operators run it: a primary that dies under a Sentinel, a slow network, users with few rights.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking; its name says what it is about"
)]

mod common;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use cmdb::{
    AppName, Generation, Outcome, Store, StoreError, Transition,
    compute::{Compute, Load, lost},
    redis::{BUDGET, HEARTBEAT, RedisStore, Role},
};
use common::{
    app,
    redis::{Redis, connected},
    servers::{Relay, Sentinel},
};

const PATIENCE: Duration = Duration::from_secs(30);

fn name(text: &str) -> AppName {
    text.parse().unwrap()
}

async fn wait_for(what: &str, wanted: impl AsyncFn() -> bool) {
    let holds = async {
        while !wanted().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, holds).await.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"));
}

/// A launcher as far as the CMDB goes: it starts what it is told to own, and knows what it runs.
struct Launcher {
    node: &'static str,
    store: Arc<RedisStore>,
    runs: Mutex<BTreeMap<(AppName, Generation), ()>>,
}

impl Launcher {
    fn open(address: &str, node: &'static str) -> Arc<Self> {
        let store = Arc::new(RedisStore::open(address, Role::Node(node.into()), BUDGET).unwrap());
        let launcher = Arc::new(Self { node, store: Arc::clone(&store), runs: Mutex::default() });
        tokio::spawn(async move {
            let compute = Compute { name: node.into(), ..Compute::default() };
            loop {
                let _ = store.beat(&compute, Load::default()).await;
                tokio::time::sleep(HEARTBEAT).await;
            }
        });
        launcher
    }

    /// Wakes an app, or `ends` it where it runs here. Nothing may fail for want of Redis.
    async fn visit(&self, app: &AppName, ends: bool, owners: &Owners) {
        let lost = Vec::new();
        let wake = Transition::Wake { node: self.node.into(), start_timeout_ms: 60_000, lost };
        let (outcome, _) = self.store.apply(app, wake).await.expect("a wake is answered");
        let generation = match outcome {
            Outcome::Own(generation) => generation,
            Outcome::Ready(generation) if ends => return self.end(app, generation).await,
            _ => return,
        };
        owners.note(app, generation, self.node);
        self.runs.lock().unwrap().insert((app.clone(), generation), ());
        let steps = [
            Transition::Ready { generation, port: 80 },
            Transition::Freeze { generation },
            Transition::Thaw { generation },
        ];
        for step in steps {
            let done = self.store.apply(app, step).await.expect("a step is taken").0;
            assert_eq!(done, Outcome::Done, "{app} {generation}");
        }
    }

    async fn end(&self, app: &AppName, generation: Generation) {
        if self.runs.lock().unwrap().remove(&(app.clone(), generation)).is_some() {
            self.store.apply(app, Transition::Gone { generation }).await.expect("an end is noted");
        }
    }

    fn runs(&self) -> Vec<(AppName, Generation)> {
        self.runs.lock().unwrap().keys().cloned().collect()
    }
}

/// Who has owned which generation, ever.
#[derive(Default)]
struct Owners(Mutex<HashMap<(AppName, Generation), &'static str>>);

impl Owners {
    fn note(&self, app: &AppName, generation: Generation, node: &'static str) {
        let before = self.0.lock().unwrap().insert((app.clone(), generation), node);
        assert_eq!(before, None, "{app} {generation} of {node} has had an owner already");
    }

    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

/// What a store says that runs on a node.
fn on_node(store: &RedisStore, node: &str) -> Vec<(AppName, Generation)> {
    let all = store.list().into_iter().flat_map(|(app, record)| {
        let here = record.instances.values().filter(|i| i.node == node).map(|i| i.generation);
        here.map(|generation| (app.name.clone(), generation)).collect::<Vec<_>>()
    });
    let mut all: Vec<_> = all.collect();
    all.sort();
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_dies_under_load_costs_no_wake_and_all_converge_on_its_successor() {
    let mut redis = Sentinel::start();
    let launchers = [Launcher::open(&redis.address(), "one"), Launcher::open(&redis.address(), "two")];
    let edge = RedisStore::open(&redis.address(), Role::Reader, BUDGET).unwrap();
    let apps: Vec<AppName> = (0..10).map(|n| name(&format!("app-{n}"))).collect();
    connected(&launchers[0].store).await;
    for app_name in &apps {
        launchers[0].store.put_app(app(app_name.as_str(), &format!("{app_name}.example.com"))).await.unwrap();
    }
    for store in [&launchers[1].store, &edge] {
        wait_for("all apps are known", async || store.list().len() == apps.len()).await;
    }
    let (owners, stop) = (Arc::new(Owners::default()), Arc::new(AtomicBool::new(false)));
    let mut load = tokio::task::JoinSet::new();
    for launcher in &launchers {
        let (launcher, apps) = (Arc::clone(launcher), apps.clone());
        let (owners, stop) = (Arc::clone(&owners), Arc::clone(&stop));
        load.spawn(async move {
            for n in 0.. {
                if stop.load(SeqCst) {
                    return;
                }
                launcher.visit(&apps[n % apps.len()], true, &owners).await;
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
    }
    wait_for("some load", async || owners.count() > 100).await;

    redis.primary.kill();
    redis.replica.wait(&["INFO", "replication"], "role:master");
    let before = owners.count();
    for launcher in &launchers {
        connected_again(&launcher.store).await;
    }
    wait_for("load on the new primary", async || owners.count() > before + 20).await;
    stop.store(true, SeqCst);
    load.join_all().await;

    assert!(launchers.iter().all(|launcher| lost(&launcher.store.nodes()).is_empty()), "nobody was lost");
    let newcomer = RedisStore::open(&redis.address(), Role::Reader, BUDGET).unwrap();
    connected(&newcomer).await;
    for launcher in &launchers {
        let node = launcher.node;
        for (whose, store) in [
            ("one", &*launchers[0].store),
            ("two", &*launchers[1].store),
            ("edge", &edge),
            ("new", &newcomer),
        ] {
            let what = format!("{whose} knows what runs on {node}");
            wait_for(&what, async || on_node(store, node) == launcher.runs()).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_the_sentinels_have_given_up_is_left_though_it_answers() {
    let redis = Sentinel::start();
    let one = Launcher::open(&redis.address(), "one");
    let edge = RedisStore::open(&redis.address(), Role::Reader, BUDGET).unwrap();
    connected(&one.store).await;
    connected(&edge).await;
    one.store.put_app(app("before", "before.example.com")).await.unwrap();
    redis.replica.wait(&["EXISTS", "fc:{before}"], "1");

    // Whoever comes anew is refused: Sentinel and replica lose it, those who are connected do not.
    redis.primary.cli(&["CONFIG", "SET", "requirepass", "secret"]);
    let clients = redis.primary.cli(&["-a", "secret", "CLIENT", "LIST"]);
    let theirs = clients.lines().filter(|line| line.contains("name=sentinel-") || line.contains("flags=S"));
    for line in theirs {
        let id = line.split_whitespace().find_map(|field| field.strip_prefix("id=")).unwrap();
        redis.primary.cli(&["-a", "secret", "CLIENT", "KILL", "ID", id]);
    }
    redis.replica.wait(&["INFO", "replication"], "role:master");

    let newcomer = RedisStore::open(&redis.address(), Role::Configurer, BUDGET).unwrap();
    connected(&newcomer).await;
    wait_for("something new on the new primary", async || {
        newcomer.put_app(app("after", "after.example.com")).await.is_ok()
    })
    .await;
    for store in [&*one.store, &edge] {
        wait_for("it is known", async || store.get(&name("after")).is_some()).await;
    }
    one.visit(&name("before"), false, &Owners::default()).await;
    wait_for("all know what runs", async || on_node(&newcomer, "one") == one.runs()).await;
    assert!(redis.replica.cli(&["HGET", "fc:{before}", "record"]).contains("ready"));
}

/// The link may not have been missed yet: a word of this process goes to Redis and comes back.
async fn connected_again(store: &RedisStore) {
    wait_for("Redis takes what is written", async || {
        let probe = app("probe", "probe.example.com");
        store.put_app(probe).await.is_ok()
    })
    .await;
    connected(store).await;
    store.remove_app(&name("probe")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_redis_delays_no_wake_for_long_and_kills_no_host() {
    let redis = Redis::start();
    let relay = Relay::to(&redis.socket()).await;
    let near = Launcher::open(&redis.address(), "near");
    let far = Launcher::open(&format!("redis://127.0.0.1:{}", relay.port), "far");
    connected(&near.store).await;
    for n in 0..20 {
        near.store.put_app(app(&format!("app-{n}"), &format!("{n}.example.com"))).await.unwrap();
    }
    wait_for("all apps are known", async || far.store.list().len() == 20).await;
    for store in [&near.store, &far.store] {
        wait_for("both hosts are known", async || store.nodes().iter().filter(|n| n.alive).count() == 2)
            .await;
    }
    let owners = Owners::default();

    for (delay, first) in [(100, 0), (1_000, 10)] {
        relay.delay(delay);
        let began = Instant::now();
        for n in first..first + 10 {
            far.visit(&name(&format!("app-{n}")), false, &owners).await;
        }
        // Forty commands of 200 ms and more; but after three in vain nobody waits, and one in a second is tried.
        let took = began.elapsed();
        assert!(took < Duration::from_secs(4), "{took:?} with {delay} ms");
        tokio::time::sleep(Duration::from_secs(2)).await;
        if delay < 500 {
            assert!(lost(&near.store.nodes()).is_empty(), "it beats, late: {:?}", near.store.nodes());
        }
        assert!(lost(&far.store.nodes()).is_empty(), "who hears nothing declares nobody dead");
    }
    relay.delay(0);

    wait_for("near knows what far runs", async || on_node(&near.store, "far") == far.runs()).await;
    wait_for("far is alive for near", async || lost(&near.store.nodes()).is_empty()).await;
    assert_eq!(far.runs().len(), 20);
}

/// As docs/operate.md has it.
const WRITER: &str = "~fc:* ~fch:* ~fcn:* resetchannels -@all +hello +auth +ping +select +role +client|tracking \
                      +info +scan +evalsha +script|load +get +set +del +exists +expire +persist +type \
                      +time +hget +hset +hdel +hmget +hgetall +hstrlen";
const READER: &str = "~fc:* ~fch:* resetchannels -@all +hello +auth +ping +select +role +client|tracking \
                      +info +scan +evalsha +script|load +get +exists +type +hmget +hgetall +hstrlen";

#[tokio::test]
async fn users_with_the_documented_rights_can_do_all_they_need_and_a_reader_cannot_write() {
    let docs = include_str!("../../docs/operate.md").split_whitespace().collect::<Vec<_>>().join(" ");
    for rights in [WRITER, READER] {
        let rights = rights.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(docs.contains(&rights), "docs/operate.md has other rights than: {rights}");
    }
    let redis = Redis::start();
    for (user, rights) in [("fc", WRITER), ("edge", READER)] {
        let mut command = vec!["ACL", "SETUSER", user, "on", ">secret"];
        command.extend(rights.split_whitespace());
        assert_eq!(redis.cli(&command), "OK");
    }
    redis.cli(&["ACL", "SETUSER", "default", "off"]);
    let open = |user: &str, role| {
        let address = format!("{}?user={user}&pass=secret", redis.address());
        RedisStore::open(&address, role, Duration::from_secs(10)).unwrap()
    };
    let (here, edge) = (open("fc", Role::Node("here".into())), open("edge", Role::Reader));
    connected(&here).await;
    connected(&edge).await;

    let compute = Compute { name: "here".into(), ..Compute::default() };
    here.beat(&compute, Load::default()).await.unwrap();
    here.beat(&compute, Load::default()).await.unwrap();
    here.set_draining("here", true).await.unwrap();
    for (app_name, host) in
        [("blog", "old.example.com"), ("blog", "new.example.com"), ("gone", "gone.example.com")]
    {
        here.put_app(app(app_name, host)).await.unwrap();
    }
    here.remove_app(&name("gone")).await.unwrap();
    let wake = Transition::Wake { node: "here".into(), start_timeout_ms: 60_000, lost: Vec::new() };
    let Outcome::Own(generation) = here.apply(&name("blog"), wake).await.unwrap().0 else { panic!() };
    here.apply(&name("blog"), Transition::Ready { generation, port: 80 }).await.unwrap();
    here.confirm_removals().await.unwrap();

    wait_for("the edge knows", async || {
        let ready = edge.get(&name("blog")).is_some_and(|(_, record)| record.ready().count() == 1);
        ready && edge.nodes().first().is_some_and(|node| node.draining)
    })
    .await;
    let refused = edge.put_app(app("evil", "evil.example.com")).await.unwrap_err();
    assert!(matches!(refused, StoreError::Unavailable(_)), "{refused}");
    let refused = edge.beat(&compute, Load::default()).await.unwrap_err();
    assert!(matches!(refused, StoreError::Unavailable(_)), "{refused}");
    let refused = edge.apply(&name("blog"), Transition::Gone { generation }).await;
    assert!(refused.is_err(), "{refused:?}");
    assert_eq!(on_node(&here, "here").len(), 1);
}
