//! Generations that no two hosts can both give out, though neither knows of the other's: each host has a number, and gives out
//! those generations that leave this remainder. So it does not matter who could reach whom, nor what a primary that died had
//! promised and not passed on.

use crate::{instance::Generation, transition::AppRecord};

/// As many hosts are told apart; a generation is that many ms ahead of the clock at most, and as much for each start that
/// follows within that time.
const NUMBERS: u64 = 256;

/// The next generation of this record will be one of those of the host with that `number`.
pub(super) fn prepare(record: &mut AppRecord, number: u64, now_ms: u64) {
    let least = (record.generation.0 + 1).max(now_ms);
    let step = (number % NUMBERS + NUMBERS - least % NUMBERS) % NUMBERS;
    record.generation = Generation(least + step - 1);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::transition::{Outcome, Transition};

    fn start(record: &mut AppRecord, number: u64, now_ms: u64) -> Generation {
        prepare(record, number, now_ms);
        let add = Transition::Add {
            node: format!("host-{number}"),
            start_timeout_ms: 1_000,
            max: u32::MAX,
            replacing: false,
            lost: Vec::new(),
        };
        match record.apply(&add, now_ms) {
            Outcome::Own(generation) => generation,
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn hosts_that_know_nothing_of_each_other_give_out_different_generations(
            base in 0u64..2_000_000_000_000,
            numbers in prop::collection::btree_set(1u64..NUMBERS, 2..6),
            starts in prop::collection::vec(0u64..3, 1..30),
        ) {
            let mut all = std::collections::BTreeSet::new();
            for number in numbers {
                let mut record = AppRecord { generation: Generation(base), ..AppRecord::default() };
                let mut now = base;
                for pause in &starts {
                    now += pause;
                    let before = record.generation;
                    let given = start(&mut record, number, now);
                    prop_assert!(given > before && given.0 >= now);
                    prop_assert!(given.0 < before.0.max(now) + 1 + NUMBERS);
                    prop_assert!(all.insert(given), "{given} was given out twice");
                }
            }
        }
    }
}
