//! The page from which Prometheus takes its figures: HTTP/1.1 for `GET /metrics`, and nothing else.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use launcher_client::paths::StateDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

use crate::{failure::Failure, metrics};

/// Answers under way; more wait in the kernel's queue.
const PLACES: usize = 4;
/// How long a client may take to ask, or to take its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// A request's head is no longer than this.
const HEAD: usize = 8 << 10;

/// The page, served as long as it is held.
#[derive(Debug)]
pub(super) struct Page(tokio::task::JoinHandle<()>);

impl Drop for Page {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Page {
    /// Begins to serve the figures of the daemons of `state` at `address`.
    pub(super) async fn open(address: SocketAddr, state: StateDir) -> Result<Self, Failure> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|error| Failure::failed(format!("cannot listen on {address} for --metrics: {error}")))?;
        Ok(Self(tokio::spawn(serve(listener, Arc::new(state)))))
    }
}

async fn serve(listener: TcpListener, state: Arc<StateDir>) {
    let places = Arc::new(Semaphore::new(PLACES));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let state = Arc::clone(&state);
                tokio::spawn(async move {
                    // A client that is slow or has gone misses its answer; it comes again.
                    let _ = tokio::time::timeout(PATIENCE, answer(stream, &state)).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection for metrics could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, state: &StateDir) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() > HEAD || stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let (status, body) = match asked(&head) {
        Some("/metrics") => ("200 OK", metrics::collect(state).await.0),
        Some(_) => ("404 Not Found", "the figures are at /metrics\n".to_owned()),
        None => ("405 Method Not Allowed", "only GET is understood\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

/// The path of a GET, without its query.
fn asked(head: &[u8]) -> Option<&str> {
    let line = head.split(|byte| *byte == b'\r').next()?;
    let target = std::str::from_utf8(line).ok()?.strip_prefix("GET ")?.split(' ').next()?;
    target.split('?').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_get_is_understood() {
        assert_eq!(asked(b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n"), Some("/metrics"));
        assert_eq!(asked(b"POST /metrics HTTP/1.1\r\n\r\n"), None);
        assert_eq!(asked(b"\xff\xfe\r\n\r\n"), None);
    }
}
