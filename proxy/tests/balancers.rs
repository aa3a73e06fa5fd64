//! Behind a balancer that speaks the PROXY protocol.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at what it did not expect"
)]

mod common;

use common::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpSocket,
};

const BALANCER: &str = "127.0.0.50";
const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x01\x0a\0\0\x01\x04\xd2\0\x50";

#[tokio::test(flavor = "multi_thread")]
async fn a_balancer_says_who_the_client_is_and_nobody_else_does() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    launcher.put(app("blog"), web.port);
    let balancers = vec![BALANCER.parse().unwrap()];
    let proxy = Proxy::start_with(&launcher, |config| config.balancers = balancers).await;
    let request =
        b"GET / HTTP/1.1\r\nHost: blog.test\r\nX-Forwarded-For: 10.9.9.9\r\nConnection: close\r\n\r\n";
    let from = |client: &'static str, header: &[u8]| {
        let bytes = [header, request].concat();
        async move { raw_from(client, proxy.address, &bytes).await.status }
    };

    assert_eq!(from(BALANCER, b"PROXY TCP4 192.0.2.1 10.0.0.1 1234 80\r\n").await, 200);
    assert_eq!(from(BALANCER, V2).await, 200);
    assert_eq!(from(BALANCER, b"PROXY UNKNOWN\r\n").await, 200);
    assert_eq!(from(BALANCER, b"").await, 0, "a balancer that does not say who it speaks for is closed");
    assert_eq!(from("127.0.0.51", b"").await, 200);
    assert_eq!(from("127.0.0.51", b"PROXY TCP4 192.0.2.1 10.0.0.1 1234 80\r\n").await, 400);
    assert_eq!(from("127.0.0.51", V2).await, 400);

    let seen = web.seen.lock().unwrap();
    let clients: Vec<_> = seen.iter().map(|seen| seen.header("x-forwarded-for").unwrap()).collect();
    assert_eq!(clients, ["192.0.2.1", "192.0.2.1", BALANCER, "127.0.0.51"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_header_counts_for_all_requests_of_its_connection() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    launcher.put(app("blog"), web.port);
    let balancers = vec![BALANCER.parse().unwrap()];
    let proxy = Proxy::start_with(&launcher, |config| config.balancers = balancers).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(format!("{BALANCER}:0").parse().unwrap()).unwrap();
    let mut socket = socket.connect(proxy.address).await.unwrap();
    socket.write_all(V2).await.unwrap();
    for _ in 0..2 {
        socket.write_all(b"GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"hello") {
            answer.push(socket.read_u8().await.unwrap());
        }
    }
    let seen = web.seen.lock().unwrap();
    assert!(seen.iter().all(|seen| seen.header("x-real-ip") == Some("192.0.2.1")), "{seen:?}");
}
