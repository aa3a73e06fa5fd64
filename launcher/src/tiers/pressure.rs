//! Whether the host's memory is short: the kernel's two accounts, two marks each, so that it does not waver.

use cmdb::units::Bytes;

/// Relief is this much above the low mark, in quarters.
const RELIEF_QUARTERS: u64 = 5;
/// Stalls count only below so many times the low mark: an app that thrashes at its own limit stalls too, and no other's
/// sleep would help it.
const STALLS_COUNT_BELOW: u64 = 3;

/// When memory counts as short.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Marks {
    /// Memory that is to stay available, bytes.
    pub low: u64,
    /// Time in which something waits for memory, per mille.
    pub stalled: u32,
}

/// What the kernel says.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Reading {
    /// `MemAvailable`, bytes.
    pub available: u64,
    /// `MemTotal`, bytes.
    pub total: u64,
    /// `SwapFree`, bytes.
    pub swap_free: u64,
    /// Time since the last reading in which something waited for memory (`some` of PSI), per mille.
    pub stalled: u32,
}

/// Remembers whether memory is short.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Gauge {
    short: bool,
}

/// Memory has become short, or is not any more.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Turn {
    /// It has.
    Short,
    /// It is not any more.
    Relieved,
}

impl Gauge {
    /// Takes a reading; tells of a turn.
    pub fn observe(&mut self, reading: &Reading, marks: &Marks) -> Option<Turn> {
        let stalls = marks.low.saturating_mul(STALLS_COUNT_BELOW) > reading.available;
        let short = reading.available < marks.low || (stalls && reading.stalled >= marks.stalled);
        let relieved = reading.available >= relief(marks)
            && !(stalls && reading.stalled.saturating_mul(2) >= marks.stalled);
        match (self.short, short, relieved) {
            (false, true, _) => {
                self.short = true;
                Some(Turn::Short)
            }
            (true, _, true) => {
                self.short = false;
                Some(Turn::Relieved)
            }
            _ => None,
        }
    }

    /// Bytes that are to come back; `None` while memory is not short.
    #[must_use]
    pub fn shortage(&self, reading: &Reading, marks: &Marks) -> Option<u64> {
        // At least something: stalls are felt above the mark, too.
        self.short.then(|| relief(marks).saturating_sub(reading.available).max(1))
    }
}

/// Above this it is not short any more.
fn relief(marks: &Marks) -> u64 {
    (marks.low / 4).saturating_mul(RELIEF_QUARTERS)
}

impl Reading {
    /// Reads `/proc/meminfo` (proc_meminfo(5)); a kernel that does not tell has memory.
    #[must_use]
    pub fn of(meminfo: &str, stalled: u32) -> Self {
        let bytes = |key: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_ascii_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
        };
        Self {
            available: bytes("MemAvailable:").unwrap_or(u64::MAX),
            total: bytes("MemTotal:").unwrap_or(0),
            swap_free: bytes("SwapFree:").unwrap_or(0),
            stalled,
        }
    }

    /// In words, for an event.
    #[must_use]
    pub fn words(&self, marks: &Marks) -> String {
        format!(
            "{} of {} available (to be kept: {}), something waited for memory in {}.{} % of the time (limit {}.{} %)",
            whole(self.available),
            whole(self.total),
            whole(marks.low),
            self.stalled / 10,
            self.stalled % 10,
            marks.stalled / 10,
            marks.stalled % 10,
        )
    }
}

/// In whole MiB.
fn whole(bytes: u64) -> Bytes {
    Bytes(bytes >> 20 << 20)
}
