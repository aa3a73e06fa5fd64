//! `check`: every fault of every vhost file.

use std::{
    io::{IsTerminal as _, Write as _},
    path::Path,
};

use cmdb::vhost::{self, Fault};
use serde::Serialize;

use crate::{
    cli,
    failure::Failure,
    output::{Output, Style},
};

/// What `up` needs to know of an app.
#[derive(Clone, Debug)]
pub(crate) struct Vhost {
    pub(crate) app: String,
    pub(crate) server_names: Vec<String>,
}

/// What `check --json` prints.
#[derive(Serialize)]
struct Report<'r> {
    apps: Vec<&'r str>,
    faults: &'r [Fault],
}

/// Runs the command.
pub(crate) fn run(options: &cli::Check, out: &mut Output) -> Result<(), Failure> {
    let loaded = vhost::load_dir(&options.dir);
    let files = loaded.apps.len();
    if out.is_json() {
        let apps = loaded.apps.iter().map(|loaded| loaded.app.name.as_str()).collect();
        out.json(&Report { apps, faults: &loaded.faults })?;
    } else {
        for fault in &loaded.faults {
            out.line(&shown(fault, std::io::stdout().is_terminal()))?;
            out.line("")?;
        }
        let good = out.paint(Style::Green, &format!("{files} good"));
        match loaded.faults.len() {
            0 => out.line(&good)?,
            faults => {
                let faults = out.paint(Style::Red, &format!("{faults} fault(s)"));
                out.line(&format!("{good}, {faults}"))?;
            }
        }
    }
    if loaded.faults.is_empty() { Ok(()) } else { Err(Failure::Told) }
}

/// Reads the folder for `up`: faults go to stderr, the good files are returned.
pub(crate) fn load_and_complain(dir: &Path) -> Vec<Vhost> {
    let loaded = vhost::load_dir(dir);
    let mut stderr = std::io::stderr();
    for fault in &loaded.faults {
        // The log is not what `up` is for: a stderr that is gone does not stop it.
        let _ = writeln!(stderr, "{}\n", shown(fault, stderr.is_terminal()));
    }
    loaded
        .apps
        .into_iter()
        .map(|loaded| Vhost {
            app: loaded.app.name.to_string(),
            server_names: loaded.app.server_names.iter().map(ToString::to_string).collect(),
        })
        .collect()
}

pub(crate) fn shown(fault: &Fault, colour: bool) -> String {
    let source = std::fs::read_to_string(&fault.file).ok();
    vhost::render(fault, source.as_deref(), colour)
}
