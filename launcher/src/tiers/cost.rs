//! What waking an app takes, learnt from its own wakes.

use super::Tier;

/// What is assumed until an app has been woken from a tier, microseconds: a thaw is a thaw everywhere, and an unknown start
/// is taken for a slow one, so that what is not known is not given up first.
const UNKNOWN_US: [u64; 3] = [1_000, 50_000, 1_000_000];
/// The newest figure counts for so much, of 100.
const NEWEST: u64 = 30;

/// Moving averages of one app's wakes, from the request's arrival at the launcher to the first byte where that is known.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct WakeCosts([Option<u64>; 3]);

impl WakeCosts {
    /// It was woken from `tier`, and that took so many microseconds.
    pub fn learn(&mut self, tier: Tier, us: u64) {
        if let Some(average) = slot(tier).and_then(|slot| self.0.get_mut(slot)) {
            *average = Some(match *average {
                Some(old) => old.saturating_mul(100 - NEWEST).saturating_add(us.saturating_mul(NEWEST)) / 100,
                None => us,
            });
        }
    }

    /// What waking it from `tier` is expected to take, microseconds.
    #[must_use]
    pub fn of(&self, tier: Tier) -> u64 {
        let Some(slot) = slot(tier) else { return 0 };
        let known = self.0.get(slot).copied().flatten();
        known.or_else(|| UNKNOWN_US.get(slot).copied()).unwrap_or(0)
    }
}

fn slot(tier: Tier) -> Option<usize> {
    match tier {
        Tier::Running => None,
        Tier::Frozen => Some(0),
        Tier::Reclaimed => Some(1),
        Tier::Stopped => Some(2),
    }
}
