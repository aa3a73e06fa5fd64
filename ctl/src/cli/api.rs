//! What has to do with the API.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;

/// `up`: the API of this host.
#[derive(Args, Debug)]
pub(crate) struct Serve {
    /// Serve the API (REST, docs/api.md) at http://IP:PORT/; without it only root can use it, by way of the state folder
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) api: Option<SocketAddr>,
    /// Who may use the API: a file with a line for each token, as `fastcontainer token` prints it. Without it --api must be on
    /// the loopback, and whoever is on this host may look
    #[arg(long, value_name = "FILE")]
    pub(crate) tokens: Option<PathBuf>,
}

/// Whose API a command asks; without it, the launcher of the state folder.
#[derive(Args, Debug, Default)]
pub(crate) struct Remote {
    /// Ask this API (http://HOST:PORT, https://…), of any host, in place of this host's launcher
    #[arg(long, value_name = "URL", env = "FASTCONTAINER_API", hide_env_values = true)]
    pub(crate) api: Option<String>,
    /// The API's token: a file that holds it (or the variable FASTCONTAINER_TOKEN itself)
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// The token itself: only from the environment, for command lines are seen by everybody
    #[arg(long, hide = true, env = "FASTCONTAINER_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
}

/// A command that has nothing else to be told.
#[derive(Args, Debug)]
pub(crate) struct Plain {
    #[command(flatten)]
    pub(crate) remote: Remote,
}

pub(crate) const APPLY: &str = "\
The API's apps are those of the folder from then on, and no others; apps that a host's own conf.d has configured stay as they
are. With a fault in any file nothing is done, and all faults are shown. Relative paths of images are the host's.

Examples:
  sudo fastcontainer apply conf.d                      this host
  fastcontainer apply conf.d --api http://10.0.0.1:8070 --token-file ~/.fastcontainer-token
  sudo fastcontainer apply conf.d --dry-run            what would change?";

/// `apply`
#[derive(Args, Debug)]
pub(crate) struct Apply {
    /// Folder of vhost files
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// Only show what would change
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Also if more than half of the apps would go
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

pub(crate) const DIFF: &str = "\
Exit 0: nothing would change. Exit 1: this would, or a file has a fault.

Examples:
  sudo fastcontainer diff conf.d
  fastcontainer diff conf.d --api http://10.0.0.1:8070 --token-file ~/.fastcontainer-token";

/// `diff`
#[derive(Args, Debug)]
pub(crate) struct Diff {
    /// Folder of vhost files
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

pub(crate) const TOKEN: &str = "\
Roles: `read` sees what runs (no environments, no output of apps but the last line of one that failed), `operate` also wakes, stops, scales and limits, `admin` also
configures. The token is shown once; the file holds its SHA-256 only. A line that is taken out revokes its token from the next request on.

Examples:
  sudo fastcontainer token admin anna --file /etc/fastcontainer/tokens > anna.token
  fastcontainer token read prometheus                  shows the token and the line for the file";

/// `token`
#[derive(Args, Debug)]
pub(crate) struct Token {
    /// What it allows
    #[arg(value_enum)]
    pub(crate) role: TokenRole,
    /// Whose it is; stands in the audit log
    pub(crate) name: String,
    /// Append its line to this file, and show the token alone
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
}

/// What a token allows.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum TokenRole {
    Read,
    Operate,
    Admin,
}

impl TokenRole {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Operate => "operate",
            Self::Admin => "admin",
        }
    }
}
