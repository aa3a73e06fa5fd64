//! A thousand lives, sixteen at a time, half of which fail on purpose at some step of their making.
//!
//! `FC_SEED` repeats a run; the seed is printed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use launcher::faults::ERRNOS;
use launcher::keeper::{Exit, KeeperError, KeeperEvent};
use launcher::sandbox::{ContainerId, Fault, Plan, STEPS, StepError};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::SERVE;
use crate::lab::{Lab, Running, children, descriptors, mounts, until};

const LIVES: u64 = 1_000;
const AT_ONCE: usize = 16;

/// What kind of app it is, and so how its life goes if nothing fails.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Serves, is asked once, and is killed.
    Serves,
    /// The same with processes of its own.
    Forks,
    /// Ends by itself.
    Ends,
    /// Never listens; is killed when it runs.
    Sleeps,
    /// Is killed before it runs, wherever its making is by then.
    Unborn,
    /// Has no such program.
    Broken,
}

const KINDS: [Kind; 6] = [Kind::Serves, Kind::Forks, Kind::Ends, Kind::Sleeps, Kind::Unborn, Kind::Broken];

impl Kind {
    fn script(self) -> &'static str {
        match self {
            Kind::Serves => SERVE,
            Kind::Forks => "sleep 60 & sleep 60 & exec httpd -f -p 80 -h /www",
            Kind::Ends => "exit 7",
            Kind::Sleeps | Kind::Unborn | Kind::Broken => "exec sleep 60",
        }
    }
}

type Routes = Arc<Mutex<HashMap<ContainerId, mpsc::UnboundedSender<KeeperEvent>>>>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_lives_of_which_half_fail_on_purpose_leave_nothing_behind() {
    let seed =
        std::env::var("FC_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    println!("FC_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut lab = Lab::new().await;
    let (nobody, nothing) = mpsc::unbounded_channel();
    drop(nobody);
    let events = std::mem::replace(&mut lab.events, nothing);
    let routes = Routes::default();
    let router = tokio::spawn(route(events, Arc::clone(&routes)));
    let lab = Arc::new(lab);
    // Once for each app, so that its user namespace is there.
    for generation in 0..8 {
        live(Arc::clone(&lab), Arc::clone(&routes), generation, Kind::Serves, None).await;
    }
    let before = (descriptors(lab.spawner), descriptors(std::process::id()), mounts(), network_namespaces());

    let mut lives = JoinSet::new();
    let mut planned = 0;
    for generation in 8..8 + LIVES {
        while lives.len() >= AT_ONCE {
            lives.join_next().await.unwrap().unwrap();
        }
        let kind = *random.choice(KINDS.iter()).unwrap();
        let fault = random.bool().then(|| fault(&mut random));
        planned += usize::from(fault.is_some());
        lives.spawn(live(Arc::clone(&lab), Arc::clone(&routes), generation, kind, fault));
    }
    while let Some(life) = lives.join_next().await {
        life.unwrap();
    }

    assert!(planned > 400, "{planned}");
    // The spawner may have yet to hear that the last ones are forgotten.
    until("the spawner's descriptors to be closed", || descriptors(lab.spawner) == before.0).await;
    until("this process's to be closed", || descriptors(std::process::id()) <= before.1).await;
    until("the network namespaces to be gone", || network_namespaces() <= before.3).await;
    assert_eq!(children(lab.spawner), 0, "processes");
    assert_eq!(mounts(), before.2);
    assert!(lab.cgroups.leftovers().is_empty(), "{:?}", lab.cgroups.leftovers());
    let staging = std::fs::read_dir(lab.dir.path().join("staging")).unwrap();
    assert_eq!(staging.count(), 0, "files");
    assert!(routes.lock().unwrap().is_empty());
    router.abort();
    let _ = router.await;
    Arc::into_inner(lab).unwrap().close().await;
}

fn fault(random: &mut fastrand::Rng) -> Fault {
    let step = *random.choice(STEPS.iter()).unwrap();
    let errno = *random.choice(ERRNOS.iter()).unwrap();
    let done = random.bool() && !["clone", "report timings", "exec"].contains(&step);
    Fault { step: step.to_owned(), errno, done }
}

/// As the daemon does it: each life hears of itself alone.
async fn route(mut events: mpsc::UnboundedReceiver<KeeperEvent>, routes: Routes) {
    while let Some(event) = events.recv().await {
        let (KeeperEvent::Execed { id, .. }
        | KeeperEvent::Failed { id, .. }
        | KeeperEvent::Listening { id, .. }
        | KeeperEvent::Exited { id, .. }) = &event
        else {
            panic!("{event:?}")
        };
        if let Some(route) = routes.lock().unwrap().get(id) {
            let _ = route.send(event);
        }
    }
}

/// One life from beginning to end; it goes as its kind and its fault want it, or the test fails.
async fn live(lab: Arc<Lab>, routes: Routes, generation: u64, kind: Kind, fault: Option<Fault>) {
    let mut plan = lab.plan(generation, kind.script());
    plan.id.app = format!("app{}", generation % 8);
    plan.id_base += u32::try_from(generation % 8).unwrap() * 65_536;
    plan.fault.clone_from(&fault);
    if let Kind::Broken = kind {
        plan.argv = vec!["/no/such/program".to_owned()];
    }
    let id = plan.id.clone();
    let (route, mut events) = mpsc::unbounded_channel();
    routes.lock().unwrap().insert(id.clone(), route);

    match lab.try_create(plan.clone()).await {
        Ok(running) => {
            if let Kind::Unborn = kind {
                lab.keeper.kill(&id, 9);
            }
            let (error, exit) = follow(&lab, &mut events, &running, kind).await;
            check(&plan, kind, error, Some(exit));
            running.group.remove().await.unwrap();
        }
        Err((KeeperError::Step { error, .. }, group)) => {
            check(&plan, kind, Some(error), None);
            group.remove().await.unwrap();
        }
        Err((other, _)) => panic!("{other}"),
    }
    routes.lock().unwrap().remove(&id);
}

/// Lives along, and returns what failed, if anything did, and how it ended.
async fn follow(
    lab: &Lab,
    events: &mut mpsc::UnboundedReceiver<KeeperEvent>,
    running: &Running,
    kind: Kind,
) -> (Option<StepError>, Exit) {
    let mut failed = None;
    loop {
        let event = tokio::time::timeout(crate::lab::PATIENCE, events.recv());
        match event.await.expect("an event in time").expect("a keeper") {
            KeeperEvent::Execed { .. } if matches!(kind, Kind::Sleeps) => lab.keeper.kill(&running.id, 9),
            KeeperEvent::Listening { .. } if !matches!(kind, Kind::Unborn) => {
                assert!(running.get(80).await.contains("hello from inside"));
                lab.keeper.kill(&running.id, 9);
            }
            KeeperEvent::Failed { error, .. } => failed = Some(error),
            KeeperEvent::Exited { exit, .. } => return (failed, exit),
            _ => {}
        }
    }
}

fn check(plan: &Plan, kind: Kind, error: Option<StepError>, exit: Option<Exit>) {
    let told = error.as_ref().map(|error| (error.step.as_str(), error.errno));
    let wanted = match (&plan.fault, kind) {
        (Some(fault), _) => Some((fault.step.as_str(), fault.errno)),
        (None, Kind::Broken) => Some(("exec", libc::ENOENT)),
        (None, _) => None,
    };
    let story = format!("{plan:?} {kind:?}: {error:?} {exit:?}");
    // It may be dead before its fault, or have met it and be dead before it could say so.
    if matches!(kind, Kind::Unborn) && exit == Some(Exit::Signal(9)) {
        let on_the_way = Some(("create", libc::ECANCELED));
        assert!(told.is_none() || told == wanted || told == on_the_way, "{story}");
        return;
    }
    assert_eq!(told, wanted, "{story}");
    match (exit, kind) {
        (None, _) => assert!(wanted.is_some(), "{story}"),
        (Some(exit), _) if wanted.is_some() => assert_eq!(exit, Exit::Code(125), "{story}"),
        (Some(exit), Kind::Ends) => assert_eq!(exit, Exit::Code(7), "{story}"),
        (Some(exit), _) => assert_eq!(exit, Exit::Signal(9), "{story}"),
    }
}

/// How many network namespaces there are that processes of this host are in.
fn network_namespaces() -> usize {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let all: std::collections::BTreeSet<_> =
        processes.filter_map(|process| std::fs::read_link(process.path().join("ns/net")).ok()).collect();
    all.len()
}
