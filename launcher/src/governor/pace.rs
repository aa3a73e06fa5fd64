//! How many starts may be under way at a time.

/// Starts for each core that nobody has to wait for.
const USUAL_PER_CORE: usize = 2;
/// Most starts for each core, however idle its CPUs are: each one holds memory and descriptors.
const MOST_PER_CORE: usize = 32;
/// Below this the host has CPU to give away, per mille.
const IDLE: u32 = 600;
/// Below this it has some left.
const SPARE: u32 = 850;
/// Above this the starts take it from each other, and from the apps that serve.
const FULL: u32 = 950;

/// The number of starts that may be under way, adapted to the CPU that is free as TCP adapts its window: doubled while
/// there is plenty, then one more at a time, and halved when the host is full. Starts that compute end sooner one
/// after the other; starts that wait for something may be as many as there is room for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Pace {
    cores: usize,
    limit: usize,
    most: usize,
}

impl Pace {
    /// The usual pace of a host with so many cores; `most` is what the operator allows.
    pub(super) fn new(cores: usize, most: usize) -> Self {
        let most = most.clamp(1, cores.max(1) * MOST_PER_CORE);
        let mut pace = Self { cores: cores.clamp(1, most), limit: 1, most };
        pace.relax();
        pace
    }

    /// Starts that may be under way.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Starts wait, and the host was so busy since the last look, per mille.
    pub(super) fn observe(&mut self, busy: u32) {
        self.limit = match busy {
            ..IDLE => self.limit * 2,
            IDLE..SPARE => self.limit + 1,
            SPARE..FULL => self.limit,
            FULL.. => self.limit / 2,
        }
        .clamp(self.least(), self.most);
    }

    /// On a full host one core is left to the apps that serve.
    fn least(&self) -> usize {
        self.cores.saturating_sub(1).clamp(1, self.most)
    }

    /// Nobody waits any more: the next storm is another one.
    pub(super) fn relax(&mut self) {
        self.limit = (self.cores * USUAL_PER_CORE).min(self.most);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_idle_host_takes_on_more_and_more_starts() {
        let mut pace = Pace::new(2, usize::MAX);
        let limits: Vec<usize> = (0..6)
            .map(|_| {
                pace.observe(100);
                pace.limit()
            })
            .collect();
        assert_eq!(limits, [8, 16, 32, 64, 64, 64]);
    }

    #[test]
    fn a_full_host_leaves_one_core_to_those_that_serve() {
        let mut pace = Pace::new(4, usize::MAX);
        for _ in 0..10 {
            pace.observe(1_000);
        }
        assert_eq!(pace.limit(), 3);
        pace.observe(700);
        assert_eq!(pace.limit(), 4, "one more when there is some CPU");
        pace.relax();
        assert_eq!(pace.limit(), 8);
    }

    proptest! {
        #[test]
        fn there_is_always_a_start_allowed_and_never_too_many(
            cores in 0_usize..300, most in 0_usize..9_000, busy in proptest::collection::vec(0_u32..=1_000, 0..50),
        ) {
            let mut pace = Pace::new(cores, most);
            for busy in busy {
                pace.observe(busy);
                prop_assert!((1..=most.max(1)).contains(&pace.limit()));
            }
        }
    }
}
