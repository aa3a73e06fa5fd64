//! A client of the launcher's socket. One connection carries any number of requests at a time.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use cmdb::{App, AppName, Change, Generation};
use tokio::sync::mpsc;
use tokio_seqpacket::UnixSeqpacket;

use crate::{
    packet::{self, PacketError},
    wire::{ClientPacket, Refusal, Reply, Request, ServerPacket, VERSION, WakeTiming},
};

/// Why the launcher's answer did not come or was a refusal.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No launcher listens there.
    #[error("no launcher answers at {path}: {source} (is it running, and may this user reach the socket?)")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The launcher went away before it answered.
    #[error("the launcher closed the connection")]
    Closed,
    /// The launcher refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The launcher answered something that does not belong to the question.
    #[error("the launcher gave an unexpected answer: {0}")]
    Unexpected(String),
    /// The packet could not be sent.
    #[error(transparent)]
    Packet(#[from] PacketError),
}

/// An instance that is ready, as [`Client::wake`] found or made it.
#[derive(Debug)]
pub struct Woken {
    /// Which instance.
    pub generation: Generation,
    /// On which port it listens, on its own 127.0.0.1.
    pub port: u16,
    /// How it came to be ready.
    pub timing: WakeTiming,
    /// Unconnected TCP sockets born in its network namespace.
    pub sockets: Vec<OwnedFd>,
}

type Answer = (Reply, Vec<OwnedFd>);

/// A connection to the launcher; cheap to clone. It ends when the last clone is dropped, or when the launcher goes:
/// then every request under way fails with [`ClientError::Closed`], and the owner connects again.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    socket: Arc<UnixSeqpacket>,
    next_id: AtomicU64,
    waiting: Arc<Waiting>,
    reader: tokio::task::AbortHandle,
}

#[derive(Debug, Default)]
struct Waiting {
    /// `None` once the connection is lost.
    replies: Mutex<Option<HashMap<u64, mpsc::UnboundedSender<Answer>>>>,
    lost: tokio::sync::Notify,
}

impl Client {
    /// Connects to the launcher's socket at `path`. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// [`ClientError::Connect`] when nobody listens there or the socket may not be reached.
    pub async fn connect(path: &Path) -> Result<Self, ClientError> {
        let socket = UnixSeqpacket::connect(path)
            .await
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let socket = Arc::new(socket);
        let waiting = Arc::new(Waiting { replies: Mutex::new(Some(HashMap::new())), ..Waiting::default() });
        let reader = tokio::spawn(read_replies(Arc::clone(&socket), Arc::clone(&waiting))).abort_handle();
        Ok(Self { shared: Arc::new(Shared { socket, next_id: AtomicU64::new(1), waiting, reader }) })
    }

    /// Resolves when the connection is lost.
    pub async fn closed(&self) {
        let lost = self.shared.waiting.lost.notified();
        if self.shared.waiting.is_lost() {
            return;
        }
        lost.await;
    }

    /// Has an instance of `app` ready, and fetches `sockets` sockets to it.
    ///
    /// # Errors
    /// [`ClientError::Refused`] says why there is none.
    pub async fn wake(&self, app: &AppName, sockets: u32) -> Result<Woken, ClientError> {
        match self.ask(Request::Wake { app: app.clone(), sockets }).await? {
            (Reply::Woken { generation, port, timing }, sockets) => {
                Ok(Woken { generation, port, timing, sockets })
            }
            other => Err(unexpected(&other.0)),
        }
    }

    /// `count` more sockets to an instance.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with `unknown-instance` when it is gone.
    pub async fn sockets(
        &self,
        app: &AppName,
        generation: Generation,
        count: u32,
    ) -> Result<Vec<OwnedFd>, ClientError> {
        match self.ask(Request::Sockets { app: app.clone(), generation, count }).await? {
            (Reply::Sockets { .. }, sockets) => Ok(sockets),
            other => Err(unexpected(&other.0)),
        }
    }

    /// Everything that the launcher's CMDB holds, then each change. The channel ends with the connection.
    ///
    /// # Errors
    /// The connection's.
    pub async fn watch(&self, serving: bool) -> Result<mpsc::Receiver<Change>, ClientError> {
        let mut replies = self.open(Request::Watch { serving }).await?;
        let (changes, receiver) = mpsc::channel(1024);
        tokio::spawn(async move {
            while let Some((reply, _)) = replies.recv().await {
                let change = match reply {
                    Reply::Put { app, record } => Change::Put { app, record },
                    Reply::Removed { app } => Change::Removed(app),
                    Reply::Nodes { nodes } => Change::Nodes(nodes),
                    Reply::Synced => Change::Synced,
                    other => {
                        tracing::warn!(?other, "the watch of the launcher ended");
                        return;
                    }
                };
                if changes.send(change).await.is_err() {
                    return;
                }
            }
        });
        Ok(receiver)
    }

    /// Puts an app in place. Done when it is durable.
    ///
    /// # Errors
    /// Refused for a server-name that belongs to another app, for an app of another origin, or for a peer that may not
    /// configure.
    pub async fn put_app(&self, app: App) -> Result<(), ClientError> {
        self.done(Request::PutApp { app: Box::new(app), take_over: false }).await
    }

    /// Asks something whose answer is [`Reply::Done`].
    ///
    /// # Errors
    /// The refusal, or the connection's error.
    pub async fn done(&self, request: Request) -> Result<(), ClientError> {
        match self.ask(request).await? {
            (Reply::Done, _) => Ok(()),
            other => Err(unexpected(&other.0)),
        }
    }

    /// Asks and waits for the one answer.
    ///
    /// # Errors
    /// The refusal, or the connection's error.
    pub async fn ask(&self, request: Request) -> Result<Answer, ClientError> {
        let mut replies = self.open(request).await?;
        match replies.recv().await {
            Some((Reply::Error(refusal), _)) => Err(refusal.into()),
            Some(answer) => Ok(answer),
            None => Err(ClientError::Closed),
        }
    }

    /// Asks and hands each answer to `each` until [`Reply::End`], or until `each` says `false`.
    ///
    /// # Errors
    /// The refusal, or the connection's error.
    pub async fn stream(
        &self,
        request: Request,
        mut each: impl FnMut(Reply) -> bool + Send,
    ) -> Result<(), ClientError> {
        let mut replies = self.open(request).await?;
        loop {
            match replies.recv().await {
                Some((Reply::End, _)) => return Ok(()),
                Some((Reply::Error(refusal), _)) => return Err(refusal.into()),
                Some((reply, _)) => {
                    if !each(reply) {
                        return Ok(());
                    }
                }
                None => return Err(ClientError::Closed),
            }
        }
    }

    /// Tells the launcher something to which it does not answer.
    ///
    /// # Errors
    /// The connection's.
    pub async fn tell(&self, request: Request) -> Result<(), ClientError> {
        self.send(0, request).await
    }

    async fn open(&self, request: Request) -> Result<Replies, ClientError> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = mpsc::unbounded_channel();
        match self.shared.waiting.lock().as_mut() {
            Some(replies) => replies.insert(id, sender),
            None => return Err(ClientError::Closed),
        };
        let replies = Replies { id, receiver, waiting: Arc::clone(&self.shared.waiting) };
        self.send(id, request).await?;
        Ok(replies)
    }

    async fn send(&self, id: u64, body: Request) -> Result<(), ClientError> {
        Ok(packet::send(&self.shared.socket, &ClientPacket { v: VERSION, id, body }, &[]).await?)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Waiting {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<HashMap<u64, mpsc::UnboundedSender<Answer>>>> {
        self.replies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_lost(&self) -> bool {
        self.lock().is_none()
    }
}

/// The answers to one request; dropping it forgets the request, so that a caller that leaves costs nothing.
struct Replies {
    id: u64,
    receiver: mpsc::UnboundedReceiver<Answer>,
    waiting: Arc<Waiting>,
}

impl Replies {
    async fn recv(&mut self) -> Option<Answer> {
        self.receiver.recv().await
    }
}

impl Drop for Replies {
    fn drop(&mut self) {
        if let Some(replies) = self.waiting.lock().as_mut() {
            replies.remove(&self.id);
        }
    }
}

async fn read_replies(socket: Arc<UnixSeqpacket>, waiting: Arc<Waiting>) {
    let mut buffer = Vec::new();
    loop {
        match packet::receive::<ServerPacket>(&socket, &mut buffer).await {
            Ok((packet, fds)) => {
                let sender = waiting.lock().as_ref().and_then(|replies| replies.get(&packet.id).cloned());
                if let Some(sender) = sender {
                    // The asker may have left meanwhile; then the answer (and its descriptors) is dropped.
                    let _ = sender.send((packet.body, fds));
                }
            }
            Err(PacketError::Malformed(error)) => {
                tracing::warn!(%error, "the launcher sent a packet that makes no sense");
            }
            Err(PacketError::TooLarge) => tracing::warn!("the launcher sent a packet that is too large"),
            Err(PacketError::Closed | PacketError::Io(_)) => break,
        }
    }
    // Dropping the senders ends every request under way.
    *waiting.lock() = None;
    waiting.lost.notify_waiters();
}

fn unexpected(reply: &Reply) -> ClientError {
    ClientError::Unexpected(format!("{reply:?}").chars().take(200).collect())
}
