//! Known Pingora bugs and our work-arounds. Each test fails without its work-around (checked by taking it out).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at what it did not expect"
)]

mod common;

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use bytes::Bytes;
use common::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

/// Issue 935.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_ends_in_an_empty_frame_has_one_terminator() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sender, mut received) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut data = Vec::new();
        while find(&data, b"0\r\n\r\n").is_none() {
            socket.read_buf(&mut data).await.unwrap();
        }
        // Whatever comes after the terminator, comes at once.
        sleep(std::time::Duration::from_millis(100)).await;
        while let Ok(Ok(1..)) =
            timeout(std::time::Duration::from_millis(50), socket.read_buf(&mut data)).await
        {}
        sender.send(data).unwrap();
        socket.write_all(&ok("fine")).await.unwrap();
    });
    let launcher = FakeLauncher::start();
    launcher.put(app("blog"), port);
    let proxy = Proxy::start_h2(&launcher, |_| {}, true).await;
    let socket = TcpStream::connect(proxy.address).await.unwrap();
    let (mut client, connection) = h2::client::handshake(socket).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post("http://blog.test/").body(()).unwrap();
    let (response, mut body) = client.send_request(request, false).unwrap();
    body.send_data(Bytes::from_static(b"abc"), false).unwrap();
    sleep(std::time::Duration::from_millis(50)).await;
    body.send_data(Bytes::new(), true).unwrap();
    let data = timeout(PATIENCE, received.recv()).await.unwrap().unwrap();
    let text = String::from_utf8_lossy(&data);
    assert_eq!(text.matches("0\r\n\r\n").count(), 1, "{text}");
    assert_eq!(timeout(PATIENCE, response).await.unwrap().unwrap().status(), 200);
}

/// Issue 946: an app that says 101 before it has read anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_that_is_granted_early_stays_open() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                socket
                    .write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
                    .await
                    .unwrap();
                let mut data = Vec::new();
                while find(&data, b"ping").is_none() {
                    if socket.read_buf(&mut data).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                socket.write_all(b"pong").await.unwrap();
            });
        }
    });
    let launcher = FakeLauncher::start();
    launcher.put(app("blog"), port);
    let proxy = Proxy::start(&launcher).await;
    let lost = Arc::new(AtomicUsize::new(0));
    let mut clients = Vec::new();
    for _ in 0..6 {
        let (lost, address) = (Arc::clone(&lost), proxy.address);
        clients.push(tokio::spawn(async move {
            for _ in 0..50 {
                if !tunnel(address).await {
                    lost.fetch_add(1, SeqCst);
                }
            }
        }));
    }
    for client in clients {
        client.await.unwrap();
    }
    assert_eq!(lost.load(SeqCst), 0);
}

async fn tunnel(address: std::net::SocketAddr) -> bool {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket
        .write_all(b"GET /ws HTTP/1.1\r\nHost: blog.test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
        .await
        .unwrap();
    let mut data = Vec::new();
    while find(&data, b"\r\n\r\n").is_none() {
        if socket.read_buf(&mut data).await.unwrap_or(0) == 0 {
            return false;
        }
    }
    if socket.write_all(b"ping").await.is_err() {
        return false;
    }
    while find(&data, b"pong").is_none() {
        if socket.read_buf(&mut data).await.unwrap_or(0) == 0 {
            return false;
        }
    }
    true
}
