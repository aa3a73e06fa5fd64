//! Time: the parts of one request, and the recent first-byte times of one instance.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// What a request's time goes to. Each moment belongs to exactly one part, so the parts sum to the whole.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Part {
    /// The proxy's own work.
    Own,
    /// Waiting for an instance.
    Hold,
    /// Getting a connection to the instance.
    Connect,
    /// Sending the request.
    Send,
    /// From the last request byte to the first response byte.
    FirstByte,
    /// From the first response byte to the end.
    Body,
}

const PARTS: usize = 6;

/// Splits the time of one request into [`Part`]s.
#[derive(Debug)]
pub struct Stopwatch {
    begun: Instant,
    since: Instant,
    part: Part,
    spent: [Duration; PARTS],
}

impl Default for Stopwatch {
    fn default() -> Self {
        Self::begin()
    }
}

impl Stopwatch {
    /// Begins now, in [`Part::Own`].
    #[must_use]
    pub fn begin() -> Self {
        let now = Instant::now();
        Self { begun: now, since: now, part: Part::Own, spent: [Duration::ZERO; PARTS] }
    }

    /// From now on time goes to `part`. Returns the moment.
    pub fn enter(&mut self, part: Part) -> Instant {
        let now = Instant::now();
        self.spent[self.part as usize] += now - self.since;
        self.since = now;
        self.part = part;
        now
    }

    /// Closes the part under way, so that the parts sum to [`Self::total`].
    pub fn stop(&mut self) {
        let part = self.part;
        self.enter(part);
    }

    /// The part under way.
    #[must_use]
    pub fn part(&self) -> Part {
        self.part
    }

    /// When it began.
    #[must_use]
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// When the part under way began.
    #[must_use]
    pub fn since(&self) -> Instant {
        self.since
    }

    /// What went to `part` before the last [`Self::enter`] or [`Self::stop`].
    #[must_use]
    pub fn spent(&self, part: Part) -> Duration {
        self.spent[part as usize]
    }

    /// From the begin to the last [`Self::enter`] or [`Self::stop`].
    #[must_use]
    pub fn total(&self) -> Duration {
        self.since - self.begun
    }
}

/// Buckets of the first-byte histogram: two for each doubling from 64 µs on.
const BUCKETS: usize = 48;

/// First-byte times of one instance in the current and the last full second. Recording is a few relaxed atomics; a
/// record that races the turn of the second may be lost, which a statistic survives.
#[derive(Debug, Default)]
pub struct Window {
    seconds: [Second; 2],
}

#[derive(Debug)]
struct Second {
    /// Which second (of the process's clock) plus one; 0: none yet.
    number: AtomicU64,
    buckets: [AtomicU32; BUCKETS],
}

/// What a [`Window`] knows of one second.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Summary {
    /// Responses.
    pub count: u32,
    /// Half of the first bytes came within this time, µs (upper edge of the bucket).
    pub p50_us: u64,
    /// Nine of ten did.
    pub p90_us: u64,
}

impl Default for Second {
    fn default() -> Self {
        Self { number: AtomicU64::new(0), buckets: std::array::from_fn(|_| AtomicU32::new(0)) }
    }
}

impl Window {
    /// One first byte came after `us` µs, in second number `second`.
    pub fn record(&self, second: u64, us: u64) {
        let slot = &self.seconds[usize::from(second % 2 == 1)];
        let wanted = second + 1;
        let number = slot.number.load(Relaxed);
        if number != wanted && slot.number.compare_exchange(number, wanted, Relaxed, Relaxed).is_ok() {
            slot.buckets.iter().for_each(|bucket| bucket.store(0, Relaxed));
        }
        slot.buckets[bucket_of(us)].fetch_add(1, Relaxed);
    }

    /// What second number `second` held, if it is the newest or the one before.
    #[must_use]
    pub fn summary(&self, second: u64) -> Summary {
        let slot = &self.seconds[usize::from(second % 2 == 1)];
        if slot.number.load(Relaxed) != second + 1 {
            return Summary::default();
        }
        let counts: [u32; BUCKETS] = std::array::from_fn(|index| slot.buckets[index].load(Relaxed));
        let count: u32 = counts.iter().sum();
        let quantile = |tenths: u64| {
            let rank = (u64::from(count) * tenths).div_ceil(10).max(1);
            let mut seen = 0u64;
            for (index, bucket) in counts.iter().enumerate() {
                seen += u64::from(*bucket);
                if seen >= rank {
                    return upper_edge(index);
                }
            }
            0
        };
        if count == 0 {
            return Summary::default();
        }
        Summary { count, p50_us: quantile(5), p90_us: quantile(9) }
    }
}

fn bucket_of(us: u64) -> usize {
    if us < 64 {
        return 0;
    }
    let doubling = us.ilog2() - 6;
    let half = (us >> (doubling + 5)) & 1;
    (1 + doubling as usize * 2 + usize::from(half == 1)).min(BUCKETS - 1)
}

fn upper_edge(bucket: usize) -> u64 {
    if bucket == 0 {
        return 64;
    }
    let (doubling, half) = ((bucket - 1) / 2, (bucket - 1) % 2);
    let base = 64u64 << doubling;
    if half == 0 { base + base / 2 } else { base * 2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_request_sum_to_the_whole() {
        let mut watch = Stopwatch::begin();
        for part in [Part::Hold, Part::Connect, Part::Hold, Part::Send, Part::FirstByte, Part::Body] {
            watch.enter(part);
        }
        watch.stop();
        let parts = [Part::Own, Part::Hold, Part::Connect, Part::Send, Part::FirstByte, Part::Body];
        assert_eq!(parts.iter().map(|part| watch.spent(*part)).sum::<Duration>(), watch.total());
    }

    #[test]
    fn every_time_falls_into_the_bucket_that_holds_it() {
        for us in (0..100_000).chain([1 << 20, 1 << 29]) {
            let bucket = bucket_of(us);
            assert!(us < upper_edge(bucket), "{us} in {bucket}");
            assert!(bucket == 0 || us >= upper_edge(bucket - 1), "{us} in {bucket}");
        }
    }

    #[test]
    fn a_window_forgets_the_second_before_last() {
        let window = Window::default();
        for _ in 0..9 {
            window.record(10, 100);
        }
        window.record(10, 50_000);
        assert_eq!(window.summary(10), Summary { count: 10, p50_us: 128, p90_us: 128 });
        window.record(11, 1_000);
        assert_eq!(window.summary(10).count, 10);
        window.record(12, 1_000);
        assert_eq!(window.summary(10), Summary::default());
        assert_eq!(window.summary(12).count, 1);
    }
}
