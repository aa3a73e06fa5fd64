//! One container's link: a pair of virtual Ethernet interfaces, one end on the host, the other inside as `eth0`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use serde::{Deserialize, Serialize};

use super::forwarding;
use super::rtnl::Rtnl;

/// The interface's name inside.
const INSIDE: &str = "eth0";
/// The host's end, as IPv6 containers see it.
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// How long the kernel may take until packets pass.
const PATIENCE: Duration = Duration::from_millis(500);

/// What a link is like; also written on the container, for a daemon that adopts it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct LinkPlan {
    /// The number within the launcher's nets.
    pub(super) number: u32,
    /// Name of the host's end.
    pub(super) name: String,
    /// The device group of the host's end: which rules hold for it.
    pub(super) group: u32,
    pub(super) v4: Ipv4Addr,
    pub(super) v6: Option<Ipv6Addr>,
    pub(super) gateway: Ipv4Addr,
    pub(super) mtu: u32,
}

/// Why a link could not be made.
#[derive(Debug, thiserror::Error)]
#[error("{step} of {name}: {error}")]
pub struct LinkError {
    step: &'static str,
    name: String,
    error: io::Error,
}

/// Makes the link and returns when packets pass. A link that is there already, whole, is left as it is.
pub(super) fn make(
    plan: &LinkPlan,
    host: &mut Rtnl,
    inside: &mut Rtnl,
    netns: BorrowedFd<'_>,
) -> Result<(), LinkError> {
    let fail = |step| move |error| LinkError { step, name: plan.name.clone(), error };
    match host.make_link(pair(plan, netns)) {
        // Its number is free, so this is what is left of a container that has ended; the kernel is slow to clean up.
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
            let old = host.interface(&plan.name).map_err(fail("finding the old one"))?;
            host.remove_link(old.index).map_err(fail("removing the old one"))?;
            host.make_link(pair(plan, netns)).map_err(fail("making the pair"))?;
        }
        made => made.map_err(fail("making the pair"))?,
    }
    connect(plan, host, inside).inspect_err(|_| remove(&plan.name, host))
}

fn connect(plan: &LinkPlan, host: &mut Rtnl, inside: &mut Rtnl) -> Result<(), LinkError> {
    let fail = |step| move |error| LinkError { step, name: plan.name.clone(), error };
    let outer = host.interface(&plan.name).map_err(fail("finding the host's end"))?.index;
    let inner = inside.interface(INSIDE).map_err(fail("finding the container's end"))?.index;
    let host_v4 = |address: Ipv4Addr| IpNet::V4(Ipv4Net::from(address));

    inside.set_up(inner).map_err(fail("setting the container's end up"))?;
    forwarding::of_link(&plan.name, plan.v6.is_some()).map_err(fail("forwarding"))?;
    host.add_address(outer, host_v4(plan.gateway)).map_err(fail("address of the host's end"))?;
    host.add_route(host_v4(plan.v4), outer, None).map_err(fail("route to the container"))?;
    inside.add_address(inner, host_v4(plan.v4)).map_err(fail("address of the container"))?;
    inside.add_route(host_v4(plan.gateway), inner, None).map_err(fail("route to the host's end"))?;
    let everything = IpNet::V4(Ipv4Net::default());
    inside
        .add_route(everything, inner, Some(IpAddr::V4(plan.gateway)))
        .map_err(fail("the container's default route"))?;

    if let Some(v6) = plan.v6 {
        let v6 = IpNet::V6(Ipv6Net::from(v6));
        let gateway = IpNet::V6(Ipv6Net::new_assert(GATEWAY_V6, 64));
        host.add_address(outer, gateway).map_err(fail("IPv6 address of the host's end"))?;
        host.add_route(v6, outer, None).map_err(fail("IPv6 route to the container"))?;
        inside.add_address(inner, v6).map_err(fail("IPv6 address of the container"))?;
        let everything = IpNet::V6(Ipv6Net::default());
        inside
            .add_route(everything, inner, Some(IpAddr::V6(GATEWAY_V6)))
            .map_err(fail("the container's IPv6 default route"))?;
    }
    // A packet that is sent before the kernel has noticed that both ends are up is lost, and a connection with it for
    // a whole second.
    until_up(&plan.name, host)
        .and_then(|()| until_up(INSIDE, inside))
        .map_err(fail("waiting for it to be up"))
}

/// Removes a host's end, and with it the pair; for what no container needs.
pub(super) fn remove(name: &str, host: &mut Rtnl) {
    let removed = host.interface(name).and_then(|interface| host.remove_link(interface.index));
    if let Err(error) = removed
        && error.raw_os_error() != Some(libc::ENODEV)
    {
        tracing::warn!(%error, name, "a network link cannot be removed");
    }
}

fn pair(plan: &LinkPlan, netns: BorrowedFd<'_>) -> LinkMessage {
    let end = |attributes: Vec<LinkAttribute>| {
        let mut message = LinkMessage::default();
        message.attributes = attributes;
        message.attributes.push(LinkAttribute::Mtu(plan.mtu));
        message
    };
    let inner =
        end(vec![LinkAttribute::IfName(INSIDE.to_owned()), LinkAttribute::NetNsFd(netns.as_raw_fd())]);
    // The inner end cannot be up yet: while it is made it has no other end.
    let mut outer = end(vec![
        LinkAttribute::IfName(plan.name.clone()),
        LinkAttribute::Group(plan.group),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(inner))),
        ]),
    ]);
    outer.header.flags = LinkFlags::Up;
    outer.header.change_mask = LinkFlags::Up;
    outer
}

fn until_up(name: &str, rtnl: &mut Rtnl) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !rtnl.interface(name)?.is_up {
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}
