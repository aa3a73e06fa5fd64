//! The CMDB in Redis when Redis is away, slow, emptied, restored, or holds what is no record of ours.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking; its name says what it is about"
)]

mod common;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cmdb::{
    AppName, Change, Generation, Outcome, Store, StoreError, Transition,
    compute::{Compute, Load},
    redis::{BUDGET, RedisStore, Role},
};
use common::{
    app,
    redis::{Redis, connected},
};

fn name(text: &str) -> AppName {
    text.parse().unwrap()
}

fn node(text: &str) -> Role {
    Role::Node(text.into())
}

fn wake(node: &str) -> Transition {
    Transition::Wake { node: node.into(), start_timeout_ms: 20_000, lost: Vec::new() }
}

/// Woken and ready.
async fn running(store: &RedisStore, app: &str, node: &str) -> Generation {
    let woken = store.apply(&name(app), wake(node)).await.unwrap().0;
    let Outcome::Own(generation) = woken else { panic!("{woken:?}") };
    let ready = Transition::Ready { generation, port: 80 };
    let (outcome, record) = store.apply(&name(app), ready).await.unwrap();
    assert_eq!(outcome, Outcome::Done, "{generation}: {record:?}, {:?}", store.get(&name(app)).map(|e| e.1));
    generation
}

/// Waits until the store knows the app so that `wanted` holds of its ready instances.
async fn until(store: &RedisStore, app: &str, wanted: impl Fn(Option<Vec<Generation>>) -> bool) {
    let holds = async {
        loop {
            let ready =
                |(_, record): (_, Arc<cmdb::AppRecord>)| record.ready().map(|i| i.generation).collect();
            if wanted(store.get(&name(app)).map(ready)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), holds).await.expect("not so within 20 s");
}

#[tokio::test]
async fn while_redis_is_away_a_node_goes_on_and_tells_it_afterwards() {
    let mut redis = Redis::start();
    let (here, there) = (redis.store(node("here")).await, redis.store(node("there")).await);
    here.put_app(app("blog", "blog.example.com")).await.unwrap();
    here.put_app(app("shop", "shop.example.com")).await.unwrap();
    until(&there, "shop", |ready| ready.is_some()).await;
    let kept = running(&there, "shop", "there").await;

    redis.kill();
    let woken = running(&here, "blog", "here").await;
    let refused = here.put_app(app("new", "new.example.com")).await.unwrap_err();
    redis.start_again();

    assert!(matches!(refused, StoreError::Unavailable(_)), "configuration changes are refused: {refused}");
    connected(&there).await;
    until(&there, "blog", |ready| ready == Some(vec![woken])).await;
    until(&here, "shop", |ready| ready == Some(vec![kept])).await;
    let newcomer = redis.store(Role::Reader).await;
    until(&newcomer, "shop", |ready| ready == Some(vec![kept])).await;
    until(&newcomer, "blog", |ready| ready == Some(vec![woken])).await;
}

#[tokio::test]
async fn a_reader_serves_what_it_knows_while_redis_is_away() {
    let mut redis = Redis::start();
    let (writer, reader) = (redis.store(node("here")).await, redis.store(Role::Reader).await);
    writer.put_app(app("blog", "blog.example.com")).await.unwrap();
    until(&reader, "blog", |ready| ready.is_some()).await;
    let mut watch = reader.watch().await.unwrap();
    assert!(matches!(watch.recv().await, Some(Change::Put { .. })));
    assert!(matches!(watch.recv().await, Some(Change::Synced)));

    redis.kill();
    reader.link().wait_for(|link| !link.connected).await.unwrap();
    assert!(reader.get(&name("blog")).is_some());
    redis.start_again();
    connected(&reader).await;

    assert!(reader.get(&name("blog")).is_some(), "an emptied Redis does not empty the reader");
    while let Ok(change) = watch.try_recv() {
        assert!(matches!(change, Change::Put { .. }), "{change:?}");
    }
}

#[tokio::test]
async fn nobody_waits_long_for_a_redis_that_has_stopped() {
    let redis = Redis::start();
    let store = redis.store_with(node("here"), BUDGET).await;
    redis.store(Role::Configurer).await.put_app(app("blog", "blog.example.com")).await.unwrap();
    until(&store, "blog", |ready| ready.is_some()).await;

    redis.signal("STOP");
    let began = Instant::now();
    let woken = running(&store, "blog", "here").await;
    for _ in 0..100 {
        store.apply(&name("blog"), wake("here")).await.unwrap();
    }
    let took = began.elapsed();
    redis.signal("CONT");

    // Three commands wait for 150 ms each; then nobody waits any more. Without that it were 15 s.
    assert!(took < Duration::from_secs(5), "{took:?}");
    connected(&store).await;
    let other = redis.store(node("there")).await;
    until(&other, "blog", |ready| ready == Some(vec![woken])).await;
}

#[tokio::test]
async fn an_emptied_redis_is_filled_again_by_those_who_know() {
    let redis = Redis::start();
    let stores = [redis.store(node("one")).await, redis.store(node("two")).await];
    for (n, store) in stores.iter().enumerate() {
        let (app_name, host) = (format!("app-{n}"), format!("{n}.example.com"));
        store.put_app(app(&app_name, &host)).await.unwrap();
        let generation = running(store, &app_name, ["one", "two"][n]).await;
        until(&stores[1 - n], &app_name, |ready| ready == Some(vec![generation])).await;
    }
    let before = stores[0].list();

    redis.cli(&["FLUSHALL"]);

    let newcomer = loop {
        let newcomer = redis.store(Role::Reader).await;
        if newcomer.list().len() == 2 {
            break newcomer;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    for (spec, record) in before {
        let (now_spec, _) = newcomer.get(&spec.name).unwrap();
        assert_eq!(now_spec, spec);
        let ready: Vec<_> = record.ready().map(|i| i.generation).collect();
        until(&newcomer, spec.name.as_str(), |now| now.as_ref() == Some(&ready)).await;
        until(&stores[0], spec.name.as_str(), |now| now.as_ref() == Some(&ready)).await;
    }
}

#[tokio::test]
async fn a_generation_is_not_used_again_after_redis_was_emptied() {
    let redis = Redis::start();
    let store = redis.store(node("here")).await;
    store.put_app(app("blog", "blog.example.com")).await.unwrap();
    let mut old = running(&store, "blog", "here").await;

    // Often enough to meet the follower at every point of its work.
    for _ in 0..50 {
        redis.cli(&["FLUSHALL"]);
        store.apply(&name("blog"), Transition::Gone { generation: old }).await.unwrap();
        let new = running(&store, "blog", "here").await;

        assert!(new > old, "{new} after {old}");
        old = new;
    }
}

#[tokio::test]
async fn a_hostile_record_is_one_apps_trouble() {
    let redis = Redis::start();
    let (writer, reader) = (redis.store(node("here")).await, redis.store(Role::Reader).await);
    for n in 0..6 {
        writer.put_app(app(&format!("app-{n}"), &format!("{n}.example.com"))).await.unwrap();
    }
    until(&reader, "app-5", |ready| ready.is_some()).await;

    redis.cli(&["SET", "fc:{app-0}", "no hash"]);
    redis.cli(&["HSET", "fc:{app-1}", "spec", "{\"name\":"]);
    redis.cli(&["HSET", "fc:{app-2}", "srev", "newer"]);
    redis.cli(&["EVAL", "redis.call('HSET', 'fc:{app-3}', 'record', string.rep('x', 30000000))", "0"]);
    redis.cli(&["SET", "fc:{../../etc/passwd}", "x"]);
    redis.cli(&["HSET", "fc:{app-4}", "srev", "1"]);
    let generation = running(&writer, "app-5", "here").await;
    until(&reader, "app-5", |ready| ready == Some(vec![generation])).await;

    let newcomer = redis.store(Role::Reader).await;
    assert!(newcomer.get(&name("app-5")).is_some(), "a new process starts all the same");
    for n in 0..6 {
        assert!(reader.get(&name(&format!("app-{n}"))).is_some(), "app-{n} is as it was last good");
    }
    let refused = writer.apply(&name("app-0"), wake("here")).await;
    assert!(refused.is_ok() || matches!(refused, Err(StoreError::Corrupt { .. })), "{refused:?}");
}

#[tokio::test]
async fn one_server_name_in_two_specs_stays_with_the_first_until_it_leaves() {
    let redis = Redis::start();
    let (writer, reader) = (redis.store(node("here")).await, redis.store(Role::Reader).await);
    writer.put_app(app("first", "www.example.com")).await.unwrap();
    until(&reader, "first", |ready| ready.is_some()).await;
    let twin = serde_json::to_string(&app("twin", "www.example.com")).unwrap();
    redis.cli(&["HSET", "fc:{twin}", "spec", &twin, "srev", "1"]);
    until(&reader, "twin", |ready| ready.is_some()).await;

    assert!(reader.get(&name("twin")).unwrap().0.server_names.is_empty());
    writer.remove_app(&name("first")).await.unwrap();
    until(&reader, "first", |ready| ready.is_none()).await;

    assert_eq!(reader.get(&name("twin")).unwrap().0.server_names.len(), 1);
}

#[tokio::test]
async fn scripts_that_redis_has_forgotten_are_brought_again() {
    let redis = Redis::start();
    let store = redis.store(node("here")).await;
    store.put_app(app("blog", "blog.example.com")).await.unwrap();
    redis.cli(&["SCRIPT", "FLUSH"]);
    let generation = running(&store, "blog", "here").await;
    redis.cli(&["SCRIPT", "FLUSH"]);
    let reader = redis.store(Role::Reader).await;
    until(&reader, "blog", |ready| ready == Some(vec![generation])).await;
}

#[tokio::test]
async fn a_link_that_is_cut_is_made_again_and_nothing_is_missed() {
    let redis = Redis::start();
    let (writer, reader) = (redis.store(node("here")).await, redis.store(Role::Reader).await);
    writer.put_app(app("blog", "blog.example.com")).await.unwrap();
    until(&reader, "blog", |ready| ready.is_some()).await;

    for _ in 0..5 {
        redis.cli(&["CLIENT", "KILL", "TYPE", "normal"]);
        let generation = running(&writer, "blog", "here").await;
        until(&reader, "blog", |ready| ready == Some(vec![generation])).await;
        writer.apply(&name("blog"), Transition::Gone { generation }).await.unwrap();
        until(&reader, "blog", |ready| ready == Some(Vec::new())).await;
    }
}

#[tokio::test]
async fn a_hundred_thousand_apps_are_read_in_one_go() {
    const APPS: usize = 100_000;
    let redis = Redis::start();
    let spec = serde_json::to_string(&app("placeholder", "placeholder.example.com")).unwrap();
    let fill = "for i = 1, tonumber(ARGV[2]) do local n = string.format('app-%d', i - 1) \
                local s = string.gsub(ARGV[1], 'placeholder', n) \
                redis.call('HSET', 'fc:{' .. n .. '}', 'spec', s, 'srev', '1') end";
    redis.cli(&["EVAL", fill, "0", &spec, &APPS.to_string()]);

    let store = redis.store(Role::Reader).await;

    assert_eq!(store.list().len(), APPS);
    assert_eq!(store.get(&name("app-4711")).unwrap().1.instances.len(), 0);
}

/// One with a file in `folder`, from which it begins.
fn remembering(redis: &Redis, role: Role, folder: &std::path::Path) -> RedisStore {
    RedisStore::open_remembering(&redis.address(), role, BUDGET, &folder.join("known")).unwrap()
}

async fn written(folder: &std::path::Path, word: &str) {
    let written = async {
        while !std::fs::read_to_string(folder.join("known")).is_ok_and(|text| text.contains(word)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), written).await.expect("not written within 20 s");
}

#[tokio::test]
async fn an_edge_that_starts_while_redis_is_away_knows_apps_instances_and_hosts() {
    let mut redis = Redis::start();
    let folder = tempfile::tempdir().unwrap();
    let here = redis.store(node("here")).await;
    let compute = Compute { name: "here".into(), dispatch: "10.0.0.1:8443".into(), ..Compute::default() };
    here.beat(&compute, Load::default()).await.unwrap();
    for name in ["warm", "cold"] {
        here.put_app(app(name, &format!("{name}.example.com"))).await.unwrap();
    }
    let generation = running(&here, "warm", "here").await;
    let edge = remembering(&redis, Role::Reader, folder.path());
    written(folder.path(), &generation.to_string()).await;
    drop(edge);

    redis.kill();
    let edge = remembering(&redis, Role::Reader, folder.path());
    let mut watch = edge.watch().await.unwrap();

    let mut told = Vec::new();
    loop {
        match watch.recv().await.unwrap() {
            Change::Put { app, record } => told.push(format!("{} {}", app.name, record.ready().count())),
            Change::Nodes(nodes) => {
                assert!(nodes.len() == 1 && nodes[0].alive && nodes[0].compute == compute, "{nodes:?}");
                told.push("hosts".into());
            }
            Change::Synced => break,
            Change::Removed(_) => panic!("nothing was removed"),
        }
    }
    assert_eq!(told, ["cold 0", "warm 1", "hosts"]);
    // Redis returns empty, and the launcher tells it what it runs; the edge has believed nobody else.
    redis.start_again();
    connected(&edge).await;
    until(&edge, "warm", |ready| ready == Some(vec![generation])).await;
    assert!(edge.get(&name("cold")).is_some());
    until(&*redis.store(Role::Reader).await, "warm", |ready| ready == Some(vec![generation])).await;
}

#[tokio::test]
async fn what_was_removed_while_a_process_was_away_is_removed_for_it_too() {
    let redis = Redis::start();
    let folder = tempfile::tempdir().unwrap();
    let here = redis.store(node("here")).await;
    for name in ["stays", "goes", "deleted"] {
        here.put_app(app(name, &format!("{name}.example.com"))).await.unwrap();
    }
    let edge = remembering(&redis, node("there"), folder.path());
    written(folder.path(), "deleted.example.com").await;
    drop(edge);
    here.remove_app(&name("goes")).await.unwrap();
    // As a removed app whose tombstone has expired.
    redis.cli(&["DEL", "fc:{deleted}"]);

    let edge = remembering(&redis, node("there"), folder.path());

    connected(&edge).await;
    let left: Vec<_> = edge.list().into_iter().map(|(app, _)| app.name.to_string()).collect();
    assert_eq!(left, ["stays"]);
    assert_eq!(redis.cli(&["EXISTS", "fc:{deleted}"]), "0", "nobody has brought it back");
}

#[tokio::test]
async fn a_file_that_is_damaged_is_as_good_as_none() {
    let redis = Redis::start();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("known"), b"\xff no file of ours").unwrap();
    redis.store(node("here")).await.put_app(app("blog", "blog.example.com")).await.unwrap();
    let edge = remembering(&redis, Role::Reader, folder.path());
    connected(&edge).await;
    assert_eq!(edge.list().len(), 1);
}

#[tokio::test]
async fn many_apps_deleted_at_once_are_kept_until_the_operator_confirms_it() {
    let redis = Redis::start();
    let stores = [redis.store(node("here")).await, redis.store(Role::Reader).await];
    for n in 0..30 {
        stores[0].put_app(app(&format!("app-{n}"), &format!("{n}.example.com"))).await.unwrap();
    }
    until(&stores[1], "app-29", |ready| ready.is_some()).await;
    redis.cli(&["EVAL", "for i = 3, 29 do redis.call('DEL', 'fc:{app-' .. i .. '}') end", "0"]);
    stores[0].put_app(app("later", "later.example.com")).await.unwrap();
    until(&stores[1], "later", |ready| ready.is_some()).await;
    assert!(stores.iter().all(|store| store.list().len() == 31));

    stores[0].confirm_removals().await.unwrap();

    for store in &stores {
        until(store, "app-29", |ready| ready.is_none()).await;
        assert_eq!(store.list().len(), 4);
    }
}

#[tokio::test]
async fn an_exclusive_volume_is_not_mounted_while_nobody_can_know_who_has_it() {
    let mut redis = Redis::start();
    let store = redis.store(node("here")).await;
    let mut spec = app("blog", "blog.example.com");
    spec.volumes.push(cmdb::app::Volume {
        source: "blog".into(),
        target: "/data".into(),
        read_only: false,
        quota: None,
        exclusive: true,
    });
    store.put_app(spec).await.unwrap();
    let generation = running(&store, "blog", "here").await;

    redis.kill();

    let woken = store.apply(&name("blog"), wake("here")).await.unwrap().0;
    assert_eq!(woken, Outcome::Ready(generation), "what runs is used");
    store.apply(&name("blog"), Transition::Gone { generation }).await.unwrap();
    let refused = store.apply(&name("blog"), wake("here")).await.unwrap_err();
    assert!(matches!(&refused, StoreError::Unavailable(why) if why.contains("exclusive")), "{refused}");
}

#[tokio::test]
async fn of_two_hosts_that_both_started_an_app_apart_both_are_known_afterwards() {
    let mut redis = Redis::start();
    let hosts = [redis.store(node("one")).await, redis.store(node("two")).await];
    hosts[0].put_app(app("blog", "blog.example.com")).await.unwrap();
    until(&hosts[1], "blog", |ready| ready.is_some()).await;

    redis.kill();
    let mut both =
        [running(&hosts[0], "blog", "one").await, running(&hosts[1], "blog", "two").await].to_vec();
    let elsewhere = hosts[0].apply(&name("blog"), wake("two")).await;
    assert!(matches!(elsewhere, Err(StoreError::Unavailable(_))), "nobody can be told: {elsewhere:?}");
    redis.start_again();

    both.sort();
    for store in &hosts {
        connected(store).await;
        until(store, "blog", |ready| ready.as_ref() == Some(&both)).await;
    }
    until(&*redis.store(Role::Reader).await, "blog", |ready| ready.as_ref() == Some(&both)).await;
    for (store, node) in hosts.iter().zip(["one", "two"]) {
        let (outcome, record) = store.apply(&name("blog"), wake(node)).await.unwrap();
        let Outcome::Ready(generation) = outcome else { panic!("{outcome:?}") };
        assert_eq!(record.instances[&generation].node, node, "each uses its own");
    }
}
