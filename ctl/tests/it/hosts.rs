//! Several hosts that share a CMDB in Redis: who runs what, who takes over, and what happens when Redis is away.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::JoinHandle,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    cluster::{Cluster, nodes, ready_on},
    host::Host,
    http::{Connection, get},
    vhost::{Vhost, images},
};

/// Asks for each of these apps by way of this host, again and again, until it is told to end; the first answer that is not
/// 200 ends the test. How many there were.
fn visit(host: &Host, apps: &[Vhost], until: &Arc<AtomicBool>) -> JoinHandle<usize> {
    let (port, apps, until) = (host.port, apps.to_vec(), Arc::clone(until));
    std::thread::spawn(move || {
        let mut connection = Connection::open(port);
        let mut visits = 0;
        while !until.load(SeqCst) {
            for app in &apps {
                let answer = connection.exchange(&get(&app.host(), "/sleep?ms=5"));
                let answer = answer.unwrap_or_else(|broken| panic!("{}: {broken}", app.name()));
                assert_eq!(answer.status, 200, "{}: {}", app.name(), answer.text());
                visits += 1;
            }
        }
        visits
    })
}

#[test]
fn an_app_that_runs_on_one_host_is_not_started_on_another() {
    let blog = Vhost::probe("blog");
    let cluster = Cluster::up(2, &[&blog]);
    let (a, b) = (cluster.host("a"), cluster.host("b"));

    b.ctl_ok(&["wake", "blog"]);
    let refused = a.ctl(&["wake", "blog"]);

    assert!(String::from_utf8_lossy(&refused.stderr).contains("runs on b"), "{refused:?}");
    a.wait_for("a to see where it runs", || ready_on(a, "blog") == ["b"]);
    a.ctl_ok(&["stop", "blog"]);
    assert_eq!(b.states("blog"), ["absent"], "it is stopped wherever it runs");
    assert_eq!((a.count("blog", "ready"), b.count("blog", "ready")), (0, 1));
    assert_eq!(nodes(a).len(), 2);
    cluster.end();
}

#[test]
fn a_file_that_changes_on_one_host_is_in_force_on_all() {
    let blog = Vhost::probe("blog");
    let cluster = Cluster::up(2, &[&blog]);
    let (a, b) = (cluster.host("a"), cluster.host("b"));
    b.ctl_ok(&["wake", "blog"]);

    a.apply(&blog.clone().env("COLOUR", "red"));
    b.wait_for("the change to be in force on b", || b.count("blog", "config-applied") > 0);
    b.wait_for("the instance on b to be replaced", || b.count("blog", "stopped") > 0);
    std::fs::remove_file(a.conf.join("blog.toml")).expect("remove a vhost file");
    b.wait_for("the app to be gone on b", || b.count("blog", "config-removed") > 0);
    b.wait_for("its instances to have ended", || b.count("blog", "stopped") == b.count("blog", "ready"));

    cluster.end();
}

#[test]
fn a_launcher_that_starts_while_redis_is_away_goes_on_with_what_it_runs() {
    let (blog, shop) = (Vhost::probe("blog"), Vhost::probe("shop"));
    let mut cluster = Cluster::up(2, &[&blog, &shop]);
    cluster.host("b").ctl_ok(&["wake", "blog"]);
    let b = cluster.host("b");
    let saved = b.state.join("launcher/cmdb.last-known-good");
    b.wait_for("what is known to be kept", || {
        std::fs::read_to_string(&saved).is_ok_and(|text| text.contains("blog") && text.contains("shop"))
    });

    cluster.redis.kill();
    let b = cluster.host("b");
    let launcher = b.pid_of("fastcontainer-launcher");
    kill(Pid::from_raw(launcher), Signal::SIGKILL).expect("kill the launcher");
    b.wait_for("another launcher", || {
        b.find_pid_of("fastcontainer-launcher").is_some_and(|pid| pid != launcher)
            && b.ctl(&["ps", "blog", "--json"]).status.success()
    });

    assert_eq!(ready_on(b, "blog"), ["b"], "adopted without Redis");
    b.ctl_ok(&["wake", "shop"]);
    cluster.redis.start_again();
    let a = cluster.host("a");
    a.wait_for("a to see what runs on b", || ready_on(a, "blog") == ["b"] && ready_on(a, "shop") == ["b"]);
    cluster.end();
}

#[test]
fn an_idle_host_is_emptied_at_once_and_takes_apps_again_afterwards() {
    let blog = Vhost::probe("blog");
    let cluster = Cluster::up(2, &[&blog]);
    let (a, b) = (cluster.host("a"), cluster.host("b"));
    b.ctl_ok(&["wake", "blog"]);

    a.ctl_ok(&["drain", "b", "--wait"]);
    let listed = a.ctl_ok(&["nodes"]);
    let refused = b.ctl(&["wake", "blog"]);
    a.wait_for("the app to run on the other host", || ready_on(a, "blog") == ["a"]);

    assert!(listed.lines().any(|line| line.starts_with("b ") && line.contains("empty")), "{listed}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("on a"), "{refused:?}");
    assert_eq!(b.events_of_host("node-draining"), 1);
    b.ctl_ok(&["uncordon", "b"]);
    a.ctl_ok(&["drain", "a"]);
    a.wait_for("a to be empty", || ready_on(b, "blog").is_empty());
    b.ctl_ok(&["wake", "blog"]);
    cluster.end();
}

#[test]
fn a_host_without_memory_has_apps_started_elsewhere() {
    let blog = Vhost::probe("blog");
    let cluster = Cluster::up_with(2, &[&blog], |name| match name {
        "b" => ["--keep-free", "100TiB"].map(String::from).to_vec(),
        _ => Vec::new(),
    });
    let (a, b) = (cluster.host("a"), cluster.host("b"));

    let refused = b.ctl(&["wake", "blog"]);

    assert!(String::from_utf8_lossy(&refused.stderr).contains("starts on a"), "{refused:?}");
    a.wait_for("the app to run on the other host", || ready_on(a, "blog") == ["a"]);
    cluster.end();
}

#[test]
fn instances_that_always_run_are_spread_and_come_back_when_a_host_is_lost() {
    let blog = Vhost::probe("blog").with("scale", "min = 2").with("scale", "max = 2");
    let mut cluster = Cluster::up(3, &[]);
    cluster.host("a").apply(&blog);
    let spread = |cluster: &Cluster| {
        let ready = ready_on(cluster.host("a"), "blog");
        (ready.len() == 2 && ready[0] != ready[1]).then_some(ready)
    };
    cluster.host("a").wait_for("one on each of two hosts", || spread(&cluster).is_some());
    let before = spread(&cluster).expect("two");
    let lost = before.iter().find(|node| *node != "a").expect("one that is not a").clone();

    cluster.lose_power(&lost);
    let a = cluster.host("a");
    a.wait_for("another one on another host", || {
        spread(&cluster).is_some_and(|ready| !ready.contains(&lost))
    });

    assert_eq!(a.events_of_host("node-lost"), 1);
    let refused = a.ctl(&["forget", "a"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is alive"), "{refused:?}");
    a.ctl_ok(&["forget", &lost]);
    assert_eq!(nodes(a).len(), 2);
    cluster.end();
}

#[test]
fn a_host_that_was_thought_dead_ends_what_others_have_taken_over() {
    let blog = Vhost::probe("blog");
    let cluster = Cluster::up(2, &[&blog]);
    let (a, b) = (cluster.host("a"), cluster.host("b"));
    b.ctl_ok(&["wake", "blog"]);
    let launcher = Pid::from_raw(b.pid_of("fastcontainer-launcher"));

    kill(launcher, Signal::SIGSTOP).expect("stop b's launcher");
    a.wait_for("b to be lost", || a.events_of_host("node-lost") == 1);
    a.ctl_ok(&["wake", "blog"]);
    kill(launcher, Signal::SIGCONT).expect("continue b's launcher");
    b.wait_for("its instance to have ended", || b.count("blog", "stopped") == 1);

    assert_eq!(b.count("blog", "fenced"), 1, "{:?}", b.events("blog"));
    a.wait_for("b to be back", || a.events_of_host("node-back") == 1);
    assert_eq!((ready_on(a, "blog"), ready_on(b, "blog")), (vec!["a".to_owned()], vec!["a".to_owned()]));
    cluster.end();
}

#[test]
fn an_exclusive_volume_is_given_back_before_another_host_has_it() {
    let (_pool, volume) = shared_volume("exclusive = true");
    let blog = Vhost::probe("blog").with("[volume]", &volume.1);
    let datapool = volume.0;
    let cluster = Cluster::up_with(2, &[&blog], |_| ["--datapool", &datapool].map(String::from).to_vec());
    let (a, b) = (cluster.host("a"), cluster.host("b"));
    b.ctl_ok(&["wake", "blog"]);

    // Replaced on its own host: never two at a time.
    b.ctl_ok(&["restart", "blog"]);
    b.wait_for("the old one to have ended", || b.count("blog", "stopped") == 1);
    b.ctl_ok(&["wake", "blog"]);
    let order: Vec<String> = b.events("blog").iter().map(|e| e["kind"].to_string()).collect();
    let at = |kind: &str| order.iter().rposition(|k| k.contains(kind)).expect("an event");
    assert!(at("stopped") < at("wake"), "{order:?}");
    // Moved to another host: neither.
    a.ctl_ok(&["drain", "b"]);
    a.wait_for("it to run on the other host", || a.ctl(&["wake", "blog"]).status.success());
    let stopped = b.events("blog").iter().rfind(|e| e["kind"] == "stopped").cloned().expect("an event");
    let woken = a.events("blog").iter().rfind(|e| e["kind"] == "wake").cloned().expect("an event");
    let at = |event: &serde_json::Value| event["at_unix_ms"].as_u64().expect("a time");
    assert!(at(&stopped) <= at(&woken), "{stopped} {woken}");
    cluster.end();
}

#[test]
fn a_host_that_the_cmdb_does_not_hear_ends_what_has_an_exclusive_volume() {
    let (_pool, volume) = shared_volume("exclusive = true");
    let (blog, shop) = (Vhost::probe("blog").with("[volume]", &volume.1), Vhost::probe("shop"));
    let datapool = volume.0;
    let mut cluster =
        Cluster::up_with(1, &[&blog, &shop], |_| ["--datapool", &datapool].map(String::from).to_vec());
    cluster.host("a").ctl_ok(&["wake", "blog"]);
    cluster.host("a").ctl_ok(&["wake", "shop"]);

    cluster.redis.kill();
    let a = cluster.host("a");
    a.wait_for("its instance to have ended", || a.count("blog", "stopped") == 1);
    let refused = a.ctl(&["wake", "blog"]);

    assert_eq!(a.count("blog", "fenced"), 1);
    assert_eq!(a.states("shop"), ["ready"], "all others go on");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("exclusive volume"), "{refused:?}");
    cluster.redis.start_again();
    let a = cluster.host("a");
    a.wait_for("it to run again", || a.ctl(&["wake", "blog"]).status.success());
    cluster.end();
}

#[test]
fn a_busy_host_is_emptied_and_no_visitor_notices() {
    let apps = ["blog", "shop", "wiki"].map(Vhost::probe);
    let cluster = Cluster::up(2, &apps.each_ref());
    let (a, b) = (cluster.host("a"), cluster.host("b"));
    ["blog", "shop"].iter().for_each(|app| drop(b.ctl_ok(&["wake", app])));
    a.ctl_ok(&["wake", "wiki"]);
    let until = Arc::new(AtomicBool::new(false));
    let visitors = [a, b, a, b].map(|host| visit(host, &apps, &until));

    for (emptied, other) in [(b, "a"), (a, "b")] {
        let name = if other == "a" { "b" } else { "a" };
        emptied.ctl_ok(&["drain", name, "--wait"]);
        let places = apps.each_ref().map(|app| ready_on(emptied, app.name()));
        assert_eq!(places, apps.each_ref().map(|_| vec![other.to_owned()]), "{name} is empty");
        emptied.ctl_ok(&["uncordon", name]);
        emptied.wait_for("it to take apps again", || {
            cluster.all().all(|host| nodes(host).iter().all(|node| node["draining"] == false))
        });
    }
    until.store(true, SeqCst);
    let visits = visitors.map(|visitor| visitor.join().expect("no visit fails"));

    assert!(visits.iter().all(|visits| *visits > 10), "{visits:?}");
    cluster.end();
}

#[test]
fn a_host_that_loses_its_power_costs_no_visitor_an_error() {
    let apps = ["blog", "shop"].map(Vhost::probe);
    let mut cluster = Cluster::up(3, &apps.each_ref());
    apps.iter().for_each(|app| drop(cluster.host("b").ctl_ok(&["wake", app.name()])));
    let until = Arc::new(AtomicBool::new(false));
    let visitors = ["a", "c", "a", "c"].map(|name| visit(cluster.host(name), &apps, &until));
    let a = cluster.host("a");
    a.wait_for("visits", || cluster.host("b").ps("blog")[0]["requests"].as_u64() > Some(20));

    cluster.lose_power("b");
    let a = cluster.host("a");
    a.wait_for("the apps to run elsewhere, and the host to be known as lost", || {
        let elsewhere = |app: &Vhost| ready_on(a, app.name()).iter().any(|node| node != "b");
        apps.iter().all(elsewhere) && a.events_of_host("node-lost") == 1
    });
    cluster.power_up("b");
    let (a, b) = (cluster.host("a"), cluster.host("b"));
    a.wait_for("it to be back", || a.events_of_host("node-back") == 1);
    a.wait_for("nothing of its life before to be left", || {
        apps.iter().all(|app| ready_on(a, app.name()).len() == 1)
    });
    until.store(true, SeqCst);
    let visits = visitors.map(|visitor| visitor.join().expect("no visit fails"));

    assert!(visits.iter().all(|visits| *visits > 10), "{visits:?}");
    assert!(apps.iter().all(|app| b.states(app.name()).iter().all(|state| state == "ready")));
    cluster.end();
}

#[test]
fn instances_on_two_hosts_see_one_file() {
    let (_pool, (datapool, _)) = shared_volume("");
    let content = std::path::Path::new(&datapool).join("blog");
    std::fs::copy(images().join("probe/probe"), content.join("probe")).expect("the probe");
    let first = "test -e /data/first && touch /data/seen; touch /data/first";
    let file = |min: u32| {
        format!(
            "server-name = [\"blog.test\"]\n[container]\nimage = \"dir:{}/phpinfo\"\nport = 8080\n\
             command = [\"/bin/sh\", \"-c\", \"{first}; exec /data/probe\"]\n\
             [[volume]]\nsource = \"blog\"\ntarget = \"/data\"\n[scale]\nmin = {min}\nmax = 2\n",
            images().display()
        )
    };
    let cluster = Cluster::up_with(2, &[], |_| ["--datapool", &datapool].map(String::from).to_vec());
    let a = cluster.host("a");

    std::fs::write(a.conf.join("blog.toml"), file(1)).expect("a vhost file");
    a.wait_for("one instance", || a.ctl(&["ps", "blog"]).status.success() && ready_on(a, "blog").len() == 1);
    std::fs::write(a.conf.join("blog.toml"), file(2)).expect("a vhost file");
    a.wait_for("one on each host", || ready_on(a, "blog") == ["a", "b"]);

    assert!(content.join("seen").exists(), "the second has seen what the first has written");
    cluster.end();
}

/// A DataPool that all hosts have, with a folder; the lines of a `[[volume]]` for it.
fn shared_volume(more: &str) -> (tempfile::TempDir, (String, String)) {
    let pool = tempfile::Builder::new().prefix("fcp").tempdir_in("/tmp").expect("a folder");
    std::fs::set_permissions(pool.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .expect("its mode");
    std::fs::create_dir(pool.path().join("blog")).expect("a volume");
    let lines = format!("source = \"blog\"\ntarget = \"/data\"\n{more}");
    let path = pool.path().display().to_string();
    (pool, (path, lines))
}
