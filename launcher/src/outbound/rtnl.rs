//! Questions to the kernel's routing sockets (rtnetlink(7)), one at a time, each awaited.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage, State};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::net::{RecvFlags, SendFlags};

/// More than any one packet of an answer: the kernel fills packets of at most 32 KiB.
const BUFFER: usize = 64 * 1024;

/// A routing socket of one network namespace.
#[derive(Debug)]
pub(super) struct Rtnl {
    socket: OwnedFd,
    sequence: u32,
}

/// An interface, as far as it matters here.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mtu: u32,
    /// Whether packets pass: the kernel knows this a moment after the interface has been set up.
    pub(super) is_up: bool,
}

/// A route of the main table.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Route {
    /// `None`: the default route.
    pub(super) to: Option<IpNet>,
    /// Through which interface; `None` for those that lead nowhere.
    pub(super) through: Option<u32>,
}

impl Rtnl {
    pub(super) fn new(socket: OwnedFd) -> Rtnl {
        Rtnl { socket, sequence: 0 }
    }

    pub(super) fn make_link(&mut self, message: LinkMessage) -> io::Result<()> {
        self.tell(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    pub(super) fn set_up(&mut self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.tell(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Takes up to 50 ms under the kernel's one lock for all of networking: never where somebody waits.
    pub(super) fn remove_link(&mut self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.tell(RouteNetlinkMessage::DelLink(message), 0)
    }

    pub(super) fn interface(&mut self, name: &str) -> io::Result<Interface> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let answers = self.ask(RouteNetlinkMessage::GetLink(message), 0)?;
        answers.into_iter().find_map(interface).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    pub(super) fn interfaces(&mut self) -> io::Result<Vec<Interface>> {
        let answers = self.ask(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)?;
        Ok(answers.into_iter().filter_map(interface).collect())
    }

    /// Every address of this namespace.
    pub(super) fn addresses(&mut self) -> io::Result<Vec<IpAddr>> {
        let answers = self.ask(RouteNetlinkMessage::GetAddress(AddressMessage::default()), NLM_F_DUMP)?;
        let address = |answer| match answer {
            RouteNetlinkMessage::NewAddress(message) => {
                let of = |local: bool| {
                    message.attributes.iter().find_map(|attribute| match attribute {
                        AddressAttribute::Local(address) if local => Some(*address),
                        AddressAttribute::Address(address) if !local => Some(*address),
                        _ => None,
                    })
                };
                of(true).or_else(|| of(false))
            }
            _ => None,
        };
        Ok(answers.into_iter().filter_map(address).collect())
    }

    pub(super) fn routes(&mut self) -> io::Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let answers = self.ask(RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP)?;
            routes.extend(answers.into_iter().filter_map(route));
        }
        Ok(routes)
    }

    /// Gives an interface an address that is used at once (IPv6: without looking whether somebody has it).
    pub(super) fn add_address(&mut self, index: u32, net: IpNet) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family(net.addr());
        message.header.prefix_len = net.prefix_len();
        message.header.index = index;
        message.header.scope = AddressScope::Universe;
        message.attributes.push(AddressAttribute::Address(net.addr()));
        message.attributes.push(AddressAttribute::Local(net.addr()));
        if net.addr().is_ipv6() {
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        self.tell(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Adds a route: through an interface, perhaps by way of a gateway.
    pub(super) fn add_route(&mut self, to: IpNet, index: u32, gateway: Option<IpAddr>) -> io::Result<()> {
        let mut message =
            unicast(to, if gateway.is_some() { RouteScope::Universe } else { RouteScope::Link });
        message.attributes.push(RouteAttribute::Oif(index));
        if let Some(gateway) = gateway {
            message.attributes.push(RouteAttribute::Gateway(gateway.into()));
        }
        self.tell(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Marks a net as ours; what no narrower route leads to is unreachable instead of being sent to the gateway.
    pub(super) fn add_unreachable(&mut self, net: IpNet) -> io::Result<()> {
        self.tell(RouteNetlinkMessage::NewRoute(unreachable(net)), NLM_F_CREATE | NLM_F_REPLACE)
    }

    pub(super) fn remove_unreachable(&mut self, net: IpNet) -> io::Result<()> {
        self.tell(RouteNetlinkMessage::DelRoute(unreachable(net)), 0)
    }

    fn tell(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.ask(message, flags | NLM_F_ACK).map(drop)
    }

    /// Sends one request and collects its answers up to the acknowledgement, the end of the list, or the one answer.
    fn ask(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut packet = NetlinkMessage::from(message);
        packet.header.flags = NLM_F_REQUEST | flags;
        packet.header.sequence_number = self.sequence;
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        rustix::net::send(&self.socket, &bytes, SendFlags::empty())?;

        let one_answer = flags & (NLM_F_ACK | NLM_F_DUMP) == 0;
        let mut answers = Vec::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            let (length, _) = rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((size, next)) = message_size(rest) {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&rest[..size]);
                rest = rest.get(next..).unwrap_or_default();
                let answer = match answer {
                    Ok(answer) if answer.header.sequence_number == self.sequence => answer,
                    // Left over from a request that failed half-way, or something newer than this library.
                    _ => continue,
                };
                match answer.payload {
                    NetlinkPayload::Error(error) => {
                        return if error.code.is_none() { Ok(answers) } else { Err(error.to_io()) };
                    }
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::InnerMessage(message) => {
                        answers.push(message);
                        if one_answer {
                            return Ok(answers);
                        }
                    }
                    _ => {}
                }
            }
        }
    }
}

/// The length of the first message and where the next begins (both are aligned to four bytes).
fn message_size(bytes: &[u8]) -> Option<(usize, usize)> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
    let length = usize::try_from(length).ok().filter(|length| *length >= 16 && *length <= bytes.len())?;
    Some((length, (length + 3) & !3))
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn unicast(to: IpNet, scope: RouteScope) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family(to.addr()),
        destination_prefix_length: to.prefix_len(),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Static,
        // IPv6 knows no scopes of routes.
        scope: if to.addr().is_ipv4() { scope } else { RouteScope::Universe },
        kind: RouteType::Unicast,
        ..RouteHeader::default()
    };
    if to.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(to.addr().into()));
    }
    message
}

fn unreachable(net: IpNet) -> RouteMessage {
    let mut message = unicast(net, RouteScope::Universe);
    message.header.kind = RouteType::Unreachable;
    message
}

fn interface(answer: RouteNetlinkMessage) -> Option<Interface> {
    let RouteNetlinkMessage::NewLink(message) = answer else { return None };
    let mut interface = Interface { index: message.header.index, name: String::new(), mtu: 0, is_up: false };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name = name,
            LinkAttribute::Mtu(mtu) => interface.mtu = mtu,
            LinkAttribute::OperState(state) => interface.is_up = state == State::Up,
            _ => {}
        }
    }
    Some(interface)
}

fn route(answer: RouteNetlinkMessage) -> Option<Route> {
    let RouteNetlinkMessage::NewRoute(message) = answer else { return None };
    if message.header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let mut route = Route { to: None, through: None };
    for attribute in message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => {
                let address = match to {
                    netlink_packet_route::route::RouteAddress::Inet(v4) => IpAddr::V4(v4),
                    netlink_packet_route::route::RouteAddress::Inet6(v6) => IpAddr::V6(v6),
                    _ => return None,
                };
                route.to = IpNet::new(address, message.header.destination_prefix_length).ok();
            }
            RouteAttribute::Oif(index) => route.through = Some(index),
            RouteAttribute::MultiPath(hops) => route.through = hops.first().map(|hop| hop.interface_index),
            _ => {}
        }
    }
    Some(route)
}
