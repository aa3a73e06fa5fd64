//! An app: what the operator asked for in one vhost file, parsed and complete (defaults filled in).

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    hook::Hook,
    network::Network,
    origin::Origin,
    provision::ProvisionStep,
    units::{Bytes, Millicores},
};

/// Everything that one vhost file says. Right by construction: made by the vhost parser or decoded from a store
/// that the parser filled.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct App {
    /// The app's name: the vhost file's name without `.toml`.
    pub name: AppName,
    /// Who configured it.
    #[serde(default, skip_serializing_if = "Origin::is_usual")]
    pub origin: Origin,
    /// Host names that lead here; at least one.
    pub server_names: Vec<HostPattern>,
    /// What runs.
    pub container: Container,
    /// Content from the DataPool, in mount order.
    #[serde(default)]
    pub volumes: Vec<Volume>,
    /// Where it may connect to.
    #[serde(default)]
    pub network: Network,
    /// Limits.
    pub resources: Resources,
    /// When it starts and ends.
    pub lifecycle: Lifecycle,
    /// How many run.
    pub scale: Scale,
    /// How requests wait.
    pub hold: Hold,
    /// The operator's programs that run at points of an instance's life, in the file's order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hooks: Vec<Hook>,
}

impl App {
    /// Whether the other one is the same but for who configured it.
    #[must_use]
    pub fn says_the_same(&self, other: &Self) -> bool {
        if self.origin == other.origin {
            return self == other;
        }
        *self == Self { origin: self.origin.clone(), ..other.clone() }
    }
}

/// `[container]`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Container {
    /// `dir:`, `tar:` or `oci:` and an absolute path (relative paths of the file are resolved by the parser), `docker://…`
    /// or `git+…`.
    pub image: String,
    /// An image beneath it, named in the same way; `None`: the image is all there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Program and arguments; empty: the image's own.
    pub command: Vec<String>,
    /// TCP port on which the app listens; `None`: the first on which it does.
    pub port: Option<u16>,
    /// Whom it runs as, as in the image's passwd file; empty: as the image says, else the container's root.
    pub user: String,
    /// Working directory inside; empty: as the image says, else `/`.
    pub workdir: String,
    /// Environment.
    pub env: BTreeMap<String, String>,
    /// What is done to the image once, before anything runs from it, in the file's order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub provision: Vec<ProvisionStep>,
}

/// `[[volume]]`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Volume {
    /// Path beneath the DataPool: relative, without `..`.
    pub source: String,
    /// Absolute path inside.
    pub target: String,
    /// Whether the app may only read.
    pub read_only: bool,
    /// Most that the folder may hold; `None`: as much as the file system.
    #[serde(default)]
    pub quota: Option<Bytes>,
    /// Whether no more than one instance at a time may have it, on whichever host.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub exclusive: bool,
}

/// `[resources]`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Resources {
    /// CPU quota; `None`: unlimited.
    pub cpu: Option<Millicores>,
    /// How far the quota may be raised; at least `cpu`.
    pub cpu_max: Option<Millicores>,
    /// Memory limit.
    pub memory: Bytes,
    /// Most processes and threads.
    pub pids: u32,
    /// Size of the writable layer.
    pub disk: Bytes,
}

/// `[lifecycle]`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Lifecycle {
    /// From the start to listening.
    pub start_timeout: Duration,
    /// Idle time until the instance is frozen; `None`: never.
    pub freeze_after: Option<Duration>,
    /// Idle time until a frozen instance's memory is reclaimed; `None`: only when the host's memory gets short.
    #[serde(default)]
    pub reclaim_after: Option<Duration>,
    /// Idle time until the instance ends; `None`: never.
    pub idle_timeout: Option<Duration>,
    /// Age at which an instance is replaced; `None`: never.
    pub lifetime: Option<Duration>,
    /// How long open requests may postpone an end.
    pub drain_timeout: Duration,
    /// From SIGTERM to SIGKILL.
    pub stop_timeout: Duration,
    /// Share of the memory limit, in per cent, at which an instance that grows is replaced; `None`: never.
    #[serde(default)]
    pub recycle_at: Option<u32>,
}

/// `[scale]`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Scale {
    /// Fewest instances.
    pub min: u32,
    /// Most instances; at least 1.
    pub max: u32,
    /// First-byte time (p90 of the last second) above which the app is too slow; `None`: not judged.
    pub response_time: Option<Duration>,
    /// After a step of the scaler: none for so long, and no step back before it has been calm for so long.
    #[serde(default = "Scale::usual_cool_down")]
    pub cool_down: Duration,
    /// Requests in one instance at a time; more wait. `None`: unlimited.
    pub concurrency: Option<u32>,
    /// How an instance is picked.
    pub pick: Pick,
    /// How long the share of an instance that came to serve beside others grows to a full one; `None`: at once.
    #[serde(default)]
    pub slow_start: Option<Duration>,
}

impl Scale {
    /// `cool-down` where none is given.
    #[must_use]
    pub fn usual_cool_down() -> Duration {
        Duration::from_secs(10)
    }
}

/// How one of several ready instances is picked for a request.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pick {
    /// At random: the paper's rule.
    #[default]
    Random,
    /// The less busy one of two random ones ("power of two choices").
    P2c,
}

/// `[hold]`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Hold {
    /// Most requests that wait for this app at a time.
    pub queue: u32,
    /// Longest wait.
    pub timeout: Duration,
    /// Whether browsers that navigate get a waiting page instead.
    pub page: bool,
    /// How long they are held before.
    #[serde(default = "Hold::usual_page_after")]
    pub page_after: Duration,
}

impl Hold {
    /// `page-after` where none is given.
    #[must_use]
    pub fn usual_page_after() -> Duration {
        Duration::from_millis(500)
    }
}

/// An app's name: 1 to 63 of `a-z 0-9 - _ .`, beginning with a letter or digit. Safe as a file name, a cgroup's name and in logs.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AppName(Box<str>);

/// A `server-name`: an exact host name or, with `*.` in front, every name beneath it.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum HostPattern {
    /// `blog.example.com`
    Exact(Box<str>),
    /// `*.example.com`, kept without the `*.`; matches any number of labels beneath.
    Wildcard(Box<str>),
}

/// Why a name is refused; the text says what is allowed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct NameError(pub String);

impl AppName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for AppName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let first_ok = text.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let rest_ok = text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.'));
        if first_ok && rest_ok && text.len() <= 63 {
            Ok(Self(text.into()))
        } else {
            Err(NameError(format!(
                "{text:?} cannot be an app's name; use 1 to 63 of a-z, 0-9, '-', '_' and '.', beginning with a letter or digit"
            )))
        }
    }
}

impl TryFrom<String> for AppName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<AppName> for String {
    fn from(name: AppName) -> Self {
        name.0.into()
    }
}

impl fmt::Display for AppName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for HostPattern {
    type Err = NameError;

    /// Reads a `server-name`; upper case and a trailing dot are folded away.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let lower = text.trim_end_matches('.').to_ascii_lowercase();
        let (wildcard, name) = match lower.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, lower.as_str()),
        };
        if let Some(why) = host_name_fault(name) {
            return Err(NameError(format!(
                "{text:?} cannot be a server-name: {why}; write a host name such as \"blog.example.com\" or \"*.example.com\""
            )));
        }
        Ok(if wildcard { Self::Wildcard(name.into()) } else { Self::Exact(name.into()) })
    }
}

/// What is wrong with a host name (RFC 1123 labels, `_` allowed, IPv4 addresses pass as names); `None` when nothing is.
#[must_use]
pub fn host_name_fault(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        return Some("it is empty");
    }
    if name.len() > 253 {
        return Some("it is longer than 253 characters");
    }
    for label in name.split('.') {
        if label.is_empty() {
            return Some("it has an empty label (two dots in a row)");
        }
        if label.len() > 63 {
            return Some("it has a label longer than 63 characters");
        }
        if !label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_') {
            return Some(
                "only letters, digits, '-', '_' and '.' are allowed (write other scripts in their xn-- form)",
            );
        }
        if label.starts_with('-') || label.ends_with('-') {
            return Some("a label begins or ends with '-'");
        }
    }
    None
}

impl TryFrom<String> for HostPattern {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<HostPattern> for String {
    fn from(pattern: HostPattern) -> Self {
        pattern.to_string()
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Wildcard(name) => write!(f, "*.{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_patterns_are_canonical() {
        assert_eq!("Blog.Example.COM.".parse::<HostPattern>().unwrap().to_string(), "blog.example.com");
        assert_eq!(
            "*.Example.com".parse::<HostPattern>().unwrap(),
            HostPattern::Wildcard("example.com".into())
        );
    }

    #[test]
    fn names_that_could_do_harm_are_refused() {
        for bad in ["", "../x", "a/b", ".hidden", "-x", "A", "a\n", "a b", &"x".repeat(64)] {
            assert!(bad.parse::<AppName>().is_err(), "{bad:?}");
        }
        for bad in ["", "*", "*.", "a..b", "a b", "a/b", "a:80", "-a.com", "ä.example", "*.*.com", "a.*.com"]
        {
            assert!(bad.parse::<HostPattern>().is_err(), "{bad:?}");
        }
    }
}
