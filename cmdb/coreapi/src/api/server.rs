//! Where the API listens, and each connection's bounds.

use std::{io, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc, time::Duration};

use axum::Router;
use hyper::{
    Request,
    body::Incoming,
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};

use super::gate::Peer;

/// Connections at a time; more wait in the kernel's queue.
const CONNECTIONS: usize = 512;
/// A request's head is whole within this time, counted from the connection or the last answer.
const HEAD: Duration = Duration::from_secs(30);

/// Serves an address for ever.
pub(crate) async fn serve_net(listener: std::net::TcpListener, router: Router) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return Ok(()) };
        match listener.accept().await {
            Ok((stream, address)) => {
                let _ = stream.set_nodelay(true);
                let router = router.clone();
                tokio::spawn(async move {
                    connection(stream, Peer::Net(address), router).await;
                    drop(place);
                });
            }
            Err(error) => rest(&error).await,
        }
    }
}

/// Serves root by way of a socket in the state folder, for ever.
pub(crate) async fn serve_local(path: &Path, router: Router) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return Ok(()) };
        match listener.accept().await {
            Ok((stream, _)) => {
                let Ok(peer) = stream.peer_cred().map(|cred| Peer::Local(cred.uid())) else { continue };
                let router = router.clone();
                tokio::spawn(async move {
                    connection(stream, peer, router).await;
                    drop(place);
                });
            }
            Err(error) => rest(&error).await,
        }
    }
}

/// Out of descriptors, most likely: the listener stays readable.
async fn rest(error: &io::Error) {
    tracing::warn!(%error, "a connection to the API could not be accepted");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    peer: Peer,
    router: Router,
) {
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer);
        router.call(request)
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(64 << 10);
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        // A client that broke off, or spoke no HTTP.
        tracing::debug!(%error, "a connection to the API ended");
    }
}
