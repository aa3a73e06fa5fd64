//! The access log and the recent requests. A request only pushes a record into a bounded queue; one task formats and writes.

use std::{
    borrow::Cow,
    collections::VecDeque,
    io::{self, Write as _},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cmdb::Generation;
use crossbeam_queue::ArrayQueue;
use http::{
    HeaderValue, StatusCode,
    header::{HOST, REFERER, USER_AGENT},
};
use launcher_client::admin::RequestRecord;
use pingora::http::RequestHeader;
use serde::{Serialize, Serializer};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{MissedTickBehavior, interval},
};

use crate::{
    config::AccessLog,
    house::House,
    measure::{Part, Stopwatch},
    nodes::Remote,
    tenant::AppRuntime,
};

/// Records that may wait for the writer.
const QUEUE: usize = 8192;
/// Requests that are remembered.
const RECENT: usize = 4096;
/// How often the writer looks.
const WRITE_EVERY: Duration = Duration::from_millis(50);
/// Longest path in the log.
const PATH_LIMIT: usize = 1024;
/// Longest host name in the log.
const HOST_LIMIT: usize = 256;

/// What is kept of requests.
#[derive(Debug)]
pub struct Telemetry {
    queue: ArrayQueue<Record>,
    recent: Mutex<VecDeque<Record>>,
    format: AccessLog,
    requests: AtomicU64,
    dropped: AtomicU64,
}

/// One request. Cheap to make and to keep: its texts are cut, in one piece, and nothing is formatted yet.
#[derive(Debug)]
pub struct Record {
    /// Its id.
    pub request_id: RequestId,
    /// When it ended.
    pub ended: SystemTime,
    /// Who asked.
    pub client: Option<IpAddr>,
    /// Method, target and what else the client said.
    pub said: Said,
    /// What was sent.
    pub status: Option<StatusCode>,
    /// Body bytes sent.
    pub bytes: usize,
    /// The app.
    pub app: Option<Arc<AppRuntime>>,
    /// The host that served it, if that was another one.
    pub node: Option<Arc<Remote>>,
    /// The instance.
    pub generation: Option<Generation>,
    /// Where the time went; stopped.
    pub watch: Stopwatch,
    /// Attempts after the first.
    pub retries: u32,
    /// Whether it waited for a start.
    pub cold: bool,
    /// Why the app did not answer.
    pub error: &'static str,
}

/// What a client said of its request, cut to what is kept: `[method, host, path, referer, user agent]` in one piece.
#[derive(Debug)]
pub struct Said {
    text: Box<[u8]>,
    ends: [u16; 5],
}

impl Said {
    const LIMITS: [usize; 5] = [32, HOST_LIMIT, PATH_LIMIT, PATH_LIMIT, PATH_LIMIT];

    /// Takes down a request; what only the combined format tells is left out for others.
    #[must_use]
    pub fn of(request: &RequestHeader, format: AccessLog) -> Self {
        let header = |name| request.headers.get(name).map(HeaderValue::as_bytes);
        let authority = || request.uri.authority().map(|authority| authority.as_str().as_bytes());
        let combined = format == AccessLog::Combined;
        let mut parts = [
            request.method.as_str().as_bytes(),
            header(HOST).or_else(authority).unwrap_or_default(),
            request.uri.path_and_query().map_or(&b""[..], |path| path.as_str().as_bytes()),
            header(REFERER).filter(|_| combined).unwrap_or_default(),
            header(USER_AGENT).filter(|_| combined).unwrap_or_default(),
        ];
        let (mut end, mut ends) = (0, [0; 5]);
        for ((part, limit), place) in parts.iter_mut().zip(Self::LIMITS).zip(&mut ends) {
            *part = &part[..part.len().min(limit)];
            end += part.len();
            *place = u16::try_from(end).unwrap_or(u16::MAX);
        }
        let mut text = Vec::with_capacity(end);
        parts.iter().for_each(|part| text.extend_from_slice(part));
        Self { text: text.into_boxed_slice(), ends }
    }

    fn part(&self, index: usize) -> Cow<'_, str> {
        let from = index.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        let to = self.ends.get(index).copied().unwrap_or(from);
        String::from_utf8_lossy(self.text.get(from.into()..to.into()).unwrap_or_default())
    }
}

/// A request's id: at most 64 of `A-Z a-z 0-9 - _ .`, kept without allocation.
#[derive(Clone, Copy, Debug)]
pub struct RequestId {
    length: u8,
    bytes: [u8; Self::LIMIT],
}

impl RequestId {
    const LIMIT: usize = 64;

    /// Takes over an id from outside, if it is well-formed.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let fine = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if text.is_empty() || text.len() > Self::LIMIT || !text.iter().all(fine) {
            return None;
        }
        let mut bytes = [0; Self::LIMIT];
        bytes[..text.len()].copy_from_slice(text);
        Some(Self { length: u8::try_from(text.len()).ok()?, bytes })
    }

    /// A new one: 24 hexadecimal digits at random.
    #[must_use]
    pub fn random() -> Self {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let random = fastrand::u128(..);
        let mut bytes = [0; Self::LIMIT];
        for (index, byte) in bytes[..24].iter_mut().enumerate() {
            *byte = DIGITS[(random >> (4 * index)) as usize & 15];
        }
        Self { length: 24, bytes }
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..usize::from(self.length)]).unwrap_or_default()
    }
}

impl Telemetry {
    /// With an empty memory.
    #[must_use]
    pub fn new(format: AccessLog) -> Self {
        Self {
            queue: ArrayQueue::new(QUEUE),
            recent: Mutex::new(VecDeque::with_capacity(RECENT)),
            format,
            requests: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        }
    }

    /// Takes a request down; never waits.
    pub fn push(&self, record: Record) {
        self.requests.fetch_add(1, Relaxed);
        if self.queue.push(record).is_err() {
            self.dropped.fetch_add(1, Relaxed);
        }
    }

    /// What became of a recent request.
    #[must_use]
    pub fn why(&self, request_id: &str) -> Option<RequestRecord> {
        let recent = self.recent();
        let record = recent.iter().rev().find(|record| record.request_id.as_str() == request_id);
        record.map(|record| Line::of(record).into())
    }

    /// The last requests, oldest first.
    #[must_use]
    pub fn last(&self, count: usize) -> Vec<RequestRecord> {
        let recent = self.recent();
        let last = recent.range(recent.len().saturating_sub(count)..);
        last.map(|record| Line::of(record).into()).collect()
    }

    /// Requests, and those of them that were not logged.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.requests.load(Relaxed), self.dropped.load(Relaxed))
    }

    /// Formats what waits and remembers it; returns the log's lines.
    pub fn digest(&self) -> Vec<u8> {
        let mut lines = Vec::new();
        let mut recent = self.recent();
        while let Some(record) = self.queue.pop() {
            match self.format {
                AccessLog::Json => {
                    // Writing JSON into memory cannot fail.
                    let _ = serde_json::to_writer(&mut lines, &Line::of(&record));
                    lines.push(b'\n');
                }
                AccessLog::Combined => combined(&mut lines, &record),
                AccessLog::Off => {}
            }
            if recent.len() == RECENT {
                recent.pop_front();
            }
            recent.push_back(record);
        }
        lines
    }

    /// The format of the access log.
    #[must_use]
    pub fn format(&self) -> AccessLog {
        self.format
    }

    fn recent(&self) -> MutexGuard<'_, VecDeque<Record>> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes the access log until the runtime ends; opens it anew on SIGHUP and SIGUSR1.
pub async fn write_log(house: &House) {
    let mut file = LogFile::new(house.config.state.proxy().join("access.log"));
    let (mut hangup, mut user) = (listen(SignalKind::hangup()), listen(SignalKind::user_defined1()));
    let mut ticks = interval(WRITE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = hit(&mut hangup) => file.close(),
            () = hit(&mut user) => file.close(),
        }
        let lines = house.telemetry.digest();
        if !lines.is_empty() {
            file.write(&lines);
        }
    }
}

/// Writes what is left, at the end of the process.
pub fn write_rest(house: &House) {
    let lines = house.telemetry.digest();
    if !lines.is_empty() {
        LogFile::new(house.config.state.proxy().join("access.log")).write(&lines);
    }
}

fn listen(kind: SignalKind) -> Option<Signal> {
    signal(kind).inspect_err(|error| tracing::warn!(%error, "no signal can reopen the access log")).ok()
}

async fn hit(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

struct LogFile {
    path: PathBuf,
    file: Option<std::fs::File>,
    complained: bool,
}

impl LogFile {
    fn new(path: PathBuf) -> Self {
        Self { path, file: None, complained: false }
    }

    fn close(&mut self) {
        self.file = None;
        self.complained = false;
    }

    fn write(&mut self, lines: &[u8]) {
        if let Err(error) = self.try_write(lines) {
            self.file = None;
            // Once, not for every batch: a full disk must not fill the journal too.
            if !std::mem::replace(&mut self.complained, true) {
                tracing::error!(path = %self.path.display(), %error, "the access log cannot be written");
            }
        }
    }

    fn try_write(&mut self, lines: &[u8]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(open(&self.path)?),
        };
        file.write_all(lines)
    }
}

fn open(path: &Path) -> io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    std::fs::OpenOptions::new().create(true).append(true).mode(0o640).open(path)
}

/// A line of the log: a [`RequestRecord`] that owns nothing. (A test holds the two together.)
#[derive(Serialize)]
struct Line<'a> {
    request_id: &'a str,
    at_unix_ms: u64,
    #[serde(serialize_with = "address")]
    client: Option<IpAddr>,
    method: Cow<'a, str>,
    host: Cow<'a, str>,
    path: Cow<'a, str>,
    status: u16,
    bytes: u64,
    app: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    node: &'a str,
    generation: u64,
    own_us: u64,
    hold_us: u64,
    connect_us: u64,
    send_us: u64,
    first_byte_us: u64,
    body_us: u64,
    total_us: u64,
    retries: u32,
    wake: &'static str,
    error: &'static str,
}

impl<'a> Line<'a> {
    fn of(record: &'a Record) -> Self {
        let us = |part| micros(record.watch.spent(part));
        // The parts are rounded down each; the whole is their sum, so that they add up.
        let parts = [Part::Own, Part::Hold, Part::Connect, Part::Send, Part::FirstByte, Part::Body].map(us);
        let [own_us, hold_us, connect_us, send_us, first_byte_us, body_us] = parts;
        let ended = record.ended.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            request_id: record.request_id.as_str(),
            at_unix_ms: millis(ended.saturating_sub(record.watch.total())),
            client: record.client,
            method: record.said.part(0),
            host: record.said.part(1),
            path: record.said.part(2),
            status: record.status.map_or(0, |status| status.as_u16()),
            bytes: record.bytes as u64,
            app: record.app.as_ref().map_or("", |app| app.name.as_str()),
            node: record.node.as_ref().map_or("", |node| node.name.as_str()),
            generation: record.generation.map_or(0, |generation| generation.0),
            own_us,
            hold_us,
            connect_us,
            send_us,
            first_byte_us,
            body_us,
            total_us: parts.iter().sum(),
            retries: record.retries,
            wake: if record.cold { "cold" } else { "warm" },
            error: record.error,
        }
    }
}

impl From<Line<'_>> for RequestRecord {
    fn from(line: Line<'_>) -> Self {
        Self {
            request_id: line.request_id.to_owned(),
            at_unix_ms: line.at_unix_ms,
            client: line.client.map(|client| client.to_string()).unwrap_or_default(),
            method: line.method.into_owned(),
            host: line.host.into_owned(),
            path: line.path.into_owned(),
            status: line.status,
            bytes: line.bytes,
            app: line.app.to_owned(),
            node: line.node.to_owned(),
            generation: line.generation,
            own_us: line.own_us,
            hold_us: line.hold_us,
            connect_us: line.connect_us,
            send_us: line.send_us,
            first_byte_us: line.first_byte_us,
            body_us: line.body_us,
            total_us: line.total_us,
            retries: line.retries,
            wake: line.wake.to_owned(),
            error: line.error.to_owned(),
        }
    }
}

fn address<S: Serializer>(client: &Option<IpAddr>, to: S) -> Result<S::Ok, S::Error> {
    match client {
        Some(client) => to.collect_str(client),
        None => to.serialize_str(""),
    }
}

/// Apache's combined format; everything that a client chose is escaped.
fn combined(lines: &mut Vec<u8>, record: &Record) {
    let whole = Line::of(record);
    let at = i64::try_from(whole.at_unix_ms / 1000).unwrap_or(0);
    let at = jiff::Timestamp::from_second(at).unwrap_or_default();
    let header = |index| match record.said.part(index) {
        value if value.is_empty() => "-".to_owned(),
        value => quoted(&value),
    };
    let client = record.client.map(|client| client.to_string()).unwrap_or_default();
    let line = writeln!(
        lines,
        "{client} - - [{}] \"{} {} HTTP/1.1\" {} {} \"{}\" \"{}\"",
        at.strftime("%d/%b/%Y:%H:%M:%S +0000"),
        quoted(&whole.method),
        quoted(&whole.path),
        whole.status,
        whole.bytes,
        header(3),
        header(4),
    );
    // Writing into memory cannot fail.
    let _ = line;
}

fn quoted(text: &str) -> String {
    text.chars()
        .flat_map(|char| {
            if char == '"' || char.is_control() {
                char.escape_default().collect::<Vec<_>>()
            } else {
                vec![char]
            }
        })
        .collect()
}

/// Whole µs.
#[must_use]
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Whole ms.
#[must_use]
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(path: &str, agent: &'static str) -> Record {
        let mut request = RequestHeader::build("GET", path.as_bytes(), None).unwrap();
        request.insert_header("host", "blog.example").unwrap();
        request.insert_header("user-agent", agent).unwrap();
        let mut watch = Stopwatch::begin();
        watch.enter(Part::Hold);
        watch.enter(Part::Body);
        watch.stop();
        Record {
            request_id: RequestId::parse(b"id-1").unwrap(),
            ended: UNIX_EPOCH + Duration::from_millis(1_000_000_000_500),
            client: Some(IpAddr::from([127, 0, 0, 1])),
            said: Said::of(&request, AccessLog::Combined),
            status: Some(StatusCode::OK),
            bytes: 5,
            app: None,
            node: None,
            generation: Some(Generation(7)),
            watch,
            retries: 0,
            cold: true,
            error: "",
        }
    }

    #[test]
    fn a_request_is_remembered_with_parts_that_sum_to_the_whole() {
        let telemetry = Telemetry::new(AccessLog::Json);
        telemetry.push(record("/a?b", "x"));
        let lines = telemetry.digest();
        let line: RequestRecord = serde_json::from_slice(&lines).unwrap();
        assert_eq!((line.path.as_str(), line.wake.as_str(), line.generation), ("/a?b", "cold", 7));
        assert_eq!(
            line.own_us + line.hold_us + line.connect_us + line.send_us + line.first_byte_us + line.body_us,
            line.total_us
        );
        assert_eq!(
            (line.method.as_str(), line.host.as_str(), line.client.as_str()),
            ("GET", "blog.example", "127.0.0.1")
        );
        assert_eq!(telemetry.why("id-1"), Some(line.clone()));
        let keys = |json: &[u8]| {
            serde_json::from_slice::<serde_json::Map<_, _>>(json)
                .unwrap()
                .into_iter()
                .map(|(key, _)| key)
                .collect::<Vec<_>>()
        };
        assert_eq!(keys(&lines), keys(&serde_json::to_vec(&line).unwrap()), "a line is a record");
        assert_eq!(telemetry.why("id-2"), None);
    }

    #[test]
    fn a_full_queue_drops_and_counts() {
        let telemetry = Telemetry::new(AccessLog::Off);
        for _ in 0..QUEUE + 3 {
            telemetry.push(record("/", "x"));
        }
        assert_eq!(telemetry.counts(), (QUEUE as u64 + 3, 3));
        assert!(telemetry.digest().is_empty());
    }

    #[test]
    fn the_combined_log_is_one_escaped_line() {
        let telemetry = Telemetry::new(AccessLog::Combined);
        telemetry.push(record(&format!("/{}", "x".repeat(5000)), "evil\" agent"));
        let lines = String::from_utf8(telemetry.digest()).unwrap();
        assert_eq!(lines.matches('\n').count(), 1);
        assert!(lines.len() < 1300);
        assert!(lines.contains("[09/Sep/2001:01:46:40 +0000]"), "{lines}");
        assert!(lines.contains(r#""evil\" agent""#), "{lines}");
    }

    #[test]
    fn request_ids_from_outside_are_kept_only_when_well_formed() {
        assert_eq!(RequestId::parse(b"aB3-_.").unwrap().as_str(), "aB3-_.");
        for bad in [&b""[..], b"a b", b"a\"", &[b'a'; 65], "ä".as_bytes()] {
            assert!(RequestId::parse(bad).is_none());
        }
        let (one, other) = (RequestId::random(), RequestId::random());
        assert_eq!(one.as_str().len(), 24);
        assert_ne!(one.as_str(), other.as_str());
    }
}
