//! The private addresses of one launcher's containers: a net that nobody on this host uses, and who has which of it.

use std::collections::{BTreeSet, VecDeque};
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// The first of the nets that are tried when none is configured: 10.64.0.0/16 up to 10.127.0.0/16. Clouds and home
/// routers give out lower or higher ones.
const FIRST: u8 = 64;
/// How many are tried.
const TRIED: u8 = 64;

/// The nets of one launcher.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Nets {
    /// The first address is the host's end of every link.
    pub(super) v4: Ipv4Net,
    /// A unique local net (RFC 4193); `None` where the host cannot forward IPv6.
    pub(super) v6: Option<Ipv6Net>,
}

/// No private net is free.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub enum PoolError {
    /// What was configured is in use.
    #[error("{wanted} overlaps {taken}, which this host uses already; choose another with --network-pool")]
    Taken {
        /// What was asked for.
        wanted: Ipv4Net,
        /// A route or address of the host.
        taken: IpNet,
    },
    /// Not one is free.
    #[error(
        "every net from 10.64.0.0/16 to 10.127.0.0/16 overlaps a route of this host; choose one with --network-pool"
    )]
    NoneFree,
}

/// Chooses the IPv4 net: the configured one, or the first free one from a place that differs between launchers.
pub(super) fn choose(wanted: Option<Ipv4Net>, seed: u64, taken: &[IpNet]) -> Result<Ipv4Net, PoolError> {
    let overlap = |net: Ipv4Net| taken.iter().find(|other| overlaps(IpNet::V4(net), **other)).copied();
    if let Some(wanted) = wanted {
        return match overlap(wanted) {
            None => Ok(wanted),
            Some(taken) => Err(PoolError::Taken { wanted, taken }),
        };
    }
    let start = u8::try_from(seed % u64::from(TRIED)).unwrap_or(0);
    (0..TRIED)
        .map(|step| {
            let second = FIRST + (start + step) % TRIED;
            Ipv4Net::new_assert(Ipv4Addr::new(10, second, 0, 0), 16)
        })
        .find(|net| overlap(*net).is_none())
        .ok_or(PoolError::NoneFree)
}

/// Whether two nets share an address; default routes do not count.
fn overlaps(a: IpNet, b: IpNet) -> bool {
    b.prefix_len() > 0 && (a.contains(&b) || b.contains(&a))
}

/// A unique local net (RFC 4193): `fd` and 40 bits of the seed, then 16 bits that say what it is for.
pub(super) fn unique_local(seed: u64) -> Ipv6Net {
    let [_, _, _, a, b, c, d, e] = seed.to_be_bytes();
    let group = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    Ipv6Net::new_assert(Ipv6Addr::new(group(0xfd, a), group(b, c), group(d, e), 0xfc, 0, 0, 0, 0), 64)
}

impl Nets {
    /// The host's end of every link; containers send what leaves them there.
    pub(super) fn gateway(&self) -> Ipv4Addr {
        self.v4.hosts().next().unwrap_or(self.v4.network())
    }

    /// The n-th container's addresses.
    pub(super) fn addresses(&self, number: u32) -> (Ipv4Addr, Option<Ipv6Addr>) {
        let v4 = Ipv4Addr::from_bits(self.v4.network().to_bits().saturating_add(number));
        let v6 = self.v6.map(|net| Ipv6Addr::from_bits(net.network().to_bits() | u128::from(number)));
        (v4, v6)
    }

    /// How many numbers there are, beginning with [`FIRST_NUMBER`].
    fn count(&self) -> u32 {
        let bits = u32::from(self.v4.max_prefix_len() - self.v4.prefix_len());
        1_u32.checked_shl(bits).unwrap_or(u32::MAX).saturating_sub(FIRST_NUMBER + 1)
    }
}

/// Number 0 is the net, 1 the gateway.
const FIRST_NUMBER: u32 = 2;

/// Who has which number. A number that was given back is given out again as late as possible: whatever still travels to
/// the address of a container that has ended must not reach another.
#[derive(Debug)]
pub(super) struct Numbers {
    last: u32,
    next: u32,
    used: BTreeSet<u32>,
    returned: VecDeque<u32>,
}

impl Numbers {
    pub(super) fn new(nets: &Nets) -> Numbers {
        let last = FIRST_NUMBER + nets.count().saturating_sub(1);
        Numbers { last, next: FIRST_NUMBER, used: BTreeSet::new(), returned: VecDeque::new() }
    }

    /// A number that nobody has; `None` when all are taken.
    pub(super) fn take(&mut self) -> Option<u32> {
        while self.next <= self.last {
            let number = self.next;
            self.next += 1;
            if self.used.insert(number) {
                return Some(number);
            }
        }
        let number = self.returned.pop_front()?;
        self.used.insert(number);
        Some(number)
    }

    /// A container of an earlier daemon has it.
    pub(super) fn claim(&mut self, number: u32) -> bool {
        (FIRST_NUMBER..=self.last).contains(&number) && self.used.insert(number)
    }

    pub(super) fn give_back(&mut self, number: u32) {
        if self.used.remove(&number) {
            self.returned.push_back(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn a_net_that_the_host_uses_is_never_chosen() {
        let taken = [net("0.0.0.0/0"), net("10.64.0.0/15"), net("10.66.3.0/24"), net("fd00::/8")];
        assert_eq!(choose(None, 0, &taken).unwrap().to_string(), "10.67.0.0/16");
        let wanted = "10.65.1.0/24".parse().unwrap();
        assert!(matches!(choose(Some(wanted), 0, &taken), Err(PoolError::Taken { .. })));
        assert_eq!(choose(None, 0, &[net("10.0.0.0/8")]), Err(PoolError::NoneFree));
    }

    #[test]
    fn an_address_is_used_again_as_late_as_possible() {
        let nets = Nets { v4: "10.64.0.0/29".parse().unwrap(), v6: Some(unique_local(7)) };
        let mut numbers = Numbers::new(&nets);
        assert!(numbers.claim(3) && !numbers.claim(3) && !numbers.claim(1) && !numbers.claim(7));
        let first = numbers.take().unwrap();
        numbers.give_back(first);
        let rest: Vec<u32> = std::iter::from_fn(|| numbers.take()).collect();
        assert_eq!((first, rest), (2, vec![4, 5, 6, 2]), "7 is the net's broadcast address");
        assert_eq!(nets.addresses(5).0.to_string(), "10.64.0.5");
        assert_eq!(nets.gateway().to_string(), "10.64.0.1");
        assert!(nets.addresses(5).1.unwrap().is_unique_local());
    }
}
