//! One app takes all that it can get; the others do not notice.

use std::time::Duration;

use crate::{
    host::Host,
    http::{Connection, Request, request},
    vhost::Vhost,
};

fn post_to(vhost: &Vhost, path: &str) -> Request {
    request("POST", &vhost.host(), path).header("Content-Length", "0")
}

/// Sets the hog to work and looks how its neighbour answers meanwhile.
fn beside_a_hog(hog: &Vhost, path: &str, seconds: u64) -> Host {
    let neighbour = Vhost::probe("neighbour");
    let host = Host::up(&[hog, &neighbour]);
    host.get(&neighbour, "/").expect_status(200);
    host.get(hog, "/").expect_status(200);
    // Past its first second an end is an end and no failed start.
    std::thread::sleep(Duration::from_millis(1100));

    let mut hogging = Connection::open(host.port);
    hogging.send(&post_to(hog, path));
    for _ in 0..seconds * 20 {
        host.get(&neighbour, "/").expect_status(200);
        std::thread::sleep(Duration::from_millis(50));
    }
    hogging.leave();
    host
}

#[test]
fn a_fork_bomb_ends_at_its_own_limit() {
    let bomb = Vhost::probe("bomb").with("resources", "pids = 32").with("resources", "cpu = \"50%\"");
    let host = beside_a_hog(&bomb, "/forkbomb", 3);
    let pids = host.ps("bomb").iter().filter_map(|line| line["pids"].as_u64()).max().unwrap_or(0);
    assert!(pids <= 32, "{pids} processes");
    host.ctl_ok(&["stop", "bomb"]);
    assert_eq!(host.states("bomb"), ["absent"]);
    host.end();
}

#[test]
fn a_memory_hog_is_ended_and_told_apart_from_a_crash() {
    let hog = Vhost::probe("hog").with("resources", "memory = \"32MiB\"");
    let host = beside_a_hog(&hog, "/memhog?mib=256", 2);
    host.wait_for("the event of its end", || host.count("hog", "oom") == 1);
    assert_eq!(host.count("hog", "exited"), 0);
    let events = host.events("hog");
    assert!(events.iter().any(|e| e["message"].as_str().unwrap().contains("limit 32MiB")), "{events:?}");
    host.get(&hog, "/").expect_status(200);
    host.end();
}

#[test]
fn a_hog_of_descriptors_ends_at_its_own_limit() {
    let hog = Vhost::probe("hog");
    let host = beside_a_hog(&hog, "/fdhog", 2);
    let pid = host.ps("hog")[0]["pid"].as_u64().expect("it lives on");
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    assert!((8000..=8192).contains(&open), "{open} descriptors: all that it may have, and no more");
    host.ctl_ok(&["stop", "hog"]);
    host.end();
}

#[test]
fn a_hog_of_cpu_gets_its_quota_and_no_more() {
    let hog = Vhost::probe("hog").with("resources", "cpu = \"20%\"");
    let host = beside_a_hog(&hog, "/spin?ms=3000", 1);
    let used = || host.ps("hog")[0]["cpu_us"].as_u64().unwrap();
    let before = used();
    std::thread::sleep(Duration::from_secs(1));
    let spent = used() - before;
    assert!(spent < 400_000, "{spent} µs of CPU in a second or a little more, at a quota of 20 %");
    host.end();
}

#[test]
fn an_app_that_floods_its_output_keeps_its_last_lines_only() {
    let talker = Vhost::probe("talker");
    let host = Host::up(&[&talker]);
    for n in 0..1200 {
        host.get(&talker, &format!("/log?line=line{n}")).expect_status(200);
    }
    let log = host.ctl_ok(&["logs", "talker", "-n", "100000"]);
    assert!(log.contains("line1199") && !log.contains("line1\n"), "{} lines", log.lines().count());
    assert!(log.lines().count() <= 1001);
    host.end();
}
