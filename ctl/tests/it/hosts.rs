//! Several hosts that share a CMDB in Redis: who runs what, who takes over, and what happens when Redis is away.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    cluster::{Cluster, nodes, ready_on},
    vhost::Vhost,
};

#[test]
fn an_app_that_runs_on_one_host_is_not_started_on_another() {
    let blog = Vhost::probe("blog");
    let cluster = Cluster::up(2, &[&blog]);
    let (a, b) = (cluster.host("a"), cluster.host("b"));

    b.ctl_ok(&["wake", "blog"]);
    let refused = a.ctl(&["wake", "blog"]);

    assert!(String::from_utf8_lossy(&refused.stderr).contains("runs on b"), "{refused:?}");
    a.wait_for("a to see where it runs", || ready_on(a, "blog") == ["b"]);
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
