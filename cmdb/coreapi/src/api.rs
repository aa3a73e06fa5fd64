//! The API: REST over HTTP/1.1, described by `/openapi.json` (docs/api.md).
#![allow(unused_qualifications, reason = "utoipa's macros write them")]

mod apply;
mod apps;
mod audit;
mod events;
mod extract;
mod gate;
mod hosts;
mod idempotency;
mod instances;
mod plan;
mod problem;
mod reports;
mod server;
mod tokens;

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use axum::{Router, extract::DefaultBodyLimit, http::StatusCode, middleware, routing};
use cmdb::vhost;
use launcher_client::wire::{Reply, Request};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::{Mutex, Semaphore};
use utoipa::{PartialSchema as _, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use self::{audit::Audit, extract::Json, idempotency::Memory, problem::Problem, tokens::Tokens};
use crate::link::{Connected, Link};

/// A whole `conf.d` with ten thousand files fits.
const LARGEST_BODY: usize = 32 << 20;
/// A launcher that is being replaced is back within this time.
const LAUNCHER: Duration = Duration::from_secs(3);
/// How long the launcher may take to list what it knows.
const LIST: Duration = Duration::from_secs(10);
/// Who follow the events at a time.
const FOLLOWERS: usize = 64;

/// What a vhost file says, as JSON (docs/vhost.md): `{"server-name": […], "container": {…}, …}`.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = Object)]
pub(crate) struct Vhost(Value);

/// Keys of a vhost that change; null takes one out.
#[derive(Debug, ToSchema)]
#[schema(value_type = Object)]
#[allow(dead_code, reason = "it only describes")]
pub(crate) struct VhostPatch(Value);

/// What all requests share.
#[derive(Debug)]
pub(crate) struct Api {
    link: Link,
    /// Where relative paths of images begin.
    base: PathBuf,
    /// `None`: whoever reaches the API may look.
    tokens: Option<Tokens>,
    audit: Audit,
    memory: Arc<Memory>,
    /// One change of the configuration at a time: each is made of what is there.
    configuring: Mutex<()>,
    followers: Arc<Semaphore>,
    requests: AtomicU64,
    /// Tells this process's requests from another's.
    nonce: u64,
}

/// What the API needs to begin.
#[derive(Debug)]
pub(crate) struct Settings {
    /// Where it listens besides the socket.
    pub(crate) listener: Option<TcpListener>,
    /// The socket for root.
    pub(crate) socket: PathBuf,
    pub(crate) tokens: Option<PathBuf>,
    pub(crate) audit: PathBuf,
    pub(crate) base: PathBuf,
}

/// Serves for ever.
///
/// # Errors
/// What it needs is not there.
pub(crate) async fn serve(settings: Settings, link: Link) -> anyhow::Result<()> {
    let open = |path: &PathBuf| {
        Tokens::open(path).with_context(|| {
            format!("the tokens in {} cannot be read (by the CoreAPI's user)", path.display())
        })
    };
    let audit = &settings.audit;
    let api = Arc::new(Api {
        link,
        base: settings.base,
        tokens: settings.tokens.as_ref().map(open).transpose()?,
        audit: Audit::open(audit).with_context(|| format!("the audit log {}", audit.display()))?,
        memory: Arc::default(),
        configuring: Mutex::default(),
        followers: Arc::new(Semaphore::new(FOLLOWERS)),
        requests: AtomicU64::new(0),
        nonce: nonce(),
    });
    for fault in api.tokens.iter().flat_map(Tokens::take_faults) {
        tracing::warn!("{fault}");
    }
    let router = router(&api);
    let net = async {
        match settings.listener {
            Some(listener) => {
                let address = listener.local_addr()?;
                tracing::info!("the API is at http://{address}/ (described by /openapi.json)");
                server::serve_net(listener, router.clone()).await
            }
            None => std::future::pending().await,
        }
    };
    let local = server::serve_local(&settings.socket, router.clone());
    tokio::select! {
        ended = net => ended.context("the API's address"),
        ended = local => ended.with_context(|| format!("the API's socket {}", settings.socket.display())),
    }
}

impl Api {
    /// The launcher, which may be away for a moment.
    async fn connected(&self) -> Result<Connected, Problem> {
        match tokio::time::timeout(LAUNCHER, self.link.connected()).await {
            Ok(connected) => Ok(connected),
            Err(_) => Err(Problem::away("the launcher is away; apps that run go on being served")),
        }
    }

    /// What the launcher lists; each reply goes through `pick`.
    async fn list<T: Send>(
        &self,
        request: Request,
        pick: impl Fn(Reply) -> Option<T> + Send + Sync,
    ) -> Result<Vec<T>, Problem> {
        let connected = self.connected().await?;
        let mut found = Vec::new();
        let asked = connected.client.stream(request, |reply| {
            found.extend(pick(reply));
            true
        });
        tokio::time::timeout(LIST, asked)
            .await
            .map_err(|_| Problem::away("the launcher did not answer in time"))??;
        Ok(found)
    }

    /// Puts a line among the events.
    fn note(&self, kind: &'static str, message: String) {
        if let Some(connected) = self.link.now() {
            tokio::spawn(async move {
                // A launcher that goes misses it; the log has it.
                let _ = connected.client.tell(Request::Note { kind: kind.into(), app: None, message }).await;
            });
        }
    }

    fn request_id(&self) -> String {
        format!("{:016x}{:08x}", self.nonce, self.requests.fetch_add(1, Ordering::Relaxed))
    }
}

fn nonce() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(0)
}

fn router(api: &Arc<Api>) -> Router {
    let (router, openapi) = OpenApiRouter::new()
        .routes(routes!(apps::list, apps::create))
        .routes(routes!(apps::get, apps::replace, apps::patch, apps::remove))
        .routes(routes!(apply::apply))
        .routes(routes!(instances::list))
        .routes(routes!(instances::of_app))
        .routes(routes!(instances::wake))
        .routes(routes!(instances::stop))
        .routes(routes!(instances::restart))
        .routes(routes!(instances::limit))
        .routes(routes!(instances::scale))
        .routes(routes!(instances::signal))
        .routes(routes!(instances::logs))
        .routes(routes!(reports::images))
        .routes(routes!(reports::usage))
        .routes(routes!(hosts::list))
        .routes(routes!(hosts::drain))
        .routes(routes!(hosts::uncordon))
        .routes(routes!(hosts::forget))
        .routes(routes!(events::list))
        .routes(routes!(events::stream))
        .split_for_parts();
    let document = document(serde_json::to_value(openapi).unwrap_or_default());
    let described = move || {
        let document = document.clone();
        async move { Json(document) }
    };
    let router = router
        .method_not_allowed_fallback(|| async {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method", "this method is not for this resource")
        })
        .fallback(|| async {
            Problem::new(
                StatusCode::NOT_FOUND,
                "unknown-resource",
                "there is nothing here; see /openapi.json",
            )
        })
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .layer(middleware::from_fn_with_state(Arc::clone(api), gate::gate))
        .with_state(Arc::clone(api));
    // No secret: what it describes is in the source.
    router.route("/openapi.json", routing::get(described))
}

/// What the annotations of the handlers cannot say.
fn document(mut document: Value) -> Value {
    document["info"] = json!({
        "title": "FastContainer CoreAPI",
        "version": env!("CARGO_PKG_VERSION"),
        "description": "Apps, instances and hosts. Send `authorization: Bearer TOKEN`; roles: read < operate < admin. Faults are application/problem+json (RFC 9457). A POST with an `Idempotency-Key` is done once.",
        "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
    });
    let schemas = &mut document["components"]["schemas"];
    schemas["Vhost"] = vhost::json_schema();
    schemas["VhostPatch"] = json!({
        "type": "object",
        "description": "A JSON merge patch (RFC 7396) of a vhost: keys that change; null takes one out.",
    });
    for (name, schema) in problem_schemas() {
        schemas[name.as_str()] = schema;
    }
    document["components"]["securitySchemes"] = json!({ "token": { "type": "http", "scheme": "bearer" } });
    document["security"] = json!([{ "token": [] }]);
    let problem = json!({
        "description": "it was not done",
        "content": { "application/problem+json": { "schema": { "$ref": "#/components/schemas/Problem" } } },
    });
    let paths = document["paths"].as_object_mut().into_iter().flatten().map(|(_, path)| path);
    for operation in paths.filter_map(Value::as_object_mut).flatten().map(|(_, operation)| operation) {
        operation["responses"]["default"] = problem.clone();
    }
    document
}

fn problem_schemas() -> Vec<(String, Value)> {
    let mut schemas = Vec::new();
    Problem::schemas(&mut schemas);
    schemas.push((Problem::name().into_owned(), Problem::schema()));
    schemas
        .into_iter()
        .map(|(name, schema)| (name, serde_json::to_value(schema).unwrap_or_default()))
        .collect()
}

/// Opens the API's address: before the privileges go, for it may be a low port.
///
/// # Errors
/// Somebody else listens there; or everybody could reach it, and no tokens are asked for.
pub(crate) fn listen(address: std::net::SocketAddr, tokens: Option<&Path>) -> anyhow::Result<TcpListener> {
    anyhow::ensure!(
        address.ip().is_loopback() || tokens.is_some(),
        "--api {address} can be reached from elsewhere: give --tokens FILE too (docs/api.md says how to make one)"
    );
    TcpListener::bind(address).with_context(|| format!("cannot listen on {address} for the API"))
}
