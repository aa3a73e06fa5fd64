//! What apps have used is counted, agrees with the kernel, and outlives the launcher.

use std::time::Duration;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{host::Host, http::post, vhost::Vhost};

/// CPU time of everything that is and was in this host's containers, as the kernel counts it, µs.
fn kernel_cpu_us(host: &Host) -> u64 {
    let parent = host.cgroup();
    let read = |path: String| std::fs::read_to_string(path).ok();
    if let Some(text) = read(format!("/sys/fs/cgroup/cpuacct/{parent}/cpuacct.usage")) {
        return text.trim().parse::<u64>().expect("nanoseconds") / 1000;
    }
    let stat = ["unified/", ""].iter().find_map(|v| read(format!("/sys/fs/cgroup/{v}{parent}/cpu.stat")));
    let stat = stat.expect("cpu.stat");
    let usage = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")).expect("usage_usec");
    usage.parse().expect("a number")
}

/// The lines of `usage`: of the apps, and the kernel's.
fn usage(host: &Host, arguments: &[&str]) -> Vec<Value> {
    let text = host.ctl_ok(&[&["usage", "--json"], arguments].concat());
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

fn sum(lines: &[Value], app: Option<&str>, figure: &str) -> u64 {
    let of_app = lines.iter().filter(|line| match app {
        Some(app) => line["app"] == app,
        None => !line["app"].is_null(),
    });
    of_app.map(|line| line[figure].as_u64().unwrap_or_else(|| panic!("{figure} in {line}"))).sum()
}

/// The apps' sum is within 1 % of what the kernel counted while `usage` was at work.
#[track_caller]
pub(crate) fn assert_conserved(host: &Host) {
    let before = kernel_cpu_us(host);
    let lines = usage(host, &[]);
    let after = kernel_cpu_us(host);
    let counted = sum(&lines, None, "cpu_us");
    assert!(
        counted >= before - before / 100 && counted <= after + after / 100,
        "{counted} µs are counted, the kernel says {before} to {after}: {lines:?}"
    );
}

#[test]
fn what_apps_use_is_counted_to_the_last_request_and_agrees_with_the_kernel() {
    let (blog, shop) = (Vhost::probe("blog"), Vhost::probe("shop"));
    let broken = Vhost::probe("broken").env("EXIT_AFTER_MS", 30).env("EXIT_CODE", 1);
    let host = Host::up(&[&blog, &shop, &broken]);

    let mut bytes = 0;
    for _ in 0..10 {
        bytes += host.get(&blog, "/work?ms=60").expect_status(200).body.len();
    }
    host.ask(&post(&blog.host(), "/upload", vec![b'x'; 100_000])).expect("an answer").expect_status(200);
    host.get(&shop, "/work?ms=200").expect_status(200);
    host.ctl_ok(&["stop", "shop"]);
    assert_eq!(host.get(&broken, "/").status, 502);
    host.get(&shop, "/blob?kib=64").expect_status(200);

    host.wait_for("the proxy's report", || sum(&usage(&host, &[]), None, "requests") == 14);
    let lines = usage(&host, &[]);
    assert_eq!(sum(&lines, Some("blog"), "requests"), 11);
    assert_eq!(sum(&lines, Some("blog"), "bytes_in"), 100_000);
    assert!(sum(&lines, Some("blog"), "bytes_out") > bytes as u64);
    assert!(sum(&lines, Some("shop"), "bytes_out") > 64 << 10);
    assert_eq!(sum(&lines, Some("shop"), "wakes"), 2, "it was stopped and woken again");
    assert!(sum(&lines, Some("broken"), "wakes") >= 1, "failed starts cost too");
    assert!(sum(&lines, Some("broken"), "cpu_us") > 0);
    assert!(sum(&lines, Some("blog"), "cpu_us") >= 600_000, "{lines:?}");
    assert!(sum(&lines, Some("shop"), "cpu_us") >= 200_000, "{lines:?}");
    assert!(sum(&lines, Some("blog"), "held_us") > 0);
    let (memory, running) =
        (sum(&lines, Some("blog"), "memory_byte_s"), sum(&lines, Some("blog"), "running_us"));
    let mean = u128::from(memory) * 1_000_000 / u128::from(running);
    assert!((100 << 10..64 << 20).contains(&mean), "{mean} bytes on average");
    assert_conserved(&host);

    let people = host.ctl_ok(&["usage", "--by", "hour"]);
    assert!(people.contains("HOUR (UTC)") && people.contains("blog") && people.contains("(all)"), "{people}");
    let csv = host.ctl_ok(&["usage", "blog", "--csv", "--by", "day"]);
    assert!(csv.starts_with("from_utc,app,cpu_us,"), "{csv}");
    assert!(csv.lines().count() >= 2 && !csv.contains("shop"), "{csv}");
    let refused = host.ctl(&["usage", "--since", "yesterday"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("24h"), "{refused:?}");
    host.end();
}

#[test]
fn a_frozen_app_uses_time_but_no_cpu() {
    let blog = Vhost::probe("blog").with("lifecycle", "freeze-after = \"300ms\"");
    let host = Host::up(&[&blog]);
    host.get(&blog, "/").expect_status(200);
    host.wait_for("it to have slept for a while", || {
        sum(&usage(&host, &[]), Some("blog"), "frozen_us") > 500_000
    });
    let before = usage(&host, &[]);
    host.wait_for("it to have slept on", || {
        let now = usage(&host, &[]);
        sum(&now, Some("blog"), "frozen_us") > sum(&before, Some("blog"), "frozen_us") + 300_000
    });
    let after = usage(&host, &[]);
    let ran = sum(&after, Some("blog"), "running_us") - sum(&before, Some("blog"), "running_us");
    assert!(ran < 10_000, "the two clocks are read µs apart, no more: {ran}");
    assert_eq!(sum(&after, Some("blog"), "cpu_us"), sum(&before, Some("blog"), "cpu_us"));
    host.end();
}

#[test]
fn a_killed_launcher_costs_the_ledger_nothing() {
    let (blog, shop) = (Vhost::probe("blog"), Vhost::probe("shop"));
    let host = Host::up(&[&blog, &shop]);
    let mut requests = 0;
    for round in 1..=3u64 {
        for _ in 0..5 {
            host.get(&blog, "/work?ms=20").expect_status(200);
            host.get(&shop, "/work?ms=5").expect_status(200);
            requests += 2;
        }
        host.ctl_ok(&["stop", "shop"]);
        let before = usage(&host, &[]);
        host.get(&blog, "/work?ms=30").expect_status(200);
        requests += 1;

        let killed = host.pid_of("fastcontainer-launcher");
        kill(Pid::from_raw(killed), Signal::SIGKILL).expect("kill -9");
        // Served while no launcher counts.
        host.get(&blog, "/work?ms=40").expect_status(200);
        requests += 1;
        host.wait_for("another launcher", || {
            host.find_pid_of("fastcontainer-launcher").is_some_and(|pid| pid != killed)
                && host.ctl(&["ps"]).status.success()
                && host.states("blog") == ["ready"]
        });

        host.wait_for("every request to be counted", || {
            sum(&usage(&host, &[]), None, "requests") >= requests
        });
        let after = usage(&host, &[]);
        assert_eq!(sum(&after, None, "requests"), requests, "none twice");
        for figure in ["cpu_us", "memory_byte_s", "running_us"] {
            for app in ["blog", "shop"] {
                let (was, is) = (sum(&before, Some(app), figure), sum(&after, Some(app), figure));
                assert!(is >= was, "{app}'s {figure} was {was} and is {is}");
            }
        }
        assert_eq!(sum(&after, Some("blog"), "wakes"), 1);
        assert_eq!(sum(&after, Some("shop"), "wakes"), round);
        assert_conserved(&host);
    }
    host.end();
}

#[test]
fn what_ended_with_its_launcher_is_counted_by_the_next_one() {
    // `up` and all it started are killed in one moment: nobody but the cgroups knows what the app has used.
    let blog = Vhost::probe("blog");
    let mut host = Host::up(&[&blog]);
    host.get(&blog, "/work?ms=400").expect_status(200);
    for (pid, _) in crate::host::processes_with(&host.state.to_string_lossy()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let _ = host.wait();
    std::thread::sleep(Duration::from_millis(200));
    host.again();

    let lines = usage(&host, &[]);
    assert!(sum(&lines, Some("blog"), "cpu_us") >= 400_000, "{lines:?}");
    host.end();
}
