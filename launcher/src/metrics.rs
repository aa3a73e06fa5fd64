//! Figures for Prometheus. What is counted lies here; what is so now is asked for when somebody asks.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::AtomicU64},
};

use cmdb::AppName;
use launcher_client::wire::{RefusalCode, Status, WakeTiming};
use prometheus_client::{
    encoding::prometheus_text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use tokio::sync::oneshot;

use crate::{
    host::Host,
    scaler::{Cause, Verdict},
    supervisor::Message,
};

/// Most apps that have figures of their own: those with instances, in the order of their names.
const NAMED_APPS: usize = 1_000;
/// Upper edges of the histograms of start times, seconds.
const EDGES: [f64; 16] =
    [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0];

/// The labels of one figure.
pub type Labels<const N: usize> = [(&'static str, String); N];
/// Counters by labels.
pub type Counts<const N: usize> = Family<Labels<N>, Counter>;
type Figures<const N: usize> = Family<Labels<N>, Gauge>;
type Shares<const N: usize> = Family<Labels<N>, Gauge<f64, AtomicU64>>;
type Times = Family<Labels<1>, Histogram, fn() -> Histogram>;

/// See the module.
#[derive(Debug)]
pub struct Metrics {
    wakes: Counts<1>,
    starts: Counts<1>,
    start_times: Histogram,
    step_times: Times,
    decisions: Counts<2>,
    verdicts: Counts<2>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            wakes: Family::default(),
            starts: Family::default(),
            start_times: histogram(),
            step_times: Family::new_with_constructor(histogram),
            decisions: Family::default(),
            verdicts: Family::default(),
        }
    }
}

impl Metrics {
    /// A wake was answered: whether the app ran already, or why it was refused.
    pub fn woken(&self, outcome: Result<bool, &launcher_client::wire::Refusal>) {
        let outcome = match outcome {
            Ok(true) => "warm",
            Ok(false) => "cold",
            Err(refusal) => refusal.code.as_str(),
        };
        self.wakes.get_or_create(&[("outcome", outcome.to_owned())]).inc();
    }

    /// An instance listens.
    pub fn started(&self, timing: &WakeTiming) {
        self.starts.get_or_create(&[("outcome", "ready".to_owned())]).inc();
        self.start_times.observe(seconds(timing.total_us));
        for step in &timing.steps {
            self.step_times.get_or_create(&[("step", step.name.clone())]).observe(seconds(step.us));
        }
    }

    /// A start came to nothing; see [`RefusalCode`] for why.
    pub fn not_started(&self, why: &str) {
        let why = if why == RefusalCode::Busy.as_str() { "no-room" } else { why };
        self.starts.get_or_create(&[("outcome", why.to_owned())]).inc();
    }

    /// The scaler decided something; `kind` as its event's.
    pub fn decided(&self, kind: &'static str, cause: Cause) {
        let labels = [("decision", kind.to_owned()), ("cause", cause.as_str().to_owned())];
        self.decisions.get_or_create(&labels).inc();
    }

    /// A step was judged: one that added an instance, or raised a quota.
    pub fn judged(&self, added: bool, verdict: Verdict) {
        let verdict = match verdict {
            Verdict::Helped => "helped",
            Verdict::InVain => "in-vain",
            Verdict::Unknown => "unknown",
        };
        let step = if added { "scale-out" } else { "scale-up" };
        self.verdicts.get_or_create(&[("step", step.to_owned()), ("verdict", verdict.to_owned())]).inc();
    }

    fn register(&self, registry: &mut Registry) {
        registry.register("wakes", "Wakes that were answered, by outcome", self.wakes.clone());
        registry.register("starts", "Starts that have ended, by outcome", self.starts.clone());
        registry.register_with_unit(
            "start",
            "From the wake until the instance listened",
            Unit::Seconds,
            self.start_times.clone(),
        );
        registry.register_with_unit(
            "start_step",
            "The parts of that time, by step",
            Unit::Seconds,
            self.step_times.clone(),
        );
        registry.register(
            "scaling_decisions",
            "What the scaler decided, by decision and cause",
            self.decisions.clone(),
        );
        registry.register(
            "scaling_verdicts",
            "What came of its steps, by step and verdict",
            self.verdicts.clone(),
        );
    }
}

/// All figures in Prometheus' text format.
pub async fn scrape(host: &Arc<Host>) -> String {
    let mut registry = Registry::with_prefix("fastcontainer_launcher");
    host.metrics.register(&mut registry);
    registry.register("events", "Events, by kind", host.events.counts());
    register_governor(&mut registry, host);
    register_apps(&mut registry, host, &statuses(host).await);
    let mut text = String::new();
    // Writing into memory cannot fail.
    let _ = prometheus_text::encode(&mut text, &registry);
    text
}

/// Of every app that has, or had, an instance.
async fn statuses(host: &Arc<Host>) -> Vec<Status> {
    let asked: Vec<_> = host
        .supervisors()
        .into_iter()
        .map(|supervisor| {
            let (reply, status) = oneshot::channel();
            let _ = supervisor.send(Message::Status(reply));
            status
        })
        .collect();
    let mut all = Vec::new();
    for status in asked {
        all.extend(status.await.unwrap_or_default());
    }
    all.sort_by(|a, b| a.app.cmp(&b.app));
    all
}

fn register_governor(registry: &mut Registry, host: &Host) {
    let figures = host.governor.figures();
    let mut gauge = |name: &str, help: &str, value: usize| {
        let gauge = Gauge::<i64>::default();
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        registry.register(name, help, gauge);
    };
    gauge("starts_under_way", "Starts under way", figures.under_way);
    gauge("starts_waiting", "Starts that wait for a slot", figures.waiting);
    gauge("start_slots", "Starts that may be under way at a time", figures.limit);
}

fn register_apps(registry: &mut Registry, host: &Host, statuses: &[Status]) {
    let apps = Gauge::<i64>::default();
    apps.set(i64::try_from(host.store.list().len()).unwrap_or(i64::MAX));
    registry.register("apps", "Apps that are configured", apps);

    let instances = Figures::<1>::default();
    let by_app = Figures::<2>::default();
    let memory = Figures::<1>::default();
    let quotas = Shares::<1>::default();
    let throttled = Shares::<1>::default();
    for state in ["starting", "ready", "frozen", "draining"] {
        drop(instances.get_or_create(&[("state", state.to_owned())]));
    }
    let mut worst: BTreeMap<&AppName, u32> = BTreeMap::new();
    for status in statuses.iter().filter(|status| status.generation.is_some()) {
        instances.get_or_create(&[("state", status.state.clone())]).inc();
        if worst.len() >= NAMED_APPS && !worst.contains_key(&status.app) {
            continue;
        }
        let app = || ("app", status.app.to_string());
        let share = worst.entry(&status.app).or_default();
        *share = status.throttled.unwrap_or(0).max(*share);
        throttled.get_or_create(&[app()]).set(f64::from(*share) / 1_000.0);
        by_app.get_or_create(&[app(), ("state", status.state.clone())]).inc();
        memory.get_or_create(&[app()]).inc_by(i64::try_from(status.memory_bytes.unwrap_or(0)).unwrap_or(0));
        if let Some(quota) = status.cpu_limit {
            quotas.get_or_create(&[app()]).set(f64::from(quota) / 1_000.0);
        }
    }
    registry.register("instances", "Instances, by state", instances);
    registry.register("app_instances", "Instances of each app, by state", by_app);
    registry.register("app_memory_bytes", "Memory charged to the instances of each app", memory);
    registry.register(
        "app_cpu_quota_cores",
        "CPU quota in force for each instance of the app; absent: none",
        quotas,
    );
    registry.register(
        "app_cpu_throttled_ratio",
        "Periods in which the quota stopped the app's most throttled instance, since the quota began",
        throttled,
    );
}

fn histogram() -> Histogram {
    Histogram::new(EDGES)
}

fn seconds(us: u64) -> f64 {
    std::time::Duration::from_micros(us).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use launcher_client::wire::{Refusal, Step};

    use super::*;

    #[test]
    fn what_was_counted_is_told_in_prometheus_words() {
        let metrics = Metrics::default();
        metrics.woken(Ok(true));
        metrics.woken(Err(&Refusal::new(RefusalCode::Backoff, "")));
        metrics.not_started("busy");
        let steps = vec![Step { name: "clone".into(), us: 1_500 }];
        metrics.started(&WakeTiming { total_us: 3_000, steps, ..WakeTiming::default() });
        metrics.decided("scale-up", Cause::Quota);
        metrics.judged(false, Verdict::InVain);

        let mut registry = Registry::with_prefix("fastcontainer_launcher");
        metrics.register(&mut registry);
        let mut text = String::new();
        prometheus_text::encode(&mut text, &registry).unwrap();

        for line in [
            "fastcontainer_launcher_wakes_total{outcome=\"warm\"} 1",
            "fastcontainer_launcher_wakes_total{outcome=\"backoff\"} 1",
            "fastcontainer_launcher_starts_total{outcome=\"no-room\"} 1",
            "fastcontainer_launcher_start_seconds_count 1",
            "fastcontainer_launcher_start_step_seconds_bucket{step=\"clone\",le=\"0.002\"} 1",
            "fastcontainer_launcher_scaling_decisions_total{decision=\"scale-up\",cause=\"quota\"} 1",
            "fastcontainer_launcher_scaling_verdicts_total{step=\"scale-up\",verdict=\"in-vain\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
