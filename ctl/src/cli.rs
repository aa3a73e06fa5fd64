//! The command line.

mod among;
pub(crate) mod api;

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use clap::{Args, Parser, Subcommand};
use cmdb::{
    AppName,
    units::{Bytes, Millicores},
};
use launcher_client::{GovernorMode, paths::DEFAULT_STATE};

pub(crate) use among::{Among, Ca, CaInit, CaIssue, Drain, Forget, Role, Uncordon, node_name};
use among::{CA, DRAIN, FORGET, NODES, UNCORDON};

const ABOUT: &str = "\
FastContainer: web apps in containers that the first request wakes, in milliseconds.

Run `fastcontainer up` on a host, put one TOML file per web app into conf.d/, open its host name in a browser.
Nothing of an app runs until somebody visits it, and nothing of it is left when nobody does any more.";

const AFTER: &str = "\
Exit codes:
  0  done
  1  it failed; the reason is on stderr
  2  wrong usage, or this user may not
  3  nothing answers: no FastContainer runs with this state folder
  4  no such app or request

Examples:
  sudo fastcontainer up                                       one host, in the foreground; Ctrl-C ends everything
  fastcontainer check conf.d                                  is every file right?
  sudo fastcontainer ps                                       what runs, since when, with how much CPU and memory
  sudo fastcontainer events --follow --app blog               what happens to an app, as it happens
  sudo fastcontainer why 7e382553a3f048da9951b845                          where the time of one request went";

/// The operator's command of FastContainer.
#[derive(Debug, Parser)]
#[command(name = "fastcontainer", version, about = "Web apps in containers that the first request wakes", long_about = ABOUT, after_help = AFTER, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// For all commands.
#[derive(Args, Debug)]
pub(crate) struct Global {
    /// The state folder; each has its own daemons, so that several may run on one host
    #[arg(long, global = true, value_name = "DIR", env = "FASTCONTAINER_STATE", default_value = DEFAULT_STATE)]
    pub(crate) state: PathBuf,
    /// Write JSON for programs instead of text for people
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Say more
    #[arg(short, long, global = true)]
    pub(crate) verbose: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run everything on this host, in the foreground, until Ctrl-C
    #[command(after_help = UP)]
    Up(Box<Up>),
    /// Read a folder of vhost files and show every fault of every file
    #[command(after_help = CHECK)]
    Check(Check),
    /// Show the apps and their instances
    #[command(after_help = PS)]
    Ps(Ps),
    /// Show the hosts, what they have left, and whether they are there
    #[command(after_help = NODES)]
    Nodes(api::Plain),
    /// Empty a host: its apps move to other hosts, and nothing new is placed there
    #[command(after_help = DRAIN)]
    Drain(Drain),
    /// Delete what is known of a host that will not come back
    #[command(after_help = FORGET)]
    Forget(Forget),
    /// Let a host take apps again
    #[command(after_help = UNCORDON)]
    Uncordon(Uncordon),
    /// Make the certificates by which the hosts of a cluster know each other
    #[command(subcommand, after_help = CA)]
    Ca(Ca),
    /// Show what happened, and follow what happens
    #[command(after_help = EVENTS)]
    Events(Events),
    /// Show the last output of an app
    #[command(after_help = LOGS)]
    Logs(Logs),
    /// Start an app now, as a request would
    #[command(after_help = WAKE)]
    Wake(Wake),
    /// End all instances of an app; the next request wakes it again
    #[command(after_help = STOP)]
    Stop(Stop),
    /// Replace all instances of an app, the new one first
    #[command(after_help = RESTART)]
    Restart(Restart),
    /// Change the limits of a running app at once, in the same processes
    #[command(after_help = LIMIT)]
    Limit(Limit),
    /// Set the number of instances of an app, or pause its automatic scaling
    #[command(after_help = SCALE)]
    Scale(Scale),
    /// Show the images of all apps, and how far their preparation is
    #[command(after_help = IMAGES)]
    Images(api::Plain),
    /// Run an app's hooks for a signal
    #[command(after_help = SIGNAL)]
    Signal(Signal),
    /// Show the figures of launcher and proxy in Prometheus' text format
    #[command(after_help = METRICS)]
    Metrics,
    /// Explain where the time of one request went
    #[command(after_help = WHY)]
    Why(Why),
    /// Show what apps have used: CPU, memory, time, requests
    #[command(after_help = USAGE)]
    Usage(Usage),
    /// Put a folder of vhost files in place, by way of the API
    #[command(after_help = api::APPLY)]
    Apply(api::Apply),
    /// Show what `apply` would change
    #[command(after_help = api::DIFF)]
    Diff(api::Diff),
    /// Make a token for the API
    #[command(after_help = api::TOKEN)]
    Token(api::Token),
}

const UP: &str = "\
Starts launcher, coreapi and proxy, restarts the one that dies, and on Ctrl-C (or SIGTERM) lets the requests under way
finish, ends all containers and leaves nothing behind. Ctrl-C twice ends at once. SIGHUP reads conf.d and reopens logs.
Stdout gets one line `ready http://ADDRESS/` for each --listen when requests are answered, then `open URL` lines.
Logs go to stderr (RUST_LOG chooses how much). Must be run as root.

Examples:
  sudo fastcontainer up
  sudo fastcontainer up --conf /etc/fastcontainer/conf.d --listen 0.0.0.0:80 --listen '[::]:80'
  sudo fastcontainer up --state /tmp/try --listen 127.0.0.1:8090      a second one beside the first
  sudo fastcontainer up --cmdb file:/etc/fastcontainer/cmdb --node web1 --dispatch 10.0.0.1:7070 \\
    --cluster-key /etc/fastcontainer/cluster.key                      one of several hosts";

fn network(text: &str) -> Result<String, String> {
    let (address, bits) = text.split_once('/').unwrap_or((text, "0"));
    match (address.parse::<IpAddr>(), bits.parse::<u8>()) {
        (Ok(address), Ok(bits)) if bits <= if address.is_ipv4() { 32 } else { 128 } => Ok(text.to_owned()),
        _ => Err("write a network such as 10.0.0.0/8 or 2001:db8::/32".to_owned()),
    }
}

/// `up`
#[derive(Args, Debug)]
pub(crate) struct Up {
    /// Folder of vhost files, one per app; conf.d by default. With --cmdb redis://… only a host that is given this option
    /// brings configuration
    #[arg(long, value_name = "DIR")]
    pub(crate) conf: Option<PathBuf>,
    /// Address for HTTP; may be given several times
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8080")]
    pub(crate) listen: Vec<SocketAddr>,
    /// Networks of balancers whose X-Forwarded-* headers are believed, such as 10.0.0.0/8; may be given several times
    #[arg(long, value_name = "NETWORK", value_parser = network)]
    pub(crate) trust: Vec<String>,
    /// Networks of balancers that begin each connection with a PROXY protocol header; may be given several times
    #[arg(long, value_name = "NETWORK", value_parser = network)]
    pub(crate) trust_proxy: Vec<String>,
    #[command(flatten)]
    pub(crate) among: Among,
    #[command(flatten)]
    pub(crate) serve: api::Serve,
    /// Folder from which `[[volume]]` takes its folders; STATE/datapool if that is there
    #[arg(long, value_name = "DIR")]
    pub(crate) datapool: Option<PathBuf>,
    /// Folder of the programs that `[[hook]]` may run; STATE/hooks if that is there. It must belong to root alone
    #[arg(long, value_name = "DIR")]
    pub(crate) hooks: Option<PathBuf>,
    /// Whom hooks run as, never root; 65534:65534 (nobody) by default
    #[arg(long, value_name = "UID:GID")]
    pub(crate) hook_user: Option<String>,
    /// Serve the figures of launcher and proxy for Prometheus at http://ADDRESS:PORT/metrics; without it nothing is served
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) metrics: Option<SocketAddr>,
    /// How starts are admitted when many apps wake at once: `on`, by the CPU and memory that are free; `off`, all at once;
    /// or a number, the most starts at a time
    #[arg(long, value_name = "HOW", default_value_t)]
    pub(crate) governor: GovernorMode,
    /// Memory that starts leave to others, such as 1GiB; by default 1/32 of the host's, 64MiB to 512MiB
    #[arg(long, value_name = "SIZE")]
    pub(crate) keep_free: Option<Bytes>,
    /// Private addresses for apps that may connect out, for example 10.99.0.0/16; a free net is looked for
    #[arg(long, value_name = "NET")]
    pub(crate) network_pool: Option<String>,
    /// Name server of apps that reach the internet; may be given several times. This host's own otherwise
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) network_dns: Vec<IpAddr>,
    /// Most bytes that unpacked images may take, such as 20GiB
    #[arg(long, value_name = "SIZE")]
    pub(crate) image_space: Option<Bytes>,
    /// User and password for registries: a file as `docker login` writes it (~/.docker/config.json)
    #[arg(long, value_name = "FILE")]
    pub(crate) registry_auth: Option<PathBuf>,
    /// Certificates (PEM) of authorities that registries' certificates may come from, besides the system's
    #[arg(long, value_name = "FILE")]
    pub(crate) registry_ca: Option<PathBuf>,
    /// A registry that is spoken to without TLS (those of the loopback are anyway); may be given several times
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) insecure_registry: Vec<String>,
    /// Memory that is to stay available, such as 2GiB; below it idle apps are frozen, reclaimed and at last stopped. By default a
    /// tenth of the host's
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory_low: Option<Bytes>,
    /// Per cent of the time in which something waits for memory that count as short, while less than three times --memory-low
    /// is available
    #[arg(long, value_name = "PERCENT", default_value_t = 10, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) memory_stall: u8,
    /// Read instead of /proc/meminfo; for tests
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) meminfo: Option<PathBuf>,
}

const CHECK: &str = "\
Exit 0: every file is right. Exit 1: the faults are on stdout, each with file, line, column and the mend.

Examples:
  fastcontainer check conf.d
  fastcontainer check --json conf.d | jq .";

/// `check`
#[derive(Args, Debug)]
pub(crate) struct Check {
    /// Folder of vhost files
    #[arg(value_name = "DIR", default_value = "conf.d")]
    pub(crate) dir: PathBuf,
}

const PS: &str = "\
One line per instance; an app of which nothing runs is `absent`. CPU is the time used and the quota in force now.
GENERATION is the end of the instance's number; --wide shows all of it, with first-byte times of the last second (half and 99 of 100 came within), ports, host names and reasons.

Examples:
  sudo fastcontainer ps
  sudo fastcontainer ps blog --wide
  sudo fastcontainer ps --json | jq -r '.[] | select(.state == \"ready\") | .instance'";

/// `ps`
#[derive(Args, Debug)]
pub(crate) struct Ps {
    /// Only this app
    pub(crate) app: Option<AppName>,
    /// All columns
    #[arg(short, long)]
    pub(crate) wide: bool,
    #[command(flatten)]
    pub(crate) remote: api::Remote,
}

const EVENTS: &str = "\
Times are local. With --json, one object per line.

Examples:
  sudo fastcontainer events --app blog
  sudo fastcontainer events --follow
  sudo fastcontainer events --since 4711 --json";

/// `events`
#[derive(Args, Debug)]
pub(crate) struct Events {
    /// Go on with new events as they happen
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only events after this number
    #[arg(long, value_name = "SEQ", default_value_t = 0)]
    pub(crate) since: u64,
    /// Only events about this app
    #[arg(long)]
    pub(crate) app: Option<AppName>,
    #[command(flatten)]
    pub(crate) remote: api::Remote,
}

const LOGS: &str = "\
Shows what the app wrote to stdout and stderr, also of instances that have ended (a bounded amount is kept).

Examples:
  sudo fastcontainer logs blog
  sudo fastcontainer logs blog -n 500 --json";

/// `logs`
#[derive(Args, Debug)]
pub(crate) struct Logs {
    /// Whose output
    pub(crate) app: AppName,
    /// Most lines, counted from the end
    #[arg(short = 'n', long, value_name = "LINES", default_value_t = 100)]
    pub(crate) lines: u32,
    #[command(flatten)]
    pub(crate) remote: api::Remote,
}

const WAKE: &str = "\
Prints how long it took; with -v, step by step. Exit 1 with the reason when the app does not start.

Examples:
  sudo fastcontainer wake blog
  sudo fastcontainer wake blog -v";

/// `wake`
#[derive(Args, Debug)]
pub(crate) struct Wake {
    /// Which app
    pub(crate) app: AppName,
    #[command(flatten)]
    pub(crate) remote: api::Remote,
}

const STOP: &str = "\
Requests under way may finish, up to the app's drain-timeout; the command waits until all instances are gone.

Examples:
  sudo fastcontainer stop blog";

/// `stop`
#[derive(Args, Debug)]
pub(crate) struct Stop {
    /// Which app
    pub(crate) app: AppName,
    #[command(flatten)]
    pub(crate) remote: api::Remote,
}

const RESTART: &str = "\
No request is refused meanwhile. The command returns when the replacement has begun; `events --app APP` shows the rest.

Examples:
  sudo fastcontainer restart blog";

/// `restart`
#[derive(Args, Debug)]
pub(crate) struct Restart {
    /// Which app
    pub(crate) app: AppName,
    #[command(flatten)]
    pub(crate) remote: api::Remote,
}

const LIMIT: &str = "\
The limits hold for the instances that run and for those that start, until --reset, or until the app's vhost file gives
another value for the same limit. They outlive a restart of the launcher. The processes go on. `ps` shows what is set.

Examples:
  sudo fastcontainer limit blog --cpu 60%
  sudo fastcontainer limit blog --reset                back to what the vhost file says
  sudo fastcontainer limit blog --memory 512MiB --pids 200";

/// `limit`
#[derive(Args, Debug)]
pub(crate) struct Limit {
    /// The app's name
    pub(crate) app: AppName,
    /// CPU quota: a share of one core (60%) or a number of cores (1.5)
    #[arg(long)]
    pub(crate) cpu: Option<Millicores>,
    /// Memory, such as 512MiB
    #[arg(long)]
    pub(crate) memory: Option<Bytes>,
    /// Processes and threads
    #[arg(long)]
    pub(crate) pids: Option<u32>,
    /// Back to the limits of the vhost file (before other options of the same command)
    #[arg(long)]
    pub(crate) reset: bool,
    #[command(flatten)]
    pub(crate) remote: api::Remote,
}

const SCALE: &str = "\
With a number: so many instances, no fewer and no more, at once; missing ones start, surplus ones are drained and end when
their requests have ended. Their CPU quotas are still raised and lowered by need. --min and --max set one bound each, and
leave the rest to the scaler. --pause keeps the scaler from doing anything: number and quotas stay as they are (waking,
sleeping and lifetimes go on); --resume lets it work again. What is set holds until --auto, or until the app's vhost file
gives another value for scale.min or scale.max; it outlives a restart of the launcher. `ps` shows what is set.

Examples:
  sudo fastcontainer scale blog 3
  sudo fastcontainer scale blog --min 1 --max 8
  sudo fastcontainer scale blog --pause
  sudo fastcontainer scale blog --auto                 back to what the vhost file says, and no pause";

/// `scale`
#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true))]
pub(crate) struct Scale {
    /// The app's name
    pub(crate) app: AppName,
    /// So many instances
    #[arg(value_name = "N", group = "what", conflicts_with_all = ["min", "max"], value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) instances: Option<u32>,
    /// Fewest instances
    #[arg(long, value_name = "N", group = "what")]
    pub(crate) min: Option<u32>,
    /// Most instances
    #[arg(long, value_name = "N", group = "what", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max: Option<u32>,
    /// Scale nothing by itself, neither the quota nor the number of instances
    #[arg(long, group = "what", conflicts_with = "resume")]
    pub(crate) pause: bool,
    /// Scale by itself again
    #[arg(long, group = "what")]
    pub(crate) resume: bool,
    /// Back to what the vhost file says (before other options of the same command)
    #[arg(long, group = "what")]
    pub(crate) auto: bool,
    #[command(flatten)]
    pub(crate) remote: api::Remote,
}

const IMAGES: &str = "\
Images are prepared (fetched, unpacked, verified) as soon as a vhost file names them, looked at again every ten minutes and
at each start, and removed when no file names them and no instance runs on them.

Examples:
  sudo fastcontainer images
  sudo fastcontainer images --json | jq '.[] | select(.state == \"failed\")'";

const SIGNAL: &str = "\
Runs the `[[hook]]`s of the app's vhost file that have this `on-signal`, once for each instance that is ready. The app itself
gets no signal. The command returns when they have begun; `events --app APP` tells how they ended.

Examples:
  sudo fastcontainer signal blog USR1";

/// `signal`
#[derive(Args, Debug)]
pub(crate) struct Signal {
    /// Which app
    pub(crate) app: AppName,
    /// The signal's name: HUP, INT, USR1, USR2 or WINCH
    pub(crate) signal: String,
    #[command(flatten)]
    pub(crate) remote: api::Remote,
}

const METRICS: &str = "\
`up --metrics 127.0.0.1:9090` serves the same text at http://127.0.0.1:9090/metrics for Prometheus.

Examples:
  sudo fastcontainer metrics
  sudo fastcontainer metrics | grep starts_waiting";

const WHY: &str = "\
Without an id: the last requests, each with its id. Ids are in the access log (STATE/proxy/access.log) and on error pages
too. The proxy keeps the last 4096 requests. The parts that are printed for one request sum to the whole.

Examples:
  sudo fastcontainer why
  sudo fastcontainer why 7e382553a3f048da9951b845
  sudo fastcontainer why 7e382553a3f048da9951b845 --json";

/// `why`
#[derive(Args, Debug)]
pub(crate) struct Why {
    /// The request's id; without it the last requests are listed
    pub(crate) id: Option<String>,
}

const USAGE: &str = "\
Hours and days are UTC's, and counted whole. Known by the hour for 40 days, by the day for 400. MEMORY is what was charged,
times how long. RUNNING, FROZEN: the time of all instances, summed. HELD: how long requests waited for an instance, summed.
IN and OUT are the bodies of requests and answers. WAKES are starts, failed ones among them.
The last line is the kernel's own count for all containers together; the apps' sum is within 1 % of it.

Examples:
  sudo fastcontainer usage
  sudo fastcontainer usage --since 7d --by day blog
  sudo fastcontainer usage --since 2026-11-01 --by hour --csv > usage.csv";

/// `usage`
#[derive(Args, Debug)]
pub(crate) struct Usage {
    /// Only this app
    pub(crate) app: Option<AppName>,
    /// Since when: so long ago (24h, 7d), or a day or hour in UTC (2026-11-01, 2026-11-01T13)
    #[arg(long, value_name = "WHEN", default_value = "24h", value_parser = crate::usage::since)]
    pub(crate) since: u64,
    /// A line for each app, for each app and day, or for each app and hour
    #[arg(long, value_name = "WHAT", value_enum, default_value = "app")]
    pub(crate) by: By,
    /// Write CSV, in plain units
    #[arg(long, conflicts_with = "json")]
    pub(crate) csv: bool,
    #[command(flatten)]
    pub(crate) remote: api::Remote,
}

/// What a line of `usage` is about.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum By {
    App,
    Day,
    Hour,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_examples() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Examples:\n  "), "{}", command.get_name());
        }
    }

    #[test]
    fn several_addresses_may_be_given() {
        let cli = Cli::parse_from(["fastcontainer", "up", "--listen", "127.0.0.1:1", "--listen", "[::1]:2"]);

        let Command::Up(up) = cli.command else { panic!("not up") };
        assert_eq!(up.listen.len(), 2);
    }
}
