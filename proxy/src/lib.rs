//! FastContainer's reverse proxy, as a library: [`FastContainer`] is a Pingora `ProxyHttp` that finds the app by host name, holds the
//! request while an instance is woken, picks one, forwards, measures and logs (DESIGN.md §4). Any Pingora server can embed it whole, or
//! delegate single callbacks to it from a `ProxyHttp` of its own: see `examples/embedded.rs`.
#![forbid(unsafe_code)]

use std::{net::SocketAddr, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use cmdb::cache::CmCache;
use pingora::{
    Error,
    http::{RequestHeader, ResponseHeader},
    protocols::Digest,
    proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session},
    server::configuration::ServerConf,
    services::background::{GenBackgroundService, background_service},
    upstreams::peer::HttpPeer,
};

pub mod admin;
pub mod balance;
pub mod bill;
pub mod config;
pub mod dispatch;
pub mod doorman;
pub mod guests;
pub mod hold;
pub mod house;
pub mod lease;
pub mod link;
pub mod measure;
mod memory;
pub mod metrics;
pub mod nodes;
pub mod pages;
pub mod phases;
pub mod proxy_protocol;
pub mod quirks;
pub mod remote;
pub mod seal;
pub mod stock;
pub mod telemetry;
pub mod tenant;
pub mod tls;
pub mod upstream;
pub mod waiting;
pub mod wake;

pub use config::Config;
pub use phases::Ctx;

use crate::{
    admin::Office,
    house::House,
    link::Link,
    pages::Fault,
    phases::{admit, forward, log, measure as measuring, pick, resolve},
};

/// The proxy's behaviour; cheap to clone.
#[derive(Clone, Debug)]
pub struct FastContainer {
    house: Arc<House>,
    entrance: Entrance,
}

/// Where requests come in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Entrance {
    /// From clients.
    Front,
    /// From the proxies of other hosts.
    Dispatch,
}

/// What has to run beside a [`FastContainer`]: add both to the same Pingora server.
pub struct Attendants {
    /// The connection to the launcher.
    pub link: GenBackgroundService<Link>,
    /// The admin socket and the access log.
    pub office: GenBackgroundService<Office>,
}

impl FastContainer {
    /// A proxy for the launcher of `config.state`, and what has to run beside it. `listens` is where it will be reachable; its admin socket
    /// appears when it is.
    #[must_use]
    pub fn new(config: Config, listens: Vec<SocketAddr>) -> (Self, Attendants) {
        let (house, commands) = House::new(config, CmCache::new());
        let attendants = Attendants {
            link: background_service("launcher link", Link::new(Arc::clone(&house), commands)),
            office: background_service("admin and log", Office::new(Arc::clone(&house), listens)),
        };
        (Self { house, entrance: Entrance::Front }, attendants)
    }

    /// The same for requests from the proxies of other hosts, and for nobody else's.
    #[must_use]
    pub fn dispatcher(&self) -> Self {
        Self { entrance: Entrance::Dispatch, ..self.clone() }
    }

    /// Whether it is that.
    #[must_use]
    pub fn is_dispatcher(&self) -> bool {
        self.entrance == Entrance::Dispatch
    }

    /// What all its apps share.
    #[must_use]
    pub fn house(&self) -> &Arc<House> {
        &self.house
    }

    /// A server configuration that fits: nothing in `/tmp`, a short grace, and enough attempts for a connection that fails.
    #[must_use]
    pub fn server_conf(config: &Config, threads: usize) -> ServerConf {
        let own = config.state.proxy();
        let path = |name: &str| own.join(name).to_string_lossy().into_owned();
        ServerConf {
            threads,
            pid_file: path("proxy.pid"),
            upgrade_sock: path("upgrade.sock"),
            grace_period_seconds: Some(config.grace.as_secs()),
            graceful_shutdown_timeout_seconds: Some(1),
            // Attempts are bounded by the app's hold timeout and a growing pause (`hold::pause`); this is only the last stop.
            max_retries: 32,
            // A connection stays on its thread: moving tasks between two busy threads costs more than it evens out.
            work_stealing: false,
            upstream_keepalive_pool_size: 1024,
            ..ServerConf::default()
        }
    }
}

#[async_trait]
impl ProxyHttp for FastContainer {
    type CTX = Ctx;

    fn new_ctx(&self) -> Ctx {
        // Pingora makes one when a header is whole.
        doorman::header_came();
        Ctx::new()
    }

    // No compression: apps decide. Saves the default module's work per request.
    fn init_downstream_modules(&self, _: &mut pingora::modules::http::HttpModules) {}

    async fn request_filter(&self, session: &mut Session, ctx: &mut Ctx) -> pingora::Result<bool> {
        let received = match self.entrance {
            Entrance::Front => resolve::resolve(&self.house, session, ctx).await.map(|()| false),
            // Boxed, as what follows in `resolve`: the way of a client's request has no room to carry for it.
            Entrance::Dispatch => Box::pin(dispatch::receive(&self.house, session, ctx)).await,
        };
        if matches!(received, Ok(true)) {
            return Ok(true);
        }
        match received.and_then(|_| admit::admit(&self.house, ctx)) {
            Ok(()) => Ok(false),
            Err(fault) => Err(ctx.fail(fault)),
        }
    }

    async fn upstream_peer(&self, session: &mut Session, ctx: &mut Ctx) -> pingora::Result<Box<HttpPeer>> {
        pick::pick(session, ctx).await
    }

    fn fail_to_connect(&self, _: &mut Session, _: &HttpPeer, ctx: &mut Ctx, error: Box<Error>) -> Box<Error> {
        forward::unconnected(ctx, error)
    }

    async fn connected_to_upstream(
        &self,
        session: &mut Session,
        reused: bool,
        _: &HttpPeer,
        _fd: std::os::fd::RawFd,
        _: Option<&Digest>,
        ctx: &mut Ctx,
    ) -> pingora::Result<()> {
        self.house.metrics.connected(reused);
        measuring::connected(session, ctx);
        Ok(())
    }

    async fn upstream_request_filter(
        &self,
        _: &mut Session,
        request: &mut RequestHeader,
        ctx: &mut Ctx,
    ) -> pingora::Result<()> {
        forward::request_headers(&self.house, ctx, request)
    }

    async fn request_body_filter(
        &self,
        _: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        ctx: &mut Ctx,
    ) -> pingora::Result<()> {
        quirks::drop_empty_last_chunk(body, end_of_stream);
        measuring::body_sent(ctx, end_of_stream);
        Ok(())
    }

    async fn upstream_response_filter(
        &self,
        _: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Ctx,
    ) -> pingora::Result<()> {
        if let Some(remote) = ctx.away.clone() {
            remote::opened(ctx, &remote, response)?;
        }
        measuring::answered(&self.house, ctx, response);
        Ok(())
    }

    async fn response_filter(
        &self,
        _: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Ctx,
    ) -> pingora::Result<()> {
        forward::response_headers(&self.house, ctx, response)
    }

    fn error_while_proxy(
        &self,
        _: &HttpPeer,
        session: &mut Session,
        error: Box<Error>,
        ctx: &mut Ctx,
        _client_reused: bool,
    ) -> Box<Error> {
        forward::broken_off(session, ctx, error)
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, ctx: &mut Ctx) -> FailToProxy {
        // The place on the instance is needed no more, however slowly the client takes the page.
        ctx.lease = None;
        let fault = match (&ctx.fault, error.esource()) {
            (Some(fault), _) => fault.clone(),
            (None, pingora::ErrorSource::Downstream) if is_dead(error) => {
                return FailToProxy { error_code: 0, can_reuse_downstream: false };
            }
            (None, pingora::ErrorSource::Downstream) => Fault::BadRequest("it breaks off or breaks HTTP"),
            (None, pingora::ErrorSource::Upstream) => Fault::NoAnswer,
            (None, _) => Fault::Internal,
        };
        let app = ctx.app.as_ref().map(|app| app.name.as_str());
        if let Err(error) = pages::write(session, &fault, app, ctx.request_id.as_str()).await {
            tracing::debug!(%error, "the client did not take the page");
        }
        let error_code = fault.status().as_u16();
        ctx.fault = Some(fault);
        FailToProxy { error_code, can_reuse_downstream: false }
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, ctx: &mut Ctx) {
        log::log(&self.house, session, error, ctx);
    }

    // What went wrong for one client is in the access log; the journal is for the operator.
    fn suppress_error_log(&self, _: &Session, _: &Ctx, error: &Error) -> bool {
        tracing::debug!(%error, "a request failed");
        true
    }

    fn suppress_proxy_warn_log(&self, _: &Session, _: &Ctx, error: &Error, _: ProxyWarnLogContext) -> bool {
        tracing::debug!(%error, "a request is tried again");
        true
    }
}

fn is_dead(error: &Error) -> bool {
    use pingora::ErrorType::{ConnectionClosed, ReadError, ReadTimedout, WriteError, WriteTimedout};
    matches!(error.etype(), ConnectionClosed | ReadError | WriteError | ReadTimedout | WriteTimedout)
}
