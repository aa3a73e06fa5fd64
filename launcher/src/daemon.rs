//! The daemon: puts the parts together, serves until it is told to end, and leaves nothing behind.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use cmdb::{AppName, Generation, Store, compute::Compute};
use launcher_client::{GovernorMode, home::Home, paths::StateDir};
use nix::{
    fcntl::{Flock, FlockArg},
    libc::SIGKILL,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
};

use crate::{
    api::{self, Identities},
    cgroup::Cgroups,
    cluster, descent,
    events::Events,
    governor::{Governor, HostGauge},
    hooks::{self, Folder, Hooks},
    host::{Host, Parts},
    image::{self, ImageStore},
    instance::Adoption,
    keeper::{Found, Keeper, KeeperEvent},
    ledger::Ledger,
    outbound,
    overrides::Overrides,
    sandbox::ContainerId,
    supervisor::Message,
};

pub use descent::MemoryWatch;

/// How long the end of all instances may take before the spawner is ended with whatever it still has.
const END_TIMEOUT: Duration = Duration::from_secs(15);
/// How long requests wait for instances that cannot be picked up at once.
const ADOPTION_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a start waits for an earlier daemon of the same state folder to end.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// How the daemon is to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where everything is kept.
    pub state: StateDir,
    /// Where the CMDB lives.
    pub cmdb: Home,
    /// What this host says of itself to others; how much it has is found out.
    pub among: Compute,
    /// Name of the parent of all cgroups.
    pub cgroup_parent: String,
    /// Group that may reach the socket.
    pub gid: u32,
    /// Who plays which part.
    pub identities: Identities,
    /// Where volumes come from.
    pub datapool: Option<PathBuf>,
    /// Where the operator's programs for `[[hook]]` are.
    pub hooks: Option<PathBuf>,
    /// Whom they run as: user and group.
    pub hook_user: (u32, u32),
    /// How starts are admitted.
    pub governor: GovernorMode,
    /// Memory that starts leave to others, bytes; `None`: a small part of what there is.
    pub keep_free: Option<u64>,
    /// Private addresses for containers that may connect out; `None`: a free net is looked for.
    pub network_pool: Option<ipnet::Ipv4Net>,
    /// Name servers of containers that reach the internet; empty: this host's.
    pub network_dns: Vec<std::net::IpAddr>,
    /// When the host's memory is short.
    pub memory: MemoryWatch,
    /// This program, to be started as the spawner.
    pub exe: PathBuf,
    /// Bytes that all images together may take.
    pub image_space: u64,
    /// User and password for registries.
    pub registry_auth: Option<PathBuf>,
    /// Authorities whose certificates registries may have.
    pub registry_ca: Option<PathBuf>,
    /// Registries that are spoken to without TLS.
    pub insecure_registries: Vec<String>,
}

/// Why the daemon has ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ended {
    /// It was told to, and every instance has ended with it.
    Whole,
    /// The program is to be started anew in this process; the instances go on meanwhile.
    ForAnother,
}

/// Runs the daemon until SIGTERM or SIGINT, or until SIGUSR2 asks for the program to be started anew.
///
/// # Errors
/// Whatever keeps it from starting, with what to do about it. Once it serves, it goes on.
pub async fn run(config: Config) -> Result<Ended> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be handled")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be handled")?;
    let mut upgrade = signal(SignalKind::user_defined2()).context("SIGUSR2 cannot be handled")?;

    make_folders(&config)?;
    let _lock = lock(&config.state.launcher()).await?;
    // The spawner first, while this process is small: its memory is what a fork would have to copy.
    let spawner = Keeper::start(&config.state.launcher(), &config.exe)
        .await
        .context("the spawner cannot be started")?;
    let cgroups = Cgroups::detect(&config.cgroup_parent).context("control groups cannot be used")?;
    let store = cluster::open(&config.cmdb, &config.among.name, &config.state.launcher()).await?;
    let adoptions = sort_leftovers(&spawner.keeper, spawner.present, &*store);
    let events = Arc::new(Events::default());
    let path = config.state.launcher().join("ledger.redb");
    let ledger = Ledger::begin(&path, cgroups.clone(), Arc::clone(&events)).context("the ledger")?;
    clear_leftovers(&cgroups, &adoptions, &ledger).await;
    let host = Arc::new(Host::new(Parts {
        node: config.among.name.clone(),
        several: config.cmdb != Home::Embedded,
        store,
        keeper: spawner.keeper,
        cgroups: cgroups.clone(),
        images: ImageStore::new(&config.state.launcher().join("images"), image_options(&config))
            .context("the image store")?,
        hooks: Hooks::new(hooks::Parts {
            folder: config.hooks.as_deref().map(Folder::open).transpose().context("the hooks folder")?,
            uid: config.hook_user.0,
            gid: config.hook_user.1,
            exe: config.exe.clone(),
            cgroups: cgroups.clone(),
            ledger: ledger.clone(),
            events: Arc::clone(&events),
            node: config.among.name.clone(),
        }),
        events,
        ledger,
        staging: config.state.launcher().join("staging"),
        datapool: datapool(config.datapool.as_deref())?,
        governor: Governor::new(
            config.governor,
            config.keep_free.unwrap_or_else(HostGauge::usual_reserve),
            Box::new(HostGauge::default()),
        ),
        overrides: Overrides::open(&config.state.launcher().join("overrides.json"))
            .context("the operator's overrides")?,
        outbound: outbound::Config {
            table: config.cgroup_parent.clone(),
            folder: config.state.launcher().join("network"),
            pool: config.network_pool,
            resolvers: config.network_dns.clone(),
        },
    }));
    let links: Vec<_> = adoptions.iter().filter_map(|leftover| leftover.adoption.tag.link.clone()).collect();
    host.outbound.resume(&links).await;
    tokio::spawn(outbound::keep(Arc::clone(&host)));
    tokio::spawn(route_events(Arc::clone(&host), spawner.events));
    if host.several {
        // At once: others take a host for lost that is silent for long.
        tokio::spawn(cluster::beat(Arc::clone(&host), config.among));
    }
    adopt(&host, adoptions).await;
    tokio::spawn(cluster::follow(Arc::clone(&host)));

    let path = config.state.launcher_socket();
    let listener = api::bind(&path, config.gid).context("the launcher's socket")?;
    let api = tokio::spawn(api::serve(Arc::clone(&host), listener, config.identities));
    host.events.emit("launcher-started", None, None, format!("the launcher serves on {}", path.display()));
    for (app, _) in host.store.list().into_iter().filter(|(app, _)| host.keeps_instances(app)) {
        drop(host.supervisor(&app.name));
    }

    let preparation = tokio::spawn(crate::preparation::run(Arc::clone(&host)));
    tokio::spawn(descent::watch(Arc::clone(&host), config.memory));

    let by = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        _ = upgrade.recv() => {
            let message = "SIGUSR2: the launcher starts anew, as the program is now; running apps go on".to_owned();
            host.events.emit("launcher-upgrading", None, None, message);
            return Ok(Ended::ForAnother);
        }
    };
    host.events.emit("launcher-ending", None, None, format!("{by}: every instance is being ended"));
    api.abort();
    preparation.abort();
    end_everything(&host).await;
    let _ = fs::remove_file(&path);
    Ok(Ended::Whole)
}

fn image_options(config: &Config) -> image::Options {
    image::Options {
        space: config.image_space,
        registry_auth: config.registry_auth.clone(),
        registry_ca: config.registry_ca.clone(),
        insecure_registries: config.insecure_registries.clone(),
        ..image::Options::new(config.exe.clone(), config.state.fetch())
    }
}

fn make_folders(config: &Config) -> Result<()> {
    let make = |path: &Path, mode: u32| -> Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(path)
            .with_context(|| format!("{} cannot be made", path.display()))?;
        let permissions = fs::Permissions::from_mode(mode);
        fs::set_permissions(path, permissions)
            .with_context(|| format!("{}: its mode cannot be set", path.display()))
    };
    make(config.state.root(), 0o755)?;
    make(&config.state.launcher(), 0o700)?;
    make(&config.state.launcher().join("staging"), 0o700)?;
    // Fetchers are nobody, and walk through here to a folder of their own.
    make(&config.state.fetch(), 0o711)?;
    make(&config.state.run(), 0o711)
}

/// One daemon for a state folder; the file holds its pid.
async fn lock(folder: &Path) -> Result<Flock<fs::File>> {
    let path = folder.join("lock");
    let deadline = tokio::time::Instant::now() + LOCK_PATIENCE;
    let mut file = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("{} cannot be opened", path.display()))?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                lock.set_len(0)
                    .and_then(|()| writeln!(lock, "{}", std::process::id()))
                    .with_context(|| format!("{} cannot be written", path.display()))?;
                return Ok(lock);
            }
            Err((again, nix::errno::Errno::EWOULDBLOCK)) if tokio::time::Instant::now() < deadline => {
                file = again;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                let pid = fs::read_to_string(&path).unwrap_or_default();
                bail!(
                    "another launcher (pid {}) uses {}; stop it, or use another state folder",
                    pid.trim(),
                    folder.display()
                );
            }
            Err((_, errno)) => {
                return Err(io::Error::from(errno))
                    .with_context(|| format!("{} cannot be locked", path.display()));
            }
        }
    }
}

/// A container of an earlier daemon that is to live on.
struct Leftover {
    id: ContainerId,
    app: AppName,
    adoption: Adoption,
}

/// Tells the containers of an earlier daemon that can be gone on with, running apps that are still configured, from those
/// that cannot, half-made ones above all; those are ended.
fn sort_leftovers(keeper: &Keeper, present: Vec<Found>, store: &dyn Store) -> Vec<Leftover> {
    let mut adoptions = Vec::new();
    for found in present {
        let id = found.state.id.clone();
        match leftover(found, store) {
            Some(leftover) => adoptions.push(leftover),
            None => {
                tracing::info!(app = %id.app, generation = id.generation, "ending what an earlier launcher left");
                keeper.kill(&id, SIGKILL);
            }
        }
    }
    adoptions
}

fn leftover(found: Found, store: &dyn Store) -> Option<Leftover> {
    let state = found.state;
    let lives = state.execed && state.exited.is_none() && state.failed.is_none();
    let app: AppName = state.id.app.parse().ok()?;
    store.get(&app).filter(|_| lives)?;
    let adoption = Adoption {
        pid: state.pid,
        pidfd: found.pidfd?,
        port: state.listening?.port,
        outputs: found.outputs,
        tag: serde_json::from_str(&state.note).ok()?,
        under_way: None,
        image: None,
    };
    Some(Leftover { id: state.id, app, adoption })
}

async fn clear_leftovers(cgroups: &Cgroups, adoptions: &[Leftover], ledger: &Ledger) {
    let wanted: Vec<ContainerId> = adoptions.iter().map(|leftover| leftover.id.clone()).collect();
    let sweep = cgroups.sweep(&wanted).await;
    ledger.settle_leftovers(&sweep.used);
    if sweep.removed > 0 {
        tracing::info!(cgroups = sweep.removed, "removed what an earlier launcher left");
    }
    for path in sweep.stuck {
        tracing::warn!(path = %path.display(), "a cgroup of an earlier launcher cannot be removed");
    }
}

/// Has the instances supervised again, and waits until they are: a proxy that asks earlier would hear that an instance on
/// which it serves requests does not exist.
async fn adopt(host: &Arc<Host>, adoptions: Vec<Leftover>) {
    let mut under_way = Vec::with_capacity(adoptions.len());
    for Leftover { id, app, mut adoption } in adoptions {
        let (sender, done) = oneshot::channel();
        adoption.under_way = Some(sender);
        adoption.image = Some(host.images.lease(&adoption.tag.image));
        let supervisor = match host.supervisor(&app) {
            Ok(supervisor) if host.claim_ids(&app, adoption.tag.id_base) => supervisor,
            _ => {
                tracing::warn!(app = %app, generation = id.generation, "it cannot be gone on with and is ended");
                host.keeper.kill(&id, SIGKILL);
                continue;
            }
        };
        let _ = supervisor.send(Message::Adopt(Generation(id.generation), Box::new(adoption)));
        under_way.push(done);
    }
    let all = async {
        for done in under_way {
            let _ = done.await;
        }
    };
    if tokio::time::timeout(ADOPTION_TIMEOUT, all).await.is_err() {
        tracing::warn!("not every instance of the earlier launcher could be picked up in time");
    }
}

async fn route_events(host: Arc<Host>, mut events: mpsc::UnboundedReceiver<KeeperEvent>) {
    while let Some(event) = events.recv().await {
        host.route(event);
    }
}

async fn end_everything(host: &Arc<Host>) {
    host.end();
    let ends: Vec<_> = host
        .supervisors()
        .into_iter()
        .map(|supervisor| {
            let (reply, done) = oneshot::channel();
            let _ = supervisor.send(Message::Shutdown(reply));
            done
        })
        .collect();
    let all = async {
        for end in ends {
            let _ = end.await;
        }
    };
    if tokio::time::timeout(END_TIMEOUT, all).await.is_err() {
        tracing::warn!("some instances did not end in time; they are killed with the spawner");
    }
    host.keeper.shutdown().await;
    let sweep = host.cgroups.sweep(&[]).await;
    host.ledger.settle_leftovers(&sweep.used);
    host.ledger.close().await;
    host.outbound.end().await;
    if let Err(error) = host.cgroups.remove_parent().await {
        tracing::warn!(%error, "the parent cgroup could not be removed");
    }
}

/// Looked at no further: a dead network file system must not keep the launcher from starting. Apps with volumes say what is wrong.
fn datapool(path: Option<&Path>) -> Result<Option<PathBuf>> {
    let absolute = |path| std::path::absolute(path).context("the DataPool's path");
    path.map(absolute).transpose()
}
