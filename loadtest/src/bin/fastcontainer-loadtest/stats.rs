//! Means, quantiles, curves.

/// The mean; `None` of nothing.
pub(crate) fn mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0.0);
    for value in values {
        sum += value;
        count += 1.0;
    }
    (count > 0.0).then(|| sum / count)
}

/// The value that `share` (0 to 1) of all are not above; `None` of nothing.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a rank"
)]
pub(crate) fn quantile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * share).ceil().max(1.0) as usize - 1;
    sorted.get(rank.min(sorted.len().checked_sub(1)?)).copied()
}

/// Means over slots of `width`: (begin of the slot, mean), for slots that have values.
pub(crate) fn means(points: &[(f64, f64)], width: f64) -> Vec<(f64, f64)> {
    let mut slots: std::collections::BTreeMap<i64, (f64, f64)> = std::collections::BTreeMap::new();
    for (at, value) in points {
        #[expect(clippy::cast_possible_truncation, reason = "a number of a slot")]
        let slot = (at / width).floor() as i64;
        let (sum, count) = slots.entry(slot).or_default();
        *sum += value;
        *count += 1.0;
    }
    #[expect(clippy::cast_precision_loss, reason = "a number of a slot")]
    slots.into_iter().map(|(slot, (sum, count))| (slot as f64 * width, sum / count)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_occurred() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(quantile(&values, 0.5), Some(2.0));
        assert_eq!(quantile(&values, 0.99), Some(4.0));
        assert_eq!(quantile(&values, 0.0), Some(1.0));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn means_are_taken_slot_by_slot() {
        assert_eq!(means(&[(0.1, 2.0), (0.9, 4.0), (2.5, 8.0)], 1.0), [(0.0, 3.0), (2.0, 8.0)]);
        assert_eq!(mean([]), None);
        assert_eq!(mean([1.0, 2.0]), Some(1.5));
    }
}
