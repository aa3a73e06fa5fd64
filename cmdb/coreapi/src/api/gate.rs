//! Through which every request comes: who asks, whether it was done already, the time limit, the audit log.

use std::{
    fmt,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use sha2::{Digest as _, Sha256};

use super::{
    Api, LARGEST_BODY,
    audit::Entry,
    idempotency::{Answer, Turn},
    problem::{Problem, Told},
    tokens::Role,
};

/// The longest that a request may take: a stop waits until the app's last request is done.
const PATIENCE: Duration = Duration::from_secs(180);
/// A body has come within this time.
const BODY_PATIENCE: Duration = Duration::from_secs(60);
const IDEMPOTENCY_KEY: &str = "idempotency-key";
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Peer {
    /// Somewhere in the network.
    Net(SocketAddr),
    /// On this host, by way of the socket in the state folder; which user.
    Local(u32),
}

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) name: Arc<str>,
    pub(crate) role: Role,
}

const ANONYMOUS: &str = "-";

impl Caller {
    /// Whether no token was asked for.
    pub(crate) fn is_anonymous(&self) -> bool {
        &*self.name == ANONYMOUS
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Net(address) => address.fmt(f),
            Self::Local(uid) => write!(f, "uid {uid}"),
        }
    }
}

/// See the module.
pub(crate) async fn gate(State(api): State<Arc<Api>>, mut request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let peer = request.extensions().get::<Peer>().copied();
    let id = api.request_id();
    let method = request.method().clone();
    let what = format!("{method} {}", request.uri());
    let caller = authenticate(&api, peer, request.headers());
    if let Ok(caller) = &caller {
        request.extensions_mut().insert(caller.clone());
    }
    let passed = pass(Arc::clone(&api), caller.clone(), request, next);
    if !is_change(&method) {
        let response = passed.await;
        if matches!(response.status().as_u16(), 401 | 403) {
            record(&api, caller, peer, &what, &id, begun, &response);
        }
        return with_headers(response, &id);
    }
    // In a task of its own, its record included: what has begun is finished, also when whoever asked for it leaves.
    let done = tokio::spawn(async move {
        let response = tokio::spawn(passed).await.unwrap_or_else(|_| broken());
        record(&api, caller, peer, &what, &id, begun, &response);
        with_headers(response, &id)
    });
    done.await.unwrap_or_else(|_| broken())
}

fn broken() -> Response {
    let detail = "this request failed; the log says more";
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", detail).into_response()
}

/// Puts a line into the audit log.
fn record(
    api: &Api,
    caller: Result<Caller, Problem>,
    peer: Option<Peer>,
    what: &str,
    id: &str,
    begun: Instant,
    response: &Response,
) {
    let nobody = Caller { name: ANONYMOUS.into(), role: Role::Read };
    let known = caller.is_ok();
    let caller = caller.unwrap_or(nobody);
    api.audit.write(&Entry {
        at_unix_ms: unix_ms(),
        request_id: id,
        who: &caller.name,
        role: if known { caller.role.as_str() } else { ANONYMOUS },
        from: &peer.map(|peer| peer.to_string()).unwrap_or_default(),
        what: what.get(..what.floor_char_boundary(1024)).unwrap_or_default(),
        status: response.status().as_u16(),
        detail: response.extensions().get::<Told>().map_or("", |told| told.0.as_str()),
        took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
    });
}

async fn pass(api: Arc<Api>, caller: Result<Caller, Problem>, request: Request, next: Next) -> Response {
    let caller = match caller {
        Ok(caller) => caller,
        Err(problem) => return problem.into_response(),
    };
    let answered = async {
        match request.headers().get(IDEMPOTENCY_KEY).cloned() {
            // Whoever may change nothing needs no memory of ours.
            Some(key) if request.method() == Method::POST && caller.role >= Role::Operate => {
                once(&api, &caller, &key, request, next).await
            }
            _ => Ok(next.run(request).await),
        }
    };
    match tokio::time::timeout(PATIENCE, answered).await {
        Ok(answered) => answered.unwrap_or_else(IntoResponse::into_response),
        Err(_) => Problem::away(format!("this was not done within {} s", PATIENCE.as_secs())).into_response(),
    }
}

fn is_change(method: &Method) -> bool {
    !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

/// Whose request this is.
fn authenticate(api: &Api, peer: Option<Peer>, headers: &HeaderMap) -> Result<Caller, Problem> {
    if let Some(Peer::Local(0)) = peer {
        return Ok(Caller { name: "root".into(), role: Role::Admin });
    }
    let unauthorized = |detail: &str| Problem::new(StatusCode::UNAUTHORIZED, "unauthorized", detail);
    let Some(tokens) = &api.tokens else {
        // Only ever on the loopback. A page in a browser on this host must not get here by a name of its own.
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        if !is_loopback(host) {
            return Err(unauthorized(
                "without tokens this is only for those who ask for the loopback's own address",
            ));
        }
        return Ok(Caller { name: ANONYMOUS.into(), role: Role::Read });
    };
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return Err(unauthorized("send a token: `authorization: Bearer TOKEN`"));
    };
    let token = value.to_str().ok().and_then(|value| value.split_once(' '));
    let Some((_, token)) = token.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")) else {
        return Err(unauthorized("only bearer tokens are understood: `authorization: Bearer TOKEN`"));
    };
    let holder = tokens.holder(token.trim());
    for fault in tokens.take_faults() {
        tracing::warn!("{fault}");
        api.note("api-tokens", fault);
    }
    match holder {
        Some(holder) => Ok(Caller { name: holder.name, role: holder.role }),
        None => Err(unauthorized("nobody has this token (any more)")),
    }
}

fn is_loopback(host: &str) -> bool {
    let name = match host.parse::<SocketAddr>() {
        Ok(address) => return address.ip().is_loopback(),
        Err(_) => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Does a request with a key, unless it was done.
async fn once(
    api: &Api,
    caller: &Caller,
    key: &HeaderValue,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let key = key.to_str().ok().filter(|key| !key.is_empty() && key.len() <= 255);
    let key = key.ok_or_else(|| Problem::malformed("an Idempotency-Key has 1 to 255 ASCII characters"))?;
    let (parts, body) = request.into_parts();
    let read = tokio::time::timeout(BODY_PATIENCE, Limited::new(body, LARGEST_BODY).collect()).await;
    let body = match read {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "body", "the body is too large"));
        }
        Ok(Err(error)) => return Err(Problem::malformed(format!("the body broke off: {error}"))),
        Err(_) => return Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "body", "the body did not come")),
    };
    let mut hash = Sha256::new();
    for part in [parts.method.as_str().as_bytes(), parts.uri.to_string().as_bytes(), &body] {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    match api
        .memory
        .turn((Arc::clone(&caller.name), format!("{} {key}", caller.role.as_str())), hash.finalize().into())
    {
        Turn::Busy => {
            Err(Problem::conflict("the request with this Idempotency-Key is being done").again_after(1))
        }
        Turn::Other => Err(Problem::invalid("this Idempotency-Key was used for another request", Vec::new())),
        Turn::Done(answer) => {
            let mut response = (answer.status, answer.body).into_response();
            *response.headers_mut() = answer.headers;
            response.headers_mut().insert("idempotent-replayed", HeaderValue::from_static("true"));
            Ok(response)
        }
        Turn::Do(doing) => {
            let response = next.run(Request::from_parts(parts, Body::from(body))).await;
            let (parts, body) = response.into_parts();
            let body = match body.collect().await {
                Ok(body) => body.to_bytes(),
                Err(error) => return Err(Problem::away(error.to_string())),
            };
            // What failed for want of us, or was not allowed, may be tried again.
            if !parts.status.is_server_error() && !matches!(parts.status.as_u16(), 401 | 403 | 409) {
                doing.answered(Answer {
                    status: parts.status,
                    headers: parts.headers.clone(),
                    body: body.clone(),
                });
            }
            Ok(Response::from_parts(parts, Body::from(body)))
        }
    }
}

fn with_headers(mut response: Response, id: &str) -> Response {
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(REQUEST_ID, id);
    }
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_the_loopback_are_its_own() {
        for own in ["localhost:1", "127.0.0.1:8090", "[::1]:80", "127.0.0.1", "LOCALHOST"] {
            assert!(is_loopback(own), "{own}");
        }
        for other in ["evil.example:8090", "10.0.0.1", "", "127.0.0.1.evil.example:80"] {
            assert!(!is_loopback(other), "{other}");
        }
    }
}
