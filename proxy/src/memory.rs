//! What the proxy remembers over its own restarts: the last known good configuration, so that it can begin to serve (and
//! hold) before the launcher answers.

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use cmdb::{AppRecord, Change, cache::LastKnownGood};
use tokio::time::sleep;

use crate::house::House;

/// The file is written at most this often.
const WRITE_EVERY: Duration = Duration::from_secs(5);

fn file(house: &House) -> LastKnownGood {
    LastKnownGood::new(house.config.state.proxy().join("apps.last-known-good"))
}

/// Fills the empty cache with what is remembered; the launcher's watch then corrects it.
pub(crate) fn recall(house: &Arc<House>) {
    match file(house).read() {
        Ok(apps) if apps.is_empty() => {}
        Ok(apps) => {
            tracing::info!(apps = apps.len(), "the last known good configuration is in place");
            for app in apps {
                let change = Change::Put { app, record: Arc::new(AppRecord::default()) };
                house.admit(|cache| cache.apply(change));
            }
            house.informed.store(true, SeqCst);
        }
        Err(error) => tracing::warn!(%error, "there is no last known good configuration"),
    }
}

/// Writes what the cache holds whenever it has changed and the launcher has confirmed it.
pub(crate) async fn keep(house: &Arc<House>) {
    let mut written = house.cache.version();
    loop {
        sleep(WRITE_EVERY).await;
        let version = house.cache.version();
        if version == written || !house.synced.load(SeqCst) {
            continue;
        }
        let (file, apps) = (file(house), house.cache.apps());
        match tokio::task::spawn_blocking(move || file.write(&apps)).await {
            Ok(Ok(())) => written = version,
            Ok(Err(error)) => {
                tracing::warn!(%error, "the last known good configuration could not be written")
            }
            Err(error) => tracing::warn!(%error, "the last known good configuration could not be written"),
        }
    }
}
