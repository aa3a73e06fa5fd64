//! Several hosts as in life: each in a network namespace of its own, joined by a bridge, with links that can be cut.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};

use crate::{
    host::{Host, PATIENCE, program},
    http::{Broken, Connection, Request, Response},
    vhost::Vhost,
};

/// Where Redis listens.
const REDIS: &str = "10.77.0.1:6379";
/// Where the dispatcher of a host listens.
const DISPATCH_PORT: u16 = 8400;

/// The network and what runs in it; gone when dropped.
pub(crate) struct Lan {
    /// Begins the names of all its namespaces.
    prefix: String,
    folder: tempfile::TempDir,
    redis: Option<Child>,
    stations: Vec<Station>,
}

/// One machine.
struct Station {
    name: String,
    host: Host,
}

impl Lan {
    /// A network with a real `redis-server` in it and no host yet.
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("fcl{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = tempfile::Builder::new().prefix("fcl").tempdir_in("/tmp").expect("a folder");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("its mode");
        let key = folder.path().join("cluster.key");
        fs::write(&key, [7; 32]).expect("a key");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("its mode");
        let mut lan = Self { prefix, folder, redis: None, stations: Vec::new() };
        lan.switch();
        lan.plug("redis", 1);
        lan.redis = Some(lan.serve_redis());
        lan
    }

    /// A host that is edge and dispatcher; with vhosts it brings them as the configuration of all.
    pub(crate) fn host(&mut self, name: &str, number: u8, vhosts: Option<&[&Vhost]>) {
        let dispatch = format!("10.77.0.{number}:{DISPATCH_PORT}");
        self.join(name, number, vhosts, &["--node", name, "--dispatch", &dispatch]);
    }

    /// A pure edge.
    pub(crate) fn edge(&mut self, name: &str, number: u8) {
        self.join(name, number, None, &["--role", "edge"]);
    }

    fn join(&mut self, name: &str, number: u8, vhosts: Option<&[&Vhost]>, more: &[&str]) {
        self.plug(name, number);
        let (cmdb, key) = (format!("redis://{REDIS}"), self.key());
        let mut arguments = vec!["--cmdb", &cmdb, "--cluster-key", &key];
        arguments.extend(more);
        let files: Option<Vec<(String, Vec<u8>)>> = vhosts.map(|vhosts| {
            vhosts.iter().map(|v| (format!("{}.toml", v.name()), v.text().into_bytes())).collect()
        });
        let host = Host::up_as(self.doorway(name), files.as_deref(), &arguments, |_| {});
        self.stations.push(Station { name: name.to_owned(), host });
    }

    /// What runs on the machine of that name.
    #[track_caller]
    pub(crate) fn on(&self, name: &str) -> &Host {
        let station = self.stations.iter().find(|station| station.name == name);
        station.map_or_else(|| panic!("no machine is called {name}"), |station| &station.host)
    }

    /// One request to the proxy of that machine, from the machine itself.
    pub(crate) fn ask(&self, name: &str, request: &Request) -> Result<Response, Broken> {
        let port = self.on(name).port;
        self.within(name, || match Connection::try_open(port) {
            Ok(mut connection) => connection.exchange(request),
            Err(error) => Err(Broken::NoAnswer(error.to_string())),
        })
    }

    /// Runs something with the network of that machine.
    pub(crate) fn within<R: Send>(&self, name: &str, work: impl FnOnce() -> R + Send) -> R {
        let path = self.namespace(name);
        std::thread::scope(|scope| {
            let worker = scope.spawn(move || {
                let namespace = File::open(&path).expect("a network namespace");
                setns(namespace, CloneFlags::CLONE_NEWNET).expect("enter it");
                work()
            });
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Takes the cable out.
    pub(crate) fn cut(&self, name: &str) {
        self.ip(&["-n", &self.full("switch"), "link", "set", &cable(name), "down"]);
    }

    /// Puts it back.
    pub(crate) fn mend(&self, name: &str) {
        self.ip(&["-n", &self.full("switch"), "link", "set", &cable(name), "up"]);
    }

    /// As `kill -9` of Redis; what it held is lost.
    pub(crate) fn stop_redis(&mut self) {
        if let Some(mut redis) = self.redis.take() {
            redis.kill().expect("kill redis-server");
            redis.wait().expect("wait for redis-server");
        }
    }

    /// `SIGSTOP` or `SIGCONT`.
    pub(crate) fn signal_redis(&self, signal: nix::sys::signal::Signal) {
        let redis = self.redis.as_ref().expect("a Redis that runs");
        let pid = nix::unistd::Pid::from_raw(i32::try_from(redis.id()).expect("a pid"));
        nix::sys::signal::kill(pid, signal).expect("signal redis-server");
    }

    /// An empty one takes its place.
    pub(crate) fn start_redis(&mut self) {
        self.redis = Some(self.serve_redis());
    }

    /// What `redis-cli` prints.
    pub(crate) fn redis_cli(&self, arguments: &[&str]) -> String {
        let output = self.command("redis", "redis-cli").args(["-h", "10.77.0.1"]).args(arguments).output();
        String::from_utf8_lossy(&output.expect("redis-cli").stdout).trim().to_owned()
    }

    /// SIGTERM for all, which must leave nothing behind.
    #[track_caller]
    pub(crate) fn end(mut self) {
        for station in self.stations.drain(..).rev() {
            station.host.end();
        }
    }

    /// A program that runs `fastcontainer` with the network of that machine.
    fn doorway(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(format!("on-{name}"));
        let (namespace, program) = (self.namespace(name), program("fastcontainer"));
        let text = format!(
            "#!/bin/sh\nexec nsenter --net={} -- {} \"$@\"\n",
            namespace.display(),
            program.display()
        );
        fs::write(&path, text).expect("a script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("its mode");
        path
    }

    fn command(&self, name: &str, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.namespace(name).display())).arg("--").arg(program);
        command
    }

    fn serve_redis(&self) -> Child {
        let mut command = self.command("redis", "redis-server");
        let child = command
            .args(["--bind", "10.77.0.1", "--protected-mode", "no", "--save", "", "--appendonly", "no"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed by scripts/install-missing test");
        let end = Instant::now() + PATIENCE;
        while self.redis_cli(&["PING"]) != "PONG" {
            assert!(Instant::now() < end, "redis-server does not answer");
            std::thread::sleep(Duration::from_millis(10));
        }
        child
    }

    /// The bridge, in a namespace of its own.
    fn switch(&self) {
        let switch = self.full("switch");
        self.ip(&["netns", "add", &switch]);
        self.ip(&["-n", &switch, "link", "add", "bridge", "type", "bridge"]);
        self.ip(&["-n", &switch, "link", "set", "bridge", "up"]);
    }

    /// A machine's network: its loopback, and a cable to the bridge.
    fn plug(&self, name: &str, number: u8) {
        let (switch, full, address) = (self.full("switch"), self.full(name), format!("10.77.0.{number}/24"));
        self.ip(&["netns", "add", &full]);
        self.ip(&["-n", &full, "link", "set", "lo", "up"]);
        self.ip(&[
            "-n",
            &switch,
            "link",
            "add",
            &cable(name),
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            &full,
        ]);
        self.ip(&["-n", &switch, "link", "set", &cable(name), "master", "bridge", "up"]);
        self.ip(&["-n", &full, "address", "add", &address, "dev", "eth0"]);
        self.ip(&["-n", &full, "link", "set", "eth0", "up"]);
    }

    fn full(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    fn namespace(&self, name: &str) -> PathBuf {
        PathBuf::from("/run/netns").join(self.full(name))
    }

    fn key(&self) -> String {
        self.folder.path().join("cluster.key").display().to_string()
    }

    #[track_caller]
    fn ip(&self, arguments: &[&str]) {
        let output = Command::new("ip").args(arguments).output().expect("ip (iproute2)");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ip {arguments:?}: {stderr}");
    }
}

/// The bridge's end of a machine's cable.
fn cable(name: &str) -> String {
    format!("to-{name}")
}

impl Drop for Lan {
    fn drop(&mut self) {
        self.stations.clear();
        if let Some(redis) = &mut self.redis {
            let _ = redis.kill();
            let _ = redis.wait();
        }
        for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&format!("{}-", self.prefix)) {
                let _ = Command::new("ip").args(["netns", "delete", &name]).status();
            }
        }
    }
}
