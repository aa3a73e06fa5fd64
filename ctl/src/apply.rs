//! `apply` and `diff`: a folder of vhost files, by way of the API.

use std::{collections::BTreeMap, path::Path};

use cmdb::vhost;
use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    check,
    cli::{Global, api},
    failure::Failure,
    output::{Output, Style},
    remote::Api,
    text,
};

/// What was done, or would be.
#[derive(Debug, Deserialize, Serialize)]
struct Outcome {
    dry_run: bool,
    changes: Vec<Change>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Change {
    app: String,
    action: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    fields: Vec<Field>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Field {
    pointer: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    before: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    after: Option<Value>,
}

/// Runs `apply`.
pub(crate) async fn run(global: &Global, options: &api::Apply, out: &mut Output) -> Result<(), Failure> {
    let outcome = ask(global, &options.dir, &options.remote, options.dry_run, options.force).await?;
    show(&outcome, out)
}

/// Runs `diff`.
pub(crate) async fn diff(global: &Global, options: &api::Diff, out: &mut Output) -> Result<(), Failure> {
    let outcome = ask(global, &options.dir, &options.remote, true, true).await?;
    show(&outcome, out)?;
    // As diff(1) tells it.
    if outcome.changes.is_empty() { Ok(()) } else { Err(Failure::Told) }
}

async fn ask(
    global: &Global,
    dir: &Path,
    remote: &api::Remote,
    dry_run: bool,
    force: bool,
) -> Result<Outcome, Failure> {
    let files = read(dir)?;
    let api = match Api::asked_for(remote)? {
        Some(api) => api,
        None => Api::of_state(&global.state)?,
    };
    let query = [("dry-run", dry_run.to_string()), ("force", force.to_string())];
    api.json(Method::POST, "/v1/apply", &query, Some(&json!({ "files": files }))).await
}

/// The folder's files; with a fault in one of them, all faults are told before anybody is asked.
fn read(dir: &Path) -> Result<BTreeMap<String, String>, Failure> {
    let loaded = vhost::load_dir(dir);
    if !loaded.faults.is_empty() {
        let faults: Vec<String> = loaded.faults.iter().map(|fault| check::shown(fault, false)).collect();
        return Err(Failure::failed(format!("nothing was done\n{}", faults.join("\n\n"))));
    }
    let mut files = BTreeMap::new();
    for loaded in loaded.apps {
        let fault = |error: String| Failure::failed(format!("{}: {error}", loaded.path.display()));
        let name =
            loaded.path.file_name().and_then(|name| name.to_str()).ok_or_else(|| fault("its name".into()))?;
        let text = std::fs::read_to_string(&loaded.path).map_err(|error| fault(error.to_string()))?;
        files.insert(name.to_owned(), text);
    }
    Ok(files)
}

fn show(outcome: &Outcome, out: &mut Output) -> Result<(), Failure> {
    if out.is_json() {
        return out.json(outcome);
    }
    for change in &outcome.changes {
        let (mark, style) = match change.action.as_str() {
            "create" => ("+", Style::Green),
            "remove" => ("-", Style::Red),
            _ => ("~", Style::Yellow),
        };
        out.line(&out.paint(style, &format!("{mark} {}", text::clean(&change.app))))?;
        for field in &change.fields {
            let value = |value: &Option<Value>| value.as_ref().map_or("-".to_owned(), ToString::to_string);
            let key = field.pointer.trim_start_matches('/').replace('/', ".");
            let line = format!("    {key}: {} -> {}", value(&field.before), value(&field.after));
            out.line(&text::clean(&line))?;
        }
    }
    let count = |action: &str| outcome.changes.iter().filter(|change| change.action == action).count();
    let (new, changed, gone) = (count("create"), count("replace"), count("remove"));
    let would = if outcome.dry_run { "would be " } else { "" };
    match outcome.changes.len() {
        0 => out.line("nothing changes: it is so already"),
        _ => out.line(&format!("{new} {would}new, {changed} {would}changed, {gone} {would}removed")),
    }
}
