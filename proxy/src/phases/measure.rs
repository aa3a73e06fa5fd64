//! The app's own time: from the last request byte sent to the first response byte. Holds, slow uploads and slow clients do not count.

use pingora::{http::ResponseHeader, proxy::Session};

use super::Ctx;
use crate::{house::House, measure::Part, telemetry::micros};

/// The connection stands, the request is about to be sent.
pub fn connected(session: &mut Session, ctx: &mut Ctx) {
    ctx.watch.enter(if session.is_body_empty() { Part::FirstByte } else { Part::Send });
}

/// A piece of the request's body is handed over.
pub fn body_sent(ctx: &mut Ctx, end_of_stream: bool) {
    if end_of_stream && ctx.watch.part() == Part::Send {
        ctx.watch.enter(Part::FirstByte);
    }
}

/// A response header came. Interim ones (1xx) are not the answer, except 101.
pub fn answered(house: &House, ctx: &mut Ctx, response: &ResponseHeader) {
    if response.status.is_informational() && response.status != http::StatusCode::SWITCHING_PROTOCOLS
        || ctx.answered
    {
        return;
    }
    ctx.answered = true;
    let waited_since = ctx.watch.since();
    let whole_request_sent = ctx.watch.part() == Part::FirstByte;
    let now = ctx.watch.enter(Part::Body);
    let Some(lease) = &ctx.lease else { return };
    if whole_request_sent {
        let us = micros(now - waited_since);
        ctx.first_byte_us = Some(us);
        lease.first_byte(house.tick(now), us);
    } else {
        // It answered before it had read everything: no measure of its speed.
        lease.upstream.answered();
    }
    lease.opened();
}
