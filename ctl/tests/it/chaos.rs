//! The launcher is killed at random moments, again and again, under load. `FC_SEED` repeats a run (the seed is printed);
//! `FC_CHAOS=long` kills fifty times.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    host::{Host, processes_with, program},
    http::{Connection, get},
    vhost::Vhost,
};

/// Apps that serve all the time.
const WARM: usize = 20;
/// Apps that are woken and stopped all the time, so that a kill finds some on their way up or down.
const RESTLESS: usize = 4;

fn kill_nine(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("kill -9");
}

fn is_long() -> bool {
    std::env::var_os("FC_CHAOS").is_some()
}

/// A number for each step of a run that can be repeated (SplitMix64).
struct Random(u64);

impl Random {
    fn new() -> Self {
        let given = std::env::var("FC_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock");
            now.as_nanos() as u64
        });
        eprintln!("FC_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

/// Everything that a launcher could leave behind too much of, once it has come to rest.
#[derive(Debug, Eq, PartialEq)]
struct Belongings {
    spawner: i32,
    spawners_children: BTreeSet<i32>,
    spawners_descriptors: usize,
    launchers_descriptors: usize,
    cgroups: BTreeSet<String>,
    network_namespaces: usize,
    mounts: usize,
    files: BTreeSet<String>,
    instances: Vec<(String, String, i64)>,
}

impl Belongings {
    fn of(host: &Host, cgroup: &str) -> Self {
        let (launcher, spawner) = (host.pid_of("fastcontainer-launcher"), spawner_of(host));
        let children = children_of(spawner);
        let entries = |path: String| fs::read_dir(path).map_or(0, Iterator::count);
        let state = host.state.to_string_lossy().into_owned();
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        let networks: BTreeSet<_> =
            children.iter().filter_map(|pid| fs::read_link(format!("/proc/{pid}/ns/net")).ok()).collect();
        Self {
            spawner,
            spawners_descriptors: entries(format!("/proc/{spawner}/fd")),
            launchers_descriptors: entries(format!("/proc/{launcher}/fd")),
            cgroups: cgroups_of(cgroup),
            network_namespaces: networks.len(),
            mounts: mounts.lines().filter(|line| line.contains(&state)).count(),
            files: files_beneath(&host.state.join("launcher")),
            instances: instances(host),
            spawners_children: children,
        }
    }
}

/// The spawner may be the child of a launcher that has died, so it is found by its socket's place: it works for the
/// containers of this host.
fn spawner_of(host: &Host) -> i32 {
    let app = host.ps("warm0")[0]["pid"].as_i64().expect("a pid");
    let status = fs::read_to_string(format!("/proc/{app}/status")).expect("the app's status");
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    parent.expect("a parent").trim().parse().expect("a pid")
}

fn children_of(pid: i32) -> BTreeSet<i32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("children");
    children.split_whitespace().map(|pid| pid.parse().expect("a pid")).collect()
}

/// The names of this host's containers among the control groups, in whichever hierarchies they are.
fn cgroups_of(parent: &str) -> BTreeSet<String> {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(root).expect("cgroups").flatten().map(|entry| entry.path());
    let parents = hierarchies.chain([root.to_owned()]).map(|hierarchy| hierarchy.join(parent));
    let beneath = parents.filter_map(|parent| fs::read_dir(parent).ok()).flatten().flatten();
    beneath
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

fn files_beneath(folder: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        found.insert(entry.path().to_string_lossy().into_owned());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files_beneath(&entry.path()));
        }
    }
    found
}

/// App, state and pid of everything that runs.
fn instances(host: &Host) -> Vec<(String, String, i64)> {
    let text = host.ctl_ok(&["ps", "--json"]);
    let lines: Vec<serde_json::Value> = serde_json::from_str(&text).expect("JSON");
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    lines
        .iter()
        .filter(|line| line["state"] != "absent")
        .map(|line| (text(&line["app"]), text(&line["state"]), line["pid"].as_i64().unwrap_or(0)))
        .collect()
}

/// Every warm app is asked all the time, on connections that are kept; the first answer that is not 200 ends the test.
fn visit(host: &Arc<Host>, apps: &[Vhost], until: &Arc<AtomicBool>) -> Vec<JoinHandle<usize>> {
    let visitors = apps.chunks(apps.len() / 4).map(<[Vhost]>::to_vec);
    visitors
        .map(|apps| {
            let (port, until) = (host.port, Arc::clone(until));
            std::thread::spawn(move || {
                let mut connection = Connection::open(port);
                let mut visits = 0;
                while !until.load(Ordering::SeqCst) {
                    for app in &apps {
                        let answer = connection.exchange(&get(&app.host(), "/log?line=visit"));
                        let answer = answer.unwrap_or_else(|broken| panic!("{}: {broken}", app.name()));
                        assert_eq!(answer.status, 200, "{}: {}", app.name(), answer.text());
                        visits += 1;
                        std::thread::sleep(Duration::from_millis(2));
                    }
                }
                visits
            })
        })
        .collect()
}

/// Wakes and stops an app for ever. While there is no launcher the answer may be 503 with a time to come back.
fn unrest(host: &Arc<Host>, app: Vhost, until: &Arc<AtomicBool>, wakes: &Arc<AtomicUsize>) -> JoinHandle<()> {
    let (host, until, wakes) = (Arc::clone(host), Arc::clone(until), Arc::clone(wakes));
    std::thread::spawn(move || {
        while !until.load(Ordering::SeqCst) {
            let answer = Connection::open(host.port).exchange(&get(&app.host(), "/"));
            let answer = answer.unwrap_or_else(|broken| panic!("{}: {broken}", app.name()));
            match answer.status {
                200 => drop(wakes.fetch_add(1, Ordering::SeqCst)),
                503 if answer.retry_after().is_some() => std::thread::sleep(Duration::from_millis(50)),
                other => panic!("{}: {other} {}\n{}", app.name(), answer.text(), host.log_tail()),
            }
            let _ = host.ctl(&["stop", app.name()]); // there may be nobody to ask
        }
    })
}

#[test]
fn warm_apps_answer_everything_while_the_launcher_is_killed_at_random_moments() {
    let kills = if is_long() { 50 } else { 8 };
    let mut random = Random::new();
    let quiet = |vhost: Vhost| {
        vhost.with("lifecycle", "lifetime = \"1h\"").with("lifecycle", "idle-timeout = \"1h\"")
    };
    let warm: Vec<Vhost> = (0..WARM).map(|n| quiet(Vhost::probe(&format!("warm{n}")))).collect();
    let restless: Vec<Vhost> = (0..RESTLESS)
        .map(|n| quiet(Vhost::probe(&format!("restless{n}"))).env("LISTEN_AFTER_MS", n * 100))
        .collect();
    let all: Vec<&Vhost> = warm.iter().chain(&restless).collect();
    let host = Arc::new(Host::up(&all));
    let cgroup = host.cgroup();
    for app in &warm {
        host.get(app, "/").expect_status(200);
    }
    // One death and one life of each restless app before the first look: what comes with them is not a leak.
    for app in &restless {
        host.get(app, "/").expect_status(200);
        host.ctl_ok(&["stop", app.name()]);
    }
    next_launcher(&host, Duration::ZERO);
    let before = at_rest(&host, &cgroup);
    assert_eq!(before.instances.len(), WARM, "{before:#?}");
    assert_eq!((before.cgroups.len(), before.spawners_children.len()), (WARM, WARM), "{before:#?}");

    let until = Arc::new(AtomicBool::new(false));
    let wakes = Arc::new(AtomicUsize::new(0));
    let visitors = visit(&host, &warm, &until);
    let unrest: Vec<_> = restless.iter().map(|app| unrest(&host, app.clone(), &until, &wakes)).collect();
    for _ in 0..kills {
        next_launcher(&host, Duration::from_millis(random.below(1_500)));
        assert!(!visitors.iter().any(JoinHandle::is_finished), "a request failed; see above");
    }
    host.wait_for("all to be supervised", || {
        host.ctl(&["ps"]).status.success() && instances(&host).len() >= WARM
    });
    until.store(true, Ordering::SeqCst);
    let visits: usize = visitors.into_iter().map(|visitor| visitor.join().expect("no request failed")).sum();
    for app in unrest {
        app.join().expect("every wake was answered, or told when to come back");
    }

    eprintln!("{kills} kills, {visits} visits, {} wakes", wakes.load(Ordering::SeqCst));
    for app in &restless {
        host.ctl_ok(&["stop", app.name()]);
    }
    let after = at_rest(&host, &cgroup);
    assert_eq!(after, before, "the same instances, and nothing besides");
    for app in &restless {
        host.get(app, "/").expect_status(200);
    }
    Arc::into_inner(host).expect("the only owner").end();
}

#[test]
fn an_upgrade_of_the_launcher_fails_no_request_and_ends_no_app() {
    let programs =
        tempfile::tempdir_in(program("fastcontainer").parent().expect("a folder")).expect("a folder");
    for name in ["fastcontainer", "fastcontainer-launcher", "fastcontainer-coreapi", "fastcontainer-proxy"] {
        fs::hard_link(program(name), programs.path().join(name)).expect("a link to the program");
    }
    let warm: Vec<Vhost> = (0..4).map(|n| Vhost::probe(&format!("warm{n}"))).collect();
    let all: Vec<&Vhost> = warm.iter().collect();
    let host = Arc::new(Host::up_from(programs.path(), &all));
    for app in &warm {
        host.get(app, "/").expect_status(200);
    }
    let (before, launcher, spawner) =
        (instances(&host), host.pid_of("fastcontainer-launcher"), spawner_of(&host));
    let until = Arc::new(AtomicBool::new(false));
    let visitors = visit(&host, &warm, &until);

    for round in 1..=3 {
        // Another file of the same content: what a package manager does.
        let (old, new) = (programs.path().join("fastcontainer-launcher"), programs.path().join("new"));
        fs::copy(&old, &new).expect("a new program");
        fs::rename(&new, &old).expect("in the old one's place");
        let inode = |path: &str| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).expect(path));
        let exe = format!("/proc/{launcher}/exe");
        assert_ne!(inode(&exe), inode(&old.to_string_lossy()));

        kill(Pid::from_raw(launcher), Signal::SIGUSR2).expect("SIGUSR2");

        host.wait_for("the new program", || inode(&exe) == inode(&old.to_string_lossy()));
        host.wait_for("the apps to be supervised", || {
            host.ctl(&["ps"]).status.success() && instances(&host) == before
        });
        assert_eq!(host.pid_of("fastcontainer-launcher"), launcher, "round {round}: in the same process");
        assert_eq!(host.count("warm0", "adopted"), 1, "{:?}", host.events("warm0"));
    }
    until.store(true, Ordering::SeqCst);
    for visitor in visitors {
        assert!(visitor.join().expect("no request failed") > 0);
    }

    // The spawner was an earlier program's child and is this one's: it must be buried.
    kill_nine(spawner);
    host.wait_for("another spawner", || host.events_of_host("spawner-back") > 0);
    host.wait_for("the old one to be gone", || !Path::new(&format!("/proc/{spawner}")).exists());
    assert_eq!(instances(&host), before);
    Arc::into_inner(host).expect("the only owner").end();
}

/// Kills the launcher that runs, after a while, and waits for the next one's process; not for what it does.
fn next_launcher(host: &Host, life: Duration) {
    std::thread::sleep(life);
    let killed = host.pid_of("fastcontainer-launcher");
    kill_nine(killed);
    host.wait_for("another launcher", || {
        host.find_pid_of("fastcontainer-launcher").is_some_and(|pid| pid != killed)
    });
}

/// What there is when nothing changes any more.
fn at_rest(host: &Host, cgroup: &str) -> Belongings {
    host.wait_for("the launcher", || host.ctl(&["ps"]).status.success());
    host.wait_for("the warm apps to be supervised", || {
        let all = instances(host);
        all.len() == WARM && all.iter().all(|(_, state, _)| state == "ready")
    });
    let mut last = Belongings::of(host, cgroup);
    host.wait_for("rest", || {
        std::thread::sleep(Duration::from_millis(500));
        let now = Belongings::of(host, cgroup);
        let rests = now == last;
        last = now;
        rests
    });
    assert!(processes_with(&host.state.to_string_lossy()).len() >= 4);
    last
}
