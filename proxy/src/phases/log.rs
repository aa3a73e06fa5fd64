//! The record of a request, for the access log and for `why`.

use std::time::SystemTime;

use pingora::{Error, proxy::Session};

use super::Ctx;
use crate::{
    house::House,
    measure::Part,
    metrics::Outcome,
    pages::Fault,
    telemetry::{Record, Said},
};

/// Takes the request down. The place on the instance is given back.
pub fn log(house: &House, session: &Session, error: Option<&Error>, ctx: &mut Ctx) {
    ctx.lease = None;
    ctx.watch.stop();
    if ctx.errand {
        return;
    }
    // Whichever host serves a request puts it on the bill.
    if let Some(app) = ctx.app.as_ref().filter(|_| ctx.away.is_none()) {
        app.bill.add(session.body_bytes_read(), session.body_bytes_sent(), ctx.watch.spent(Part::Hold));
    }
    let error = match (&ctx.fault, error) {
        // The client has seen the app's status already, so this was no missing answer but a broken one.
        (Some(Fault::NoAnswer), Some(_)) if ctx.answered => "broken-off",
        (Some(fault), _) => fault.code(),
        (None, Some(error)) => match error.esource() {
            pingora::ErrorSource::Downstream => "client-gone",
            pingora::ErrorSource::Upstream => "broken-off",
            _ => "internal",
        },
        (None, None) => "",
    };
    let status = session.response_written().map(|response| response.status);
    let outcome = Outcome {
        status: status.map_or(0, |status| status.as_u16()),
        hold: ctx.held.then(|| ctx.watch.spent(Part::Hold)),
        first_byte_us: ctx.first_byte_us,
        total: ctx.watch.total(),
        retries: ctx.unconnected + ctx.resent,
        cold: ctx.cold,
        error,
    };
    house.metrics.request(ctx.app.as_deref(), &outcome);
    house.telemetry.push(Record {
        request_id: ctx.request_id,
        ended: SystemTime::now(),
        client: ctx.client,
        said: Said::of(session.req_header(), house.telemetry.format()),
        status,
        bytes: session.body_bytes_sent(),
        app: ctx.app.clone(),
        node: ctx.away.take(),
        generation: ctx.generation,
        watch: ctx.watch,
        retries: outcome.retries,
        cold: ctx.cold,
        error,
    });
}
