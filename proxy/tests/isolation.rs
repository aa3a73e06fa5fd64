//! Two apps on the same port of 127.0.0.1, each in a network namespace of its own, never see each other's requests. Needs root;
//! says so and passes without.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at what it did not expect"
)]

mod common;

use std::{
    net::TcpListener as StdListener,
    os::fd::OwnedFd,
    process::Command,
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use common::*;
use nix::sched::{CloneFlags, unshare};
use tokio::net::TcpListener;

/// A network namespace: a listener on port 8000 in it, and sockets born in it.
fn namespace() -> (StdListener, SocketMaker) {
    let (listeners, listener) = mpsc::channel();
    let (orders, ordered) = mpsc::channel::<mpsc::Sender<OwnedFd>>();
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
        listeners.send(StdListener::bind("127.0.0.1:8000").unwrap()).unwrap();
        // The namespace ends with this thread and the last socket.
        while let Ok(order) = ordered.recv() {
            let _ = order.send(loopback_socket());
        }
    });
    let orders = Mutex::new(orders);
    let maker = move || {
        let (sender, receiver) = mpsc::channel();
        orders.lock().unwrap().send(sender).unwrap();
        receiver.recv().unwrap()
    };
    let listener = listener.recv().unwrap();
    listener.set_nonblocking(true).unwrap();
    (listener, Arc::new(maker))
}

fn web(listener: StdListener, body: String) -> Web {
    Web::serve(TcpListener::from_std(listener).unwrap(), move |_| {
        let body = body.clone();
        async move { ok(&body) }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn apps_on_the_same_port_never_see_each_others_requests() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not root: nothing tested");
        return;
    }
    let launcher = FakeLauncher::start();
    let mut webs = Vec::new();
    for name in ["blog", "shop"] {
        let (listener, sockets) = namespace();
        webs.push(web(listener, name.to_owned()));
        launcher.put_with(app(name), Script { port: 8000, delay: Duration::ZERO, refusal: None, sockets });
    }
    let proxy = Proxy::start(&launcher).await;
    let mut clients = Vec::new();
    for client in 0..8 {
        let (address, name) = (proxy.address, if client % 2 == 0 { "blog" } else { "shop" });
        clients.push(tokio::spawn(async move {
            for _ in 0..100 {
                let response = get(address, &format!("{name}.test"), "/").await;
                assert_eq!((response.status, response.body.as_str()), (200, name));
            }
        }));
    }
    for client in clients {
        client.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recycled_address_is_another_instance() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not root: nothing tested");
        return;
    }
    let launcher = FakeLauncher::start();
    let (listener, sockets) = namespace();
    let mut webs = vec![web(listener, "0".to_owned())];
    launcher.put_with(app("blog"), Script { port: 8000, delay: Duration::ZERO, refusal: None, sockets });
    let proxy = Proxy::start(&launcher).await;
    for round in 0..20 {
        // POST: a connection to the old instance would be an error, not a retry.
        let post = b"POST / HTTP/1.1\r\nHost: blog.test\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx";
        for _ in 0..3 {
            let response = raw(proxy.address, post).await;
            assert_eq!((response.status, response.body), (200, round.to_string()));
        }
        // The next generation: the same address and port, in a new namespace; the old one still answers.
        let (listener, sockets) = namespace();
        webs.push(web(listener, (round + 1).to_string()));
        launcher.script("blog", |script| script.sockets = sockets);
        let old = launcher.generation("blog");
        launcher.change("blog", |record| {
            record.instances.clear();
            record.generation = cmdb::Generation(old.0 + 1);
            record.instances.insert(record.generation, instance(record.generation, 8000));
        });
        eventually(|| proxy.house.apps()[0].upstreams().iter().all(|one| one.generation.0 == old.0 + 1))
            .await;
    }
}
