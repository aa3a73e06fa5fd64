//! What visitors see when the app runs on another host than the one whose proxy they came to; and what forgers see.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at what it did not expect"
)]

mod common;

use std::time::Duration;

use common::*;
use fastcontainer_proxy::{
    seal::{self, ClusterKey},
    tls::{self, ClusterTls},
};
use http::HeaderMap;
use launcher_client::wire::{Refusal, RefusalCode, Request};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// An edge without a launcher's instances, and two hosts; what one launcher starts, all know of.
struct Cluster {
    edge: Proxy,
    edge_launcher: FakeLauncher,
    hosts: Vec<Host>,
}

struct Host {
    name: &'static str,
    launcher: FakeLauncher,
    proxy: Proxy,
}

impl Cluster {
    async fn start(web: &Web) -> Self {
        Self::start_knowing(web, |_| (ClusterKey::new(KEY), None)).await
    }

    /// `credentials`: of each host's proxy; of the edge for `None`.
    async fn start_knowing(
        web: &Web,
        credentials: impl Fn(Option<&str>) -> (Option<ClusterKey>, Option<ClusterTls>),
    ) -> Self {
        let edge_launcher = FakeLauncher::start_on("nowhere");
        edge_launcher.put(app("blog"), web.port);
        let mut hosts = Vec::new();
        for name in ["b", "c"] {
            let launcher = FakeLauncher::start_on(name);
            launcher.put(app("blog"), web.port);
            let proxy = {
                let (key, tls) = credentials(Some(name));
                Proxy::start_knowing(&launcher, Some(name), key, tls).await
            };
            hosts.push(Host { name, launcher, proxy });
        }
        for host in &hosts {
            let mut others: Vec<_> = hosts
                .iter()
                .map(|other| &other.launcher)
                .filter(|other| !std::ptr::eq(*other, &raw const host.launcher))
                .collect();
            others.push(&edge_launcher);
            host.launcher.share_with(&others);
        }
        let (key, tls) = credentials(None);
        let edge = Proxy::start_knowing(&edge_launcher, None, key, tls).await;
        let cluster = Self { edge, edge_launcher, hosts };
        cluster.tell_alive(&[true, true]);
        eventually(|| cluster.edge.house.hosts.list().len() == 2).await;
        cluster
    }

    fn tell_alive(&self, alive: &[bool]) {
        let nodes: Vec<_> =
            self.hosts.iter().zip(alive).map(|(host, alive)| host.proxy.as_node(host.name, *alive)).collect();
        self.edge_launcher.set_nodes(&nodes);
    }

    fn wakes(&self) -> Vec<usize> {
        self.hosts.iter().map(|host| host.launcher.wakes("blog")).collect()
    }

    /// The host that runs it, and the other one.
    fn who_runs(&self) -> (usize, usize) {
        if self.hosts[0].launcher.wakes("blog") > 0 { (0, 1) } else { (1, 0) }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sleeping_app_is_woken_on_one_host_and_reached_through_its_dispatcher() {
    let web = Web::saying("hello").await;
    let cluster = Cluster::start(&web).await;

    let requests: Vec<_> =
        (0..50).map(|_| tokio::spawn(get(cluster.edge.address, "blog.test", "/"))).collect();
    for request in requests {
        let response = request.await.unwrap();
        assert_eq!((response.status, response.body.as_str()), (200, "hello"));
    }

    assert_eq!(cluster.wakes().iter().sum::<usize>(), 1, "all hosts together");
    assert_eq!(
        cluster
            .edge_launcher
            .heard(|request| matches!(request, Request::Wake { .. } | Request::Report { .. })),
        0
    );
    let (runs, _) = cluster.who_runs();
    eventually(|| cluster.hosts[runs].launcher.heard(|one| matches!(one, Request::FirstByte { .. })) == 1)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_app_sees_the_client_and_the_client_sees_nothing_of_the_way() {
    let web = Web::start(|_| async {
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-fastcontainer-instance: evil/1\r\n\
          x-fastcontainer-refused: forged\r\nx-fastcontainer-elsewhere: evil\r\n\r\nok"
            .to_vec()
    })
    .await;
    let cluster = Cluster::start(&web).await;

    let response = raw_from(
        "127.0.0.77",
        cluster.edge.address,
        b"GET /x?y=%20z HTTP/1.1\r\nHost: Blog.test:80\r\nX-Forwarded-For: 10.9.9.9\r\nForwarded: for=10.9.9.9\r\n\
          X-Fastcontainer-Node: c\r\nX-FastContainer-Client: 10.9.9.9\r\nX-FastContainer-Seal: 1.00\r\n\
          X-Request-ID: the-same-on-both\r\nConnection: close\r\n\r\n",
    )
    .await;

    assert_eq!((response.status, response.body.as_str()), (200, "ok"));
    assert!(!response.head.to_ascii_lowercase().contains("x-fastcontainer"), "{}", response.head);
    let seen = web.seen.lock().unwrap()[0].clone();
    assert!(seen.head.starts_with("GET /x?y=%20z HTTP/1.1\r\n"), "{}", seen.head);
    assert_eq!(seen.header("host"), Some("Blog.test:80"));
    assert_eq!(seen.header("x-forwarded-for"), Some("127.0.0.77"));
    assert_eq!(seen.header("x-real-ip"), Some("127.0.0.77"));
    assert_eq!(seen.header("x-forwarded-proto"), Some("http"));
    assert_eq!(seen.header("x-request-id"), Some("the-same-on-both"));
    assert!(seen.header("forwarded").is_none());
    assert!(!seen.head.to_ascii_lowercase().contains("x-fastcontainer"), "{}", seen.head);
    let (runs, _) = cluster.who_runs();
    eventually(|| {
        let told = |proxy: &Proxy| {
            let record = proxy.house.telemetry.why("the-same-on-both");
            record.filter(|record| record.client == "127.0.0.77").map(|record| record.node)
        };
        let host = &cluster.hosts[runs];
        told(&cluster.edge).as_deref() == Some(host.name) && told(&host.proxy).as_deref() == Some("")
    })
    .await;
}

fn sealed(key: &[u8], node: &str, headers: &[(&str, &str)]) -> String {
    let mut map = HeaderMap::new();
    map.insert(seal::NODE, node.parse().unwrap());
    for (name, value) in headers {
        map.insert(http::HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
    }
    let seal = ClusterKey::new(key).unwrap().seal("GET", b"/", &map);
    map.insert(seal::SEAL, seal.parse().unwrap());
    let mut text = "GET / HTTP/1.1\r\n".to_owned();
    for (name, value) in &map {
        text += &format!("{name}: {}\r\n", value.to_str().unwrap());
    }
    text + "Connection: close\r\n\r\n"
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dispatcher_serves_the_proxies_of_its_cluster_and_nobody_else() {
    let web = Web::saying("hello").await;
    let cluster = Cluster::start(&web).await;
    let dispatch = cluster.hosts[0].proxy.dispatch;
    let fine = [
        ("host", "blog.test"),
        ("x-fastcontainer-kind", "request"),
        ("x-fastcontainer-app", "blog"),
        ("x-fastcontainer-generation", "1"),
        ("x-fastcontainer-client", "192.0.2.9"),
    ];

    let response = raw(dispatch, sealed(KEY, "b", &fine).as_bytes()).await;
    assert_eq!((response.status, response.header("x-fastcontainer-instance")), (200, Some("b/1")));

    let other_key = b"fedcba9876543210fedcba9876543210";
    let changed = sealed(KEY, "b", &fine).replace("192.0.2.9", "192.0.2.8");
    let unsealed = "GET / HTTP/1.1\r\nHost: blog.test\r\nx-fastcontainer-node: b\r\nx-fastcontainer-app: blog\r\n\
                    Connection: close\r\n\r\n";
    for (what, request, status) in [
        ("a tenant that reaches the port", unsealed.to_owned(), 403),
        ("another cluster", sealed(other_key, "b", &fine), 403),
        ("somebody on the way", changed, 403),
        ("a proxy that means another host", sealed(KEY, "c", &fine), 421),
    ] {
        let response = raw(dispatch, request.as_bytes()).await;
        assert_eq!(response.status, status, "{what}");
        assert!(response.header("x-fastcontainer-refused").is_some(), "{what}");
    }
    let unsealed_wake = b"POST /.fastcontainer/wake/blog HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n";
    assert_eq!(raw(dispatch, unsealed_wake).await.status, 403);
    assert_eq!(web.count(), 1);
    let figures = fastcontainer_proxy::metrics::text(&cluster.hosts[0].proxy.house);
    let forged = figures.lines().find(|line| line.contains("\"forged\"")).unwrap();
    assert!(forged.ends_with(" 4"), "{forged}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_megabytes_wait_at_the_edge_for_a_cold_app_on_another_host_and_arrive_whole() {
    let web = Web::saying("got it").await;
    let cluster = Cluster::start(&web).await;
    for host in &cluster.hosts {
        // Longer than a dispatcher keeps whoever asks waiting.
        host.launcher.script("blog", |script| script.delay = Duration::from_millis(1_300));
    }
    let body: Vec<u8> = (0..10_000_000u32).map(|i| (i % 251) as u8).collect();
    let head = format!(
        "POST / HTTP/1.1\r\nHost: blog.test\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );

    let response = raw(cluster.edge.address, &[head.as_bytes(), &body].concat()).await;

    assert_eq!(response.status, 200);
    let seen = web.seen.lock().unwrap();
    assert_eq!(seen.len(), 1);
    assert!(seen[0].body == body);
    assert_eq!(cluster.wakes().iter().sum::<usize>(), 1, "asked for repeatedly, begun once");
}

#[tokio::test(flavor = "multi_thread")]
async fn websockets_pass_both_proxies() {
    let (web, port) = (Web::saying("unused").await, echo().await);
    tunnel_through(&Cluster::start(&web).await, port).await;
}

/// Grants every upgrade and sends back what it gets.
async fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(socket.read_u8().await.unwrap());
                }
                let upgrade =
                    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
                socket.write_all(upgrade).await.unwrap();
                let (mut reader, mut writer) = socket.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            });
        }
    });
    port
}

async fn tunnel_through(cluster: &Cluster, port: u16) {
    for host in &cluster.hosts {
        host.launcher.script("blog", |script| script.port = port);
    }
    for round in 0..50 {
        let mut socket = TcpStream::connect(cluster.edge.address).await.unwrap();
        let request = b"GET /ws HTTP/1.1\r\nHost: blog.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";
        socket.write_all(request).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(socket.read_u8().await.unwrap());
        }
        assert!(head.starts_with(b"HTTP/1.1 101"), "{round}: {}", String::from_utf8_lossy(&head));
        socket.write_all(b"ping").await.unwrap();
        let mut echo = [0; 4];
        socket.read_exact(&mut echo).await.unwrap();
        assert_eq!(&echo, b"ping");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn when_a_host_is_gone_its_requests_go_to_another_one() {
    let web = Web::saying("hello").await;
    let mut cluster = Cluster::start(&web).await;
    assert_eq!(get(cluster.edge.address, "blog.test", "/").await.status, 200);
    let (runs, other) = cluster.who_runs();

    // Its proxy ends, and with it the port: what is sent there is refused.
    let dead = cluster.hosts.remove(runs);
    let other = if runs < other { other - 1 } else { other };
    let name = dead.name;
    dead.proxy.kill().await;
    let node = cluster.hosts[other].proxy.as_node(cluster.hosts[other].name, true);
    cluster.hosts[other].launcher.change("blog", |record| record.instances.clear());
    let post = b"POST / HTTP/1.1\r\nHost: blog.test\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi";
    assert_eq!(raw(cluster.edge.address, post).await.status, 200, "nothing was sent, so it goes elsewhere");
    // A busy machine may make the edge ask twice.
    assert!(cluster.hosts[other].launcher.wakes("blog") >= 1);

    let mut gone = node.clone();
    (gone.compute.name, gone.alive) = (name.to_owned(), false);
    cluster.edge_launcher.set_nodes(&[gone, node]);
    eventually(|| !cluster.edge.house.hosts.remote(name).is_fit()).await;
    assert_eq!(get(cluster.edge.address, "blog.test", "/").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_launcher_that_knows_of_an_instance_elsewhere_sends_the_edge_there() {
    let web = Web::saying("hello").await;
    let cluster = Cluster::start(&web).await;
    let elsewhere = |node: &str| Refusal {
        elsewhere: Some(node.to_owned()),
        ..Refusal::new(RefusalCode::Elsewhere, "another host has one")
    };
    // Whichever is asked first: only "c" starts it.
    cluster.hosts[0].launcher.script("blog", |script| script.refusal = Some(elsewhere("c")));
    assert_eq!(get(cluster.edge.address, "blog.test", "/").await.status, 200);
    assert_eq!(cluster.hosts[1].launcher.wakes("blog"), 1);

    // A request for an instance that has gone meanwhile, at a dispatcher whose launcher cannot make another.
    for host in &cluster.hosts {
        host.launcher.change("blog", |record| record.instances.clear());
    }
    cluster.hosts[0].launcher.script("blog", |script| script.refusal = None);
    cluster.hosts[1].launcher.script("blog", |script| script.refusal = Some(elsewhere("b")));
    eventually(|| cluster.hosts[1].proxy.house.apps()[0].upstreams().is_empty()).await;
    let post = b"POST / HTTP/1.1\r\nHost: blog.test\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi";
    let response = raw(cluster.edge.address, post).await;
    assert_eq!(response.status, 200, "{}", response.head);
    assert_eq!(web.count(), 2, "the app has seen each once");
    assert_eq!(cluster.hosts[0].launcher.generation("blog").0, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_room_is_passed_over_and_a_refusal_of_all_is_told() {
    let web = Web::saying("hello").await;
    let cluster = Cluster::start(&web).await;
    let busy = || Refusal { retry_after_ms: Some(3_000), ..Refusal::new(RefusalCode::Busy, "no room") };
    cluster.hosts[0].launcher.script("blog", |script| script.refusal = Some(busy()));
    assert_eq!(get(cluster.edge.address, "blog.test", "/").await.status, 200);
    assert_eq!(cluster.hosts[1].launcher.wakes("blog"), 1);

    for host in &cluster.hosts {
        host.launcher.script("blog", |script| script.refusal = Some(busy()));
        host.launcher.change("blog", |record| record.instances.clear());
    }
    cluster.edge_launcher.change("blog", |record| record.instances.clear());
    eventually(|| cluster.edge.house.apps()[0].upstreams().is_empty()).await;
    let response = get(cluster.edge.address, "blog.test", "/").await;
    assert_eq!((response.status, response.header("retry-after")), (503, Some("3")));
}

/// An authority of the test's own, and certificates of it.
struct Authority(rcgen::Issuer<'static, rcgen::KeyPair>, String);

impl Authority {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self(rcgen::Issuer::new(params, key), pem)
    }

    fn issue(&self, node: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![tls::name_of(node)]).unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write(tls::CERTIFICATE, &params.signed_by(&key, &self.0).unwrap().pem());
        write(tls::KEY, &key.serialize_pem());
        write(tls::CA, &self.1);
        folder
    }

    fn tls(&self, node: Option<&str>) -> ClusterTls {
        ClusterTls::read(self.issue(node.unwrap_or("edge")).path(), node).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_certificates_hosts_need_no_key() {
    let web = Web::saying("hello").await;
    let authority = Authority::new();
    let cluster = Cluster::start_knowing(&web, |node| (None, Some(authority.tls(node)))).await;
    for _ in 0..3 {
        let response = get(cluster.edge.address, "blog.test", "/").await;
        assert_eq!((response.status, response.body.as_str()), (200, "hello"));
    }
    assert_eq!(cluster.wakes().iter().sum::<usize>(), 1);

    let port = echo().await;
    for host in &cluster.hosts {
        host.launcher.change("blog", |record| record.instances.clear());
    }
    cluster.edge_launcher.change("blog", |record| record.instances.clear());
    tunnel_through(&cluster, port).await;
    // Whoever has no certificate does not get so far as to speak.
    let plain = b"GET / HTTP/1.1\r\nHost: blog.test\r\nConnection: close\r\n\r\n";
    assert_eq!(raw(cluster.hosts[0].proxy.dispatch, plain).await.status, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_of_another_authority_or_under_another_ones_name_gets_no_requests() {
    let web = Web::saying("hello").await;
    let (authority, other) = (Authority::new(), Authority::new());
    // "b" is an impostor; "c" is what it says.
    let credentials = |node: Option<&str>| {
        let tls = if node == Some("b") { other.tls(node) } else { authority.tls(node) };
        (None, Some(tls))
    };
    let cluster = Cluster::start_knowing(&web, credentials).await;
    assert_eq!(get(cluster.edge.address, "blog.test", "/").await.status, 200);
    assert_eq!(cluster.wakes(), [0, 1]);

    let of_another = authority.issue("c");
    let error = ClusterTls::read(of_another.path(), Some("b")).unwrap_err().to_string();
    assert!(error.contains("ca issue"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_says_nothing_is_passed_over() {
    let web = Web::saying("hello").await;
    let cluster = Cluster::start(&web).await;
    // Connections to it are made, and that is all.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = &cluster.hosts[1];
    let mut best = host.proxy.as_node("best", true);
    best.compute.dispatch = silent.local_addr().unwrap().to_string();
    best.load.free_memory = 1 << 40;
    cluster.edge_launcher.set_nodes(&[best, host.proxy.as_node(host.name, true)]);
    eventually(|| cluster.edge.house.hosts.list().iter().any(|node| node.name() == "best")).await;
    assert_eq!(get(cluster.edge.address, "blog.test", "/").await.status, 200);
    assert_eq!(cluster.wakes(), [0, 1]);
    assert!(cluster.edge.house.hosts.remote("best").is_suspect());
}
