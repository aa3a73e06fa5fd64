//! `ps`: the apps and their instances.

use cmdb::{
    Generation,
    units::{Bytes, Millicores},
};
use launcher_client::wire::{Status, Window};
use serde::Serialize;

use crate::{
    cli::{self, Global},
    failure::Failure,
    output::{Output, Style},
    table::{self, Align},
    target::Target,
    text,
};

/// Runs the command.
pub(crate) async fn run(global: &Global, options: cli::Ps, out: &mut Output) -> Result<(), Failure> {
    let target = Target::reach(global, &options.remote).await?;
    let mut statuses = target.statuses(options.app.clone()).await?;
    let only = options.app.is_some();
    if let Some(app) = options.app
        && statuses.is_empty()
    {
        return Err(Failure::NotFound(format!("no app is called \"{app}\"")));
    }
    statuses.sort_by(|a, b| (&a.app, a.generation).cmp(&(&b.app, b.generation)));
    if out.is_json() {
        let all: Vec<Line<'_>> = statuses.iter().map(Line::of).collect();
        return out.json(&all);
    }
    if statuses.is_empty() {
        return out.line("no apps; put a vhost file into conf.d/");
    }
    for (number, line) in lines(&statuses, options.wide).into_iter().enumerate() {
        match number.checked_sub(1).and_then(|row| statuses.get(row)) {
            None => out.line(&out.paint(Style::Bold, &line))?,
            Some(status) => match colour(&status.state) {
                Some(style) => out.line(&out.paint(style, &line))?,
                None => out.line(&line)?,
            },
        }
    }
    notes(&statuses, only).iter().try_for_each(|note| out.line(note))
}

/// What holds in place of the vhost files, a line for each app; of a single app also what was last decided about it.
fn notes(statuses: &[Status], only: bool) -> Vec<String> {
    let mut notes = Vec::new();
    let apps = statuses.chunk_by(|a, b| a.app == b.app).filter_map(|lines| lines.first());
    for status in apps {
        if !status.overrides.is_empty() {
            let set = text::clean(&status.overrides.join(", ")).into_owned();
            notes.push(format!("{}: set by the operator: {set}", status.app));
        }
        if let Some(leak) = &status.leak {
            notes.push(format!("{}: suspected of a leak: {}", status.app, text::clean(leak)));
        }
        if let Some(decision) = status.decision.as_ref().filter(|_| only) {
            let at = text::local_time(decision.at_unix_ms);
            let words = text::clean(&decision.words);
            notes.push(format!(
                "{}: last decision: {at} {}: {words}",
                status.app,
                text::clean(&decision.kind)
            ));
        }
    }
    notes
}

/// The last digits of a generation: enough to tell an app's instances apart by eye.
pub(crate) fn short(generation: Generation) -> String {
    let digits = generation.to_string();
    match digits.len().checked_sub(6) {
        Some(cut) => digits[cut..].to_owned(),
        None => digits,
    }
}

/// A status for programs: with the instance's full name.
#[derive(Serialize)]
struct Line<'a> {
    instance: Option<String>,
    #[serde(flatten)]
    status: &'a Status,
}

impl<'a> Line<'a> {
    fn of(status: &'a Status) -> Self {
        let instance = status.generation.map(|generation| format!("{}.{generation}", status.app));
        Self { instance, status }
    }
}

fn colour(state: &str) -> Option<Style> {
    match state {
        Status::ABSENT => Some(Style::Dim),
        Status::BACKING_OFF => Some(Style::Red),
        "starting" | "draining" => Some(Style::Yellow),
        "frozen" => Some(Style::Cyan),
        _ => None,
    }
}

fn lines(statuses: &[Status], wide: bool) -> Vec<String> {
    use Align::{Left, Right};
    let several = statuses.iter().any(|status| !status.node.is_empty());
    let mut titles = vec![
        ("APP", Left),
        ("GENERATION", Right),
        ("STATE", Left),
        ("PID", Right),
        ("AGE", Right),
        ("IDLE", Right),
        ("IN-FLIGHT", Right),
        ("REQUESTS", Right),
        ("CPU", Right),
        ("MEMORY", Right),
        ("IMAGE", Left),
    ];
    if wide {
        titles.extend([
            ("P50/P99", Right),
            ("PIDS", Right),
            ("PORT", Right),
            ("SERVER-NAMES", Left),
            ("REASON", Left),
        ]);
    }
    let mut rows: Vec<Vec<String>> = statuses.iter().map(|status| row(status, wide)).collect();
    if several {
        titles.insert(1, ("NODE", Left));
        for (row, status) in rows.iter_mut().zip(statuses) {
            let node = text::clean(&status.node);
            row.insert(1, if node.is_empty() { "-".to_owned() } else { node.into_owned() });
        }
    }
    table::lines(&titles, &rows)
}

fn row(status: &Status, wide: bool) -> Vec<String> {
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    // Traffic of an app without an instance is not there, rather than 0.
    let count = |value: u64| or_dash(status.generation.map(|_| value.to_string()));
    let generation =
        status.generation.map(|generation| if wide { generation.to_string() } else { short(generation) });
    let mut row = vec![
        status.app.to_string(),
        or_dash(generation),
        tier(status),
        or_dash(status.pid.map(|pid| pid.to_string())),
        or_dash(status.age_ms.map(text::duration_ms)),
        or_dash(status.idle_ms.map(text::duration_ms)),
        count(status.in_flight.into()),
        count(status.requests),
        of(
            status.cpu_us.map(text::duration_us),
            status
                .generation
                .and(Some(status.cpu_limit.map_or("∞".to_owned(), |c| Millicores(c).to_string()))),
        ),
        of(
            status.memory_bytes.map(|bytes| memory(bytes, status.swap_bytes.unwrap_or(0))),
            status.memory_limit.map(|bytes| Bytes(bytes).to_string()),
        ),
        match text::clean(&status.image) {
            image if image.is_empty() => "-".to_owned(),
            image if status.image_is_old => format!("{image} (old)"),
            image => image.into_owned(),
        },
    ];
    if wide {
        let times = |window: &Window| {
            format!("{}/{}", text::duration_us(window.p50_us), text::duration_us(window.p99_us))
        };
        row.extend([
            or_dash(status.window.as_ref().map(times)),
            or_dash(status.pids.map(|pids| pids.to_string())),
            or_dash(status.port.map(|port| port.to_string())),
            text::clean(&status.server_names.join(",")).into_owned(),
            text::clean(&status.reason).into_owned(),
        ]);
    }
    row
}

/// The state, and how deep the sleep is.
fn tier(status: &Status) -> String {
    let state = text::clean(&status.state);
    if status.reclaimed { format!("{state}, reclaimed") } else { state.into_owned() }
}

/// What it holds in memory, and in swap if anything.
fn memory(bytes: u64, swap: u64) -> String {
    if swap > 0 { format!("{}+{} swap", Bytes(bytes), Bytes(swap)) } else { Bytes(bytes).to_string() }
}

/// `used/limit`, or what is known of it.
fn of(used: Option<String>, limit: Option<String>) -> String {
    match (used, limit) {
        (Some(used), Some(limit)) => format!("{used}/{limit}"),
        (Some(used), None) => used,
        (None, Some(limit)) => format!("-/{limit}"),
        (None, None) => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready() -> Status {
        Status {
            app: "hello".parse().unwrap(),
            server_names: vec!["hello.localhost".into()],
            node: String::new(),
            generation: Some(Generation(1_763_972_712_345)),
            state: "ready".into(),
            reason: String::new(),
            pid: Some(4711),
            port: Some(8000),
            age_ms: Some(192_000),
            idle_ms: Some(450),
            in_flight: 2,
            requests: 31,
            window: Some(Window { count: 31, mean_us: 2_000, p50_us: 1_500, p90_us: 3_000, p99_us: 12_500 }),
            cpu_us: Some(12_500),
            cpu_limit: Some(300),
            throttled: None,
            memory_bytes: Some(3 << 20),
            memory_limit: Some(64 << 20),
            swap_bytes: Some(0),
            reclaimed: false,
            pids: Some(3),
            image: "sha256:0123456789ab".into(),
            overrides: Vec::new(),
            decision: None,
            image_is_old: false,
            leak: None,
        }
    }

    fn absent() -> Status {
        Status {
            app: "blog".parse().unwrap(),
            generation: None,
            state: Status::ABSENT.into(),
            pid: None,
            port: None,
            age_ms: None,
            idle_ms: None,
            in_flight: 0,
            requests: 0,
            window: None,
            cpu_us: None,
            cpu_limit: None,
            memory_bytes: None,
            memory_limit: None,
            swap_bytes: None,
            pids: None,
            image: String::new(),
            ..ready()
        }
    }

    #[test]
    fn an_operator_sees_what_runs_and_what_does_not() {
        let lines = lines(&[absent(), ready()], false);

        assert_eq!(
            lines,
            [
                "APP    GENERATION  STATE    PID    AGE   IDLE  IN-FLIGHT  REQUESTS         CPU      MEMORY  IMAGE",
                "blog            -  absent     -      -      -          -         -           -           -  -",
                "hello      712345  ready   4711  3m12s  450ms          2        31  12.5ms/30%  3MiB/64MiB  sha256:0123456789ab",
            ]
        );
    }

    #[test]
    fn wide_shows_the_whole_generation_and_why() {
        let backing_off =
            Status { state: Status::BACKING_OFF.into(), reason: "exit status 1\x1b[2J".into(), ..absent() };

        let lines = lines(&[ready(), backing_off], true);

        assert!(lines[1].contains("1763972712345"), "{}", lines[1]);
        assert!(lines[1].contains("1.5ms/12.5ms"), "{}", lines[1]);
        assert!(lines[2].ends_with("hello.localhost  exit status 1\\x1b[2J"), "{}", lines[2]);
    }

    #[test]
    fn what_the_operator_has_set_is_told_once_for_each_app() {
        let set = Status { overrides: vec!["scale.min = 2 (vhost file: 0)".into()], ..ready() };

        let notes = notes(&[absent(), set.clone(), set], false);

        assert_eq!(notes, ["hello: set by the operator: scale.min = 2 (vhost file: 0)"]);
    }

    #[test]
    fn a_deep_sleep_shows_with_what_it_holds() {
        let asleep = Status {
            state: "frozen".into(),
            reclaimed: true,
            memory_bytes: Some(1 << 20),
            swap_bytes: Some(40 << 20),
            ..ready()
        };

        let lines = lines(&[asleep], false);

        assert!(lines[1].contains("frozen, reclaimed"), "{}", lines[1]);
        assert!(lines[1].contains("1MiB+40MiB swap/64MiB"), "{}", lines[1]);
    }

    #[test]
    fn programs_get_the_full_name_of_an_instance() {
        let line = serde_json::to_value(Line::of(&ready())).unwrap();

        assert_eq!(line["instance"], "hello.1763972712345");
        assert_eq!(line["in_flight"], 2);
        assert_eq!(serde_json::to_value(Line::of(&absent())).unwrap()["instance"], serde_json::Value::Null);
    }
}
