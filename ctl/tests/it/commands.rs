//! The operator's commands, as people read them and as programs do.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::{
    host::{Host, program},
    vhost::Vhost,
};

#[track_caller]
fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn ps_shows_what_runs_and_what_does_not() {
    let (blog, shop) = (Vhost::probe("blog").with("resources", "memory = \"64MiB\""), Vhost::probe("shop"));
    let host = Host::up(&[&blog, &shop]);
    let generation = host.get(&blog, "/").generation();

    let table = host.ctl_ok(&["ps"]);
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 3, "{table}");
    assert_eq!(lines[0][..4], ["APP", "GENERATION", "STATE", "PID"]);
    assert_eq!((lines[1][0], lines[1][2]), ("blog", "ready"));
    assert!(lines[1].iter().any(|cell| cell.ends_with("/64MiB")), "{table}");
    assert_eq!((lines[2][0], lines[2][2], lines[2][3]), ("shop", "absent", "-"));

    let wide = host.ctl_ok(&["ps", "blog", "--wide"]);
    assert!(wide.contains(&generation.to_string()) && wide.contains("blog.test"), "{wide}");
    assert!(!wide.contains("shop"), "{wide}");

    let all = json(&host.ctl_ok(&["ps", "--json"]));
    assert_eq!(all[0]["instance"], format!("blog.{generation}"));
    assert_eq!(
        (&all[0]["state"], &all[0]["memory_limit"], &all[0]["port"]),
        (&"ready".into(), &(64 << 20).into(), &8080.into())
    );
    let pid = all[0]["pid"].as_u64().unwrap();
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists(), "the pid is the host's");
    assert_eq!((&all[1]["state"], &all[1]["instance"]), (&"absent".into(), &Value::Null));
    host.end();
}

#[test]
fn wake_says_how_long_each_step_took() {
    let blog = Vhost::probe("blog").env("LISTEN_AFTER_MS", 100);
    let host = Host::up(&[&blog]);

    let cold = host.ctl_ok(&["wake", "blog", "-v"]);
    let headline = cold.lines().next().unwrap();
    assert!(headline.contains("is ready on port 8080, after "), "{cold}");
    let steps: Vec<&str> = cold.lines().skip(1).collect();
    assert!(steps.len() > 3 && steps.iter().all(|step| step.trim_end().ends_with(" ms")), "{cold}");

    let warm = host.ctl_ok(&["wake", "blog"]);
    assert!(warm.contains("was ready already") && warm.lines().count() == 1, "{warm}");

    host.ctl_ok(&["stop", "blog"]);
    let woken = json(&host.ctl_ok(&["wake", "blog", "--json"]));
    assert_eq!((&woken["app"], &woken["port"]), (&"blog".into(), &8080.into()));
    assert_eq!(woken["instance"], format!("blog.{}", woken["generation"]));
    let timing = &woken["timing"];
    let sum: u64 = timing["steps"].as_array().unwrap().iter().map(|step| step["us"].as_u64().unwrap()).sum();
    assert_eq!(Some(sum), timing["total_us"].as_u64(), "the steps sum to the whole: {timing}");
    assert!(sum >= 100_000, "{timing}");
    host.end();
}

#[test]
fn stop_ends_the_app_and_the_next_request_wakes_it() {
    let blog = Vhost::probe("blog");
    let host = Host::up(&[&blog]);
    let before = host.get(&blog, "/").generation();
    let pid = host.ps("blog")[0]["pid"].as_u64().unwrap();

    let said = host.ctl_ok(&["stop", "blog"]);

    assert!(said.starts_with("blog is stopped"), "{said}");
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "it waits until the instance is gone");
    assert_eq!(host.states("blog"), ["absent"]);
    assert!(host.get(&blog, "/").generation() > before);
    assert_eq!(
        json(&host.ctl_ok(&["stop", "blog", "--json"])),
        serde_json::json!({ "app": "blog", "done": "stopped" })
    );
    host.ctl_ok(&["stop", "blog"]);
    host.end();
}

#[test]
fn restart_replaces_the_instance_and_refuses_nobody() {
    let blog = Vhost::probe("blog").env("LISTEN_AFTER_MS", 200);
    let host = Host::up(&[&blog]);
    let first = host.get(&blog, "/").generation();

    let said = host.ctl_ok(&["restart", "blog"]);
    assert!(said.contains("the new instance first"), "{said}");
    let mut second = first;
    host.wait_for("the replacement", || {
        second = host.get(&blog, "/").expect_status(200).generation();
        second > first
    });
    host.wait_for("the old one to be gone", || host.states("blog") == ["ready"]);

    assert_eq!(
        json(&host.ctl_ok(&["restart", "blog", "--json"])),
        serde_json::json!({ "app": "blog", "done": "restarting" })
    );
    host.wait_for("the next", || host.get(&blog, "/").expect_status(200).generation() > second);
    host.end();
}

#[test]
fn logs_tell_both_streams_apart_and_outlive_the_instance() {
    let blog = Vhost::probe("blog");
    let host = Host::up(&[&blog]);
    let generation = host.get(&blog, "/").generation();
    for line in ["one", "two", "three"] {
        host.get(&blog, &format!("/log?line={line}")).expect_status(200);
    }
    host.wait_for("the output", || host.ctl_ok(&["logs", "blog"]).matches("three").count() == 2);
    host.ctl_ok(&["stop", "blog"]);

    let plain = host.ctl_ok(&["logs", "blog"]);
    for stream in ["stdout", "stderr"] {
        assert!(plain.lines().any(|line| line.contains(stream) && line.ends_with("  one")), "{plain}");
    }
    assert_eq!(host.ctl_ok(&["logs", "blog", "-n", "2"]).lines().count(), 2);
    let lines: Vec<Value> = host.ctl_ok(&["logs", "blog", "--json"]).lines().map(json).collect();
    let two = |stream: &str| lines.iter().any(|line| line["stream"] == stream && line["line"] == "two");
    assert!(two("stdout") && two("stderr"), "{lines:?}");
    assert!(lines.iter().all(|line| line["generation"] == generation), "{lines:?}");
    host.end();
}

#[test]
fn events_are_told_once_and_can_be_followed() {
    let (blog, shop) = (Vhost::probe("blog"), Vhost::probe("shop"));
    let host = Host::up(&[&blog, &shop]);
    let mut follower = Command::new(program("fastcontainer"))
        .args(["events", "--follow", "--app", "blog", "--json", "--state"])
        .arg(&host.state)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    let applied = json(&lines.next().unwrap().unwrap());
    assert_eq!((&applied["app"], &applied["kind"]), (&"blog".into(), &"config-applied".into()));

    host.get(&shop, "/").expect_status(200);
    host.get(&blog, "/").expect_status(200);
    for kind in ["wake", "ready"] {
        let event = json(&lines.next().unwrap().unwrap());
        assert_eq!((&event["app"], &event["kind"]), (&"blog".into(), &kind.into()), "nobody else's: {event}");
    }
    follower.kill().unwrap();
    follower.wait().unwrap();

    let plain = host.ctl_ok(&["events", "--app", "blog"]);
    assert!(plain.lines().any(|line| line.contains("  ready  ") && line.contains("blog.")), "{plain}");
    let last = host.events("blog").last().unwrap()["seq"].as_u64().unwrap();
    assert_eq!(host.ctl_ok(&["events", "--app", "blog", "--since", &last.to_string()]), "");
    host.ctl_ok(&["stop", "blog"]);
    let later = host.ctl_ok(&["events", "--app", "blog", "--since", &last.to_string(), "--json"]);
    assert!(later.lines().all(|line| json(line)["seq"].as_u64().unwrap() > last) && !later.is_empty());
    host.end();
}

#[test]
fn a_failed_wake_says_why_and_the_exit_code_says_that() {
    let blog = Vhost::probe("blog").env("EXIT_AFTER_MS", 50).env("EXIT_CODE", 3);
    let host = Host::up(&[&blog]);

    let woken = host.ctl(&["wake", "blog"]);

    assert_eq!(woken.status.code(), Some(1));
    let said = String::from_utf8_lossy(&woken.stderr).into_owned();
    assert!(said.contains("exited with status 3"), "{said}");
    assert!(woken.stdout.is_empty(), "what scripts read is no place for complaints");
    let again = host.ctl(&["wake", "blog"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("try again in "), "{again:?}");
    host.end();
}

#[test]
fn every_command_says_when_nothing_runs() {
    let empty = tempfile::tempdir().unwrap();
    for arguments in [
        &["ps"][..],
        &["events"],
        &["logs", "blog"],
        &["wake", "blog"],
        &["stop", "blog"],
        &["restart", "blog"],
        &["why", "x"],
    ] {
        let output = Command::new(program("fastcontainer"))
            .args(arguments)
            .arg("--state")
            .arg(empty.path())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(3), "{arguments:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("`fastcontainer up` running"), "{arguments:?}: {said}");
    }
}
