//! The dispatcher: takes requests for the instances of this host from the proxies of other hosts, and from nobody else.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cmdb::{AppName, Generation, compute};
use http::{HeaderName, HeaderValue, StatusCode, header};
use launcher_client::wire::{Refusal, RefusalCode};
use pingora::{
    http::{RequestHeader, ResponseHeader},
    proxy::Session,
};
use tokio::time::timeout;

use crate::{
    house::House,
    link::Command,
    pages::Fault,
    phases::client_ip,
    phases::{Ctx, resolve},
    seal,
    tenant::AppRuntime,
    wake::{Verdict, own_name},
};

/// In a response: which instance answered, `NODE/GENERATION`.
pub const INSTANCE: HeaderName = HeaderName::from_static("x-fastcontainer-instance");
/// In a response: the dispatcher itself answers, for it has not taken the request; the reason.
pub const REFUSED: HeaderName = HeaderName::from_static("x-fastcontainer-refused");
/// In a response: which host has an instance.
pub const ELSEWHERE: HeaderName = HeaderName::from_static("x-fastcontainer-elsewhere");
/// Where wakes are asked for: this and the app's name.
pub const WAKE_PATH: &str = "/.fastcontainer/wake/";
/// How long an asker is kept waiting until it hears that the app is starting.
pub const ERRAND_PATIENCE: Duration = Duration::from_millis(500);

/// What a proxy asks of a dispatcher.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// To forward a request.
    Request,
    /// To have an app woken.
    Wake,
}

/// What the other proxy knows of a request.
#[derive(Clone, Copy, Debug)]
pub struct Hop {
    /// The instance that it picked.
    pub generation: Generation,
}

impl Kind {
    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Wake => "wake",
        }
    }
}

/// Takes a request in: see whether it is to be believed, and find its app. Returns whether it is answered already.
///
/// # Errors
/// What is wrong with the request.
pub async fn receive(house: &House, session: &mut Session, ctx: &mut Ctx) -> Result<bool, Fault> {
    // For the log of what is not believed; then it is the visitor's.
    ctx.client = client_ip(session);
    let request = session.req_header();
    let by_tls = session.digest().is_some_and(|digest| digest.ssl_digest.is_some());
    check(house, request, by_tls).inspect_err(|fault| complain(session, fault))?;
    let said = |name: &HeaderName| request.headers.get(name).and_then(|value| value.to_str().ok());
    let app: AppName =
        said(&seal::APP).and_then(|app| app.parse().ok()).ok_or(Fault::Forged("it names no app"))?;
    let generation = said(&seal::GENERATION).and_then(|text| text.parse().ok()).unwrap_or_default();
    ctx.client = said(&seal::CLIENT).and_then(|client| client.parse().ok());
    ctx.https = said(&seal::SCHEME) == Some("https");
    ctx.hop = Some(Hop { generation: Generation(generation) });
    if said(&seal::KIND) == Some(Kind::Wake.as_str()) {
        ctx.errand = true;
        // Should it be reachable from here, the first answer of it ends that.
        for node in said(&seal::UNREACHABLE).iter().flat_map(|nodes| nodes.split(',')) {
            if compute::find(&house.hosts.list(), node).is_some() && !house.hosts.is_own(node) {
                house.hosts.remote(node).suspect_by_hearsay();
            }
        }
        if let Err(error) = answer_wake(house, session, &app).await {
            tracing::debug!(%error, "whoever asked for a wake did not take the answer");
        }
        return Ok(true);
    }
    resolve::check(session, ctx)?;
    ctx.app = Some(find(house, session.req_header(), &app)?);
    Ok(false)
}

/// The journal says it, but not more often than anybody would read it; each is in the access log and in the figures.
fn complain(session: &Session, fault: &Fault) {
    const EVERY: u64 = 10;
    static LAST: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let last = LAST.load(Relaxed);
    if now >= last + EVERY && LAST.compare_exchange(last, now, Relaxed, Relaxed).is_ok() {
        let peer = session.client_addr().map(ToString::to_string).unwrap_or_default();
        tracing::warn!(%peer, ?fault, "the dispatcher refuses a request that no proxy of this cluster has sent to this host");
    }
}

/// Whether it comes from a proxy of the cluster and is meant for this host. `by_tls`: it came over a connection that only who has a
/// certificate of the cluster can make.
fn check(house: &House, request: &RequestHeader, by_tls: bool) -> Result<(), Fault> {
    let cluster = house.config.cluster.as_ref().ok_or(Fault::Forged("this host belongs to no cluster"))?;
    match &cluster.key {
        Some(key) => {
            key.check(request.method.as_str(), request.raw_path(), &request.headers).map_err(|fault| {
                Fault::Forged(match fault {
                    seal::SealFault::Missing => "it has no seal",
                    seal::SealFault::Time => "its seal is from another time",
                    seal::SealFault::Wrong => "its seal is wrong",
                })
            })?;
        }
        None if by_tls && cluster.tls.is_some() => {}
        None => return Err(Fault::Forged("this host has no key")),
    }
    let node = request.headers.get(seal::NODE).map(HeaderValue::as_bytes);
    if node.is_none() || node != cluster.node.as_deref().map(str::as_bytes) {
        return Err(Fault::Misdirected(None));
    }
    Ok(())
}

/// The app that the other proxy named. Its host name leads there without a lock, unless one of the two does not know yet that
/// the name has moved.
fn find(house: &House, request: &RequestHeader, name: &AppName) -> Result<Arc<AppRuntime>, Fault> {
    let by_host = resolve::find(house, request).ok().filter(|app| app.name == *name);
    by_host.or_else(|| house.app(name)).ok_or(Fault::Misdirected(None))
}

async fn answer_wake(house: &House, session: &mut Session, app: &AppName) -> pingora::Result<()> {
    let (mut verdict, begin) = house.errands.join(app);
    if let Some(sender) = begin {
        house.command(Command::WakeForAnother { app: app.clone(), verdict: sender });
    }
    let verdict = match timeout(ERRAND_PATIENCE, verdict.wait_for(Option::is_some)).await {
        Err(_) => Verdict::Starting,
        Ok(Ok(verdict)) => verdict.clone().unwrap_or(Verdict::Starting),
        Ok(Err(_)) => Verdict::Refused(Refusal::new(RefusalCode::Busy, "the proxy is ending")),
    };
    let status = match &verdict {
        Verdict::Woken { .. } => StatusCode::OK,
        Verdict::Starting => StatusCode::ACCEPTED,
        Verdict::Refused(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    let body = serde_json::to_vec(&verdict).unwrap_or_default();
    let mut response = ResponseHeader::build(status, Some(2))?;
    response.insert_header(header::CONTENT_TYPE, "application/json")?;
    response.insert_header(header::CONTENT_LENGTH, body.len())?;
    session.write_response_header(Box::new(response), false).await?;
    session.write_response_body(Some(body.into()), true).await
}

/// Says to the other proxy which instance answers. What an app says of the kind is not believed.
///
/// # Errors
/// None in practice: all values are well-formed.
pub fn response_headers(house: &House, ctx: &Ctx, response: &mut ResponseHeader) -> pingora::Result<()> {
    for name in [REFUSED, ELSEWHERE] {
        response.remove_header(&name);
    }
    if let Some(generation) = ctx.generation {
        response.insert_header(INSTANCE, format!("{}/{generation}", own_name(house)))?;
    }
    Ok(())
}

/// The headers of a page that says why the dispatcher has not taken a request.
pub(crate) fn mark(fault: &Fault, response: &mut ResponseHeader) -> pingora::Result<()> {
    if let Fault::Misdirected(_) | Fault::Forged(_) = fault {
        response.insert_header(REFUSED, fault.code())?;
    }
    if let Fault::Misdirected(Some(node)) = fault {
        response.insert_header(ELSEWHERE, node.as_str())?;
    }
    Ok(())
}
