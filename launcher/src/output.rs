//! What an app writes to its standard output and error: the last lines, bounded, kept over its generations.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use cmdb::Generation;
use launcher_client::wire::LogLine;
use tokio::net::unix::pipe;

use crate::clock::unix_ms;

/// Most bytes that are kept of one app.
const KEPT_BYTES: usize = 64 * 1024;
/// Most lines that are kept of one app.
const KEPT_LINES: usize = 1_000;
/// Longer lines are cut.
const LINE_BYTES: usize = 4 * 1024;
/// After each full buffer the reader rests this long: an app that floods its output waits for its own pipe (at about
/// 6 MB/s) and does not buy the daemon's CPU.
const REST: Duration = Duration::from_millis(10);
const BUFFER: usize = 64 * 1024;

/// The kept output of one app.
#[derive(Debug, Default)]
pub struct Output {
    ring: Mutex<Ring>,
}

#[derive(Debug, Default)]
struct Ring {
    lines: VecDeque<LogLine>,
    bytes: usize,
}

impl Output {
    /// Makes a pipe whose write end is for the app; what comes out of it is kept until the last writer is gone. Returned
    /// with it is a second read end, for whoever is to keep the pipe alive when this daemon dies.
    ///
    /// # Errors
    /// No pipe could be made (descriptors used up).
    pub fn capture(
        self: &Arc<Self>,
        generation: Generation,
        stream: &'static str,
    ) -> io::Result<(OwnedFd, OwnedFd, Capture)> {
        let (write, read) = pipe::pipe()?;
        let spare = read.as_fd().try_clone_to_owned()?;
        let task = tokio::spawn(read_lines(Arc::clone(self), read, generation, stream));
        Ok((write.into_blocking_fd()?, spare, Capture(task)))
    }

    /// Reads on where an earlier daemon has stopped.
    ///
    /// # Errors
    /// `read` is no pipe.
    pub fn resume(
        self: &Arc<Self>,
        generation: Generation,
        stream: &'static str,
        read: OwnedFd,
    ) -> io::Result<Capture> {
        let read = pipe::Receiver::from_owned_fd(read)?;
        Ok(Capture(tokio::spawn(read_lines(Arc::clone(self), read, generation, stream))))
    }

    /// The last `count` lines, oldest first.
    pub fn last(&self, count: usize) -> Vec<LogLine> {
        let ring = self.lock();
        ring.lines.iter().skip(ring.lines.len().saturating_sub(count)).cloned().collect()
    }

    /// The last line of `generation` that is not empty; what its hooks have written is not its own.
    pub fn last_words(&self, generation: Generation) -> Option<String> {
        self.last_of(generation, |stream| stream != "hook")
    }

    /// The last line of one of its streams that is not empty.
    pub fn last_words_of(&self, generation: Generation, stream: &str) -> Option<String> {
        self.last_of(generation, |other| other == stream)
    }

    fn last_of(&self, generation: Generation, wanted: impl Fn(&str) -> bool) -> Option<String> {
        let ring = self.lock();
        let is_it =
            |l: &&LogLine| l.generation == generation && wanted(&l.stream) && !l.line.trim().is_empty();
        Some(ring.lines.iter().rev().find(is_it)?.line.clone())
    }

    fn push(&self, generation: Generation, stream: &str, bytes: &[u8]) {
        let line = String::from_utf8_lossy(bytes).into_owned();
        let mut ring = self.lock();
        ring.bytes += line.len();
        ring.lines.push_back(LogLine { generation, at_unix_ms: unix_ms(), stream: stream.to_owned(), line });
        while ring.bytes > KEPT_BYTES || ring.lines.len() > KEPT_LINES {
            let Some(old) = ring.lines.pop_front() else { break };
            ring.bytes -= old.line.len();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The reading of one pipe. Ends by itself when the last writer is gone.
#[derive(Debug)]
pub struct Capture(tokio::task::JoinHandle<()>);

impl Capture {
    /// Waits until all that was written has been read, but no longer than a moment: a descriptor that leaked to
    /// another process must not hold up the end of an instance.
    pub async fn finish(self) {
        let abort = self.0.abort_handle();
        if tokio::time::timeout(Duration::from_millis(100), self.0).await.is_err() {
            abort.abort();
        }
    }
}

async fn read_lines(output: Arc<Output>, pipe: pipe::Receiver, generation: Generation, stream: &'static str) {
    let mut partial: Vec<u8> = Vec::new();
    // A buffer is there only while something is read: most apps say nothing most of the time, and there are thousands.
    while pipe.readable().await.is_ok() {
        let mut buffer = Vec::with_capacity(BUFFER);
        match pipe.try_read_buf(&mut buffer) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => break,
        }
        for byte in &buffer {
            if *byte == b'\n' {
                output.push(generation, stream, &partial);
                partial.clear();
            } else if partial.len() < LINE_BYTES {
                partial.push(*byte);
            }
        }
        let full = buffer.len() == buffer.capacity();
        drop(buffer);
        if full {
            tokio::time::sleep(REST).await;
        }
    }
    if !partial.is_empty() {
        output.push(generation, stream, &partial);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[tokio::test]
    async fn last_words_are_kept_even_without_an_end_of_line() {
        let output = Arc::new(Output::default());
        let (write, _spare, capture) = output.capture(Generation(7), "stderr").unwrap();

        let mut app = std::fs::File::from(write);
        app.write_all(b"starting\nmissing database").unwrap();
        drop(app);
        capture.finish().await;

        assert_eq!(output.last_words(Generation(7)).as_deref(), Some("missing database"));
        assert_eq!(output.last(10).len(), 2);
        assert_eq!(output.last_words(Generation(8)), None);
    }

    #[test]
    fn a_flood_stays_within_its_bounds() {
        let output = Output::default();
        for n in 0..100_000 {
            output.push(Generation(1), "stdout", format!("line {n}").as_bytes());
        }
        assert!(output.last(usize::MAX).len() <= KEPT_LINES);
        assert_eq!(output.last(1)[0].line, "line 99999");
    }
}
