//! Wakes an app through the launcher, sends it one request over a socket from its own network namespace, and follows
//! what happens to it. Run as root beside `fastcontainer up`:
//!
//! ```text
//! cargo run -p fastcontainer-launcher-client --example wake -- /var/lib/fastcontainer hello
//! ```

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Instant,
};

use launcher_client::{
    Client,
    paths::StateDir,
    wire::{Reply, Request},
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(state), Some(app)) = (arguments.next(), arguments.next()) else {
        return Err("usage: wake STATE APP".into());
    };
    let app = app.parse()?;
    let client = Client::connect(&StateDir::new(state).launcher_socket()).await?;

    let begun = Instant::now();
    let woken = client.wake(&app, 1).await?;
    let answer = get(woken.sockets, woken.port).await?;
    let mut out = std::io::stdout();
    writeln!(out, "{app}.{} answered after {:?}:", woken.generation, begun.elapsed())?;
    writeln!(out, "{}", answer.lines().next().unwrap_or_default())?;
    for step in woken.timing.steps {
        writeln!(out, "{:>9} µs  {}", step.us, step.name)?;
    }

    client
        .stream(Request::Events { since: 0, follow: false }, |reply| {
            if let Reply::Event(event) = reply {
                let _ = writeln!(out, "{} {}: {}", event.seq, event.kind, event.message);
            }
            true
        })
        .await?;
    Ok(())
}

/// One request over the first of `sockets`, which was born where the app listens.
async fn get(sockets: Vec<std::os::fd::OwnedFd>, port: u16) -> std::io::Result<String> {
    let socket = sockets.into_iter().next().ok_or_else(|| std::io::Error::other("no socket came along"))?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let stream = tokio::net::TcpSocket::from_std_stream(TcpStream::from(socket)).connect(address).await?;
    let mut stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: example\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
