//! Which of several ready instances gets a request.

use std::time::Duration;

use cmdb::app::Pick;

/// A full share of the requests; smaller ones are thousandths of it.
pub const FULL_SHARE: u32 = 1_000;
/// What an instance begins with: less would leave a rarely visited app's new instance without a request to grow on.
const FIRST_SHARE: u32 = FULL_SHARE / 10;

/// The share of an instance that has served for `age`, when it grows to a full one over `slow_start`.
#[must_use]
pub fn share(age: Duration, slow_start: Duration) -> u32 {
    if age >= slow_start {
        return FULL_SHARE;
    }
    let grown = age.as_micros() * u128::from(FULL_SHARE) / slow_start.as_micros().max(1);
    u32::try_from(grown).unwrap_or(FULL_SHARE).clamp(FIRST_SHARE, FULL_SHARE)
}

/// Picks one of `ready` and enters it. `enter` takes the place or says no (full, or ready no longer); `load` is how busy it is;
/// `share` is each one's share, `None` while all have a full one. Every instance is tried before the answer is `None`.
pub fn pick<'a, T>(
    ready: &'a [T],
    how: Pick,
    load: impl Fn(&T) -> u32,
    share: Option<&dyn Fn(&T) -> u32>,
    mut enter: impl FnMut(&T) -> bool,
) -> Option<&'a T> {
    let first = match (ready.len(), how, share) {
        (0, ..) => return None,
        (1, ..) => 0,
        (count, Pick::Random, None) => fastrand::usize(..count),
        (_, Pick::Random, Some(share)) => draw(ready, share, None),
        (count, Pick::P2c, None) => {
            let one = fastrand::usize(..count);
            // The other is drawn from the rest, so that they differ.
            let other = (one + 1 + fastrand::usize(..count - 1)) % count;
            if load(&ready[other]) < load(&ready[one]) { other } else { one }
        }
        (_, Pick::P2c, Some(share)) => {
            let one = draw(ready, share, None);
            let other = draw(ready, share, Some(one));
            // A share of a tenth is as busy with one request as a full one with ten.
            let busy = |at: usize, by: usize| u64::from(load(&ready[at])) * u64::from(share(&ready[by]));
            if busy(other, one) < busy(one, other) { other } else { one }
        }
    };
    let (before, from) = ready.split_at(first);
    from.iter().chain(before).find(|candidate| enter(candidate))
}

/// Draws one by its share, never `but`.
fn draw<T>(ready: &[T], share: &dyn Fn(&T) -> u32, but: Option<usize>) -> usize {
    let share = |(at, one): (usize, &T)| if Some(at) == but { 0 } else { u64::from(share(one)) };
    let all: u64 = ready.iter().enumerate().map(share).sum();
    if all == 0 {
        return but.map_or(0, |but| (but + 1) % ready.len());
    }
    at(ready.iter().enumerate().map(share), fastrand::u64(..all))
}

/// To whom `point` belongs when each has as many points as its share, in a row.
fn at(shares: impl Iterator<Item = u64>, mut point: u64) -> usize {
    let mut last = 0;
    for (index, share) in shares.enumerate() {
        last = index;
        match point.checked_sub(share) {
            Some(rest) => point = rest,
            None => return index,
        }
    }
    // A share that grew between the sum and this walk only takes points from those behind it; one cannot shrink.
    last
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn none_of_none() {
        assert_eq!(pick::<u32>(&[], Pick::Random, |load| *load, None, |_| true), None);
    }

    #[test]
    fn random_reaches_all() {
        let mut hits = [0u32; 4];
        for _ in 0..4_000 {
            let picked = pick(&[0usize, 1, 2, 3], Pick::Random, |_| 0, None, |_| true).unwrap();
            hits[*picked] += 1;
        }
        assert!(hits.iter().all(|hits| (800..1200).contains(hits)), "{hits:?}");
    }

    #[test]
    fn of_two_choices_the_less_busy_wins() {
        for _ in 0..100 {
            assert_eq!(pick(&[7u32, 3], Pick::P2c, |load| *load, None, |_| true), Some(&3));
        }
    }

    #[test]
    fn a_full_one_is_passed_over() {
        for how in [Pick::Random, Pick::P2c] {
            for share in [None, Some(&(|_: &u32| 100u32) as &dyn Fn(&u32) -> u32)] {
                for _ in 0..50 {
                    let picked = pick(&[1u32, 2, 3], how, |load| *load, share, |candidate| *candidate == 2);
                    assert_eq!(picked, Some(&2));
                }
            }
        }
        assert_eq!(pick(&[1u32, 2, 3], Pick::Random, |load| *load, None, |_| false), None);
    }

    #[test]
    fn a_tenth_of_a_share_is_a_tenth_of_the_requests() {
        for how in [Pick::Random, Pick::P2c] {
            let mut hits = [0u32; 2];
            for _ in 0..11_000 {
                let share = |one: &usize| if *one == 0 { FULL_SHARE } else { FULL_SHARE / 10 };
                hits[*pick(&[0usize, 1], how, |_| 0, Some(&share), |_| true).unwrap()] += 1;
            }
            assert!((800..1200).contains(&hits[1]), "{how:?}: {hits:?}");
        }
    }

    #[test]
    fn of_two_choices_the_load_is_weighed_by_the_share() {
        // One request on a tenth of a share is more than nine on a full one, and less than eleven.
        let share = |one: &(u32, u32)| one.1;
        for (load, winner) in [(9, 0), (11, 1)] {
            let two = [(load, FULL_SHARE), (1, FULL_SHARE / 10)];
            for _ in 0..50 {
                assert_eq!(pick(&two, Pick::P2c, |one| one.0, Some(&share), |_| true), Some(&two[winner]));
            }
        }
    }

    proptest! {
        #[test]
        fn a_share_grows_and_is_never_nothing(slow_ms in 0u64..100_000, a in 0u64..200_000, b in 0u64..200_000) {
            let of = |age| share(Duration::from_millis(age), Duration::from_millis(slow_ms));
            let (earlier, later) = (of(a.min(b)), of(a.max(b)));
            prop_assert!((FIRST_SHARE..=FULL_SHARE).contains(&earlier));
            prop_assert!(earlier <= later);
            prop_assert_eq!(of(slow_ms), FULL_SHARE);
        }

        #[test]
        fn each_has_exactly_its_share_of_the_points(shares in prop::collection::vec(0u64..50, 1..8)) {
            let all: u64 = shares.iter().sum();
            let mut hits = vec![0u64; shares.len()];
            (0..all).for_each(|point| hits[at(shares.iter().copied(), point)] += 1);
            prop_assert_eq!(hits, shares);
        }

        #[test]
        fn whoever_has_room_is_found(
            rooms in prop::collection::vec((0u32..3, 0u32..1_000, any::<bool>()), 0..8),
            p2c in any::<bool>(), ramping in any::<bool>(),
        ) {
            let share = |one: &(u32, u32, bool)| one.1;
            let how = if p2c { Pick::P2c } else { Pick::Random };
            let picked = if ramping {
                pick(&rooms, how, |one| one.0, Some(&share), |one| one.2)
            } else {
                pick(&rooms, how, |one| one.0, None, |one| one.2)
            };
            prop_assert_eq!(picked.is_some(), rooms.iter().any(|one| one.2));
            prop_assert!(picked.is_none_or(|one| one.2));
        }
    }
}
