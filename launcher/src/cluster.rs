//! This host among others: what it tells of itself, and what it hears from the CMDB.
//!
//! Whoever changes an app's configuration, and on whichever host, the CMDB's watch tells of it, and this is where the
//! launcher acts on that; with one host, too.

mod follow;

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use cmdb::{
    Store, StoreError,
    compute::{Compute, Load},
    embedded::EmbeddedStore,
    redis::{BUDGET, HEARTBEAT, RedisStore, Role},
};
use launcher_client::home::Home;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::{
    governor::HostGauge,
    host::{Host, lock},
};
pub(crate) use follow::follow;

/// A start waits so long for Redis; then it goes on with what was known when this launcher last ran.
const PATIENCE: Duration = Duration::from_secs(2);
/// What goes on being wrong is told again after this time.
const AGAIN: Duration = Duration::from_secs(60);

/// Opens the CMDB. One in Redis that cannot be reached is gone on without.
pub(crate) async fn open(home: &Home, node: &str, folder: &Path) -> Result<Arc<dyn Store>> {
    let Some(address) = home.address() else {
        let journal = folder.join("cmdb.redb");
        let store = EmbeddedStore::open(&journal)
            .with_context(|| format!("the CMDB's journal {}", journal.display()))?;
        return Ok(Arc::new(store));
    };
    let known = folder.join("cmdb.last-known-good");
    let store = RedisStore::open_remembering(address, Role::Node(node.to_owned()), BUDGET, &known)?;
    let mut link = store.link();
    if timeout(PATIENCE, link.wait_for(|link| link.connected)).await.is_err() {
        tracing::warn!(
            apps = store.list().len(),
            "the CMDB cannot be reached; what was known of it when this launcher last ran is used until it can"
        );
    }
    Ok(Arc::new(store))
}

/// Tells the others again and again that this host is there, and what it has left, until it ends: then they shall not wait
/// for it.
pub(crate) async fn beat(host: Arc<Host>, mut compute: Compute) {
    compute.cpu = u32::try_from(host.governor.cores()).unwrap_or(1).saturating_mul(1_000);
    compute.memory = HostGauge::whole_memory();
    let mut clock = interval(HEARTBEAT);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = true;
    let mut told_twice = None;
    loop {
        clock.tick().await;
        if host.is_ending() {
            return;
        }
        let sent = std::time::Instant::now();
        match host.store.beat(&compute, load(&host, compute.cpu)).await {
            Ok(()) => {
                host.heard_at(sent);
                if !std::mem::replace(&mut heard, true) {
                    host.events.emit("cmdb-back", None, None, "the CMDB hears this host again".to_owned());
                }
            }
            // It has arrived all the same; two hosts of one name end each other's instances.
            Err(error @ StoreError::NodeTwice(_)) => {
                host.heard_at(sent);
                if told_twice.is_none_or(|at: Instant| at.elapsed() > AGAIN) {
                    told_twice = Some(Instant::now());
                    host.events.emit("node-twice", None, None, error.to_string());
                }
            }
            Err(error) => {
                if std::mem::replace(&mut heard, false) {
                    let message = format!(
                        "{error}; this host goes on with its own apps, and others may take them for lost"
                    );
                    host.events.emit("cmdb-lost", None, None, message);
                }
            }
        }
    }
}

fn load(host: &Host, cpu: u32) -> Load {
    let busy = host.meter.load(std::time::Instant::now()).busy.min(1_000);
    let free_cpu = u64::from(cpu) * u64::from(1_000 - busy) / 1_000;
    Load {
        free_cpu: u32::try_from(free_cpu).unwrap_or(u32::MAX),
        free_memory: host.governor.free_memory(),
        instances: u32::try_from(lock(&host.routes).len()).unwrap_or(u32::MAX),
    }
}
