//! Connections out of the container, and what is needed for them.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UdpSocket};

/// Longer than a lost first packet takes to be sent again.
const PATIENCE: Duration = Duration::from_millis(2500);

/// Connects to `to` (`ADDRESS:PORT`, or `NAME:PORT` with a name of `/etc/hosts`) and reads what is said there. JSON: ok, said or
/// error, ms.
pub(crate) async fn connect(to: &str, udp: bool) -> Value {
    let began = Instant::now();
    let Some(address) = address(to) else { return json!({ "ok": false, "error": "no such name" }) };
    let attempt = async { if udp { ask(address).await } else { hear(address).await } };
    let outcome = match tokio::time::timeout(PATIENCE, attempt).await {
        Ok(Ok(said)) => json!({ "ok": true, "said": said }),
        Ok(Err(error)) => json!({ "ok": false, "error": error.to_string() }),
        Err(_) => json!({ "ok": false, "error": "no answer" }),
    };
    let mut outcome = outcome;
    outcome["ms"] = json!(began.elapsed().as_secs_f64() * 1000.0);
    outcome
}

/// What the container is told about its network.
pub(crate) fn files() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    json!({
        "hosts": read("/etc/hosts"),
        "resolv_conf": read("/etc/resolv.conf"),
        "nsswitch_conf": read("/etc/nsswitch.conf"),
        "hosts_is_writable": std::fs::OpenOptions::new().append(true).open("/etc/hosts").is_ok(),
    })
}

async fn hear(address: SocketAddr) -> std::io::Result<String> {
    let mut said = String::new();
    TcpStream::connect(address).await?.read_to_string(&mut said).await?;
    Ok(said)
}

async fn ask(address: SocketAddr) -> std::io::Result<String> {
    let any: SocketAddr = if address.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(address).await?;
    socket.send(b"?").await?;
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

fn address(to: &str) -> Option<SocketAddr> {
    if let Ok(address) = to.parse() {
        return Some(address);
    }
    let (name, port) = to.rsplit_once(':')?;
    let hosts = std::fs::read_to_string("/etc/hosts").ok()?;
    let line = hosts.lines().find(|line| line.split_whitespace().skip(1).any(|word| word == name))?;
    let ip: IpAddr = line.split_whitespace().next()?.parse().ok()?;
    Some(SocketAddr::new(ip, port.parse().ok()?))
}
