//! Parts of FastContainer are killed; it goes on, or starts again clean.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    host::Host,
    http::{Connection, get},
    vhost::Vhost,
};

fn kill_nine(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill -9");
}

/// The pid of the launcher's spawner.
fn spawner_of(host: &Host) -> i32 {
    let launcher = host.pid_of("fastcontainer-launcher");
    let children = std::fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children"));
    let first = children.expect("children").split_whitespace().next().map(ToOwned::to_owned);
    first.expect("the spawner").parse().expect("a pid")
}

/// A request that is repeated until the proxy is back; what a browser's user does.
fn answered_again(host: &Host, vhost: &Vhost) -> u64 {
    let mut generation = 0;
    host.wait_for("an answer", || {
        let Ok(mut connection) = Connection::try_open(host.port) else { return false };
        match connection.exchange(&get(&vhost.host(), "/")) {
            Ok(response) if response.status == 200 => {
                generation = response.generation();
                true
            }
            _ => false,
        }
    });
    generation
}

#[test]
fn a_killed_proxy_comes_back_and_the_app_has_gone_on() {
    let blog = Vhost::probe("blog");
    let host = Host::up(&[&blog]);
    let before = host.get(&blog, "/").generation();

    let killed = host.pid_of("fastcontainer-proxy");
    kill_nine(killed);

    assert_eq!(answered_again(&host, &blog), before, "the same instance answers");
    assert_ne!(host.find_pid_of("fastcontainer-proxy"), Some(killed));
    host.end();
}

#[test]
fn a_killed_coreapi_comes_back_and_goes_on_watching() {
    let blog = Vhost::probe("blog");
    let host = Host::up(&[&blog]);
    let before = host.get(&blog, "/").generation();

    let killed = host.pid_of("fastcontainer-coreapi");
    kill_nine(killed);

    assert_eq!(host.get(&blog, "/").generation(), before, "nobody notices");
    let shop = Vhost::probe("shop");
    host.apply(&shop);
    host.get(&shop, "/").expect_status(200);
    host.end();
}

#[test]
fn apps_live_through_the_launchers_death_and_are_supervised_again() {
    let blog = Vhost::probe("blog").with("resources", "memory = \"64MiB\"");
    let host = Arc::new(Host::up(&[&blog]));
    let before = host.get(&blog, "/").generation();
    let pid = host.ps("blog")[0]["pid"].clone();
    let until = Arc::new(AtomicBool::new(false));
    let visitor = {
        let (host, blog, until) = (Arc::clone(&host), blog.clone(), Arc::clone(&until));
        std::thread::spawn(move || {
            let mut visits = 0;
            while !until.load(Ordering::SeqCst) {
                // Each writes a line, which must end neither the app nor the line.
                host.get(&blog, &format!("/log?line=visit{visits}")).expect_status(200);
                visits += 1;
            }
            visits
        })
    };

    for round in 1..=5 {
        let killed = host.pid_of("fastcontainer-launcher");
        kill_nine(killed);
        host.wait_for("another launcher", || {
            host.find_pid_of("fastcontainer-launcher").is_some_and(|pid| pid != killed)
        });
        host.wait_for("the app to be supervised", || {
            host.ctl(&["ps", "blog"]).status.success() && host.states("blog") == ["ready"]
        });
        assert_eq!(host.ps("blog")[0]["pid"], pid, "round {round}: the same process");
    }
    until.store(true, Ordering::SeqCst);
    let visits = visitor.join().expect("no request failed");

    assert_eq!(host.get(&blog, "/").generation(), before);
    let last = format!("visit{}", visits - 1);
    host.wait_for("the last line", || host.ctl_ok(&["logs", "blog", "-n", "1000"]).contains(&last));
    host.apply(&Vhost::probe("blog").with("resources", "memory = \"96MiB\""));
    host.wait_for("its limits to be at hand", || host.ps("blog")[0]["memory_limit"] == 96 << 20);
    host.ctl_ok(&["stop", "blog"]);
    assert_eq!(host.states("blog"), ["absent"]);
    assert!(host.get(&blog, "/").generation() > before);
    Arc::into_inner(host).expect("the only owner").end();
}

#[test]
fn two_apps_keep_their_own_users_through_the_launchers_death() {
    let (red, blue) = (Vhost::probe("red"), Vhost::probe("blue"));
    let host = Host::up(&[&red, &blue]);
    let map = |vhost| host.get(vhost, "/escape").json()["facts"]["uid_map"].clone();
    let (_, of_blue) = (map(&red), map(&blue));
    host.ctl_ok(&["stop", "red"]);

    let killed = host.pid_of("fastcontainer-launcher");
    kill_nine(killed);
    host.wait_for("another launcher", || {
        host.find_pid_of("fastcontainer-launcher").is_some_and(|pid| pid != killed)
    });
    host.wait_for("the app to be supervised", || {
        host.ctl(&["ps", "blue"]).status.success() && host.states("blue") == ["ready"]
    });

    assert_eq!(map(&blue), of_blue);
    assert_ne!(map(&red), of_blue, "a start after it takes no ids that are in use");
    host.end();
}

#[test]
fn a_launcher_killed_in_the_middle_of_a_wake_keeps_nobody_waiting_in_vain() {
    let blog = Vhost::probe("blog").env("LISTEN_AFTER_MS", 1500);
    let host = Host::up(&[&blog]);
    let mut visitor = Connection::open(host.port);
    visitor.send(&get(&blog.host(), "/"));
    host.wait_for("the start", || host.states("blog") == ["starting"]);

    kill_nine(host.pid_of("fastcontainer-launcher"));

    let answer = visitor.receive().expect("an answer");
    assert!(
        answer.status == 200 || (answer.status == 503 && answer.retry_after().is_some()),
        "{} {}",
        answer.status,
        answer.text()
    );
    answered_again(&host, &blog);
    host.end();
}

#[test]
fn after_a_killed_up_the_next_one_starts_clean() {
    let blog = Vhost::probe("blog");
    let mut host = Host::up(&[&blog]);
    let before = host.get(&blog, "/").generation();

    kill_nine(host.pid());
    let _ = host.wait();
    host.again();

    assert!(host.get(&blog, "/").generation() > before, "an instance of the new life answers");
    assert_eq!(host.states("blog"), ["ready"], "and it is the only one");
    host.end();
}

#[test]
fn after_everything_was_killed_at_once_the_next_one_starts_clean() {
    let blog = Vhost::probe("blog").env("IGNORE_TERM", 1);
    let mut host = Host::up(&[&blog]);
    let before = host.get(&blog, "/").generation();

    let mut all = crate::host::processes_with(&host.state.to_string_lossy());
    all.push((spawner_of(&host), "the spawner".to_owned()));
    assert!(all.len() >= 5, "{all:?}");
    for (pid, _) in all {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let _ = host.wait();
    std::thread::sleep(Duration::from_millis(200));
    host.again();

    assert!(host.get(&blog, "/").generation() > before, "a generation is never used twice");
    assert_eq!(host.states("blog"), ["ready"]);
    host.end();
}

#[test]
fn a_killed_spawner_is_replaced_and_the_apps_go_on() {
    let blog = Vhost::probe("blog");
    let host = Host::up(&[&blog]);
    let before = host.get(&blog, "/").generation();

    kill_nine(spawner_of(&host));

    host.wait_for("another spawner", || host.events_of_host("spawner-back") > 0);
    assert_eq!(host.get(&blog, "/").generation(), before, "the app has gone on");
    let shop = Vhost::probe("shop");
    host.apply(&shop);
    host.get(&shop, "/").expect_status(200);
    host.ctl_ok(&["stop", "blog"]);
    assert_eq!(host.states("blog"), ["absent"]);
    host.end();
}
