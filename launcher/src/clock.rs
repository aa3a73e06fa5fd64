//! The one place that reads the wall clock.

use std::time::{SystemTime, UNIX_EPOCH};

/// ms since the Unix epoch; 0 for a clock before it.
#[must_use]
pub(crate) fn unix_ms() -> u64 {
    unix_us() / 1_000
}

/// µs since the Unix epoch; 0 for a clock before it.
#[must_use]
pub(crate) fn unix_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}
