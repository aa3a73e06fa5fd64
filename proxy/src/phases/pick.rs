//! A place on an instance: at once if one is ready and nobody waits, otherwise after a hold.

use http::header;
use pingora::{proxy::Session, upstreams::peer::HttpPeer};

use super::{Ctx, hold};
use crate::{measure::Part, pages::Fault};

/// Takes a place for the request and says where to connect to. Called again for each attempt.
///
/// # Errors
/// The fault that is noted in `ctx`, or that the client has left.
pub async fn pick(session: &mut Session, ctx: &mut Ctx) -> pingora::Result<Box<HttpPeer>> {
    let Some(app) = ctx.app.clone() else { return Err(ctx.fail(Fault::Internal)) };
    // The place of a failed attempt goes back first: it may be the one that is needed.
    ctx.lease = None;
    if ctx.unconnected > 0 {
        hold::pause(session, ctx, &app).await?;
    }
    // Who waits goes before who comes.
    let at_once = if app.room.is_empty() { app.acquire(false) } else { None };
    let lease = match at_once {
        Some(lease) => lease,
        None => hold::hold(session, ctx, &app).await?,
    };
    ctx.watch.enter(Part::Connect);
    ctx.generation = Some(lease.upstream.generation);
    let peer = lease.upstream.peer(is_websocket(session));
    ctx.lease = Some(lease);
    Ok(peer)
}

fn is_websocket(session: &Session) -> bool {
    let upgrade = session.req_header().headers.get(header::UPGRADE);
    upgrade.is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"))
}
