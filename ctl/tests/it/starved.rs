//! The host itself is in need: disk full, descriptors used up, a process that cannot be killed, a launcher that hangs.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    host::Host,
    http::get,
    vhost::{Vhost, images},
};

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Tells a story in a mount namespace of its own: what it mounts, the machine does not see.
fn apart(story: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let told = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).expect("run the tests as root");
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
            story();
        });
        if let Err(panic) = told.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn signal(host: &Host, signal: Signal) {
    kill(Pid::from_raw(host.pid_of("fastcontainer-launcher")), signal).unwrap();
}

#[test]
fn a_launcher_that_hangs_holds_up_cold_apps_only_and_goes_on_where_it_was() {
    let (warm, cold) = (Vhost::probe("warm"), Vhost::probe("cold"));
    let host = Host::up(&[&warm, &cold]);
    let generation = host.get(&warm, "/").generation();

    signal(&host, Signal::SIGSTOP);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| host.get(&cold, "/").status);
        // Over connections that are open, and the few sockets that the proxy has in stock.
        for _ in 0..8 {
            assert_eq!(host.get(&warm, "/").expect_status(200).generation(), generation);
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(!waits.is_finished(), "it is held, not refused");
        signal(&host, Signal::SIGCONT);
        assert_eq!(waits.join().unwrap(), 200);
    });
    assert_eq!(host.get(&warm, "/").generation(), generation);
    host.end();
}

#[test]
fn a_launcher_that_hangs_for_good_is_replaced_and_its_apps_go_on() {
    let (warm, cold) = (Vhost::probe("warm"), Vhost::probe("cold"));
    let host = Host::up(&[&warm, &cold]);
    let generation = host.get(&warm, "/").generation();
    let hangs = host.pid_of("fastcontainer-launcher");

    signal(&host, Signal::SIGSTOP);
    for _ in 0..4 {
        assert_eq!(host.get(&warm, "/").expect_status(200).generation(), generation);
    }
    host.wait_for("another launcher", || {
        host.find_pid_of("fastcontainer-launcher").is_some_and(|pid| pid != hangs)
    });

    assert!(host.log().contains("has not answered for"), "{}", host.log_tail());
    host.wait_for("the cold app", || host.get(&cold, "/").status == 200);
    assert_eq!(host.get(&warm, "/").expect_status(200).generation(), generation);
    host.end();
}

#[test]
fn a_launcher_without_descriptors_says_so_and_recovers() {
    let (warm, cold) = (Vhost::probe("warm"), Vhost::probe("cold"));
    let host = Host::up(&[&warm, &cold]);
    let generation = host.get(&warm, "/").generation();
    let launcher = host.pid_of("fastcontainer-launcher");
    let limit = |most: &str| run("prlimit", &["--pid", &launcher.to_string(), &format!("--nofile={most}:")]);
    let limits = fs::read_to_string(format!("/proc/{launcher}/limits")).unwrap();
    let before = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let before = before.split_whitespace().next().unwrap().to_owned();
    // Whatever opens a descriptor from now on is refused.
    limit("8");

    let answer = host.get(&cold, "/");
    assert!([502, 503, 504].contains(&answer.status), "{}", answer.status);
    for _ in 0..20 {
        assert_eq!(host.get(&warm, "/").expect_status(200).generation(), generation);
    }
    assert_eq!(host.pid_of("fastcontainer-launcher"), launcher, "it has not died of it");

    limit(&before);
    host.wait_for("the cold app", || host.get(&cold, "/").status == 200);
    let events = host.events("cold");
    let told = |event: &serde_json::Value| event["message"].as_str().unwrap().contains("Too many open files");
    assert!(events.iter().any(told), "{events:#?}");
    host.end();
}

#[test]
fn a_launcher_whose_disk_is_full_goes_on_and_loses_nothing() {
    apart(|| {
        let (warm, cold) = (Vhost::probe("warm"), Vhost::probe("cold"));
        let files: Vec<_> =
            [&warm, &cold].map(|vhost| (format!("{}.toml", vhost.name()), vhost.text().into_bytes())).into();
        let host = Host::up_after(&files, &[], |folder| {
            let state = folder.join("s");
            fs::create_dir(&state).unwrap();
            let kind = Some("tmpfs");
            mount(kind, &state, kind, MsFlags::empty(), Some("size=64m,mode=755")).unwrap();
        });
        let generation = host.get(&warm, "/").generation();

        let filler = host.state.join("filler");
        // Until the kernel refuses.
        let _ = Command::new("dd")
            .arg("if=/dev/zero")
            .arg(format!("of={}", filler.display()))
            .arg("bs=64k")
            .output();
        assert!(fs::metadata(&filler).unwrap().len() > 1 << 20);
        let answer = host.get(&cold, "/");
        assert!([200, 502, 503, 504].contains(&answer.status), "{}", answer.status);
        for _ in 0..20 {
            assert_eq!(host.get(&warm, "/").expect_status(200).generation(), generation);
        }

        fs::remove_file(&filler).unwrap();
        host.wait_for("the cold app", || host.get(&cold, "/").status == 200);
        assert!(host.get(&cold, "/").generation() > generation);
        assert_eq!(host.get(&warm, "/").generation(), generation, "the warm one has gone on all the time");
        host.wait_for("what was used to be written down", || host.ctl_ok(&["usage"]).contains("warm"));
        // What is mounted there is this story's own.
        let state = host.state.clone();
        drop(host);
        umount2(&state, MntFlags::MNT_DETACH).unwrap();
    });
}

#[test]
fn a_process_that_cannot_be_killed_holds_up_nobody_else() {
    apart(|| {
        let folder = tempfile::Builder::new().prefix("fcpool").tempdir_in("/tmp").unwrap();
        let (disk, pool) = (folder.path().join("disk"), folder.path().join("pool"));
        fs::File::create(&disk).unwrap().set_len(16 << 20).unwrap();
        fs::create_dir(&pool).unwrap();
        run("mkfs.ext4", &["-q", &disk.to_string_lossy()]);
        run("mount", &["-o", "loop", &disk.to_string_lossy(), &pool.to_string_lossy()]);
        fill(&pool.join("stuck"));
        let text = format!(
            "server-name = [\"stuck.test\"]\n[container]\nimage = \"dir:{}/phpinfo\"\n\
             command = [\"/bin/sh\", \"-c\", \"while :; do echo x > /data/x; sleep 0.01; done & exec /data/probe\"]\n\
             port = 8080\n[lifecycle]\nstop-timeout = \"500ms\"\n\
             [[volume]]\nsource = \"stuck\"\ntarget = \"/data\"\n",
            images().display()
        );
        let fine = Vhost::probe("fine");
        let files =
            [("stuck.toml".into(), text.into_bytes()), ("fine.toml".into(), fine.text().into_bytes())];
        let host = Host::up_after(&files, &["--datapool", &pool.to_string_lossy()], |_| {});
        host.ask(&get("stuck.test", "/")).unwrap().expect_status(200);
        let group = host.ps("stuck")[0]["pid"].as_i64().unwrap();

        run("fsfreeze", &["-f", &pool.to_string_lossy()]);
        // Its writer waits in the kernel from now on, and nothing ends that wait.
        let thaw = Thaw(&pool);
        host.wait_for("a process to be stuck", || in_state_d(group));
        std::thread::scope(|scope| {
            let stop = scope.spawn(|| host.ctl(&["stop", "stuck"]));
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(3) {
                host.get(&fine, "/").expect_status(200);
                host.ctl_ok(&["stop", "fine"]);
            }
            assert!(!stop.is_finished(), "it has not ended");
            // A visitor does not wait for its end.
            host.ask(&get("stuck.test", "/")).unwrap().expect_status(200);
            host.wait_for("the operator to be told", || host.count("stuck", "does-not-end") > 0);
            let events = host.events("stuck");
            let told = events.iter().find(|event| event["kind"] == "does-not-end").unwrap();
            assert!(told["message"].as_str().unwrap().contains("(sh) waits in the kernel"), "{told}");
            drop(thaw);
            assert!(stop.join().unwrap().status.success());
        });
        host.ask(&get("stuck.test", "/")).unwrap().expect_status(200);
        host.end();
        umount2(&pool, MntFlags::empty()).unwrap();
    });
}

struct Thaw<'a>(&'a Path);

impl Drop for Thaw<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(self.0).status();
    }
}

fn fill(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    fs::copy(images().join("probe/probe"), folder.join("probe")).unwrap();
}

/// Whether a child of that process waits uninterruptibly.
fn in_state_d(pid: i64) -> bool {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().any(|child| {
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('D'))
    })
}
