//! Whether an app loses memory: whether its instances grow with the requests that they answer, and go on growing.
//!
//! Pure. A lifetime is a curve of memory over requests; what is looked at are its low points, for a garbage collector's
//! high ones say nothing. An app that fills a cache grows too, but ever less: its curve levels off. So one is suspected
//! only when several lifetimes have grown as evenly at their end as at their begin, and alike at equal counts of requests.

use cmdb::units::Bytes;

/// Most points of a curve; when there are more, each two become one.
const MOST_POINTS: usize = 48;
/// A curve with fewer says nothing.
const LEAST_POINTS: usize = 12;
/// Lifetimes that must agree.
pub const LIFETIMES: usize = 3;
/// Growth that is less than this is nobody's business.
const LEAST_GROWTH: u64 = 1 << 20;
/// The last part of a curve must have grown by at least this share of an earlier one, per cent. A logarithm has 47.
const STEADY: u64 = 60;
/// By so many times the lifetimes may differ in their growth per request.
const ALIKE: u64 = 3;

/// Memory of one instance over the requests that it has answered.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Curve {
    /// Requests, rising, and bytes.
    points: Vec<(u64, u64)>,
    /// Requests between two points, at least.
    stride: u64,
}

/// Why an app is suspected.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Evidence {
    /// In how many lifetimes it was seen.
    pub lifetimes: usize,
    /// The count of requests at which they are compared.
    pub requests: u64,
    /// Mean growth for each request, bytes.
    pub per_request: u64,
    /// What the lifetimes had come to then, on average, bytes.
    pub reached: u64,
}

impl Curve {
    /// After `requests` in all its memory is `bytes`.
    pub fn push(&mut self, requests: u64, bytes: u64) {
        if let Some((last, lowest)) = self.points.last_mut()
            && requests < *last + self.stride.max(1)
        {
            *lowest = (*lowest).min(bytes);
            return;
        }
        self.points.push((requests, bytes));
        if self.points.len() > MOST_POINTS {
            self.stride = self.stride.max(1) * 2;
            self.points = self
                .points
                .chunks(2)
                .map(|pair| (pair[0].0, pair.iter().map(|(_, bytes)| *bytes).min().unwrap_or(0)))
                .collect();
        }
    }

    /// Whether a point for so many requests would be a new one.
    #[must_use]
    pub fn wants(&self, requests: u64) -> bool {
        self.points.last().is_none_or(|(last, _)| requests >= *last + self.stride.max(1))
    }

    /// Whether it is long enough to be judged.
    #[must_use]
    pub fn is_telling(&self) -> bool {
        self.points.len() >= LEAST_POINTS
    }

    /// Whether it grows as much at its end as before, its warming up left out.
    #[must_use]
    pub fn grows_on(&self) -> bool {
        if !self.is_telling() {
            return false;
        }
        let warm = &self.points[self.points.len() / 4..];
        let low = |part: usize| {
            let (from, to) = (warm.len() * part / 4, warm.len() * (part + 1) / 4);
            warm[from..to].iter().map(|(_, bytes)| *bytes).min().unwrap_or(0)
        };
        let lows = [low(0), low(1), low(2), low(3)];
        let steps = [1, 2, 3].map(|part| lows[part].saturating_sub(lows[part - 1]));
        let before = steps[0].max(steps[1]);
        lows[3].saturating_sub(lows[0]) >= LEAST_GROWTH
            && steps.iter().all(|step| *step > 0)
            && steps[2].saturating_mul(100) >= before.saturating_mul(STEADY)
    }

    fn last_requests(&self) -> u64 {
        self.points.last().map_or(0, |(requests, _)| *requests)
    }

    /// Memory after so many requests, between two points on the line between them.
    fn at(&self, requests: u64) -> u64 {
        let after = self.points.partition_point(|(at, _)| *at < requests);
        match (after.checked_sub(1).and_then(|before| self.points.get(before)), self.points.get(after)) {
            (Some((from, low)), Some((to, high))) => {
                let share = u128::from(requests - from) * u128::from(high.abs_diff(*low));
                let part = u64::try_from(share / u128::from((to - from).max(1))).unwrap_or(u64::MAX);
                if high >= low { low.saturating_add(part) } else { low.saturating_sub(part) }
            }
            (Some((_, bytes)), None) | (None, Some((_, bytes))) => *bytes,
            (None, None) => 0,
        }
    }
}

/// Judges an app by its lifetimes, the last ones last. `None`: there is no reason to suspect it.
#[must_use]
pub fn judge<'a>(lifetimes: impl DoubleEndedIterator<Item = &'a Curve>) -> Option<Evidence> {
    let last: Vec<&Curve> = lifetimes.rev().filter(|curve| curve.is_telling()).take(LIFETIMES).collect();
    if last.len() < LIFETIMES || !last.iter().all(|curve| curve.grows_on()) {
        return None;
    }
    let requests = last.iter().map(|curve| curve.last_requests()).min()?;
    let span = (requests - requests / 4).max(1);
    let slopes: Vec<u64> =
        last.iter().map(|curve| curve.at(requests).saturating_sub(curve.at(requests / 4)) / span).collect();
    let (least, most) = (*slopes.iter().min()?, *slopes.iter().max()?);
    if least == 0 || most > least.saturating_mul(ALIKE) {
        return None;
    }
    let count = u64::try_from(last.len()).unwrap_or(1);
    Some(Evidence {
        lifetimes: last.len(),
        requests,
        per_request: slopes.iter().sum::<u64>() / count,
        reached: last.iter().map(|curve| curve.at(requests) / count).sum(),
    })
}

impl Evidence {
    /// For people. `limit`: the app's memory limit, bytes.
    #[must_use]
    pub fn words(&self, limit: u64) -> String {
        let Self { lifetimes, requests, per_request, reached } = *self;
        let left = limit.saturating_sub(reached) / per_request.max(1);
        format!(
            "it seems to lose memory: in each of its last {lifetimes} lifetimes it grew by about {} a request, to {} after \
             {requests} requests, without levelling off; at this rate its limit of {} is reached after about {} requests",
            Bytes(per_request),
            Bytes(reached),
            Bytes(limit),
            requests.saturating_add(left),
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A lifetime of `count` requests, looked at every `every` of them.
    fn life(count: u64, every: u64, memory: impl Fn(u64) -> u64) -> Curve {
        let mut curve = Curve::default();
        (0..=count).step_by(usize::try_from(every).unwrap()).for_each(|n| curve.push(n, memory(n)));
        curve
    }

    fn verdict(lives: &[Curve]) -> Option<Evidence> {
        judge(lives.iter())
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_leak_is_told_with_its_evidence() {
        let lives: Vec<Curve> = (0..3).map(|_| life(1_000, 1, |n| 20 * MIB + n * 50_000)).collect();
        let evidence = verdict(&lives).unwrap();
        assert!((49_000..51_000).contains(&evidence.per_request), "{evidence:?}");
        let words = evidence.words(128 * MIB);
        assert!(words.contains("last 3 lifetimes") && words.contains("128MiB"), "{words}");
        assert_eq!(verdict(&lives[..2]), None, "two lifetimes are not several");
    }

    #[test]
    fn growth_that_differs_from_life_to_life_is_something_else() {
        let lives: Vec<Curve> =
            [10_000, 40_000, 200_000].map(|leak| life(1_000, 1, |n| 20 * MIB + n * leak)).into();
        assert_eq!(verdict(&lives), None);
    }

    #[test]
    fn a_curve_stays_small_and_keeps_its_low_points() {
        let curve = life(100_000, 1, |n| 10 * MIB + n + if n.is_multiple_of(7) { 0 } else { 5 * MIB });
        assert!(curve.points.len() <= MOST_POINTS);
        assert!(curve.points.iter().all(|(n, bytes)| *bytes <= 10 * MIB + n + 8), "{curve:?}");
    }

    proptest! {
        /// Whatever an instance begins with, and however its garbage collector lets it swing.
        #[test]
        fn an_even_leak_is_suspected(
            base in 4u64..200, leak in 8u64..1_000, count in 200u64..2_000, swing in 0u64..64, period in 2u64..12,
        ) {
            let leak = leak * 1024;
            // Swings that are small beside what is lost in a quarter of the curve.
            let swing = swing * leak * count / 64 / 40;
            let lives: Vec<Curve> = (0..3u64)
                .map(|life_number| {
                    life(count, 1, |n| (base + life_number) * MIB + n * leak + swing * ((n + life_number) % period) / period)
                })
                .collect();
            prop_assume!(count * leak > 8 * MIB);
            prop_assert!(verdict(&lives).is_some());
        }

        #[test]
        fn a_cache_that_levels_off_is_not_accused(
            base in 4u64..200, size in 1u64..2_000, full_at in 1u64..60, count in 100u64..3_000, every in 1u64..8,
        ) {
            let full = (count * full_at / 100).max(1);
            let lives: Vec<Curve> =
                (0..5).map(|_| life(count, every, |n| base * MIB + size * MIB * n.min(full) / full)).collect();
            prop_assert_eq!(verdict(&lives), None);
        }

        #[test]
        fn a_cache_that_meets_ever_fewer_new_things_is_not_accused(
            base in 4u64..200, size in 1u64..2_000, half in 1u64..20, count in 200u64..3_000,
        ) {
            // Of ever fewer requests does it keep something: 1 - 1/2, 1 - 1/4, ... of all there is.
            let half = (count * half / 100).max(1);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "2,000 MiB at most")]
            let kept = |n: u64| {
                let share = 1.0 - 0.5f64.powf(n as f64 / half as f64);
                (size as f64 * share * MIB as f64) as u64
            };
            let lives: Vec<Curve> = (0..5).map(|_| life(count, 1, |n| base * MIB + kept(n))).collect();
            prop_assert_eq!(verdict(&lives), None);
        }

        #[test]
        fn memory_that_comes_and_goes_is_not_accused(
            values in prop::collection::vec(0u64..64 * MIB, 12..300),
        ) {
            // The same random walk in each life would be evidence of something; these have nothing in common.
            let lives: Vec<Curve> = (0..3usize)
                .map(|shift| {
                    let at = |n: u64| values[(usize::try_from(n).unwrap() * (shift + 1) + shift) % values.len()];
                    life(400, 1, |n| 64 * MIB + at(n))
                })
                .collect();
            prop_assert_eq!(verdict(&lives), None);
        }

        #[test]
        fn nothing_makes_it_panic(points in prop::collection::vec((any::<u64>(), any::<u64>()), 0..200)) {
            let mut curve = Curve::default();
            let mut requests = 0u64;
            for (step, bytes) in points {
                requests = requests.saturating_add(step % (1 << 40));
                curve.push(requests, bytes);
            }
            let lives = [curve.clone(), curve.clone(), curve];
            if let Some(evidence) = verdict(&lives) {
                prop_assert!(!evidence.words(0).is_empty());
            }
        }
    }
}
