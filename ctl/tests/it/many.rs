//! Three compute hosts and two edges, with networks of their own: what visitors notice when one is cut off, emptied or
//! loses its Redis.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{cluster::ready_on, http::get, lan::Lan, vhost::Vhost};

/// Three hosts, `a`, `b`, `c`, and two edges, `e` and `f`.
fn five(vhosts: &[&Vhost]) -> Lan {
    let mut lan = Lan::new();
    lan.host("a", 11, Some(vhosts));
    lan.host("b", 12, None);
    lan.host("c", 13, None);
    lan.edge("e", 21);
    lan.edge("f", 22);
    for edge in ["e", "f"] {
        for vhost in vhosts {
            let known = || lan.ask(edge, &get(&vhost.host(), "/")).is_ok_and(|answer| answer.status == 200);
            lan.on(edge).wait_for("the edge to know the apps", known);
        }
    }
    lan
}

/// Visitors of both edges while `work` is done; what went wrong for them, and the longest that one waited.
fn visited<R>(lan: &Lan, vhost: &Vhost, work: impl FnOnce() -> R) -> (R, Visits) {
    let (over, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (failed, longest) = (Mutex::new(Vec::new()), Mutex::new(Duration::ZERO));
    let result = std::thread::scope(|scope| {
        for edge in ["e", "f", "e", "f"] {
            let (over, answered, failed, longest) = (&over, &answered, &failed, &longest);
            scope.spawn(move || {
                while !over.load(SeqCst) {
                    let begun = Instant::now();
                    match lan.ask(edge, &get(&vhost.host(), "/")) {
                        Ok(answer) if answer.status == 200 => drop(answered.fetch_add(1, SeqCst)),
                        other => failed.lock().unwrap().push(format!("{edge}: {other:?}")),
                    }
                    let took = begun.elapsed();
                    let mut longest = longest.lock().unwrap();
                    *longest = took.max(*longest);
                }
            });
        }
        let enough = |more: usize| {
            let before = answered.load(SeqCst);
            let end = Instant::now() + crate::host::PATIENCE;
            while answered.load(SeqCst) < before + more && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(10));
            }
            answered.load(SeqCst) >= before + more
        };
        let before = enough(50);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        let after = enough(50);
        over.store(true, SeqCst);
        assert!(before && after, "the visitors are not answered any more: {:?}", failed.lock().unwrap());
        result
    });
    let visits = Visits {
        answered: answered.into_inner(),
        failed: failed.into_inner().unwrap(),
        longest: longest.into_inner().unwrap(),
    };
    (result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)), visits)
}

struct Visits {
    answered: usize,
    failed: Vec<String>,
    longest: Duration,
}

#[test]
fn a_host_that_is_cut_off_costs_no_request_and_comes_back_without_its_old_instances() {
    let blog = Vhost::probe("blog");
    let lan = five(&[&blog]);
    let before = ready_on(lan.on("a"), "blog");
    let [old] = before.as_slice() else { panic!("{before:?}") };
    // Somebody who is not cut off, to look from.
    let witness = lan.on(if old == "b" { "c" } else { "b" });

    let ((), visits) = visited(&lan, &blog, || {
        lan.cut(old);
        witness.wait_for("another host to run it", || {
            let now = ready_on(witness, "blog");
            now.iter().any(|node| node != old)
        });
    });
    println!("{} visits, the longest {:?}", visits.answered, visits.longest);
    assert_eq!(visits.failed, Vec::<String>::new());

    witness.wait_for("the host to be given up", || !ready_on(witness, "blog").contains(old));
    lan.mend(old);
    let back = lan.on(old);
    back.wait_for("the old instance to be ended", || back.count("blog", "fenced") > 0);
    witness.wait_for("one instance to be left", || ready_on(witness, "blog").len() == 1);
    assert!(!ready_on(witness, "blog").contains(old));
    lan.end();
}

#[test]
fn a_host_that_is_drained_under_load_ends_empty_and_nobody_notices() {
    let blog = Vhost::probe("blog");
    let lan = five(&[&blog]);
    let before = ready_on(lan.on("a"), "blog");
    let [old] = before.as_slice() else { panic!("{before:?}") };

    let ((), visits) = visited(&lan, &blog, || {
        lan.on("a").ctl_ok(&["drain", old, "--wait"]);
    });

    assert_eq!(visits.failed, Vec::<String>::new());
    let host = lan.on(old);
    let running = host.ps("blog").iter().filter(|line| line["node"] == old.as_str()).count();
    assert_eq!(running, 0, "{:?}", host.ps("blog"));
    lan.on("a").ctl_ok(&["uncordon", old]);
    lan.end();
}

#[test]
fn nobody_notices_that_redis_is_away_not_even_at_an_edge_that_starts_meanwhile() {
    let (blog, shop) = (Vhost::probe("blog"), Vhost::probe("shop"));
    let mut lan = five(&[&blog, &shop]);
    lan.on("a").ctl_ok(&["stop", "shop"]);
    for name in ["e", "f"] {
        let kept = lan.on(name).state.join("proxy/cmdb.last-known-good");
        lan.on(name).wait_for("what is known to be kept", || kept.exists());
    }

    lan.stop_redis();
    let ((), visits) = visited(&lan, &blog, || {
        if std::env::var("FC_CHAOS").is_ok_and(|form| form == "long") {
            std::thread::sleep(Duration::from_secs(60));
        }
        // A proxy of an edge dies and comes again, with nobody to ask.
        let edge = lan.on("f");
        let proxy = edge.pid_of("fastcontainer-proxy");
        kill(Pid::from_raw(proxy), Signal::SIGKILL).expect("kill the proxy");
        edge.wait_for("another proxy", || {
            edge.find_pid_of("fastcontainer-proxy").is_some_and(|pid| pid != proxy)
        });
        edge.wait_for("a sleeping app to be woken by it", || {
            lan.ask("f", &get(&shop.host(), "/")).is_ok_and(|answer| answer.status == 200)
        });
    });

    // Who asked the edge while it had no proxy was refused by the kernel, not by us.
    let failed: Vec<&String> =
        visits.failed.iter().filter(|failure| !failure.starts_with("f: Err(")).collect();
    assert_eq!(failed, Vec::<&String>::new());
    lan.start_redis();
    for app in ["blog", "shop"] {
        for host in ["a", "b", "c"] {
            lan.on(host).wait_for("all to agree on one instance", || ready_on(lan.on(host), app).len() == 1);
        }
    }
    lan.end();
}

#[test]
fn nobody_notices_that_redis_hangs_nor_that_it_has_forgotten_everything() {
    let (blog, shop) = (Vhost::probe("blog"), Vhost::probe("shop"));
    let lan = five(&[&blog, &shop]);
    let a = lan.on("a");
    let agree = || {
        for host in ["a", "b", "c"].map(|name| lan.on(name)) {
            for app in ["blog", "shop"] {
                host.wait_for("all to agree on one instance", || ready_on(host, app).len() == 1);
            }
        }
    };
    a.ctl_ok(&["stop", "shop"]);

    let ((), visits) = visited(&lan, &blog, || {
        lan.signal_redis(Signal::SIGSTOP);
        a.wait_for("the silence to be noticed", || a.events_of_host("cmdb-lost") > 0);
        assert_eq!(lan.ask("e", &get(&shop.host(), "/")).unwrap().status, 200, "a cold app, meanwhile");
        lan.signal_redis(Signal::SIGCONT);
        a.wait_for("Redis to be back", || a.events_of_host("cmdb-back") > 0);
        agree();
        lan.redis_cli(&["FLUSHALL"]);
        a.wait_for("what it has forgotten to be told again", || {
            lan.redis_cli(&["KEYS", "fc:{*}"]).lines().count() == 2
        });
        agree();
    });

    assert_eq!(visits.failed, Vec::<String>::new());
    lan.end();
}
