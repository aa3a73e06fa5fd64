//! `fastcontainer-launcher`: the daemon, and with `spawner` the small process that makes containers.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use cmdb::units::Bytes;
use launcher::{
    api::Identities,
    daemon::{self, Ended},
    hooks,
};
use launcher_client::{
    GovernorMode,
    home::{EMBEDDED, Home},
    paths::{COREAPI_UID, DEFAULT_STATE, GROUP_ID, PROXY_UID, StateDir},
};

/// How long an end waits for work that cannot be interrupted, such as reading a file of a slow disk.
const PATIENCE: Duration = Duration::from_secs(1);

/// Creates, limits, watches and ends containers. Runs as root; `fastcontainer up` starts it.
#[derive(Debug, Parser)]
#[command(name = "fastcontainer-launcher", version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Part>,
    /// Where everything is kept.
    #[arg(long, env = "FASTCONTAINER_STATE", default_value = DEFAULT_STATE)]
    state: PathBuf,
    /// Name of the parent of all cgroups; each launcher on a host needs its own.
    #[arg(long, default_value = "fastcontainer")]
    cgroup_parent: String,
    /// Shared folder from which volumes come.
    #[arg(long)]
    datapool: Option<PathBuf>,
    /// Folder of the programs that `[[hook]]` may run. It, and all in it, must belong to root alone.
    #[arg(long)]
    hooks: Option<PathBuf>,
    /// Whom hooks run as, `uid:gid`; never root.
    #[arg(long, default_value = "65534:65534", value_parser = hook_user)]
    hook_user: (u32, u32),
    /// How starts are admitted: `on`, by the CPU and memory that are free; `off`, every start at once; or a number, the
    /// most starts at a time.
    #[arg(long, default_value_t)]
    governor: GovernorMode,
    /// Memory that starts leave to others, such as 1GiB; by default 1/32 of the host's, 64MiB to 512MiB.
    #[arg(long)]
    keep_free: Option<Bytes>,
    /// Private addresses for containers that may connect out, for example 10.99.0.0/16; a free net is looked for.
    #[arg(long, value_name = "NET")]
    network_pool: Option<ipnet::Ipv4Net>,
    /// Name server of containers that reach the internet; may be given several times. This host's own otherwise.
    #[arg(long, value_name = "ADDRESS")]
    network_dns: Vec<std::net::IpAddr>,
    /// Most bytes that unpacked images may take, such as 20GiB.
    #[arg(long, value_name = "SIZE")]
    image_space: Option<Bytes>,
    /// User and password for registries: a file as `docker login` writes it.
    #[arg(long, value_name = "FILE")]
    registry_auth: Option<PathBuf>,
    /// Certificates (PEM) of authorities that registries' certificates may come from, besides the system's.
    #[arg(long, value_name = "FILE")]
    registry_ca: Option<PathBuf>,
    /// A registry that is spoken to without TLS.
    #[arg(long, value_name = "HOST:PORT")]
    insecure_registry: Vec<String>,
    #[command(flatten)]
    memory: Memory,
    #[command(flatten)]
    among: Among,
    /// Group that may reach the socket.
    #[arg(long, default_value_t = GROUP_ID)]
    gid: u32,
    /// User of the CoreAPI.
    #[arg(long, default_value_t = COREAPI_UID)]
    coreapi_uid: u32,
    /// User of the proxy.
    #[arg(long, default_value_t = PROXY_UID)]
    proxy_uid: u32,
    /// End, with every container, when the process that started this one ends.
    #[arg(long)]
    die_with_parent: bool,
}

/// When the host's memory is short, so that idle apps are put to a deeper sleep.
#[derive(Debug, clap::Args)]
struct Memory {
    /// Memory that is to stay available, such as 1GiB; by default a tenth of the host's.
    #[arg(long, value_name = "SIZE")]
    memory_low: Option<Bytes>,
    /// Time in which something waits for memory that is too much, per cent; counts only while less than three times
    /// --memory-low is available.
    #[arg(long, value_name = "PERCENT", default_value_t = 10)]
    memory_stall: u8,
    /// Read instead of /proc/meminfo. For tests.
    #[arg(long, hide = true, default_value = "/proc/meminfo")]
    meminfo: PathBuf,
    /// Read instead of /proc/pressure/memory. For tests.
    #[arg(long, hide = true, default_value = "/proc/pressure/memory")]
    memory_pressure: PathBuf,
}

/// This host among others.
#[derive(Debug, clap::Args)]
struct Among {
    /// The CMDB of many hosts: redis://…, or file:PATH of a file that holds such an address. Without it there is one host.
    #[arg(long, value_name = "WHERE", env = launcher_client::home::VARIABLE, hide_env_values = true, default_value = EMBEDDED)]
    cmdb: String,
    /// This host's name there; its host name by default.
    #[arg(long, value_name = "NAME", value_parser = node_name)]
    node: Option<String>,
    /// Where its dispatcher takes requests from the edges of other hosts.
    #[arg(long, value_name = "ADDRESS:PORT")]
    dispatch: Option<SocketAddr>,
    /// Where its CoreAPI serves.
    #[arg(long, value_name = "ADDRESS:PORT")]
    api: Option<SocketAddr>,
    /// What else is to be known of it, such as zone=a; may be given several times.
    #[arg(long, value_name = "NAME=VALUE", value_parser = label)]
    label: Vec<(String, String)>,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Makes containers and outlives the daemon that started it. Not for people.
    #[command(hide = true)]
    Spawner,
    /// Fetches an image, without any privilege. Not for people.
    #[command(hide = true)]
    Fetch,
    /// Has the kernel reclaim memory: writes `ORDER` to its standard output, which takes as long as the work. Not for people.
    #[command(hide = true)]
    Reclaim {
        /// What to write.
        order: String,
    },
    /// Becomes the program of a hook. Not for people.
    #[command(hide = true)]
    HookExec(HookExec),
}

#[derive(clap::Args, Debug)]
struct HookExec {
    #[arg(long)]
    uid: u32,
    #[arg(long)]
    gid: u32,
    #[arg(long)]
    join: Vec<PathBuf>,
    #[arg(long, value_parser = variable)]
    env: Vec<(String, String)>,
    #[arg(last = true, required = true)]
    argv: Vec<String>,
}

fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("a variable has a name and a value")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if cmdb::compute::is_name(name) => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("\"{text}\" is no label; write NAME=VALUE, for example zone=a")),
    }
}

fn node_name(text: &str) -> Result<String, String> {
    if cmdb::compute::is_name(text) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "\"{text}\" is no host's name; it has letters, digits, `-`, `.` and `_`, {} at most",
        cmdb::compute::NAME_MAX
    ))
}

fn hook_user(text: &str) -> Result<(u32, u32), String> {
    let ids = text.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    match ids {
        Some((0, _) | (_, 0)) => Err("hooks never run as root: a vhost file says which run".to_owned()),
        Some(ids) => Ok(ids),
        None => Err(format!("\"{text}\" is no user; write uid:gid, for example 65534:65534")),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.command {
        Some(Part::Spawner) => return launcher::spawner::run(),
        Some(Part::Fetch) => return launcher::fetch::run(),
        Some(Part::Reclaim { order }) => return launcher::reclaim::run(&order),
        Some(Part::HookExec(HookExec { uid, gid, join, env, argv })) => {
            // On the hook's own stderr, which is among the app's output.
            eprintln!("{}", hooks::exec(&hooks::Exec { uid, gid, join, env, argv }));
            return ExitCode::from(126);
        }
        None => {}
    }
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    match start(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn host_name() -> anyhow::Result<String> {
    let name = nix::unistd::gethostname()?.into_string().unwrap_or_default();
    node_name(&name)
        .map_err(|error| anyhow::anyhow!("the host name cannot be used: {error}; choose one with --node"))
}

fn start(arguments: Arguments) -> anyhow::Result<()> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "the launcher makes containers and must run as root");
    if arguments.die_with_parent {
        let parent = nix::unistd::getppid();
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM)?;
        // The parent may have ended before the request took effect.
        anyhow::ensure!(
            parent.as_raw() != 1 && nix::unistd::getppid() == parent,
            "the process that started the launcher has ended"
        );
    }
    let address = |address: Option<SocketAddr>| address.map_or(String::new(), |address| address.to_string());
    let home = Home::of_option(&arguments.among.cmdb)?;
    let among = cmdb::compute::Compute {
        name: match (arguments.among.node, &home) {
            (Some(name), _) => name,
            (None, Home::Redis(_)) => host_name()?,
            (None, Home::Embedded) => host_name().unwrap_or_else(|_| "localhost".to_owned()),
        },
        dispatch: address(arguments.among.dispatch),
        api: address(arguments.among.api),
        labels: arguments.among.label.into_iter().collect::<BTreeMap<_, _>>(),
        ..cmdb::compute::Compute::default()
    };
    let config = daemon::Config {
        cmdb: home,
        among,
        state: StateDir::new(arguments.state),
        cgroup_parent: arguments.cgroup_parent,
        gid: arguments.gid,
        identities: Identities { coreapi: arguments.coreapi_uid, proxy: arguments.proxy_uid },
        datapool: arguments.datapool,
        hooks: arguments.hooks,
        hook_user: arguments.hook_user,
        governor: arguments.governor,
        keep_free: arguments.keep_free.map(|bytes| bytes.0),
        network_pool: arguments.network_pool,
        network_dns: arguments.network_dns,
        memory: daemon::MemoryWatch {
            low: arguments.memory.memory_low.map(|bytes| bytes.0),
            stalled: u32::from(arguments.memory.memory_stall) * 10,
            meminfo: arguments.memory.meminfo,
            pressure: arguments.memory.memory_pressure,
        },
        exe: std::env::current_exe()?,
        image_space: arguments.image_space.map_or(u64::MAX, |space| space.0),
        registry_auth: arguments.registry_auth,
        registry_ca: arguments.registry_ca,
        insecure_registries: arguments.insecure_registry,
    };
    let exe = config.exe.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ended = runtime.block_on(daemon::run(config))?;
    runtime.shutdown_timeout(PATIENCE);
    if ended == Ended::ForAnother {
        // In the same process: whoever supervises it sees no end. All descriptors close, as they do in a death.
        let error = Command::new(&exe).args(std::env::args_os().skip(1)).exec();
        return Err(error).with_context(|| format!("{} cannot be started", exe.display()));
    }
    Ok(())
}
