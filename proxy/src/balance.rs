//! Which of several ready instances gets a request.

use cmdb::app::Pick;

/// Picks one of `ready` and enters it. `enter` takes the place or says no (full, or ready no longer); `load` is how busy it is.
/// Every instance is tried before the answer is `None`.
pub fn pick<T>(
    ready: &[T],
    how: Pick,
    load: impl Fn(&T) -> u32,
    mut enter: impl FnMut(&T) -> bool,
) -> Option<&T> {
    let first = match (ready.len(), how) {
        (0, _) => return None,
        (1, _) => 0,
        (count, Pick::Random) => fastrand::usize(..count),
        (count, Pick::P2c) => {
            let one = fastrand::usize(..count);
            // The other is drawn from the rest, so that they differ.
            let other = (one + 1 + fastrand::usize(..count - 1)) % count;
            if load(&ready[other]) < load(&ready[one]) { other } else { one }
        }
    };
    let (before, from) = ready.split_at(first);
    from.iter().chain(before).find(|candidate| enter(candidate))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_of_none() {
        assert_eq!(pick::<u32>(&[], Pick::Random, |load| *load, |_| true), None);
    }

    #[test]
    fn random_reaches_all() {
        let mut hits = [0u32; 4];
        for _ in 0..4_000 {
            let picked = pick(&[0usize, 1, 2, 3], Pick::Random, |_| 0, |_| true).unwrap();
            hits[*picked] += 1;
        }
        assert!(hits.iter().all(|hits| (800..1200).contains(hits)), "{hits:?}");
    }

    #[test]
    fn of_two_choices_the_less_busy_wins() {
        for _ in 0..100 {
            assert_eq!(pick(&[7u32, 3], Pick::P2c, |load| *load, |_| true), Some(&3));
        }
    }

    #[test]
    fn a_full_one_is_passed_over() {
        for how in [Pick::Random, Pick::P2c] {
            for _ in 0..50 {
                assert_eq!(pick(&[1u32, 2, 3], how, |load| *load, |candidate| *candidate == 2), Some(&2));
            }
        }
        assert_eq!(pick(&[1u32, 2, 3], Pick::Random, |load| *load, |_| false), None);
    }
}
