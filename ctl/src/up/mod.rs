//! `up`: everything on one host, in the foreground.

mod cluster;
mod folder;
mod hang;
mod leftovers;
mod page;
mod service;

use std::{
    ffi::OsString,
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    time::Duration,
};

use launcher_client::{
    Client,
    admin::{self, Answer, Question},
    paths::StateDir,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, sleep, timeout},
};

use self::{
    cluster::Cluster,
    service::{Kept, Service},
};
use crate::{
    check,
    cli::{self, Global},
    failure::Failure,
    launcher,
    output::{Output, Style},
};

const LAUNCHER: &str = "fastcontainer-launcher";
const COREAPI: &str = "fastcontainer-coreapi";
const PROXY: &str = "fastcontainer-proxy";
pub(crate) const PROGRAMS: [&str; 3] = [LAUNCHER, COREAPI, PROXY];

/// How long the start may take in all.
const START: Duration = Duration::from_secs(60);
/// How long a former launcher, or a former proxy's address, may take to go.
const FORMER: Duration = Duration::from_secs(20);
/// How long an earlier `up` that is ending may take to go.
const EARLIER: Duration = Duration::from_secs(10);

/// Runs the command.
pub(crate) async fn run(global: &Global, options: &cli::Up, out: &mut Output) -> Result<(), Failure> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Failure::usage(
            "`up` must be run as root, because it makes containers: sudo fastcontainer up",
        ));
    }
    let programs = [find(LAUNCHER)?, find(COREAPI)?, find(PROXY)?];
    let cluster = Cluster::of(&options.among)?;
    let conf = configuration(options, &cluster)?;
    let vhosts = conf.as_deref().map(check::load_and_complain).unwrap_or_default();
    let mut signals = Signals::listen()?;

    let root = folder::make(&global.state)?;
    let mut lock = tokio::select! {
        lock = folder::Lock::take(&root, EARLIER) => lock?,
        () = signals.end() => return Ok(()),
    };
    let cgroup = folder::cgroup_name(&root);
    tracing::debug!("state folder {}, cgroup {cgroup}", root.display());
    raise_file_limit();

    let _page = match options.metrics {
        Some(address) => Some(page::Page::open(address, StateDir::new(&root)).await?),
        None => None,
    };
    let mut kept = Vec::new();
    let plan =
        Plan { root: &root, conf: conf.as_deref(), cgroup: &cgroup, cluster: &cluster, vhosts: &vhosts };
    let start = start(&plan, options, &programs, &mut kept);
    let started = tokio::select! {
        started = timeout(START, start) => started.unwrap_or_else(|_| {
            Err(Failure::failed(format!("not everything was ready within {} s; see the log above", START.as_secs())))
        }),
        () = signals.end() => Err(Failure::Told),
    };
    let served = match started {
        Ok(()) => match announce(&answers(options), &vhosts, out) {
            Ok(()) | Err(Failure::ReaderLeft) => {
                let watched = async {
                    match kept.iter().find(|kept| kept.name() == LAUNCHER) {
                        Some(launcher) => {
                            hang::watch(&StateDir::new(&root).launcher_socket(), launcher).await
                        }
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = serve(&kept, &mut signals) => {}
                    () = watched => {}
                }
                Ok(())
            }
            Err(failure) => Err(failure),
        },
        // Ctrl-C before it was ready is no failure.
        Err(Failure::Told) => Ok(()),
        Err(failure) => Err(failure),
    };
    lock.ending();
    let clean = stop(kept, &mut signals, &root, &cgroup).await;
    served.and(clean)
}

/// The folder of vhost files that this host brings. With many hosts it does so only when it is told to: a folder that
/// happens to be there must not take everybody's apps away.
fn configuration(options: &cli::Up, cluster: &Cluster) -> Result<Option<PathBuf>, Failure> {
    if options.among.role == cli::Role::Edge && options.serve.api.is_some() {
        return Err(Failure::usage("an edge has no API: give --api to a host that runs apps"));
    }
    let folder = match &options.conf {
        Some(folder) if options.among.role == cli::Role::Edge => {
            let message = format!(
                "an edge brings no configuration: give --conf {} to a host that runs apps",
                folder.display()
            );
            return Err(Failure::usage(message));
        }
        Some(folder) => folder.as_path(),
        None if cluster.has_others() => return Ok(None),
        None => Path::new("conf.d"),
    };
    let fault = |error| Failure::failed(format!("the folder {} cannot be read: {error}", folder.display()));
    std::fs::canonicalize(folder).map(Some).map_err(fault)
}

/// Where visitors come in.
fn listen(options: &cli::Up) -> &[SocketAddr] {
    if options.among.role == cli::Role::Dispatch { &[] } else { &options.listen }
}

/// Where requests are answered.
fn answers(options: &cli::Up) -> Vec<SocketAddr> {
    match options.among.role {
        cli::Role::Dispatch => options.among.dispatch.into_iter().collect(),
        cli::Role::Edge | cli::Role::Both => options.listen.clone(),
    }
}

/// What is to be started.
struct Plan<'a> {
    root: &'a Path,
    conf: Option<&'a Path>,
    cgroup: &'a str,
    cluster: &'a Cluster,
    vhosts: &'a [check::Vhost],
}

/// Starts the daemons, each when what it needs is there, and returns when requests are answered.
async fn start(
    plan: &Plan<'_>,
    options: &cli::Up,
    programs: &[PathBuf; 3],
    kept: &mut Vec<Kept>,
) -> Result<(), Failure> {
    let Plan { root, conf, cgroup, cluster, vhosts } = *plan;
    folder::wait_for_former_launcher(root, FORMER).await?;
    for address in listen(options).iter().chain(&options.among.dispatch) {
        wait_until_free(*address).await?;
    }
    let [launcher, coreapi, proxy] = programs;
    let state = StateDir::new(root);
    let runs_apps = options.among.role != cli::Role::Edge;
    let common = |args: &[&dyn AsRef<std::ffi::OsStr>]| -> Vec<OsString> {
        let mut all: Vec<OsString> = vec!["--state".into(), root.into()];
        all.extend(args.iter().map(|arg| arg.as_ref().to_owned()));
        all.push("--die-with-parent".into());
        all
    };

    let client = if runs_apps {
        let mut args = common(&[&"--cgroup-parent", &cgroup]);
        launchers_arguments(root, options, &mut args)?;
        cluster.for_launcher(&options.among, options.serve.api, &mut args);
        let grace = Duration::from_secs(40);
        let cmdb = cluster.environment();
        kept.push(Service { name: LAUNCHER, program: launcher.clone(), args, cmdb, grace }.keep());
        let socket = state.launcher_socket();
        Some(unless_it_ends(kept, wait_for_launcher(&socket)).await??)
    } else {
        None
    };
    if runs_apps {
        let (mut args, grace) = (common(&[]), Duration::from_secs(5));
        args.extend(conf.into_iter().flat_map(|conf| ["--conf".into(), OsString::from(conf)]));
        cluster.for_coreapi(&mut args);
        for_api(&options.serve, &mut args)?;
        kept.push(Service { name: COREAPI, program: coreapi.clone(), args, cmdb: None, grace }.keep());
    }
    // A former proxy that is on its way out may answer there still, and must not be taken for the new one.
    let _ = std::fs::remove_file(state.proxy_socket());
    let mut args = common(&[]);
    for address in listen(options) {
        args.extend(["--listen".into(), address.to_string().into()]);
    }
    for (option, networks) in [("--trust", &options.trust), ("--trust-proxy", &options.trust_proxy)] {
        networks.iter().for_each(|network| args.extend([option.into(), network.into()]));
    }
    cluster.for_proxy(&options.among, &mut args);
    // Beside a launcher it knows what the launcher knows.
    let cmdb = if runs_apps { None } else { cluster.environment() };
    let grace = Duration::from_secs(20);
    kept.push(Service { name: PROXY, program: proxy.clone(), args, cmdb, grace }.keep());
    unless_it_ends(kept, async {
        wait_for_proxy(&state.proxy_socket(), listen(options)).await;
        if let Some(client) = &client {
            wait_for_apps(client, &state.proxy_socket(), vhosts).await;
        }
    })
    .await
}

/// What the launcher is told of this host.
fn launchers_arguments(root: &Path, options: &cli::Up, args: &mut Vec<OsString>) -> Result<(), Failure> {
    if let Some(datapool) = folder::own_or_chosen(root, "datapool", options.datapool.as_deref())? {
        args.extend(["--datapool".into(), datapool.into()]);
    }
    if let Some(hooks) = folder::own_or_chosen(root, "hooks", options.hooks.as_deref())? {
        args.extend(["--hooks".into(), hooks.into()]);
    }
    if let Some(user) = &options.hook_user {
        args.extend(["--hook-user".into(), user.into()]);
    }
    args.extend(["--governor".into(), options.governor.to_string().into()]);
    if let Some(keep_free) = options.keep_free {
        args.extend(["--keep-free".into(), keep_free.0.to_string().into()]);
    }
    if let Some(pool) = &options.network_pool {
        args.extend(["--network-pool".into(), pool.into()]);
    }
    for server in &options.network_dns {
        args.extend(["--network-dns".into(), server.to_string().into()]);
    }
    if let Some(space) = options.image_space {
        args.extend(["--image-space".into(), space.to_string().into()]);
    }
    if let Some(file) = &options.registry_auth {
        let file = std::fs::canonicalize(file)
            .map_err(|error| Failure::failed(format!("--registry-auth {}: {error}", file.display())))?;
        args.extend(["--registry-auth".into(), file.into()]);
    }
    if let Some(file) = &options.registry_ca {
        let file = std::fs::canonicalize(file)
            .map_err(|error| Failure::failed(format!("--registry-ca {}: {error}", file.display())))?;
        args.extend(["--registry-ca".into(), file.into()]);
    }
    for registry in &options.insecure_registry {
        args.extend(["--insecure-registry".into(), registry.into()]);
    }
    if let Some(low) = options.memory_low {
        args.extend(["--memory-low".into(), low.0.to_string().into()]);
    }
    args.extend(["--memory-stall".into(), options.memory_stall.to_string().into()]);
    if let Some(meminfo) = &options.meminfo {
        args.extend(["--meminfo".into(), meminfo.into()]);
    }
    Ok(())
}

/// What the CoreAPI is told of the API.
fn for_api(serve: &cli::api::Serve, args: &mut Vec<OsString>) -> Result<(), Failure> {
    if let Some(address) = serve.api {
        args.extend(["--api".into(), address.to_string().into()]);
    }
    if let Some(file) = &serve.tokens {
        let file = std::fs::canonicalize(file)
            .map_err(|error| Failure::failed(format!("--tokens {}: {error}", file.display())))?;
        args.extend(["--tokens".into(), file.into()]);
    }
    Ok(())
}

/// `work`, unless one of the daemons ends before it is done: at the start that is an error to be shown, not to be retried.
async fn unless_it_ends<T>(kept: &[Kept], work: impl Future<Output = T>) -> Result<T, Failure> {
    let mut ends: Vec<_> = kept.iter().map(|kept| Box::pin(kept.ends_too_soon())).collect();
    let any_end = std::future::poll_fn(|context| {
        for end in &mut ends {
            if let std::task::Poll::Ready(how) = end.as_mut().poll(context) {
                return std::task::Poll::Ready(how);
            }
        }
        std::task::Poll::Pending
    });
    tokio::select! {
        done = work => Ok(done),
        how = any_end => Err(Failure::failed(format!("{how} before it was ready; see its message above"))),
    }
}

async fn wait_for_launcher(socket: &Path) -> Result<Client, Failure> {
    loop {
        if let Ok(client) = Client::connect(socket).await
            && launcher::statuses(&client, None).await.is_ok()
        {
            return Ok(client);
        }
        sleep(Duration::from_millis(5)).await;
    }
}

async fn wait_for_proxy(socket: &Path, listen: &[SocketAddr]) {
    loop {
        let admin = match tokio::net::UnixStream::connect(socket).await {
            Ok(_) => true,
            // Somebody listens there who speaks in packets.
            Err(error) => error.raw_os_error() == Some(nix::libc::EPROTOTYPE),
        };
        if admin {
            break;
        }
        sleep(Duration::from_millis(5)).await;
    }
    for address in listen {
        while tokio::net::TcpStream::connect(reachable(*address)).await.is_err() {
            sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Waits until the launcher knows all apps, so that the first visitor of `ready` does not meet a 404.
async fn wait_for_apps(client: &Client, proxy: &Path, vhosts: &[check::Vhost]) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if proxy_knows(proxy, vhosts.len()).await
            && let Ok(known) = launcher::statuses(client, None).await
            && vhosts.iter().all(|vhost| known.iter().any(|status| status.app.as_str() == vhost.app))
        {
            return;
        }
        if Instant::now() >= deadline {
            tracing::warn!("not all apps of conf.d are known yet; see the log above");
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
}

/// Whether so many apps have reached the proxy by way of the launcher.
async fn proxy_knows(socket: &Path, apps: usize) -> bool {
    match admin::ask(socket, &Question::Stats {}).await {
        Ok(Answer::Stats(stats)) => stats.launcher && stats.apps >= apps as u64,
        _ => false,
    }
}

/// An address that this host can connect to when it listens on `address`.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// Fails when somebody else listens there; a proxy of a former run may still be ending, so a moment is given.
async fn wait_until_free(address: SocketAddr) -> Result<(), Failure> {
    let deadline = Instant::now() + Duration::from_secs(3);
    loop {
        match TcpListener::bind(address) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::AddrInUse || Instant::now() >= deadline => {
                return Err(Failure::failed(format!(
                    "cannot listen on {address}: {error}; choose another address with --listen"
                )));
            }
            Err(_) => sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Says on stdout that requests are answered, and what to open.
fn announce(listen: &[SocketAddr], vhosts: &[check::Vhost], out: &mut Output) -> Result<(), Failure> {
    let urls = listen.first().map(|address| urls(vhosts, address.port())).unwrap_or_default();
    if out.is_json() {
        let ready: Vec<String> = listen.iter().map(|address| format!("http://{address}/")).collect();
        out.json(&serde_json::json!({ "ready": ready, "open": urls }))?;
        return out.flush();
    }
    for address in listen {
        let ready = out.paint(Style::Green, "ready");
        out.line(&format!("{ready} http://{address}/"))?;
    }
    for url in urls {
        let url = out.paint(Style::Bold, &url);
        out.line(&format!("open {url}"))?;
    }
    out.flush()
}

/// One URL for each exact host name.
fn urls(vhosts: &[check::Vhost], port: u16) -> Vec<String> {
    let names = vhosts.iter().flat_map(|vhost| &vhost.server_names).filter(|name| !name.starts_with('*'));
    names
        .map(|name| if port == 80 { format!("http://{name}/") } else { format!("http://{name}:{port}/") })
        .collect()
}

/// Until somebody asks us to end.
async fn serve(kept: &[Kept], signals: &mut Signals) {
    while !signals.next_is_end().await {
        tracing::info!("SIGHUP: configuration is read again");
        // The launcher has no configuration of its own.
        kept.iter().filter(|kept| kept.name() != LAUNCHER).for_each(Kept::hangup);
    }
}

/// Ends the daemons, the proxy first so that nobody is refused, and verifies that nothing is left.
async fn stop(kept: Vec<Kept>, signals: &mut Signals, root: &Path, cgroup: &str) -> Result<(), Failure> {
    if !kept.is_empty() {
        tracing::info!("ending; Ctrl-C again to end at once");
    }
    let mut hurried = false;
    let mut killed = false;
    for service in kept.into_iter().rev() {
        let hurry = async {
            if !hurried {
                signals.end().await;
            }
        };
        let was_killed = service.stop(hurry).await;
        hurried |= was_killed;
        killed = was_killed;
    }
    // `killed` speaks of the launcher now, which ends last: if it could not sweep, we must.
    let left = leftovers::sweep(root, cgroup, killed).await;
    if left.is_empty() {
        tracing::debug!("ended; nothing is left");
        return Ok(());
    }
    Err(Failure::failed(format!("this would not go: {}", left.join(", "))))
}

/// The signals that `up` obeys; caught from the beginning, so that none ends us in the middle.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    on_terminal: bool,
}

impl Signals {
    fn listen() -> Result<Self, Failure> {
        let catch =
            |kind| signal(kind).map_err(|error| Failure::failed(format!("cannot catch signals: {error}")));
        Ok(Self {
            interrupt: catch(SignalKind::interrupt())?,
            terminate: catch(SignalKind::terminate())?,
            hangup: catch(SignalKind::hangup())?,
            on_terminal: has_terminal(),
        })
    }

    /// Whether the next signal asks for the end (or for the configuration to be read again).
    async fn next_is_end(&mut self) -> bool {
        tokio::select! {
            _ = self.interrupt.recv() => true,
            _ = self.terminate.recv() => true,
            _ = self.hangup.recv() => self.on_terminal && !has_terminal(),
        }
    }

    async fn end(&mut self) {
        while !self.next_is_end().await {}
    }
}

/// Whether stderr is a terminal that is still there: the hangup of one that was closed asks for the end.
fn has_terminal() -> bool {
    nix::unistd::tcgetpgrp(io::stderr()).is_ok()
}

/// Proxies and launchers have a descriptor per connection: the children inherit the most that is allowed.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!("cannot raise the limit of open files: {error}");
    }
}

/// A program beside our own, else on PATH.
fn find(name: &str) -> Result<PathBuf, Failure> {
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.to_owned()));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(&path))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .ok_or_else(|| {
            Failure::failed(format!(
                "{name} is neither beside this program nor on PATH; build it with `cargo build`"
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_open_is_what_a_browser_understands() {
        let vhost = check::Vhost {
            app: "blog".into(),
            server_names: vec!["blog.localhost".into(), "*.blog.localhost".into()],
        };

        assert_eq!(urls(std::slice::from_ref(&vhost), 8080), ["http://blog.localhost:8080/"]);
        assert_eq!(urls(&[vhost], 80), ["http://blog.localhost/"]);
    }
}
