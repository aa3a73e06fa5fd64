//! Sockets to one instance, which the launcher makes inside the instance's network namespace, and the dialler that connects them for Pingora.

use std::{
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed, Ordering::SeqCst},
    },
};

use async_trait::async_trait;
use cmdb::{AppName, Generation};
use crossbeam_queue::ArrayQueue;
use launcher_client::wire::MAX_FDS;
use pingora::{
    Error, ErrorType,
    connectors::l4::Connect,
    protocols::l4::{socket::SocketAddr as PeerAddr, stream::Stream, virt::VirtualSocketStream},
};
use tokio::{
    net::TcpSocket,
    sync::{Notify, mpsc},
};

use crate::{link::Command, quirks::YieldBeforeRead};

/// First size of a batch of sockets; it grows when the stock runs empty.
const FIRST_BATCH: u32 = 4;
/// Sockets that a quiet instance keeps: thousands of apps share one process's descriptors.
const QUIET_STOCK: usize = 2;

/// Largest batch.
#[expect(clippy::cast_possible_truncation, reason = "64")]
const MAX_BATCH: u32 = MAX_FDS as u32;

/// Sockets to one instance, born in its network namespace, not yet connected.
#[derive(Debug)]
pub struct Stock {
    /// The instance's app.
    pub app: AppName,
    /// The instance's generation.
    pub generation: Generation,
    address: SocketAddr,
    sockets: ArrayQueue<OwnedFd>,
    batch: AtomicU32,
    refilling: AtomicBool,
    closed: AtomicBool,
    arrived: Notify,
    commands: mpsc::UnboundedSender<Command>,
}

/// Connects for Pingora with a socket of a [`Stock`].
#[derive(Debug)]
pub struct Dialler {
    stock: Arc<Stock>,
    upgrade: bool,
}

impl Stock {
    /// An empty one for the instance that listens on `address` in its own namespace.
    #[must_use]
    pub fn new(
        app: &AppName,
        generation: Generation,
        address: SocketAddr,
        commands: mpsc::UnboundedSender<Command>,
    ) -> Self {
        Self {
            app: app.clone(),
            generation,
            address,
            sockets: ArrayQueue::new(2 * MAX_FDS),
            batch: AtomicU32::new(FIRST_BATCH),
            refilling: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            arrived: Notify::new(),
            commands,
        }
    }

    /// How many sockets the next batch should have.
    #[must_use]
    pub fn batch(&self) -> u32 {
        self.batch.load(Relaxed)
    }

    /// Puts sockets in; those that do not fit are closed.
    pub fn put(&self, sockets: Vec<OwnedFd>) {
        let count = sockets.len();
        for socket in sockets {
            if self.closed.load(SeqCst) || self.sockets.push(socket).is_err() {
                break;
            }
        }
        if self.closed.load(SeqCst) {
            self.close();
        }
        for _ in 0..count {
            self.arrived.notify_one();
        }
    }

    /// A crowd is on its way: `count` sockets came at once, and the next batch should be as large.
    pub fn expect(&self, count: usize) {
        self.batch.fetch_max(u32::try_from(count).unwrap_or(MAX_BATCH).min(MAX_BATCH), Relaxed);
    }

    /// The instance has become quiet: most spare sockets go.
    pub fn settle(&self) {
        self.batch.store(FIRST_BATCH, Relaxed);
        while self.sockets.len() > QUIET_STOCK && self.sockets.pop().is_some() {}
    }

    /// How many sockets there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sockets.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sockets.is_empty()
    }

    /// A refill has ended, with or without success.
    pub fn refilled(&self) {
        self.refilling.store(false, SeqCst);
        self.arrived.notify_waiters();
    }

    /// The instance is ending: sockets are dropped, and who waits for one is told.
    pub fn close(&self) {
        self.closed.store(true, SeqCst);
        while self.sockets.pop().is_some() {}
        self.arrived.notify_waiters();
    }

    /// Whether the instance has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.load(SeqCst)
    }

    async fn take(self: &Arc<Self>) -> pingora::Result<OwnedFd> {
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            if let Some(socket) = self.sockets.pop() {
                if self.sockets.len() < (self.batch() / 2) as usize {
                    self.refill();
                }
                return Ok(socket);
            }
            if self.is_closed() {
                return Err(Error::explain(ErrorType::ConnectRefused, "the instance has ended"));
            }
            self.batch.store((self.batch() * 2).min(MAX_BATCH), Relaxed);
            self.refill();
            arrived.await;
        }
    }

    fn refill(self: &Arc<Self>) {
        if !self.refilling.swap(true, SeqCst) {
            let _ = self.commands.send(Command::Refill(Arc::clone(self)));
        }
    }
}

impl Dialler {
    /// `upgrade`: for WebSocket handshakes.
    #[must_use]
    pub fn new(stock: Arc<Stock>, upgrade: bool) -> Self {
        Self { stock, upgrade }
    }
}

#[async_trait]
impl Connect for Dialler {
    /// Connects inside the instance's network namespace: that is where the socket was born. The address that Pingora
    /// passes is the instance's own.
    async fn connect(&self, _: &PeerAddr) -> pingora::Result<Stream> {
        // Pingora bounds all of this by `total_connection_timeout`.
        let socket = TcpStream::from(self.stock.take().await?);
        let failed = |error| Error::because(connect_error(&error), "connecting to the instance", error);
        socket.set_nonblocking(true).map_err(failed)?;
        let socket = TcpSocket::from_std_stream(socket).connect(self.stock.address).await.map_err(failed)?;
        if self.upgrade {
            return Ok(VirtualSocketStream::new(Box::new(YieldBeforeRead::new(socket))).into());
        }
        Ok(socket.into())
    }
}

fn connect_error(error: &std::io::Error) -> ErrorType {
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => ErrorType::ConnectRefused,
        std::io::ErrorKind::TimedOut => ErrorType::ConnectTimedout,
        std::io::ErrorKind::NetworkUnreachable | std::io::ErrorKind::HostUnreachable => {
            ErrorType::ConnectNoRoute
        }
        _ => ErrorType::ConnectError,
    }
}
