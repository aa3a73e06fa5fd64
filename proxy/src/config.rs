//! What the proxy can be told.

use std::{net::IpAddr, str::FromStr, sync::Arc, time::Duration};

use launcher_client::paths::StateDir;

use crate::{seal::ClusterKey, tls::ClusterTls};

/// Settings of the phases. The defaults run as they are.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where things are on this host.
    pub state: StateDir,
    /// Most requests that wait for an instance, in all apps together.
    pub hold_limit: usize,
    /// How long a client may take until a request's header is whole, counted from its connection or its last answer.
    pub header_timeout: Duration,
    /// How long to wait for a connection to an instance, the wait for a socket included.
    pub connect_timeout: Duration,
    /// Longest silence of an instance while a response is awaited or under way.
    pub read_timeout: Duration,
    /// Longest time in which an instance may take no byte of a request.
    pub write_timeout: Duration,
    /// How long an idle connection to an instance is kept. Below the 5 s after which Apache, Node and uvicorn close theirs,
    /// so that a request never meets a connection that is just being closed; and well below, for a server with a process for
    /// each connection cannot serve those who wait while idle ones hold its processes.
    pub idle_timeout: Duration,
    /// Clients whose `X-Forwarded-*` headers are believed.
    pub trusted: Vec<Network>,
    /// Balancers whose connections begin with a PROXY protocol header, which says who the client is.
    pub balancers: Vec<Network>,
    /// How long requests may go on after SIGTERM.
    pub grace: Duration,
    /// Which access log is written.
    pub access_log: AccessLog,
    /// What it is among several hosts; `None`: there is only this one.
    pub cluster: Option<Cluster>,
}

/// What a proxy is among several hosts.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    /// The host that it is on, whose instances it reaches through the launcher; `None`: it is an edge alone, without one.
    pub node: Option<String>,
    /// Address of the CMDB, which an edge alone follows by itself.
    pub cmdb: Option<String>,
    /// What proxies know each other by.
    pub key: Option<ClusterKey>,
    /// In its place, or besides, certificates.
    pub tls: Option<Arc<ClusterTls>>,
}

/// The format of the access log, `STATE/proxy/access.log`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub enum AccessLog {
    /// One JSON object a line.
    #[default]
    Json,
    /// Apache's "combined".
    Combined,
    /// None; `fastcontainer why` works all the same.
    Off,
}

/// A network: an address and how many of its leading bits count.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

/// Why a network is refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0:?} is no network; write one such as \"10.0.0.0/8\" or \"2001:db8::/32\"")]
pub struct NetworkError(String);

impl Config {
    /// The defaults for a state folder.
    #[must_use]
    pub fn new(state: StateDir) -> Self {
        Self {
            state,
            hold_limit: 10_000,
            header_timeout: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(300),
            write_timeout: Duration::from_secs(60),
            idle_timeout: Duration::from_secs(1),
            trusted: Vec::new(),
            balancers: Vec::new(),
            grace: Duration::from_secs(10),
            access_log: AccessLog::default(),
            cluster: None,
        }
    }

    /// Whether what `client` says about the real client is believed.
    #[must_use]
    pub fn trusts(&self, client: IpAddr) -> bool {
        self.trusted.iter().any(|network| network.contains(client))
    }
}

impl Network {
    /// Whether `address` lies within.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0);
                network.to_bits() & mask == address.to_bits() & mask
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.bits)).unwrap_or(0);
                network.to_bits() & mask == address.to_bits() & mask
            }
            _ => false,
        }
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let refuse = || NetworkError(text.to_owned());
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse::<u8>().map_err(|_| refuse())?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| refuse())?;
        let widest = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.unwrap_or(widest);
        if bits > widest { Err(refuse()) } else { Ok(Self { address, bits }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_contain_what_they_should() {
        let within = |network: &str, address: &str| {
            network.parse::<Network>().unwrap().contains(address.parse().unwrap())
        };
        assert!(within("10.0.0.0/8", "10.255.0.1"));
        assert!(!within("10.0.0.0/8", "11.0.0.1"));
        assert!(within("0.0.0.0/0", "8.8.8.8"));
        assert!(within("127.0.0.1", "127.0.0.1"));
        assert!(within("127.0.0.1", "::ffff:127.0.0.1"));
        assert!(within("2001:db8::/32", "2001:db8:1::1"));
        assert!(!within("::/0", "8.8.8.8"));
        for bad in ["", "10.0.0.0/33", "10.0.0/8", "x", "10.0.0.0/-1", "::/129"] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }
}
