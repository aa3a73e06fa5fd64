//! The spawner and its keeper with real containers, as root.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub,
    reason = "a test may fail anywhere"
)]

mod chaos;
mod lab;

use std::time::Duration;

use lab::{Lab, children, descriptors, mounts};
use launcher::cgroup::Limits;
use launcher::keeper::{Exit, KeeperError, KeeperEvent};

const SERVE: &str = "exec httpd -f -p 80 -h /www";

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn a_container_is_made_listens_answers_and_ends() {
    let mut lab = Lab::new().await;

    let running = lab.create(lab.plan(1, SERVE)).await;
    let KeeperEvent::Execed { timings, notify, at_us, .. } = lab.event().await else {
        panic!("execed first")
    };
    assert!(notify && !timings.is_empty() && at_us >= running.created.at_us);
    let listening = lab.listening(&running.id).await;
    assert_eq!(listening.port, 80);
    assert!(listening.at_us >= at_us);
    assert!(running.get(80).await.contains("hello from inside"), "at once, without a retry");
    assert!(running.group.populated().unwrap());

    assert_eq!(lab.end(running).await, Exit::Signal(9));
    lab.close().await;
}

#[tokio::test]
async fn a_program_that_ends_by_itself_is_reported_with_its_code() {
    let mut lab = Lab::new().await;
    let running = lab.create(lab.plan(1, "exit 7")).await;
    assert_eq!(lab.exited(&running.id).await, Exit::Code(7));
    running.group.remove().await.unwrap();
    lab.close().await;
}

#[tokio::test]
async fn a_step_that_fails_is_told_and_then_the_end() {
    let mut lab = Lab::new().await;
    let mut plan = lab.plan(1, "");
    plan.argv = vec!["nowhere".to_owned()];
    let running = lab.create(plan).await;

    let KeeperEvent::Failed { error, .. } = lab.event().await else { panic!("failed first") };
    assert!(error.to_string().contains("nowhere"), "{error}");
    let exit = lab.exited(&running.id).await;
    assert!(matches!(exit, Exit::Code(_)), "{exit:?}");
    running.group.remove().await.unwrap();

    // And one that fails before there is a process is an error at once.
    let group = lab.cgroups.create(&lab.plan(2, "").id, &Limits::default()).unwrap();
    let (fds, _output) = lab.fds(&group).await;
    let mut plan = lab.plan(2, "");
    plan.argv.clear();
    let error = lab.keeper.create(plan, fds).await.unwrap_err();
    assert!(matches!(error, KeeperError::Step { .. }), "{error}");
    group.remove().await.unwrap();
    lab.close().await;
}

#[tokio::test]
async fn only_the_wanted_port_counts() {
    let mut lab = Lab::new().await;
    let script = "httpd -p 8080 -h /www; httpd -p 80 -h /www; httpd -p 81 -h /www; exec sleep 60";
    let running = lab.create(lab.plan(1, script)).await;
    assert_eq!(lab.listening(&running.id).await.port, 80);
    for port in [8080, 80, 81] {
        launcher::ready::probe(running.sockets.as_ref().unwrap(), port).await.unwrap();
        assert!(running.get(port).await.contains("hello"), "{port}");
    }
    lab.end(running).await;

    let mut plan = lab.plan(2, "exec httpd -f -p 8123 -h /www");
    plan.port = None;
    let running = lab.create(plan).await;
    assert_eq!(lab.listening(&running.id).await.port, 8123, "the first of any");
    lab.end(running).await;
    lab.close().await;
}

#[tokio::test]
async fn a_name_is_used_once() {
    let mut lab = Lab::new().await;
    let running = lab.create(lab.plan(1, SERVE)).await;
    let (fds, _output) = lab.fds(&running.group).await;
    let error = lab.keeper.create(lab.plan(1, SERVE), fds).await.unwrap_err();
    assert!(matches!(error, KeeperError::Exists { .. }), "{error}");
    lab.end(running).await;
    lab.close().await;
}

#[tokio::test]
async fn containers_outlive_the_daemon_and_the_next_one_finds_them() {
    let mut lab = Lab::new().await;
    let (stays, ends, spawner) = (
        lab.create(lab.plan(1, SERVE)).await,
        lab.create(lab.plan(2, "sleep 0.2; exit 3")).await,
        lab.spawner,
    );
    let late = lab.create(lab.plan(3, "sleep 1; exec httpd -f -p 80 -h /www")).await;
    lab.listening(&stays.id).await;

    // The daemon goes; meanwhile one container ends, and one begins to listen, without waiting for anybody.
    let (dir, name) = lab.lose_daemon().await;
    launcher::ready::probe(late.sockets.as_ref().unwrap(), 80).await.unwrap();
    assert!(late.get(80).await.contains("hello"));

    let mut lab = Lab::connect(dir, name).await;
    assert_eq!(lab.spawner, spawner);
    let mut found: Vec<_> = lab.found.drain(..).collect();
    found.sort_by_key(|found| found.state.id.generation);
    assert_eq!(found.iter().map(|found| found.state.id.generation).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(found[0].state.listening.is_some() && found[0].pidfd.is_some());
    assert_eq!((found[1].state.exited, found[1].pidfd.is_some()), (Some(Exit::Code(3)), false));
    assert_eq!(found[2].state.listening.unwrap().port, 80);

    lab.keeper.kill(&stays.id, 9);
    assert_eq!(lab.exited(&stays.id).await, Exit::Signal(9));
    lab.keeper.kill(&late.id, 9);
    lab.exited(&late.id).await;
    for group in [stays.group, ends.group, late.group] {
        group.remove().await.unwrap();
    }
    lab.close().await;
}

#[tokio::test]
async fn containers_outlive_the_spawner_and_the_next_one_serves_them() {
    let mut lab = Lab::new().await;
    let running = lab.create(lab.plan(1, SERVE)).await;
    lab.listening(&running.id).await;
    let late = lab.create(lab.plan(2, "sleep 1; exec httpd -f -p 80 -h /www")).await;
    while !matches!(lab.event().await, KeeperEvent::Execed { .. }) {}

    kill(lab.spawner);
    assert!(matches!(lab.event().await, KeeperEvent::SpawnerLost));
    assert!(matches!(lab.event().await, KeeperEvent::SpawnerBack));

    assert!(running.get(80).await.contains("hello"));
    assert_eq!(lab.listening(&late.id).await.port, 80, "its call is answered by the new spawner");
    assert!(late.get(80).await.contains("hello"));
    assert_eq!(lab.end(running).await, Exit::Unknown);
    assert_eq!(lab.end(late).await, Exit::Unknown);

    // And it makes new ones.
    let again = lab.create(lab.plan(3, SERVE)).await;
    lab.listening(&again.id).await;
    assert_eq!(lab.end(again).await, Exit::Signal(9));
    lab.keeper.shutdown().await;
    lab.cgroups.remove_parent().await.unwrap();
}

#[tokio::test]
async fn what_a_spawner_held_for_the_next_daemon_survives_the_spawner() {
    let mut lab = Lab::new().await;
    let mut plan = lab.plan(1, SERVE);
    plan.note = "whose it is".to_owned();
    let id = plan.id.clone();
    let group = lab.cgroups.create(&id, &Limits::default()).unwrap();
    let (mut fds, output) = lab.fds(&group).await;
    fds.outputs = vec![output];
    lab.keeper.create(plan, fds).await.unwrap();
    lab.listening(&id).await;

    kill(lab.spawner);
    while !matches!(lab.event().await, KeeperEvent::SpawnerBack) {}
    let (dir, name) = lab.lose_daemon().await;

    let mut lab = Lab::connect(dir, name).await;
    let found = lab.found.pop().unwrap();
    assert_eq!((found.state.id.clone(), found.state.note.as_str()), (id.clone(), "whose it is"));
    assert!(found.state.listening.is_some() && found.pidfd.is_some());
    assert_eq!(found.outputs.len(), 1, "while one is open, the app may write");
    lab.keeper.kill(&id, 9);
    assert_eq!(lab.exited(&id).await, Exit::Unknown);
    group.remove().await.unwrap();
    lab.close().await;
}

#[tokio::test]
async fn a_spawner_with_nothing_to_keep_ends_by_itself() {
    let lab = Lab::new().await;
    let spawner = lab.spawner;
    lab.cgroups.remove_parent().await.unwrap();
    let (dir, _) = lab.lose_daemon().await;
    let gone = async {
        // It is this process's child: gone or waiting to be buried.
        while std::fs::read_to_string(format!("/proc/{spawner}/stat")).is_ok_and(|stat| !stat.contains(" Z "))
        {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(15), gone).await.expect("it ends");
    assert!(!dir.path().join("spawner.sock").exists());
}

#[tokio::test]
async fn shutting_down_ends_every_container() {
    let mut lab = Lab::new().await;
    let (one, two) = (lab.create(lab.plan(1, SERVE)).await, lab.create(lab.plan(2, "exec sleep 60")).await);
    lab.listening(&one.id).await;
    lab.keeper.shutdown().await;
    let mut ended = Vec::new();
    while let Some(event) = lab.events.recv().await {
        if let KeeperEvent::Exited { id, .. } = event {
            ended.push(id.generation);
        }
    }
    ended.sort_unstable();
    assert_eq!(ended, [1, 2], "and every end is told before the events end");
    assert!(!one.group.populated().unwrap() && !two.group.populated().unwrap());
    drop((one, two));
    lab.close().await;
}

#[tokio::test]
async fn a_hundred_lives_leave_nothing_behind() {
    let mut lab = Lab::new().await;
    let warm = lab.create(lab.plan(1, SERVE)).await;
    lab.listening(&warm.id).await;
    lab.end(warm).await;
    // Settled: what the daemon says next is served after that the first one is forgotten.
    let warm = lab.create(lab.plan(2, SERVE)).await;
    lab.listening(&warm.id).await;
    let spawners = descriptors(lab.spawner) - 2; // its pidfd and its listener
    lab.end(warm).await;
    let mounts_before = mounts();

    for generation in 3..=102 {
        let running = lab.create(lab.plan(generation, SERVE)).await;
        // Some end early, some late.
        if generation % 3 != 0 {
            lab.listening(&running.id).await;
            assert!(running.get(80).await.contains("hello"));
        }
        lab.end(running).await;
    }

    // The spawner may have yet to hear that the last one is forgotten.
    let forgotten = async {
        while descriptors(lab.spawner) != spawners {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), forgotten).await.expect("as many descriptors as before");
    assert_eq!(children(lab.spawner), 0, "processes");
    assert_eq!(mounts(), mounts_before);
    assert!(lab.cgroups.leftovers().is_empty());
    lab.close().await;
}

#[tokio::test]
async fn nonsense_from_a_daemon_costs_it_the_connection_and_nothing_else() {
    use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
    let mut lab = Lab::new().await;
    let running = lab.create(lab.plan(1, SERVE)).await;
    lab.listening(&running.id).await;

    // A second daemon replaces the first, talks nonsense, and is dropped.
    let path = lab.dir.path().join("spawner.sock");
    for nonsense in [&b"{}"[..], b"\xff\xff", b"{\"do\":\"create\"}", &[b'x'; 64 * 1024]] {
        let flags = SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        // The first may have come back in between and replaced this one.
        let _ = rustix::net::send(&socket, nonsense, SendFlags::NOSIGNAL);
    }

    // The first has come back, with the same spawner; the container has noticed nothing.
    loop {
        if let KeeperEvent::SpawnerBack = lab.event().await {
            break;
        }
    }
    assert!(running.get(80).await.contains("hello"));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(lab.end(running).await, Exit::Signal(9));
    lab.close().await;
}
