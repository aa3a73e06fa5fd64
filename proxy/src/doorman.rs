//! Who is let in: a request's header must be whole within a time. Pingora bounds each read, but not their number, so that
//! a client that sends one byte now and then ("slow loris") could keep a connection for ever.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use async_trait::async_trait;
use pingora::{
    apps::{HttpServerApp, HttpServerOptions, ReusedHttpStream, ServerApp},
    protocols::http::{ServerSession, v2::server::H2Options},
    proxy::{HttpProxy, http_proxy},
    server::{ShutdownWatch, configuration::ServerConf},
    services::listening::Service,
    time::fast_timeout::fast_sleep,
};

use crate::{Config, FastContainer, proxy_protocol::Porter};

tokio::task_local! {
    /// Whether the header of the request that this task serves has come.
    static HEADER_CAME: Cell<bool>;
}

/// A Pingora application, and how long it may wait for a header, counted from the connection or the last answer.
pub struct Doorman<A> {
    app: Arc<A>,
    patience: Duration,
}

/// The proxy as a service, with the deadline of its configuration.
pub fn service(
    conf: &Arc<ServerConf>,
    proxy: FastContainer,
    options: Option<HttpServerOptions>,
) -> Service<Porter<Doorman<HttpProxy<FastContainer>>>> {
    let config = &proxy.house().config;
    let patience = config.header_timeout;
    let balancers = if proxy.is_dispatcher() { Vec::new() } else { config.balancers.clone() };
    let mut app = http_proxy(conf, proxy);
    app.server_options = options;
    let doorman = Doorman { app: Arc::new(app), patience };
    Service::new("proxy".to_owned(), Porter::new(doorman, balancers, patience))
}

/// Has a dispatcher's service listen at `address`: by TLS where the cluster has certificates.
///
/// # Errors
/// None in practice.
pub fn listen<A: ServerApp + Send + Sync + 'static>(
    service: &mut Service<A>,
    config: &Config,
    address: SocketAddr,
) -> pingora::Result<()> {
    match config.cluster.as_ref().and_then(|cluster| cluster.tls.as_ref()) {
        Some(tls) => service.add_tls_with_settings(&address.to_string(), None, tls.settings()?),
        None => service.add_tcp(&address.to_string()),
    }
    Ok(())
}

/// The header of the request that this task serves has come.
pub(crate) fn header_came() {
    // Who embeds the phases without a doorman has no deadline.
    let _ = HEADER_CAME.try_with(|came| came.set(true));
}

#[async_trait]
impl<A: HttpServerApp + Send + Sync> HttpServerApp for Doorman<A> {
    async fn process_new_http(
        self: &Arc<Self>,
        session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        let mut work = pin!(self.app.process_new_http(session, shutdown));
        let mut late = pin!(fast_sleep(self.patience));
        let both = poll_fn(|context| {
            if let Poll::Ready(reused) = work.as_mut().poll(context) {
                return Poll::Ready(reused);
            }
            let waits = !HEADER_CAME.with(Cell::get);
            if waits && late.as_mut().poll(context).is_ready() {
                tracing::debug!("a client took too long over a header");
                // Dropping the work closes the connection.
                return Poll::Ready(None);
            }
            Poll::Pending
        });
        HEADER_CAME.scope(Cell::new(false), both).await
    }

    fn h2_options(&self) -> Option<H2Options> {
        self.app.h2_options()
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        self.app.server_options()
    }

    async fn http_cleanup(&self) {
        self.app.http_cleanup().await;
    }
}
