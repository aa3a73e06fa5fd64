//! The listening socket of the applications.

use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::fd::OwnedFd;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrIn, bind, listen, setsockopt, socket,
    sockopt,
};

/// Listens on every IPv4 address, non-blocking, with the deepest queue that the kernel allows.
///
/// The standard library asks for a queue of 128: a crowd that waits for a start would overflow it, and each lost SYN
/// costs its sender a second.
///
/// # Errors
/// Whatever `socket`, `setsockopt`, `bind` or `listen` answers.
pub fn listen_on(port: u16) -> nix::Result<TcpListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket: OwnedFd = socket(AddressFamily::Inet, SockType::Stream, flags, SockProtocol::Tcp)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    let address = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port));
    bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &address)?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(TcpListener::from(socket))
}

/// The name that the kernel gives this container (or host); empty if it has none.
#[must_use]
pub fn hostname() -> String {
    nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
