//! HTTP/1.1 as far as a test application needs it, without I/O: bytes in, heads and bodies out.

/// Longest request head that is accepted, in bytes.
pub const MAX_HEAD: usize = 64 * 1024;

/// A request's line and header fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// `GET`, `POST`, …, as sent.
    pub method: String,
    /// The request target as sent: path and query.
    pub target: String,
    /// Names and values in the order of arrival, names as sent.
    pub headers: Vec<(String, String)>,
    /// Whether the request said HTTP/1.1 (otherwise 1.0).
    pub is_http_11: bool,
}

/// What a buffer holds so far.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// The head has not ended yet.
    Partial,
    /// Not HTTP, or longer than [`MAX_HEAD`].
    Malformed,
    /// A head, and how many bytes of the buffer it took.
    Whole(Head, usize),
}

/// How long a request's body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// This many bytes (0: no body).
    Length(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
}

impl Head {
    /// Reads a head from the start of `buffer`.
    #[must_use]
    pub fn parse(buffer: &[u8]) -> Parsed {
        let Some(end) = find(buffer, b"\r\n\r\n") else {
            return if buffer.len() > MAX_HEAD { Parsed::Malformed } else { Parsed::Partial };
        };
        let Some(text) = buffer.get(..end).and_then(|head| std::str::from_utf8(head).ok()) else {
            return Parsed::Malformed;
        };
        Self::from_text(text).map_or(Parsed::Malformed, |head| Parsed::Whole(head, end + 4))
    }

    fn from_text(text: &str) -> Option<Self> {
        let mut lines = text.split("\r\n");
        let mut words = lines.next()?.split(' ');
        let (method, target, version) = (words.next()?, words.next()?, words.next()?);
        if words.next().is_some() || !version.starts_with("HTTP/1.") {
            return None;
        }
        let mut headers = Vec::new();
        for line in lines {
            let (name, value) = line.split_once(':')?;
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        Some(Self {
            method: method.to_owned(),
            target: target.to_owned(),
            headers,
            is_http_11: version == "HTTP/1.1",
        })
    }

    /// The first value of a header, whatever the case of its name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Whether a header that holds a comma-separated list has this word, whatever the case.
    #[must_use]
    pub fn header_has(&self, name: &str, word: &str) -> bool {
        let values = self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
        values.flat_map(|(_, value)| value.split(',')).any(|part| part.trim().eq_ignore_ascii_case(word))
    }

    /// The target up to its query.
    #[must_use]
    pub fn path(&self) -> &str {
        self.target.split_once('?').map_or(self.target.as_str(), |(path, _)| path)
    }

    /// A parameter of the query, percent-decoded.
    #[must_use]
    pub fn query(&self, name: &str) -> Option<String> {
        let (_, query) = self.target.split_once('?')?;
        query.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (key == name).then(|| percent_decode(value))
        })
    }

    /// A parameter of the query as a number.
    #[must_use]
    pub fn query_number<N: std::str::FromStr>(&self, name: &str) -> Option<N> {
        self.query(name)?.parse().ok()
    }

    /// Whether the client wants to send another request on this connection.
    #[must_use]
    pub fn keeps_alive(&self) -> bool {
        if self.is_http_11 {
            !self.header_has("connection", "close")
        } else {
            self.header_has("connection", "keep-alive")
        }
    }

    /// Whether a browser asks: curl and most programs say `*/*` and are served plain text.
    #[must_use]
    pub fn wants_html(&self) -> bool {
        self.headers.iter().any(|(name, value)| {
            name.eq_ignore_ascii_case("accept") && value.to_ascii_lowercase().contains("text/html")
        })
    }

    /// How the body is delimited; `None` if its length makes no sense.
    #[must_use]
    pub fn framing(&self) -> Option<Framing> {
        if self.header_has("transfer-encoding", "chunked") {
            return Some(Framing::Chunked);
        }
        self.header("content-length").map_or(Some(0), |length| length.parse().ok()).map(Framing::Length)
    }
}

/// Takes a body's framing off, a piece at a time.
#[derive(Debug)]
pub struct BodyDecoder {
    state: BodyState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BodyState {
    /// Bytes of a body of known length still to come.
    Length(u64),
    /// In a chunk's size line.
    ChunkSize,
    /// Bytes of this chunk still to come.
    ChunkData(u64),
    /// At the CRLF that ends a chunk.
    ChunkEnd,
    /// In the lines after the last chunk.
    Trailer,
    Done,
}

/// A chunk whose size line or end is not what RFC 9112 says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MalformedBody;

impl BodyDecoder {
    /// A decoder at the start of a body.
    #[must_use]
    pub fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::Length(0) => BodyState::Done,
            Framing::Length(length) => BodyState::Length(length),
            Framing::Chunked => BodyState::ChunkSize,
        };
        Self { state }
    }

    /// Whether the body has ended.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.state == BodyState::Done
    }

    /// Reads from `buffer`, gives the body's bytes to `sink`, and says how many bytes of `buffer` were used.
    ///
    /// # Errors
    /// [`MalformedBody`] if a chunk is not framed as it must be.
    pub fn feed(&mut self, buffer: &[u8], mut sink: impl FnMut(&[u8])) -> Result<usize, MalformedBody> {
        let mut rest = buffer;
        loop {
            match self.state {
                BodyState::Done => break,
                BodyState::Length(left) => {
                    let taken = take(&mut rest, left, &mut sink);
                    if taken == 0 {
                        break;
                    }
                    self.state =
                        if taken == left { BodyState::Done } else { BodyState::Length(left - taken) };
                }
                BodyState::ChunkData(left) => {
                    let taken = take(&mut rest, left, &mut sink);
                    if taken == 0 {
                        break;
                    }
                    self.state =
                        if taken == left { BodyState::ChunkEnd } else { BodyState::ChunkData(left - taken) };
                }
                BodyState::ChunkSize | BodyState::ChunkEnd | BodyState::Trailer => {
                    let Some(line) = take_line(&mut rest) else {
                        if rest.len() > MAX_HEAD {
                            return Err(MalformedBody);
                        }
                        break;
                    };
                    self.state = self.state.after_line(line)?;
                }
            }
        }
        Ok(buffer.len() - rest.len())
    }
}

impl BodyState {
    fn after_line(self, line: &[u8]) -> Result<Self, MalformedBody> {
        match self {
            Self::ChunkSize => {
                let text = std::str::from_utf8(line).map_err(|_| MalformedBody)?;
                let size = text.split(';').next().unwrap_or_default().trim();
                match u64::from_str_radix(size, 16).map_err(|_| MalformedBody)? {
                    0 => Ok(Self::Trailer),
                    size => Ok(Self::ChunkData(size)),
                }
            }
            Self::ChunkEnd if line.is_empty() => Ok(Self::ChunkSize),
            Self::ChunkEnd => Err(MalformedBody),
            Self::Trailer if line.is_empty() => Ok(Self::Done),
            same => Ok(same),
        }
    }
}

/// A whole answer with its length, ready to be written; HEAD answers leave the body out.
#[must_use]
pub fn response(head: &Head, status: &str, content_type: &str, body: &[u8]) -> Vec<u8> {
    let connection = if head.keeps_alive() { "keep-alive" } else { "close" };
    let mut bytes = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\nCache-Control: no-store\r\nConnection: {connection}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    if head.method != "HEAD" {
        bytes.extend_from_slice(body);
    }
    bytes
}

/// The answer to something that is not HTTP; the connection ends after it.
pub const BAD_REQUEST: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

fn take(rest: &mut &[u8], at_most: u64, sink: &mut impl FnMut(&[u8])) -> u64 {
    let count = rest.len().min(usize::try_from(at_most).unwrap_or(usize::MAX));
    let (now, later) = rest.split_at(count);
    if !now.is_empty() {
        sink(now);
    }
    *rest = later;
    count as u64
}

fn take_line<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = find(rest, b"\r\n")?;
    let (line, later) = (rest.get(..end)?, rest.get(end + 2..)?);
    *rest = later;
    Some(line)
}

fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, later @ ..] = rest {
        let escaped = (*first == b'%')
            .then(|| later.get(..2))
            .flatten()
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        rest = match escaped {
            Some(byte) => {
                bytes.push(byte);
                later.get(2..).unwrap_or_default()
            }
            None => {
                bytes.push(if *first == b'+' { b' ' } else { *first });
                later
            }
        };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Head {
        match Head::parse(text.as_bytes()) {
            Parsed::Whole(head, _) => head,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_head_that_comes_in_two_pieces_is_read_when_it_is_whole() {
        let text = b"GET /log?line=a%20b+c HTTP/1.1\r\nHost: x\r\n\r\nrest";
        assert_eq!(Head::parse(&text[..30]), Parsed::Partial);
        let Parsed::Whole(head, used) = Head::parse(text) else { panic!("not whole") };
        assert_eq!((head.path(), head.query("line").unwrap().as_str()), ("/log", "a b c"));
        assert_eq!(&text[used..], b"rest");
    }

    #[test]
    fn what_is_not_http_is_refused() {
        for text in [
            "hello\r\n\r\n",
            "GET / HTTP/2\r\n\r\n",
            "GET / x HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nbad\r\n\r\n",
        ] {
            assert_eq!(Head::parse(text.as_bytes()), Parsed::Malformed, "{text}");
        }
    }

    #[test]
    fn connections_persist_as_each_version_of_http_says() {
        assert!(head("GET / HTTP/1.1\r\n\r\n").keeps_alive());
        assert!(!head("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n").keeps_alive());
        assert!(!head("GET / HTTP/1.0\r\n\r\n").keeps_alive());
        assert!(head("GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n").keeps_alive());
    }

    #[test]
    fn a_chunked_body_is_read_the_same_however_it_is_cut() {
        let wire = b"5;ext=1\r\nhello\r\n6\r\n world\r\n0\r\nTrailer: x\r\n\r\nGET";
        for step in 1..wire.len() {
            let mut decoder = BodyDecoder::new(Framing::Chunked);
            let (mut body, mut buffer, mut sent) = (Vec::new(), Vec::new(), 0);
            while !decoder.is_done() {
                let next = (sent + step).min(wire.len());
                buffer.extend_from_slice(&wire[sent..next]);
                sent = next;
                let used = decoder.feed(&buffer, |piece| body.extend_from_slice(piece)).unwrap();
                buffer.drain(..used);
            }
            assert_eq!(body, b"hello world", "in steps of {step}");
        }
    }

    #[test]
    fn a_chunk_that_is_longer_than_it_says_is_refused() {
        let mut decoder = BodyDecoder::new(Framing::Chunked);
        assert_eq!(decoder.feed(b"2\r\nabc\r\n", |_| ()), Err(MalformedBody));
    }
}
