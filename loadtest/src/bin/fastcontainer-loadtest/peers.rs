//! The same warm and cold work for FastContainer and for others from Debian, in turns.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use serde::Deserialize;

use crate::{
    claim::Finding,
    host::{Host, finish_get},
    report::Table,
    run::Place,
    scenario::{Amount, App},
    sheet::{Bar, Panel, Picture, Sheet},
    stats::quantile,
    tools::{Target, wrk},
};

/// `[peers]` of a scenario file. The apps are `static` and `php`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct PeersPlan {
    /// Rounds of warm work, in turns.
    pub(crate) rounds: Amount,
    /// Seconds of each.
    pub(crate) seconds: Amount,
    /// wrk's connections.
    pub(crate) clients: Amount,
    /// Cold starts of each that can be cold.
    pub(crate) cold: Amount,
    /// The program that `static` runs, for those that have no containers.
    pub(crate) program: PathBuf,
    /// The folder that `php` serves.
    pub(crate) pages: PathBuf,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Compared {
    pub(crate) table: Table,
    pub(crate) notes: Vec<String>,
    pub(crate) findings: Vec<Finding>,
    pub(crate) pictures: Vec<Picture>,
}

/// One who serves.
struct Peer {
    name: String,
    target: Target,
    cold: Cold,
    rates: Vec<f64>,
    p50s: Vec<f64>,
    p99s: Vec<f64>,
    colds: Vec<f64>,
    failed: u64,
}

/// How it is made to have nothing running.
enum Cold {
    /// It always runs.
    Never,
    /// `fastcontainer stop APP`.
    Stop(String),
    /// `fastcontainer stop APP`, asked once, left alone until it is frozen.
    Freeze(String),
    /// Left alone until php-fpm's master has no children.
    Childless(u32),
    /// Left alone until nothing runs this program.
    Gone(PathBuf),
}

/// Where Debian has Passenger for Apache.
const PASSENGER: &str = "/usr/lib/apache2/modules/mod_passenger.so";

/// Processes that end with this; in the order in which they were started.
#[derive(Default)]
struct Staff(Vec<Child>);

impl Drop for Staff {
    fn drop(&mut self) {
        for child in self.0.iter_mut().rev() {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
            // All of them end their own workers on SIGTERM.
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = child.wait();
        }
    }
}

/// Does the work.
pub(crate) fn compare(plan: &PeersPlan, apps: &[App], place: Place<'_>) -> anyhow::Result<Compared> {
    let host = Host::up(place.programs, apps, &[])?;
    if place.before_others {
        crate::kernel::put_before_others(&host.cgroup()?)?;
    }
    let folder = tempfile::Builder::new().prefix("fcpeers").tempdir_in("/tmp")?;
    fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let mut staff = Staff::default();
    let mut notes = Vec::new();
    let mut peers = Vec::new();
    for app in apps {
        let cold = if app.name.ends_with("-frozen") { Cold::Freeze } else { Cold::Stop };
        let target = Target { port: host.port, host: app.host(), path: app.path.clone() };
        peers.push(Peer::new(format!("FastContainer, {}", app.name), target, cold(app.name.clone())));
    }
    peers.extend(others(plan, place.root, folder.path(), &mut staff, &mut notes)?);

    for peer in &peers {
        peer.wait_until_it_serves()?;
    }
    for _ in 0..plan.rounds.whole(place.long) {
        for peer in &mut peers {
            peer.work(plan.clients.whole(place.long), plan.seconds.of(place.long))?;
        }
    }
    for _ in 0..plan.cold.whole(place.long) {
        for peer in &mut peers {
            peer.start_cold(&host)?;
        }
    }
    drop(staff);
    host.end()?;
    let failed: u64 = peers.iter().map(|peer| peer.failed).sum();
    let finding = Finding {
        words: "everybody answered everything with 2xx".to_owned(),
        measured: format!("{failed} requests failed"),
        holds: failed == 0,
    };
    Ok(Compared {
        table: table(&peers),
        notes,
        findings: vec![finding],
        pictures: vec![picture(&peers).draw()?],
    })
}

impl Peer {
    fn new(name: impl Into<String>, target: Target, cold: Cold) -> Self {
        let (rates, p50s, p99s, colds) = Default::default();
        Self { name: name.into(), target, cold, rates, p50s, p99s, colds, failed: 0 }
    }

    fn get(&self) -> anyhow::Result<(u16, f64)> {
        let begun = Instant::now();
        let stream = TcpStream::connect(("127.0.0.1", self.target.port))?;
        let status = finish_get(stream, &self.target.host, &self.target.path)?;
        Ok((status, begun.elapsed().as_secs_f64() * 1_000.0))
    }

    fn wait_until_it_serves(&self) -> anyhow::Result<()> {
        let end = Instant::now() + Duration::from_secs(20);
        while !self.get().is_ok_and(|(status, _)| status == 200) {
            if Instant::now() > end {
                bail!("{} does not serve", self.name);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn work(&mut self, clients: u32, seconds: f64) -> anyhow::Result<()> {
        let told = wrk(&self.target, clients, seconds, None)?;
        #[expect(clippy::cast_precision_loss, reason = "a count of requests")]
        self.rates.push(told.complete as f64 / told.seconds.max(0.001));
        self.p50s.extend(told.p50_ms);
        self.p99s.extend(told.p99_ms);
        self.failed += told.failed;
        Ok(())
    }

    fn start_cold(&mut self, host: &Host) -> anyhow::Result<()> {
        match &self.cold {
            Cold::Never => return Ok(()),
            Cold::Stop(app) => drop(host.ctl(&["stop", app])?),
            Cold::Freeze(app) => {
                self.get()?;
                let is_frozen = || Ok(host.ctl(&["ps", app, "--json"])?.contains("\"frozen\""));
                wait_for("frozen", is_frozen)?;
            }
            Cold::Childless(master) => {
                wait_for("without children", || Ok(children(*master).is_empty()))?;
            }
            Cold::Gone(program) => wait_for("without its app", || Ok(!runs(program)))?,
        }
        let (status, ms) = self.get()?;
        self.failed += u64::from(status != 200);
        self.colds.push(ms);
        Ok(())
    }
}

fn wait_for(what: &str, is_so: impl Fn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_so()? {
        if Instant::now() > end {
            bail!("waited in vain for it to be {what}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The pids of a process's children.
fn children(pid: u32) -> Vec<String> {
    let is_child = |stat: &str| {
        let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)?.parse::<u32>().ok());
        parent == Some(pid)
    };
    let names = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned());
    names
        .filter(|name| fs::read_to_string(format!("/proc/{name}/stat")).is_ok_and(|stat| is_child(&stat)))
        .collect()
}

/// Whether some process runs the program.
fn runs(program: &Path) -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .into_iter()
        .any(|process| fs::read_link(process.path().join("exe")).is_ok_and(|exe| exe == program))
}

/// Those that are installed, started; of the others a note is made.
fn others(
    plan: &PeersPlan,
    root: &Path,
    folder: &Path,
    staff: &mut Staff,
    notes: &mut Vec<String>,
) -> anyhow::Result<Vec<Peer>> {
    let mut peers = Vec::new();
    let ports = free_ports()?;
    let target = |port| Target { port, host: "peer.test".to_owned(), path: "/".to_owned() };
    let direct = ports[0];
    staff.hire(Command::new(root.join(&plan.program)).env("PORT", direct.to_string()))?;
    peers.push(Peer::new("no proxy, static", target(direct), Cold::Never));

    let nginx = find("nginx", &["/usr/sbin/nginx"]);
    let fpm = find("php-fpm", &["/usr/sbin/php-fpm", "/usr/sbin/php-fpm8.2", "/usr/sbin/php-fpm8.4"]);
    let mut servers = format!(
        "server {{ listen 127.0.0.1:{}; location / {{ proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection \"\"; }} }}\n",
        ports[1]
    );
    if let (Some(_), Some(fpm)) = (&nginx, &fpm) {
        let socket = folder.join("fpm.sock");
        let file = folder.join("fpm.conf");
        // Its own limits: as many children as Apache may have workers, each gone after a second without work.
        let conf = format!(
            "[global]\nerror_log = {0}/fpm.log\ndaemonize = no\n[php]\nuser = www-data\ngroup = www-data\nlisten = {1}\n\
             listen.mode = 0666\npm = ondemand\npm.max_children = 64\npm.process_idle_timeout = 1s\n",
            folder.display(),
            socket.display()
        );
        fs::write(&file, conf)?;
        let master = staff.hire(Command::new(fpm).arg("-F").arg("-y").arg(&file))?;
        servers += &format!(
            "server {{ listen 127.0.0.1:{}; location / {{ fastcgi_pass unix:{}; fastcgi_param SCRIPT_FILENAME {}/index.php; \
             fastcgi_param REQUEST_METHOD $request_method; }} }}\n",
            ports[2],
            socket.display(),
            root.join(&plan.pages).display()
        );
        peers.push(Peer::new("nginx and php-fpm ondemand, php", target(ports[2]), Cold::Childless(master)));
    }
    if let Some(nginx) = &nginx {
        let file = folder.join("nginx.conf");
        let conf = format!(
            "worker_processes auto; daemon off; pid {0}/nginx.pid; error_log {0}/nginx.err;\nevents {{ worker_connections 2048; }}\n\
             http {{ access_log {0}/nginx.log; client_body_temp_path {0}/b; proxy_temp_path {0}/p; fastcgi_temp_path {0}/f; \
             uwsgi_temp_path {0}/u; scgi_temp_path {0}/s;\nupstream app {{ server 127.0.0.1:{direct}; keepalive 64; }}\n{servers}}}\n",
            folder.display()
        );
        fs::write(&file, conf)?;
        staff.hire(Command::new(nginx).arg("-c").arg(&file))?;
        peers.push(Peer::new("nginx, static", target(ports[1]), Cold::Never));
    }
    let haproxy = find("haproxy", &["/usr/sbin/haproxy"]);
    if let Some(haproxy) = &haproxy {
        let file = folder.join("haproxy.cfg");
        let conf = format!(
            "defaults\n mode http\n timeout client 60s\n timeout server 60s\n timeout connect 5s\nfrontend f\n bind 127.0.0.1:{}\n \
             default_backend b\nbackend b\n server s 127.0.0.1:{direct}\n",
            ports[3]
        );
        fs::write(&file, conf)?;
        staff.hire(Command::new(haproxy).arg("-db").arg("-f").arg(&file))?;
        peers.push(Peer::new("HAProxy, static", target(ports[3]), Cold::Never));
    }
    let apache = find("apache2", &["/usr/sbin/apache2"]).filter(|_| Path::new(PASSENGER).is_file());
    if let Some(apache) = &apache {
        let program = folder.join("passenger").join("hello");
        fs::create_dir_all(folder.join("passenger/public"))?;
        // A copy, so that its processes can be told from those of the others.
        fs::copy(root.join(&plan.program), &program)?;
        let file = folder.join("passenger.conf");
        fs::write(&file, passenger(folder, ports[4]))?;
        staff.hire(Command::new(apache).args(["-D", "FOREGROUND", "-f"]).arg(&file))?;
        peers.push(Peer::new("Passenger, static", target(ports[4]), Cold::Gone(program)));
    }
    let found = [
        ("nginx", nginx.is_some()),
        ("php-fpm", fpm.is_some()),
        ("haproxy", haproxy.is_some()),
        ("Passenger (libapache2-mod-passenger)", apache.is_some()),
    ];
    for (name, found) in found {
        if !found {
            notes.push(format!("{name} is not installed here, and was left out"));
        }
    }
    Ok(peers)
}

/// Apache with Passenger, which starts the same program when somebody asks for it and ends it a second later.
fn passenger(folder: &Path, port: u16) -> String {
    let modules = "/usr/lib/apache2/modules";
    format!(
        "ServerRoot {0}\nServerName peer.test\nListen 127.0.0.1:{port}\nPidFile {0}/apache.pid\nErrorLog {0}/apache.err\nUser www-data\nGroup www-data\n\
         LoadModule mpm_event_module {modules}/mod_mpm_event.so\nLoadModule authz_core_module {modules}/mod_authz_core.so\n\
         LoadModule passenger_module {PASSENGER}\nPassengerRoot /usr/lib/ruby/vendor_ruby/phusion_passenger/locations.ini\n\
         PassengerInstanceRegistryDir {0}/passenger\nPassengerDisableSecurityUpdateCheck on\nPassengerDisableAnonymousTelemetry on\n\
         PassengerMinInstances 0\nPassengerPoolIdleTime 1\nDocumentRoot {0}/passenger/public\nPassengerAppRoot {0}/passenger\n\
         PassengerAppStartCommand \"env PORT=$PORT {0}/passenger/hello\"\n<Directory {0}/passenger/public>\nRequire all granted\n</Directory>\n",
        folder.display()
    )
}

impl Staff {
    fn hire(&mut self, command: &mut Command) -> anyhow::Result<u32> {
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = quiet.spawn().with_context(|| format!("{command:?}"))?;
        let pid = child.id();
        self.0.push(child);
        Ok(pid)
    }
}

fn find(name: &str, usual: &[&str]) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&paths).map(|folder| folder.join(name));
    in_path.chain(usual.iter().map(PathBuf::from)).find(|path| path.is_file())
}

/// Five that nobody listens on now.
fn free_ports() -> anyhow::Result<[u16; 5]> {
    let start = 18_000 + u16::try_from(std::process::id() % 500)? * 5;
    let mut free = (start..start + 400).filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
    let mut next = || free.next().context("no port is free");
    Ok([next()?, next()?, next()?, next()?, next()?])
}

fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

fn table(peers: &[Peer]) -> Table {
    let head =
        ["who", "requests/s", "p50 ms", "p99 ms", "first answer from cold: p50 ms", "worst ms", "failed"];
    let ms = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |ms| format!("{ms:.2}"));
    let row = |peer: &Peer| {
        vec![
            peer.name.clone(),
            median(&peer.rates).map_or_else(|| "–".to_owned(), |rate| format!("{rate:.0}")),
            ms(median(&peer.p50s)),
            ms(median(&peer.p99s)),
            ms(median(&peer.colds)),
            ms(quantile(&peer.colds, 1.0)),
            peer.failed.to_string(),
        ]
    };
    Table { head: head.map(ToOwned::to_owned).into(), rows: peers.iter().map(row).collect() }
}

fn picture(peers: &[Peer]) -> Sheet {
    let bars = |value: &dyn Fn(&Peer) -> Option<f64>, colour| -> Vec<Bar> {
        peers
            .iter()
            .filter_map(|peer| Some(Bar { name: peer.name.clone(), colour, value: value(peer)? }))
            .collect()
    };
    let panel = |y_name: &str, bars| Panel { y_name: y_name.into(), height: 240, bars, ..Panel::default() };
    Sheet {
        title: "The same work, warm and from cold (medians)".into(),
        panels: vec![
            panel("warm: p50, ms", bars(&|peer| median(&peer.p50s), 1)),
            panel("from cold: first answer, ms", bars(&|peer| median(&peer.colds), 2)),
        ],
    }
}
