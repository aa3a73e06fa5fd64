//! Hosts in the CMDB: who is there, who is silent, what the operator says of them, and what all that survives.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking; its name says what it is about"
)]

mod common;

use std::{sync::Arc, time::Duration};

use cmdb::{
    Change, Outcome, Store, StoreError, Transition,
    compute::{Compute, Load, Node, find, lost},
    redis::{HEARTBEAT, RedisStore, Role},
};
use common::{app, redis::Redis};
use tokio::{sync::mpsc::Receiver, task::JoinHandle};

fn compute(name: &str) -> Compute {
    let labels = [("zone".to_owned(), "a".to_owned())].into();
    let dispatch = format!("{name}.internal:8443");
    Compute { name: name.into(), dispatch, labels, cpu: 4_000, memory: 8 << 30, ..Compute::default() }
}

const LOAD: Load = Load { free_cpu: 4_000, free_memory: 8 << 30, instances: 0 };

/// A launcher, as far as its heartbeat goes.
struct Host {
    store: Arc<RedisStore>,
    heart: JoinHandle<()>,
}

impl Host {
    async fn start(redis: &Redis, name: &str) -> Self {
        let store = redis.store(Role::Node(name.into())).await;
        store.beat(&compute(name), LOAD).await.unwrap();
        let heart = {
            let (store, compute) = (Arc::clone(&store), compute(name));
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(HEARTBEAT).await;
                    let _ = store.beat(&compute, LOAD).await;
                }
            })
        };
        Self { store, heart }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.heart.abort();
    }
}

/// Waits until the store's hosts are as `wanted`.
async fn until(store: &RedisStore, wanted: impl Fn(&[Node]) -> bool) {
    let holds = async {
        while !wanted(&store.nodes()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), holds)
        .await
        .unwrap_or_else(|_| panic!("not so within 30 s: {:?}", store.nodes()));
}

fn is_alive(nodes: &[Node], name: &str) -> Option<bool> {
    find(nodes, name).map(|node| node.alive)
}

/// The next list of hosts that a watch tells.
async fn told(watch: &mut Receiver<Change>) -> cmdb::compute::Nodes {
    let next = async {
        loop {
            if let Change::Nodes(nodes) = watch.recv().await.expect("the watch goes on") {
                return nodes;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), next).await.expect("nothing told within 30 s")
}

#[tokio::test]
async fn everybody_knows_who_is_there_and_who_is_silent() {
    let redis = Redis::start();
    let (one, two) = (Host::start(&redis, "one").await, Host::start(&redis, "two").await);
    let edge = redis.store(Role::Reader).await;
    let mut watch = edge.watch().await.unwrap();
    let first = told(&mut watch).await;
    assert_eq!(find(&first, "one").map(|node| &node.compute), Some(&compute("one")));
    assert!(matches!(watch.try_recv(), Ok(Change::Synced)), "hosts come before the end of the beginning");
    until(&one.store, |nodes| is_alive(nodes, "two") == Some(true)).await;

    drop(two);

    until(&edge, |nodes| is_alive(nodes, "two") == Some(false)).await;
    until(&one.store, |nodes| lost(nodes) == ["two"]).await;
    assert_eq!(lost(&told(&mut watch).await), ["two"]);
    assert_eq!(is_alive(&edge.nodes(), "one"), Some(true));
    let _two = Host::start(&redis, "two").await;
    assert!(lost(&told(&mut watch).await).is_empty());
}

#[tokio::test]
async fn nobody_is_declared_dead_by_a_redis_that_is_away() {
    let mut redis = Redis::start();
    let hosts = [Host::start(&redis, "one").await, Host::start(&redis, "two").await];
    let edge = redis.store(Role::Reader).await;
    let mut watch = edge.watch().await.unwrap();
    assert_eq!(told(&mut watch).await.len(), 2);

    redis.kill();
    // Longer than a silence that is taken for death.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(edge.nodes().iter().chain(&*hosts[0].store.nodes()).all(|node| node.alive));
    redis.start_again();
    common::redis::connected(&edge).await;
    common::redis::connected(&hosts[0].store).await;
    tokio::time::sleep(Duration::from_secs(2)).await;

    assert!(edge.nodes().iter().chain(&*hosts[0].store.nodes()).all(|node| node.alive));
    while let Ok(change) = watch.try_recv() {
        let Change::Nodes(nodes) = change else { continue };
        assert!(lost(&nodes).is_empty(), "{nodes:?}");
    }
    let newcomer = redis.store(Role::Reader).await;
    until(&newcomer, |nodes| nodes.len() == 2 && nodes.iter().all(|node| node.alive)).await;
}

#[tokio::test]
async fn a_host_that_is_to_be_empty_stays_so_over_a_flush_until_the_operator_says_otherwise() {
    let redis = Redis::start();
    let one = Host::start(&redis, "one").await;
    let operator = redis.store(Role::Configurer).await;
    until(&operator, |nodes| nodes.len() == 1).await;
    let drains = |nodes: &[Node]| find(nodes, "one").is_some_and(|node| node.draining);
    operator.set_draining("one", true).await.unwrap();
    until(&one.store, drains).await;

    redis.cli(&["FLUSHALL"]);

    loop {
        let newcomer = redis.store(Role::Reader).await;
        if drains(&newcomer.nodes()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    operator.set_draining("one", false).await.unwrap();
    until(&one.store, |nodes| !drains(nodes)).await;
    redis.cli(&["FLUSHALL"]);
    tokio::time::sleep(HEARTBEAT * 3).await;
    assert!(!drains(&redis.store(Role::Reader).await.nodes()), "the older word does not come back");
}

#[tokio::test]
async fn only_a_dead_host_is_forgotten_and_its_instances_with_it() {
    let redis = Redis::start();
    let (one, two) = (Host::start(&redis, "one").await, Host::start(&redis, "two").await);
    two.store.put_app(app("blog", "blog.example.com")).await.unwrap();
    let blog = "blog".parse().unwrap();
    let wake = Transition::Wake { node: "two".into(), start_timeout_ms: 60_000, lost: Vec::new() };
    let Outcome::Own(generation) = two.store.apply(&blog, wake).await.unwrap().0 else { panic!() };
    let known = async |name: &str| until(&one.store, |nodes| find(nodes, name).is_some()).await;
    known("two").await;

    let refused = one.store.forget_node("two").await.unwrap_err();
    assert!(matches!(refused, StoreError::NodeAlive(_)), "{refused}");
    let refused = one.store.forget_node("nobody").await.unwrap_err();
    assert!(matches!(refused, StoreError::UnknownNode(_)), "{refused}");
    drop(two);
    until(&one.store, |nodes| lost(nodes) == ["two"]).await;
    one.store.forget_node("two").await.unwrap();

    assert_eq!(one.store.nodes().len(), 1);
    let edge = redis.store(Role::Reader).await;
    assert_eq!(edge.nodes().len(), 1);
    let record = edge.get(&blog).unwrap().1;
    assert!(record.instances.is_empty() && record.is_fenced("two", generation));
    let _two = Host::start(&redis, "two").await;
    known("two").await;
}

#[tokio::test]
async fn two_hosts_of_one_name_are_told_so() {
    let redis = Redis::start();
    let store = redis.store(Role::Node("one".into())).await;
    store.beat(&compute("one"), LOAD).await.unwrap();
    let again = redis.store(Role::Node("one".into())).await;
    again.beat(&compute("one"), LOAD).await.expect("as after a restart");
    again.beat(&compute("one"), LOAD).await.unwrap();

    let complaint = store.beat(&compute("one"), LOAD).await.unwrap_err();

    assert!(matches!(complaint, StoreError::NodeTwice(_)), "{complaint}");
}

#[tokio::test]
async fn a_host_knows_itself_while_redis_is_away() {
    let store = RedisStore::open(
        "redis+unix:///nowhere/redis.sock",
        Role::Node("one".into()),
        Duration::from_millis(50),
    );
    let store = store.unwrap();

    let beat = store.beat(&compute("one"), LOAD).await;

    assert!(matches!(beat, Err(StoreError::Unavailable(_))), "{beat:?}");
    assert_eq!(is_alive(&store.nodes(), "one"), Some(true));
}

#[tokio::test]
async fn hashes_that_are_none_harm_nobody() {
    let redis = Redis::start();
    let one = Host::start(&redis, "one").await;
    let edge = redis.store(Role::Reader).await;
    until(&edge, |nodes| nodes.len() == 1).await;

    redis.cli(&["SET", "fch:{hosts}:registered", "no hash"]);
    tokio::time::sleep(Duration::from_secs(2)).await;

    assert_eq!(is_alive(&edge.nodes(), "one"), Some(true), "what was known stays");
    let newcomer = redis.store(Role::Reader).await;
    assert!(newcomer.nodes().is_empty());
    redis.cli(&["DEL", "fch:{hosts}:registered"]);
    until(&newcomer, |nodes| is_alive(nodes, "one") == Some(true)).await;
    drop(one);
}
