//! One run: a host, loads, changes; and all that was seen of it.

use std::{
    io::{Read as _, Seek as _, SeekFrom},
    path::Path,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::Context as _;

use crate::{
    host::{Event, Host, Request},
    kernel::{Sight, Watch, now_ms, put_before_others},
    scenario::{App, ChangePlan, LoadPlan, RunPlan, Scenario, merge},
    tools::{Target, Told, make_requests},
};

/// More apps than this are looked at less often.
const MANY_APPS: usize = 8;

/// All that was seen of a run. Moments are ms since 1970.
#[derive(Debug)]
pub(crate) struct Recorded {
    pub(crate) name: String,
    pub(crate) about: String,
    /// When the first load could begin.
    pub(crate) began_ms: f64,
    /// The end of the settling.
    pub(crate) watched_until_ms: f64,
    pub(crate) apps: Vec<App>,
    pub(crate) loads: Vec<Loaded>,
    pub(crate) changes: Vec<(f64, String)>,
    /// The proxy's access log, by the end of each request.
    pub(crate) requests: Vec<Request>,
    pub(crate) events: Vec<Event>,
    /// What FastContainer logged.
    pub(crate) log: String,
    /// From the begin until the end of the settling.
    pub(crate) kernel: Vec<Sight>,
}

/// A load that was made, once.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    pub(crate) name: String,
    /// `shop-*` stands for several.
    pub(crate) app: String,
    pub(crate) from_ms: f64,
    pub(crate) to_ms: f64,
    pub(crate) told: Told,
}

/// Where and how runs are made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    /// Folder of the built programs.
    pub(crate) programs: &'a Path,
    /// Where relative images are.
    pub(crate) root: &'a Path,
    /// Whether the containers go before whatever else the machine does.
    pub(crate) before_others: bool,
    /// Whether the long form is run.
    pub(crate) long: bool,
}

impl Recorded {
    /// Whose requests are meant: the app, or each of `shop-*`.
    pub(crate) fn requests_of<'a>(&'a self, app: &'a str) -> impl Iterator<Item = &'a Request> {
        self.requests.iter().filter(move |request| is_meant(app, &request.app))
    }

    /// The app of that name.
    pub(crate) fn app(&self, name: &str) -> Option<&App> {
        self.apps.iter().find(|app| is_meant(name, &app.name))
    }

    /// Events of that kind about the app.
    pub(crate) fn events_of<'a>(&'a self, app: &'a str, kind: &'a str) -> impl Iterator<Item = &'a Event> {
        let mine = move |event: &Event| event.app.as_deref().is_some_and(|name| is_meant(app, name));
        self.events.iter().filter(move |event| event.kind == kind && mine(event))
    }
}

/// Whether a pattern such as `shop-*` means that app.
pub(crate) fn is_meant(pattern: &str, app: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == app, |stem| app.starts_with(stem))
}

/// Makes the run.
pub(crate) fn make(scenario: &Scenario, plan: &RunPlan, place: Place<'_>) -> anyhow::Result<Recorded> {
    let apps = scenario.apps_of(Some(plan), place.long, place.root);
    let host = Host::up(place.programs, &apps, &plan.up)?;
    // The quota of a warm app comes with its first byte; what it did before is no part of the run.
    std::thread::sleep(Duration::from_millis(300));
    let before = host.requests()?.len();
    let cgroup = host.cgroup()?;
    if place.before_others {
        put_before_others(&cgroup)?;
    }
    let watch = Watch::begin(&cgroup, apps.len() > MANY_APPS);
    let begun = Instant::now();
    let began_ms = now_ms();

    let over = AtomicBool::new(false);
    let (loads, changes) = std::thread::scope(|scope| {
        let loads: Vec<_> = plan
            .load
            .iter()
            .enumerate()
            .map(|(index, load)| {
                let (host, apps) = (&host, &apps);
                scope.spawn(move || make_load(load, index, host, apps, begun, place.long))
            })
            .collect();
        let changes =
            scope.spawn(|| make_changes(&plan.change, plan, &host, &apps, place.long, &over, before));
        let loads: Vec<_> =
            loads.into_iter().map(|load| load.join().map_err(|_| anyhow::anyhow!("a load died"))).collect();
        over.store(true, Relaxed);
        (loads, changes.join())
    });
    let loads =
        loads.into_iter().collect::<Result<anyhow::Result<Vec<_>>, _>>()??.into_iter().flatten().collect();
    let changes = changes.map_err(|_| anyhow::anyhow!("the changes died"))??;

    // The log is written some moments after a request's end.
    std::thread::sleep(
        plan.settle
            .map_or(Duration::ZERO, |settle| settle.seconds(place.long))
            .max(Duration::from_millis(200)),
    );
    let kernel = watch.end();
    let watched_until_ms = now_ms();
    let mut requests = host.requests()?.split_off(before);
    requests.sort_by(|one, other| one.end_ms().total_cmp(&other.end_ms()));
    let events = host.events()?;
    let log = host.log();
    host.end()?;
    Ok(Recorded {
        name: plan.name.clone(),
        about: plan.about.clone(),
        began_ms,
        watched_until_ms,
        apps,
        loads,
        changes,
        requests,
        events,
        log,
        kernel,
    })
}

fn make_load(
    load: &LoadPlan,
    index: usize,
    host: &Host,
    apps: &[App],
    begun: Instant,
    long: bool,
) -> anyhow::Result<Vec<Loaded>> {
    let at = begun + load.at.map_or(Duration::ZERO, |at| at.seconds(long));
    std::thread::sleep(at.saturating_duration_since(Instant::now()));
    let targets: Vec<Target> = apps
        .iter()
        .filter(|app| is_meant(&load.app, &app.name))
        .map(|app| Target { port: host.port, host: app.host(), path: load.path.clone() })
        .collect();
    let times = load.times.map_or(1, |times| times.whole(long));
    let name = load.name.clone().unwrap_or_else(|| load.app.clone());
    let mut all = Vec::new();
    for time in 0..times {
        if time > 0 {
            std::thread::sleep(load.pause.map_or(Duration::ZERO, |pause| pause.seconds(long)));
        }
        let from_ms = now_ms();
        let told = make_requests(load, &targets, long, &host.scratch(&format!("load-{index}-{time}")))
            .with_context(|| host.log_tail())?;
        all.push(Loaded { name: name.clone(), app: load.app.clone(), from_ms, to_ms: now_ms(), told });
    }
    Ok(all)
}

/// Changes vhost files when the first load has come so far.
fn make_changes(
    changes: &[ChangePlan],
    plan: &RunPlan,
    host: &Host,
    apps: &[App],
    long: bool,
    over: &AtomicBool,
    before: usize,
) -> anyhow::Result<Vec<(f64, String)>> {
    let whole = plan.load.first().and_then(|load| load.requests).map_or(0.0, |requests| requests.of(long));
    let mut done = Vec::new();
    let mut lines = Lines::default();
    for change in changes {
        while lines.count(&host.access_log()) < f64::from(u32::try_from(before)?) + whole * change.after_share
        {
            if over.load(Relaxed) {
                anyhow::bail!("the load was over before {:?}", change.about);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        for app in apps.iter().filter(|app| app.name == change.app) {
            let mut changed = app.clone();
            merge(&mut changed.vhost, &change.set);
            host.rewrite(&changed)?;
        }
        done.push((now_ms(), change.about.clone()));
    }
    Ok(done)
}

/// Counts the lines of a file that grows.
#[derive(Default)]
struct Lines {
    read: u64,
    count: f64,
}

impl Lines {
    fn count(&mut self, path: &Path) -> f64 {
        let mut text = Vec::new();
        // It may not be there yet.
        if let Ok(mut file) = std::fs::File::open(path)
            && file.seek(SeekFrom::Start(self.read)).is_ok()
            && file.read_to_end(&mut text).is_ok()
        {
            self.read += text.len() as u64;
            self.count += text.iter().filter(|byte| **byte == b'\n').map(|_| 1.0).sum::<f64>();
        }
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_means_all_of_a_kind() {
        assert!(is_meant("shop-*", "shop-12") && is_meant("shop", "shop"));
        assert!(!is_meant("shop-*", "shops") && !is_meant("shop", "shop-1"));
    }
}
