//! Many apps woken at once, and a host that has no room for one more.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    sync::{Arc, Barrier},
};

use serde_json::Value;

use crate::{
    host::Host,
    http::{Connection, get},
    vhost::Vhost,
};

fn files(vhosts: &[Vhost]) -> Vec<(String, Vec<u8>)> {
    vhosts.iter().map(|v| (format!("{}.toml", v.name()), v.text().into_bytes())).collect()
}

/// The most starts that were under way at a time, as the events tell.
fn most_under_way(events: &[Value]) -> usize {
    let about = |event: &Value, kind: &str| {
        (event["kind"] == kind).then(|| (event["app"].to_string(), event["generation"].to_string()))
    };
    let waited: BTreeSet<_> = events.iter().filter_map(|event| about(event, "start-waits")).collect();
    let mut under_way = BTreeSet::new();
    let mut most = 0;
    for event in events {
        if let Some(id) = about(event, "wake").filter(|id| !waited.contains(id)) {
            under_way.insert(id);
        }
        under_way.extend(about(event, "start-admitted"));
        if let Some(id) = about(event, "ready") {
            under_way.remove(&id);
        }
        most = under_way.len().max(most);
    }
    most
}

/// What a file of the app's cgroup says, in whichever hierarchy it is.
fn in_cgroup(host: &Host, app: &str, files: [&str; 2]) -> Option<String> {
    let parent = host.cgroup();
    let mut roots = vec![Path::new("/sys/fs/cgroup").to_owned()];
    roots.extend(fs::read_dir("/sys/fs/cgroup").expect("cgroups").flatten().map(|entry| entry.path()));
    let groups = roots.iter().filter_map(|root| fs::read_dir(root.join(&parent)).ok()).flatten().flatten();
    groups
        .filter(|group| group.file_name().to_string_lossy().starts_with(&format!("{app}.")))
        .flat_map(|group| files.map(|file| group.path().join(file)))
        .find_map(|file| fs::read_to_string(file).ok())
        .map(|text| text.trim().to_owned())
}

#[test]
fn forty_apps_woken_at_once_start_three_at_a_time_and_all_answer() {
    let apps: Vec<Vhost> =
        (0..40).map(|n| Vhost::probe(&format!("app{n}")).env("LISTEN_AFTER_MS", 60)).collect();
    let host = Arc::new(Host::up_after(&files(&apps), &["--governor", "3"], |_| {}));

    let barrier = Arc::new(Barrier::new(apps.len()));
    let visitors: Vec<_> = apps
        .iter()
        .map(|app| {
            let (host, barrier, app) = (Arc::clone(&host), Arc::clone(&barrier), app.clone());
            std::thread::spawn(move || {
                let mut connection = Connection::open(host.port);
                barrier.wait();
                connection.exchange(&get(&app.host(), "/")).map(|response| response.status)
            })
        })
        .collect();
    for visitor in visitors {
        assert_eq!(visitor.join().unwrap().unwrap(), 200);
    }

    let text = host.ctl_ok(&["events", "--json"]);
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(most_under_way(&events), 3);
    let app = events.iter().rfind(|event| event["kind"] == "start-admitted").expect("one that waited")["app"]
        .as_str()
        .unwrap()
        .to_owned();
    let waited = host.events(&app).iter().filter(|event| event["kind"] == "start-admitted").count();
    assert_eq!(waited, 1);
    // Whoever asks why this visit took so long is told.
    let records = host.access_log(apps.len());
    let record = records.iter().find(|record| record["app"] == app.as_str()).expect("its visit");
    let why = host.ctl_ok(&["why", record["request_id"].as_str().unwrap()]);
    assert!(why.contains("start-slot"), "{why}");
    Arc::into_inner(host).unwrap().end();
}

#[test]
fn a_host_without_memory_refuses_a_wake_with_the_reason_and_holds_it_against_nobody() {
    let blog = Vhost::probe("blog").with("lifecycle", "start-timeout = \"1s\"");
    let host = Host::up_after(&files(std::slice::from_ref(&blog)), &["--keep-free", "100TiB"], |_| {});

    let answer = host.get(&blog, "/").expect_status(503);

    assert!(answer.retry_after().is_some(), "{}", answer.text());
    let events = host.events("blog");
    let told =
        events.iter().find(|event| event["kind"] == "no-room").expect("an event")["message"].to_string();
    assert!(told.contains("of memory, and the host has 0B for starts (it keeps 100TiB free)"), "{told}");
    assert_eq!(host.states("blog"), ["absent"], "no back-off: the app did nothing wrong");
    host.end();
}

#[test]
fn a_start_gives_way_to_what_serves_until_its_first_byte() {
    let blog = Vhost::probe("blog").env("LISTEN_AFTER_MS", 1500);
    let host = Host::up(&[&blog]);
    let mut visitor = Connection::open(host.port);
    visitor.send(&get(&blog.host(), "/"));
    let weight = || in_cgroup(&host, "blog", ["cpu.shares", "cpu.weight"]);

    host.wait_for("the start", || matches!(weight().as_deref(), Some("128" | "12")));
    assert_eq!(host.states("blog"), ["starting"]);
    assert_eq!(visitor.receive().expect("an answer").status, 200);

    host.wait_for("its usual weight", || matches!(weight().as_deref(), Some("1024" | "100")));
    host.end();
}
