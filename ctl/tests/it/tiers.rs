//! Sleep in tiers: what idle apps hold is taken back, by itself and when the host's memory gets short.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde_json::Value;

use crate::{
    host::Host,
    http::{Connection, get},
    vhost::Vhost,
};

/// The kernel's account of memory as the launcher is to see it: the real one cannot be made short without making the whole
/// machine short. Moved into place, so that no reader sees half of it.
fn tell_memory(file: &Path, available_mib: u64) {
    let text = format!("MemTotal: 8388608 kB\nMemAvailable: {} kB\nSwapFree: 0 kB\n", available_mib << 10);
    let new = file.with_extension("new");
    fs::write(&new, text).expect("write the account");
    fs::rename(&new, file).expect("put it in place");
}

/// A host that keeps 1 GiB available, and the file from which it takes what is available.
fn host_with_memory(vhosts: &[&Vhost], available_mib: u64) -> (Host, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let meminfo = folder.path().join("meminfo");
    tell_memory(&meminfo, available_mib);
    let files: Vec<_> =
        vhosts.iter().map(|v| (format!("{}.toml", v.name()), v.text().into_bytes())).collect();
    let arguments = ["--memory-low", "1GiB", "--meminfo", meminfo.to_str().expect("UTF-8")];
    (Host::up_after(&files, &arguments, |_| {}), folder)
}

fn is_reclaimed(host: &Host, app: &str) -> bool {
    let line = &host.ps(app)[0];
    line["state"] == "frozen" && line["reclaimed"] == true
}

/// Where in the host's history the app's event of that kind is.
fn seq(host: &Host, app: &str, kind: &str) -> u64 {
    let event = host.events(app).into_iter().find(|event| event["kind"] == kind);
    event.as_ref().and_then(|event| event["seq"].as_u64()).unwrap_or_else(|| panic!("{app} has no {kind}"))
}

#[test]
fn what_a_sleeping_app_holds_is_taken_back_and_the_same_process_answers_afterwards() {
    let blog = Vhost::probe("blog").with("lifecycle", "freeze-after = \"300ms\"\nreclaim-after = \"600ms\"");
    let host = Host::up(&[&blog]);
    let mut visitor = Connection::open(host.port);
    let mut ask =
        || visitor.exchange(&get(&blog.host(), "/")).expect("an answer").expect_status(200).generation();
    let before = ask();
    let held = host.ps("blog")[0]["memory_bytes"].as_u64().expect("memory");

    host.wait_for("its memory to be reclaimed", || is_reclaimed(&host, "blog"));
    assert!(host.ctl_ok(&["ps", "blog"]).contains("frozen, reclaimed"));
    assert!(host.ps("blog")[0]["memory_bytes"].as_u64().expect("memory") <= held);
    let told = host.events("blog").into_iter().find(|event| event["kind"] == "reclaimed").expect("an event");
    let words = told["message"].as_str().expect("words");
    assert!(words.contains("idle for") && words.contains("given back"), "{words}");

    assert_eq!(ask(), before);
    assert!(!is_reclaimed(&host, "blog"));

    // The next daemon thaws it, as it thaws every one, and it goes to sleep anew.
    host.wait_for("its memory to be reclaimed again", || is_reclaimed(&host, "blog"));
    let launcher = nix::unistd::Pid::from_raw(host.pid_of("fastcontainer-launcher"));
    nix::sys::signal::kill(launcher, nix::sys::signal::Signal::SIGKILL).expect("kill -9");
    assert_eq!(ask(), before);
    host.wait_for("it to sleep again", || host.ctl(&["ps"]).status.success() && is_reclaimed(&host, "blog"));
    host.end();
}

#[test]
fn when_memory_gets_short_the_coldest_give_theirs_up_and_who_is_served_keeps_it() {
    let (cold, warm, busy) = (Vhost::probe("cold"), Vhost::probe("warm"), Vhost::probe("busy"));
    let kept = Vhost::probe("kept").with("scale", "min = 1");
    let (host, memory) = host_with_memory(&[&cold, &warm, &busy, &kept], 4_096);
    host.get(&cold, "/").expect_status(200);
    host.wait_for("a while to pass", || {
        host.ps("cold")[0]["idle_ms"].as_u64().is_some_and(|idle| idle > 3_000)
    });
    host.get(&warm, "/").expect_status(200);
    let (port, name, ends) = (host.port, busy.host(), Arc::new(AtomicBool::new(false)));
    let stop = Arc::clone(&ends);
    let visitor = std::thread::spawn(move || {
        let mut connection = Connection::open(port);
        while !stop.load(Ordering::Relaxed) {
            let response = connection.exchange(&get(&name, "/sleep?ms=500")).expect("an answer");
            response.expect_status(200);
        }
    });
    host.wait_for("the request to be under way", || host.ps("busy")[0]["in_flight"] == 1);

    tell_memory(&memory.path().join("meminfo"), 512);
    for app in ["cold", "warm"] {
        host.wait_for("it to be stopped", || host.states(app) == ["absent"]);
        // By one tier after the other.
        let steps =
            ["descent", "frozen", "reclaimed", "draining", "stopped"].map(|kind| seq(&host, app, kind));
        assert!(steps.is_sorted(), "{app}: {steps:?}");
    }
    assert!(seq(&host, "cold", "descent") < seq(&host, "warm", "descent"), "the coldest goes first");
    host.wait_for("the app with a minimum to sleep as deeply as it may", || is_reclaimed(&host, "kept"));
    let drained =
        host.events("cold").into_iter().find(|event| event["kind"] == "draining").expect("an event");
    assert!(
        drained["message"].as_str().is_some_and(|words| words.contains("memory is short (512 MiB available"))
    );
    assert_eq!(host.events_of_host("memory-relieved"), 0);

    tell_memory(&memory.path().join("meminfo"), 4_096);
    host.wait_for("relief to be told", || host.events_of_host("memory-relieved") == 1);
    assert_eq!(host.count("busy", "frozen"), 0, "it had requests all the time");
    ends.store(true, Ordering::Relaxed);
    visitor.join().expect("every request of the busy app is answered");
    for (vhost, wakes) in [(&cold, 2), (&kept, 1)] {
        host.get(vhost, "/").expect_status(200);
        assert_eq!(host.count(vhost.name(), "wake"), wakes, "{}", vhost.name());
    }
    assert!(host.events("kept").iter().all(|event: &Value| event["kind"] != "draining"));
    host.end();
}
