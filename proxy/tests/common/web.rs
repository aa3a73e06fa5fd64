//! Web servers and clients of a few lines.

use std::{
    future::Future,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    time::timeout,
};

use super::PATIENCE;

/// One request as an app saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub head: String,
    pub body: Vec<u8>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        header_in(&self.head, name)
    }
}

pub fn header_in<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().skip(1).find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// A web server of the test's: HTTP/1.1 with keep-alive, `answer` gives the whole response.
pub struct Web {
    pub port: u16,
    pub seen: Arc<Mutex<Vec<Seen>>>,
    pub connections: Arc<AtomicUsize>,
}

impl Web {
    pub async fn start<F, R>(answer: F) -> Self
    where
        F: Fn(Seen) -> R + Send + Sync + 'static,
        R: Future<Output = Vec<u8>> + Send,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::serve(listener, answer)
    }

    pub fn serve<F, R>(listener: TcpListener, answer: F) -> Self
    where
        F: Fn(Seen) -> R + Send + Sync + 'static,
        R: Future<Output = Vec<u8>> + Send,
    {
        let port = listener.local_addr().unwrap().port();
        let (seen, connections) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        let answer = Arc::new(answer);
        let web = Self { port, seen: Arc::clone(&seen), connections: Arc::clone(&connections) };
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                connections.fetch_add(1, SeqCst);
                let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                tokio::spawn(async move {
                    while let Some(request) = read_message(&mut socket).await {
                        seen.lock().unwrap().push(request.clone());
                        let response = answer(request).await;
                        if response.is_empty() || socket.write_all(&response).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        web
    }

    /// Answers everything with `body`.
    pub async fn saying(body: &'static str) -> Self {
        Self::start(move |_| async move { ok(body) }).await
    }

    pub fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

pub fn ok(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// Reads one HTTP/1 message with a length, chunks or no body.
pub async fn read_message(socket: &mut TcpStream) -> Option<Seen> {
    let mut data = Vec::new();
    let end = loop {
        if let Some(at) = find(&data, b"\r\n\r\n") {
            break at;
        }
        if socket.read_buf(&mut data).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(data[..end].to_vec()).ok()?;
    let mut body = data[end + 4..].to_vec();
    if header_in(&head, "transfer-encoding").is_some() {
        let mut whole = Vec::new();
        loop {
            let line = loop {
                if let Some(at) = find(&body, b"\r\n") {
                    break at;
                }
                if socket.read_buf(&mut body).await.ok()? == 0 {
                    return None;
                }
            };
            let length = usize::from_str_radix(std::str::from_utf8(&body[..line]).ok()?, 16).ok()?;
            while body.len() < line + 2 + length + 2 {
                if socket.read_buf(&mut body).await.ok()? == 0 {
                    return None;
                }
            }
            whole.extend_from_slice(&body[line + 2..line + 2 + length]);
            body.drain(..line + 2 + length + 2);
            if length == 0 {
                return Some(Seen { head, body: whole });
            }
        }
    }
    let length: usize = header_in(&head, "content-length").map_or(0, |length| length.parse().unwrap());
    while body.len() < length {
        if socket.read_buf(&mut body).await.ok()? == 0 {
            return None;
        }
    }
    Some(Seen { head, body })
}

pub fn find(data: &[u8], what: &[u8]) -> Option<usize> {
    data.windows(what.len()).position(|window| window == what)
}

/// A response.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        header_in(&self.head, name)
    }
}

/// Sends bytes as they are and reads the response until the connection closes.
pub async fn raw(address: SocketAddr, request: &[u8]) -> Response {
    raw_from("127.0.0.1", address, request).await
}

/// The same from a client at this address.
pub async fn raw_from(client: &str, address: SocketAddr, request: &[u8]) -> Response {
    timeout(PATIENCE, async {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(format!("{client}:0").parse().unwrap()).unwrap();
        let mut socket = socket.connect(address).await.unwrap();
        socket.write_all(request).await.unwrap();
        read_to_end(&mut socket).await
    })
    .await
    .expect("no response in time")
}

pub async fn read_to_end(socket: &mut TcpStream) -> Response {
    let mut data = Vec::new();
    while !matches!(socket.read_buf(&mut data).await, Ok(0) | Err(_)) {}
    let end = find(&data, b"\r\n\r\n").unwrap_or(data.len());
    let head = String::from_utf8_lossy(&data[..end]).into_owned();
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let body = String::from_utf8_lossy(data.get(end + 4..).unwrap_or_default()).into_owned();
    Response { status, head, body }
}

/// A GET with `Connection: close`.
pub async fn get(address: SocketAddr, host: &str, path: &str) -> Response {
    get_with(address, host, path, "").await
}

/// The same with more headers, each ended by CRLF.
pub async fn get_with(address: SocketAddr, host: &str, path: &str, headers: &str) -> Response {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n");
    raw(address, request.as_bytes()).await
}
