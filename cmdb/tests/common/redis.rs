//! A real Redis of the test's own.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use cmdb::redis::{RedisStore, Role};

/// `redis-server` on a Unix socket in a folder of its own; killed when dropped.
pub(crate) struct Redis {
    folder: tempfile::TempDir,
    child: Child,
}

impl Redis {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let child = serve(folder.path());
        let redis = Self { folder, child };
        redis.wait_until_it_answers();
        redis
    }

    pub(crate) fn address(&self) -> String {
        format!("redis+unix://{}", self.socket().display())
    }

    /// A store whose mirror has been filled; patient, for a busy machine is no Redis that is away.
    pub(crate) async fn store(&self, role: Role) -> Arc<RedisStore> {
        self.store_with(role, Duration::from_secs(10)).await
    }

    pub(crate) async fn store_with(&self, role: Role, budget: Duration) -> Arc<RedisStore> {
        let store = RedisStore::open(&self.address(), role, budget).unwrap();
        connected(&store).await;
        Arc::new(store)
    }

    /// As `kill -9` of the server; what it held is lost, as nothing is written to disk.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn start_again(&mut self) {
        self.child = serve(self.folder.path());
        self.wait_until_it_answers();
    }

    /// `SIGSTOP` or `SIGCONT`.
    pub(crate) fn signal(&self, signal: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &id]).status().unwrap().success());
    }

    /// What `redis-cli` prints.
    pub(crate) fn cli(&self, arguments: &[&str]) -> String {
        let output = Command::new("redis-cli").arg("-s").arg(self.socket()).args(arguments).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("redis.sock")
    }

    fn wait_until_it_answers(&self) {
        for _ in 0..500 {
            if self.cli(&["PING"]) == "PONG" {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("redis-server does not answer");
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(folder: &Path) -> Child {
    let socket = folder.join("redis.sock");
    let _ = std::fs::remove_file(&socket);
    Command::new("redis-server")
        .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
        .arg(&socket)
        .arg("--dir")
        .arg(folder)
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server is installed by scripts/install-missing test")
}

/// Waits until the store is told of every change.
pub(crate) async fn connected(store: &RedisStore) {
    let mut link = store.link();
    let connected = link.wait_for(|link| link.connected);
    tokio::time::timeout(Duration::from_secs(120), connected).await.expect("no link within 120 s").unwrap();
}
