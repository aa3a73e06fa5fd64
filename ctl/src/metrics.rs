//! `metrics`: the figures of launcher and proxy in Prometheus' text format.

use std::{path::Path, time::Duration};

use launcher_client::{
    Client, admin,
    paths::StateDir,
    wire::{Reply, Request},
};

use crate::{cli::Global, failure::Failure, output::Output};

/// How long a daemon may take; Prometheus itself gives up after 10 s.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs the command.
pub(crate) async fn run(global: &Global, out: &mut Output) -> Result<(), Failure> {
    let state = StateDir::new(&global.state);
    let (text, faults) = collect(&state).await;
    if faults.len() == 2 {
        return Err(Failure::NotRunning(faults.join("; ")));
    }
    faults.iter().for_each(|fault| tracing::warn!("{fault}"));
    if out.is_json() {
        return out.json(&serde_json::json!({ "metrics": text }));
    }
    text.lines().try_for_each(|line| out.line(line))
}

/// What both daemons tell, and why one does not.
pub(crate) async fn collect(state: &StateDir) -> (String, Vec<String>) {
    let (launcher_socket, proxy_socket) = (state.launcher_socket(), state.proxy_socket());
    let (launcher, proxy) = tokio::join!(
        in_time("launcher", launcher(&launcher_socket)),
        in_time("proxy", async { admin::metrics(&proxy_socket).await.map_err(|error| error.to_string()) }),
    );
    let up = |part: &Result<String, String>| u8::from(part.is_ok());
    let mut text = format!(
        "# HELP fastcontainer_up Whether a daemon has told its figures.\n# TYPE fastcontainer_up gauge\n\
         fastcontainer_up{{daemon=\"launcher\"}} {}\nfastcontainer_up{{daemon=\"proxy\"}} {}\n",
        up(&launcher),
        up(&proxy)
    );
    let mut faults = Vec::new();
    for part in [launcher, proxy] {
        match part {
            Ok(part) => text.push_str(&part),
            Err(fault) => faults.push(fault),
        }
    }
    (text, faults)
}

async fn in_time(
    daemon: &str,
    answer: impl Future<Output = Result<String, String>>,
) -> Result<String, String> {
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(answer) => answer.map_err(|error| format!("the {daemon} does not tell its figures: {error}")),
        Err(_) => Err(format!("the {daemon} did not tell its figures within {} s", PATIENCE.as_secs())),
    }
}

async fn launcher(socket: &Path) -> Result<String, String> {
    let client = Client::connect(socket).await.map_err(|error| error.to_string())?;
    let mut text = String::new();
    let pieces = client.stream(Request::Metrics, |reply| {
        if let Reply::Text(piece) = reply {
            text.push_str(&piece);
        }
        true
    });
    pieces.await.map_err(|error| error.to_string())?;
    Ok(text)
}
