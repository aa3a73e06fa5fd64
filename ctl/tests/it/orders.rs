//! What the operator orders: numbers of instances, limits, a pause; and the fewest instances of a vhost file.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    host::Host,
    scaling::{Load, judged, quotas, words},
    vhost::Vhost,
};

fn overrides(host: &Host, app: &str) -> Vec<String> {
    let line = &host.ps(app)[0]["overrides"];
    line.as_array()
        .expect("a list")
        .iter()
        .map(|words| words.as_str().unwrap_or_default().to_owned())
        .collect()
}

fn kill_launcher(host: &Host) {
    let killed = host.pid_of("fastcontainer-launcher");
    kill(Pid::from_raw(killed), Signal::SIGKILL).expect("kill -9");
    host.wait_for("another launcher", || {
        host.find_pid_of("fastcontainer-launcher").is_some_and(|pid| pid != killed)
    });
    host.wait_for("the launcher to answer", || host.ctl(&["ps"]).status.success());
}

#[test]
fn a_number_of_instances_is_brought_about_at_once_and_no_request_fails() {
    let blog = Vhost::probe("blog").with("lifecycle", "idle-timeout = \"1s\"");
    let host = Host::up(&[&blog]);
    host.get(&blog, "/").expect_status(200);
    let load = Load::begin(&host, &blog, "/sleep?ms=5", 4);

    host.ctl_ok(&["scale", "blog", "3"]);
    host.wait_for("three instances", || host.states("blog") == ["ready"; 3]);
    assert_eq!(overrides(&host, "blog"), ["scale.min = 3 (vhost file: 0)", "scale.max = 3 (vhost file: 1)"]);
    assert!(host.ctl_ok(&["ps"]).contains("blog: set by the operator: scale.min = 3 (vhost file: 0), "));

    host.ctl_ok(&["scale", "blog", "1"]);
    host.wait_for("one instance", || host.states("blog") == ["ready"]);
    load.end();

    let refused = host.ctl(&["scale", "blog", "--min", "2"]);
    let reason = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && reason.contains("give --max, too"), "{reason}");
    host.ctl_ok(&["scale", "blog", "--auto"]);
    host.wait_for("it to sleep as the file says", || host.states("blog") == ["absent"]);
    assert!(overrides(&host, "blog").is_empty());
    host.end();
}

#[test]
fn what_the_operator_sets_outlives_the_launcher_and_ends_when_the_file_says_otherwise() {
    let blog = Vhost::probe("blog").with("resources", "cpu = \"40%\"");
    let host = Host::up(&[&blog]);
    host.ctl_ok(&["scale", "blog", "2"]);
    host.ctl_ok(&["limit", "blog", "--cpu", "55%", "--memory", "96MiB"]);
    host.wait_for("two instances", || host.states("blog") == ["ready"; 2]);

    kill_launcher(&host);

    host.wait_for("both to be supervised", || host.states("blog") == ["ready"; 2]);
    host.wait_for("the quota", || quotas(&host).values().eq([&Some(550), &Some(550)]));
    assert_eq!(overrides(&host, "blog").len(), 4, "{:?}", overrides(&host, "blog"));
    host.ctl_ok(&["stop", "blog"]);
    host.wait_for("two others, with the same limits", || {
        host.states("blog") == ["ready"; 2] && host.ps("blog")[1]["memory_limit"] == 96 << 20
    });

    // Another memory limit in the file: that one holds, and the rest of what the operator set.
    host.apply(
        &Vhost::probe("blog").with("resources", "cpu = \"40%\"").with("resources", "memory = \"80MiB\""),
    );
    host.wait_for("the file's limit", || host.ps("blog")[0]["memory_limit"] == 80 << 20);
    assert!(
        words(&host, "blog", "override").last().is_some_and(|words| words.contains("has changed memory"))
    );
    assert_eq!(overrides(&host, "blog").len(), 3);
    host.ctl_ok(&["limit", "blog", "--reset"]);
    host.wait_for("the file's quota", || quotas(&host).values().eq([&Some(400), &Some(400)]));
    host.end();
}

#[test]
fn a_paused_app_is_left_as_it_is_until_it_is_resumed() {
    let blog = judged("blog").with("resources", "cpu = \"20%\"").with("resources", "cpu-max = \"60%\"");
    let host = Host::up(&[&blog]);
    host.get(&blog, "/").expect_status(200);
    host.ctl_ok(&["scale", "blog", "--pause"]);
    kill_launcher(&host);
    assert_eq!(overrides(&host, "blog"), ["automatic scaling paused"]);

    let load = Load::begin(&host, &blog, "/work?ms=10", 8);
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert_eq!(host.count("blog", "scale-up"), 0);
    assert_eq!(host.ps("blog")[0]["decision"], serde_json::Value::Null);

    host.ctl_ok(&["scale", "blog", "--resume"]);
    host.wait_for("the quota to be raised", || quotas(&host).values().eq([&Some(600)]));
    assert_eq!(host.ps("blog")[0]["decision"]["kind"], "scale-up");
    assert!(host.ctl_ok(&["ps", "blog"]).contains("blog: last decision: "));
    load.end();
    host.end();
}

#[test]
fn the_fewest_instances_run_unasked_after_crash_and_lifetime_too() {
    let blog = Vhost::probe("blog")
        .with("scale", "min = 1")
        .with("lifecycle", "idle-timeout = \"200ms\"")
        .with("lifecycle", "lifetime = \"3s\"");
    let host = Host::up(&[&blog]);
    host.wait_for("the first one", || host.states("blog") == ["ready"]);
    let first = host.ps("blog")[0]["generation"].clone();

    let pid = host.ps("blog")[0]["pid"].as_i64().map(|pid| Pid::from_raw(pid as i32));
    if host.ps("blog")[0]["generation"] == first {
        kill(pid.expect("a pid"), Signal::SIGKILL).expect("kill the app");
    }
    host.wait_for("another one", || {
        host.states("blog") == ["ready"] && host.ps("blog")[0]["generation"] != first
    });

    // Idle at its lifetime's end, and yet replaced before it goes.
    let second = host.ps("blog")[0]["generation"].as_u64();
    let about_second = |kind: &str| {
        let events = host.events("blog");
        let mut those = events.iter().filter(|e| e["kind"] == kind && e["generation"].as_u64() == second);
        those.next().and_then(|event| event["seq"].as_u64())
    };
    host.wait_for("its replacement", || about_second("draining").is_some());
    let drains = about_second("draining").expect("it drains");
    let events = host.events("blog");
    let next = events.iter().find(|e| e["kind"] == "ready" && e["generation"].as_u64() > second);
    assert!(next.is_some_and(|ready| ready["seq"].as_u64() < Some(drains)), "{events:?}");
    host.end();
}
