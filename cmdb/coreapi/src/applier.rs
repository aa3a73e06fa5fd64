//! Brings the CMDB's configuration to what the folder says: removals first, then what is new or different. A file
//! that cannot be read keeps its last good version and disturbs nobody.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::IsTerminal as _,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use cmdb::{App, AppName, Change, vhost};
use launcher_client::{Client, ClientError, paths::StateDir, wire::Request};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::Notify,
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::source::Source;

/// Editors write a file in several steps: changes are waited for until there is quiet for this long.
const QUIET: Duration = Duration::from_millis(50);
/// But no longer than this.
const QUIET_AT_MOST: Duration = Duration::from_millis(500);
/// Apps that are put at a time: the CMDB writes them to the disk together.
const AT_ONCE: usize = 256;
/// The folder is read this often even when nothing tells of a change.
const RESCAN: Duration = Duration::from_secs(30);
const RECONNECT_FIRST: Duration = Duration::from_millis(50);
const RECONNECT_MOST: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Debug)]
pub(crate) struct Applier {
    source: Source,
    state: StateDir,
    /// Faults that have been told of, so that a rescan does not repeat them.
    told: BTreeSet<String>,
}

impl Applier {
    pub(crate) fn new(source: Source, state: StateDir) -> Self {
        Self { source, state, told: BTreeSet::new() }
    }

    /// Runs until SIGTERM or SIGINT.
    pub(crate) async fn run(mut self) -> anyhow::Result<()> {
        let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be handled")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be handled")?;
        tokio::select! {
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
            result = self.follow() => result,
        }
    }

    async fn follow(&mut self) -> anyhow::Result<()> {
        let mut hangup = signal(SignalKind::hangup()).context("SIGHUP cannot be handled")?;
        let changed = Arc::new(Notify::new());
        let mut watcher = None;
        let mut pause = RECONNECT_FIRST;
        loop {
            let client = match self.connect().await {
                Ok(client) => client,
                Err(error) => {
                    tracing::debug!(%error, "the launcher cannot be reached");
                    sleep(pause).await;
                    pause = (pause * 2).min(RECONNECT_MOST);
                    continue;
                }
            };
            pause = RECONNECT_FIRST;
            let (client, mut held) = client;
            loop {
                if watcher.is_none() {
                    watcher = self.source.watch(Arc::clone(&changed)).map_err(|error| {
                        tracing::warn!(%error, "{} cannot be watched; it is read every {RESCAN:?}", self.source.path().display());
                    }).ok();
                }
                if let Err(error) = self.apply(&client, &mut held).await {
                    tracing::warn!(%error, "the configuration was not applied; connecting again");
                    break;
                }
                tokio::select! {
                    () = changed.notified() => settle(&changed).await,
                    _ = hangup.recv() => tracing::info!("SIGHUP: reading {}", self.source.path().display()),
                    // The folder itself may have been replaced, and its watch with it.
                    () = sleep(RESCAN) => watcher = None,
                    () = client.closed() => break,
                }
            }
        }
    }

    /// A connection, and what the CMDB holds now.
    async fn connect(&self) -> Result<(Client, BTreeMap<AppName, Arc<App>>), ClientError> {
        let client = Client::connect(&self.state.launcher_socket()).await?;
        let mut changes = client.watch(false).await?;
        let mut held = BTreeMap::new();
        loop {
            match changes.recv().await {
                Some(Change::Put { app, .. }) => drop(held.insert(app.name.clone(), app)),
                Some(Change::Removed(name)) => drop(held.remove(&name)),
                Some(Change::Nodes(_)) => {}
                Some(Change::Synced) => return Ok((client, held)),
                None => return Err(ClientError::Closed),
            }
        }
    }

    async fn apply(
        &mut self,
        client: &Client,
        held: &mut BTreeMap<AppName, Arc<App>>,
    ) -> Result<(), ClientError> {
        let loaded = self.source.load();
        self.tell_faults(client, &loaded.faults).await?;

        let mut gone = Vec::new();
        if !loaded.faults.iter().any(|fault| fault.file == *self.source.path()) {
            let good: BTreeSet<&AppName> = loaded.apps.iter().map(|loaded| &loaded.app.name).collect();
            let broken: BTreeSet<AppName> = loaded
                .faults
                .iter()
                .filter_map(|fault| fault.file.file_stem()?.to_str()?.parse().ok())
                .collect();
            gone.extend(held.keys().filter(|name| !good.contains(name) && !broken.contains(*name)).cloned());
        }
        let (mut applied, mut removed) = (0, 0);
        for name in gone {
            client.remove_app(&name).await?;
            held.remove(&name);
            removed += 1;
        }
        let mut wanted: Vec<_> = loaded.apps;
        wanted.retain(|loaded| held.get(&loaded.app.name).is_none_or(|app| **app != loaded.app));
        // More than once: a server-name that moves from one app to another is free only after the one has been put, and
        // moves may form a chain. A round that gets no further is the last.
        let mut last_try = false;
        while !wanted.is_empty() {
            let asked = wanted.len();
            let mut puts = JoinSet::new();
            let mut queue = std::mem::take(&mut wanted).into_iter();
            loop {
                while puts.len() < AT_ONCE
                    && let Some(loaded) = queue.next()
                {
                    let client = client.clone();
                    puts.spawn(async move { (client.put_app(loaded.app.clone()).await, loaded) });
                }
                let Some(put) = puts.join_next().await else { break };
                // A task of ours does not panic, and nobody aborts it.
                let Ok((outcome, loaded)) = put else { continue };
                match outcome {
                    Ok(()) => {
                        held.insert(loaded.app.name.clone(), Arc::new(loaded.app));
                        applied += 1;
                    }
                    Err(ClientError::Refused(refusal)) if last_try => {
                        let message = format!("{}: {refusal}", loaded.path.display());
                        self.tell(client, Some(loaded.app.name), message).await?;
                    }
                    Err(ClientError::Refused(_)) => wanted.push(loaded),
                    Err(error) => return Err(error),
                }
            }
            last_try = wanted.len() == asked;
        }
        if applied + removed > 0 {
            tracing::info!(
                applied,
                removed,
                apps = held.len(),
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
            self.tell(client, app, fault.to_string()).await?;
        }
        Ok(())
    }

    /// Puts a fault among the events, once.
    async fn tell(
        &mut self,
        client: &Client,
        app: Option<AppName>,
        message: String,
    ) -> Result<(), ClientError> {
        if self.told.insert(message.clone()) {
            client.tell(Request::Note { kind: "config-error".into(), app, message }).await?;
        }
        Ok(())
    }
}

async fn settle(changed: &Notify) {
    let quiet = async { while timeout(QUIET, changed.notified()).await.is_ok() {} };
    let _ = timeout(QUIET_AT_MOST, quiet).await;
}
