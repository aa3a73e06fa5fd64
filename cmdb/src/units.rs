//! Quantities with units, as operators write them: `"30%"`, `"256MiB"`, `"10m"`.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

/// Why a quantity could not be read; the text says what is expected.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct UnitError(pub String);

/// CPU time in thousandths of one core (`"30%"` = 300, `"1.5"` cores = 1500, `"150%"` = 1500).
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct Millicores(pub u32);

/// A number of bytes (`"256MiB"`, `"1GiB"`, `"64KiB"`, `"100MB"`, `"4096"`).
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl FromStr for Millicores {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let expected = || {
            UnitError(format!(
                "\"{text}\" is not an amount of CPU; write a share of one core such as \"30%\", or a number of cores such as \"1.5\""
            ))
        };
        let (number, scale) = match text.strip_suffix('%') {
            Some(percent) => (percent.trim_end(), 10_000),
            None => (text, 1_000_000),
        };
        let micro = decimal(number, scale).ok_or_else(expected)?;
        let milli = u32::try_from(micro / 1000).map_err(|_| expected())?;
        if milli < 10 {
            return Err(UnitError(format!("\"{text}\" is too little CPU; the least is \"1%\"")));
        }
        if milli > 1_024_000 {
            return Err(UnitError(format!("\"{text}\" is more than 1024 cores")));
        }
        Ok(Self(milli))
    }
}

impl fmt::Display for Millicores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(10) {
            write!(f, "{}%", self.0 / 10)
        } else {
            write!(f, "{}.{}%", self.0 / 10, self.0 % 10)
        }
    }
}

impl FromStr for Bytes {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let expected = || {
            UnitError(format!(
                "\"{text}\" is not a size; write for example \"256MiB\", \"1GiB\" or \"64KiB\""
            ))
        };
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let scale: u64 = match unit.trim() {
            "" | "B" => 1,
            "KiB" | "K" => 1 << 10,
            "MiB" | "M" => 1 << 20,
            "GiB" | "G" => 1 << 30,
            "TiB" | "T" => 1 << 40,
            "kB" | "KB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "TB" => 1_000_000_000_000,
            _ => return Err(expected()),
        };
        decimal(number, scale).map(Self).ok_or_else(expected)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, scale) in [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
            if self.0 >= scale {
                let tenths = self.0.saturating_mul(10) / scale;
                return if tenths.is_multiple_of(10) {
                    write!(f, "{}{unit}", tenths / 10)
                } else {
                    write!(f, "{}.{}{unit}", tenths / 10, tenths % 10)
                };
            }
        }
        write!(f, "{}B", self.0)
    }
}

/// Reads a duration such as `"500ms"`, `"30s"`, `"10m"`, `"1h"`, `"7d"` or `"1h30m"`.
///
/// # Errors
/// Says what is expected when the text is anything else, or is longer than 10 years.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let expected = || {
        UnitError(format!(
            "\"{text}\" is not a duration; write for example \"500ms\", \"30s\", \"10m\", \"1h\" or \"1h30m\""
        ))
    };
    let mut rest = text;
    let mut total: u64 = 0;
    if rest.is_empty() {
        return Err(expected());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(expected)?;
        let (number, tail) = rest.split_at(digits);
        let unit_len = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_len);
        let us: u64 = match unit {
            "us" | "µs" => 1,
            "ms" => 1_000,
            "s" => 1_000_000,
            "m" | "min" => 60_000_000,
            "h" => 3_600_000_000,
            "d" => 86_400_000_000,
            _ => return Err(expected()),
        };
        total = decimal(number, us).and_then(|part| total.checked_add(part)).ok_or_else(expected)?;
        rest = tail;
    }
    if total > 10 * 366 * 86_400_000_000 {
        return Err(UnitError(format!("\"{text}\" is longer than ten years")));
    }
    Ok(Duration::from_micros(total))
}

/// `number` × `scale`, exact, for a plain decimal such as `1.5`; `None` when it is not one or does not fit.
fn decimal(number: &str, scale: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |s: &str| s.len() <= 18 && s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || number.ends_with('.') {
        return None;
    }
    let whole = whole.parse::<u64>().ok()?.checked_mul(scale)?;
    let mut part = 0u128;
    if !fraction.is_empty() {
        let numerator: u128 = fraction.parse().ok()?;
        part = numerator * u128::from(scale) / 10u128.pow(u32::try_from(fraction.len()).ok()?);
    }
    whole.checked_add(u64::try_from(part).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_units_are_read_exactly() {
        assert_eq!("30%".parse(), Ok(Millicores(300)));
        assert_eq!("1.5".parse(), Ok(Millicores(1500)));
        assert_eq!("150%".parse(), Ok(Millicores(1500)));
        assert_eq!("256MiB".parse(), Ok(Bytes(256 << 20)));
        assert_eq!("1.5GiB".parse(), Ok(Bytes(3 << 29)));
        assert_eq!(parse_duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("0.5s"), Ok(Duration::from_millis(500)));
    }

    #[test]
    fn nonsense_is_refused_with_the_mend() {
        for text in ["", "%", "-1%", "0%", "abc", "1..5", "1e3"] {
            assert!(text.parse::<Millicores>().is_err(), "{text}");
        }
        for text in ["", "MiB", "12XB", "-1", "99999999999999TiB"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
        for text in ["", "s", "10", "5 s", "1y", "99999999999999999h"] {
            let error = parse_duration(text).unwrap_err();
            assert!(
                error.to_string().contains("\"30s\"") || error.to_string().contains("ten years"),
                "{error}"
            );
        }
    }

    #[test]
    fn what_is_shown_can_be_read_again() {
        for text in ["30%", "256MiB", "1.5GiB"] {
            let shown = text
                .parse::<Millicores>()
                .map(|v| v.to_string())
                .or_else(|_| text.parse::<Bytes>().map(|v| v.to_string()));
            assert_eq!(shown.as_deref(), Ok(text));
        }
    }
}
