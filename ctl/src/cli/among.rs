//! The options and commands that are about several hosts.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Subcommand};
use launcher_client::home::EMBEDDED;

/// This host among others.
#[derive(Args, Debug)]
pub(crate) struct Among {
    /// Where the CMDB lives: `embedded` in the launcher of the one host; for many hosts redis://HOST:PORT (rediss://,
    /// redis-sentinel://), or file:PATH of a file that holds such an address with its password
    #[arg(long, value_name = "WHERE", env = launcher_client::home::VARIABLE, hide_env_values = true, default_value = EMBEDDED)]
    pub(crate) cmdb: String,
    /// This host's name among others; its host name by default
    #[arg(long, value_name = "NAME", value_parser = node_name)]
    pub(crate) node: Option<String>,
    /// Where requests of other hosts' edges come in; must not be reachable by anybody else
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) dispatch: Option<SocketAddr>,
    /// File with at least 32 random bytes (mode 0600), the same on all hosts, by which they know each other:
    /// head -c 32 /dev/urandom > FILE
    #[arg(long, value_name = "FILE")]
    pub(crate) cluster_key: Option<PathBuf>,
    /// Folder with this host's certificate (see `fastcontainer ca`): mutual TLS between hosts, in place of the key or besides
    #[arg(long, value_name = "DIR")]
    pub(crate) cluster_tls: Option<PathBuf>,
    /// What else others are to know of this host, such as zone=a; may be given several times
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) label: Vec<String>,
    /// What this host does: `edge` takes visitors' requests and runs nothing, `dispatch` runs apps for other hosts' edges
    #[arg(long, value_name = "WHAT", value_enum, default_value = "both")]
    pub(crate) role: Role,
}

/// What a host does.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Role {
    Edge,
    Dispatch,
    Both,
}

pub(crate) fn node_name(text: &str) -> Result<String, String> {
    if cmdb::compute::is_name(text) {
        return Ok(text.to_owned());
    }
    Err("a host's name has letters, digits, `-`, `.` and `_`, and begins with a letter or digit".to_owned())
}

pub(super) const NODES: &str = "\
A host is `lost` when its heartbeat has been missing for 1.5 s. FREE is what starts may still take.

Examples:
  sudo fastcontainer nodes
  sudo fastcontainer nodes --json | jq -r '.[] | select(.alive | not) | .compute.name'";

pub(super) const DRAIN: &str = "\
Nothing is placed there any more; what is busy moves to other hosts, make before break, what is idle ends. No request fails.
It holds until `uncordon`, also across restarts of the host.

Examples:
  sudo fastcontainer drain web3 --wait          returns when nothing runs on web3 any more";

/// `drain`
#[derive(Args, Debug)]
pub(crate) struct Drain {
    /// Which host
    #[arg(value_parser = node_name)]
    pub(crate) node: String,
    /// Wait until it is empty
    #[arg(long)]
    pub(crate) wait: bool,
    #[command(flatten)]
    pub(crate) remote: super::api::Remote,
}

pub(super) const FORGET: &str = "\
Refused while the host is there: drain it, end its `up`, then forget it. Should it come back after all, it is known again,
and ends whatever of its instances others have given up.

Examples:
  sudo fastcontainer forget web3";

/// `forget`
#[derive(Args, Debug)]
pub(crate) struct Forget {
    /// Which host
    #[arg(value_parser = node_name)]
    pub(crate) node: String,
    #[command(flatten)]
    pub(crate) remote: super::api::Remote,
}

pub(super) const UNCORDON: &str = "\
Examples:
  sudo fastcontainer uncordon web3";

/// `uncordon`
#[derive(Args, Debug)]
pub(crate) struct Uncordon {
    /// Which host
    #[arg(value_parser = node_name)]
    pub(crate) node: String,
    #[command(flatten)]
    pub(crate) remote: super::api::Remote,
}

pub(super) const CA: &str = "\
The authority's key stays in the folder of `init`, which belongs on no host. Each host gets one folder of `issue`, owned by
root, as `up --cluster-tls`; an edge gets one, too. To renew a certificate issue it again and start the host's proxy anew.

Examples:
  fastcontainer ca init --dir cluster-ca
  fastcontainer ca issue web1 --dir cluster-ca --out web1-tls      then copy web1-tls to web1:/etc/fastcontainer/tls";

/// `ca …`
#[derive(Debug, Subcommand)]
pub(crate) enum Ca {
    /// Make an authority: a key and a certificate that every host gets
    Init(CaInit),
    /// Make the certificate of one host
    Issue(CaIssue),
}

/// `ca init`
#[derive(Args, Debug)]
pub(crate) struct CaInit {
    /// Where the authority is kept
    #[arg(long, value_name = "DIR", default_value = "cluster-ca")]
    pub(crate) dir: PathBuf,
}

/// `ca issue`
#[derive(Args, Debug)]
pub(crate) struct CaIssue {
    /// The host's name, as in its `--node`
    #[arg(value_parser = node_name)]
    pub(crate) node: String,
    /// Where the authority is kept
    #[arg(long, value_name = "DIR", default_value = "cluster-ca")]
    pub(crate) dir: PathBuf,
    /// Folder to write the host's three files to
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// For how many days it is good
    #[arg(long, default_value_t = 730, value_parser = clap::value_parser!(u32).range(1..=3_650))]
    pub(crate) days: u32,
}
