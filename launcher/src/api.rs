//! The launcher's socket: who may ask what, and the answers.

mod answers;
mod peer;

use std::{io, os::fd::OwnedFd, path::Path, sync::Arc};

use launcher_client::{
    packet::{self, PacketError},
    wire::{ClientPacket, Refusal, RefusalCode, Reply, Request, ServerPacket, VERSION},
};
use tokio::sync::{Semaphore, mpsc};
use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener};

use crate::host::Host;
pub use peer::{Identities, Role};

/// Most connections at a time: a host has a proxy, a CoreAPI and operators.
const CONNECTIONS: usize = 256;
/// Most requests of one connection that are worked on at a time; more wait in the socket.
const REQUESTS: usize = 1024;
/// Replies that wait for a slow peer; then its requests wait too, and its watch is cut.
const REPLIES: usize = 4096;

/// A reply with its descriptors, on its way to one peer.
type Outgoing = (ServerPacket, Vec<OwnedFd>);

/// One connection.
struct Peer {
    host: Arc<Host>,
    /// The number of this connection among [`crate::host::Watchers`], once it has asked to watch as a serving proxy.
    watcher: std::sync::OnceLock<u64>,
    out: mpsc::Sender<Outgoing>,
}

/// Makes the socket. It can be reached by root and `gid`; who may do what is decided by `SO_PEERCRED`.
///
/// # Errors
/// The system's, with the path.
pub fn bind(path: &Path, gid: u32) -> io::Result<UnixSeqpacketListener> {
    use std::os::unix::fs::PermissionsExt as _;
    let at = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(error)),
        _ => {}
    }
    let listener = UnixSeqpacketListener::bind(path).map_err(at)?;
    std::os::unix::fs::chown(path, Some(0), Some(gid)).map_err(at)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660)).map_err(at)?;
    Ok(listener)
}

/// Serves peers for ever.
pub async fn serve(host: Arc<Host>, mut listener: UnixSeqpacketListener, identities: Identities) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok(socket) => {
                let host = Arc::clone(&host);
                tokio::spawn(async move {
                    connection(host, socket, identities).await;
                    drop(place);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: the socket stays readable, so rest before the next try.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(host: Arc<Host>, socket: UnixSeqpacket, identities: Identities) {
    let role = match socket.peer_cred() {
        Ok(cred) => identities.role(cred.uid()),
        Err(error) => return tracing::warn!(%error, "a peer without credentials"),
    };
    let socket = Arc::new(socket);
    let (out, replies) = mpsc::channel(REPLIES);
    let writer = tokio::spawn(write_replies(Arc::clone(&socket), replies));
    let peer = Arc::new(Peer { host, watcher: std::sync::OnceLock::new(), out });
    let places = Arc::new(Semaphore::new(REQUESTS));
    let mut buffer = Vec::new();
    loop {
        let packet = match packet::receive::<ClientPacket>(&socket, &mut buffer).await {
            Ok((packet, _)) => packet,
            Err(PacketError::Closed | PacketError::Io(_)) => break,
            Err(error) => {
                let refusal = Refusal::new(RefusalCode::BadRequest, error.to_string());
                if peer.reply(0, Reply::Error(refusal), Vec::new()).await.is_err() {
                    break;
                }
                continue;
            }
        };
        if let Err(refusal) = check(&packet, role) {
            if peer.reply(packet.id, Reply::Error(refusal), Vec::new()).await.is_err() {
                break;
            }
            continue;
        }
        if peer.take_note(&packet.body) {
            continue;
        }
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { break };
        let peer = Arc::clone(&peer);
        tokio::spawn(async move {
            peer.answer(packet.id, packet.body).await;
            drop(place);
        });
    }
    peer.gone();
    writer.abort();
}

async fn write_replies(socket: Arc<UnixSeqpacket>, mut replies: mpsc::Receiver<Outgoing>) {
    while let Some((packet, fds)) = replies.recv().await {
        match packet::send(&socket, &packet, &fds).await {
            Ok(()) => {}
            Err(PacketError::TooLarge) => {
                tracing::warn!(id = packet.id, "a reply is too large to be sent");
                let refusal = Refusal::new(RefusalCode::Internal, "the answer is too large for one packet");
                let packet = ServerPacket { v: VERSION, id: packet.id, body: Reply::Error(refusal) };
                if packet::send(&socket, &packet, &[]).await.is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

fn check(packet: &ClientPacket, role: Role) -> Result<(), Refusal> {
    if packet.v != VERSION {
        let message = format!(
            "this launcher speaks version {VERSION} of the protocol, the request version {}",
            packet.v
        );
        return Err(Refusal::new(RefusalCode::BadRequest, message));
    }
    if !role.may(&packet.body) {
        let message = format!("this user may not ask that ({role})");
        return Err(Refusal::new(RefusalCode::Forbidden, message));
    }
    Ok(())
}

impl Peer {
    async fn reply(&self, id: u64, body: Reply, fds: Vec<OwnedFd>) -> Result<(), ()> {
        self.out.send((ServerPacket { v: VERSION, id, body }, fds)).await.map_err(|_| ())
    }

    /// Deals with what wants no answer, in the order in which it came; `false` for anything else.
    fn take_note(&self, request: &Request) -> bool {
        use crate::supervisor::Message;
        let watcher = self.watcher.get().copied().unwrap_or(0);
        let tell = |app: &cmdb::AppName, message| {
            // No supervisor: the note is about an instance of an earlier life.
            if let Some(supervisor) = self.host.running_supervisor(app) {
                let _ = supervisor.send(message);
            }
        };
        match request {
            Request::FirstByte { app, generation } => tell(app, Message::FirstByte(*generation)),
            Request::Quiesced { app, generation } => tell(app, Message::Quiesced(watcher, *generation)),
            Request::Suspect { app, generation, reason } => {
                tell(app, Message::Suspect(*generation, reason.chars().take(200).collect()));
            }
            Request::Unreachable { nodes } => self.host.cannot_reach(nodes.iter().cloned()),
            Request::Report { activity } => {
                for activity in activity {
                    tell(&activity.app, Message::Report(watcher, activity.clone()));
                }
            }
            Request::Traffic { since_us, apps } => self.host.ledger.traffic(*since_us, apps.clone()),
            Request::Note { kind, app, message } => {
                let kind: String = kind.chars().take(40).collect();
                self.host.events.emit(&kind, app.as_ref(), None, message.chars().take(4000).collect());
            }
            _ => return false,
        }
        true
    }

    /// A serving proxy that has gone has no requests any more.
    fn gone(&self) {
        use crate::supervisor::Message;
        if let Some(watcher) = self.watcher.get().copied() {
            self.host.watchers.remove(watcher);
            for supervisor in self.host.supervisors() {
                let _ = supervisor.send(Message::WatcherGone(watcher));
            }
        }
    }
}
