//! How many connections wait to be accepted, by `sock_diag(7)`: 20 µs, whatever else goes on.
//!
//! `/proc/PID/net/tcp` tells the same, but to come to its end the kernel walks the table of all connections of the whole
//! host, which took 4 ms of CPU for each look.

use std::{
    io,
    os::fd::OwnedFd,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

/// `SOCK_DIAG_BY_FAMILY`, `NLM_F_REQUEST | NLM_F_DUMP`, `NLMSG_ERROR` and `NLMSG_DONE` of the kernel's headers.
const BY_FAMILY: u16 = 20;
const DUMP: u16 = 0x301;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `idiag_rqueue` in `struct inet_diag_msg` behind it: family, state, timer, retransmissions; the socket's id; expiry.
const RQUEUE: usize = HEADER + 4 + 48 + 4;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const TCP: u8 = 6;
/// `1 << TCP_LISTEN`
const LISTEN: u32 = 1 << 10;

/// Asks the kernel about the listening sockets of one network namespace.
#[derive(Debug)]
pub struct ListenQueue {
    socket: OwnedFd,
    asked: AtomicU32,
}

impl ListenQueue {
    /// Asks through a socket of [`diag_socket`], about the namespace in which that was made.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, asked: AtomicU32::new(0) }
    }

    /// Connections to 127.0.0.1:`port` that are made and not accepted; 0 where nothing listens.
    ///
    /// # Errors
    /// The system's; `ENOENT` from a kernel without `inet_diag`.
    pub fn len(&self, port: u16) -> io::Result<u32> {
        // A socket that listens on all addresses of IPv6 only takes what no IPv4 one does.
        match self.of_family(AF_INET, port)? {
            Some(length) => Ok(length),
            None => Ok(self.of_family(AF_INET6, port)?.unwrap_or(0)),
        }
    }

    fn of_family(&self, family: u8, port: u16) -> io::Result<Option<u32>> {
        let number = self.asked.fetch_add(1, Relaxed);
        send(&self.socket, &request(family, port, number), SendFlags::empty())?;
        let mut found = None;
        let mut buffer = vec![0; 32 << 10];
        loop {
            let (length, _) = recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = &buffer[..length];
            while let Some((kind, message, after)) = next(rest, number) {
                match kind {
                    Some(DONE) => return Ok(found),
                    Some(ERROR) => {
                        let errno = number_at(message, HEADER).map_or(0, u32::cast_signed);
                        return Err(io::Error::from_raw_os_error(-errno));
                    }
                    Some(BY_FAMILY) => {
                        let queue = number_at(message, RQUEUE).unwrap_or(0);
                        found = Some(found.unwrap_or(0) + queue);
                    }
                    _ => {}
                }
                rest = after;
            }
        }
    }
}

/// A socket to ask through, in the caller's network namespace.
///
/// # Errors
/// The system's.
pub fn diag_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::SOCK_DIAG))?)
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`.
fn request(family: u8, port: u16, number: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(72);
    bytes.extend(72_u32.to_ne_bytes());
    bytes.extend(BY_FAMILY.to_ne_bytes());
    bytes.extend(DUMP.to_ne_bytes());
    bytes.extend(number.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend([family, TCP, 0, 0]);
    bytes.extend(LISTEN.to_ne_bytes());
    // The socket's id, of which only its own port is given.
    bytes.extend(port.to_be_bytes());
    bytes.resize(72, 0);
    bytes
}

/// The first message, its kind (`None`: an answer to another question), and what follows it.
fn next(bytes: &[u8], number: u32) -> Option<(Option<u16>, &[u8], &[u8])> {
    let length = usize::try_from(number_at(bytes, 0)?).ok()?;
    let message = bytes.get(..length).filter(|message| message.len() >= HEADER)?;
    let kind = u16::from_ne_bytes([message[4], message[5]]);
    let after = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some(((number_at(message, 8)? == number).then_some(kind), message, after))
}

fn number_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn connections_that_nobody_accepts_are_counted() {
        let queue = ListenQueue::new(diag_socket().unwrap());
        for (address, connections) in [("127.0.0.1:0", 3), ("0.0.0.0:0", 1), ("[::]:0", 2)] {
            let listener = TcpListener::bind(address).unwrap();
            let port = listener.local_addr().unwrap().port();
            assert_eq!(queue.len(port).unwrap(), 0);
            let _waiting: Vec<_> =
                (0..connections).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
            assert_eq!(queue.len(port).unwrap(), connections, "{address}");
        }
        assert_eq!(queue.len(1).unwrap(), 0, "nothing listens there");
    }
}
