//! To the instance and back: which headers go along, and what may be tried again when it fails.

use std::{fmt::Write as _, net::IpAddr};

use http::{HeaderName, HeaderValue, header};
use pingora::{
    Error, ErrorSource, ErrorType,
    http::{RequestHeader, ResponseHeader},
    proxy::Session,
};

use super::Ctx;
use crate::{
    dispatch::{self, INSTANCE},
    house::House,
    measure::Part,
    pages::Fault,
    remote,
    telemetry::micros,
};

// As text, for of a `HeaderName` Pingora makes a copy to keep its case.
const FORWARDED_FOR: &str = "X-Forwarded-For";
const FORWARDED_PROTO: &str = "X-Forwarded-Proto";
const FORWARDED_HOST: &str = "X-Forwarded-Host";
const REAL_IP: &str = "X-Real-IP";
const REQUEST_ID: &str = "X-Request-ID";
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// Sets the headers that tell the app who asks. What the client says of itself is replaced, unless it is trusted.
///
/// # Errors
/// None in practice: all values are well-formed.
pub fn request_headers(house: &House, ctx: &Ctx, request: &mut RequestHeader) -> pingora::Result<()> {
    if ctx.hop.is_some() {
        // The proxy that the client came to has said it all, sealed.
        return Ok(());
    }
    let remote = ctx.lease.as_ref().and_then(|lease| lease.upstream.remote());
    let client = ctx.client;
    let trusted = client.is_some_and(|client| house.config.trusts(client));
    if !trusted {
        strip_claims(request);
    }
    let tls = ctx.https;
    if !request.headers.contains_key(FORWARDED_PROTO) {
        request
            .insert_header(FORWARDED_PROTO, HeaderValue::from_static(if tls { "https" } else { "http" }))?;
    }
    if !request.headers.contains_key(FORWARDED_HOST)
        && let Some(host) = request.headers.get(header::HOST).cloned()
    {
        request.insert_header(FORWARDED_HOST, host)?;
    }
    if let Some(client) = client {
        let address = value_of(client)?;
        let chain = request
            .headers
            .get(FORWARDED_FOR)
            .map(|chain| [chain.as_bytes(), b", ", address.as_bytes()].concat());
        match chain {
            Some(chain) => request.insert_header(FORWARDED_FOR, chain)?,
            None => request.insert_header(FORWARDED_FOR, address.clone())?,
        };
        if !request.headers.contains_key(REAL_IP) {
            request.insert_header(REAL_IP, address)?;
        }
    }
    request.insert_header(REQUEST_ID, ctx.request_id.as_str())?;
    match remote {
        Some(remote) => remote::seal(house, ctx, remote, request),
        None => Ok(()),
    }
}

/// Adds what the client asked to know.
///
/// # Errors
/// None in practice: all values are well-formed.
pub fn response_headers(house: &House, ctx: &Ctx, response: &mut ResponseHeader) -> pingora::Result<()> {
    // Ours alone; an app that forges them is not believed.
    response.remove_header(&INSTANCE);
    if ctx.hop.is_some() {
        dispatch::response_headers(house, ctx, response)?;
    }
    if !ctx.timing_wanted {
        return Ok(());
    }
    response.insert_header(REQUEST_ID, ctx.request_id.as_str())?;
    if let (None, Some(app), Some(generation)) = (&ctx.hop, &ctx.app, ctx.generation) {
        response.insert_header(INSTANCE, format!("{}.{generation}", app.name))?;
    }
    let ms = |us: u64| format!("{}.{:03}", us / 1_000, us % 1_000);
    let mut timing = format!(
        "hold;dur={}, connect;dur={}, app;dur={}",
        ms(micros(ctx.watch.spent(Part::Hold))),
        ms(micros(ctx.watch.spent(Part::Connect))),
        ms(ctx.first_byte_us.unwrap_or(0)),
    );
    if ctx.cold
        && let Some(app) = &ctx.app
    {
        let wake = app.last_wake.load();
        if Some(wake.0) == ctx.generation {
            // Writing into a string cannot fail.
            let _ = write!(timing, ", wake;dur={}", ms(wake.1.total_us));
            for step in &wake.1.steps {
                let name: String = step
                    .name
                    .chars()
                    .map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' })
                    .collect();
                let _ = write!(timing, ", wake-{name};dur={}", ms(step.us));
            }
        }
    }
    response.append_header(SERVER_TIMING, timing)?;
    Ok(())
}

/// The connection could not be made, so nothing was sent: another attempt is safe for every method.
#[must_use]
pub fn unconnected(ctx: &mut Ctx, mut error: Box<Error>) -> Box<Error> {
    ctx.unconnected += 1;
    if let (Some(app), Some(lease)) = (&ctx.app, &ctx.lease)
        && (*error.etype() != ErrorType::ConnectTimedout || ctx.away.is_some())
    {
        // A full accept queue times out, but its app lives; who refuses is dead, or about to be.
        app.unreachable(&lease.upstream, error.to_string());
    }
    ctx.lease = None;
    error.set_retry(true);
    error
}

/// The exchange broke off after bytes were sent: only what is idempotent, and can be sent whole again, is tried again: once,
/// or by way of another host twice, of which the second time goes elsewhere.
#[must_use]
pub fn broken_off(session: &Session, ctx: &mut Ctx, mut error: Box<Error>) -> Box<Error> {
    let upstream = *error.esource() == ErrorSource::Upstream;
    if ctx.away.is_some()
        && upstream
        && let (Some(app), Some(lease)) = (&ctx.app, &ctx.lease)
    {
        if ctx.misdirected {
            lease.upstream.is_missing();
        } else if remote::is_unreachable(&error) || ctx.resent > 0 {
            // A pooled connection may break for many reasons; where a new one breaks as well, the host is about to be gone.
            app.unreachable(&lease.upstream, error.to_string());
        }
    }
    if remote::goes_on(ctx) {
        // No app has seen it. What was sent must be there to be sent again.
        error.set_retry(!session.as_ref().retry_buffer_truncated());
        ctx.lease = None;
        return error;
    }
    let again = upstream
        && ctx.resent < if ctx.away.is_some() { 2 } else { 1 }
        && !ctx.answered
        && session.response_written().is_none()
        && session.req_header().method.is_idempotent()
        && !session.as_ref().retry_buffer_truncated();
    error.set_retry(again);
    if again {
        ctx.resent += 1;
        ctx.lease = None;
    } else if upstream && ctx.fault.is_none() {
        ctx.fault = Some(match error.etype() {
            ErrorType::ReadTimedout | ErrorType::WriteTimedout => Fault::TooSlow,
            _ => Fault::NoAnswer,
        });
    }
    error
}

fn strip_claims(request: &mut RequestHeader) {
    let claims: Vec<HeaderName> = request
        .headers
        .keys()
        .filter(|name| {
            let name = name.as_str();
            name.starts_with("x-forwarded-") || matches!(name, "x-real-ip" | "forwarded")
        })
        .cloned()
        .collect();
    for name in claims {
        request.remove_header(&name);
    }
}

fn value_of(address: IpAddr) -> pingora::Result<HeaderValue> {
    HeaderValue::try_from(address.to_string())
        .map_err(|error| Error::because(ErrorType::InternalError, "an address as a header", error))
}
