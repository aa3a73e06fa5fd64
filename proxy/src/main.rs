//! `fastcontainer-proxy`: the proxy as a program. Starts as root, gives that up before its first thread, and serves.
#![forbid(unsafe_code)]

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use capctl::{Cap, CapState, prctl};
use clap::Parser;
use fastcontainer_proxy::{
    Config, FastContainer,
    admin::MetricsPage,
    config::{AccessLog, Cluster, Network},
    doorman,
    house::House,
    seal::ClusterKey,
    telemetry,
    tls::ClusterTls,
};
use launcher_client::paths::{DEFAULT_STATE, GROUP_ID, PROXY_UID, StateDir};
use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::{Gid, Uid, geteuid, getppid, setgroups, setresgid, setresuid},
};
use pingora::{
    server::{RunArgs, Server, ShutdownSignal, ShutdownSignalWatch, UnixShutdownSignalWatch},
    services::listening::Service,
};

/// What is logged unless `RUST_LOG` says otherwise. Pingora calls it an error when a pooled connection is just being put back by
/// another thread, several times a second under load; it takes another one.
const LOGGED: &str = "info,pingora_core=warn,pingora_core::connectors=off,pingora_proxy=warn";

/// FastContainer's reverse proxy: finds the app by host name, wakes it if it sleeps, and forwards.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Where to listen, such as 127.0.0.1:8080 or [::]:80; may be given more than once
    #[arg(long, required_unless_present = "dispatch", value_name = "ADDRESS")]
    listen: Vec<SocketAddr>,
    /// State folder, shared with the launcher
    #[arg(long, default_value = DEFAULT_STATE, value_name = "DIR")]
    state: PathBuf,
    /// User to run as when started as root
    #[arg(long, default_value_t = PROXY_UID)]
    uid: u32,
    /// Group to run as when started as root
    #[arg(long, default_value_t = GROUP_ID)]
    gid: u32,
    /// Threads that serve requests [default: one for each core]
    #[arg(long)]
    threads: Option<usize>,
    /// End when the parent process ends
    #[arg(long)]
    die_with_parent: bool,
    /// Networks whose X-Forwarded-* headers are believed, such as 10.0.0.0/8; may be given more than once
    #[arg(long, value_name = "NETWORK")]
    trust: Vec<Network>,
    /// Networks of balancers that begin each connection with a PROXY protocol header (version 1 or 2), which says who the
    /// client is; one without is closed, one from anywhere else never believed; may be given more than once
    #[arg(long, value_name = "NETWORK")]
    trust_proxy: Vec<Network>,
    /// Most requests that wait for an instance, in all apps together
    #[arg(long, default_value_t = 10_000)]
    hold_limit: usize,
    /// Seconds until a request's header must be whole, counted from the connection or the last answer
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    header_timeout: u64,
    /// Seconds that requests may go on after SIGTERM
    #[arg(long, default_value_t = 10)]
    grace: u64,
    /// Serve figures for Prometheus at http://ADDRESS/metrics; a port alone means 127.0.0.1. Without it nothing is served;
    /// `fastcontainer metrics` shows them all the same
    #[arg(long, value_name = "ADDRESS", value_parser = metrics_address)]
    metrics: Option<SocketAddr>,
    /// This host's name among several; the proxy follows the CMDB through the launcher then
    #[arg(long, value_name = "NAME", value_parser = node_name)]
    node: Option<String>,
    /// Address of the CMDB of several hosts, such as redis://10.0.0.5; without --node this proxy is an edge alone, with no
    /// launcher on its host
    #[arg(long, value_name = "URL", env = "FASTCONTAINER_CMDB", hide_env_values = true)]
    cmdb: Option<String>,
    /// Where to take requests for this host's instances from the proxies of other hosts
    #[arg(long, value_name = "ADDRESS", requires = "node")]
    dispatch: Option<SocketAddr>,
    /// File with the secret that the proxies of all hosts share, 32 bytes or more
    #[arg(long, value_name = "FILE")]
    cluster_key: Option<PathBuf>,
    /// Folder with ca.pem, node.pem and node.key (`fastcontainer ca`): mutual TLS between the proxies of all hosts
    #[arg(long, value_name = "DIR")]
    cluster_tls: Option<PathBuf>,
    /// Format of STATE/proxy/access.log
    #[arg(long, value_enum, default_value_t = AccessLog::Json)]
    access_log: AccessLog,
}

fn main() {
    if let Err(error) = run(Options::parse()) {
        tracing::error!("{error:#}");
        std::process::exit(1);
    }
}

fn run(options: Options) -> anyhow::Result<()> {
    let level = std::env::var("RUST_LOG").unwrap_or_else(|_| LOGGED.to_owned());
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(level).with_target(false).init();
    let state = StateDir::new(std::path::absolute(&options.state)?);
    raise_descriptor_limit();
    let cluster = cluster(&options)?;
    prepare_folders(&state, &options)?;
    become_unprivileged(&options)?;
    if options.die_with_parent {
        // After the change of user, which would undo it.
        let parent = getppid();
        prctl::set_pdeathsig(Some(nix::libc::SIGTERM)).context("PR_SET_PDEATHSIG")?;
        if getppid() != parent || parent.as_raw() == 1 {
            bail!("the parent process has ended already");
        }
    }
    for address in options.listen.iter().chain(&options.metrics).chain(&options.dispatch) {
        // Pingora would only log a failure and go on without this address.
        TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    }
    let config = Config {
        hold_limit: options.hold_limit,
        trusted: options.trust,
        balancers: options.trust_proxy,
        header_timeout: Duration::from_secs(options.header_timeout),
        grace: Duration::from_secs(options.grace),
        access_log: options.access_log,
        cluster,
        ..Config::new(state)
    };
    let ports = Ports { listen: options.listen, metrics: options.metrics, dispatch: options.dispatch };
    serve(config, &ports, options.threads)
}

/// What this proxy is among several hosts. Read as root, for nobody else is to read the key.
fn cluster(options: &Options) -> anyhow::Result<Option<Cluster>> {
    let key = options.cluster_key.as_deref().map(ClusterKey::read).transpose()?;
    let node = options.node.as_deref();
    let tls = options.cluster_tls.as_deref().map(|folder| ClusterTls::read(folder, node)).transpose()?;
    let unknown = key.is_none() && tls.is_none();
    match (node, &options.cmdb) {
        (None, None) => return Ok(None),
        (None, Some(_)) if unknown => bail!(
            "an edge without a launcher serves by way of other hosts only, which believe nobody without the --cluster-key (or --cluster-tls)"
        ),
        (None, Some(address)) => cmdb::redis::check(address).context("--cmdb")?,
        (Some(_), _) if unknown && options.dispatch.is_some() => {
            bail!(
                "--dispatch needs the --cluster-key (or --cluster-tls) by which it knows other hosts' proxies"
            )
        }
        (Some(_), _) => {}
    }
    let node = options.node.clone();
    Ok(Some(Cluster { node, cmdb: options.cmdb.clone(), key, tls: tls.map(Arc::new) }))
}

fn node_name(text: &str) -> Result<String, String> {
    if cmdb::compute::is_name(text) {
        Ok(text.to_owned())
    } else {
        Err("a host's name is of letters, digits, \"-\", \".\" and \"_\", a letter or digit first".to_owned())
    }
}

/// Where the proxy is reached.
struct Ports {
    listen: Vec<SocketAddr>,
    metrics: Option<SocketAddr>,
    dispatch: Option<SocketAddr>,
}

/// A port, or an address with one.
fn metrics_address(text: &str) -> Result<SocketAddr, String> {
    match text.parse::<u16>() {
        Ok(port) => Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
        Err(_) => text
            .parse()
            .map_err(|_| "write a port such as 9145, or an address such as 10.0.0.1:9145".to_owned()),
    }
}

fn serve(config: Config, ports: &Ports, threads: Option<usize>) -> anyhow::Result<()> {
    let threads = threads.or_else(|| std::thread::available_parallelism().ok().map(Into::into)).unwrap_or(1);
    let conf = FastContainer::server_conf(&config, threads);
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    let (proxy, attendants) =
        FastContainer::new(config, ports.listen.iter().chain(&ports.dispatch).copied().collect());
    let house = Arc::clone(proxy.house());
    if let Some(address) = ports.dispatch {
        let mut service = doorman::service(&server.configuration, proxy.dispatcher(), None);
        doorman::listen(&mut service, &house.config, address)?;
        server.add_service(service);
    }
    let mut service = doorman::service(&server.configuration, proxy, None);
    for address in &ports.listen {
        service.add_tcp(&address.to_string());
    }
    if let Some(address) = ports.metrics {
        let mut page = Service::new("metrics".to_owned(), MetricsPage(Arc::clone(&house)));
        page.add_tcp(&address.to_string());
        page.threads = Some(1);
        server.add_service(page);
    }
    server.add_service(attendants.link);
    server.add_service(attendants.office);
    if !ports.listen.is_empty() {
        server.add_service(service);
    }
    let signals = Signals { house: Arc::clone(&house) };
    server.run(RunArgs { shutdown_signal: Box::new(signals) });
    finish(&house);
    Ok(())
}

/// Pingora's signals; after SIGTERM it would sleep the whole grace period even when nothing is left to wait for.
struct Signals {
    house: Arc<House>,
}

#[async_trait::async_trait]
impl ShutdownSignalWatch for Signals {
    async fn recv(&self) -> ShutdownSignal {
        let signal = UnixShutdownSignalWatch.recv().await;
        if matches!(signal, ShutdownSignal::GracefulTerminate) {
            let house = Arc::clone(&self.house);
            std::thread::spawn(move || {
                let mut quiet = 0;
                // Quiet for a moment, not only between two requests of one client.
                while quiet < 5 {
                    std::thread::sleep(Duration::from_millis(50));
                    quiet = if is_idle(&house) { quiet + 1 } else { 0 };
                }
                finish(&house);
                std::process::exit(0);
            });
        }
        signal
    }
}

fn is_idle(house: &House) -> bool {
    house.seats.taken() == 0
        && house.apps().iter().flat_map(|app| app.upstreams()).all(|upstream| upstream.in_flight() == 0)
}

fn finish(house: &House) {
    telemetry::write_rest(house);
    // It may be gone already.
    let _ = fs::remove_file(house.config.state.proxy_socket());
}

/// As many connections as the system allows, not the 1024 that suit programs that use `select`.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

fn prepare_folders(state: &StateDir, options: &Options) -> anyhow::Result<()> {
    let socket_folder = state.proxy_socket().parent().map(Path::to_owned).unwrap_or_else(|| state.run());
    for (folder, mode) in [(state.proxy(), 0o700), (socket_folder, 0o750)] {
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        if geteuid().is_root() {
            fs::set_permissions(&folder, fs::Permissions::from_mode(mode))
                .and_then(|()| chown(&folder, Some(options.uid), Some(options.gid)))
                .with_context(|| format!("cannot set the owner of {}", folder.display()))?;
        }
    }
    // Of a process that was killed: its appearance must mean this one.
    match fs::remove_file(state.proxy_socket()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", state.proxy_socket().display()))
        }
        _ => Ok(()),
    }
}

/// Root only until here: of its powers just that to listen on ports below 1024 is kept.
fn become_unprivileged(options: &Options) -> anyhow::Result<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(options.uid), Gid::from_raw(options.gid));
    prctl::set_keepcaps(true).context("PR_SET_KEEPCAPS")?;
    setgroups(&[]).context("setgroups")?;
    setresgid(gid, gid, gid).with_context(|| format!("cannot become group {gid}"))?;
    setresuid(uid, uid, uid).with_context(|| format!("cannot become user {uid}"))?;
    let mut kept = CapState::empty();
    if !uid.is_root() {
        kept.permitted.add(Cap::NET_BIND_SERVICE);
        kept.effective.add(Cap::NET_BIND_SERVICE);
        kept.set_current().context("capset")?;
    }
    prctl::set_no_new_privs().context("PR_SET_NO_NEW_PRIVS")?;
    Ok(())
}
