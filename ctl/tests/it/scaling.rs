//! Apps that become slow: what is done about it, and what is not.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    host::Host,
    http::{Connection, get},
    vhost::Vhost,
};

/// Clients that ask for one path over and over, each on a connection of its own.
pub(crate) struct Load {
    goes_on: Arc<AtomicBool>,
    failed: Arc<AtomicU32>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    pub(crate) fn begin(host: &Host, vhost: &Vhost, path: &str, clients: usize) -> Self {
        let goes_on = Arc::new(AtomicBool::new(true));
        let failed = Arc::new(AtomicU32::new(0));
        let client = |_| {
            let (goes_on, failed) = (Arc::clone(&goes_on), Arc::clone(&failed));
            let (port, name, path) = (host.port, vhost.host(), path.to_owned());
            std::thread::spawn(move || {
                let mut connection = Connection::open(port);
                while goes_on.load(Relaxed) {
                    match connection.exchange(&get(&name, &path)) {
                        Ok(response) if response.status == 200 => {}
                        _ => {
                            failed.fetch_add(1, Relaxed);
                            // The host is gone: the story has failed, and says so itself.
                            let Ok(next) = Connection::try_open(port) else { return };
                            connection = next;
                        }
                    }
                }
            })
        };
        let clients = (0..clients).map(client).collect();
        Self { goes_on, failed, clients }
    }

    /// Ends it; every request must have been answered with 200.
    #[track_caller]
    pub(crate) fn end(mut self) {
        self.goes_on.store(false, Relaxed);
        self.clients.drain(..).for_each(|client| client.join().expect("a client"));
        assert_eq!(self.failed.load(Relaxed), 0, "requests failed");
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.goes_on.store(false, Relaxed);
    }
}

/// CPU quotas of a host's containers in thousandths of a core, as the kernel has them; `None`: unlimited.
pub(crate) fn quotas(host: &Host) -> BTreeMap<String, Option<u64>> {
    let parent = host.cgroup();
    let mut found = BTreeMap::new();
    let mut roots = vec![Path::new("/sys/fs/cgroup").to_owned()];
    roots.extend(fs::read_dir("/sys/fs/cgroup").expect("cgroups").flatten().map(|entry| entry.path()));
    for group in roots.iter().filter_map(|root| fs::read_dir(root.join(&parent)).ok()).flatten().flatten() {
        let read = |file| fs::read_to_string(group.path().join(file)).ok();
        let text = match (read("cpu.max"), read("cpu.cfs_quota_us"), read("cpu.cfs_period_us")) {
            (Some(text), _, _) => text,
            (None, Some(quota), Some(period)) => format!("{quota} {period}"),
            _ => continue,
        };
        let mut numbers = text.split_whitespace().map(str::parse::<u64>);
        let share = match (numbers.next(), numbers.next()) {
            (Some(Ok(quota)), Some(Ok(period))) => Some(quota * 1_000 / period),
            _ => None,
        };
        found.insert(group.file_name().to_string_lossy().into_owned(), share);
    }
    found
}

pub(crate) fn words(host: &Host, app: &str, kind: &str) -> Vec<String> {
    let events = host.events(app);
    let mine = events.iter().filter(|event| event["kind"] == kind);
    mine.map(|event| event["message"].as_str().unwrap_or_default().to_owned()).collect()
}

/// A probe that is slow when one in ten responses takes longer than 100 ms.
pub(crate) fn judged(name: &str) -> Vhost {
    Vhost::probe(name).with("scale", "response-time = \"100ms\"").with("scale", "cool-down = \"2s\"")
}

/// Looks again and again, for so long, that no more than `instances` run, none with more than `quota`.
#[track_caller]
fn stays_within(host: &Host, time: Duration, instances: usize, quota: u64) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        let now = quotas(host);
        assert!(now.len() <= instances, "{now:?}");
        assert!(now.values().flatten().all(|share| *share <= quota), "{now:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_quota_that_is_too_small_is_raised_for_the_same_process_and_lowered_after_calm() {
    let blog = judged("blog").with("resources", "cpu = \"20%\"").with("resources", "cpu-max = \"60%\"");
    let host = Host::up(&[&blog]);
    host.get(&blog, "/").expect_status(200);
    host.wait_for("the quota of the file", || quotas(&host).values().eq([&Some(200)]));
    let pid = host.ps("blog")[0]["pid"].clone();

    let load = Load::begin(&host, &blog, "/work?ms=10", 8);
    host.wait_for("the quota to be raised", || quotas(&host).values().eq([&Some(600)]));
    assert_eq!(host.ps("blog")[0]["pid"], pid, "the same process");
    let up = words(&host, "blog", "scale-up");
    assert!(up[0].contains("its CPU quota of 20% is the cause; the quota is raised to 60%"), "{up:?}");
    stays_within(&host, Duration::from_secs(3), 1, 600);
    host.wait_for("the verdict", || host.count("blog", "verdict") == 1);
    assert!(words(&host, "blog", "verdict")[0].contains("helped"), "{:?}", words(&host, "blog", "verdict"));
    load.end();

    host.wait_for("the quota of the file", || quotas(&host).values().eq([&Some(200)]));
    assert_eq!(host.ps("blog")[0]["pid"], pid, "the same process");
    assert_eq!((host.count("blog", "scale-up"), host.count("blog", "scale-down")), (1, 1));
    assert_eq!(host.count("blog", "scale-out"), 0);
    host.end();
}

#[test]
fn at_its_ceiling_an_app_gets_another_instance_and_gives_it_back_after_calm() {
    let blog = judged("blog").with("resources", "cpu = \"20%\"").with("scale", "max = 2");
    let host = Host::up(&[&blog]);
    host.get(&blog, "/").expect_status(200);

    let load = Load::begin(&host, &blog, "/work?ms=10", 8);
    host.wait_for("a second instance", || host.states("blog") == ["ready", "ready"]);
    let out = words(&host, "blog", "scale-out");
    assert!(out[0].contains("its CPU quota of 20% is the cause"), "{out:?}");
    assert!(out[0].ends_with("an instance is added"), "{out:?}");
    host.wait_for("the verdict", || host.count("blog", "verdict") == 1);
    stays_within(&host, Duration::from_secs(2), 2, 200);
    load.end();

    host.wait_for("the second instance's end", || host.states("blog") == ["ready"]);
    assert_eq!((host.count("blog", "scale-out"), host.count("blog", "scale-in")), (1, 1));
    host.end();
}

#[test]
fn a_slow_database_gets_no_container_and_the_reason_is_told() {
    let blog = judged("blog")
        .with("resources", "cpu = \"50%\"")
        .with("resources", "cpu-max = \"100%\"")
        .with("scale", "max = 4");
    let host = Host::up(&[&blog]);
    host.get(&blog, "/").expect_status(200);

    let load = Load::begin(&host, &blog, "/sleep?ms=250", 10);
    host.wait_for("the finding", || host.count("blog", "scale-none") == 1);
    let said = words(&host, "blog", "scale-none");
    assert!(said[0].ends_with("nothing to do here: the time is spent elsewhere"), "{said:?}");
    stays_within(&host, Duration::from_secs(3), 1, 500);
    load.end();

    for kind in ["scale-up", "scale-out"] {
        assert_eq!(host.count("blog", kind), 0, "{kind}");
    }
    assert_eq!(host.count("blog", "scale-none"), 1, "it is said once");
    host.end();
}

#[test]
fn a_step_that_did_not_help_is_undone_and_not_repeated() {
    let blog = judged("blog").with("resources", "cpu = \"20%\"").with("resources", "cpu-max = \"50%\"");
    let host = Host::up(&[&blog]);
    host.get(&blog, "/").expect_status(200);

    // Slow for another reason, and beside it something that takes all the CPU that it gets.
    let load = Load::begin(&host, &blog, "/sleep?ms=250", 10);
    host.wait_for("the finding", || host.count("blog", "scale-none") == 1);
    std::thread::sleep(Duration::from_secs(1));
    let mut hog = Connection::open(host.port);
    hog.send(&get(&blog.host(), "/spin?ms=12000"));
    host.wait_for("the quota to be raised", || host.count("blog", "scale-up") == 1);
    host.wait_for("the verdict", || host.count("blog", "verdict") == 1);

    let verdict = words(&host, "blog", "verdict");
    assert!(verdict[0].contains("did not help") && verdict[0].ends_with("it is undone"), "{verdict:?}");
    stays_within(&host, Duration::from_secs(4), 1, 200);
    assert_eq!(host.count("blog", "scale-up"), 1, "not once more for the same load");
    load.end();
    hog.leave();
    host.end();
}

#[test]
fn requests_held_at_the_concurrency_limit_get_another_instance() {
    let blog = judged("blog").with("scale", "concurrency = 2").with("scale", "max = 2");
    let host = Host::up(&[&blog]);
    host.get(&blog, "/").expect_status(200);

    let load = Load::begin(&host, &blog, "/sleep?ms=50", 6);
    host.wait_for("a second instance", || host.states("blog") == ["ready", "ready"]);
    let out = words(&host, "blog", "scale-out");
    assert!(out[0].contains("its instances have no worker free; an instance is added"), "{out:?}");
    host.wait_for("the verdict", || host.count("blog", "verdict") == 1);
    assert!(words(&host, "blog", "verdict")[0].contains(" helped"), "{:?}", words(&host, "blog", "verdict"));
    load.end();
    host.end();
}
