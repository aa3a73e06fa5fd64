//! HTTP as the app and the client see it: headers, refusals, retries, streams, tunnels, logs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at what it did not expect"
)]

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use common::*;
use launcher_client::{
    admin::{self, Answer, Question, RequestRecord},
    wire::Request,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Notify,
    time::{sleep, timeout},
};

async fn warm(web: &Web) -> (FakeLauncher, Proxy) {
    let launcher = FakeLauncher::start();
    launcher.put(app("blog"), web.port);
    let proxy = Proxy::start(&launcher).await;
    (launcher, proxy)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_app_learns_who_asks_and_nothing_that_the_client_made_up() {
    let web = Web::saying("hello").await;
    let (_launcher, proxy) = warm(&web).await;
    let headers = "X-Forwarded-For: 6.6.6.6\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Port: 1\r\nX-Real-IP: 6.6.6.6\r\n\
                   Forwarded: for=6.6.6.6\r\nX-FastContainer-App: evil\r\nX-Request-Id: my.id-1_\r\nX-Mine: kept\r\n";
    assert_eq!(get_with(proxy.address, "BLOG.test.:8080", "/a?b=c", headers).await.status, 200);
    let seen = web.seen.lock().unwrap()[0].clone();
    assert!(seen.head.starts_with("GET /a?b=c HTTP/1.1"), "{}", seen.head);
    assert_eq!(seen.header("x-forwarded-for"), Some("127.0.0.1"));
    assert_eq!(seen.header("x-real-ip"), Some("127.0.0.1"));
    assert_eq!(seen.header("x-forwarded-proto"), Some("http"));
    assert_eq!(seen.header("x-forwarded-host"), Some("BLOG.test.:8080"));
    assert_eq!(seen.header("host"), Some("BLOG.test.:8080"));
    assert_eq!(seen.header("x-request-id"), Some("my.id-1_"));
    assert_eq!(seen.header("x-mine"), Some("kept"));
    for gone in ["forwarded", "x-forwarded-port", "x-fastcontainer-app"] {
        assert_eq!(seen.header(gone), None, "{gone}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trusted_proxy_in_front_is_believed() {
    let web = Web::saying("hello").await;
    let launcher = FakeLauncher::start();
    launcher.put(app("blog"), web.port);
    let proxy =
        Proxy::start_with(&launcher, |config| config.trusted = vec!["127.0.0.0/8".parse().unwrap()]).await;
    let headers = "X-Forwarded-For: 9.9.9.9\r\nX-Forwarded-Proto: https\r\n";
    assert_eq!(get_with(proxy.address, "blog.test", "/", headers).await.status, 200);
    let seen = web.seen.lock().unwrap()[0].clone();
    assert_eq!(seen.header("x-forwarded-for"), Some("9.9.9.9, 127.0.0.1"));
    assert_eq!(seen.header("x-forwarded-proto"), Some("https"));
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_requests_are_refused_and_never_reach_an_app() {
    let web = Web::saying("hello").await;
    let (launcher, proxy) = warm(&web).await;
    for (request, status) in [
        ("GET / HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: blog.test\r\nHost: blog.test\r\nConnection: close\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: blog.test, shop.test\r\nConnection: close\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a/../b\r\nConnection: close\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: nobody.test\r\nConnection: close\r\n\r\n", 404),
        (
            "POST / HTTP/1.1\r\nHost: blog.test\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n",
            400,
        ),
        (
            "POST / HTTP/1.1\r\nHost: blog.test\r\nContent-Length: 3\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
            400,
        ),
        (
            "POST / HTTP/1.1\r\nHost: blog.test\r\nTransfer-Encoding: gzip, chunked\r\nConnection: close\r\n\r\n0\r\n\r\n",
            400,
        ),
        ("POST / HTTP/1.1\r\nHost: blog.test\r\nContent_Length: 3\r\nConnection: close\r\n\r\nabc", 400),
        ("GET / HTTP/1.1\r\nHost: blog.test\r\nX_Forwarded_For: 1.1.1.1\r\nConnection: close\r\n\r\n", 400),
        ("GET /\u{e4} HTTP/1.1\r\nHost: blog.test\r\nConnection: close\r\n\r\n", 400),
        ("GET * HTTP/1.1\r\nHost: blog.test\r\nConnection: close\r\n\r\n", 400),
        ("GET /a\0b HTTP/1.1\r\nHost: blog.test\r\nConnection: close\r\n\r\n", 400),
    ] {
        assert_eq!(raw(proxy.address, request.as_bytes()).await.status, status, "{request:?}");
    }
    assert_eq!((web.count(), launcher.wakes("blog")), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_suit_who_reads_them() {
    let web = Web::saying("hello").await;
    let (_launcher, proxy) = warm(&web).await;
    let page = get_with(proxy.address, "nobody.test", "/%3Cscript%3E", "Accept: text/html\r\n").await;
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    assert_eq!(page.header("cache-control"), Some("no-store"));
    assert!(page.body.contains("404 Not Found") && !page.body.contains("<script>"), "{}", page.body);
    let text = get(proxy.address, "nobody.test", "/").await;
    assert!(text.body.starts_with("404 Not Found\n"), "{}", text.body);
    let head = raw(proxy.address, b"HEAD / HTTP/1.1\r\nHost: nobody.test\r\nConnection: close\r\n\r\n").await;
    assert_eq!((head.status, head.body.as_str()), (404, ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn timing_is_shown_on_request_and_the_log_explains_the_request() {
    let web = Web::saying("hello").await;
    let (launcher, proxy) = warm(&web).await;
    let plain = get(proxy.address, "blog.test", "/").await;
    assert_eq!((plain.header("server-timing"), plain.header("x-fastcontainer-instance")), (None, None));
    let asked = "X-FastContainer-Timing: 1\r\nX-Request-Id: find-me\r\n";
    let timed = get_with(proxy.address, "blog.test", "/x", asked).await;
    let timing = timed.header("server-timing").unwrap();
    assert!(
        timing.starts_with("hold;dur=") && timing.contains("connect;dur=") && timing.contains("app;dur="),
        "{timing}"
    );
    assert_eq!(timed.header("x-fastcontainer-instance"), Some("blog.1"));
    assert_eq!(timed.header("x-request-id"), Some("find-me"));
    assert_eq!(web.seen.lock().unwrap()[1].header("x-fastcontainer-timing"), None);
    let answer = admin::ask(&launcher.state.proxy_socket(), &Question::Why("find-me".into())).await.unwrap();
    let Answer::Request(Some(record)) = answer else { panic!("{answer:?}") };
    assert_eq!(
        (record.status, record.path.as_str(), record.app.as_str(), record.generation),
        (200, "/x", "blog", 1)
    );
    assert_eq!((record.bytes, record.wake.as_str(), record.error.as_str()), (5, "warm", ""));
    assert_sums_up(&record);
    let log = std::fs::read_to_string(launcher.state.proxy().join("access.log")).unwrap();
    let records: Vec<RequestRecord> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(records.len(), 2);
    assert_eq!(records[0].wake, "cold");
    assert!(records[0].hold_us > 0);
    records.iter().for_each(assert_sums_up);
    let Answer::Stats(stats) = admin::ask(&launcher.state.proxy_socket(), &Question::Stats {}).await.unwrap()
    else {
        panic!()
    };
    assert_eq!((stats.launcher, stats.apps, stats.requests, stats.instances.len()), (true, 1, 2, 1));
}

fn assert_sums_up(record: &RequestRecord) {
    let parts = record.own_us
        + record.hold_us
        + record.connect_us
        + record.send_us
        + record.first_byte_us
        + record.body_us;
    assert_eq!(parts, record.total_us, "{record:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_refuses_connections_is_woken_again_for_any_method() {
    let web = Web::saying("hello").await;
    let launcher = FakeLauncher::start();
    // Bound, but nobody listens: every connection is refused, and no other test can come to listen there.
    let dead = TcpSocket::new_v4().unwrap();
    dead.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    launcher.put(app("blog"), dead.local_addr().unwrap().port());
    let proxy = Proxy::start(&launcher).await;
    // The launcher notices after a while that the instance is dead and starts another.
    let body = b"POST / HTTP/1.1\r\nHost: blog.test\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc";
    let request = tokio::spawn(raw(proxy.address, body));
    eventually(|| launcher.heard(|request| matches!(request, Request::Suspect { .. })) > 0).await;
    launcher.script("blog", |script| script.port = web.port);
    launcher.change("blog", |record| record.instances.clear());
    let response = request.await.unwrap();
    assert_eq!((response.status, response.body.as_str()), (200, "hello"));
    let seen = web.seen.lock().unwrap();
    assert_eq!((seen.len(), seen[0].body.as_slice()), (1, &b"abc"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_broke_off_is_tried_again_only_when_that_is_safe() {
    let tries = Arc::new(AtomicUsize::new(0));
    let tries_ = Arc::clone(&tries);
    let web = Web::start(move |_| {
        let first = tries_.fetch_add(1, SeqCst) == 0;
        // Nothing: the connection is closed after the request was read.
        async move { if first { Vec::new() } else { ok("second") } }
    })
    .await;
    let (_launcher, proxy) = warm(&web).await;
    let response = get(proxy.address, "blog.test", "/").await;
    assert_eq!((response.status, response.body.as_str(), tries.swap(0, SeqCst)), (200, "second", 2));
    let body = b"POST / HTTP/1.1\r\nHost: blog.test\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc";
    assert_eq!(raw(proxy.address, body).await.status, 502);
    assert_eq!(tries.load(SeqCst), 1, "the app may have acted on it");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_always_breaks_off_is_tried_twice() {
    let web = Web::start(|_| async { Vec::new() }).await;
    let (_launcher, proxy) = warm(&web).await;
    assert_eq!(get(proxy.address, "blog.test", "/").await.status, 502);
    assert_eq!(web.count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_to_an_instance_are_kept() {
    let web = Web::saying("hello").await;
    let (_launcher, proxy) = warm(&web).await;
    for _ in 0..20 {
        assert_eq!(get(proxy.address, "blog.test", "/").await.status, 200);
    }
    // One may be on its way back to the pool when the next request comes.
    assert!(web.connections.load(SeqCst) <= 6, "{}", web.connections.load(SeqCst));
}

#[tokio::test(flavor = "multi_thread")]
async fn events_stream_through_one_by_one() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, next) = (listener.local_addr().unwrap().port(), Arc::new(Notify::new()));
    let next_ = Arc::clone(&next);
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        read_message(&mut socket).await.unwrap();
        socket
            .write_all(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
            )
            .await
            .unwrap();
        for number in 0..3 {
            next_.notified().await;
            socket.write_all(format!("9\r\ndata: {number}\n\n\r\n").as_bytes()).await.unwrap();
        }
        socket.write_all(b"0\r\n\r\n").await.unwrap();
    });
    let launcher = FakeLauncher::start();
    launcher.put(app("blog"), port);
    let proxy = Proxy::start(&launcher).await;
    let mut client = TcpStream::connect(proxy.address).await.unwrap();
    client.write_all(b"GET /events HTTP/1.1\r\nHost: blog.test\r\n\r\n").await.unwrap();
    let mut got = Vec::new();
    for number in 0..3 {
        next.notify_one();
        let wanted = format!("data: {number}\n\n");
        // Each event arrives before the next is sent.
        timeout(PATIENCE, async {
            while find(&got, wanted.as_bytes()).is_none() {
                assert!(client.read_buf(&mut got).await.unwrap() > 0);
            }
        })
        .await
        .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_tunnels_both_ways_even_through_a_wake() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        read_message(&mut socket).await.unwrap();
        socket
            .write_all(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            )
            .await
            .unwrap();
        let mut piece = [0u8; 100];
        while let Ok(length @ 1..) = socket.read(&mut piece).await {
            socket.write_all(&piece[..length]).await.unwrap();
        }
    });
    let launcher = FakeLauncher::start();
    launcher.put(app("blog"), port);
    launcher.script("blog", |script| script.delay = Duration::from_millis(200));
    let proxy = Proxy::start(&launcher).await;
    let mut client = TcpStream::connect(proxy.address).await.unwrap();
    client
        .write_all(b"GET /ws HTTP/1.1\r\nHost: blog.test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
        .await
        .unwrap();
    let mut got = Vec::new();
    timeout(PATIENCE, async {
        while find(&got, b"\r\n\r\n").is_none() {
            assert!(client.read_buf(&mut got).await.unwrap() > 0);
        }
        assert!(got.starts_with(b"HTTP/1.1 101"));
        for word in ["one", "two"] {
            client.write_all(word.as_bytes()).await.unwrap();
            while find(&got, word.as_bytes()).is_none() {
                assert!(client.read_buf(&mut got).await.unwrap() > 0);
            }
        }
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_that_trickles_in_is_not_waited_for_but_a_slow_body_is() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    launcher.put(app("blog"), web.port);
    let proxy =
        Proxy::start_with(&launcher, |config| config.header_timeout = Duration::from_millis(700)).await;
    let trickle = async |text: &[u8]| {
        let mut socket = TcpStream::connect(proxy.address).await.unwrap();
        for byte in text {
            // It may have been closed.
            let _ = socket.write_all(&[*byte]).await;
            sleep(Duration::from_millis(60)).await;
        }
        let mut answer = String::new();
        let _ = socket.read_to_string(&mut answer).await;
        answer
    };
    let header = trickle(b"GET / HTTP/1.1\r\nHost: blog.test\r\nConnection: close\r\n\r\n").await;
    assert_eq!(header, "", "each byte came in time, the whole did not");

    let head = b"POST / HTTP/1.1\r\nHost: blog.test\r\nConnection: close\r\nContent-Length: 20\r\n\r\n";
    let mut socket = TcpStream::connect(proxy.address).await.unwrap();
    socket.write_all(head).await.unwrap();
    for _ in 0..20 {
        socket.write_all(b"x").await.unwrap();
        sleep(Duration::from_millis(60)).await;
    }
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("hello"), "{answer}");
}
