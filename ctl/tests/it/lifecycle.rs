//! Instances come and go while visitors notice nothing.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    host::Host,
    http::{Connection, Request, get, post},
    vhost::Vhost,
};

/// What a visitor saw until it was called back.
#[derive(Debug, Default)]
struct Visit {
    answers: usize,
    generations: BTreeSet<u64>,
    apps: BTreeSet<String>,
    failures: Vec<String>,
}

/// A visitor on one keep-alive connection, made anew when the proxy ends it after an answer.
fn visitor(host: &Arc<Host>, request: Request, until: &Arc<AtomicBool>) -> JoinHandle<Visit> {
    let (host, until) = (Arc::clone(host), Arc::clone(until));
    std::thread::spawn(move || {
        let mut visit = Visit::default();
        let mut connection = Connection::open(host.port);
        while !until.load(Ordering::SeqCst) {
            match connection.exchange(&request) {
                Ok(response) if response.status == 200 => {
                    let json = response.json();
                    visit.answers += 1;
                    visit.apps.insert(json["app"].as_str().unwrap_or_default().to_owned());
                    visit.generations.insert(response.generation());
                    if response.closes() {
                        connection = Connection::open(host.port);
                    }
                }
                Ok(response) => visit.failures.push(format!("{} {}", response.status, response.text())),
                Err(broken) => {
                    visit.failures.push(broken.to_string());
                    connection = Connection::open(host.port);
                }
            }
        }
        visit
    })
}

fn after(time: Duration, until: &AtomicBool, visitors: Vec<JoinHandle<Visit>>) -> Vec<Visit> {
    std::thread::sleep(time);
    until.store(true, Ordering::SeqCst);
    visitors.into_iter().map(|visitor| visitor.join().expect("a visitor")).collect()
}

#[test]
fn a_lifetime_of_two_seconds_under_load_fails_no_request() {
    let blog = Vhost::probe("blog").with("lifecycle", "lifetime = \"2s\"");
    let host = Arc::new(Host::up(&[&blog]));
    let until = Arc::new(AtomicBool::new(false));

    let visitors = (0..8)
        .map(|n| {
            let request = if n % 2 == 0 { get(&blog.host(), "/") } else { post(&blog.host(), "/", "four") };
            visitor(&host, request, &until)
        })
        .collect();
    let visits = after(Duration::from_secs(30), &until, visitors);

    let failures: Vec<_> = visits.iter().flat_map(|visit| &visit.failures).collect();
    let generations: BTreeSet<_> = visits.iter().flat_map(|visit| &visit.generations).collect();
    let answers: usize = visits.iter().map(|visit| visit.answers).sum();
    assert!(failures.is_empty(), "{} of {answers} failed: {failures:?}", failures.len());
    assert!((8..=18).contains(&generations.len()), "{} instances in 30 s of 2 s each", generations.len());
    Arc::into_inner(host).expect("the only owner").end();
}

#[test]
fn an_idle_app_leaves_nothing_and_wakes_again() {
    let blog = Vhost::probe("blog").with("lifecycle", "idle-timeout = \"500ms\"");
    let host = Host::up(&[&blog]);
    let first = host.get(&blog, "/").generation();
    let cgroup = host.cgroup();

    host.wait_for("the app to end", || host.states("blog") == ["absent"]);
    let group = std::fs::read_dir("/sys/fs/cgroup").expect("cgroups").flatten().any(|hierarchy| {
        std::fs::read_dir(hierarchy.path().join(&cgroup)).is_ok_and(|groups| {
            groups.flatten().any(|g| g.file_name().to_string_lossy().starts_with("blog."))
        })
    });
    assert!(!group, "a cgroup of the app is left");
    let ended = host.events("blog");
    assert!(
        ended
            .iter()
            .any(|e| e["kind"] == "stopped" && e["message"].as_str().is_some_and(|m| m.contains("idle"))),
        "{ended:?}"
    );

    assert!(host.get(&blog, "/").generation() > first, "another instance answers");
    host.end();
}

#[test]
fn a_request_that_races_the_idle_stop_is_answered() {
    let blog = Vhost::probe("blog").with("lifecycle", "idle-timeout = \"300ms\"");
    let host = Host::up(&[&blog]);
    let mut generations = BTreeSet::new();

    // The idle stop comes 300 ms after the last request, give or take the 250 ms of the proxy's report: walk over that.
    for n in 0..60u64 {
        generations.insert(host.get(&blog, "/").expect_status(200).generation());
        std::thread::sleep(Duration::from_millis(290 + n * 5));
    }

    assert!(generations.len() > 5, "the race was run: {} instances", generations.len());
    host.end();
}

#[test]
fn a_long_request_postpones_the_end_of_its_instance() {
    let blog = Vhost::probe("blog")
        .with("lifecycle", "idle-timeout = \"300ms\"")
        .with("lifecycle", "lifetime = \"500ms\"");
    let host = Host::up(&[&blog]);
    host.get(&blog, "/").expect_status(200);
    assert_eq!(host.get(&blog, "/sleep?ms=3000").status, 200);
    host.end();
}

#[test]
fn two_apps_on_the_same_port_recycled_all_the_time_never_mix() {
    let apps: Vec<Vhost> = ["red", "blue"]
        .iter()
        .map(|name| Vhost::probe(name).with("lifecycle", "lifetime = \"400ms\""))
        .collect();
    let host = Arc::new(Host::up(&[&apps[0], &apps[1]]));
    let until = Arc::new(AtomicBool::new(false));

    let visitors = (0..8).map(|n| visitor(&host, get(&apps[n % 2].host(), "/"), &until)).collect();
    let visits = after(Duration::from_secs(10), &until, visitors);

    for (n, visit) in visits.iter().enumerate() {
        assert!(visit.failures.is_empty(), "{:?}", visit.failures);
        assert_eq!(
            visit.apps.iter().collect::<Vec<_>>(),
            [apps[n % 2].name()],
            "whose answers visitor {n} got"
        );
        assert!(visit.generations.len() > 5, "{} instances", visit.generations.len());
    }
    Arc::into_inner(host).expect("the only owner").end();
}

#[test]
fn a_stopped_app_ends_at_once_and_a_woken_one_is_ready() {
    let blog = Vhost::probe("blog");
    let host = Host::up(&[&blog]);

    host.ctl_ok(&["wake", "blog"]);
    assert_eq!(host.states("blog"), ["ready"]);
    host.ctl_ok(&["stop", "blog"]);
    assert_eq!(host.states("blog"), ["absent"]);
    host.get(&blog, "/").expect_status(200);
    host.end();
}

#[test]
fn an_app_that_ignores_sigterm_is_killed_after_its_stop_timeout() {
    let blog = Vhost::probe("blog").env("IGNORE_TERM", 1).with("lifecycle", "stop-timeout = \"300ms\"");
    let host = Host::up(&[&blog]);
    host.get(&blog, "/").expect_status(200);
    let begun = Instant::now();
    host.ctl_ok(&["stop", "blog"]);
    assert!(begun.elapsed() >= Duration::from_millis(300), "it had its time");
    host.end();
}

#[test]
fn an_app_that_must_always_run_runs_before_the_first_request_and_after_a_death() {
    let blog = Vhost::probe("blog").with("scale", "min = 1").with("lifecycle", "idle-timeout = \"300ms\"");
    let host = Host::up(&[&blog]);
    host.wait_for("the app to be ready", || host.states("blog") == ["ready"]);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(host.states("blog"), ["ready"], "it is not idle beyond its minimum");

    let pid = host.ps("blog")[0]["pid"].as_i64().expect("a pid");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL)
        .expect("kill the app");
    host.wait_for("another instance", || {
        let lines = host.ps("blog");
        lines[0]["state"] == "ready" && lines[0]["pid"].as_i64() != Some(pid)
    });
    host.end();
}
