//! One host: a `fastcontainer up` of its own, with its own state folder, `conf.d` and port.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::TcpListener,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    http::{Broken, Connection, Request, Response, get},
    vhost::Vhost,
};

/// How long anything may take that has no time limit of its own: the machine may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// See the module. Dropping it ends it; [`Host::end`] also looks whether it has left anything behind.
pub(crate) struct Host {
    child: Child,
    pub(crate) port: u16,
    pub(crate) state: PathBuf,
    pub(crate) conf: PathBuf,
    arguments: Vec<String>,
    program: PathBuf,
    folder: tempfile::TempDir,
}

impl Host {
    /// Starts a host that serves these vhosts, and waits until it is ready.
    pub(crate) fn up(vhosts: &[&Vhost]) -> Self {
        let files: Vec<(String, Vec<u8>)> =
            vhosts.iter().map(|v| (format!("{}.toml", v.name()), v.text().into_bytes())).collect();
        Self::up_with(&files)
    }

    /// Starts a host with these files in its `conf.d`.
    pub(crate) fn up_with(files: &[(String, Vec<u8>)]) -> Self {
        Self::up_after(files, &[], |_| {})
    }

    /// Starts a host whose programs are in `programs`, so that a test may replace one of them.
    pub(crate) fn up_from(programs: &Path, vhosts: &[&Vhost]) -> Self {
        let files: Vec<(String, Vec<u8>)> =
            vhosts.iter().map(|v| (format!("{}.toml", v.name()), v.text().into_bytes())).collect();
        Self::up_as(programs.join("fastcontainer"), files.as_slice(), &[], |_| {})
    }

    /// The same with more arguments, after `prepare` has been at the folder that holds `conf.d` and the state (`s`).
    pub(crate) fn up_after(
        files: &[(String, Vec<u8>)],
        arguments: &[&str],
        prepare: impl FnOnce(&Path),
    ) -> Self {
        Self::up_as(program("fastcontainer"), files, arguments, prepare)
    }

    /// Starts a host that brings no configuration; it has to be given other arguments that tell where there is some.
    pub(crate) fn up_without_conf(arguments: &[&str]) -> Self {
        Self::up_as(program("fastcontainer"), None, arguments, |_| {})
    }

    pub(crate) fn up_as<'a>(
        program: PathBuf,
        files: impl Into<Option<&'a [(String, Vec<u8>)]>>,
        arguments: &[&str],
        prepare: impl FnOnce(&Path),
    ) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "containers need root: run the tests as root");
        // Short, because a Unix socket's path may have 108 bytes only.
        let folder = tempfile::Builder::new().prefix("fc").tempdir_in("/tmp").expect("a folder");
        // Programs without root must be able to walk through it.
        fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("its mode");
        let conf = folder.path().join("conf.d");
        if let Some(files) = files.into() {
            fs::create_dir(&conf).expect("conf.d");
            for (name, bytes) in files {
                fs::write(conf.join(name), bytes).expect("a vhost file");
            }
        }
        prepare(folder.path());
        let state = folder.path().join("s");
        let port = free_port();
        let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let child = start(&program, &conf, &state, port, folder.path(), &arguments);
        Self { child, port, state, conf, arguments, program, folder }
    }

    /// Another `up` on the same folders, after the one before was killed.
    pub(crate) fn again(&mut self) {
        let (state, folder) = (&self.state, self.folder.path());
        self.child = start(&self.program, &self.conf, state, self.port, folder, &self.arguments);
    }

    /// One request on a connection of its own.
    pub(crate) fn ask(&self, request: &Request) -> Result<Response, Broken> {
        Connection::open(self.port).exchange(request)
    }

    /// `GET path`, which must be answered.
    #[track_caller]
    pub(crate) fn get(&self, vhost: &Vhost, path: &str) -> Response {
        match self.ask(&get(&vhost.host(), path)) {
            Ok(response) => response,
            Err(broken) => panic!("GET {path}: {broken}\n{}", self.log_tail()),
        }
    }

    /// Runs `fastcontainer ARGUMENTS --state STATE`.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> Output {
        Command::new(program("fastcontainer"))
            .args(arguments)
            .arg("--state")
            .arg(&self.state)
            .output()
            .expect("run fastcontainer")
    }

    /// Runs a command that must succeed; its stdout.
    #[track_caller]
    pub(crate) fn ctl_ok(&self, arguments: &[&str]) -> String {
        let output = self.ctl(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {:?} {stderr}\n{}", output.status, self.log_tail());
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// `ps APP`: the lines of the app.
    #[track_caller]
    pub(crate) fn ps(&self, app: &str) -> Vec<Value> {
        let text = self.ctl_ok(&["ps", app, "--json"]);
        serde_json::from_str::<Vec<Value>>(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    /// The states of the app's instances; `absent` when there is none.
    pub(crate) fn states(&self, app: &str) -> Vec<String> {
        self.ps(app).iter().map(|line| line["state"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// The app's events, oldest first.
    #[track_caller]
    pub(crate) fn events(&self, app: &str) -> Vec<Value> {
        let text = self.ctl_ok(&["events", "--app", app, "--json"]);
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect()
    }

    /// How many events of that kind the host has had, whatever the app.
    #[track_caller]
    pub(crate) fn events_of_host(&self, kind: &str) -> usize {
        let text = self.ctl_ok(&["events", "--json"]);
        text.lines().filter(|line| line.contains(&format!("\"kind\":\"{kind}\""))).count()
    }

    /// How many events of that kind the app has had.
    pub(crate) fn count(&self, app: &str, kind: &str) -> usize {
        self.events(app).iter().filter(|event| event["kind"] == kind).count()
    }

    /// Writes the vhost's file and waits until it is in force.
    #[track_caller]
    pub(crate) fn apply(&self, vhost: &Vhost) {
        let before = self.count(vhost.name(), "config-applied");
        fs::write(self.conf.join(format!("{}.toml", vhost.name())), vhost.text())
            .expect("write a vhost file");
        self.wait_for("the changed file to be in force", || {
            self.count(vhost.name(), "config-applied") > before
        });
    }

    /// Waits until something is so.
    #[track_caller]
    pub(crate) fn wait_for(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < end, "waited in vain for {what}\n{}", self.log_tail());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The pid of one of `up`'s programs, for example `fastcontainer-proxy`; its command line holds this state folder.
    #[track_caller]
    pub(crate) fn pid_of(&self, program: &str) -> i32 {
        self.find_pid_of(program).unwrap_or_else(|| panic!("no {program} runs\n{}", self.log_tail()))
    }

    /// The same, while it may be away.
    pub(crate) fn find_pid_of(&self, program: &str) -> Option<i32> {
        let runs = |line: &str| line.split(' ').next().is_some_and(|exe| exe.ends_with(program));
        let mine = processes_with(&self.state.to_string_lossy());
        mine.into_iter().find(|(_, line)| runs(line) && !line.contains(" spawner")).map(|(pid, _)| pid)
    }

    /// As if the power had failed: every process of the host is killed before any can say good-bye, its containers too.
    pub(crate) fn lose_power(&mut self) {
        let cgroup = self.cgroup();
        // It must not start again what is killed.
        kill(Pid::from_raw(self.pid()), Signal::SIGSTOP).expect("stop up");
        let state = self.state.to_string_lossy().into_owned();
        let contained = || -> Vec<i32> {
            let all = fs::read_dir("/proc").expect("/proc").flatten();
            let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
            let of_host = |pid: &i32| {
                let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
                groups.lines().any(|line| line.split('/').nth(1) == Some(cgroup.as_str()))
            };
            pids.filter(of_host).collect()
        };
        let mut pids: Vec<i32> = processes_with(&state).into_iter().map(|(pid, _)| pid).collect();
        // The spawner does not say whose it is: it is the parent of the containers.
        let parent = |pid: &i32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse::<i32>().ok())
        };
        let launchers = pids.clone();
        pids.extend(
            processes_with("fastcontainer-launcher spawner")
                .into_iter()
                .map(|(pid, _)| pid)
                .filter(|pid| parent(pid).is_some_and(|parent| launchers.contains(&parent))),
        );
        for pid in pids {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        for pid in contained() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.child.wait();
        self.wait_for("everything to be dark", || contained().is_empty());
    }

    /// `up`'s own pid.
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid")
    }

    /// Waits for the end of `up` after it was signalled.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait for up") {
                return status;
            }
            assert!(Instant::now() < end, "up does not end\n{}", self.log_tail());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The name of the parent of this host's cgroups, as the launcher was told it.
    #[track_caller]
    pub(crate) fn cgroup(&self) -> String {
        self.find_cgroup().unwrap_or_else(|| panic!("no launcher runs\n{}", self.log_tail()))
    }

    fn find_cgroup(&self) -> Option<String> {
        let mine = processes_with(&self.state.to_string_lossy());
        mine.iter().find_map(|(_, line)| {
            let mut words = line.split(' ').skip_while(|word| *word != "--cgroup-parent");
            words.nth(1).map(ToOwned::to_owned)
        })
    }

    /// SIGTERM; `up` must end by itself with success and leave nothing behind.
    #[track_caller]
    pub(crate) fn end(mut self) {
        // A pure edge has none.
        let cgroup = self.find_cgroup().unwrap_or_else(|| "fastcontainer, none".to_owned());
        kill(Pid::from_raw(self.pid()), Signal::SIGTERM).expect("signal up");
        let status = self.wait();
        assert!(status.success(), "up ended with {status:?}\n{}", self.log_tail());
        self.assert_nothing_left(&cgroup);
    }

    /// No process, mount, cgroup or socket of this host is there.
    #[track_caller]
    pub(crate) fn assert_nothing_left(&self, cgroup: &str) {
        let state = self.state.to_string_lossy().into_owned();
        self.wait_for("the processes to be gone", || processes_with(&state).is_empty());
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        assert!(!mounts.contains(&state), "a mount is left:\n{mounts}");
        assert!(!cgroup_parents().iter().any(|name| name == cgroup), "the cgroup {cgroup} is left");
        let sockets = sockets_beneath(&self.state);
        assert!(sockets.is_empty(), "sockets are left: {sockets:?}");
    }

    /// What `up` and its daemons logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// The end of it.
    pub(crate) fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// The proxy's access log, a record for each line, waited for until it has `count` lines.
    #[track_caller]
    pub(crate) fn access_log(&self, count: usize) -> Vec<Value> {
        let mut records = Vec::new();
        self.wait_for("the access log", || {
            let text = fs::read_to_string(self.state.join("proxy/access.log")).unwrap_or_default();
            records = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
            records.len() >= count
        });
        records
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Ok(path) = std::env::var("FC_KEEP_LOG") {
            let _ = fs::write(path, self.log());
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill(Pid::from_raw(self.pid()), Signal::SIGTERM);
            let end = Instant::now() + Duration::from_secs(20);
            while matches!(self.child.try_wait(), Ok(None)) {
                if Instant::now() > end {
                    let _ = self.child.kill();
                    let _ = self.child.wait();
                    for (pid, _) in processes_with(&self.state.to_string_lossy()) {
                        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                    }
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// The built program of that name.
pub(crate) fn program(name: &str) -> PathBuf {
    let folder = std::env::var_os("FC_BIN_DIR").map_or_else(
        || Path::new(env!("CARGO_BIN_EXE_fastcontainer")).parent().expect("a folder").to_owned(),
        PathBuf::from,
    );
    let path = folder.join(name);
    assert!(path.exists(), "{} is not built: run `cargo build --workspace`", path.display());
    path
}

/// Command lines that hold `text`, with their pids; this process's own and zombies' are left out.
pub(crate) fn processes_with(text: &str) -> Vec<(i32, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(bytes) = fs::read(entry.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&bytes).replace('\0', " ");
        if pid != std::process::id() as i32 && line.contains(text) {
            found.push((pid, line.trim_end().to_owned()));
        }
    }
    found
}

/// Every socket file beneath a folder.
fn sockets_beneath(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            found.extend(sockets_beneath(&entry.path()));
        } else if std::os::unix::fs::FileTypeExt::is_socket(&kind) {
            found.push(entry.path());
        }
    }
    found
}

/// The top-level cgroups of all our hosts on this machine, over all hierarchies.
pub(crate) fn cgroup_parents() -> Vec<String> {
    let mut names = Vec::new();
    let mut look = |folder: &Path| {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("fastcontainer") && !names.contains(&name) {
                names.push(name);
            }
        }
    };
    let root = Path::new("/sys/fs/cgroup");
    look(root);
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        look(&entry.path());
    }
    names
}

fn start(program: &Path, conf: &Path, state: &Path, port: u16, folder: &Path, arguments: &[String]) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(folder.join("log")).expect("a log");
    let mut command = Command::new(program);
    command.arg("up");
    if conf.is_dir() {
        command.arg("--conf").arg(conf);
    }
    let mut child = command
        .arg("--listen")
        .arg(format!("127.0.0.1:{port}"))
        .arg("--state")
        .arg(state)
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(log)
        // A Ctrl-C at the tests must not reach what a test ends by itself.
        .process_group(0)
        .spawn()
        .expect("start fastcontainer up");
    let mut lines = BufReader::new(child.stdout.take().expect("its stdout")).lines();
    let ready = lines.next().and_then(Result::ok).unwrap_or_default();
    assert!(
        ready.starts_with("ready "),
        "up says {ready:?}\n{}",
        fs::read_to_string(folder.join("log")).unwrap_or_default()
    );
    // Read on, so that it never writes into a closed pipe.
    std::thread::spawn(move || lines.for_each(drop));
    child
}

/// A port that nobody listens on now and that no other test of this process was given. Below the range from which the
/// kernel takes ports for clients, so that no connection of another test can have it.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = 10_000 + (std::process::id() as u16 % 500) * 40;
    loop {
        let taken = NEXT.fetch_add(1, Ordering::Relaxed);
        assert!(taken < 40, "no port is free from {start} on");
        if TcpListener::bind(("127.0.0.1", start + taken)).is_ok() {
            return start + taken;
        }
    }
}
