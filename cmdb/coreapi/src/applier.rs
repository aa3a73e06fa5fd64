//! Brings the CMDB's configuration to what the folder says: removals first, then what is new or different. A file
//! that cannot be read keeps its last good version and disturbs nobody.

use std::{collections::BTreeSet, io::IsTerminal as _, sync::Arc, time::Duration};

use anyhow::Context as _;
use cmdb::{AppName, Origin, vhost};
use launcher_client::{Client, ClientError, wire::Request};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::Notify,
    time::{sleep, timeout},
};

use crate::{
    link::{Connected, Link},
    put_all::{put_all, remove_all},
    source::Source,
};

/// Editors write a file in several steps: changes are waited for until there is quiet for this long.
const QUIET: Duration = Duration::from_millis(50);
/// But no longer than this.
const QUIET_AT_MOST: Duration = Duration::from_millis(500);
/// The folder is read this often even when nothing tells of a change.
const RESCAN: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Debug)]
pub(crate) struct Applier {
    source: Source,
    link: Link,
    /// Whose apps these are: only those are replaced and removed.
    origin: Origin,
    /// Faults and refusals that have been told of, so that a rescan does not repeat them.
    told: BTreeSet<String>,
    refused: BTreeSet<String>,
}

impl Applier {
    pub(crate) fn new(source: Source, link: Link, origin: Origin) -> Self {
        Self { source, link, origin, told: BTreeSet::new(), refused: BTreeSet::new() }
    }

    /// Runs for ever.
    pub(crate) async fn run(mut self) -> anyhow::Result<()> {
        let mut hangup = signal(SignalKind::hangup()).context("SIGHUP cannot be handled")?;
        let changed = Arc::new(Notify::new());
        let mut watcher = None;
        loop {
            let connected = self.link.connected().await;
            loop {
                if watcher.is_none() {
                    watcher = self.source.watch(Arc::clone(&changed)).map_err(|error| {
                        tracing::warn!(%error, "{} cannot be watched; it is read every {RESCAN:?}", self.source.path().display());
                    }).ok();
                }
                if let Err(error) = self.apply(&connected).await {
                    tracing::warn!(%error, "the configuration was not applied; connecting again");
                    // The link needs a moment to find out that its connection is gone.
                    sleep(QUIET).await;
                    break;
                }
                tokio::select! {
                    () = changed.notified() => settle(&changed).await,
                    _ = hangup.recv() => tracing::info!("SIGHUP: reading {}", self.source.path().display()),
                    // The folder itself may have been replaced, and its watch with it.
                    () = sleep(RESCAN) => watcher = None,
                    () = connected.client.closed() => break,
                }
            }
        }
    }

    async fn apply(&mut self, connected: &Connected) -> Result<(), ClientError> {
        let client = &connected.client;
        let mut loaded = tokio::task::block_in_place(|| self.source.load());
        for loaded in &mut loaded.apps {
            loaded.app.origin = self.origin.clone();
        }
        self.tell_faults(client, &loaded.faults).await?;
        let held = connected.apps();

        let mut gone = Vec::new();
        if !loaded.faults.iter().any(|fault| fault.file == *self.source.path()) {
            let good: BTreeSet<&AppName> = loaded.apps.iter().map(|loaded| &loaded.app.name).collect();
            let broken: BTreeSet<AppName> = loaded
                .faults
                .iter()
                .filter_map(|fault| fault.file.file_stem()?.to_str()?.parse().ok())
                .collect();
            let own = held.values().filter(|app| app.origin.yields_to(&self.origin)).map(|app| &app.name);
            gone.extend(own.filter(|name| !good.contains(name) && !broken.contains(*name)).cloned());
        }
        let to_remove = gone.len();
        let kept = remove_all(connected, gone, &self.origin).await?;
        let removed = to_remove - kept.len();
        let mut wanted = loaded.apps;
        wanted.retain(|loaded| held.get(&loaded.app.name).is_none_or(|app| !app.says_the_same(&loaded.app)));
        let put = put_all(connected, wanted).await?;
        let applied = put.applied;
        let kept = kept
            .into_iter()
            .map(|(name, refusal)| (name.clone(), format!("{name} cannot be removed: {refusal}")));
        let put = put
            .refused
            .into_iter()
            .map(|(loaded, refusal)| (loaded.app.name, format!("{}: {refusal}", loaded.path.display())));
        let refusals = kept.chain(put).collect();
        self.tell_refusals(client, refusals).await?;
        if applied + removed > 0 {
            tracing::info!(
                applied,
                removed,
                apps = connected.apps().len(),
                faults = loaded.faults.len(),
                "the configuration was applied"
            );
        }
        Ok(())
    }

    async fn tell_faults(&mut self, client: &Client, faults: &[vhost::Fault]) -> Result<(), ClientError> {
        let now: BTreeSet<String> = faults.iter().map(ToString::to_string).collect();
        self.told.retain(|fault| now.contains(fault));
        for fault in faults {
            if self.told.contains(&fault.to_string()) {
                continue;
            }
            let source = std::fs::read_to_string(&fault.file).ok();
            tracing::warn!("\n{}", vhost::render(fault, source.as_deref(), std::io::stderr().is_terminal()));
            let app = fault.file.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
            self.told.insert(fault.to_string());
            tell(client, app, fault.to_string()).await?;
        }
        Ok(())
    }

    async fn tell_refusals(
        &mut self,
        client: &Client,
        refusals: Vec<(AppName, String)>,
    ) -> Result<(), ClientError> {
        let before = std::mem::take(&mut self.refused);
        for (app, message) in refusals {
            if !before.contains(&message) {
                tracing::warn!("{message}");
                tell(client, Some(app), message.clone()).await?;
            }
            self.refused.insert(message);
        }
        Ok(())
    }
}

/// Puts a fault among the events.
async fn tell(client: &Client, app: Option<AppName>, message: String) -> Result<(), ClientError> {
    client.tell(Request::Note { kind: "config-error".into(), app, message }).await
}

async fn settle(changed: &Notify) {
    let quiet = async { while timeout(QUIET, changed.notified()).await.is_ok() {} };
    let _ = timeout(QUIET_AT_MOST, quiet).await;
}
