//! Greed, noise and sudden death, on request.

use std::cell::RefCell;
use std::fs::File;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use serde_json::{Value, json};

use crate::raw;

thread_local! {
    static MEMORY: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
    static DESCRIPTORS: RefCell<Vec<File>> = const { RefCell::new(Vec::new()) };
}

/// Burns a core on a thread of its own, so that other requests still find someone.
pub(crate) async fn spin(time: Duration) -> Value {
    let turns = tokio::task::spawn_blocking(move || {
        let (begun, mut turns) = (Instant::now(), 0_u64);
        while begun.elapsed() < time {
            turns = std::hint::black_box(turns + 1);
        }
        turns
    });
    json!({ "turns": turns.await.ok() })
}

/// Burns so much CPU time on a thread of its own: unlike [`spin`] it takes longer when the CPU is short.
pub(crate) async fn work(time: Duration) -> Value {
    let worked = tokio::task::spawn_blocking(move || {
        let begun = cpu_time();
        let mut turns = 0_u64;
        while cpu_time() < begun.saturating_add(time) {
            for _ in 0..1_000 {
                turns = std::hint::black_box(turns + 1);
            }
        }
        turns
    });
    json!({ "turns": worked.await.ok() })
}

/// CPU time that this thread has used.
fn cpu_time() -> Duration {
    let micros = |time: nix::sys::time::TimeVal| {
        Duration::from_secs(time.tv_sec().unsigned_abs())
            + Duration::from_micros(time.tv_usec().unsigned_abs())
    };
    // It cannot fail for the calling thread; if it does all the same, the work is over at once.
    getrusage(UsageWho::RUSAGE_THREAD)
        .map_or(Duration::MAX, |usage| micros(usage.user_time()) + micros(usage.system_time()))
}

/// Takes memory a MiB at a time, touches every page and keeps it.
pub(crate) fn take_memory(mib: usize) -> Value {
    MEMORY.with_borrow_mut(|memory| {
        for _ in 0..mib {
            // Not zero: zeroed memory would be untouched until written to.
            memory.push(vec![1; 1 << 20]);
        }
        json!({ "mib": memory.len() })
    })
}

/// Opens descriptors until the kernel refuses, and keeps them.
pub(crate) fn take_descriptors() -> Value {
    DESCRIPTORS.with_borrow_mut(|descriptors| {
        loop {
            match File::open("/") {
                Ok(file) => descriptors.push(file),
                Err(error) => {
                    return json!({ "descriptors": descriptors.len(), "errno": raw::name_of(error.raw_os_error()) });
                }
            }
        }
    })
}

/// A fork bomb: every child forks for ever. Only as pid 1, where the end of this process ends all of them.
pub(crate) fn fork_without_end() -> Value {
    if std::process::id() != 1 {
        return json!({ "forked": false, "reason": "refused outside a container" });
    }
    json!({ "forked": raw::fork_bomb() })
}

/// Prints the line to stderr and to stdout.
pub(crate) fn log(line: &str) -> Value {
    eprintln!("{line}");
    #[expect(clippy::print_stdout, reason = "stdout is what is tested")]
    {
        println!("{line}");
    }
    json!({ "logged": line })
}
