//! The web server of the first tour: one static binary, one thread, alone in its image.
//!
//! It listens on `PORT` (8080) and shows who answered, and how long the wake took. The launcher passes `FC_APP`,
//! `FC_GENERATION` and `FC_WAKE_STARTED_NS` (`CLOCK_REALTIME` in nanoseconds when the wake began).
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use loadtest::http::{BAD_REQUEST, BodyDecoder, Head, Parsed, response};
use loadtest::{clock, socket};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

const LISTENER: u64 = 0;
const SIGNALS: u64 = 1;
const FIRST_CONNECTION: u64 = 2;

fn main() {
    if let Err(error) = run() {
        eprintln!("hello: {error}");
        std::process::exit(1);
    }
}

fn run() -> io::Result<()> {
    let started = Instant::now();
    let signals = termination_signals()?;
    let port = variable("PORT").and_then(|port| port.parse().ok()).unwrap_or(8080);
    let listener = socket::listen_on(port)?;
    let page = Page::new(started, clock::unix_ns());

    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    epoll.add(&signals, EpollEvent::new(EpollFlags::EPOLLIN, SIGNALS))?;
    Server { epoll, listener, accepting: true, connections: HashMap::new(), next: FIRST_CONNECTION, page }
        .serve()
}

/// As pid 1 of a container the default action of a signal is to do nothing, so the end must be asked for.
fn termination_signals() -> io::Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    Ok(SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

struct Server {
    epoll: Epoll,
    listener: TcpListener,
    /// False while descriptors are used up: an unanswered listener would keep the loop spinning.
    accepting: bool,
    connections: HashMap<u64, Connection>,
    next: u64,
    page: Page,
}

impl Server {
    /// Serves until SIGTERM or SIGINT.
    fn serve(mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other?,
            };
            for event in events.iter().take(ready) {
                match event.data() {
                    SIGNALS => return Ok(()),
                    LISTENER => self.accept()?,
                    key => self.advance(key)?,
                }
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if [Some(libc::EMFILE), Some(libc::ENFILE)].contains(&error.raw_os_error()) => {
                    self.accepting = self.connections.is_empty();
                    if !self.accepting {
                        self.epoll.delete(&self.listener)?;
                    }
                    return Ok(());
                }
                Err(_) => continue,
            };
            if stream.set_nonblocking(true).is_err() || stream.set_nodelay(true).is_err() {
                continue;
            }
            let key = self.next;
            self.next += 1;
            self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, key))?;
            self.connections.insert(key, Connection::new(stream));
            // The request is usually there already: it was what woke us.
            self.advance(key)?;
        }
    }

    fn advance(&mut self, key: u64) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(&key) else { return Ok(()) };
        if let Progress::Waits(interest) = connection.advance(&mut self.page) {
            if connection.interest != interest {
                connection.interest = interest;
                self.epoll.modify(&connection.stream, &mut EpollEvent::new(interest, key))?;
            }
            return Ok(());
        }
        self.connections.remove(&key);
        if !self.accepting {
            self.accepting = true;
            self.epoll.add(&self.listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        }
        Ok(())
    }
}

enum Progress {
    Waits(EpollFlags),
    Over,
}

struct Connection {
    stream: TcpStream,
    interest: EpollFlags,
    input: Vec<u8>,
    output: Vec<u8>,
    written: usize,
    /// The body of a request that was answered already: to be read and thrown away.
    body: Option<BodyDecoder>,
    /// The client wanted no more, or sent what is not HTTP.
    last: bool,
}

impl Connection {
    fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            interest: EpollFlags::EPOLLIN,
            input: Vec::new(),
            output: Vec::new(),
            written: 0,
            body: None,
            last: false,
        }
    }

    /// Writes, answers and reads until the socket has no more to give or to take.
    fn advance(&mut self, page: &mut Page) -> Progress {
        loop {
            match self.flush() {
                Ok(true) => {}
                Ok(false) => return Progress::Waits(EpollFlags::EPOLLOUT),
                Err(_) => return Progress::Over,
            }
            if self.last {
                return Progress::Over;
            }
            if self.answer_next(page) {
                continue;
            }
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => return Progress::Over,
                Ok(count) => self.input.extend_from_slice(piece.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Progress::Waits(EpollFlags::EPOLLIN);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Progress::Over,
            }
        }
    }

    /// True when everything is written.
    fn flush(&mut self) -> io::Result<bool> {
        while let Some(rest) = self.output.get(self.written..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.output.clear();
        self.written = 0;
        Ok(true)
    }

    /// Answers the next request of the input, if it is there; false if more must be read first.
    fn answer_next(&mut self, page: &mut Page) -> bool {
        if let Some(body) = &mut self.body {
            match body.feed(&self.input, |_| ()) {
                Ok(used) => drop(self.input.drain(..used)),
                Err(_) => return self.refuse(),
            }
            if !body.is_done() {
                return false;
            }
            self.body = None;
        }
        match Head::parse(&self.input) {
            Parsed::Partial => false,
            Parsed::Malformed => self.refuse(),
            Parsed::Whole(head, used) => {
                self.input.drain(..used);
                let Some(framing) = head.framing() else { return self.refuse() };
                self.body = Some(BodyDecoder::new(framing));
                self.last = !head.keeps_alive();
                self.output = page.answer(&head);
                true
            }
        }
    }

    fn refuse(&mut self) -> bool {
        self.output = BAD_REQUEST.to_vec();
        self.last = true;
        true
    }
}

/// Everything that the page shows.
struct Page {
    app: String,
    instance: String,
    generation: String,
    wake: Option<Duration>,
    started: Instant,
    requests: u64,
}

impl Page {
    fn new(started: Instant, listened_at_ns: u64) -> Self {
        let wake = variable("FC_WAKE_STARTED_NS")
            .and_then(|text| text.parse::<u64>().ok())
            .and_then(|began| listened_at_ns.checked_sub(began))
            .map(Duration::from_nanos);
        Self {
            app: variable("FC_APP").unwrap_or_else(|| "hello".to_owned()),
            instance: socket::hostname(),
            generation: variable("FC_GENERATION").unwrap_or_else(|| "–".to_owned()),
            wake,
            started,
            requests: 0,
        }
    }

    fn answer(&mut self, head: &Head) -> Vec<u8> {
        match head.path() {
            "/" if head.wants_html() => {
                self.requests += 1;
                response(head, "200 OK", "text/html; charset=utf-8", self.html().as_bytes())
            }
            "/" => {
                self.requests += 1;
                response(head, "200 OK", "text/plain; charset=utf-8", self.text().as_bytes())
            }
            "/favicon.ico" => response(head, "200 OK", "image/svg+xml", ICON.as_bytes()),
            _ => response(head, "404 Not Found", "text/plain; charset=utf-8", b"only / is served here\n"),
        }
    }

    fn rows(&self) -> [(&'static str, String); 7] {
        let age = self.started.elapsed().as_secs_f64();
        let wake =
            self.wake.map_or_else(|| "–".to_owned(), |wake| format!("{:.2} ms", wake.as_secs_f64() * 1000.0));
        [
            ("app", self.app.clone()),
            ("instance", self.instance.clone()),
            ("generation", self.generation.clone()),
            ("pid", std::process::id().to_string()),
            ("age", format!("{age:.3} s")),
            ("woken in", wake),
            ("requests", self.requests.to_string()),
        ]
    }

    fn text(&self) -> String {
        let mut text = "Hello from a container.\n".to_owned();
        for (name, value) in self.rows() {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:<11}{value}");
        }
        text
    }

    fn html(&self) -> String {
        let rows: String = self
            .rows()
            .iter()
            .map(|(name, value)| format!("<dt>{name}</dt><dd>{}</dd>\n", escape(value)))
            .collect();
        format!("{PAGE_START}{rows}{PAGE_END}")
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

const ICON: &str = "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>\
<rect width='16' height='16' rx='4' fill='#0b7285'/><path d='M9 2 4 9h4l-1 5 5-7H8z' fill='#fff'/></svg>";

const PAGE_START: &str = "<!doctype html>
<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">
<title>Hello from a container</title><style>
:root { color-scheme: light dark; font: 17px/1.5 system-ui, sans-serif }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; background: light-dark(#eef5f6, #10191b) }
main { padding: 2rem 2.5rem; border-radius: 1rem; background: light-dark(#fff, #1a272a); box-shadow: 0 8px 32px #0002 }
h1 { margin: 0 0 1rem; font-size: 1.4rem; color: light-dark(#0b7285, #66d9e8) }
dl { margin: 0; display: grid; grid-template-columns: auto auto; gap: .3rem 2rem }
dt { color: light-dark(#667, #9ab) } dd { margin: 0; font-family: ui-monospace, monospace }
p { margin: 1.2rem 0 0; font-size: .85rem; color: light-dark(#667, #9ab) }
</style></head><body><main><h1>Hello from a container.</h1><dl>
";

const PAGE_END: &str = "</dl><p>Nothing of this ran until it was asked for. Leave it alone and it goes again.</p></main></body></html>
";
