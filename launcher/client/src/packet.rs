//! One packet with its descriptors, to and from a `SOCK_SEQPACKET` socket.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, OwnedFd},
};

use serde::{Serialize, de::DeserializeOwned};
use tokio_seqpacket::{
    UnixSeqpacket,
    ancillary::{AncillaryMessageWriter, OwnedAncillaryMessage},
};

use crate::wire::{MAX_FDS, MAX_PACKET};

/// Room for [`MAX_FDS`] descriptors and the header of their control message.
const ANCILLARY: usize = 16 + 8 * MAX_FDS;

/// Why a packet could not be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The peer is gone.
    #[error("the connection was closed")]
    Closed,
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// Too large to send, or larger than allowed when received.
    #[error("a packet of more than {MAX_PACKET} bytes")]
    TooLarge,
    /// Not a message of this protocol.
    #[error("a packet that makes no sense: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// Sends `message` and `fds` as one packet.
///
/// # Errors
/// [`PacketError::TooLarge`] before anything is sent; the socket's errors.
pub async fn send<T: Serialize + Sync>(
    socket: &UnixSeqpacket,
    message: &T,
    fds: &[OwnedFd],
) -> Result<(), PacketError> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_PACKET || fds.len() > MAX_FDS {
        return Err(PacketError::TooLarge);
    }
    if fds.is_empty() {
        socket.send(&bytes).await?;
        return Ok(());
    }
    let mut room = [0u8; ANCILLARY];
    let mut ancillary = AncillaryMessageWriter::new(&mut room);
    ancillary
        .add_fds(fds.iter().map(AsFd::as_fd))
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"))?;
    socket.send_vectored_with_ancillary(&[IoSlice::new(&bytes)], &mut ancillary).await?;
    Ok(())
}

/// Receives one packet. `buffer` is scratch space that is reused; it grows to [`MAX_PACKET`] once.
///
/// # Errors
/// [`PacketError::Closed`] at the end; a malformed or over-long packet is consumed, so a server may answer and go on.
pub async fn receive<T: DeserializeOwned>(
    socket: &UnixSeqpacket,
    buffer: &mut Vec<u8>,
) -> Result<(T, Vec<OwnedFd>), PacketError> {
    buffer.resize(MAX_PACKET + 1, 0);
    let mut room = [0u8; ANCILLARY];
    let (info, ancillary) =
        socket.recv_vectored_with_ancillary(&mut [IoSliceMut::new(buffer)], &mut room).await?;
    let mut fds = Vec::new();
    for message in ancillary.into_messages() {
        if let OwnedAncillaryMessage::FileDescriptors(received) = message {
            fds.extend(received);
        }
    }
    let length = info.bytes_read();
    if length == 0 {
        return Err(PacketError::Closed);
    }
    if info.truncated() || length > MAX_PACKET {
        return Err(PacketError::TooLarge);
    }
    Ok((serde_json::from_slice(&buffer[..length])?, fds))
}
