//! Sleep in tiers, and which instance goes down a tier when the host's memory gets short. Pure: what is so comes in, what
//! is to be done goes out.
//!
//! ```text
//! running, idle → frozen → reclaimed → stopped
//! ```
//! Each tier gives more memory back and costs the next visitor more. The coldest and cheapest to wake go first: those with
//! the most idle time for each microsecond that waking them from the next tier will take, as measured for that very app.

mod cost;
mod pressure;
#[cfg(test)]
mod tests;

use std::time::Duration;

use cmdb::{AppName, Generation};

pub use cost::WakeCosts;
pub use pressure::{Gauge, Marks, Reading, Turn};

/// An instance with a request within this time is left alone.
pub const LEAST_IDLE: Duration = Duration::from_secs(2);

/// How deeply an instance sleeps.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Tier {
    /// It runs.
    Running,
    /// The freezer has it; its memory is where it was.
    Frozen,
    /// It is frozen, and what could be taken of its memory has been.
    Reclaimed,
    /// It is not there.
    Stopped,
}

/// An instance that could go down a tier.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Candidate {
    /// Its app.
    pub app: AppName,
    /// Which of its instances.
    pub generation: Generation,
    /// Where it is.
    pub tier: Tier,
    /// Since its last request.
    pub idle: Duration,
    /// Requests under way.
    pub in_flight: u32,
    /// Memory that it holds, bytes.
    pub memory: u64,
    /// Whether it is on its way down already: what it holds will come back by itself.
    pub descends: bool,
    /// Whether it may end: its app would still have `scale.min` instances.
    pub may_stop: bool,
    /// What waking it from the next tier down will take, microseconds.
    pub wake_us: u64,
}

/// One instance is to go down one tier.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Step {
    /// Its app.
    pub app: AppName,
    /// Which of its instances.
    pub generation: Generation,
    /// Where to.
    pub to: Tier,
}

impl Tier {
    /// The next tier down.
    #[must_use]
    pub fn next(self) -> Option<Tier> {
        match self {
            Tier::Running => Some(Tier::Frozen),
            Tier::Frozen => Some(Tier::Reclaimed),
            Tier::Reclaimed => Some(Tier::Stopped),
            Tier::Stopped => None,
        }
    }
}

impl Candidate {
    /// Where it may go now.
    fn next(&self) -> Option<Tier> {
        let next = self.tier.next()?;
        let calm = !self.descends && self.in_flight == 0 && self.idle >= LEAST_IDLE;
        (calm && (next != Tier::Stopped || self.may_stop)).then_some(next)
    }

    /// Bytes that it is expected to give back on its way to `to`; reclaiming moves memory to swap, of which so much is free.
    fn gives(&self, to: Tier, swap_free: u64) -> u64 {
        match to {
            Tier::Running | Tier::Frozen => 0,
            Tier::Reclaimed => self.memory.min(swap_free),
            Tier::Stopped => self.memory,
        }
    }

    /// Whether it goes before `other`: idle time for each microsecond of waking, without the division.
    fn before(&self, other: &Self) -> std::cmp::Ordering {
        let worth = |a: &Self, b: &Self| a.idle.as_micros().saturating_mul(u128::from(b.wake_us.max(1)));
        worth(other, self)
            .cmp(&worth(self, other))
            .then_with(|| (&self.app, self.generation).cmp(&(&other.app, other.generation)))
    }
}

/// Which instances go down a tier now, so that `shortage` bytes come back; at most `most` of them, each by one tier.
///
/// What those that descend already will give back counts. An instance with requests under way, or one that had some a moment
/// ago, is never chosen.
#[must_use]
pub fn choose(candidates: &[Candidate], shortage: u64, swap_free: u64, most: usize) -> Vec<Step> {
    let coming = candidates.iter().filter(|c| c.descends).fold(0u64, |sum, c| sum.saturating_add(c.memory));
    let mut left = shortage.saturating_sub(coming);
    let mut able: Vec<(&Candidate, Tier)> = candidates.iter().filter_map(|c| Some((c, c.next()?))).collect();
    able.sort_by(|(a, _), (b, _)| a.before(b));
    let mut steps = Vec::new();
    for (candidate, to) in able {
        if left == 0 || steps.len() == most {
            break;
        }
        left = left.saturating_sub(candidate.gives(to, swap_free));
        steps.push(Step { app: candidate.app.clone(), generation: candidate.generation, to });
    }
    steps
}
