//! Idle apps are frozen and thawed.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    host::Host,
    http::{Connection, get},
    vhost::Vhost,
};

fn sleeper() -> Vhost {
    Vhost::probe("blog").with("lifecycle", "freeze-after = \"300ms\"")
}

/// Processes of the app that the kernel shows as frozen or stopped in the freezer, from the host's side.
fn is_frozen(host: &Host) -> bool {
    let pid = host.ps("blog")[0]["pid"].as_i64().expect("a pid");
    let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("its cgroups");
    cgroups.lines().any(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next(), parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        let (root, file) = match controllers {
            "freezer" => ("/sys/fs/cgroup/freezer", "freezer.state"),
            "" if std::path::Path::new("/sys/fs/cgroup/unified").is_dir() => {
                ("/sys/fs/cgroup/unified", "cgroup.events")
            }
            "" => ("/sys/fs/cgroup", "cgroup.events"),
            _ => return false,
        };
        let state = std::fs::read_to_string(format!("{root}{path}/{file}")).unwrap_or_default();
        state.contains("FROZEN") || state.contains("frozen 1")
    })
}

#[test]
fn an_idle_app_is_frozen_and_the_same_process_answers_the_next_request() {
    let blog = sleeper();
    let host = Host::up(&[&blog]);
    let before = host.get(&blog, "/").json();

    host.wait_for("the app to be frozen", || host.count("blog", "frozen") == 1);
    assert_eq!(host.states("blog"), ["frozen"]);
    assert!(is_frozen(&host), "the kernel has stopped it");

    let after = host.get(&blog, "/").json();
    assert_eq!(after["generation"], before["generation"]);
    assert_eq!(host.count("blog", "thawed"), 1);
    assert_eq!(host.count("blog", "wake"), 1, "nothing was started");
    assert!(!is_frozen(&host));
    host.end();
}

#[test]
fn a_request_that_races_the_freezer_is_answered() {
    let blog = sleeper();
    let host = Host::up(&[&blog]);
    let mut generations = BTreeSet::new();
    // On one connection, so that the proxy's pooled connection to the app is used across sleeps.
    let mut visitor = Connection::open(host.port);
    for n in 0..60u64 {
        generations.insert(
            visitor.exchange(&get(&blog.host(), "/")).expect("an answer").expect_status(200).generation(),
        );
        std::thread::sleep(Duration::from_millis(290 + n * 5));
    }
    assert_eq!(generations.len(), 1, "one instance has answered all");
    assert!(host.count("blog", "thawed") > 5, "{} sleeps", host.count("blog", "thawed"));
    host.end();
}

#[test]
fn a_request_under_way_is_never_frozen() {
    let blog = sleeper();
    let host = Host::up(&[&blog]);
    assert_eq!(host.get(&blog, "/sleep?ms=1500").status, 200);
    host.end();
}

#[test]
fn a_frozen_app_ends_when_it_is_idle_for_longer_or_is_stopped() {
    let blog = sleeper().with("lifecycle", "idle-timeout = \"1500ms\"");
    let host = Host::up(&[&blog]);
    host.get(&blog, "/").expect_status(200);
    host.wait_for("the app to be frozen", || host.states("blog") == ["frozen"]);
    host.wait_for("the app to end", || host.states("blog") == ["absent"]);

    host.get(&blog, "/").expect_status(200);
    host.wait_for("the app to be frozen", || host.count("blog", "frozen") == 2);
    host.ctl_ok(&["stop", "blog"]);
    assert_eq!(host.states("blog"), ["absent"]);
    host.end();
}

#[test]
fn a_frozen_app_leaves_nothing_behind_when_everything_ends() {
    let blog = sleeper();
    let host = Host::up(&[&blog]);
    host.get(&blog, "/").expect_status(200);
    host.wait_for("the app to be frozen", || host.count("blog", "frozen") == 1);
    host.end();
}

#[test]
fn a_frozen_app_whose_launcher_was_killed_is_thawed_by_the_next_one() {
    let blog = sleeper();
    let host = Host::up(&[&blog]);
    let before = host.get(&blog, "/").generation();
    host.wait_for("the app to be frozen", || host.count("blog", "frozen") == 1);

    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(host.pid_of("fastcontainer-launcher")),
        nix::sys::signal::Signal::SIGKILL,
    )
    .expect("kill -9");

    assert_eq!(host.get(&blog, "/").expect_status(200).generation(), before);
    host.wait_for("it to be frozen again", || {
        host.ctl(&["ps"]).status.success() && host.states("blog") == ["frozen"]
    });
    host.end();
}
