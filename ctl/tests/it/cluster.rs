//! Several hosts on one kernel, and the Redis that they share: each has a state folder, control groups and ports of its own.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    host::{Host, PATIENCE, free_port},
    vhost::Vhost,
};

/// Hosts and their Redis. The first host brings the configuration.
pub(crate) struct Cluster {
    hosts: BTreeMap<String, Host>,
    /// Those that have lost their power.
    dark: BTreeMap<String, Host>,
    pub(crate) redis: Redis,
    /// Shared by all; readable by root alone.
    pub(crate) key: PathBuf,
    folder: tempfile::TempDir,
}

impl Cluster {
    /// `count` hosts, `a`, `b`, …, each of them edge and dispatcher, that run these vhosts; waits until every host knows all
    /// of them and every other host.
    pub(crate) fn up(count: usize, vhosts: &[&Vhost]) -> Self {
        Self::up_with(count, vhosts, |_| Vec::new())
    }

    /// The same with more arguments for each host, by its name.
    pub(crate) fn up_with(count: usize, vhosts: &[&Vhost], arguments: impl Fn(&str) -> Vec<String>) -> Self {
        let mut cluster = Self::empty();
        for name in ('a'..).take(count).map(String::from) {
            let vhosts = cluster.hosts.is_empty().then_some(vhosts);
            cluster.join(&name, vhosts, &arguments(&name));
        }
        cluster.wait_until_known(vhosts);
        cluster
    }

    /// Redis alone; hosts are to [`Cluster::join`].
    pub(crate) fn empty() -> Self {
        let folder = tempfile::Builder::new().prefix("fck").tempdir_in("/tmp").expect("a folder");
        let key = folder.path().join("cluster.key");
        fs::write(&key, [7; 32]).expect("a key");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("its mode");
        Self { hosts: BTreeMap::new(), dark: BTreeMap::new(), redis: Redis::start(), key, folder }
    }

    /// One host more; with vhosts it brings them as its configuration.
    pub(crate) fn join(&mut self, name: &str, vhosts: Option<&[&Vhost]>, more: &[String]) {
        let arguments = self.arguments(name, more);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let host = match vhosts {
            Some(vhosts) => {
                let files: Vec<(String, Vec<u8>)> =
                    vhosts.iter().map(|v| (format!("{}.toml", v.name()), v.text().into_bytes())).collect();
                Host::up_after(&files, &arguments, |_| {})
            }
            None => Host::up_without_conf(&arguments),
        };
        self.hosts.insert(name.to_owned(), host);
    }

    /// What makes a host one of this cluster.
    fn arguments(&self, name: &str, more: &[String]) -> Vec<String> {
        let mut arguments: Vec<String> =
            ["--cmdb", &self.redis.address(), "--node", name].map(ToOwned::to_owned).to_vec();
        if !more.iter().any(|argument| argument == "--role") {
            arguments.extend(["--dispatch".to_owned(), format!("127.0.0.1:{}", free_port())]);
        }
        arguments.extend(["--cluster-key".to_owned(), self.key.display().to_string()]);
        arguments.extend_from_slice(more);
        arguments
    }

    /// The host of that name.
    pub(crate) fn host(&self, name: &str) -> &Host {
        self.hosts.get(name).unwrap_or_else(|| panic!("no host is called {name}"))
    }

    /// All that have power.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Host> {
        self.hosts.values()
    }

    /// Waits until every host knows all apps and all hosts.
    #[track_caller]
    pub(crate) fn wait_until_known(&self, vhosts: &[&Vhost]) {
        for host in self.hosts.values() {
            host.wait_for("every host to know all apps", || {
                let known = host.ctl_ok(&["ps", "--json"]);
                vhosts.iter().all(|vhost| known.contains(&format!("\"app\":\"{}\"", vhost.name())))
            });
            host.wait_for("every host to know all hosts", || {
                nodes(host).iter().filter(|node| node["alive"] == true).count() == self.hosts.len()
            });
        }
    }

    /// As if that host had lost its power: every process of it is killed, its containers too.
    #[track_caller]
    pub(crate) fn lose_power(&mut self, name: &str) {
        let mut host = self.hosts.remove(name).unwrap_or_else(|| panic!("no host is called {name}"));
        host.lose_power();
        self.dark.insert(name.to_owned(), host);
    }

    /// It is switched on again.
    #[track_caller]
    pub(crate) fn power_up(&mut self, name: &str) {
        let mut host = self.dark.remove(name).unwrap_or_else(|| panic!("{name} has not lost its power"));
        host.again();
        self.hosts.insert(name.to_owned(), host);
    }

    /// SIGTERM for all, which must leave nothing behind.
    #[track_caller]
    pub(crate) fn end(mut self) {
        // What a power cut has left is swept by the next start.
        for mut host in std::mem::take(&mut self.dark).into_values() {
            host.again();
            host.end();
        }
        for host in std::mem::take(&mut self.hosts).into_values().rev() {
            host.end();
        }
    }
}

/// What a host says of all hosts.
#[track_caller]
pub(crate) fn nodes(host: &Host) -> Vec<Value> {
    serde_json::from_str(&host.ctl_ok(&["nodes", "--json"])).expect("JSON")
}

/// What a host says of one.
#[track_caller]
pub(crate) fn node(host: &Host, name: &str) -> Value {
    let found = nodes(host).into_iter().find(|node| node["compute"]["name"] == name);
    found.unwrap_or_else(|| panic!("no host is called {name}\n{}", host.log_tail()))
}

/// On which hosts instances of the app are ready, as `host` sees it, by name.
#[track_caller]
pub(crate) fn ready_on(host: &Host, app: &str) -> Vec<String> {
    let lines = host.ps(app).into_iter().filter(|line| line["state"] == "ready");
    let mut nodes: Vec<String> =
        lines.map(|line| line["node"].as_str().unwrap_or_default().to_owned()).collect();
    nodes.sort_unstable();
    nodes
}

/// A real `redis-server` on a port of 127.0.0.1, killed when dropped. It keeps nothing on disk.
pub(crate) struct Redis {
    child: Child,
    port: u16,
}

impl Redis {
    pub(crate) fn start() -> Self {
        let port = free_port();
        let redis = Self { child: serve(port), port };
        redis.wait_until_it_answers();
        redis
    }

    pub(crate) fn address(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// As `kill -9` of the server; what it held is lost.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("kill redis-server");
        self.child.wait().expect("wait for redis-server");
    }

    pub(crate) fn start_again(&mut self) {
        self.child = serve(self.port);
        self.wait_until_it_answers();
    }

    /// What `redis-cli` prints.
    pub(crate) fn cli(&self, arguments: &[&str]) -> String {
        let port = self.port.to_string();
        let output = Command::new("redis-cli").args(["-p", &port]).args(arguments).output();
        String::from_utf8_lossy(&output.expect("redis-cli").stdout).trim().to_owned()
    }

    /// `SIGSTOP` or `SIGCONT`.
    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).expect("signal redis-server");
    }

    fn wait_until_it_answers(&self) {
        let end = Instant::now() + PATIENCE;
        while self.cli(&["PING"]) != "PONG" {
            assert!(Instant::now() < end, "redis-server does not answer");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(port: u16) -> Child {
    Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server is installed by scripts/install-missing test")
}
