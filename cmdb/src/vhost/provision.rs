//! `[[provision]]`.

use std::{collections::BTreeSet, time::Duration};

use super::read::read_env;
use super::reader::{At, Reader, Section};
use crate::provision::ProvisionStep;

/// Most steps of one app: each is a layer, of which one mount holds only so many.
const MOST_STEPS: usize = 16;
/// Most that a step's program and arguments may take, bytes.
const MOST_BYTES: usize = 16 * 1024;
/// Longest name of a step, characters.
const MOST_NAME: usize = 64;
const USUAL_TIMEOUT: Duration = Duration::from_secs(600);
const LONGEST_TIMEOUT: Duration = Duration::from_secs(3600);

/// Reads all of them; `None` when one is faulty.
pub(super) fn read(reader: &mut Reader<'_>, top: Section<'_>) -> Option<Vec<ProvisionStep>> {
    let sections = reader.sections(top, "provision");
    if let Some(section) = sections.get(MOST_STEPS) {
        let message = format!("there are more than {MOST_STEPS} steps");
        reader.fault(section.span.0..section.span.1, message, "let one step do several things");
    }
    let mut names = BTreeSet::new();
    let steps: Vec<Option<ProvisionStep>> =
        sections.into_iter().map(|section| step(reader, section, &mut names)).collect();
    steps.into_iter().collect()
}

fn step(
    reader: &mut Reader<'_>,
    section: Section<'_>,
    names: &mut BTreeSet<String>,
) -> Option<ProvisionStep> {
    for name in ["name", "run"] {
        if !section.has(name) {
            reader.missing(section, name);
        }
    }
    let name = reader.text(section, "name").and_then(|name| name_of(reader, name, names));
    let run = reader.texts(section, "run").and_then(|run| command(reader, run));
    let user = reader.text(section, "user").map(|user| user.value).unwrap_or_default();
    let env = read_env(reader, section);
    let timeout = timeout(reader, section);
    Some(ProvisionStep { name: name?, run: run?, user, env, timeout })
}

fn name_of(reader: &mut Reader<'_>, name: At<String>, names: &mut BTreeSet<String>) -> Option<String> {
    let fits = !name.value.trim().is_empty()
        && name.value.chars().count() <= MOST_NAME
        && !name.value.contains(char::is_control);
    if !fits {
        let message = "\"name\" is no name for a step";
        reader.fault(name.span, message, format!("write one line of at most {MOST_NAME} characters"));
        return None;
    }
    if !names.insert(name.value.clone()) {
        let message = format!("two steps are called {:?}", name.value);
        reader.fault(name.span, message, "call one of them something else");
        return None;
    }
    Some(name.value)
}

fn command(reader: &mut Reader<'_>, run: At<Vec<At<String>>>) -> Option<Vec<String>> {
    if run.value.first().is_none_or(|program| program.value.is_empty()) {
        let mend =
            "write for example run = [\"/bin/sh\", \"-c\", \"apt-get update && apt-get -y install php\"]";
        reader.absent(run.span, "\"run\" names no program", mend);
        return None;
    }
    if run.value.iter().map(|text| text.value.len()).sum::<usize>() > MOST_BYTES {
        reader.fault(run.span, "\"run\" is too long", "put a script into the image, and run that");
        return None;
    }
    Some(run.value.into_iter().map(|text| text.value).collect())
}

fn timeout(reader: &mut Reader<'_>, section: Section<'_>) -> Duration {
    let Some(timeout) = reader.duration(section, "timeout") else { return USUAL_TIMEOUT };
    if timeout > LONGEST_TIMEOUT
        && let Some(text) = reader.text(section, "timeout")
    {
        reader.fault(text.span, "\"timeout\" is too long", "write at most \"1h\"");
    }
    timeout
}
