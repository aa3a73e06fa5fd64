//! Apps that do not start, or do not stay.

use std::time::{Duration, Instant};

use crate::{
    host::Host,
    http::{Connection, get, post, request},
    vhost::Vhost,
};

/// Resident memory of a process, KiB.
fn rss(pid: i32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// `count` requests at a time: how many got which status, and how many of the 503s said when to come again.
fn flood(host: &Host, vhost: &Vhost, count: usize) -> (usize, usize, usize) {
    let request = get(&vhost.host(), "/");
    let mut connections: Vec<_> = (0..count).map(|_| Connection::open(host.port)).collect();
    connections.iter_mut().for_each(|connection| connection.send(&request));
    let (mut overflow, mut late, mut told) = (0, 0, 0);
    for mut connection in connections {
        let response = connection.receive().expect("an answer");
        match response.status {
            503 => {
                overflow += 1;
                told += usize::from(response.retry_after().is_some());
            }
            504 => late += 1,
            other => panic!("{other} {}", response.text()),
        }
    }
    (overflow, late, told)
}

#[test]
fn a_flood_of_an_app_that_never_listens_is_bounded_and_leaves_nothing() {
    let blog = Vhost::probe("blog")
        .env("NEVER_LISTEN", 1)
        .with("hold", "queue = 50")
        .with("hold", "timeout = \"1s\"")
        .with("lifecycle", "start-timeout = \"60s\"");
    let host = Host::up(&[&blog]);
    let proxy = host.pid_of("fastcontainer-proxy");

    // The allocator's arenas fill up over the first rounds; then a flood must cost nothing that stays.
    let mut grown = usize::MAX;
    for round in 0..15 {
        let before = rss(proxy);
        assert_eq!(
            flood(&host, &blog, 300),
            (250, 50, 250),
            "round {round}: overflow, too late, told when to come again"
        );
        grown = rss(proxy).saturating_sub(before);
        if round > 0 && grown < 512 {
            break;
        }
    }
    assert!(grown < 512, "the proxy still grows by {grown} KiB with each flood");
    host.ctl_ok(&["stop", "blog"]);
    assert_eq!(host.states("blog"), ["absent"]);
    host.end();
}

#[test]
fn an_app_that_does_not_listen_in_time_is_ended_and_its_waiters_are_told() {
    let blog = Vhost::probe("blog").env("NEVER_LISTEN", 1).with("lifecycle", "start-timeout = \"700ms\"");
    let host = Host::up(&[&blog]);

    let answer = host.get(&blog, "/");

    assert_eq!(answer.status, 504, "{}", answer.text());
    host.wait_for("nothing to run", || {
        host.states("blog") == ["backing-off"] || host.states("blog") == ["absent"]
    });
    let events = host.events("blog");
    assert!(events.iter().any(|e| e["kind"] == "start-failed"), "{events:?}");
    host.end();
}

#[test]
fn an_app_that_exits_tells_its_waiters_at_once_and_backs_off() {
    let blog = Vhost::probe("blog")
        .env("EXIT_AFTER_MS", 50)
        .env("EXIT_CODE", 3)
        .env("LAST_WORDS", "missing database");
    let host = Host::up(&[&blog]);

    let begun = Instant::now();
    let answer = host.get(&blog, "/");
    assert_eq!(answer.status, 502, "{}", answer.text());
    assert!(answer.text().contains("exited with status 3"), "{}", answer.text());
    assert!(begun.elapsed() < Duration::from_secs(10), "long before any time-out");
    assert!(!answer.text().contains("missing database"), "an app's output is for its operator");

    let log = host.ctl_ok(&["logs", "blog"]);
    assert!(log.contains("missing database"), "{log}");
    let events = host.events("blog");
    let told = events
        .iter()
        .any(|e| e["kind"] == "start-failed" && e["message"].as_str().unwrap().contains("missing database"));
    assert!(told, "{events:?}");

    // Within the back-off nobody starts it, and visitors learn when to come again; the next failure doubles it.
    let refused = host.get(&blog, "/").expect_status(503);
    assert_eq!(refused.retry_after(), Some(1));
    assert_eq!(host.count("blog", "wake"), 1);
    host.wait_for("the next start", || host.get(&blog, "/").status == 502);
    let refused = host.get(&blog, "/").expect_status(503);
    assert_eq!(refused.retry_after(), Some(2));
    assert_eq!(host.states("blog"), ["backing-off"]);

    host.apply(&Vhost::probe("blog"));
    host.get(&blog, "/").expect_status(200);
    host.end();
}

#[test]
fn a_mended_image_starts_after_the_back_off() {
    let image = tempfile::Builder::new().prefix("fcimg").tempdir_in("/tmp").expect("a folder");
    std::fs::set_permissions(image.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .expect("its mode");
    let blog = Vhost::probe("blog");
    let text = blog.text().replace(
        &format!("dir:{}/probe", crate::vhost::images().display()),
        &format!("dir:{}", image.path().display()),
    );
    for folder in ["proc", "sys", "dev", "tmp", "etc", "run"] {
        std::fs::create_dir(image.path().join(folder)).expect("a folder");
    }
    let host = Host::up_with(&[("blog.toml".into(), text.into_bytes())]);

    let answer = host.get(&blog, "/");
    assert_eq!(answer.status, 502, "there is no such program: {}", answer.text());

    std::fs::copy(crate::vhost::images().join("probe/probe"), image.path().join("probe"))
        .expect("mend the image");
    host.wait_for("the next start", || host.get(&blog, "/").status == 200);
    host.end();
}

#[test]
fn an_app_that_dies_while_it_serves_is_woken_again() {
    let blog = Vhost::probe("blog");
    let host = Host::up(&[&blog]);
    let before = host.get(&blog, "/").generation();
    std::thread::sleep(Duration::from_millis(1100));

    let died = host.ask(&request("POST", &blog.host(), "/exit?code=7").header("Content-Length", "0"));
    assert!(died.as_ref().map_or(true, |answer| answer.status == 502 || answer.status == 200), "{died:?}");

    assert!(host.get(&blog, "/").expect_status(200).generation() > before);
    let events = host.events("blog");
    assert!(
        events.iter().any(|e| e["kind"] == "exited" && e["message"].as_str().unwrap().contains("status 7")),
        "{events:?}"
    );
    host.end();
}

#[test]
fn an_app_that_resets_its_first_connection_costs_a_visitor_nothing() {
    let blog = Vhost::probe("blog").env("RESET_FIRST", 1);
    let shop = Vhost::probe("shop").env("RESET_FIRST", 1);
    let host = Host::up(&[&blog, &shop]);

    // What changes nothing may be asked again.
    host.get(&blog, "/").expect_status(200);

    // What may have changed something is not sent twice: its sender decides.
    let order = || host.ask(&post(&shop.host(), "/upload", "an order")).unwrap();
    assert_eq!(order().status, 502);
    let taken = order().expect_status(200).json();
    assert_eq!(taken["requests_seen"], 1, "{taken}");
    assert_eq!(host.count("shop", "wake"), 1, "a reset is no reason for another instance");
    host.end();
}

/// The median of so many requests.
fn median(host: &Host, vhost: &Vhost, count: usize) -> Duration {
    let mut times: Vec<Duration> = (0..count)
        .map(|_| {
            let begun = Instant::now();
            host.get(vhost, "/").expect_status(200);
            begun.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[count / 2]
}

#[test]
fn a_crash_loop_under_load_is_held_back_and_its_neighbour_goes_on() {
    let (crashing, neighbour) =
        (Vhost::probe("crashing").env("EXIT_AFTER_MS", 20), Vhost::probe("neighbour"));
    let host = Host::up(&[&crashing, &neighbour]);
    host.get(&neighbour, "/").expect_status(200);
    let calm = median(&host, &neighbour, 100);

    let begun = Instant::now();
    let over = std::sync::atomic::AtomicBool::new(false);
    let order = std::sync::atomic::Ordering::SeqCst;
    let beside = std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(order) {
                    let status = host.get(&crashing, "/").status;
                    assert!([502, 503].contains(&status), "{status}");
                    // As fast as impatient visitors press the button.
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
        }
        let beside: Vec<Duration> = (0..10).map(|_| median(&host, &neighbour, 50)).collect();
        host.wait_for("another start", || host.count("crashing", "wake") > 1);
        over.store(true, order);
        beside
    });

    // Far from what a start for each request would cost, and no more than a busy machine can explain.
    let worst = beside.iter().min().unwrap();
    assert!(*worst < calm * 10 + Duration::from_millis(50), "{calm:?} alone, {beside:?} beside a crash loop");
    let starts = host.count("crashing", "wake");
    let most = 2 + usize::try_from(begun.elapsed().as_secs()).unwrap();
    assert!(starts <= most, "{starts} starts in {:?}", begun.elapsed());
    host.end();
}
