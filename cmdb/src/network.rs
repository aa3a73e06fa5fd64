//! `[network]`: where an app may connect to.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::app::{NameError, host_name_fault};

/// `[network]`. Closed unless something is named.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Network {
    /// Whether every public address may be reached, with DNS.
    pub internet: bool,
    /// What may be reached besides.
    pub destinations: Vec<Destination>,
}

/// One `"host:port"` of `outbound`.
#[derive(Clone, Debug, Eq, Hash, PartialEq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Destination {
    /// Which hosts.
    pub host: DestinationHost,
    /// Which port.
    pub port: u16,
    /// By which protocol.
    pub protocol: Protocol,
}

/// The hosts of a [`Destination`].
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum DestinationHost {
    /// An address (with the full prefix) or a network, without host bits.
    Net(IpNet),
    /// A host name, looked up by the launcher.
    Name(Box<str>),
}

/// The protocol of a [`Destination`].
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Protocol {
    /// The usual one.
    Tcp,
    /// Written as `/udp` behind the port.
    Udp,
}

/// Addresses at which clouds tell machines about themselves, secrets included: never for a tenant.
pub const METADATA: [IpAddr; 6] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)), // AWS, GCP, Azure, OpenStack and others
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),   // Azure's wire server
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)), // Alibaba
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),     // Oracle
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)), // AWS
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)), // GCP
];

impl Network {
    /// Whether nothing may be reached: the container needs no link.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        !self.internet && self.destinations.is_empty()
    }

    /// The host names among the destinations, each once.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self
            .destinations
            .iter()
            .filter_map(|destination| match &destination.host {
                DestinationHost::Name(name) => Some(&**name),
                DestinationHost::Net(_) => None,
            })
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

/// Why an address is nobody's destination, whatever an operator lists; `None` for those that may be listed.
#[must_use]
pub fn forbidden(address: IpAddr) -> Option<&'static str> {
    if METADATA.contains(&address) {
        return Some("it is a cloud's metadata address, which tells a tenant the machine's secrets");
    }
    if address.is_loopback() {
        return Some("inside the container this is the container itself");
    }
    if address.is_unspecified() {
        return Some("it is no address to connect to");
    }
    if address.is_multicast() || address == IpAddr::V4(Ipv4Addr::BROADCAST) {
        return Some("it is a multicast or broadcast address");
    }
    match address {
        IpAddr::V4(v4) if v4.is_link_local() => Some("it is a link-local address"),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some("it is a link-local address"),
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Some("it is an IPv4 address in IPv6 dress"),
        _ => None,
    }
}

impl FromStr for Destination {
    type Err = NameError;

    /// Reads `10.0.0.5:3306`, `10.1.0.0/16:443`, `[2001:db8::5]:5432`, `[2001:db8::/32]:443`, `db.internal:5432`,
    /// each with an optional `/udp` or `/tcp`. The error's text is fault and mend, parted by `"; "`.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let fail =
            |why: &str, mend: &str| Err(NameError(format!("{text:?} is no destination: {why}; {mend}")));
        let shape =
            "write \"10.0.0.5:3306\", \"10.1.0.0/16:443\", \"[2001:db8::5]:5432\" or \"db.internal:5432\"";
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, "udp")) => (rest, Protocol::Udp),
            Some((rest, "tcp")) => (rest, Protocol::Tcp),
            _ => (text, Protocol::Tcp),
        };
        let Some((host, port)) = rest.rsplit_once(':').filter(|(host, _)| !host.is_empty()) else {
            return fail("it has no port", shape);
        };
        let Some(port) = port.parse::<u16>().ok().filter(|port| *port > 0) else {
            return fail("its port is no number from 1 to 65535", shape);
        };
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        if bracketed.is_none() && host.contains(':') {
            return fail("an IPv6 address stands in brackets", "write \"[2001:db8::5]:5432\"");
        }
        let inner = bracketed.unwrap_or(host);
        let net = match (inner.parse::<IpNet>(), inner.parse::<IpAddr>()) {
            (Ok(net), _) => Some(net),
            (_, Ok(address)) => Some(IpNet::from(address)),
            _ => None,
        };
        let host = match net {
            Some(net) => {
                if net.addr() != net.network() {
                    return fail(
                        "the address has bits behind the prefix",
                        &format!("write \"{}\", or leave the prefix out", net.trunc()),
                    );
                }
                if let Some(why) = forbidden(net.addr()).filter(|_| net.prefix_len() > 0) {
                    return fail(why, "take it out");
                }
                DestinationHost::Net(net)
            }
            None if bracketed.is_some() => return fail("there is no IPv6 address in the brackets", shape),
            None if inner.contains('/') => return fail("there is no network before the port", shape),
            None => {
                let name = inner.trim_end_matches('.').to_ascii_lowercase();
                if let Some(why) = host_name_fault(&name) {
                    return fail(why, shape);
                }
                if name == "localhost" || name.ends_with(".localhost") {
                    return fail(
                        "inside the container this is the container itself",
                        "name the host by its address",
                    );
                }
                if name.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
                    return fail("this is neither an address nor a name", shape);
                }
                DestinationHost::Name(name.into())
            }
        };
        Ok(Destination { host, port, protocol })
    }
}

impl TryFrom<String> for Destination {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Destination> for String {
    fn from(destination: Destination) -> Self {
        destination.to_string()
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match &self.host {
            DestinationHost::Name(name) => name.to_string(),
            DestinationHost::Net(net) if net.prefix_len() == net.max_prefix_len() => net.addr().to_string(),
            DestinationHost::Net(net) => net.to_string(),
        };
        let is_v6 = matches!(self.host, DestinationHost::Net(IpNet::V6(_)));
        match is_v6 {
            true => write!(f, "[{text}]:{}", self.port)?,
            false => write!(f, "{text}:{}", self.port)?,
        }
        if self.protocol == Protocol::Udp { f.write_str("/udp") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_read_and_written_alike() {
        for text in [
            "10.0.0.5:3306",
            "10.1.0.0/16:443",
            "[2001:db8::5]:5432",
            "[2001:db8::/32]:443",
            "db.internal:5432",
            "10.0.0.53:53/udp",
            "0.0.0.0/0:80",
        ] {
            assert_eq!(text.parse::<Destination>().unwrap().to_string(), text);
        }
        assert_eq!("DB.Internal.:5432/tcp".parse::<Destination>().unwrap().to_string(), "db.internal:5432");
    }

    #[test]
    fn what_no_tenant_may_reach_is_no_destination() {
        for bad in [
            "",
            "10.0.0.5",
            ":3306",
            "10.0.0.5:0",
            "10.0.0.5:99999",
            "10.1.2.3/16:443",
            "2001:db8::5:5432",
            "[10.0.0:5432",
            "127.0.0.1:6379",
            "[::1]:6379",
            "localhost:3306",
            "db.localhost:3306",
            "169.254.169.254:80",
            "[fd00:ec2::254]:80",
            "169.254.0.0/16:80",
            "[fe80::1]:80",
            "[::ffff:10.0.0.5]:80",
            "224.0.0.1:80",
            "a b:80",
            "10.0.0:80",
            "http://x:80",
        ] {
            assert!(bad.parse::<Destination>().is_err(), "{bad:?}");
        }
    }
}
