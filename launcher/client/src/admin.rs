//! The proxy's admin socket (`STATE/run/proxy/proxy.sock`): what became of a request, and figures. `SOCK_SEQPACKET`, one JSON question
//! and one JSON answer per packet, as on the launcher's socket; for root and the proxy's own user.

use std::{io, path::Path};

use serde::{Deserialize, Serialize};
use tokio_seqpacket::UnixSeqpacket;

use crate::{
    packet::{self, PacketError},
    wire::Window,
};

/// Most requests that one [`Question::Recent`] is told of: they fit into one packet however long their paths are.
pub const MOST_RECENT: usize = 40;

/// What can be asked: `{"why": "REQUEST-ID"}`, `{"recent": 20}`, `{"stats": {}}`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// What became of a recent request.
    Why(String),
    /// The last requests, so many of them and no more than [`MOST_RECENT`].
    Recent(usize),
    /// How the proxy is.
    Stats {},
    /// All figures in Prometheus' text format; [`metrics`] asks this.
    Metrics {},
}

/// The answer.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// To [`Question::Why`]; `None` when no recent request has that id.
    Request(Option<Box<RequestRecord>>),
    /// To [`Question::Recent`], oldest first.
    Recent(Vec<RequestRecord>),
    /// To [`Question::Stats`].
    Stats(Stats),
    /// To [`Question::Metrics`]: a piece of the text; an empty one ends it.
    Metrics(String),
    /// The question was refused or not understood.
    Error(String),
}

/// One request, as in the access log. Times in µs; the parts sum to the whole:
/// `own + hold + connect + send + first_byte + body = total`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct RequestRecord {
    /// `x-request-id`.
    pub request_id: String,
    /// When it came, ms since the Unix epoch.
    pub at_unix_ms: u64,
    /// The client's address.
    pub client: String,
    /// Method.
    pub method: String,
    /// Host name as sent, cut at 256 bytes.
    pub host: String,
    /// Path and query, cut at 1 KiB.
    pub path: String,
    /// Status sent; 0: none, the client had gone.
    pub status: u16,
    /// Bytes of the response's body.
    pub bytes: u64,
    /// The app; empty when none has this host name.
    pub app: String,
    /// The host that served it, if that was another one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// The instance; 0: none.
    pub generation: u64,
    /// The proxy's own work.
    pub own_us: u64,
    /// Waiting for an instance.
    pub hold_us: u64,
    /// Getting a connection.
    pub connect_us: u64,
    /// Sending the request.
    pub send_us: u64,
    /// From the last request byte to the first response byte.
    pub first_byte_us: u64,
    /// From the first response byte to the end.
    pub body_us: u64,
    /// The whole.
    pub total_us: u64,
    /// Attempts after the first.
    pub retries: u32,
    /// `cold`: it waited for a start; `warm`: it did not.
    pub wake: String,
    /// Why the app did not answer; empty when it did.
    pub error: String,
}

/// How the proxy is.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Stats {
    /// Whether the launcher can be reached.
    pub launcher: bool,
    /// Apps known.
    pub apps: u64,
    /// Requests that wait for an instance.
    pub held: u64,
    /// Requests answered since the start.
    pub requests: u64,
    /// Requests that were not logged, because the log could not keep up.
    pub unlogged: u64,
    /// Instances known.
    pub instances: Vec<InstanceStats>,
}

/// One instance as the proxy sees it.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct InstanceStats {
    /// Its app.
    pub app: String,
    /// Its generation.
    pub generation: u64,
    /// `ready`, `suspect`, `frozen`, `draining`.
    pub state: String,
    /// Requests under way.
    pub in_flight: u32,
    /// Requests of its app that wait for a place.
    #[serde(default)]
    pub held: u32,
    /// First-byte times of the last second.
    #[serde(flatten)]
    pub window: Window,
}

/// Asks the proxy that listens at `path`.
///
/// # Errors
/// Nobody listens there, or the connection failed.
pub async fn ask(path: &Path, question: &Question) -> Result<Answer, PacketError> {
    let socket = connect(path).await?;
    packet::send(&socket, question, &[]).await?;
    Ok(packet::receive(&socket, &mut Vec::new()).await?.0)
}

/// The proxy's figures in Prometheus' text format, which are more than a packet holds.
///
/// # Errors
/// As for [`ask`]; [`PacketError::Io`] with the proxy's words when it refuses.
pub async fn metrics(path: &Path) -> Result<String, PacketError> {
    let socket = connect(path).await?;
    packet::send(&socket, &Question::Metrics {}, &[]).await?;
    let (mut text, mut buffer) = (String::new(), Vec::new());
    loop {
        match packet::receive(&socket, &mut buffer).await?.0 {
            Answer::Metrics(piece) if piece.is_empty() => return Ok(text),
            Answer::Metrics(piece) => text.push_str(&piece),
            Answer::Error(message) => return Err(PacketError::Io(io::Error::other(message))),
            _ => return Err(PacketError::Io(io::Error::other("the proxy answered something else"))),
        }
    }
}

async fn connect(path: &Path) -> Result<UnixSeqpacket, PacketError> {
    UnixSeqpacket::connect(path).await.map_err(|error| {
        PacketError::Io(io::Error::new(error.kind(), format!("{}: {error}", path.display())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_look_as_documented() {
        assert_eq!(serde_json::to_string(&Question::Why("x".into())).unwrap(), r#"{"why":"x"}"#);
        assert_eq!(serde_json::to_string(&Question::Stats {}).unwrap(), r#"{"stats":{}}"#);
    }
}
