//! A request that goes to an instance of another host: by way of that host's dispatcher, sealed.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use http::{HeaderName, HeaderValue, StatusCode};
use nix::sys::socket::{setsockopt, sockopt};
use pingora::{
    Error, ErrorType,
    connectors::l4::Connect,
    http::{RequestHeader, ResponseHeader},
    protocols::l4::{socket::SocketAddr as PeerAddr, stream::Stream, virt::VirtualSocketStream},
    upstreams::peer::{HttpPeer, HttpUpstreamRequestPolicy},
};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};

use crate::{
    config::Config,
    dispatch::{ELSEWHERE, INSTANCE, Kind, REFUSED},
    house::House,
    nodes::Remote,
    phases::Ctx,
    quirks::YieldBeforeRead,
    seal, tls, upstream,
};

/// How long to wait for a connection to another host.
pub const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// How long what was sent may stay unacknowledged: a host that was cut off has to be noticed within 2 s.
const USER_TIMEOUT_MS: u32 = 1_000;
/// A dispatcher keeps an idle connection for 60 s; so that a request never meets one that is just being closed, less.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Most times that a request goes to another host because the first one says that it is not its.
const MOVES: u32 = 3;

/// How another host is reached.
#[derive(Debug)]
pub struct Way {
    /// Its dispatcher.
    pub address: SocketAddr,
    peer: HttpPeer,
    upgrade_peer: HttpPeer,
}

impl Way {
    /// Where Pingora is to connect to; `upgrade` for WebSocket handshakes.
    #[must_use]
    pub fn peer(&self, upgrade: bool) -> Box<HttpPeer> {
        Box::new(if upgrade { self.upgrade_peer.clone() } else { self.peer.clone() })
    }
}

/// The way to the dispatcher of host `node` at `address`.
#[must_use]
pub fn way(address: SocketAddr, node: &str, config: &Config) -> Way {
    let tls = config.cluster.as_ref().and_then(|cluster| cluster.tls.as_ref());
    let peer = |upgrade| {
        let mut peer = HttpPeer::new(address, tls.is_some(), tls::name_of(node));
        peer.group_key = upstream::next_group_key();
        peer.options.custom_l4 = Some(Arc::new(Dialler { address, upgrade }));
        peer.options.connection_timeout = Some(CONNECT_TIMEOUT);
        peer.options.total_connection_timeout = Some(CONNECT_TIMEOUT * 2);
        peer.options.read_timeout = Some(config.read_timeout);
        peer.options.write_timeout = Some(config.write_timeout);
        peer.options.idle_timeout = Some(if upgrade { Duration::ZERO } else { IDLE_TIMEOUT });
        peer.options.http_upstream_request_policy = HttpUpstreamRequestPolicy::standard();
        if let Some(tls) = tls {
            tls.prepare(&mut peer);
        }
        peer
    };
    Way { address, peer: peer(false), upgrade_peer: peer(true) }
}

/// Tells the dispatcher what it has to know, and seals it. Everything of the kind that a client sent is gone already.
///
/// # Errors
/// This proxy has no key, so that no other host would believe it.
pub fn seal(house: &House, ctx: &Ctx, remote: &Remote, request: &mut RequestHeader) -> pingora::Result<()> {
    let (Some(app), Some(generation)) = (&ctx.app, ctx.generation) else {
        return Err(Error::explain(ErrorType::InternalError, "nothing was picked"));
    };
    let text = |value: &str| HeaderValue::from_str(value).map_err(|error| bad_header(error.into()));
    request.insert_header(seal::NODE, text(&remote.name)?)?;
    request.insert_header(seal::KIND, HeaderValue::from_static(Kind::Request.as_str()))?;
    request.insert_header(seal::APP, text(app.name.as_str())?)?;
    request.insert_header(seal::GENERATION, HeaderValue::from(generation.0))?;
    request
        .insert_header(seal::SCHEME, HeaderValue::from_static(if ctx.https { "https" } else { "http" }))?;
    if let Some(client) = ctx.client {
        request.insert_header(seal::CLIENT, text(&client.to_string())?)?;
    }
    if ctx.timing_wanted {
        request.insert_header(crate::phases::resolve::TIMING, HeaderValue::from_static("1"))?;
    }
    close(house, request)
}

/// Puts the seal on. With mutual TLS the connection itself says who speaks.
pub(crate) fn close(house: &House, request: &mut RequestHeader) -> pingora::Result<()> {
    let Some(cluster) = &house.config.cluster else {
        return Err(Error::explain(ErrorType::InternalError, "this proxy belongs to no cluster"));
    };
    if let Some(key) = &cluster.key {
        let seal = key.seal(request.method.as_str(), request.raw_path(), &request.headers);
        request.insert_header(seal::SEAL, seal)?;
    } else if cluster.tls.is_none() {
        return Err(Error::explain(
            ErrorType::InternalError,
            "no other host believes this proxy: it has neither --cluster-key nor --cluster-tls",
        ));
    }
    Ok(())
}

/// Takes what a dispatcher says of the response out of it.
///
/// # Errors
/// The dispatcher has not taken the request: it is to go elsewhere.
pub fn opened(ctx: &mut Ctx, remote: &Remote, response: &mut ResponseHeader) -> pingora::Result<()> {
    remote.forgive();
    let said = |name: &HeaderName| response.headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(code) = said(&REFUSED) {
        ctx.misdirected = true;
        let elsewhere = said(&ELSEWHERE).unwrap_or_default();
        tracing::debug!(node = remote.name, code, elsewhere, "the dispatcher did not take a request");
        if response.status == StatusCode::FORBIDDEN {
            remote.suspect("its dispatcher does not believe this proxy; do all hosts have the same key?");
        }
        return Err(Error::explain(ErrorType::Custom("misdirected"), code.to_owned()).into_up());
    }
    // The dispatcher may have had to take another one than was picked here.
    let generation =
        said(&INSTANCE).and_then(|instance| instance.rsplit_once('/')).and_then(|(_, it)| it.parse().ok());
    if let Some(generation) = generation {
        ctx.generation = Some(cmdb::Generation(generation));
    }
    for name in [INSTANCE, REFUSED, ELSEWHERE] {
        response.remove_header(&name);
    }
    Ok(())
}

/// Whether a request that a dispatcher did not take may go on its way again: it reached no app.
pub(crate) fn goes_on(ctx: &mut Ctx) -> bool {
    let goes_on = std::mem::take(&mut ctx.misdirected) && ctx.moves < MOVES;
    ctx.moves += u32::from(goes_on);
    goes_on
}

/// Whether an error means that the host itself cannot be reached (the connection is dead, not closed).
pub(crate) fn is_unreachable(error: &Error) -> bool {
    use std::io::ErrorKind::{HostUnreachable, NetworkUnreachable, TimedOut};
    let cause = error.root_cause().downcast_ref::<std::io::Error>();
    cause.is_some_and(|cause| matches!(cause.kind(), TimedOut | HostUnreachable | NetworkUnreachable))
}

/// Connects to a dispatcher, in such a way that the end of its host is noticed.
#[derive(Debug)]
struct Dialler {
    address: SocketAddr,
    upgrade: bool,
}

#[async_trait]
impl Connect for Dialler {
    async fn connect(&self, _: &PeerAddr) -> pingora::Result<Stream> {
        let connecting = timeout_at(Instant::now() + CONNECT_TIMEOUT, TcpStream::connect(self.address));
        let socket = connecting
            .await
            .map_err(|_| Error::explain(ErrorType::ConnectTimedout, "the host does not answer"))?
            .map_err(|error| {
                Error::because(ErrorType::ConnectError, "connecting to the dispatcher", error)
            })?;
        watch_over(&socket)
            .map_err(|error| Error::because(ErrorType::ConnectError, "setting up the connection", error))?;
        if self.upgrade {
            return Ok(VirtualSocketStream::new(Box::new(YieldBeforeRead::new(socket))).into());
        }
        Ok(socket.into())
    }
}

/// tcp(7): with data on its way `TCP_USER_TIMEOUT` ends the connection; without, the second probe that stays unanswered.
fn watch_over(socket: &TcpStream) -> nix::Result<()> {
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &1)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &1)?;
    setsockopt(socket, sockopt::TcpKeepCount, &2)?;
    setsockopt(socket, sockopt::TcpUserTimeout, &USER_TIMEOUT_MS)?;
    setsockopt(socket, sockopt::TcpNoDelay, &true)
}

fn bad_header(error: Box<dyn std::error::Error + Send + Sync>) -> Box<Error> {
    Error::because(ErrorType::InternalError, "a value as a header", error)
}
