//! The application of the black-box tests: a web server that does what it is told, good or bad.
//!
//! | variable | effect |
//! |---|---|
//! | `PORT` | where to listen, 8080 if not set |
//! | `LISTEN_AFTER_MS` | waits this long before it listens |
//! | `NEVER_LISTEN=1` | never listens |
//! | `EXIT_AFTER_MS`, `EXIT_CODE`, `LAST_WORDS` | prints some lines to stderr, `LAST_WORDS` last, and exits this long after the start; without `LISTEN_AFTER_MS` it does not listen before |
//! | `CONNECT_FIRST` | connects to `ADDRESS:PORT` before it listens, and exits if that fails |
//! | `WORKERS=N` | serves so many connections at a time, each for one request; more wait in the kernel's queue |
//! | `RESET_FIRST=N` | resets its first N connections when a request has come |
//! | `IGNORE_TERM=1` | SIGTERM does nothing (otherwise: exit 0 at once) |
//!
//! The launcher's `FC_APP`, `FC_GENERATION` and `FC_WAKE_STARTED_NS` are shown by `/`. The paths are listed in `serve`.
//!
//! Everything runs on one thread: a container's limit on processes must not be used up by its requests.
// The probe must misbehave in ways that no safe interface offers; all of that is in `raw` and `escape`.
#![deny(unsafe_code)]

mod connect;
mod escape;
mod facts;
mod misbehave;
#[allow(unsafe_code)] // raw system calls and fork, for the attempts that a container must refuse
mod raw;
mod serve;
mod websocket;

use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

fn main() {
    let started = Instant::now();
    // Before anything of ours is open: what is there now came from whoever started us.
    let inherited = facts::open_descriptors();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(8).build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(live(started, inherited)),
        Err(error) => Err(error),
    };
    let code = outcome.unwrap_or_else(|error| {
        eprintln!("probe: {error}");
        1
    });
    // Not `return`: that would wait for blocking tasks.
    std::process::exit(code);
}

/// Lives as the environment says; returns the exit code.
async fn live(started: Instant, inherited: Vec<String>) -> std::io::Result<i32> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stays = flag("IGNORE_TERM");
    tokio::select! {
        () = async { while terminate.recv().await.is_some() && stays {} } => Ok(0),
        _ = interrupt.recv() => Ok(0),
        code = exit_in_time(started) => Ok(code),
        outcome = listen_in_time(started, inherited) => outcome.map(|()| 0),
    }
}

async fn exit_in_time(started: Instant) -> i32 {
    let Some(after) = number("EXIT_AFTER_MS") else { return std::future::pending().await };
    tokio::time::sleep_until((started + Duration::from_millis(after)).into()).await;
    eprintln!("probe: this application was told to fail");
    eprintln!("probe: it lived for {} ms", started.elapsed().as_millis());
    if let Ok(words) = std::env::var("LAST_WORDS") {
        eprintln!("{words}");
    }
    number("EXIT_CODE").unwrap_or(1)
}

async fn listen_in_time(started: Instant, inherited: Vec<String>) -> std::io::Result<()> {
    let wait = number("LISTEN_AFTER_MS");
    if flag("NEVER_LISTEN") || (wait.is_none() && number::<u64>("EXIT_AFTER_MS").is_some()) {
        std::future::pending::<()>().await;
    }
    if let Some(wait) = wait {
        tokio::time::sleep_until((started + Duration::from_millis(wait)).into()).await;
    }
    if let Ok(to) = std::env::var("CONNECT_FIRST") {
        let outcome = connect::connect(&to, false).await;
        if outcome["ok"] != true {
            return Err(std::io::Error::other(format!("{to}: {outcome}")));
        }
        eprintln!("probe: connected first: {outcome}");
    }
    let listener = loadtest::socket::listen_on(number("PORT").unwrap_or(8080))?;
    let listened_at_ns = loadtest::clock::unix_ns();
    serve::serve(
        tokio::net::TcpListener::from_std(listener)?,
        serve::Birth { started, listened_at_ns, inherited },
        number("WORKERS"),
    )
    .await
}

fn flag(name: &str) -> bool {
    std::env::var(name).is_ok_and(|value| !value.is_empty() && value != "0")
}

fn number<N: std::str::FromStr>(name: &str) -> Option<N> {
    std::env::var(name).ok()?.parse().ok()
}
