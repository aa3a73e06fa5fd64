//! How many connections a listening socket has that nobody has accepted yet.
//!
//! Asked of the kernel by `sock_diag(7)`, for the one socket that gets what is sent to 127.0.0.1: some µs. The table
//! `/proc/PID/net/tcp` tells the same and costs milliseconds, because the kernel walks through the connections of all
//! namespaces of the host to write it.

use std::{io, os::fd::OwnedFd};

use rustix::net::{RecvFlags, SendFlags, recv, send};

/// `SOCK_DIAG_BY_FAMILY`, also the type of the answer.
const BY_FAMILY: u16 = 20;
/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// Bytes of a `struct nlmsghdr`.
const HEADER: usize = 16;
/// Bytes of a `struct inet_diag_req_v2`.
const QUESTION: usize = 56;
/// `TCP_LISTEN`.
const LISTEN: u8 = 10;
/// Where `idiag_state` and `idiag_rqueue` stand in a `struct inet_diag_msg`.
const STATE: usize = 1;
const RQUEUE: usize = 56;

/// The queue before one port of one network namespace.
#[derive(Debug)]
pub struct Backlog {
    /// A netlink socket that was made in that namespace.
    socket: OwnedFd,
    port: u16,
}

impl Backlog {
    /// `socket` is of `NETLINK_SOCK_DIAG`, non-blocking, and was made in the namespace.
    #[must_use]
    pub fn new(socket: OwnedFd, port: u16) -> Self {
        Self { socket, port }
    }

    /// Its length now; 0 when nothing listens.
    ///
    /// # Errors
    /// The kernel does not answer such questions.
    pub fn length(&self) -> io::Result<u32> {
        send(&self.socket, &question(self.port), SendFlags::empty())?;
        // The kernel has answered before `send` returns.
        let mut answer = [0; 512];
        let (_, length) = recv(&self.socket, &mut answer, RecvFlags::empty())?;
        length_in(answer.get(..length).unwrap_or_default())
    }
}

/// Which socket gets what is sent to 127.0.0.1 and that port?
fn question(port: u16) -> [u8; HEADER + QUESTION] {
    let mut bytes = [0; HEADER + QUESTION];
    let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
    let size = u32::try_from(HEADER + QUESTION).unwrap_or(u32::MAX);
    put(0, &size.to_ne_bytes());
    put(4, &BY_FAMILY.to_ne_bytes());
    put(6, &REQUEST.to_ne_bytes());
    let [family, protocol] =
        [libc::AF_INET, libc::IPPROTO_TCP].map(|number| u8::try_from(number).unwrap_or(0));
    put(HEADER, &[family, protocol]);
    put(HEADER + 4, &u32::MAX.to_ne_bytes());
    put(HEADER + 8, &port.to_be_bytes());
    put(HEADER + 12, &[127, 0, 0, 1]);
    // `INET_DIAG_NOCOOKIE`: whatever socket it is.
    put(HEADER + 48, &[0xff; 8]);
    bytes
}

fn length_in(answer: &[u8]) -> io::Result<u32> {
    let word =
        |at: usize| answer.get(at..at + 4).and_then(|part| part.try_into().ok()).map(u32::from_ne_bytes);
    let short = || io::Error::other("the kernel's answer about a socket is too short");
    let kind =
        answer.get(4..6).and_then(|part| part.try_into().ok()).map(u16::from_ne_bytes).ok_or_else(short)?;
    if kind != BY_FAMILY {
        let error = word(HEADER).ok_or_else(short)?.cast_signed().saturating_neg();
        return if error == libc::ENOENT { Ok(0) } else { Err(io::Error::from_raw_os_error(error)) };
    }
    let state = answer.get(HEADER + STATE).copied().ok_or_else(short)?;
    let queue = word(HEADER + RQUEUE).ok_or_else(short)?;
    Ok(if state == LISTEN { queue } else { 0 })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::network::NetNs;

    async fn backlog(port: u16) -> Backlog {
        let own = std::fs::File::open("/proc/self/ns/net").unwrap();
        let socket = NetNs::new().make_diagnosis(std::sync::Arc::new(own.into())).await.unwrap();
        Backlog::new(socket, port)
    }

    #[tokio::test]
    async fn connections_that_nobody_accepts_are_counted() {
        for address in ["127.0.0.1:0", "0.0.0.0:0", "[::]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let port = listener.local_addr().unwrap().port();
            let backlog = backlog(port).await;
            assert_eq!(backlog.length().unwrap(), 0, "{address}");
            let _waiting: Vec<_> = (0..3).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
            assert_eq!(backlog.length().unwrap(), 3, "{address}");
            let _accepted = listener.accept().unwrap();
            assert_eq!(backlog.length().unwrap(), 2, "{address}");
        }
    }

    #[tokio::test]
    async fn a_port_on_which_nothing_listens_has_no_queue() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        assert_eq!(backlog(port).await.length().unwrap(), 0);
    }

    #[test]
    fn what_the_kernel_refuses_is_an_error() {
        let mut refusal = [0; HEADER + 4];
        refusal[4..6].copy_from_slice(&2_u16.to_ne_bytes());
        refusal[HEADER..].copy_from_slice(&(-libc::EPERM).to_ne_bytes());
        assert_eq!(length_in(&refusal).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert!(length_in(&refusal[..10]).is_err());
    }
}
