//! `usage`: what apps have used, as the launcher's ledger knows it.

use cmdb::units::{Bytes, parse_duration};
use jiff::{Timestamp, civil, tz::TimeZone};
use launcher_client::{
    usage::{Figures, Span, Usage},
    wire::{Reply, Request},
};
use serde::Serialize;

use crate::{
    cli::{self, By, Global},
    failure::Failure,
    output::{Output, Style},
    table::{self, Align},
    target::Target,
    text,
};

/// Runs the command.
pub(crate) async fn run(global: &Global, options: cli::Usage, out: &mut Output) -> Result<(), Failure> {
    let target = Target::reach(global, &options.remote).await?;
    let by = match options.by {
        By::App => Span::All,
        By::Day => Span::Day,
        By::Hour => Span::Hour,
    };
    let request = Request::Usage { since_unix_s: options.since, by, app: options.app.clone() };
    let lines = target
        .list(request, |reply| match reply {
            Reply::Usage(usage) => Some(usage),
            _ => None,
        })
        .await?;
    let (all, apps): (Vec<Usage>, Vec<Usage>) = lines.into_iter().partition(|line| line.app.is_none());
    if out.is_json() {
        let lines: Vec<Line<'_>> = apps.iter().chain(&all).map(Line::of).collect();
        return out.json(&lines);
    }
    if options.csv {
        for line in csv(&apps) {
            out.line(&line)?;
        }
        return Ok(());
    }
    if apps.is_empty() {
        return out.line(&format!("nothing was used since {}", hour(options.since)));
    }
    out.line(&out.paint(Style::Dim, &format!("since {}", hour(options.since))))?;
    let mut lines = table(&apps, options.by).into_iter();
    if let Some(titles) = lines.next() {
        out.line(&out.paint(Style::Bold, &titles))?;
    }
    lines.try_for_each(|line| out.line(&line))?;
    if options.app.is_none() {
        let cpu: u64 = all.iter().map(|line| line.figures.cpu_us).sum();
        let counted =
            format!("all containers together, as the kernel counts: {} of CPU", text::duration_us(cpu));
        out.line(&out.paint(Style::Dim, &counted))?;
    }
    Ok(())
}

/// Reads `--since`: a time in seconds since the Unix epoch.
pub(crate) fn since(text: &str) -> Result<u64, String> {
    let now = Timestamp::now();
    let hour = text.split_once('T').map_or((text, "00"), |(day, hour)| (day, hour));
    let at = if let Ok(day) = hour.0.parse::<civil::Date>() {
        let at = hour.1.parse::<i8>().ok().filter(|hour| (0..24).contains(hour));
        at.and_then(|hour| TimeZone::UTC.to_timestamp(day.at(hour, 0, 0, 0)).ok())
    } else {
        parse_duration(text).ok().and_then(|ago| now.checked_sub(ago).ok())
    };
    at.and_then(|at| u64::try_from(at.as_second()).ok()).ok_or_else(|| {
        format!("\"{text}\" is no time; write how long ago, such as 24h or 7d, or a day or hour in UTC, such as 2026-11-01 or 2026-11-01T13")
    })
}

/// A line for programs: everything in plain units, and the begin of its span for people.
#[derive(Serialize)]
struct Line<'a> {
    from_utc: String,
    #[serde(flatten)]
    usage: &'a Usage,
}

impl<'a> Line<'a> {
    fn of(usage: &'a Usage) -> Self {
        Self { from_utc: hour(usage.from_unix_s), usage }
    }
}

fn csv(apps: &[Usage]) -> Vec<String> {
    let titles =
        "from_utc,app,cpu_us,memory_byte_s,running_us,frozen_us,held_us,requests,bytes_in,bytes_out,wakes";
    let line = |usage: &Usage| {
        let app = usage.app.as_ref().map_or("", |app| app.as_str());
        let values: Vec<String> = usage.figures.to_array().iter().map(ToString::to_string).collect();
        // Neither names nor times hold commas or quotes.
        format!("{},{app},{}", hour(usage.from_unix_s), values.join(","))
    };
    std::iter::once(titles.to_owned()).chain(apps.iter().map(line)).collect()
}

fn table(apps: &[Usage], by: By) -> Vec<String> {
    use Align::{Left, Right};
    let mut titles = vec![
        ("APP", Left),
        ("CPU", Right),
        ("MEMORY", Right),
        ("RUNNING", Right),
        ("FROZEN", Right),
        ("HELD", Right),
        ("REQUESTS", Right),
        ("IN", Right),
        ("OUT", Right),
        ("WAKES", Right),
    ];
    let from = match by {
        By::App => None,
        By::Day => Some(("DAY (UTC)", 10)),
        By::Hour => Some(("HOUR (UTC)", 16)),
    };
    titles.splice(0..0, from.map(|(title, _)| (title, Left)));
    let mut sum = Figures::default();
    let mut rows: Vec<Vec<String>> = Vec::new();
    for usage in apps {
        sum += usage.figures;
        let app = usage.app.as_ref().map_or(String::new(), ToString::to_string);
        let when = from.map(|(_, length)| {
            hour(usage.from_unix_s).replace('T', " ").chars().take(length).collect::<String>()
        });
        rows.push(when.into_iter().chain([app]).chain(cells(&usage.figures)).collect());
    }
    if rows.len() > 1 {
        let when = from.map(|_| String::new());
        rows.push(when.into_iter().chain(["(all)".to_owned()]).chain(cells(&sum)).collect());
    }
    table::lines(&titles, &rows)
}

fn cells(figures: &Figures) -> [String; 9] {
    [
        text::duration_us(figures.cpu_us),
        memory_hours(figures.memory_byte_s),
        text::duration_us(figures.running_us),
        text::duration_us(figures.frozen_us),
        text::duration_us(figures.held_us),
        figures.requests.to_string(),
        Bytes(figures.bytes_in).to_string(),
        Bytes(figures.bytes_out).to_string(),
        figures.wakes.to_string(),
    ]
}

/// Bytes × seconds as MiB or GiB × hours.
fn memory_hours(byte_s: u64) -> String {
    let hundredths = |unit: u64| byte_s / (unit * 36);
    match hundredths(1 << 20) {
        mib @ 0..102_400 => format!("{}.{:02}MiB·h", mib / 100, mib % 100),
        _ => format!("{}.{:02}GiB·h", hundredths(1 << 30) / 100, hundredths(1 << 30) % 100),
    }
}

/// `2026-11-24T13:00Z`
fn hour(unix_s: u64) -> String {
    let at = i64::try_from(unix_s).ok().and_then(|s| Timestamp::from_second(s).ok());
    at.map_or_else(|| format!("{unix_s} s"), |at| at.strftime("%Y-%m-%dT%H:00Z").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_written_as_operators_write_it() {
        assert_eq!(since("2026-11-01"), Ok(1_793_491_200));
        assert_eq!(since("2026-11-01T13"), Ok(1_793_491_200 + 13 * 3600));
        let now = u64::try_from(Timestamp::now().as_second()).unwrap();
        assert!(since("24h").unwrap().abs_diff(now - 86_400) < 10);
        for bad in ["", "yesterday", "2026-13-01", "2026-11-01T24", "2026-11-01Tx", "9999999d"] {
            assert!(since(bad).unwrap_err().contains("24h"), "{bad}");
        }
    }

    #[test]
    fn amounts_are_shown_for_people_and_written_whole_for_programs() {
        let figures = Figures {
            cpu_us: 1_500_000,
            memory_byte_s: (512 << 20) * 3600,
            requests: 12,
            wakes: 1,
            ..Figures::default()
        };
        let usage = |app: &str| Usage {
            from_unix_s: 1_793_491_200,
            span_s: 3600,
            app: Some(app.parse().unwrap()),
            figures,
        };
        let apps = [usage("blog"), usage("shop")];
        let table = table(&apps, By::Hour);
        assert!(table[1].starts_with("2026-11-01 00:00  blog "), "{table:?}");
        assert!(table[1].contains(" 1.5s  512.00MiB·h "), "{table:?}");
        assert!(table[3].contains("(all)") && table[3].contains(" 3s    1.00GiB·h"), "{table:?}");
        let csv = csv(&apps);
        assert_eq!(csv[1], "2026-11-01T00:00Z,blog,1500000,1932735283200,0,0,0,12,0,0,1");
        assert_eq!(csv[0].split(',').count(), csv[1].split(',').count());
    }
}
