//! Redis as operators run it: with a replica and a Sentinel, and behind a network that is slow.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

/// A server on a TCP port of its own; killed when dropped.
pub(crate) struct Server {
    pub(crate) port: u16,
    child: Child,
}

/// A primary, its replica, and a Sentinel that watches both.
pub(crate) struct Sentinel {
    pub(crate) primary: Server,
    pub(crate) replica: Server,
    sentinel: Server,
    _folder: tempfile::TempDir,
}

impl Sentinel {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let primary = Server::start(&folder.path().join("primary"), &[]);
        let of = primary.port.to_string();
        let replica = Server::start(&folder.path().join("replica"), &["--replicaof", "127.0.0.1", &of]);
        let port = free_port();
        let file = folder.path().join("sentinel.conf");
        let lines = format!(
            "port {port}\nbind 127.0.0.1\ndir {}\nsentinel monitor cmdb 127.0.0.1 {of} 1\n\
             sentinel down-after-milliseconds cmdb 500\nsentinel failover-timeout cmdb 2000\n",
            folder.path().display()
        );
        fs::write(&file, lines).unwrap();
        let child = Command::new("redis-sentinel")
            .arg(&file)
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-sentinel is installed by scripts/install-missing test");
        let started = Self { primary, replica, sentinel: Server { port, child }, _folder: folder };
        started.sentinel.wait(&["PING"], "PONG");
        started.replica.wait(&["INFO", "replication"], "master_link_status:up");
        started.sentinel.wait(&["SENTINEL", "MASTER", "cmdb"], "num-slaves\n1");
        started
    }

    pub(crate) fn address(&self) -> String {
        format!("redis-sentinel://127.0.0.1:{}/cmdb", self.sentinel.port)
    }
}

impl Server {
    fn start(folder: &Path, more: &[&str]) -> Self {
        fs::create_dir(folder).unwrap();
        let port = free_port();
        let child = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port"])
            .arg(port.to_string())
            .arg("--dir")
            .arg(folder)
            .args(["--repl-diskless-sync-delay", "0"])
            .args(more)
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed by scripts/install-missing test");
        let server = Self { port, child };
        server.wait(&["PING"], "PONG");
        server
    }

    /// As `kill -9`.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn cli(&self, arguments: &[&str]) -> String {
        let port = self.port.to_string();
        let output = Command::new("redis-cli").args(["-p", &port]).args(arguments).output().unwrap();
        String::from_utf8_lossy(&output.stdout).replace('\r', "")
    }

    /// Waits until the answer holds `wanted`.
    pub(crate) fn wait(&self, arguments: &[&str], wanted: &str) {
        for _ in 0..3_000 {
            if self.cli(arguments).contains(wanted) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{arguments:?}: no {wanted:?} within 30 s");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A network between a test and a Redis on a Unix socket; what goes through it takes its time.
pub(crate) struct Relay {
    pub(crate) port: u16,
    delay_ms: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Relay {
    pub(crate) async fn to(socket: &Path) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let delay_ms = Arc::new(AtomicU64::new(0));
        let (socket, delay) = (socket.to_owned(), Arc::clone(&delay_ms));
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(pass(client, socket.clone(), Arc::clone(&delay)));
            }
        });
        Self { port, delay_ms, task }
    }

    /// Each way.
    pub(crate) fn delay(&self, ms: u64) {
        self.delay_ms.store(ms, Relaxed);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(client: TcpStream, socket: std::path::PathBuf, delay_ms: Arc<AtomicU64>) {
    let Ok(server) = UnixStream::connect(socket).await else { return };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::join!(
        one_way(from_client, to_server, Arc::clone(&delay_ms)),
        one_way(from_server, to_client, delay_ms)
    );
}

/// Late, not slow: how much goes through at a time is not limited.
async fn one_way(
    mut from: impl AsyncRead + Unpin + Send + 'static,
    mut to: impl AsyncWrite + Unpin,
    delay_ms: Arc<AtomicU64>,
) {
    let (sender, mut under_way) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    tokio::spawn(async move {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            let due = Instant::now() + Duration::from_millis(delay_ms.load(Relaxed));
            if sender.send((due, buffer[..length].to_vec())).is_err() {
                return;
            }
        }
    });
    while let Some((due, bytes)) = under_way.recv().await {
        sleep_until(due).await;
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}
