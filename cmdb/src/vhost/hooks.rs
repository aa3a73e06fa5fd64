//! `[[hook]]`.

use std::{path::Path, time::Duration};

use super::reader::{At, Reader, Section};
use crate::hook::{Hook, OnFailure, Point, SIGNALS, When};

/// Most hooks of one app: each may run a program for each of its instances.
const MOST_HOOKS: usize = 32;
/// Most that a program's name and arguments may take.
const MOST_BYTES: usize = 16 * 1024;
const LONGEST_TIMEOUT: Duration = Duration::from_secs(300);
/// More often than this a hook may not run.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);

/// Reads all of them; `None` when one is faulty.
pub(super) fn read(reader: &mut Reader<'_>, top: Section<'_>) -> Option<Vec<Hook>> {
    let sections = reader.sections(top, "hook");
    if let Some(section) = sections.get(MOST_HOOKS) {
        let span = section.span.0..section.span.1;
        reader.fault(
            span,
            format!("there are more than {MOST_HOOKS} hooks"),
            "let one program do several things",
        );
    }
    let hooks: Vec<Option<Hook>> = sections.into_iter().map(|section| hook(reader, section)).collect();
    hooks.into_iter().collect()
}

fn hook(reader: &mut Reader<'_>, section: Section<'_>) -> Option<Hook> {
    let when = when(reader, section);
    if !section.has("run") {
        reader.missing(section, "run");
    }
    let run = reader.texts(section, "run").and_then(|run| command(reader, run));
    let timeout = match timeout(reader, section) {
        Some(timeout) => timeout,
        None => Duration::from_secs(5),
    };
    let on_failure = on_failure(reader, section, when.as_ref());
    Some(Hook { when: when?, run: run?, timeout, on_failure })
}

fn when(reader: &mut Reader<'_>, section: Section<'_>) -> Option<When> {
    let given: Vec<&str> =
        ["on", "on-signal", "after", "every"].into_iter().filter(|name| section.has(name)).collect();
    if given.len() != 1 {
        let message = match given.as_slice() {
            [] => "[hook] does not say when it runs".to_owned(),
            [first, second, ..] => format!("[hook] has \"{first}\" and \"{second}\""),
            [_] => String::new(),
        };
        let mend = "give it one of on, on-signal, after and every, for example on = \"after-ready\"";
        reader.absent(section.span.0..section.span.1, message, mend);
        return None;
    }
    if let Some(on) = reader.text(section, "on") {
        let point = on.value.parse::<Point>();
        if point.is_err() {
            let all: Vec<String> = Point::ALL.iter().map(|point| format!("\"{point}\"")).collect();
            let message = format!("{:?} is no point of an instance's life", on.value);
            reader.fault(on.span, message, format!("write one of {}", all.join(", ")));
        }
        return point.ok().map(When::On);
    }
    if let Some(signal) = reader.text(section, "on-signal") {
        let name = signal.value.strip_prefix("SIG").unwrap_or(&signal.value);
        if !SIGNALS.contains(&name) {
            let message = format!("{:?} is no signal for a hook", signal.value);
            reader.fault(signal.span, message, format!("write one of {}", SIGNALS.join(", ")));
            return None;
        }
        return Some(When::Signal(name.to_owned()));
    }
    if let Some(after) = reader.duration(section, "after") {
        return Some(When::After(after));
    }
    let every = reader.duration(section, "every")?;
    if every < SHORTEST_INTERVAL
        && let Some(text) = reader.text(section, "every")
    {
        reader.fault(text.span, "\"every\" is too often", "write at least \"1s\"");
        return None;
    }
    Some(When::Every(every))
}

fn command(reader: &mut Reader<'_>, run: At<Vec<At<String>>>) -> Option<Vec<String>> {
    let Some(program) = run.value.first() else {
        reader.absent(run.span, "\"run\" names no program", "write for example run = [\"announce\", \"up\"]");
        return None;
    };
    let plain =
        Path::new(&program.value).components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if program.value.is_empty() || !plain {
        reader.fault(
            program.span.clone(),
            "the program of \"run\" must lie in the hooks folder",
            "write its name as it is in the launcher's hooks folder (see `up --hooks`), for example \"announce\"",
        );
        return None;
    }
    if run.value.iter().map(|text| text.value.len()).sum::<usize>() > MOST_BYTES {
        reader.fault(run.span, "\"run\" is too long", "let the program read it from a file of its own");
        return None;
    }
    Some(run.value.into_iter().map(|text| text.value).collect())
}

fn timeout(reader: &mut Reader<'_>, section: Section<'_>) -> Option<Duration> {
    let timeout = reader.duration(section, "timeout")?;
    if timeout > LONGEST_TIMEOUT
        && let Some(text) = reader.text(section, "timeout")
    {
        reader.fault(text.span, "\"timeout\" is too long", "write at most \"5m\"");
    }
    Some(timeout)
}

fn on_failure(reader: &mut Reader<'_>, section: Section<'_>, when: Option<&When>) -> OnFailure {
    let Some(text) = reader.text(section, "on-failure") else { return OnFailure::default() };
    match text.value.as_str() {
        "warn" => OnFailure::Warn,
        "abort" => {
            if when.is_some_and(|when| !matches!(when, When::On(point) if point.can_abort())) {
                reader.fault(
                    text.span,
                    "nothing can be aborted there",
                    "write \"warn\"; only before-create, before-start and before-ready can abort a start",
                );
            }
            OnFailure::Abort
        }
        _ => {
            reader.fault(text.span, "\"on-failure\" takes \"warn\" or \"abort\"", "write one of the two");
            OnFailure::default()
        }
    }
}
