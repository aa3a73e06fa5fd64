//! A place on an instance: at once if one is ready and nobody waits, otherwise after a hold.

use http::header;
use pingora::{Error, ErrorType, proxy::Session, upstreams::peer::HttpPeer};

use super::{Ctx, forward, hold};
use crate::{measure::Part, pages::Fault};

/// Takes a place for the request and says where to connect to. Called again for each attempt.
///
/// # Errors
/// The fault that is noted in `ctx`, or that the client has left.
pub async fn pick(session: &mut Session, ctx: &mut Ctx) -> pingora::Result<Box<HttpPeer>> {
    let Some(app) = ctx.app.clone() else { return Err(ctx.fail(Fault::Internal)) };
    // The place of a failed attempt goes back first: it may be the one that is needed.
    ctx.lease = None;
    ctx.away = None;
    if ctx.unconnected > 0 {
        hold::pause(session, ctx, &app).await?;
    }
    // Who waits goes before who comes.
    let at_once = match &ctx.hop {
        None if app.room.is_empty() => app.acquire(false, false),
        None => None,
        Some(hop) => app.acquire_for_guest(hop.generation),
    };
    let lease = match at_once {
        Some(lease) => lease,
        None => hold::hold(session, ctx, &app).await?,
    };
    ctx.watch.enter(Part::Connect);
    ctx.generation = Some(lease.upstream.generation);
    ctx.away = lease.upstream.remote().cloned();
    // Where one connection to another host broke, those in the pool may be of the same dead host: a new one finds out without
    // the request being sent on it.
    let fresh = ctx.resent > 0 && ctx.away.is_some();
    let peer = lease.upstream.peer(fresh || is_websocket(session));
    ctx.lease = Some(lease);
    // Its host was forgotten in this moment: as if it could not be connected to.
    peer.ok_or_else(|| {
        forward::unconnected(ctx, Error::explain(ErrorType::ConnectNoRoute, "nobody knows where its host is"))
    })
}

fn is_websocket(session: &Session) -> bool {
    let upgrade = session.req_header().headers.get(header::UPGRADE);
    upgrade.is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"))
}
