//! What every home of the CMDB promises, shown on each of them: the embedded one on a real file, Redis on a real server.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking; its name says what it is about"
)]

mod common;

use std::{collections::HashSet, sync::Arc, time::Duration};

use cmdb::{
    AppName, AppRecord, Change, Generation, Outcome, Store, StoreError, Transition, embedded::EmbeddedStore,
    redis::Role,
};
use common::{app, redis::Redis};
use stateright::semantics::{ConsistencyTester as _, LinearizabilityTester, SequentialSpec};
use tokio::sync::mpsc::Receiver;

/// A home of the CMDB, and the ways into it.
enum Home {
    Embedded(
        Arc<EmbeddedStore>,
        #[expect(dead_code, reason = "removed when the test ends")] tempfile::TempDir,
    ),
    Redis(Redis),
}

impl Home {
    fn embedded() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(&folder.path().join("cmdb.redb")).unwrap();
        Self::Embedded(Arc::new(store), folder)
    }

    /// What one process uses: its own mirror of Redis, or the one store that all share.
    async fn way_in(&self, node: &str) -> Arc<dyn Store> {
        match self {
            Self::Embedded(store, _) => Arc::clone(store) as Arc<dyn Store>,
            Self::Redis(redis) => redis.store(Role::Node(node.to_owned())).await,
        }
    }
}

/// Runs each story on each home.
macro_rules! on_every_home {
    ($($story:ident),+ $(,)?) => {
        mod embedded {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $story() { super::$story(&super::Home::embedded()).await; })+
        }
        mod redis {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $story() { super::$story(&super::Home::Redis(super::Redis::start())).await; })+
        }
    };
}

on_every_home!(
    what_one_way_in_puts_every_watch_shows,
    a_watch_shows_the_newest_record_and_never_goes_back,
    no_update_is_lost_when_many_write_at_once,
    of_many_wakers_one_owns_the_start,
    a_late_owner_is_fenced,
    scale_out_stops_at_max_whoever_asks,
    what_was_given_up_is_fenced_for_all_and_never_comes_back,
    of_many_who_give_up_a_host_one_takes_its_place,
    a_generation_stays_its_hosts,
    an_unknown_app_is_an_error_and_its_removal_none,
    a_server_name_has_one_owner_even_when_two_ask_at_once,
    an_app_may_leave_names_to_another,
    generations_go_on_rising_when_an_app_comes_back,
    histories_of_many_clients_are_linearizable,
);

fn name(text: &str) -> AppName {
    text.parse().unwrap()
}

fn wake(node: &str) -> Transition {
    Transition::Wake { node: node.into(), start_timeout_ms: 20_000, lost: Vec::new() }
}

/// The first change that `wanted` accepts.
async fn see<T>(watch: &mut Receiver<Change>, wanted: impl Fn(Change) -> Option<T>) -> T {
    let seen = async {
        loop {
            if let Some(found) = wanted(watch.recv().await.expect("the watch goes on")) {
                return found;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), seen).await.expect("not seen within 10 s")
}

/// Waits until this way in knows of the app.
async fn knows(store: &Arc<dyn Store>, app: &str) {
    let mut watch = store.watch().await.unwrap();
    see(&mut watch, |change| {
        matches!(change, Change::Put { app: a, .. } if a.name.as_str() == app).then_some(())
    })
    .await;
}

async fn what_one_way_in_puts_every_watch_shows(home: &Home) {
    let (one, other) = (home.way_in("one").await, home.way_in("other").await);
    one.put_app(app("before", "before.example.com")).await.unwrap();
    knows(&other, "before").await;
    let mut watch = other.watch().await.unwrap();

    one.put_app(app("after", "after.example.com")).await.unwrap();
    one.remove_app(&name("before")).await.unwrap();

    let mut told = Vec::new();
    while told.len() < 4 {
        told.push(match watch.recv().await.unwrap() {
            Change::Put { app, .. } => format!("put {}", app.name),
            Change::Removed(app) => format!("removed {app}"),
            Change::Nodes(_) => continue,
            Change::Synced => "synced".to_owned(),
        });
    }
    assert_eq!(told, ["put before", "synced", "put after", "removed before"]);
    assert!(other.get(&name("before")).is_none());
    assert_eq!(*other.get(&name("after")).unwrap().0, app("after", "after.example.com"));
}

async fn a_watch_shows_the_newest_record_and_never_goes_back(home: &Home) {
    let (writer, reader) = (home.way_in("writer").await, home.way_in("reader").await);
    writer.put_app(app("blog", "blog.example.com")).await.unwrap();
    knows(&reader, "blog").await;
    let mut watch = reader.watch().await.unwrap();
    let mut last = 0;

    for _ in 0..300 {
        last = writer.apply(&name("blog"), Transition::ResetBackoff).await.unwrap().1.rev;
    }

    let mut rev = 0;
    while rev < last {
        let seen = see(&mut watch, |change| match change {
            Change::Put { record, .. } => Some(record.rev),
            _ => None,
        });
        let seen = seen.await;
        assert!(seen >= rev, "revision {seen} after {rev}");
        rev = seen;
    }
}

async fn no_update_is_lost_when_many_write_at_once(home: &Home) {
    home.way_in("first").await.put_app(app("blog", "blog.example.com")).await.unwrap();
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..8 {
        let store = home.way_in(&format!("node-{writer}")).await;
        writers.spawn(async move {
            for _ in 0..25 {
                store.apply(&name("blog"), Transition::ResetBackoff).await.unwrap();
            }
        });
    }
    writers.join_all().await;

    let (_, record) = home.way_in("last").await.apply(&name("blog"), Transition::ResetBackoff).await.unwrap();
    assert_eq!(record.rev, 8 * 25 + 1);
}

async fn of_many_wakers_one_owns_the_start(home: &Home) {
    const APPS: usize = 1_000;
    let first = home.way_in("first").await;
    for n in 0..APPS {
        first.put_app(app(&format!("app-{n}"), &format!("{n}.example.com"))).await.unwrap();
    }
    let mut wakers = tokio::task::JoinSet::new();
    for waker in 0..16 {
        let store = home.way_in(&format!("node-{waker}")).await;
        wakers.spawn(async move {
            let mut outcomes = Vec::with_capacity(APPS);
            for n in 0..APPS {
                let woken = store.apply(&name(&format!("app-{n}")), wake(&format!("node-{waker}"))).await;
                outcomes.push(woken.unwrap().0);
            }
            outcomes
        });
    }

    let outcomes = wakers.join_all().await;

    for n in 0..APPS {
        let owned: Vec<_> = outcomes.iter().filter(|of| matches!(of[n], Outcome::Own(_))).collect();
        assert_eq!(owned.len(), 1, "app-{n} has {} owners", owned.len());
        let Outcome::Own(generation) = owned[0][n] else { unreachable!() };
        let joined = outcomes.iter().filter(|of| of[n] == Outcome::Join(generation)).count();
        assert_eq!(joined, 15, "the others wait for the same instance of app-{n}");
    }
}

async fn a_late_owner_is_fenced(home: &Home) {
    let (slow, quick) = (home.way_in("slow").await, home.way_in("quick").await);
    slow.put_app(app("blog", "blog.example.com")).await.unwrap();
    let Outcome::Own(late) = slow.apply(&name("blog"), wake("slow")).await.unwrap().0 else { panic!() };

    knows(&quick, "blog").await;
    let failed = Transition::Failed { generation: late, reason: "its host is gone".into() };
    assert_eq!(quick.apply(&name("blog"), failed).await.unwrap().0, Outcome::Done);
    quick.apply(&name("blog"), Transition::ResetBackoff).await.unwrap();
    let Outcome::Own(next) = quick.apply(&name("blog"), wake("quick")).await.unwrap().0 else { panic!() };

    assert!(next > late);
    let ready = Transition::Ready { generation: late, port: 80 };
    assert_eq!(slow.apply(&name("blog"), ready).await.unwrap().0, Outcome::Fenced);
}

async fn scale_out_stops_at_max_whoever_asks(home: &Home) {
    home.way_in("first").await.put_app(app("blog", "blog.example.com")).await.unwrap();
    let mut hosts = tokio::task::JoinSet::new();
    for host in 0..16 {
        let store = home.way_in(&format!("node-{host}")).await;
        hosts.spawn(async move {
            let node = format!("node-{host}");
            let add = Transition::Add {
                node,
                start_timeout_ms: 20_000,
                max: 4,
                replacing: false,
                lost: Vec::new(),
            };
            store.apply(&name("blog"), add).await.unwrap().0
        });
    }

    let outcomes = hosts.join_all().await;

    assert_eq!(outcomes.iter().filter(|o| matches!(o, Outcome::Own(_))).count(), 4);
    assert_eq!(outcomes.iter().filter(|o| **o == Outcome::Full).count(), 12);
}

async fn what_was_given_up_is_fenced_for_all_and_never_comes_back(home: &Home) {
    let (dead, heir) = (home.way_in("dead").await, home.way_in("heir").await);
    dead.put_app(app("blog", "blog.example.com")).await.unwrap();
    let Outcome::Own(old) = dead.apply(&name("blog"), wake("dead")).await.unwrap().0 else { panic!() };
    knows(&heir, "blog").await;

    let lost = vec!["dead".to_owned()];
    let instead = Transition::Wake { node: "heir".into(), start_timeout_ms: 20_000, lost: lost.clone() };
    let (outcome, record) = heir.apply(&name("blog"), instead).await.unwrap();

    let Outcome::Own(new) = outcome else { panic!("{outcome:?}") };
    assert!(record.is_fenced("dead", old) && !record.is_fenced("heir", new));
    let steps = [
        Transition::Ready { generation: old, port: 80 },
        Transition::Adopt { generation: old, node: "dead".into(), port: 80 },
        Transition::Gone { generation: old },
    ];
    for late in steps {
        let refused = dead.apply(&name("blog"), late.clone()).await.unwrap();
        assert_eq!(refused.0, Outcome::Fenced, "{late:?}");
        assert_eq!(refused.1.instances.keys().collect::<Vec<_>>(), [&new]);
    }
    let again = heir.apply(&name("blog"), Transition::GiveUp { lost }).await.unwrap();
    assert_eq!((again.0, again.1.instances.len()), (Outcome::Done, 1), "it had none any more");
}

async fn of_many_who_give_up_a_host_one_takes_its_place(home: &Home) {
    let dead = home.way_in("dead").await;
    for round in 0..20 {
        let app_name = format!("app-{round}");
        dead.put_app(app(&app_name, &format!("{app_name}.example.com"))).await.unwrap();
        let woken = dead.apply(&name(&app_name), wake("dead")).await.unwrap().0;
        assert!(matches!(woken, Outcome::Own(_)), "{woken:?}");
    }
    let mut heirs = tokio::task::JoinSet::new();
    for heir in 0..8 {
        let (node, store) = (format!("heir-{heir}"), home.way_in(&format!("heir-{heir}")).await);
        heirs.spawn(async move {
            let mut outcomes = Vec::new();
            for round in 0..20 {
                let lost = vec!["dead".to_owned()];
                let wake = Transition::Wake { node: node.clone(), start_timeout_ms: 20_000, lost };
                outcomes.push(store.apply(&name(&format!("app-{round}")), wake).await.unwrap().0);
            }
            outcomes
        });
    }

    let outcomes = heirs.join_all().await;

    for round in 0..20 {
        let owned = outcomes.iter().filter(|of| matches!(of[round], Outcome::Own(_))).count();
        let joined = outcomes.iter().filter(|of| matches!(of[round], Outcome::Join(_))).count();
        assert_eq!((owned, joined), (1, 7), "app-{round}");
    }
}

async fn a_generation_stays_its_hosts(home: &Home) {
    let (one, other) = (home.way_in("one").await, home.way_in("other").await);
    one.put_app(app("blog", "blog.example.com")).await.unwrap();
    let Outcome::Own(generation) = one.apply(&name("blog"), wake("one")).await.unwrap().0 else { panic!() };
    knows(&other, "blog").await;

    let adopt = |node: &str| Transition::Adopt { generation, node: node.into(), port: 80 };
    let refused = other.apply(&name("blog"), adopt("other")).await.unwrap();
    assert_eq!(refused.0, Outcome::Fenced);
    let (adopted, record) = one.apply(&name("blog"), adopt("one")).await.unwrap();

    assert_eq!((adopted, record.instances[&generation].node.as_str()), (Outcome::Done, "one"));
}

async fn an_unknown_app_is_an_error_and_its_removal_none(home: &Home) {
    let store = home.way_in("one").await;
    let refused = store.apply(&name("nobody"), wake("one")).await.unwrap_err();
    assert!(matches!(refused, StoreError::UnknownApp(_)), "{refused}");
    store.remove_app(&name("nobody")).await.unwrap();
}

async fn a_server_name_has_one_owner_even_when_two_ask_at_once(home: &Home) {
    for round in 0..20 {
        let host = format!("round-{round}.example.com");
        let (one, other) = (home.way_in("one").await, home.way_in("other").await);
        let (blog, shop) = (format!("blog-{round}"), format!("shop-{round}"));
        let (first, second) = tokio::join!(one.put_app(app(&blog, &host)), other.put_app(app(&shop, &host)));

        let refused: Vec<_> = [first, second].into_iter().filter_map(Result::err).collect();
        assert_eq!(refused.len(), 1, "round {round}");
        assert!(matches!(refused[0], StoreError::DuplicateName { .. }), "{}", refused[0]);
    }
}

async fn an_app_may_leave_names_to_another(home: &Home) {
    let store = home.way_in("one").await;
    store.put_app(app("blog", "old.example.com")).await.unwrap();
    store.put_app(app("blog", "new.example.com")).await.unwrap();
    store.put_app(app("shop", "old.example.com")).await.unwrap();
    store.remove_app(&name("blog")).await.unwrap();
    store.put_app(app("wiki", "new.example.com")).await.unwrap();
    assert_eq!(store.list().len(), 2);
}

async fn generations_go_on_rising_when_an_app_comes_back(home: &Home) {
    let store = home.way_in("one").await;
    let mut last = Generation(0);
    for _ in 0..3 {
        store.put_app(app("blog", "blog.example.com")).await.unwrap();
        for _ in 0..3 {
            let Outcome::Own(generation) = store.apply(&name("blog"), wake("one")).await.unwrap().0 else {
                panic!()
            };
            assert!(generation > last, "{generation} after {last}");
            last = generation;
            store.apply(&name("blog"), Transition::Gone { generation }).await.unwrap();
        }
        store.remove_app(&name("blog")).await.unwrap();
    }
}

/// One app as a single process would see it.
#[derive(Clone, Debug, Default)]
struct OneApp(AppRecord);

impl SequentialSpec for OneApp {
    type Op = Transition;
    type Ret = Outcome;

    fn invoke(&mut self, op: &Transition) -> Outcome {
        self.0.apply(op, 0)
    }

    /// Which generation is given out is the store's choice, as long as it rises.
    fn is_valid_step(&mut self, op: &Transition, ret: &Outcome) -> bool {
        let now_ms = match ret {
            Outcome::Own(generation) if *generation <= self.0.generation => return false,
            Outcome::Own(generation) => generation.0,
            _ => self.0.generation.0,
        };
        self.0.apply(op, now_ms) == *ret
    }
}

async fn histories_of_many_clients_are_linearizable(home: &Home) {
    for round in 0..40 {
        let app_name = format!("app-{round}");
        let first = home.way_in("first").await;
        first.put_app(app(&app_name, &format!("{app_name}.example.com"))).await.unwrap();
        // One lock for the history: it is asked before and after, never while, an operation runs.
        let history = Arc::new(std::sync::Mutex::new(LinearizabilityTester::new(OneApp::default())));
        let mut clients = tokio::task::JoinSet::new();
        for client in 0..4 {
            let store = home.way_in(&format!("node-{client}")).await;
            let (app_name, history) = (name(&app_name), Arc::clone(&history));
            clients.spawn(async move {
                let mut known = HashSet::new();
                for step in 0..4 {
                    let op = match (step + client) % 3 {
                        1 if let Some(generation) = known.iter().max().copied() => {
                            Transition::Ready { generation, port: 80 }
                        }
                        2 if let Some(generation) = known.iter().max().copied() => {
                            Transition::Gone { generation }
                        }
                        _ => Transition::Wake {
                            node: format!("node-{client}"),
                            start_timeout_ms: 1 << 40,
                            lost: Vec::new(),
                        },
                    };
                    history.lock().unwrap().on_invoke(client, op.clone()).unwrap();
                    let (outcome, record) = store.apply(&app_name, op).await.unwrap();
                    history.lock().unwrap().on_return(client, outcome).unwrap();
                    known.extend(record.instances.keys().copied());
                }
            });
        }
        clients.join_all().await;

        let history = history.lock().unwrap();
        assert!(history.serialized_history().is_some(), "round {round}: {history:?}");
    }
}

#[test]
fn the_check_of_histories_finds_a_double_owner() {
    let mut history = LinearizabilityTester::new(OneApp::default());
    let op = Transition::Wake { node: "here".into(), start_timeout_ms: 1 << 40, lost: Vec::new() };
    history.on_invret(1, op.clone(), Outcome::Own(Generation(5))).unwrap();
    history.on_invret(2, op, Outcome::Own(Generation(6))).unwrap();
    assert!(history.serialized_history().is_none());
}
