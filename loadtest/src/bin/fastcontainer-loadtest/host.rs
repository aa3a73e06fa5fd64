//! A real FastContainer, started for one run: `fastcontainer up` with a state folder, `conf.d` and port of its own.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Deserialize;

use crate::scenario::App;

/// How long anything may take that has no time limit of its own.
const PATIENCE: Duration = Duration::from_secs(60);

/// See the module. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Host {
    child: Child,
    pub(crate) port: u16,
    program: PathBuf,
    folder: tempfile::TempDir,
}

/// A line of `fastcontainer events --json`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Event {
    pub(crate) at_unix_ms: u64,
    pub(crate) kind: String,
    pub(crate) app: Option<String>,
    pub(crate) generation: Option<u64>,
    pub(crate) message: String,
}

/// A line of the proxy's access log.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Request {
    /// When it began.
    pub(crate) at_unix_ms: u64,
    pub(crate) app: String,
    pub(crate) status: u16,
    pub(crate) generation: u64,
    pub(crate) own_us: u64,
    pub(crate) hold_us: u64,
    pub(crate) connect_us: u64,
    pub(crate) send_us: u64,
    pub(crate) first_byte_us: u64,
    pub(crate) total_us: u64,
    pub(crate) retries: u32,
}

impl Request {
    /// When it was given to an instance, ms since 1970. The log has whole ms for the begin.
    pub(crate) fn forwarded_ms(&self) -> f64 {
        ms(self.at_unix_ms, self.own_us + self.hold_us)
    }

    /// When its first byte came.
    pub(crate) fn first_byte_ms(&self) -> f64 {
        let before = self.own_us + self.hold_us + self.connect_us + self.send_us;
        ms(self.at_unix_ms, before + self.first_byte_us)
    }

    /// When it was over.
    pub(crate) fn end_ms(&self) -> f64 {
        ms(self.at_unix_ms, self.total_us)
    }

    /// All of it.
    #[expect(clippy::cast_precision_loss, reason = "µs of a request")]
    pub(crate) fn total_ms(&self) -> f64 {
        self.total_us as f64 / 1_000.0
    }
}

#[expect(clippy::cast_precision_loss, reason = "ms since 1970 are far below 2^53")]
fn ms(at_ms: u64, us: u64) -> f64 {
    at_ms as f64 + us as f64 / 1_000.0
}

impl Host {
    /// Starts it and waits until it serves.
    pub(crate) fn up(programs: &Path, apps: &[App], arguments: &[String]) -> anyhow::Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("containers need root: run the load test as root");
        }
        // Short, because a Unix socket's path may have 108 bytes only.
        let folder = tempfile::Builder::new().prefix("fclt").tempdir_in("/tmp")?;
        // Programs without root must be able to walk through it.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let conf = folder.path().join("conf.d");
        fs::create_dir(&conf)?;
        for app in apps {
            write_vhost(&conf, app)?;
        }
        let program = programs.join("fastcontainer");
        let port = free_port()?;
        let mut child = Command::new(&program)
            .arg("up")
            .arg("--conf")
            .arg(&conf)
            .arg("--state")
            .arg(folder.path().join("s"))
            .arg("--listen")
            .arg(format!("127.0.0.1:{port}"))
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(fs::File::create(folder.path().join("log"))?)
            // A Ctrl-C at the load test must not reach what it ends by itself.
            .process_group(0)
            .spawn()
            .with_context(|| format!("{} up", program.display()))?;
        let stdout = child.stdout.take().context("its stdout")?;
        let host = Self { child, port, program, folder };
        let mut lines = BufReader::new(stdout).lines();
        let ready = lines.next().and_then(Result::ok).unwrap_or_default();
        if !ready.starts_with("ready ") {
            bail!("`fastcontainer up` says {ready:?}\n{}", host.log_tail());
        }
        // Read on, so that it never writes into a closed pipe.
        std::thread::spawn(move || lines.for_each(drop));
        for app in apps.iter().filter(|app| app.warm) {
            let (status, _) = host.get(&app.host(), &app.path)?;
            if status != 200 {
                bail!("{} answers with {status} before any load\n{}", app.name, host.log_tail());
            }
        }
        Ok(host)
    }

    /// `GET path` on a connection of its own: status, and seconds until the last byte.
    pub(crate) fn get(&self, host: &str, path: &str) -> anyhow::Result<(u16, f64)> {
        let begun = Instant::now();
        let stream = TcpStream::connect(("127.0.0.1", self.port))?;
        finish_get(stream, host, path).map(|status| (status, begun.elapsed().as_secs_f64()))
    }

    /// The app's vhost file, written anew.
    pub(crate) fn rewrite(&self, app: &App) -> anyhow::Result<()> {
        write_vhost(&self.folder.path().join("conf.d"), app)
    }

    /// All events so far, oldest first.
    pub(crate) fn events(&self) -> anyhow::Result<Vec<Event>> {
        let text = self.ctl(&["events", "--json"])?;
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// The proxy's access log so far.
    pub(crate) fn requests(&self) -> anyhow::Result<Vec<Request>> {
        let text = fs::read_to_string(self.access_log()).unwrap_or_default();
        // The last line may still be being written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Where it is.
    pub(crate) fn access_log(&self) -> PathBuf {
        self.folder.path().join("s/proxy/access.log")
    }

    /// Where `ab` and others leave their files.
    pub(crate) fn scratch(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The operator's command.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(&self.program);
        command.args(arguments).arg("--state").arg(self.folder.path().join("s"));
        let output = command.output()?;
        if !output.status.success() {
            bail!("{arguments:?}: {}\n{}", String::from_utf8_lossy(&output.stderr), self.log_tail());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The name of the parent of its cgroups, as its launcher was told it.
    pub(crate) fn cgroup(&self) -> anyhow::Result<String> {
        let mine = self.folder.path().to_string_lossy().into_owned();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Ok(bytes) = fs::read(entry.path().join("cmdline")) else { continue };
            let line = String::from_utf8_lossy(&bytes).replace('\0', " ");
            let mut words = line.split(' ').skip_while(|word| *word != "--cgroup-parent");
            if let (true, Some(name)) = (line.contains(&mine), words.nth(1)) {
                return Ok(name.to_owned());
            }
        }
        bail!("no launcher is running\n{}", self.log_tail())
    }

    /// What it logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// The last lines of that.
    pub(crate) fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Ends it, which must leave nothing behind.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        self.signal(Signal::SIGTERM)?;
        let end = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > end {
                bail!("`fastcontainer up` does not end\n{}", self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let end = Instant::now() + Duration::from_secs(20);
        while matches!(self.child.try_wait(), Ok(None)) {
            // The second one makes it hurry.
            let _ = self.signal(Signal::SIGTERM);
            if Instant::now() > end {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}

/// Sends a request and reads the answer to its end; the status.
pub(crate) fn finish_get(mut stream: TcpStream, host: &str, path: &str) -> anyhow::Result<u16> {
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let line = String::from_utf8_lossy(answer.get(..12).unwrap_or_default());
    line.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no answer")
}

fn write_vhost(conf: &Path, app: &App) -> anyhow::Result<()> {
    let path = conf.join(format!("{}.toml", app.name));
    fs::write(&path, toml::to_string(&app.vhost)?).with_context(|| path.display().to_string())
}

/// A port that nobody listens on now, below the range from which the kernel takes ports for clients.
fn free_port() -> anyhow::Result<u16> {
    let start = 20_000 + u16::try_from(std::process::id() % 1_000)? * 10;
    let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    (start..start + 200).find(free).context("no port is free")
}
