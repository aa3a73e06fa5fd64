//! Time: the parts of one request, and the recent first-byte times of one instance.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use launcher_client::wire::Window as Summary;

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
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch {
    begun: Instant,
    since: Instant,
    part: Part,
    spent: [Duration; PARTS],
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
        if cfg!(not(feature = "measure")) {
            self.part = part;
            return self.begun;
        }
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

/// Steps in each doubling of the histogram: a bucket is at most an eighth wider than its lower edge.
const STEPS: usize = 8;
/// Buckets of the first-byte histogram: up to a quarter of an hour.
const BUCKETS: usize = 1 + 24 * STEPS;
/// Length of a slot of the [`Window`], ms.
const SLOT_MS: u128 = 100;
/// Slots that are summed up: a second.
const SUMMED: usize = 10;
/// One more than are summed up, so that the oldest of them is not cleared under the reader.
const SLOTS: usize = SUMMED + 1;

/// First-byte times of one instance in the last second. Recording is a few relaxed atomics; a record that races the
/// turn of a slot may be lost, which a statistic survives.
#[derive(Debug)]
pub struct Window {
    slots: [Slot; SLOTS],
}

#[derive(Debug)]
struct Slot {
    /// Which tick (of the process's clock) plus one; 0: none yet.
    number: AtomicU64,
    /// Sum of the times, µs.
    sum_us: AtomicU64,
    buckets: [AtomicU32; BUCKETS],
}

/// The tick of a [`Window`]'s clock, `elapsed` after its begin.
#[must_use]
pub fn tick(elapsed: Duration) -> u64 {
    u64::try_from(elapsed.as_millis() / SLOT_MS).unwrap_or(u64::MAX - 1)
}

impl Default for Window {
    fn default() -> Self {
        let slot = || Slot {
            number: AtomicU64::new(0),
            sum_us: AtomicU64::new(0),
            buckets: std::array::from_fn(|_| AtomicU32::new(0)),
        };
        Self { slots: std::array::from_fn(|_| slot()) }
    }
}

impl Window {
    /// One first byte came after `us` µs, at this [`tick`].
    pub fn record(&self, tick: u64, us: u64) {
        let slot = self.slot(tick);
        let wanted = tick + 1;
        let number = slot.number.load(Relaxed);
        if number != wanted && slot.number.compare_exchange(number, wanted, Relaxed, Relaxed).is_ok() {
            slot.sum_us.store(0, Relaxed);
            slot.buckets.iter().for_each(|bucket| bucket.store(0, Relaxed));
        }
        slot.sum_us.fetch_add(us, Relaxed);
        slot.buckets[bucket_of(us)].fetch_add(1, Relaxed);
    }

    /// What the second that ends with `tick` held.
    #[must_use]
    pub fn summary(&self, tick: u64) -> Summary {
        let (mut counts, mut sum_us) = ([0u32; BUCKETS], 0u64);
        for tick in tick.saturating_sub(SUMMED as u64 - 1)..=tick {
            let slot = self.slot(tick);
            if slot.number.load(Relaxed) == tick + 1 {
                sum_us = sum_us.saturating_add(slot.sum_us.load(Relaxed));
                let buckets = counts.iter_mut().zip(&slot.buckets);
                buckets.for_each(|(count, bucket)| *count += bucket.load(Relaxed));
            }
        }
        let count: u32 = counts.iter().sum();
        let quantile = |percent: u64| {
            let rank = (u64::from(count) * percent).div_ceil(100).max(1);
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
        Summary {
            count,
            mean_us: sum_us / u64::from(count),
            p50_us: quantile(50),
            p90_us: quantile(90),
            p99_us: quantile(99),
        }
    }

    fn slot(&self, tick: u64) -> &Slot {
        // The remainder is less than the number of slots.
        &self.slots[usize::try_from(tick % SLOTS as u64).unwrap_or(0)]
    }
}

fn bucket_of(us: u64) -> usize {
    if us < 64 {
        return 0;
    }
    let doubling = us.ilog2() - 6;
    let step = (us >> (doubling + 3)) % STEPS as u64;
    let bucket = 1 + u64::from(doubling) * STEPS as u64 + step;
    usize::try_from(bucket).map_or(BUCKETS - 1, |bucket| bucket.min(BUCKETS - 1))
}

fn upper_edge(bucket: usize) -> u64 {
    let Some(index) = bucket.checked_sub(1) else { return 64 };
    let (doubling, step) = (index / STEPS, index % STEPS);
    let base = 64u64 << doubling;
    base + base / STEPS as u64 * (step as u64 + 1)
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
    fn a_window_forgets_what_is_older_than_a_second() {
        let window = Window::default();
        for _ in 0..9 {
            window.record(10, 100);
        }
        window.record(10, 50_000);
        let summary = window.summary(10);
        assert_eq!((summary.count, summary.mean_us), (10, 5_090));
        assert_eq!((summary.p50_us, summary.p90_us), (104, 104));
        assert!((50_000..57_000).contains(&summary.p99_us), "{summary:?}");
        window.record(15, 1_000);
        assert_eq!(window.summary(19).count, 11);
        assert_eq!(window.summary(20).count, 1);
        window.record(21, 1_000);
        assert_eq!(window.summary(21).count, 2);
        assert_eq!(window.summary(90), Summary::default());
    }
}
