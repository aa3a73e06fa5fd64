//! Whether a step helped.

use super::{CPU_SHORT, Evidence, FEW, Policy};

/// So long the load must have lasted for its responses to be counted, ms.
pub(super) const FULL_WINDOW_MS: u64 = 1_000;

/// What came of a step.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// It helped.
    Helped,
    /// It did not.
    InVain,
    /// The load has gone meanwhile, or the host's CPU.
    Unknown,
}

/// Compares how it was when a step was made with how it is a while after the step took effect.
#[must_use]
pub fn judge(before: &Evidence, after: &Evidence, policy: &Policy) -> Verdict {
    if after.responses < FEW || after.demand() * 2 < before.demand() {
        return Verdict::Unknown;
    }
    let fine = !after.is_slow(policy) && after.held == 0;
    let faster = before.p90_us > 0 && after.p90_us * 10 <= before.p90_us * 8;
    let quarter_more = |before: u32, after: u32| u64::from(after) * 4 >= u64::from(before) * 5;
    let more = if before.loaded_ms >= FULL_WINDOW_MS {
        quarter_more(before.responses, after.responses)
    } else {
        // The step came before a second's responses could be counted; what CPU the app got is known at any time.
        before.is_throttled() && quarter_more(before.used, after.used)
    };
    let shorter_queue = before.queue() > 0 && after.queue() * 2 <= before.queue();
    if fine || faster || more || shorter_queue {
        return Verdict::Helped;
    }
    // What was given could not be used: that says nothing about the step.
    let starves = after.cpu_stalled >= CPU_SHORT && !after.is_held_back();
    if starves { Verdict::Unknown } else { Verdict::InVain }
}
