//! Quantities and foreign text as an operator reads them.

use std::{borrow::Cow, fmt::Write as _};

/// A span of time in at most two units: `850µs`, `3.4ms`, `12.5s`, `3m12s`, `2h05m`, `4d03h`.
pub(crate) fn duration_us(us: u64) -> String {
    match us {
        0..1_000 => format!("{us}µs"),
        1_000..1_000_000 => tenths(us, 1_000, "ms"),
        1_000_000..60_000_000 => tenths(us, 1_000_000, "s"),
        _ => {
            let s = us / 1_000_000;
            match s {
                0..3_600 => format!("{}m{:02}s", s / 60, s % 60),
                3_600..86_400 => format!("{}h{:02}m", s / 3_600, s / 60 % 60),
                _ => format!("{}d{:02}h", s / 86_400, s / 3_600 % 24),
            }
        }
    }
}

/// [`duration_us`] of milliseconds.
pub(crate) fn duration_ms(ms: u64) -> String {
    match ms {
        0 => "0ms".to_owned(),
        _ => duration_us(ms.saturating_mul(1_000)),
    }
}

/// Milliseconds with three decimals: parts written so add up to their whole, digit by digit.
pub(crate) fn exact_ms(us: u64) -> String {
    format!("{}.{:03} ms", us / 1_000, us % 1_000)
}

/// Rounded down to a tenth, `.0` left out.
fn tenths(value: u64, unit: u64, name: &str) -> String {
    let tenths = value / (unit / 10);
    match tenths % 10 {
        0 => format!("{}{name}", tenths / 10),
        rest => format!("{}.{rest}{name}", tenths / 10),
    }
}

/// A time of day here, from ms since the Unix epoch: `2026-11-24 08:45:12.345`.
pub(crate) fn local_time(unix_ms: u64) -> String {
    let at = i64::try_from(unix_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    match at {
        Some(at) => {
            at.to_zoned_datetime(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S.%3f").to_string()
        }
        None => format!("{unix_ms} ms"),
    }
}

/// Foreign text on one line: what a container, a client or a file says must not steer the operator's terminal, nor
/// forge lines. Control and direction-changing characters are shown as escapes.
pub(crate) fn clean(text: &str) -> Cow<'_, str> {
    clean_but(text, &['\t'])
}

/// [`clean`], with its line ends left as they are: for text that we laid out ourselves around foreign pieces.
pub(crate) fn clean_lines(text: &str) -> Cow<'_, str> {
    clean_but(text, &['\t', '\n'])
}

fn clean_but<'a>(text: &'a str, allowed: &[char]) -> Cow<'a, str> {
    let harmful = |c: char| {
        !allowed.contains(&c)
            && (c.is_control()
                || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'))
    };
    if !text.contains(harmful) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if harmful(c) {
            let _ = match c {
                '\n' => write!(shown, "\\n"),
                '\r' => write!(shown, "\\r"),
                _ if u32::from(c) < 256 => write!(shown, "\\x{:02x}", u32::from(c)),
                _ => write!(shown, "\\u{{{:x}}}", u32::from(c)),
            };
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_the_unit_that_fits() {
        for (us, shown) in [
            (0, "0µs"),
            (850, "850µs"),
            (3_450, "3.4ms"),
            (12_000, "12ms"),
            (12_540_000, "12.5s"),
            (59_999_999, "59.9s"),
            (192_000_000, "3m12s"),
            (7_500_000_000, "2h05m"),
            (356_400_000_000, "4d03h"),
        ] {
            assert_eq!(duration_us(us), shown);
        }
        assert_eq!(duration_ms(0), "0ms");
        assert_eq!(exact_ms(2_071), "2.071 ms");
    }

    #[test]
    fn a_container_cannot_steer_the_terminal() {
        assert_eq!(clean("\x1b[2Jgone\r\nforged\u{202e}"), "\\x1b[2Jgone\\r\\nforged\\u{202e}");
        assert_eq!(clean("Grüße\tan alle"), "Grüße\tan alle");
        assert_eq!(clean_lines("a\nb\x07"), "a\nb\\x07");
    }
}
