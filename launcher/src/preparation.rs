//! The preparation queue (the paper's Scheduler): images are fetched and unpacked as soon as an app names them, ahead of
//! its first request, looked at again from time to time, and removed when no app names them any more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use cmdb::AppName;
use launcher_client::wire::ImageStatus;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::host::Host;
use crate::image::{Layers, Stage};

/// Images that are prepared at a time; a start that waits for its image does not wait for its turn.
const AT_A_TIME: usize = 2;
/// Longest time without a look at what is due.
const LONGEST_REST: Duration = Duration::from_secs(30);

/// Prepares images for ever.
pub async fn run(host: Arc<Host>) {
    let places = Arc::new(Semaphore::new(AT_A_TIME));
    let mut under_way: BTreeMap<String, tokio::task::JoinHandle<()>> = BTreeMap::new();
    let mut before = BTreeSet::new();
    loop {
        let wanted = wanted(&host);
        if wanted != before {
            let (host, keep) = (Arc::clone(&host), wanted.clone());
            // Removing trees takes its time.
            drop(tokio::task::spawn_blocking(move || host.images.retain(&keep)).await);
            before.clone_from(&wanted);
        }
        under_way.retain(|_, task| !task.is_finished());
        let now = Instant::now();
        let mut next = now + LONGEST_REST;
        for image in wanted {
            if under_way.contains_key(&image) {
                continue;
            }
            match host.images.preparation(&image).and_then(|state| state.due) {
                Some(due) if due > now => next = next.min(due),
                _ => {
                    let task = tokio::spawn(prepare(Arc::clone(&host), image.clone(), Arc::clone(&places)));
                    under_way.insert(image, task);
                }
            }
        }
        tokio::select! {
            () = host.images.nudged() => {}
            () = tokio::time::sleep_until(next) => {}
        }
    }
}

/// The images of all apps; those of folders need no preparation.
fn wanted(host: &Host) -> BTreeSet<String> {
    let apps = host.store.list();
    let images = apps.into_iter().map(|(app, _)| app.container.image.clone());
    images.filter(|image| !image.starts_with("dir:")).collect()
}

async fn prepare(host: Arc<Host>, image: String, places: Arc<Semaphore>) {
    let Ok(_place) = places.acquire().await else { return };
    let before = host.images.preparation(&image).unwrap_or_default();
    let begun = Instant::now();
    match host.images.refresh(&image).await {
        Ok(layers) => {
            if before.id != layers.id || before.failures > 0 {
                tell(&host, &image, "image-ready", &ready(&host, &layers, &before.id, begun.elapsed()));
            }
        }
        Err(error) => {
            let after = host.images.preparation(&image).unwrap_or_default();
            let wait = after.due.map_or(Duration::ZERO, |due| due.saturating_duration_since(Instant::now()));
            let meanwhile = if after.id.is_empty() { "" } else { ", and the one before is used meanwhile" };
            let message = format!("{error}; it is tried again in {wait:.0?}{meanwhile}");
            if before.error != after.error || before.failures == 0 {
                tell(&host, &image, "image-failed", &message);
            }
        }
    }
    // Others may have waited for a place, and the next look has a time now.
    host.images.nudge();
}

fn ready(host: &Host, layers: &Layers, before: &str, took: Duration) -> String {
    let size = host.images.bytes(&layers.id).map_or(String::new(), |bytes| format!(", {} MiB", bytes >> 20));
    let id = &layers.id;
    if before.is_empty() || before == id {
        format!("is ready: {id} ({} layers{size}), after {took:.1?}", layers.fds.len())
    } else {
        format!("has changed to {id} ({} layers{size}), which the next start uses", layers.fds.len())
    }
}

/// An event for each app that has the image.
fn tell(host: &Host, image: &str, kind: &str, message: &str) {
    for app in users(host, image) {
        let words = if message.starts_with("image ") {
            message.to_owned()
        } else {
            format!("image {image} {message}")
        };
        host.events.emit(kind, Some(&app), None, words);
    }
}

/// What `images` shows, by the image's name.
#[must_use]
pub fn statuses(host: &Host) -> Vec<ImageStatus> {
    let mut by_image: BTreeMap<String, Vec<AppName>> = BTreeMap::new();
    for (app, _) in host.store.list() {
        by_image.entry(app.container.image.clone()).or_default().push(app.name.clone());
    }
    by_image.into_iter().map(|(image, apps)| status(host, image, apps)).collect()
}

fn status(host: &Host, image: String, apps: Vec<AppName>) -> ImageStatus {
    let preparation = host.images.preparation(&image).unwrap_or_default();
    let (fetched, to_fetch) = match preparation.stage {
        Stage::Fetching { bytes, of } => (Some(bytes), Some(of)),
        _ => (None, None),
    };
    let state = match preparation.stage {
        _ if image.starts_with("dir:") => "folder",
        Stage::Waiting => "waiting",
        Stage::Fetching { .. } => "fetching",
        Stage::Unpacking => "unpacking",
        Stage::Ready => "ready",
        Stage::Failed => "failed",
    };
    let next = preparation.due.map(|due| due.saturating_duration_since(Instant::now()));
    ImageStatus {
        image,
        state: state.to_owned(),
        bytes: host.images.bytes(&preparation.id),
        id: preparation.id,
        fetched,
        to_fetch,
        apps,
        error: preparation.error,
        next_look_ms: next.map(|next| u64::try_from(next.as_millis()).unwrap_or(u64::MAX)),
    }
}

/// The apps that have an image.
fn users(host: &Host, image: &str) -> Vec<AppName> {
    let apps = host.store.list();
    apps.iter().filter(|(app, _)| app.container.image == image).map(|(app, _)| app.name.clone()).collect()
}
