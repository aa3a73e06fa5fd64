//! The PROXY protocol (HAProxy's proxy-protocol.txt, versions 1 and 2): what a balancer in front says of the client, before
//! the client's first byte. From a balancer's network each connection has to begin with it, and from nowhere else is it
//! believed: to guess would let clients choose their address.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use pingora::{
    apps::ServerApp,
    protocols::{
        GetSocketDigest as _, SocketDigest, Stream,
        l4::{socket::SocketAddr as PeerAddr, stream::Stream as TcpStream},
    },
    server::ShutdownWatch,
};
use ppp::{HeaderResult, v1, v2};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    time::timeout,
};

use crate::config::Network;

/// Longest header of version 1, its line end included.
const V1_MAX: usize = 107;
/// Length of the fixed part of version 2, and where in it the length of the rest is.
const V2_FIXED: usize = 16;
/// Most bytes that follow it: addresses take 216 at most, and a balancer's notes are short.
const V2_REST_MAX: usize = 4096;

/// A Pingora application behind balancers.
pub struct Porter<A> {
    app: Arc<A>,
    balancers: Vec<Network>,
    patience: Duration,
}

/// Why a balancer's connection is closed.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// It broke off.
    #[error("the connection broke off in the header: {0}")]
    Io(#[from] io::Error),
    /// It begins with something else, or something malformed.
    #[error("it does not begin with a PROXY protocol header: {0}")]
    Malformed(String),
    /// It is longer than any needs to be.
    #[error("the header is longer than {V2_REST_MAX} bytes")]
    TooLong,
}

impl<A> Porter<A> {
    /// `patience`: how long a header may take.
    #[must_use]
    pub fn new(app: A, balancers: Vec<Network>, patience: Duration) -> Self {
        Self { app: Arc::new(app), balancers, patience }
    }

    /// The balancer at the other end, if it is one.
    fn balancer(&self, stream: &Stream) -> Option<IpAddr> {
        if self.balancers.is_empty() {
            return None;
        }
        let digest = stream.get_socket_digest()?;
        let peer = digest.peer_addr()?.as_inet()?.ip().to_canonical();
        self.balancers.iter().any(|network| network.contains(peer)).then_some(peer)
    }
}

#[async_trait]
impl<A: ServerApp + Send + Sync> ServerApp for Porter<A> {
    async fn process_new(self: &Arc<Self>, mut stream: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        if let Some(balancer) = self.balancer(&stream) {
            match timeout(self.patience, read(&mut stream)).await {
                Ok(Ok(Some(client))) => stream = speaking_for(stream, client)?,
                Ok(Ok(None)) => {}
                // It has only looked whether somebody listens.
                Ok(Err(HeaderError::Io(_))) | Err(_) => return None,
                Ok(Err(error)) => {
                    tracing::warn!(%balancer, %error, "a balancer's connection is closed; does it send the PROXY protocol?");
                    return None;
                }
            }
        }
        self.app.process_new(stream, shutdown).await
    }

    async fn cleanup(&self) {
        self.app.cleanup().await;
    }
}

/// Reads a header and not one byte more. Returns the client's address, or `None` when the balancer speaks for itself (a health
/// check) or for nobody whom it could name.
///
/// # Errors
/// [`HeaderError`].
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<SocketAddr>, HeaderError> {
    let mut bytes = vec![0; V2_FIXED];
    // The shortest of version 1, "PROXY UNKNOWN\r\n", is shorter than the fixed part of version 2 by one.
    stream.read_exact(&mut bytes[..V2_FIXED - 1]).await?;
    if bytes.starts_with(v2::PROTOCOL_PREFIX) {
        stream.read_exact(&mut bytes[V2_FIXED - 1..]).await?;
        let rest = usize::from(u16::from_be_bytes([bytes[V2_FIXED - 2], bytes[V2_FIXED - 1]]));
        if rest > V2_REST_MAX {
            return Err(HeaderError::TooLong);
        }
        bytes.resize(V2_FIXED + rest, 0);
        stream.read_exact(&mut bytes[V2_FIXED..]).await?;
    } else if bytes.starts_with(b"PROXY ") {
        bytes.truncate(V2_FIXED - 1);
        while !bytes.ends_with(b"\r\n") && bytes.len() < V1_MAX {
            bytes.push(stream.read_u8().await?);
        }
    } else {
        return Err(HeaderError::Malformed("it speaks something else".to_owned()));
    }
    client(&bytes)
}

fn client(header: &[u8]) -> Result<Option<SocketAddr>, HeaderError> {
    let malformed = |error: &dyn std::fmt::Display| HeaderError::Malformed(error.to_string());
    match HeaderResult::parse(header) {
        HeaderResult::V1(header) => Ok(match header.map_err(|error| malformed(&error))?.addresses {
            v1::Addresses::Tcp4(of) => Some((of.source_address, of.source_port).into()),
            v1::Addresses::Tcp6(of) => Some((of.source_address, of.source_port).into()),
            v1::Addresses::Unknown => None,
        }),
        HeaderResult::V2(header) => {
            let header = header.map_err(|error| malformed(&error))?;
            if header.command == v2::Command::Local {
                return Ok(None);
            }
            Ok(match header.addresses {
                v2::Addresses::IPv4(of) => Some((of.source_address, of.source_port).into()),
                v2::Addresses::IPv6(of) => Some((of.source_address, of.source_port).into()),
                v2::Addresses::Unix(_) | v2::Addresses::Unspecified => None,
            })
        }
    }
}

/// The same connection, which says from now on that the client is at its other end.
fn speaking_for(stream: Stream, client: SocketAddr) -> Option<Stream> {
    // Only TCP listeners are behind balancers, so this is no other kind.
    let mut stream = stream.into_any().downcast::<TcpStream>().ok()?;
    let digest = SocketDigest::from_raw_fd(stream.as_raw_fd());
    // It was made in the line above, so nothing is set yet.
    let _ = digest.peer_addr.set(Some(PeerAddr::Inet(client)));
    stream.set_socket_digest(digest);
    Some(stream)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    async fn read_all(mut bytes: &[u8]) -> (Result<Option<SocketAddr>, HeaderError>, usize) {
        let client = read(&mut bytes).await;
        (client, bytes.len())
    }

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [&b"\r\n\r\n\0\r\nQUIT\n"[..], &[0x20 | command, family], &length, body].concat()
    }

    #[tokio::test]
    async fn both_versions_name_the_client_and_the_request_stays_unread() {
        let body =
            [&[192, 0, 2, 1][..], &[10, 0, 0, 1], &1234u16.to_be_bytes(), &80u16.to_be_bytes()].concat();
        let notes = [&body[..], &[0x04, 0, 3, 1, 2, 3]].concat();
        for (header, client) in [
            (b"PROXY TCP4 192.0.2.1 10.0.0.1 1234 80\r\n".to_vec(), Some("192.0.2.1:1234")),
            (b"PROXY TCP6 2001:db8::1 2001:db8::2 1 80\r\n".to_vec(), Some("[2001:db8::1]:1")),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (b"PROXY UNKNOWN some words\r\n".to_vec(), None),
            (v2(1, 0x11, &body), Some("192.0.2.1:1234")),
            (v2(1, 0x11, &notes), Some("192.0.2.1:1234")),
            (v2(0, 0x00, &[]), None),
            (v2(0, 0x11, &body), None),
        ] {
            let bytes = [&header[..], b"GET / HTTP/1.1\r\n\r\n"].concat();
            let (said, rest) = read_all(&bytes).await;
            assert_eq!(said.unwrap(), client.map(|client| client.parse().unwrap()), "{header:?}");
            assert_eq!(rest, 18);
        }
    }

    #[tokio::test]
    async fn anything_else_is_an_error() {
        for bad in [
            &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
            b"PROXY TCP4 192.0.2.1 10.0.0.1 1234\r\n\r\n",
            b"PROXY TCP4 192.0.2.1000 10.0.0.1 1234 80\r\n",
            b"PROXY TCP5 192.0.2.1 10.0.0.1 1234 80\r\n",
            b"PROXY UNK",
            &v2(1, 0x11, &[1, 2, 3]),
            &v2(1, 0x11, &[0; 5000]),
            &[b"PROXY UNKNOWN "[..].to_vec(), vec![b'x'; 200]].concat(),
        ] {
            assert!(read_all(bad).await.0.is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..300), v1: bool) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let prefix: &[u8] = if v1 { b"PROXY " } else { v2::PROTOCOL_PREFIX };
            let _ = runtime.block_on(read_all(&[prefix, &bytes].concat()));
            let _ = runtime.block_on(read_all(&bytes));
        }
    }
}
