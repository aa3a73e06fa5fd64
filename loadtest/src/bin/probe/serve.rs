//! Connections and paths.
//!
//! | path | answer |
//! |---|---|
//! | `/` | JSON: app, generation, instance, pid, uid, requests, age_ms, listened_at_unix_ns, woken_in_ns |
//! | `/upload` | reads the body; JSON: bytes, sha256, requests_seen (uploads so far in this process) |
//! | `/headers` | JSON: method, target, headers as a list of pairs |
//! | `/env` | JSON: the environment |
//! | `/blob?kib=N` | the app's name over and over, N KiB |
//! | `/sleep?ms=N` | answers after N ms |
//! | `/slow-body?chunks=N&ms=M` | N chunks, M ms apart |
//! | `/sse?events=N&ms=M` | server-sent events, without end if N is not given |
//! | `/ws` | WebSocket echo |
//! | `/close`, `/half` | closes without an answer; after 10 of 100 bytes |
//! | `/spin?ms=N`, `/work?ms=N`, `/memhog?mib=N`, `/fdhog`, `/forkbomb`, `/exit?code=N`, `/log?line=TEXT` | see `misbehave` |
//! | `/connect?to=ADDRESS:PORT`, `&udp=1` | connects out, see `connect` |
//! | `/network` | JSON: what the container is told about its network |
//! | `/escape` | JSON: attempts and facts, see `escape` and `facts` |

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use loadtest::http::{BAD_REQUEST, BodyDecoder, Head, Parsed, response};
use loadtest::socket::hostname;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::{connect, escape, facts, misbehave, websocket};

/// How this process came to be.
pub(crate) struct Birth {
    /// When `main` began.
    pub started: Instant,
    /// `CLOCK_REALTIME` in nanoseconds when `listen` had returned.
    pub listened_at_ns: u64,
    /// Descriptors that were open at the start, with what they pointed to.
    pub inherited: Vec<String>,
}

struct Probe {
    birth: Birth,
    requests: Cell<u64>,
    uploads: Cell<u64>,
    /// Connections that are still to be reset.
    resets: Cell<u64>,
}

/// Serves every connection on this thread, for ever.
///
/// With `workers`, no more connections at a time and one request for each, as with Apache's processes: the others stay in
/// the kernel's queue.
pub(crate) async fn serve(listener: TcpListener, birth: Birth, workers: Option<usize>) -> io::Result<()> {
    let resets = std::env::var("RESET_FIRST").ok().and_then(|count| count.parse().ok()).unwrap_or(0);
    let free = workers.map(|workers| Arc::new(Semaphore::new(workers)));
    let probe =
        Rc::new(Probe { birth, requests: Cell::new(0), uploads: Cell::new(0), resets: Cell::new(resets) });
    let tasks = tokio::task::LocalSet::new();
    tasks
        .run_until(async move {
            loop {
                let worker = match &free {
                    Some(free) => Arc::clone(free).acquire_owned().await.ok(),
                    None => None,
                };
                let Ok((stream, _)) = listener.accept().await else {
                    // Out of descriptors (see `/fdhog`): wait, others may be closed meanwhile.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                };
                let probe = Rc::clone(&probe);
                tokio::task::spawn_local(async move {
                    let _ = stream.set_nodelay(true);
                    // The client's disappearance is the client's affair.
                    let _ =
                        Connection { stream, input: Vec::new(), once: worker.is_some() }.run(&probe).await;
                    drop(worker);
                });
            }
        })
        .await
}

/// The connection's end is to be a reset.
fn set_linger(stream: &TcpStream) -> io::Result<()> {
    let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
    Ok(nix::sys::socket::setsockopt(stream, nix::sys::socket::sockopt::Linger, &at_once)?)
}

struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
    /// One request only.
    once: bool,
}

impl Connection {
    async fn run(mut self, probe: &Probe) -> io::Result<()> {
        loop {
            let mut head = match Head::parse(&self.input) {
                Parsed::Whole(head, used) => {
                    self.input.drain(..used);
                    head
                }
                Parsed::Malformed => return self.stream.write_all(BAD_REQUEST).await,
                Parsed::Partial => {
                    if self.stream.read_buf(&mut self.input).await? == 0 {
                        return Ok(());
                    }
                    continue;
                }
            };
            if self.once {
                head.headers.push(("Connection".to_owned(), "close".to_owned()));
            }
            if let Some(left) = probe.resets.get().checked_sub(1) {
                probe.resets.set(left);
                // RST instead of FIN.
                return set_linger(&self.stream);
            }
            probe.requests.set(probe.requests.get() + 1);
            match head.path() {
                "/close" => return Ok(()),
                "/half" => return self.half(&head).await,
                "/sse" => return self.events(&head).await,
                "/ws" => return websocket::echo(self.stream, &head, self.input).await,
                _ => {}
            }
            let Some(body) = self.read_body(&head).await? else {
                return self.stream.write_all(BAD_REQUEST).await;
            };
            if head.path() == "/slow-body" {
                self.slow_body(&head).await?;
            } else {
                let answer = probe.answer(&head, &body).await;
                self.stream.write_all(&answer).await?;
            }
            if !head.keeps_alive() {
                return self.stream.shutdown().await;
            }
        }
    }

    /// Reads the body to its end, keeping only its size and hash; `None` if it is malformed.
    async fn read_body(&mut self, head: &Head) -> io::Result<Option<Body>> {
        let Some(framing) = head.framing() else { return Ok(None) };
        let (mut bytes, mut hash) = (0_u64, Sha256::new());
        let mut decoder = BodyDecoder::new(framing);
        if !decoder.is_done() && head.header_has("expect", "100-continue") {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        loop {
            let fed = decoder.feed(&self.input, |piece| {
                bytes += piece.len() as u64;
                hash.update(piece);
            });
            let Ok(used) = fed else { return Ok(None) };
            self.input.drain(..used);
            if decoder.is_done() {
                let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
                return Ok(Some(Body { bytes, sha256 }));
            }
            self.input.reserve(64 * 1024);
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    async fn half(&mut self, head: &Head) -> io::Result<()> {
        let whole = response(head, "200 OK", "text/plain", &[b'x'; 100]);
        let cut = whole.get(..whole.len() - 90).unwrap_or_default();
        self.stream.write_all(cut).await?;
        self.stream.shutdown().await
    }

    async fn slow_body(&mut self, head: &Head) -> io::Result<()> {
        let chunks: u64 = head.query_number("chunks").unwrap_or(10);
        let pause = Duration::from_millis(head.query_number("ms").unwrap_or(100));
        self.start_chunked("text/plain").await?;
        for number in 0..chunks {
            if number > 0 {
                tokio::time::sleep(pause).await;
            }
            self.send_chunk(&format!("chunk {number}\n")).await?;
        }
        self.stream.write_all(b"0\r\n\r\n").await
    }

    async fn events(&mut self, head: &Head) -> io::Result<()> {
        let events: u64 = head.query_number("events").unwrap_or(u64::MAX);
        let pause = Duration::from_millis(head.query_number("ms").unwrap_or(100));
        self.start_chunked("text/event-stream").await?;
        for number in 0..events {
            self.send_chunk(&format!("id: {number}\ndata: {}\n\n", hostname())).await?;
            tokio::time::sleep(pause).await;
        }
        self.stream.write_all(b"0\r\n\r\n").await
    }

    async fn start_chunked(&mut self, content_type: &str) -> io::Result<()> {
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nCache-Control: no-store\r\nTransfer-Encoding: chunked\r\n\r\n"
        );
        self.stream.write_all(head.as_bytes()).await
    }

    async fn send_chunk(&mut self, text: &str) -> io::Result<()> {
        self.stream.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).await
    }
}

struct Body {
    bytes: u64,
    sha256: String,
}

impl Probe {
    async fn answer(&self, head: &Head, body: &Body) -> Vec<u8> {
        let answer = match head.path() {
            "/" => self.identity(),
            "/upload" => {
                self.uploads.set(self.uploads.get() + 1);
                json!({ "bytes": body.bytes, "sha256": body.sha256, "requests_seen": self.uploads.get() })
            }
            "/headers" => json!({ "method": head.method, "target": head.target, "headers": head.headers }),
            "/env" => std::env::vars_os()
                .map(|(name, value)| {
                    (name.to_string_lossy().into_owned(), Value::from(value.to_string_lossy().into_owned()))
                })
                .collect(),
            "/blob" => {
                let size = head.query_number::<usize>("kib").unwrap_or(64) * 1024;
                let text: Vec<u8> = app().bytes().chain([b'\n']).cycle().take(size).collect();
                return response(head, "200 OK", "text/plain", &text);
            }
            "/sleep" => {
                let ms = head.query_number("ms").unwrap_or(1000);
                tokio::time::sleep(Duration::from_millis(ms)).await;
                json!({ "slept_ms": ms, "instance": hostname() })
            }
            "/spin" => misbehave::spin(Duration::from_millis(head.query_number("ms").unwrap_or(1000))).await,
            "/work" => misbehave::work(Duration::from_millis(head.query_number("ms").unwrap_or(10))).await,
            "/memhog" => misbehave::take_memory(head.query_number("mib").unwrap_or(64)),
            "/fdhog" => misbehave::take_descriptors(),
            "/forkbomb" => misbehave::fork_without_end(),
            "/exit" => std::process::exit(head.query_number("code").unwrap_or(0)),
            "/log" => misbehave::log(&head.query("line").unwrap_or_default()),
            "/connect" => {
                let to = head.query("to").unwrap_or_default();
                connect::connect(&to, head.query("udp").is_some()).await
            }
            "/network" => connect::files(),
            "/escape" => {
                json!({ "attempts": escape::attempts(), "facts": facts::facts(&self.birth.inherited) })
            }
            _ => return response(head, "404 Not Found", "text/plain", b"no such path in the probe\n"),
        };
        response(head, "200 OK", "application/json", format!("{answer}\n").as_bytes())
    }

    fn identity(&self) -> Value {
        let woken_in = std::env::var("FC_WAKE_STARTED_NS")
            .ok()
            .and_then(|text| text.parse::<u64>().ok())
            .and_then(|began| self.birth.listened_at_ns.checked_sub(began));
        json!({
            "app": app(),
            "generation": std::env::var("FC_GENERATION").ok(),
            "instance": hostname(),
            "pid": std::process::id(),
            "uid": nix::unistd::getuid().as_raw(),
            "requests": self.requests.get(),
            "age_ms": self.birth.started.elapsed().as_secs_f64() * 1000.0,
            "listened_at_unix_ns": self.birth.listened_at_ns,
            "woken_in_ns": woken_in,
        })
    }
}

fn app() -> String {
    std::env::var("FC_APP").unwrap_or_default()
}
