//! A blocking HTTP/1.1 client that sends exactly the bytes it is given and tells a clean end from a broken one.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long a read may wait before a test is told that nothing came: longer than any hold time-out in use.
pub(crate) const PATIENCE: Duration = Duration::from_secs(40);

/// One connection, with what was read of it but not used yet.
pub(crate) struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// When its head had come.
    pub(crate) head_at: Instant,
}

/// How an exchange went wrong.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The connection ended (or was reset) before the first byte of an answer.
    NoAnswer(String),
    /// It ended within the head or within the body.
    Truncated(String),
    /// Nothing came for [`PATIENCE`] or the time given.
    TimedOut,
    /// Bytes that are not HTTP/1.1.
    NotHttp(String),
}

/// A request, written as text with the usual headers; see [`request`].
pub(crate) struct Request {
    head: String,
    body: Vec<u8>,
}

/// `GET /path` for `host`.
pub(crate) fn get(host: &str, path: &str) -> Request {
    request("GET", host, path)
}

/// `POST /path` for `host` with a body of known length.
pub(crate) fn post(host: &str, path: &str, body: impl Into<Vec<u8>>) -> Request {
    request("POST", host, path).body(&body.into())
}

/// Any method, without a body.
pub(crate) fn request(method: &str, host: &str, path: &str) -> Request {
    Request { head: format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n"), body: Vec::new() }
}

impl Request {
    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.head.push_str(&format!("{name}: {value}\r\n"));
        self
    }

    /// A body of known length.
    pub(crate) fn body(mut self, body: &[u8]) -> Self {
        self = self.header("Content-Length", &body.len().to_string());
        self.body = body.to_vec();
        self
    }

    /// A chunked body in chunks of `size` bytes.
    pub(crate) fn chunked(mut self, body: &[u8], size: usize) -> Self {
        self = self.header("Transfer-Encoding", "chunked");
        for chunk in body.chunks(size) {
            self.body.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            self.body.extend_from_slice(chunk);
            self.body.extend_from_slice(b"\r\n");
        }
        self.body.extend_from_slice(b"0\r\n\r\n");
        self
    }

    /// The head alone, for those who send the body later.
    pub(crate) fn head(&self) -> Vec<u8> {
        format!("{}\r\n", self.head).into_bytes()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.head();
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

impl Connection {
    pub(crate) fn open(port: u16) -> Self {
        let address = format!("127.0.0.1:{port}");
        let stream =
            TcpStream::connect(&address).unwrap_or_else(|error| panic!("connect to {address}: {error}"));
        Self::over(stream)
    }

    /// Like [`Self::open`], for times when the listener may be away.
    pub(crate) fn try_open(port: u16) -> std::io::Result<Self> {
        TcpStream::connect(("127.0.0.1", port)).map(Self::over)
    }

    fn over(stream: TcpStream) -> Self {
        stream.set_nodelay(true).expect("set TCP_NODELAY");
        stream.set_read_timeout(Some(PATIENCE)).expect("set a read time-out");
        stream.set_write_timeout(Some(PATIENCE)).expect("set a write time-out");
        Self { stream, input: Vec::new() }
    }

    pub(crate) fn patience(&self, patience: Duration) {
        self.stream.set_read_timeout(Some(patience)).expect("set a read time-out");
    }

    /// Sends small requests; big ones need [`Self::exchange`], which reads meanwhile.
    pub(crate) fn send(&mut self, request: &Request) {
        self.send_bytes(&request.bytes());
    }

    /// A peer that closed already is found out by the read that follows.
    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Sends while reading: a request that is held stays in the sockets, so a big one is not sent at once.
    pub(crate) fn exchange(&mut self, request: &Request) -> Result<Response, Broken> {
        let bytes = request.bytes();
        if bytes.len() < 16 * 1024 {
            self.send_bytes(&bytes);
            return self.receive();
        }
        let mut writer = self.stream.try_clone().expect("clone the socket");
        std::thread::scope(|scope| {
            scope.spawn(move || writer.write_all(&bytes));
            self.receive()
        })
    }

    /// The next final answer, interim ones skipped.
    pub(crate) fn receive(&mut self) -> Result<Response, Broken> {
        loop {
            let response = self.receive_any()?;
            if response.status >= 200 || response.status == 101 {
                return Ok(response);
            }
        }
    }

    /// The next answer, be it interim (1xx).
    pub(crate) fn receive_any(&mut self) -> Result<Response, Broken> {
        let head = self.read_head()?;
        let head_at = Instant::now();
        let (status, headers) = parse_head(&head)?;
        let mut response = Response { status, headers, body: Vec::new(), head_at };
        if status < 200 || status == 204 || status == 304 {
            return Ok(response);
        }
        if response.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
            while let Some(chunk) = self.read_chunk()? {
                response.body.extend_from_slice(&chunk);
            }
        } else if let Some(length) = response.header("content-length") {
            let length = length.parse().map_err(|_| Broken::NotHttp(format!("Content-Length {length:?}")))?;
            self.fill(length, "body")?;
            response.body = self.input.drain(..length).collect();
        } else {
            while self.read_more("body")? {}
            response.body = std::mem::take(&mut self.input);
        }
        Ok(response)
    }

    /// The head of an answer whose body the test reads itself.
    pub(crate) fn receive_head(&mut self) -> Result<Response, Broken> {
        let head = self.read_head()?;
        let (status, headers) = parse_head(&head)?;
        Ok(Response { status, headers, body: Vec::new(), head_at: Instant::now() })
    }

    /// The next chunk of a chunked body; `None` after the last.
    pub(crate) fn read_chunk(&mut self) -> Result<Option<Vec<u8>>, Broken> {
        let line = self.read_until(b"\r\n", "chunk size")?;
        let text = String::from_utf8_lossy(&line);
        let size = text.split(';').next().unwrap_or_default().trim();
        let size =
            usize::from_str_radix(size, 16).map_err(|_| Broken::NotHttp(format!("chunk size {text:?}")))?;
        if size == 0 {
            while !self.read_until(b"\r\n", "trailer")?.is_empty() {}
            return Ok(None);
        }
        self.fill(size + 2, "chunk")?;
        let mut chunk: Vec<u8> = self.input.drain(..size + 2).collect();
        chunk.truncate(size);
        Ok(Some(chunk))
    }

    /// Exactly so many raw bytes.
    pub(crate) fn read_exactly(&mut self, count: usize) -> Result<Vec<u8>, Broken> {
        self.fill(count, "bytes")?;
        Ok(self.input.drain(..count).collect())
    }

    /// Whether nothing comes for so long (the request is still held), the connection staying open.
    pub(crate) fn is_silent_for(&mut self, time: Duration) -> bool {
        self.patience(time);
        let silent = matches!(self.read_more("answer"), Err(Broken::TimedOut));
        self.patience(PATIENCE);
        silent
    }

    /// Whether the peer has ended the connection within that time (bytes that still come are thrown away).
    pub(crate) fn ends_within(&mut self, time: Duration) -> bool {
        let end = Instant::now() + time;
        self.patience(time);
        while Instant::now() < end {
            match self.read_more("end") {
                Ok(true) => {}
                Ok(false) => return true,
                Err(Broken::TimedOut) => return false,
                Err(_) => return true,
            }
        }
        false
    }

    /// Leaves at once, both ways.
    pub(crate) fn leave(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn read_head(&mut self) -> Result<Vec<u8>, Broken> {
        let fresh = self.input.is_empty();
        match self.read_until(b"\r\n\r\n", "head") {
            Err(Broken::Truncated(why)) if fresh && self.input.is_empty() => Err(Broken::NoAnswer(why)),
            other => other,
        }
    }

    fn read_until(&mut self, end: &[u8], what: &str) -> Result<Vec<u8>, Broken> {
        loop {
            if let Some(at) = self.input.windows(end.len()).position(|window| window == end) {
                let found = self.input.drain(..at).collect();
                self.input.drain(..end.len());
                return Ok(found);
            }
            if !self.read_more(what)? {
                return Err(Broken::Truncated(format!("the connection ended within the {what}")));
            }
        }
    }

    fn fill(&mut self, count: usize, what: &str) -> Result<(), Broken> {
        while self.input.len() < count {
            if !self.read_more(what)? {
                let got = self.input.len();
                return Err(Broken::Truncated(format!("the {what} ended after {got} of {count} bytes")));
            }
        }
        Ok(())
    }

    /// Whether more bytes came; `false` at the end.
    fn read_more(&mut self, what: &str) -> Result<bool, Broken> {
        let mut buffer = [0; 64 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.input.extend_from_slice(&buffer[..count]);
                Ok(true)
            }
            Err(error) => match error.kind() {
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => Err(Broken::TimedOut),
                std::io::ErrorKind::Interrupted => Ok(true),
                _ => Err(Broken::Truncated(format!("{what}: {error}"))),
            },
        }
    }
}

fn parse_head(head: &[u8]) -> Result<(u16, Vec<(String, String)>), Broken> {
    let text = String::from_utf8_lossy(head);
    let mut lines = text.split("\r\n");
    let status_line = lines.next().unwrap_or_default();
    let status = status_line.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
    let status = status.ok_or_else(|| Broken::NotHttp(status_line.to_owned()))?;
    let headers = lines.filter_map(|line| line.split_once(':'));
    Ok((status, headers.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect()))
}

impl Response {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// `Retry-After` in seconds.
    pub(crate) fn retry_after(&self) -> Option<u64> {
        self.header("retry-after")?.parse().ok()
    }

    /// Whether the peer will end the connection after this answer.
    pub(crate) fn closes(&self) -> bool {
        self.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON, asserting a 200.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The probe's generation in an answer of `/`.
    #[track_caller]
    pub(crate) fn generation(&self) -> u64 {
        let json = self.json();
        let field = &json["generation"];
        let number = field.as_u64().or_else(|| field.as_str()?.parse().ok());
        number.unwrap_or_else(|| panic!("no generation in {json}"))
    }

    #[track_caller]
    pub(crate) fn expect_status(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{:?} {}", self.headers, self.text());
        self
    }
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoAnswer(why) => write!(f, "no answer: {why}"),
            Self::Truncated(why) => write!(f, "broken answer: {why}"),
            Self::TimedOut => f.write_str("nothing came in time"),
            Self::NotHttp(what) => write!(f, "not HTTP: {what}"),
        }
    }
}

/// The client must see what it is there to see: these run against a server of three lines.
mod the_client_itself {
    use std::net::TcpListener;

    use super::*;

    fn answered_with(answer: &'static [u8]) -> Connection {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = listener.local_addr().expect("address").port();
        std::thread::spawn(move || {
            let (mut peer, _) = listener.accept().expect("accept");
            let _ = peer.read(&mut [0; 1024]);
            let _ = peer.write_all(answer);
        });
        let mut connection = Connection::open(port);
        connection.send(&get("example.com", "/"));
        connection
    }

    #[test]
    fn reads_lengths_chunks_and_interim_answers() {
        let mut connection = answered_with(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno",
        );
        assert_eq!(connection.receive().expect("first").text(), "abcde");
        assert_eq!(connection.receive().expect("second").expect_status(404).text(), "no");
    }

    #[test]
    fn tells_a_broken_end_from_a_clean_one() {
        let cut_short = answered_with(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc").receive();
        assert!(matches!(cut_short, Err(Broken::Truncated(_))), "{cut_short:?}");
        let cut_chunk =
            answered_with(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n").receive();
        assert!(matches!(cut_chunk, Err(Broken::Truncated(_))), "{cut_chunk:?}");
        let nothing = answered_with(b"").receive();
        assert!(matches!(nothing, Err(Broken::NoAnswer(_))), "{nothing:?}");
    }
}
