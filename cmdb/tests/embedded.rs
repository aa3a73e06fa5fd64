//! The embedded store, as the launcher uses it: on a real file.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking; its name says what it is about"
)]

mod common;

use std::path::Path;

use cmdb::{Change, Generation, Outcome, State, Store, StoreError, Transition, embedded::EmbeddedStore};
use common::app;

fn open(path: &Path) -> EmbeddedStore {
    EmbeddedStore::open(path).unwrap()
}

fn wake() -> Transition {
    Transition::Wake { node: "here".into(), start_timeout_ms: 20_000, lost: Vec::new() }
}

async fn woken(store: &EmbeddedStore, name: &str) -> Generation {
    match store.apply(&name.parse().unwrap(), wake()).await.unwrap().0 {
        Outcome::Own(generation) => generation,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_app_survives_a_restart_and_its_instances_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cmdb.redb");
    let store = open(&path);
    store.put_app(app("blog", "blog.example.com")).await.unwrap();
    woken(&store, "blog").await;
    drop(store);

    let store = open(&path);

    let (found, record) = store.get(&"blog".parse().unwrap()).unwrap();
    assert_eq!(*found, app("blog", "blog.example.com"));
    assert!(record.instances.is_empty());
}

#[tokio::test]
async fn a_generation_is_never_used_twice_even_over_restarts_and_removals() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cmdb.redb");
    let name = "blog".parse().unwrap();
    let mut last = Generation(0);
    for _ in 0..3 {
        let store = open(&path);
        for _ in 0..3 {
            store.put_app(app("blog", "blog.example.com")).await.unwrap();
            let generation = woken(&store, "blog").await;
            assert!(generation > last, "{generation} after {last}");
            last = generation;
            store.remove_app(&name).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_watch_shows_what_is_there_and_then_every_change() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("cmdb.redb"));
    store.put_app(app("blog", "blog.example.com")).await.unwrap();

    let mut watch = store.watch().await.unwrap();
    let generation = woken(&store, "blog").await;
    store.apply(&"blog".parse().unwrap(), Transition::Ready { generation, port: 80 }).await.unwrap();
    store.remove_app(&"blog".parse().unwrap()).await.unwrap();

    assert!(matches!(watch.recv().await, Some(Change::Put { record, .. }) if record.instances.is_empty()));
    assert!(matches!(watch.recv().await, Some(Change::Synced)));
    for state in [State::Starting, State::Ready] {
        let Some(Change::Put { record, .. }) = watch.recv().await else { panic!() };
        assert_eq!(record.instances[&generation].state, state);
    }
    assert!(matches!(watch.recv().await, Some(Change::Removed(_))));
}

#[tokio::test]
async fn a_watcher_that_does_not_read_is_cut_and_delays_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("cmdb.redb"));
    store.put_app(app("blog", "blog.example.com")).await.unwrap();
    let mut asleep = store.watch().await.unwrap();

    for _ in 0..10_000 {
        store.apply(&"blog".parse().unwrap(), Transition::ResetBackoff).await.unwrap();
    }

    let mut seen = 0;
    while asleep.recv().await.is_some() {
        seen += 1;
    }
    assert!(seen < 10_000, "the watch ended after {seen} changes");
}

#[tokio::test]
async fn a_server_name_has_one_owner() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("cmdb.redb"));
    store.put_app(app("blog", "www.example.com")).await.unwrap();

    let refused = store.put_app(app("shop", "www.example.com")).await.unwrap_err();
    assert!(matches!(refused, StoreError::DuplicateName { .. }), "{refused}");

    store.remove_app(&"blog".parse().unwrap()).await.unwrap();
    store.put_app(app("shop", "www.example.com")).await.unwrap();
}

#[tokio::test]
async fn an_app_may_take_other_names_and_give_its_old_ones_away() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("cmdb.redb"));
    store.put_app(app("blog", "old.example.com")).await.unwrap();
    store.put_app(app("blog", "new.example.com")).await.unwrap();
    store.put_app(app("shop", "old.example.com")).await.unwrap();
    assert_eq!(store.list().len(), 2);
}

#[test]
fn a_file_that_is_no_journal_is_moved_aside_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cmdb.redb");
    std::fs::write(&path, b"this is not a database, but somebody may want it back").unwrap();

    let store = open(&path);

    assert!(store.list().is_empty());
    let kept = std::fs::read_dir(folder.path()).unwrap().filter_map(Result::ok);
    let kept: Vec<_> = kept.map(|e| e.file_name().into_string().unwrap()).collect();
    assert!(kept.iter().any(|n| n.contains("unreadable")), "{kept:?}");
}

#[test]
fn a_journal_that_is_in_use_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cmdb.redb");
    let _first = open(&path);
    assert!(matches!(EmbeddedStore::open(&path), Err(StoreError::Unavailable(_))));
}

#[tokio::test]
async fn a_journal_that_is_cut_short_or_rotten_is_moved_aside_or_read_and_never_stops_the_launcher() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cmdb.redb");
    let store = open(&path);
    store.put_app(app("blog", "blog.example.com")).await.unwrap();
    drop(store);
    let whole = std::fs::read(&path).unwrap();

    for cut in [1, 100, 512, 4096, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        tokio::task::spawn_blocking({
            let path = path.clone();
            move || drop(open(&path))
        })
        .await
        .unwrap_or_else(|_| panic!("cut to {cut} bytes"));
    }
    for at in (0..whole.len()).step_by(whole.len() / 31).chain(0..32) {
        let mut rotten = whole.clone();
        rotten[at] ^= 0x55;
        std::fs::write(&path, rotten).unwrap();
        tokio::task::spawn_blocking({
            let path = path.clone();
            move || drop(open(&path))
        })
        .await
        .unwrap_or_else(|_| panic!("byte {at} rotten"));
    }
}
