//! CMCache, as a proxy uses it.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking; its name says what it is about"
)]

mod common;

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use cmdb::{
    App, AppRecord, Change,
    cache::{CmCache, LastKnownGood, LastKnownGoodError, Tenant},
};
use common::app;

#[derive(Debug)]
struct Site {
    name: String,
    rev: AtomicU64,
    removed: AtomicBool,
}

impl Tenant for Site {
    fn new(app: Arc<App>, record: Arc<AppRecord>) -> Self {
        Self { name: app.name.to_string(), rev: AtomicU64::new(record.rev), removed: AtomicBool::new(false) }
    }

    fn update(&self, _: Arc<App>, record: Arc<AppRecord>) {
        self.rev.store(record.rev, Ordering::SeqCst);
    }

    fn removed(&self) {
        self.removed.store(true, Ordering::SeqCst);
    }
}

fn put(name: &str, hosts: &[&str], rev: u64) -> Change {
    let app =
        App { server_names: hosts.iter().map(|h| h.parse().unwrap()).collect(), ..app(name, "x.example") };
    Change::Put { app: Arc::new(app), record: Arc::new(AppRecord { rev, ..AppRecord::default() }) }
}

fn found(cache: &CmCache<Site>, host: &str) -> Option<String> {
    cache.lookup(host).map(|site| site.name.clone())
}

#[test]
fn the_exact_name_wins_then_the_longest_wildcard() {
    let cache = CmCache::<Site>::new();
    cache.apply(put("all", &["*.example.com"], 1));
    cache.apply(put("deep", &["*.eu.example.com"], 1));
    cache.apply(put("one", &["www.eu.example.com"], 1));

    assert_eq!(found(&cache, "www.eu.example.com").as_deref(), Some("one"));
    assert_eq!(found(&cache, "other.eu.example.com").as_deref(), Some("deep"));
    assert_eq!(found(&cache, "a.b.example.com").as_deref(), Some("all"));
    assert_eq!(found(&cache, "example.com"), None);
    assert_eq!(found(&cache, "com"), None);
}

#[test]
fn a_change_of_instances_reaches_the_same_tenant() {
    let cache = CmCache::<Site>::new();
    cache.apply(put("blog", &["blog.example.com"], 1));
    let before = cache.lookup("blog.example.com").unwrap();

    cache.apply(put("blog", &["blog.example.com"], 2));

    assert!(Arc::ptr_eq(&before, &cache.lookup("blog.example.com").unwrap()));
    assert_eq!(before.rev.load(Ordering::SeqCst), 2);
}

#[test]
fn an_app_may_take_another_name() {
    let cache = CmCache::<Site>::new();
    cache.apply(put("blog", &["old.example.com", "both.example.com"], 1));
    cache.apply(put("blog", &["new.example.com", "both.example.com"], 1));
    assert_eq!(found(&cache, "old.example.com"), None);
    assert_eq!(found(&cache, "both.example.com").as_deref(), Some("blog"));
    assert_eq!(found(&cache, "new.example.com").as_deref(), Some("blog"));
}

#[test]
fn a_resync_removes_what_is_gone_and_nothing_before_it_has_ended() {
    let cache = CmCache::<Site>::new();
    for name in ["blog", "shop"] {
        cache.apply(put(name, &[&format!("{name}.example.com")], 1));
    }
    let shop = cache.lookup("shop.example.com").unwrap();

    cache.begin_sync();
    cache.apply(put("blog", &["blog.example.com"], 1));
    assert!(cache.lookup("shop.example.com").is_some(), "served from the cache while the watch begins");
    cache.apply(Change::Synced);

    assert_eq!(found(&cache, "shop.example.com"), None);
    assert!(shop.removed.load(Ordering::SeqCst));
    assert_eq!(found(&cache, "blog.example.com").as_deref(), Some("blog"));
}

#[test]
fn a_cmdb_that_has_lost_everything_is_not_believed_until_the_operator_says_so() {
    let cache = CmCache::<Site>::new();
    for n in 0..50 {
        cache.apply(put(&format!("app{n}"), &[&format!("app{n}.example.com")], 1));
    }

    cache.begin_sync();
    cache.apply(put("app7", &["app7.example.com"], 1));
    cache.apply(Change::Synced);
    assert!(cache.lookup("app49.example.com").is_some());

    assert_eq!(cache.confirm_removals(), 49);
    assert!(cache.lookup("app49.example.com").is_none());
    assert!(cache.lookup("app7.example.com").is_some());
}

#[test]
fn a_renamed_app_keeps_its_host_over_a_resync() {
    // As after a restart from the last-known-good file: "zoo" was renamed to "art" meanwhile.
    let cache = CmCache::<Site>::new();
    cache.apply(put("zoo", &["www.example.com", "*.example.com"], 1));

    cache.begin_sync();
    cache.apply(put("art", &["www.example.com", "*.example.com"], 1));
    cache.apply(Change::Synced);

    assert_eq!(found(&cache, "www.example.com").as_deref(), Some("art"));
    assert_eq!(found(&cache, "img.example.com").as_deref(), Some("art"));
}

#[test]
fn a_host_that_moved_to_another_app_is_found_whichever_app_comes_first() {
    let cache = CmCache::<Site>::new();
    cache.apply(put("zoo", &["zoo.example.com", "www.example.com"], 1));

    cache.begin_sync();
    cache.apply(put("art", &["www.example.com"], 1));
    cache.apply(put("zoo", &["zoo.example.com"], 1));
    cache.apply(Change::Synced);

    assert_eq!(found(&cache, "www.example.com").as_deref(), Some("art"));
    assert_eq!(found(&cache, "zoo.example.com").as_deref(), Some("zoo"));
}

#[test]
fn what_was_written_last_is_read_and_anything_else_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cmdb.lkg");
    let file = LastKnownGood::new(&path);
    assert!(file.read().unwrap().is_empty());

    file.write(&[Arc::new(app("blog", "blog.example.com"))]).unwrap();
    assert_eq!(*file.read().unwrap()[0], app("blog", "blog.example.com"));

    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 3;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(matches!(file.read(), Err(LastKnownGoodError::Damaged { .. })));
}
