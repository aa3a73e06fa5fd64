//! An edge alone, as a process: no launcher on its host, only Redis and the dispatchers of other hosts.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at what it did not expect"
)]

mod common;

use std::{
    fs::{self, Permissions},
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use cmdb::{
    Store as _,
    compute::Load,
    redis::{BUDGET, HEARTBEAT, RedisStore, Role},
};
use common::*;
use launcher_client::paths::StateDir;
use tokio::{task::JoinHandle, time::sleep};

/// Ends the process when the test ends, however it ends.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        Self(command.stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Redis in a folder, reached by a Unix socket.
struct Redis {
    _process: Running,
    url: String,
}

impl Redis {
    async fn start(folder: &Path) -> Self {
        let socket = folder.join("redis.sock");
        let process = Running::start(
            Command::new("redis-server")
                .args(["--port", "0", "--save", "", "--unixsocketperm", "777", "--unixsocket"])
                .arg(&socket)
                .arg("--dir")
                .arg(folder),
        );
        eventually(|| std::os::unix::net::UnixStream::connect(&socket).is_ok()).await;
        Self { _process: process, url: format!("redis+unix://{}", socket.display()) }
    }
}

/// A host that runs apps: its launcher is a fake one, its heart beats in the real CMDB.
struct Host {
    launcher: FakeLauncher,
    _proxy: Proxy,
    heart: JoinHandle<()>,
}

impl Host {
    async fn start(redis: &Redis, web: &Web) -> Self {
        let launcher = FakeLauncher::start_on("b");
        launcher.put(app("blog"), web.port);
        let proxy = Proxy::start_in_cluster(&launcher, Some("b")).await;
        let store = RedisStore::open(&redis.url, Role::Node("b".to_owned()), BUDGET).unwrap();
        store.link().wait_for(|link| link.filled).await.unwrap();
        store.put_app(app("blog")).await.unwrap();
        let compute = proxy.as_node("b", true).compute;
        store.beat(&compute, Load::default()).await.unwrap();
        let heart = tokio::spawn(async move {
            loop {
                sleep(HEARTBEAT).await;
                let _ = store.beat(&compute, Load::default()).await;
            }
        });
        Self { launcher, _proxy: proxy, heart }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.heart.abort();
    }
}

struct Edge {
    _process: Running,
    address: SocketAddr,
}

impl Edge {
    async fn start(folder: &Path, redis: &str) -> Self {
        let (address, key) = (free_address(), key(folder));
        let state = StateDir::new(folder.join("edge"));
        // Of one that was killed.
        let _ = fs::remove_file(state.proxy_socket());
        let process = Running::start(
            Command::new(env!("CARGO_BIN_EXE_fastcontainer-proxy"))
                .args(["--listen", &address.to_string(), "--threads", "2", "--die-with-parent"])
                .arg("--state")
                .arg(state.root())
                .arg("--cluster-key")
                .arg(key)
                .env("FASTCONTAINER_CMDB", redis),
        );
        eventually(|| state.proxy_socket().exists()).await;
        Self { _process: process, address }
    }
}

fn key(folder: &Path) -> PathBuf {
    let path = folder.join("cluster.key");
    fs::write(&path, KEY).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    path
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    // The edge gives up root, and has to reach Redis' socket all the same.
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_alone_wakes_and_serves_what_other_hosts_run() {
    let (folder, web) = (folder(), Web::saying("hello").await);
    let redis = Redis::start(folder.path()).await;
    let host = Host::start(&redis, &web).await;
    let edge = Edge::start(folder.path(), &redis.url).await;

    let requests: Vec<_> = (0..20).map(|_| tokio::spawn(get(edge.address, "blog.test", "/"))).collect();
    for request in requests {
        let response = request.await.unwrap();
        assert_eq!((response.status, response.body.as_str()), (200, "hello"));
    }
    assert_eq!(host.launcher.wakes("blog"), 1);
    assert_eq!(get(edge.address, "unknown.test", "/").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_that_starts_while_redis_is_gone_serves_what_it_knew() {
    let (folder, web) = (folder(), Web::saying("hello").await);
    let redis = Redis::start(folder.path()).await;
    let _host = Host::start(&redis, &web).await;
    let edge = Edge::start(folder.path(), &redis.url).await;
    assert_eq!(get(edge.address, "blog.test", "/").await.status, 200);
    let known = StateDir::new(folder.path().join("edge")).proxy().join("cmdb.last-known-good");
    eventually(|| known.exists()).await;
    let url = redis.url.clone();
    drop((edge, redis));

    let edge = Edge::start(folder.path(), &url).await;
    assert_eq!(get(edge.address, "blog.test", "/").await.body, "hello");
}

#[test]
fn an_edge_without_a_key_or_with_a_bad_one_says_so() {
    let folder = folder();
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_fastcontainer-proxy"))
            .args(["--listen", "127.0.0.1:0", "--state"])
            .arg(folder.path().join("edge"))
            .args(arguments)
            .output()
            .unwrap();
        assert!(!output.status.success(), "{arguments:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let short = folder.path().join("short");
    fs::write(&short, "secret\n").unwrap();
    let short = short.to_str().unwrap();
    let url = "redis://127.0.0.1:1";
    let said = run(&["--cmdb", url]);
    assert!(said.contains("--cluster-key"), "{said}");
    let said = run(&["--cmdb", url, "--cluster-key", short]);
    assert!(said.contains("32") && said.contains("openssl rand"), "{said}");
    let good = folder.path().join("good");
    fs::write(&good, [7; 32]).unwrap();
    fs::set_permissions(&good, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let said = run(&["--cmdb", "http://x", "--cluster-key", good.to_str().unwrap()]);
    assert!(said.contains("redis://"), "{said}");
    let said = run(&["--dispatch", "127.0.0.1:0"]);
    assert!(said.contains("--node"), "{said}");
    let said = run(&["--node", "a b"]);
    assert!(said.contains("letters"), "{said}");
}
