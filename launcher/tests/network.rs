//! Sockets in other network namespaces on the real kernel, as root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail anywhere")]

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::Duration;

use launcher::network::{NetNs, NetSockets};
use launcher::ready;
use nix::sched::{CloneFlags, unshare};

/// A thread in a network namespace of its own; it does what it is told.
struct Elsewhere {
    sockets: NetSockets,
    orders: mpsc::Sender<Box<dyn FnOnce() + Send>>,
    thread: std::thread::JoinHandle<()>,
}

impl Elsewhere {
    async fn new(netns: &NetNs) -> Elsewhere {
        let (orders, inbox) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (tell, told) = mpsc::channel::<OwnedFd>();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("run as root");
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
            assert!(up.success());
            tell.send(std::fs::File::open("/proc/thread-self/ns/net").unwrap().into()).unwrap();
            for order in inbox {
                order();
            }
        });
        let sockets = netns.open(told.recv().unwrap()).await.unwrap();
        Elsewhere { sockets, orders, thread }
    }

    fn serve(&self, port: u16, answer: &'static [u8]) {
        self.orders
            .send(Box::new(move || {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
                std::thread::spawn(move || {
                    for stream in listener.incoming() {
                        let _ = stream.unwrap().write_all(answer);
                    }
                });
            }))
            .unwrap();
    }
}

fn read_from(socket: OwnedFd, port: u16) -> std::io::Result<String> {
    rustix::io::ioctl_fionbio(&socket, false)?;
    rustix::net::connect(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))?;
    let mut text = String::new();
    TcpStream::from(socket).read_to_string(&mut text)?;
    Ok(text)
}

#[tokio::test]
async fn two_namespaces_with_the_same_port_are_never_mixed_up() {
    let netns = NetNs::new();
    let (red, blue) = (Elsewhere::new(&netns).await, Elsewhere::new(&netns).await);
    red.serve(8000, b"red");
    blue.serve(8000, b"blue");
    ready::probe(&red.sockets, 8000).await.unwrap();
    ready::probe(&blue.sockets, 8000).await.unwrap();

    for _ in 0..20 {
        let (reds, blues) = tokio::join!(red.sockets.take(4), blue.sockets.take(4));
        for socket in reds.unwrap() {
            assert_eq!(read_from(socket, 8000).unwrap(), "red");
        }
        for socket in blues.unwrap() {
            assert_eq!(read_from(socket, 8000).unwrap(), "blue");
        }
    }
}

#[tokio::test]
async fn the_probe_waits_until_somebody_listens() {
    let netns = NetNs::new();
    let late = Elsewhere::new(&netns).await;

    let sockets = late.sockets.clone();
    let probe = tokio::spawn(async move { ready::probe(&sockets, 9000).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!probe.is_finished());
    late.serve(9000, b"");

    assert!(probe.await.unwrap().unwrap().attempts > 1);
}

#[tokio::test]
async fn what_is_no_namespace_is_refused_and_the_thread_goes_on() {
    let netns = NetNs::new();
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(netns.open(file.into()).await.is_err());

    let fine = Elsewhere::new(&netns).await;
    assert_eq!(fine.sockets.take(16).await.unwrap().len(), 16);
    drop(fine.orders);
    fine.thread.join().unwrap();
}
