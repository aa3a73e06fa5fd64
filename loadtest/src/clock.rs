//! Wall-clock time in nanoseconds, the unit in which the launcher passes the start of a wake.

use std::time::{SystemTime, UNIX_EPOCH};

/// `CLOCK_REALTIME` in nanoseconds since 1970; 0 on a host whose clock stands before that.
#[must_use]
pub fn unix_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|age| u64::try_from(age.as_nanos()).ok())
        .unwrap_or(0)
}
