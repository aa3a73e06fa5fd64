//! Which app is meant, and is the request fit to be passed on? What two HTTP parsers could read differently is refused,
//! since the app's parser is another one than ours.

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use cmdb::cache::canonical_host;
use http::{HeaderName, Method, Version, header};
use pingora::{http::RequestHeader, proxy::Session};
use tokio::time::{Instant, sleep};

use super::{Ctx, client_ip};
use crate::{house::House, pages::Fault, telemetry::RequestId, tenant::AppRuntime};

/// How long a proxy without any routes lets a request wait for them.
const NEWS_WITHIN: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Asks for `Server-Timing` and the instance in the response.
pub const TIMING: HeaderName = HeaderName::from_static("x-fastcontainer-timing");
/// A request's id.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Headers that are ours alone; stripped from outside.
pub(crate) const INTERNAL: &str = "x-fastcontainer-";

/// Finds the app, and prepares `ctx` and the request.
///
/// # Errors
/// What is wrong with the request.
pub async fn resolve(house: &House, session: &mut Session, ctx: &mut Ctx) -> Result<(), Fault> {
    ctx.client = client_ip(session);
    ctx.https = session.digest().is_some_and(|digest| digest.ssl_digest.is_some());
    check(session, ctx)?;
    ctx.app = Some(match find(house, session.req_header()) {
        Err(Fault::LauncherGone) => Box::pin(find_soon(house, session.req_header())).await?,
        found => found?,
    });
    Ok(())
}

/// A proxy that has just begun: what it will know in a moment is nobody's error now.
async fn find_soon(house: &House, request: &RequestHeader) -> Result<Arc<AppRuntime>, Fault> {
    let end = Instant::now() + NEWS_WITHIN;
    loop {
        sleep(LOOK_EVERY).await;
        match find(house, request) {
            Err(Fault::LauncherGone) if Instant::now() < end => {}
            found => return found,
        }
    }
}

/// Whether the request is fit to be passed on; what of it is ours alone is noted, and taken out.
///
/// # Errors
/// What is wrong with the request.
pub(crate) fn check(session: &mut Session, ctx: &mut Ctx) -> Result<(), Fault> {
    check_raw_framing(session)?;
    let request = session.req_header_mut();
    if let Some(id) = request.headers.get(REQUEST_ID).and_then(|id| RequestId::parse(id.as_bytes())) {
        ctx.request_id = id;
    }
    ctx.timing_wanted = request.headers.get(TIMING).is_some_and(|value| value.as_bytes() == b"1");
    check_target(request)?;
    let internal = check_headers(request)?;
    for name in internal {
        request.remove_header(&name);
    }
    Ok(())
}

/// The app that the request's host name belongs to.
///
/// # Errors
/// There is none, or the name is malformed.
pub(crate) fn find(house: &House, request: &RequestHeader) -> Result<Arc<AppRuntime>, Fault> {
    let mut hosts = request.headers.get_all(header::HOST).iter();
    let (host, another) = (hosts.next(), hosts.next());
    if another.is_some() {
        return Err(Fault::BadRequest("it has more than one Host header"));
    }
    let authority = if request.version == Version::HTTP_2 { request.uri.authority() } else { None };
    let host = match (authority, host) {
        (Some(authority), _) => authority.as_str().as_bytes(),
        (None, Some(host)) => host.as_bytes(),
        (None, None) => return Err(Fault::BadRequest("it has no Host header")),
    };
    let host = canonical_host(host).map_err(|_| Fault::BadRequest("its Host header is malformed"))?;
    match house.cache.lookup(host.as_str()) {
        Some(tenant) => Ok(Arc::clone(tenant.runtime())),
        None if house.informed.load(SeqCst) => Err(Fault::UnknownHost),
        // A proxy that knows no routes yet cannot say that there is none.
        None => Err(Fault::LauncherGone),
    }
}

fn check_target(request: &RequestHeader) -> Result<(), Fault> {
    let target = request.raw_path();
    if target.iter().any(|byte| !(0x21..=0x7e).contains(byte)) {
        return Err(Fault::BadRequest(
            "its target has spaces, control characters or bytes that should be escaped",
        ));
    }
    // Pingora has escaped a NUL byte before it comes here; the escaped one is of no more use to anybody honest.
    if target.windows(3).any(|bytes| bytes == b"%00") {
        return Err(Fault::BadRequest("its target contains a NUL byte"));
    }
    let fine = match target.first() {
        Some(b'/') => true,
        Some(b'*') => target.len() == 1 && request.method == Method::OPTIONS,
        Some(_) => {
            let lower = target.get(..8).unwrap_or(target).to_ascii_lowercase();
            lower.starts_with(b"http://") || lower.starts_with(b"https://")
        }
        None => false,
    };
    if fine { Ok(()) } else { Err(Fault::BadRequest("its target is neither a path nor a URL")) }
}

/// Refuses ambiguous framing and look-alike headers; returns the internal headers to be stripped (rarely any).
fn check_headers(request: &RequestHeader) -> Result<Vec<HeaderName>, Fault> {
    let mut internal = Vec::new();
    for name in request.headers.keys() {
        let name_text = name.as_str();
        if name_text.as_bytes().contains(&b'_') && is_look_alike(name_text) {
            // CGI and PHP read `_` and `-` alike, so that this would be taken for the real one.
            return Err(Fault::BadRequest("a header is written with \"_\" in place of \"-\""));
        }
        if name_text.starts_with(INTERNAL) {
            internal.push(name.clone());
        }
    }
    let coded = request.headers.contains_key(header::TRANSFER_ENCODING);
    let mut lengths = request.headers.get_all(header::CONTENT_LENGTH).iter();
    if let Some(length) = lengths.next() {
        if coded {
            return Err(Fault::BadRequest("it has both Content-Length and Transfer-Encoding"));
        }
        if lengths.next().is_some() || length.is_empty() || !length.as_bytes().iter().all(u8::is_ascii_digit)
        {
            return Err(Fault::BadRequest("its Content-Length is not one number"));
        }
    }
    if coded {
        let mut codings = request.headers.get_all(header::TRANSFER_ENCODING).iter();
        let chunked = codings.next().is_some_and(|coding| coding.as_bytes().eq_ignore_ascii_case(b"chunked"));
        if !chunked || codings.next().is_some() {
            return Err(Fault::BadRequest("its Transfer-Encoding is not \"chunked\" alone"));
        }
    }
    Ok(internal)
}

/// With both `Transfer-Encoding` and `Content-Length`, Pingora drops the latter before anybody can see it; it is still in the bytes that came.
fn check_raw_framing(session: &Session) -> Result<(), Fault> {
    let http1 = session.req_header().version != Version::HTTP_2;
    if http1 && session.req_header().headers.contains_key(header::TRANSFER_ENCODING) {
        const NAME: &[u8] = b"content-length:";
        let raw = session.to_h1_raw();
        if raw
            .split(|byte| *byte == b'\n')
            .any(|line| line.get(..NAME.len()).is_some_and(|name| name.eq_ignore_ascii_case(NAME)))
        {
            return Err(Fault::BadRequest("it has both Content-Length and Transfer-Encoding"));
        }
    }
    Ok(())
}

fn is_look_alike(name: &str) -> bool {
    const PROTECTED: [&str; 10] = [
        "content-length",
        "content-type",
        "transfer-encoding",
        "x-real-ip",
        "x-request-id",
        "proxy-authorization",
        "remote-addr",
        "remote-user",
        "proxy-connection",
        "upgrade-insecure-requests",
    ];
    let dashed = name.replace('_', "-");
    PROTECTED.contains(&dashed.as_str()) || dashed.starts_with("x-forwarded-") || dashed.starts_with(INTERNAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(target: &[u8], headers: &[(&'static str, &'static str)]) -> RequestHeader {
        let mut request = RequestHeader::build("GET", target, None).unwrap();
        for (name, value) in headers {
            request.append_header(*name, *value).unwrap();
        }
        request
    }

    #[test]
    fn targets_that_parsers_read_differently_are_refused() {
        for fine in [&b"/"[..], b"/a?b=c%20d", b"http://blog.example/x"] {
            assert!(check_target(&request(fine, &[])).is_ok(), "{fine:?}");
        }
        for bad in [&b"*"[..], "/ä".as_bytes(), b"/\x01", b"gopher://x/"] {
            if let Ok(request) = RequestHeader::build("GET", bad, None) {
                assert!(check_target(&request).is_err(), "{bad:?}");
            }
        }
    }

    #[test]
    fn ambiguous_framing_is_refused() {
        for bad in [
            &[("content-length", "3"), ("transfer-encoding", "chunked")][..],
            &[("content-length", "3"), ("content-length", "3")],
            &[("content-length", "3, 3")],
            &[("content-length", "+3")],
            &[("transfer-encoding", "gzip, chunked")],
            &[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")],
            &[("transfer-encoding", "xchunked")],
            &[("content_length", "3")],
            &[("transfer_encoding", "chunked")],
            &[("x_forwarded_for", "1.1.1.1")],
            &[("x-forwarded_for", "1.1.1.1")],
            &[("x_fastcontainer_timing", "1")],
        ] {
            assert!(check_headers(&request(b"/", bad)).is_err(), "{bad:?}");
        }
        for fine in
            [&[("content-length", "3")][..], &[("transfer-encoding", "Chunked")], &[("my_header", "x")]]
        {
            assert!(check_headers(&request(b"/", fine)).is_ok(), "{fine:?}");
        }
    }

    #[test]
    fn internal_headers_are_found() {
        let internal =
            check_headers(&request(b"/", &[("X-FastContainer-App", "x"), ("x-other", "y")])).unwrap();
        assert_eq!(internal, ["x-fastcontainer-app"]);
    }
}
