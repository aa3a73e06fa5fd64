//! Control groups on the real kernel, as root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail anywhere")]

use std::process::{Child, Command};
use std::time::{Duration, Instant};

use launcher::cgroup::{CgroupError, Cgroups, CpuQuota, Group, Limits};
use launcher::sandbox::ContainerId;

fn id(app: &str) -> ContainerId {
    ContainerId { app: app.to_owned(), generation: 7 }
}

fn cgroups(test: &str) -> Cgroups {
    Cgroups::detect(&format!("fc-test-{}-{test}", std::process::id())).expect("run as root")
}

/// Runs a shell command whose shell joins the group by itself first, as the launcher's children do.
fn run_in(group: &Group, script: &str) -> Child {
    let mut joins = String::new();
    for directory in group.directories() {
        joins.push_str(&format!("echo 0 > {}/cgroup.procs; ", directory.display()));
    }
    Command::new("sh").args(["-c", &format!("{joins} {script}")]).spawn().unwrap()
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(10), "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_group_is_made_limited_read_and_removed() {
    let cgroups = cgroups("life");
    let limits = Limits { memory: Some(64 << 20), pids: Some(20) };

    let group = cgroups.create(&id("shop"), &limits).unwrap();
    assert_eq!(cgroups.leftovers(), ["shop.7"]);
    assert_eq!(group.memory().unwrap().limit, Some(64 << 20));
    assert_eq!(group.memory().unwrap().oom_kills, 0);
    assert!(!group.populated().unwrap());
    assert!(
        matches!(cgroups.create(&id("shop"), &limits), Err(CgroupError::Io { .. })),
        "a name is used once"
    );

    for quota in [300, 600, 50, 3000, 300, 400] {
        group.set_cpu(CpuQuota::from_millicores(quota)).unwrap();
    }
    group.set_cpu(CpuQuota::Unlimited).unwrap();
    group.set_memory(32 << 20).unwrap();
    group.set_memory(128 << 20).unwrap();
    assert_eq!(group.memory().unwrap().limit, Some(128 << 20));
    group.set_pids(5).unwrap();

    group.remove().await.unwrap();
    assert!(cgroups.leftovers().is_empty());
    cgroups.remove_parent().await.unwrap();
}

#[tokio::test]
async fn a_quota_throttles_and_the_meters_show_it() {
    let cgroups = cgroups("cpu");
    let group = cgroups.create(&id("busy"), &Limits::default()).unwrap();
    group.set_cpu(CpuQuota::from_millicores(200)).unwrap();

    let mut child = run_in(&group, "while :; do :; done");
    // The time is counted when a pause is over, the period when it begins.
    until("throttled", || {
        let stat = group.cpu_stat().unwrap();
        stat.nr_throttled >= 5 && stat.throttled_us > 0
    })
    .await;
    let stat = group.cpu_stat().unwrap();
    assert!(stat.usage_us > 0 && stat.nr_periods >= stat.nr_throttled, "{stat:?}");
    assert!(group.pids_current().unwrap() >= 1 && group.populated().unwrap());

    group.kill().unwrap();
    child.wait().unwrap();
    group.remove().await.unwrap();
    cgroups.remove_parent().await.unwrap();
}

#[tokio::test]
async fn a_frozen_group_stands_still_and_can_be_thawed_and_killed() {
    let cgroups = cgroups("freeze");
    let group = cgroups.create(&id("ice"), &Limits::default()).unwrap();
    let mut child = run_in(&group, "while :; do :; done");
    until("runs", || group.cpu_stat().unwrap().usage_us > 10_000).await;

    group.freeze().unwrap();
    until("frozen", || group.is_frozen().unwrap()).await;
    let before = group.cpu_stat().unwrap().usage_us;
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert_eq!(group.cpu_stat().unwrap().usage_us, before);

    group.thaw().unwrap();
    until("thawed", || group.cpu_stat().unwrap().usage_us > before).await;
    group.freeze().unwrap();
    group.kill().unwrap();
    child.wait().unwrap();
    group.remove().await.unwrap();
    cgroups.remove_parent().await.unwrap();
}

#[tokio::test]
async fn a_memory_hog_is_killed_by_its_own_limit_and_that_is_told_apart_from_a_crash() {
    let cgroups = cgroups("oom");
    let group = cgroups.create(&id("hog"), &Limits { memory: Some(24 << 20), pids: None }).unwrap();

    let mut child = run_in(&group, "exec tail /dev/zero");
    let status = child.wait().unwrap();
    assert!(!status.success());
    until("counted", || group.memory().unwrap().oom_kills >= 1).await;

    group.remove().await.unwrap();
    cgroups.remove_parent().await.unwrap();
}

#[tokio::test]
async fn a_fork_bomb_ends_at_the_limit_of_tasks() {
    let cgroups = cgroups("fork");
    let group = cgroups.create(&id("bomb"), &Limits { memory: None, pids: Some(10) }).unwrap();

    let mut child = run_in(&group, "for i in $(seq 40); do sleep 60 & done 2>/dev/null; sleep 60");
    until("refused", || group.pids_refused().unwrap() >= 1).await;
    assert!(group.pids_current().unwrap() <= 10);

    group.kill().unwrap();
    child.wait().unwrap();
    group.remove().await.unwrap();
    cgroups.remove_parent().await.unwrap();
}

#[tokio::test]
async fn a_fresh_start_sweeps_what_an_earlier_life_left() {
    let name = format!("fc-test-{}-sweep", std::process::id());
    let earlier = Cgroups::detect(&name).unwrap();
    let running = earlier.create(&id("left"), &Limits::default()).unwrap();
    let mut child = run_in(&running, "sleep 60 & sleep 60");
    until("populated", || running.populated().unwrap()).await;
    let half = earlier.create(&id("half"), &Limits::default()).unwrap();
    // With cgroup v2 only there is one directory, and so no half.
    let hierarchies = half.directories().len();
    if hierarchies > 1 {
        std::fs::remove_dir(half.directories()[0]).unwrap();
    }
    drop((running, half, earlier));

    let now = Cgroups::detect(&name).unwrap();
    assert_eq!(now.leftovers(), ["half.7", "left.7"]);
    let reaper = std::thread::spawn(move || child.wait().unwrap());
    let swept = now.sweep(&[]).await;
    reaper.join().unwrap();

    assert!(swept.removed >= 1 && swept.stuck.is_empty(), "{swept:?}");
    assert!(now.leftovers().is_empty());
    now.remove_parent().await.unwrap();
}

#[test]
fn a_name_that_leads_elsewhere_is_refused() {
    for name in ["", "..", "a/../b", "/abs", "a//b", "a\nb"] {
        assert!(matches!(Cgroups::detect(name), Err(CgroupError::Name(_))), "{name:?}");
    }
}
