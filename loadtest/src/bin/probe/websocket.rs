//! The least of RFC 6455 that an echo needs.

use std::io;

use base64::Engine;
use loadtest::http::{Head, response};
use sha1::{Digest, Sha1};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// Upgrades the connection and sends every message back until a close frame or the end; `input` is what was read
/// already after the head. A request that asks for no upgrade is answered 426.
pub(crate) async fn echo(mut stream: TcpStream, head: &Head, mut input: Vec<u8>) -> io::Result<()> {
    let key = head.header("sec-websocket-key").filter(|_| head.header_has("upgrade", "websocket"));
    let Some(key) = key else {
        let answer = response(head, "426 Upgrade Required", "text/plain", b"this path speaks WebSocket\n");
        stream.write_all(&answer).await?;
        return stream.shutdown().await;
    };
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {}\r\n\r\n",
        accept_for(key)
    );
    stream.write_all(answer.as_bytes()).await?;
    loop {
        let Some((frame, used)) = Frame::parse(&input) else {
            if stream.read_buf(&mut input).await? == 0 {
                return Ok(());
            }
            continue;
        };
        input.drain(..used);
        let answer = match frame.opcode {
            PING => Frame { opcode: PONG, ..frame },
            PONG => continue,
            _ => frame,
        };
        stream.write_all(&answer.to_bytes()).await?;
        if answer.opcode == CLOSE {
            return stream.shutdown().await;
        }
    }
}

fn accept_for(key: &str) -> String {
    let digest =
        Sha1::new().chain_update(key).chain_update("258EAFA5-E914-47DA-95CA-C5AB0DC85B11").finalize();
    base64::engine::general_purpose::STANDARD.encode(digest)
}

/// One frame, its payload unmasked; fragments are echoed as fragments.
#[derive(Debug, PartialEq, Eq)]
struct Frame {
    is_final: bool,
    opcode: u8,
    payload: Vec<u8>,
}

impl Frame {
    /// The frame at the start of `bytes` and its length on the wire, or `None` if it is not whole yet.
    fn parse(bytes: &[u8]) -> Option<(Self, usize)> {
        let (&first, &second) = (bytes.first()?, bytes.get(1)?);
        let (length, mut at) = match second & 0x7f {
            126 => (u64::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?)), 4),
            127 => (u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?), 10),
            short => (u64::from(short), 2),
        };
        let mask: [u8; 4] = if second & 0x80 == 0 {
            [0; 4]
        } else {
            at += 4;
            bytes.get(at - 4..at)?.try_into().ok()?
        };
        let end = at.checked_add(usize::try_from(length).ok()?)?;
        let payload =
            bytes.get(at..end)?.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
        Some((Self { is_final: first & 0x80 != 0, opcode: first & 0x0f, payload }, end))
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.opcode | if self.is_final { 0x80 } else { 0 }];
        let length = self.payload.len();
        match (u8::try_from(length), u16::try_from(length)) {
            (Ok(short), _) if short < 126 => bytes.push(short),
            (_, Ok(medium)) => {
                bytes.push(126);
                bytes.extend_from_slice(&medium.to_be_bytes());
            }
            _ => {
                bytes.push(127);
                bytes.extend_from_slice(&(length as u64).to_be_bytes());
            }
        }
        bytes.extend_from_slice(&self.payload);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accept_key_is_the_one_of_the_rfc() {
        assert_eq!(accept_for("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn the_masked_hello_of_the_rfc_comes_back_unmasked() {
        let wire = [0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
        assert_eq!(Frame::parse(&wire[..10]), None);
        let (frame, used) = Frame::parse(&wire).unwrap();
        assert_eq!((frame.payload.as_slice(), used), (b"Hello".as_slice(), wire.len()));
        assert_eq!(frame.to_bytes(), b"\x81\x05Hello");
    }

    #[test]
    fn long_messages_keep_their_length() {
        for length in [0, 125, 126, 65_535, 65_536] {
            let frame = Frame { is_final: true, opcode: 2, payload: vec![7; length] };
            let bytes = frame.to_bytes();
            assert_eq!(Frame::parse(&bytes), Some((frame, bytes.len())));
        }
    }
}
