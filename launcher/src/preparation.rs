//! The preparation queue (the paper's Scheduler): images are fetched and unpacked as soon as an app names them, ahead of
//! its first request, provisioned, looked at again from time to time, and removed when no app names them any more.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use cmdb::{App, AppName};
use launcher_client::wire::ImageStatus;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::host::Host;
use crate::image::{Layers, Preparation, Recipe, Stage};
use crate::provision;

/// Images that are prepared at a time; a start that waits for its image does not wait for its turn.
const AT_A_TIME: usize = 2;
/// Shortest time between two looks for images that nobody uses.
const SWEEP: Duration = Duration::from_secs(1);
const CROWD: Duration = Duration::from_millis(50);
/// Longest time without a look at what is due.
const LONGEST_REST: Duration = Duration::from_secs(30);

/// Prepares images for ever.
pub async fn run(host: Arc<Host>) {
    let places = Arc::new(Semaphore::new(AT_A_TIME));
    let mut under_way: BTreeMap<String, tokio::task::JoinHandle<()>> = BTreeMap::new();
    let mut before = BTreeSet::new();
    let mut swept = Instant::now();
    let mut named = false;
    loop {
        let recipes = recipes(&host);
        let wanted: BTreeSet<String> = wanted(&host).into_iter().chain(recipes.keys().cloned()).collect();
        // Also when only an instance has ended that still ran on an older image.
        // A store that has not told of any app yet wants nothing to be removed.
        named |= !wanted.is_empty();
        if named && (wanted != before || swept.elapsed() >= SWEEP) {
            swept = Instant::now();
            let (host, keep) = (Arc::clone(&host), wanted.clone());
            let recipes: Vec<Recipe> = recipes.values().filter_map(|app| Recipe::of(app)).collect();
            // Removing trees takes its time.
            let sweep = tokio::task::spawn_blocking(move || {
                let steps: HashSet<String> =
                    recipes.iter().flat_map(|recipe| host.images.wanted_steps(recipe)).collect();
                host.images.retain(&keep, steps);
            });
            drop(sweep.await);
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
                    let task = match recipes.get(&image) {
                        Some(app) => tokio::spawn(provision(Arc::clone(&host), Arc::clone(app))),
                        None => tokio::spawn(prepare(Arc::clone(&host), image.clone(), Arc::clone(&places))),
                    };
                    under_way.insert(image, task);
                }
            }
        }
        tokio::select! {
            // Apps come in crowds.
            () = host.images.nudged() => tokio::time::sleep(CROWD).await,
            () = tokio::time::sleep_until(next) => {}
        }
    }
}

/// The image of an app, and the one beneath it.
pub fn images_of(app: &App) -> impl Iterator<Item = &String> {
    [Some(&app.container.image), app.container.base.as_ref()].into_iter().flatten()
}

/// The images of all apps; those of folders need no preparation.
fn wanted(host: &Host) -> BTreeSet<String> {
    let apps = host.store.list();
    let images = apps.iter().flat_map(|(app, _)| images_of(app));
    images.filter(|image| !image.starts_with("dir:")).cloned().collect()
}

/// How images are to be provisioned, by the recipe's key, each with one of the apps that have it.
fn recipes(host: &Host) -> BTreeMap<String, Arc<App>> {
    let apps = host.store.list().into_iter();
    apps.filter_map(|(app, _)| Some((Recipe::of(&app)?.key, app))).collect()
}

/// Steps wait for a place of their own: one step may take longer than all other images.
async fn provision(host: Arc<Host>, app: Arc<App>) {
    let Some(recipe) = Recipe::of(&app) else { return };
    let before = host.images.preparation(&recipe.key).unwrap_or_default();
    let outcome = provision::prepare(&host, &app).await;
    let after = host.images.preparation(&recipe.key).unwrap_or_default();
    let apps = host.store.list();
    let users = apps.iter().filter(|(app, _)| Recipe::of(app).is_some_and(|other| other.key == recipe.key));
    let tell = |kind: &str, message: &str| {
        for (app, _) in users {
            host.events.emit(kind, Some(&app.name), None, format!("image {} {message}", recipe.image));
        }
    };
    match outcome {
        Ok(layers) if before.id != layers.id || before.failures > 0 => {
            tell("image-provisioned", &format!("is provisioned: {}, which the next start uses", layers.id));
        }
        Ok(_) => {}
        Err(error) => {
            if provision::cause(&before.error) != provision::cause(&after.error) || before.failures == 0 {
                tell("image-failed", &format!("is not provisioned: {}", again(&error.in_full(), &after)));
            }
        }
    }
    host.images.nudge();
}

/// A failure, when it is tried again, and what is used until then.
fn again(error: &str, after: &Preparation) -> String {
    let wait = after.due.map_or(Duration::ZERO, |due| due.saturating_duration_since(Instant::now()));
    let meanwhile = if after.id.is_empty() { "" } else { ", and the one before is used meanwhile" };
    format!("{error}; it is tried again in {wait:.0?}{meanwhile}")
}

async fn prepare(host: Arc<Host>, image: String, places: Arc<Semaphore>) {
    let Ok(_place) = places.acquire().await else { return };
    let before = host.images.preparation(&image).unwrap_or_default();
    let begun = Instant::now();
    match host.images.refresh(&image).await {
        Ok(layers) => {
            if before.id != layers.id || before.failures > 0 {
                tell(&host, &image, "image-ready", &ready(&host, &layers, &before.id, begun.elapsed()));
                provision_anew(&host, &image);
            }
        }
        Err(error) => {
            let after = host.images.preparation(&image).unwrap_or_default();
            let message = again(&error.to_string(), &after);
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

/// What steps have made of the image is of an older content of it.
fn provision_anew(host: &Host, image: &str) {
    for (app, _) in host.store.list() {
        if let Some(recipe) = Recipe::of(&app).filter(|_| images_of(&app).any(|other| other == image)) {
            host.images.look_at(&recipe);
        }
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
    // By what is shown, then by the key of the preparation.
    let mut by_image: BTreeMap<(String, String), Vec<AppName>> = BTreeMap::new();
    for (app, _) in host.store.list() {
        for image in images_of(&app) {
            by_image.entry((image.clone(), image.clone())).or_default().push(app.name.clone());
        }
        if let Some(recipe) = Recipe::of(&app) {
            let names: Vec<&str> = recipe.steps.iter().map(|step| step.name.as_str()).collect();
            let shown = format!("{} + {}", recipe.image, names.join(" + "));
            by_image.entry((shown, recipe.key)).or_default().push(app.name.clone());
        }
    }
    by_image.into_iter().map(|((shown, key), apps)| status(host, shown, &key, apps)).collect()
}

fn status(host: &Host, image: String, key: &str, apps: Vec<AppName>) -> ImageStatus {
    let preparation = host.images.preparation(key).unwrap_or_default();
    let (fetched, to_fetch) = match preparation.stage {
        Stage::Fetching { bytes, of } => (Some(bytes), Some(of)),
        _ => (None, None),
    };
    let state = match preparation.stage {
        _ if key.starts_with("dir:") => "folder",
        Stage::Waiting => "waiting",
        Stage::Fetching { .. } => "fetching",
        Stage::Unpacking => "unpacking",
        Stage::Provisioning { .. } => "provisioning",
        Stage::Ready => "ready",
        Stage::Failed => "failed",
    };
    let step = match &preparation.stage {
        Stage::Provisioning { step, of, name } => Some(format!("{step}/{of} {name}")),
        _ => None,
    };
    let next = preparation.due.map(|due| due.saturating_duration_since(Instant::now()));
    ImageStatus {
        image,
        state: state.to_owned(),
        bytes: host.images.bytes(&preparation.id),
        id: preparation.id,
        fetched,
        to_fetch,
        step,
        apps,
        error: preparation.error,
        next_look_ms: next.map(|next| u64::try_from(next.as_millis()).unwrap_or(u64::MAX)),
    }
}

/// The apps that have an image.
fn users(host: &Host, image: &str) -> Vec<AppName> {
    let apps = host.store.list();
    apps.iter()
        .filter(|(app, _)| images_of(app).any(|other| other == image))
        .map(|(app, _)| app.name.clone())
        .collect()
}
