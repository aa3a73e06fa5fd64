//! FastContainer inside somebody else's Pingora server: a `ProxyHttp` of one's own that answers some requests itself, adds a header to
//! the responses, and leaves everything else to FastContainer's phases.
//!
//! ```sh
//! cargo run -p fastcontainer-proxy --example embedded -- /var/lib/fastcontainer 127.0.0.1:8081
//! ```
#![forbid(unsafe_code)]

use std::net::SocketAddr;

use async_trait::async_trait;
use bytes::Bytes;
use fastcontainer_proxy::{Config, Ctx, FastContainer};
use launcher_client::paths::StateDir;
use pingora::{
    Error,
    http::{RequestHeader, ResponseHeader},
    protocols::Digest,
    proxy::{FailToProxy, ProxyHttp, Session, http_proxy_service},
    server::Server,
    upstreams::peer::HttpPeer,
};

/// Our own proxy, around FastContainer's.
struct House {
    fastcontainer: FastContainer,
}

#[async_trait]
impl ProxyHttp for House {
    type CTX = Ctx;

    fn new_ctx(&self) -> Ctx {
        self.fastcontainer.new_ctx()
    }

    async fn request_filter(&self, session: &mut Session, ctx: &mut Ctx) -> pingora::Result<bool> {
        // Ours, whatever the host name: FastContainer never sees it, so that a health check wakes nobody.
        if session.req_header().uri.path() == "/healthz" {
            session.respond_error_with_body(200, Bytes::from_static(b"fine\n")).await?;
            return Ok(true);
        }
        self.fastcontainer.request_filter(session, ctx).await
    }

    // Ours: a header on each response of an app.
    async fn response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Ctx,
    ) -> pingora::Result<()> {
        response.insert_header("x-served-by", "my-own-pingora")?;
        self.fastcontainer.response_filter(session, response, ctx).await
    }

    // The rest is FastContainer's. All of these are needed.
    async fn upstream_peer(&self, session: &mut Session, ctx: &mut Ctx) -> pingora::Result<Box<HttpPeer>> {
        self.fastcontainer.upstream_peer(session, ctx).await
    }

    fn fail_to_connect(
        &self,
        session: &mut Session,
        peer: &HttpPeer,
        ctx: &mut Ctx,
        error: Box<Error>,
    ) -> Box<Error> {
        self.fastcontainer.fail_to_connect(session, peer, ctx, error)
    }

    async fn connected_to_upstream(
        &self,
        session: &mut Session,
        reused: bool,
        peer: &HttpPeer,
        fd: std::os::fd::RawFd,
        digest: Option<&Digest>,
        ctx: &mut Ctx,
    ) -> pingora::Result<()> {
        self.fastcontainer.connected_to_upstream(session, reused, peer, fd, digest, ctx).await
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        ctx: &mut Ctx,
    ) -> pingora::Result<()> {
        self.fastcontainer.upstream_request_filter(session, request, ctx).await
    }

    async fn request_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        ctx: &mut Ctx,
    ) -> pingora::Result<()> {
        self.fastcontainer.request_body_filter(session, body, end_of_stream, ctx).await
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Ctx,
    ) -> pingora::Result<()> {
        self.fastcontainer.upstream_response_filter(session, response, ctx).await
    }

    fn error_while_proxy(
        &self,
        peer: &HttpPeer,
        session: &mut Session,
        error: Box<Error>,
        ctx: &mut Ctx,
        reused: bool,
    ) -> Box<Error> {
        self.fastcontainer.error_while_proxy(peer, session, error, ctx, reused)
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, ctx: &mut Ctx) -> FailToProxy {
        self.fastcontainer.fail_to_proxy(session, error, ctx).await
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, ctx: &mut Ctx) {
        self.fastcontainer.logging(session, error, ctx).await;
    }
}

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let state = arguments.next().unwrap_or_else(|| launcher_client::paths::DEFAULT_STATE.to_owned());
    let listen: SocketAddr = arguments.next().as_deref().unwrap_or("127.0.0.1:8081").parse()?;

    let config = Config::new(StateDir::new(state));
    let mut server = Server::new_with_opt_and_conf(None, FastContainer::server_conf(&config, 2));
    server.bootstrap();
    let (fastcontainer, attendants) = FastContainer::new(config, vec![listen]);
    let mut service = http_proxy_service(&server.configuration, House { fastcontainer });
    service.add_tcp(&listen.to_string());
    // What runs beside the requests: the connection to the launcher, the admin socket and the access log.
    server.add_service(attendants.link);
    server.add_service(attendants.office);
    server.add_service(service);
    server.run_forever();
}
