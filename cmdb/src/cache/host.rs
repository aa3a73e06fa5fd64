//! The one form in which host names are looked up.

use crate::app::host_name_fault;

/// A host name in lower case, without port and trailing dot; kept in place, so that making one allocates nothing.
#[derive(Clone, Copy)]
pub struct CanonicalHost {
    bytes: [u8; Self::LONGEST],
    length: usize,
}

/// Why a Host header or `:authority` cannot be one (RFC 9110 §7.2, RFC 3986 §3.2.2).
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum HostFault {
    /// Nothing there.
    #[error("it is empty")]
    Empty,
    /// More than 253 characters.
    #[error("it is too long")]
    TooLong,
    /// A port that is no number from 1 to 65535.
    #[error("its port is malformed")]
    Port,
    /// No host name and no address.
    #[error("it is no host name: {0}")]
    Name(&'static str),
}

impl CanonicalHost {
    const LONGEST: usize = 255;

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        // Always ASCII: `canonical_host` lets nothing else in.
        std::str::from_utf8(&self.bytes[..self.length]).unwrap_or_default()
    }
}

impl std::fmt::Debug for CanonicalHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_str().fmt(f)
    }
}

/// Brings a Host header's value, or an `:authority`, into its canonical form.
///
/// # Errors
/// Anything that is not `host [":" port]`: user information, spaces, commas, slashes, control and non-ASCII characters.
pub fn canonical_host(raw: &[u8]) -> Result<CanonicalHost, HostFault> {
    if raw.is_empty() {
        return Err(HostFault::Empty);
    }
    let (name, port) = split(raw)?;
    check_port(port)?;
    let name = match name.strip_suffix(b".") {
        Some(name) if !name.starts_with(b"[") => name,
        _ => name,
    };
    if name.len() > CanonicalHost::LONGEST {
        return Err(HostFault::TooLong);
    }
    let mut host = CanonicalHost { bytes: [0; CanonicalHost::LONGEST], length: name.len() };
    host.bytes[..name.len()].copy_from_slice(name);
    host.bytes[..name.len()].make_ascii_lowercase();
    let text =
        std::str::from_utf8(&host.bytes[..name.len()]).map_err(|_| HostFault::Name("it is not ASCII"))?;
    if let Some(address) = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')) {
        address
            .parse::<std::net::Ipv6Addr>()
            .map_err(|_| HostFault::Name("no IPv6 address is in its brackets"))?;
    } else if let Some(why) = host_name_fault(text) {
        return Err(HostFault::Name(why));
    }
    Ok(host)
}

/// Name and port; the colons inside an IPv6 address's brackets belong to the name.
fn split(raw: &[u8]) -> Result<(&[u8], Option<&[u8]>), HostFault> {
    if raw.first() == Some(&b'[') {
        let end = raw.iter().position(|b| *b == b']').ok_or(HostFault::Name("a bracket is not closed"))?;
        let (name, rest) = raw.split_at(end + 1);
        return match rest.split_first() {
            None => Ok((name, None)),
            Some((b':', port)) => Ok((name, Some(port))),
            Some(_) => Err(HostFault::Name("something follows its bracket")),
        };
    }
    match raw.iter().position(|b| *b == b':') {
        None => Ok((raw, None)),
        Some(colon) => Ok((&raw[..colon], Some(&raw[colon + 1..]))),
    }
}

/// RFC 3986 allows an empty port; it means the scheme's own.
fn check_port(port: Option<&[u8]>) -> Result<(), HostFault> {
    let Some(port) = port.filter(|p| !p.is_empty()) else { return Ok(()) };
    let mut number: u32 = 0;
    for digit in port {
        if !digit.is_ascii_digit() {
            return Err(HostFault::Port);
        }
        number = number * 10 + u32::from(digit - b'0');
        if number > 65_535 {
            return Err(HostFault::Port);
        }
    }
    if number == 0 { Err(HostFault::Port) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_host_has_one_form() {
        for (raw, canonical) in [
            ("blog.example.com", "blog.example.com"),
            ("BLOG.Example.com:8080", "blog.example.com"),
            ("blog.example.com.", "blog.example.com"),
            ("blog.example.com.:80", "blog.example.com"),
            ("blog.example.com:", "blog.example.com"),
            ("127.0.0.1:8080", "127.0.0.1"),
            ("[::1]:8080", "[::1]"),
            ("[2001:DB8::1]", "[2001:db8::1]"),
            ("under_score.example", "under_score.example"),
        ] {
            assert_eq!(canonical_host(raw.as_bytes()).unwrap().as_str(), canonical, "{raw}");
        }
    }

    #[test]
    fn what_is_no_host_is_refused() {
        let long = "a".repeat(64 * 1024);
        let labels = "a.".repeat(130);
        for raw in [
            "",
            ".",
            "a b",
            "a, b",
            "a/../b",
            "user@host",
            "host:0",
            "host:99999999",
            "host:8o",
            "host:80:80",
            "a..b",
            "*",
            "*.example.com",
            "[::1",
            "[::1]x",
            "[nonsense]",
            "::1",
            "-a",
            "\u{e4}.example",
            "a\0b",
            "a\tb",
            "[::1].",
            &long,
            &labels,
        ] {
            assert!(canonical_host(raw.as_bytes()).is_err(), "{raw:.40?}");
        }
        assert!(canonical_host(b"\xff\xfe").is_err());
    }
}
