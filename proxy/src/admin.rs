//! The admin socket: answers `why` and `stats`. Its appearance says that the proxy serves: it listens, and knows the apps.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    sync::{Arc, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use launcher_client::{
    admin::{Answer, InstanceStats, MOST_RECENT, Question, Stats},
    packet::{self, PacketError},
};
use pingora::{
    apps::http_app::ServeHttp, protocols::http::ServerSession, server::ShutdownWatch,
    services::background::BackgroundService,
};
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};
use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener};

use crate::{house::House, metrics, telemetry, upstream::Fitness};

/// The admin socket and the access log as a Pingora background service.
#[derive(Debug)]
pub struct Office {
    house: Arc<House>,
    listens: Vec<SocketAddr>,
}

impl Office {
    /// `listens`: where the proxy is to be reachable before the admin socket appears.
    #[must_use]
    pub fn new(house: Arc<House>, listens: Vec<SocketAddr>) -> Self {
        Self { house, listens }
    }

    async fn open(&self) {
        while !self.house.informed.load(SeqCst) {
            sleep(Duration::from_millis(5)).await;
        }
        for address in &self.listens {
            while TcpStream::connect(reachable(*address)).await.is_err() {
                sleep(Duration::from_millis(5)).await;
            }
        }
        if let Err(error) = self.serve().await {
            let path = self.house.config.state.proxy_socket();
            tracing::error!(path = %path.display(), %error, "the admin socket cannot be opened");
        }
    }

    async fn serve(&self) -> io::Result<()> {
        let path = self.house.config.state.proxy_socket();
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        // Under another name until its mode is right: whoever sees it may connect.
        let hidden = path.with_extension("new");
        for old in [&path, &hidden] {
            match fs::remove_file(old) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let mut listener = UnixSeqpacketListener::bind(&hidden)?;
        fs::set_permissions(&hidden, fs::Permissions::from_mode(0o660))?;
        fs::rename(&hidden, &path)?;
        tracing::info!(path = %path.display(), "serving");
        loop {
            match listener.accept().await {
                Ok(socket) => {
                    let house = Arc::clone(&self.house);
                    tokio::spawn(async move { converse(&house, &socket).await });
                }
                Err(error) => {
                    // For example out of descriptors: it passes.
                    tracing::warn!(%error, "the admin socket");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

#[async_trait]
impl BackgroundService for Office {
    async fn start(&self, _: ShutdownWatch) {
        tokio::join!(self.open(), telemetry::write_log(&self.house));
    }
}

async fn converse(house: &Arc<House>, socket: &UnixSeqpacket) {
    let own = nix::unistd::geteuid().as_raw();
    let allowed = socket.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own);
    let mut buffer = Vec::new();
    loop {
        let question =
            timeout(Duration::from_secs(30), packet::receive::<Question>(socket, &mut buffer)).await;
        let answer = match question {
            Ok(Ok(_)) if !allowed => Answer::Error("only root and the proxy's own user may ask".to_owned()),
            Ok(Ok((Question::Metrics {}, _))) => {
                let text = metrics::text(house);
                if send_pieces(socket, &text).await.is_err() {
                    return;
                }
                Answer::Metrics(String::new())
            }
            Ok(Ok((question, _))) => answer(house, question).await,
            Ok(Err(PacketError::Malformed(error))) => Answer::Error(format!("not understood: {error}")),
            Ok(Err(_)) | Err(_) => return,
        };
        if packet::send(socket, &answer, &[]).await.is_err() {
            return;
        }
    }
}

async fn answer(house: &Arc<House>, question: Question) -> Answer {
    match question {
        Question::Why(request_id) => {
            let mut request = house.telemetry.why(&request_id);
            if request.is_none() {
                // It may have ended just now: the log's writer looks every 50 ms.
                sleep(Duration::from_millis(120)).await;
                request = house.telemetry.why(&request_id);
            }
            Answer::Request(request.map(Box::new))
        }
        Question::Recent(count) => {
            // As above.
            sleep(Duration::from_millis(120)).await;
            Answer::Recent(house.telemetry.last(count.min(MOST_RECENT)))
        }
        Question::Stats {} => Answer::Stats(stats(house)),
        // Sent by `converse`, for it is more than one answer.
        Question::Metrics {} => Answer::Metrics(String::new()),
    }
}

async fn send_pieces(socket: &UnixSeqpacket, text: &str) -> Result<(), PacketError> {
    // Escaped for JSON a piece may become twice as long; a packet holds 128 KiB.
    const PIECE: usize = 32 << 10;
    let mut rest = text;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.floor_char_boundary(PIECE));
        packet::send(socket, &Answer::Metrics(piece.to_owned()), &[]).await?;
        rest = after;
    }
    Ok(())
}

/// The figures over HTTP, for Prometheus; see `--metrics`.
#[derive(Debug)]
pub struct MetricsPage(pub Arc<House>);

#[async_trait]
impl ServeHttp for MetricsPage {
    async fn response(&self, session: &mut ServerSession) -> http::Response<Vec<u8>> {
        let known = session.req_header().uri.path() == "/metrics";
        let (status, body) = if known {
            (http::StatusCode::OK, metrics::text(&self.0))
        } else {
            (http::StatusCode::NOT_FOUND, "the figures are at /metrics\n".to_owned())
        };
        let mut response = http::Response::new(body.into_bytes());
        *response.status_mut() = status;
        let kind = http::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        let length = response.body().len().into();
        response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
        response.headers_mut().insert(http::header::CONTENT_LENGTH, length);
        response
    }
}

fn stats(house: &House) -> Stats {
    let apps = house.apps();
    let (requests, unlogged) = house.telemetry.counts();
    let tick = house.tick(Instant::now());
    let instances = apps
        .iter()
        .flat_map(|app| app.upstreams().into_iter().map(|one| (one, app.waiting())))
        .map(|(one, held)| InstanceStats {
            app: one.app.to_string(),
            generation: one.generation.0,
            state: match one.fitness() {
                Fitness::Ready => "ready",
                Fitness::Suspect => "suspect",
                Fitness::Frozen => "frozen",
                Fitness::Draining => "draining",
                Fitness::Gone => "gone",
            }
            .to_owned(),
            in_flight: one.in_flight(),
            held: u32::try_from(held).unwrap_or(u32::MAX),
            window: one.window.summary(tick),
        })
        // A packet holds about a thousand.
        .take(500)
        .collect();
    Stats {
        launcher: house.linked.load(SeqCst),
        apps: apps.len() as u64,
        held: house.seats.taken() as u64,
        requests,
        unlogged,
        instances,
    }
}

fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
