//! Figures for Prometheus. A request only adds to atomics, those that all requests share in as many copies as there are
//! threads; names, labels and text are made when somebody asks.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst},
    },
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet, prometheus_text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};

use crate::{
    house::House,
    pages::Fault,
    telemetry::{micros, millis},
    tenant::AppRuntime,
};

/// Most apps that have a label of their own; those that come later are counted together, as `_other` (no app can be called that).
const NAMED_APPS: usize = 1_000;
const OTHERS: &str = "_other";
/// Copies of what all threads add to; more threads than this share some.
const SHARDS: usize = 8;
/// Upper edges of the histograms, ms, from a warm answer to the longest hold.
const EDGES_MS: [u64; 15] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000];
/// Classes of status; 0: none was sent, for the client had gone.
const CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

/// What is counted for all apps together.
#[derive(Debug, Default)]
pub struct Metrics {
    shards: [Shard; SHARDS],
    /// In the order of [`Fault::CODES`].
    unanswered: [AtomicU64; Fault::CODES.len()],
    /// Requests that no app was found for.
    homeless: AppCounts,
    /// Apps that have a label of their own.
    named: AtomicUsize,
    /// When the launcher was last known to be there, ms on the house's clock plus one; 0: it is there now, or never was.
    launcher_lost: AtomicU64,
}

/// One thread's part, on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard {
    hold: Histogram,
    first_byte: Histogram,
    total: Histogram,
    new_connections: AtomicU64,
    reused_connections: AtomicU64,
    retries: AtomicU64,
}

#[derive(Debug, Default)]
struct Histogram {
    buckets: [AtomicU64; EDGES_MS.len() + 1],
    sum_us: AtomicU64,
}

/// What is counted for one app.
#[derive(Debug, Default)]
pub struct AppCounts {
    classes: [AtomicU64; CLASSES.len()],
    cold: AtomicU64,
    shed: AtomicU64,
    breaches: AtomicU64,
    /// Whether it has a label of its own.
    named: AtomicBool,
}

/// What became of one request.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Status sent; 0: none.
    pub status: u16,
    /// How long it waited, if it did.
    pub hold: Option<Duration>,
    /// From its last byte to the first of the answer, µs, if that was measured.
    pub first_byte_us: Option<u64>,
    /// The whole.
    pub total: Duration,
    /// Attempts after the first.
    pub retries: u32,
    /// Whether it waited for a start.
    pub cold: bool,
    /// Why the app did not answer; empty when it did.
    pub error: &'static str,
}

impl Metrics {
    /// A request has ended.
    pub fn request(&self, app: Option<&AppRuntime>, outcome: &Outcome) {
        if cfg!(not(feature = "measure")) {
            return;
        }
        let counts = app.map_or(&self.homeless, |app| &app.counts);
        let class = usize::from(outcome.status / 100);
        counts.classes[if class < CLASSES.len() { class } else { 0 }].fetch_add(1, Relaxed);
        let shard = self.shard();
        shard.total.record(micros(outcome.total));
        if let Some(us) = outcome.first_byte_us {
            shard.first_byte.record(us);
        }
        if let Some(hold) = outcome.hold {
            shard.hold.record(micros(hold));
        }
        if outcome.retries > 0 {
            shard.retries.fetch_add(outcome.retries.into(), Relaxed);
        }
        if outcome.cold {
            counts.cold.fetch_add(1, Relaxed);
        }
        if !outcome.error.is_empty() {
            if Fault::SHED.contains(&outcome.error) {
                counts.shed.fetch_add(1, Relaxed);
            }
            if let Some(index) = Fault::CODES.iter().position(|code| *code == outcome.error) {
                self.unanswered[index].fetch_add(1, Relaxed);
            }
        }
    }

    /// A connection to an instance is about to be used.
    pub fn connected(&self, reused: bool) {
        if cfg!(feature = "measure") {
            let shard = self.shard();
            let counter = if reused { &shard.reused_connections } else { &shard.new_connections };
            counter.fetch_add(1, Relaxed);
        }
    }

    /// The launcher can be reached, or no more.
    pub fn launcher(&self, there: bool, now: Duration) {
        self.launcher_lost.store(if there { 0 } else { millis(now).saturating_add(1) }, Relaxed);
    }

    /// An app has come: it has a label of its own if there is one left.
    pub fn app_came(&self, counts: &AppCounts) {
        let named =
            self.named.fetch_update(SeqCst, SeqCst, |named| (named < NAMED_APPS).then_some(named + 1));
        counts.named.store(named.is_ok(), SeqCst);
    }

    /// An app has gone; its label is free.
    pub fn app_gone(&self, counts: &AppCounts) {
        if counts.named.swap(false, SeqCst) {
            self.named.fetch_sub(1, SeqCst);
        }
    }

    fn shard(&self) -> &Shard {
        thread_local! {
            static MINE: usize = {
                static NEXT: AtomicUsize = AtomicUsize::new(0);
                NEXT.fetch_add(1, Relaxed) % SHARDS
            };
        }
        &self.shards[MINE.with(|mine| *mine)]
    }

    fn sum(&self, of: impl Fn(&Shard) -> &AtomicU64) -> u64 {
        self.shards.iter().map(|shard| of(shard).load(Relaxed)).sum()
    }
}

impl Histogram {
    fn record(&self, us: u64) {
        let bucket = EDGES_MS.partition_point(|edge| us > edge * 1_000);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(us, Relaxed);
    }
}

impl AppCounts {
    /// An instance of it has become slower than it may be.
    pub fn breach(&self) {
        self.breaches.fetch_add(1, Relaxed);
    }
}

/// All figures in Prometheus' text format.
#[must_use]
pub fn text(house: &Arc<House>) -> String {
    let mut registry = Registry::with_prefix("fastcontainer_proxy");
    registry.register_collector(Box::new(Scrape(Arc::clone(house))));
    let mut text = String::new();
    // Writing into memory cannot fail.
    let _ = prometheus_text::encode(&mut text, &registry);
    text
}

#[derive(Debug)]
struct Scrape(Arc<House>);

/// What one label says of one app, or of several that have no label of their own.
#[derive(Debug, Default)]
struct Row {
    app: String,
    classes: [u64; CLASSES.len()],
    cold: u64,
    shed: u64,
    breaches: u64,
    held: u64,
    in_flight: u64,
}

impl Row {
    fn add(&mut self, counts: &AppCounts) {
        for (sum, class) in self.classes.iter_mut().zip(&counts.classes) {
            *sum += class.load(Relaxed);
        }
        self.cold += counts.cold.load(Relaxed);
        self.shed += counts.shed.load(Relaxed);
        self.breaches += counts.breaches.load(Relaxed);
    }

    fn add_app(&mut self, app: &AppRuntime) {
        self.add(&app.counts);
        self.held += app.waiting() as u64;
        self.in_flight += app.upstreams().iter().map(|one| u64::from(one.in_flight())).sum::<u64>();
    }

    fn is_quiet(&self) -> bool {
        self.classes.iter().sum::<u64>() + self.held + self.in_flight + self.breaches == 0
    }
}

fn rows(house: &House) -> Vec<Row> {
    let mut homeless = Row::default();
    homeless.add(&house.metrics.homeless);
    let mut others = Row { app: OTHERS.to_owned(), ..Row::default() };
    let mut rows = Vec::new();
    for app in house.apps() {
        if app.counts.named.load(SeqCst) {
            let mut row = Row { app: app.name.to_string(), ..Row::default() };
            row.add_app(&app);
            rows.push(row);
        } else {
            others.add_app(&app);
        }
    }
    rows.sort_by(|a, b| a.app.cmp(&b.app));
    rows.extend([homeless, others]);
    // Who was never visited has nothing to say: most apps of a large host.
    rows.retain(|row| !row.is_quiet());
    rows
}

impl Collector for Scrape {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        let (house, metrics) = (&self.0, &self.0.metrics);
        apps(&mut to, &rows(house))?;
        labelled(
            &mut to,
            "unanswered",
            "Requests that no app answered, by reason as in the access log.",
            "reason",
            Fault::CODES.iter().zip(&metrics.unanswered).map(|(code, count)| (*code, count.load(Relaxed))),
        )?;
        let hold = "Waiting for an instance, of those that waited.";
        histogram(&mut to, metrics, "hold", hold, |one| &one.hold)?;
        let first_byte = "From the last byte of the request to the first of the answer.";
        histogram(&mut to, metrics, "first_byte", first_byte, |one| &one.first_byte)?;
        histogram(&mut to, metrics, "request_duration", "The whole of a request.", |one| &one.total)?;
        labelled(
            &mut to,
            "connections",
            "Connections to instances that a request went over: new ones, and reused ones.",
            "kind",
            [
                ("new", metrics.sum(|one| &one.new_connections)),
                ("reused", metrics.sum(|one| &one.reused_connections)),
            ],
        )?;
        let (_, unlogged) = house.telemetry.counts();
        let retries = metrics.sum(|one| &one.retries);
        counter(&mut to, "retries", "Attempts after a request's first.", retries)?;
        counter(
            &mut to,
            "unlogged",
            "Requests missing from the access log, which could not keep up.",
            unlogged,
        )?;
        let limit = house.config.hold_limit as u64;
        gauge(&mut to, "held_limit", "Most requests that may wait, in all apps together.", limit)?;
        gauge(&mut to, "apps", "Apps known.", house.apps().len() as u64)?;
        gauge(
            &mut to,
            "launcher_up",
            "Whether the launcher can be reached.",
            house.linked.load(SeqCst).into(),
        )?;
        let lost = metrics.launcher_lost.load(Relaxed);
        let age = lost.checked_sub(1).map_or(0, |lost| millis(house.begun.elapsed()).saturating_sub(lost));
        to.encode_descriptor(
            "cache_age",
            "How long ago the routing state was last known to be the newest; 0 while the launcher can be reached.",
            Some(&Unit::Seconds),
            MetricType::Gauge,
        )?
        .encode_gauge(&seconds(age.saturating_mul(1_000)))
    }
}

fn apps(to: &mut DescriptorEncoder<'_>, rows: &[Row]) -> fmt::Result {
    let mut family = to.encode_descriptor(
        "requests",
        "Requests that have ended, by app and class of status; app \"\": no app has the host name.",
        None,
        MetricType::Counter,
    )?;
    for row in rows {
        for (class, count) in CLASSES.iter().zip(row.classes).filter(|(_, count)| *count > 0) {
            let labels = [("app", row.app.as_str()), ("class", class)];
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
    }
    let by_app = |of: fn(&Row) -> u64| rows.iter().map(move |row| (row.app.as_str(), of(row)));
    labelled(to, "cold_requests", "Requests that waited for a start.", "app", by_app(|row| row.cold))?;
    labelled(to, "shed", "Requests refused because too many waited.", "app", by_app(|row| row.shed))?;
    let breaches = "Times that an instance was found slower than scale.response-time.";
    labelled(to, "breaches", breaches, "app", by_app(|row| row.breaches))?;
    for (name, help, of) in [
        ("held", "Requests that wait for an instance.", (|row| row.held) as fn(&Row) -> u64),
        ("in_flight", "Requests on instances.", |row| row.in_flight),
    ] {
        let mut family = to.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (app, value) in by_app(of) {
            ConstGauge::new(value).encode(family.encode_family(&[("app", app)])?)?;
        }
    }
    Ok(())
}

fn labelled<'a>(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &str,
    values: impl IntoIterator<Item = (&'a str, u64)>,
) -> fmt::Result {
    let mut family = to.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (value, count) in values {
        ConstCounter::new(count).encode(family.encode_family(&[(label, value)])?)?;
    }
    Ok(())
}

fn histogram(
    to: &mut DescriptorEncoder<'_>,
    metrics: &Metrics,
    name: &str,
    help: &str,
    of: fn(&Shard) -> &Histogram,
) -> fmt::Result {
    let edges = EDGES_MS.iter().map(|edge| seconds(edge * 1_000)).chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = edges
        .enumerate()
        .map(|(index, edge)| (edge, metrics.sum(|shard| &of(shard).buckets[index])))
        .collect();
    let count = buckets.iter().map(|(_, count)| count).sum();
    let sum = seconds(metrics.sum(|shard| &of(shard).sum_us));
    to.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?
        .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
}

fn counter(to: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    ConstCounter::new(value).encode(to.encode_descriptor(name, help, None, MetricType::Counter)?)
}

fn gauge(to: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    ConstGauge::new(value).encode(to.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

fn seconds(us: u64) -> f64 {
    Duration::from_micros(us).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_falls_below_the_edge_of_its_bucket() {
        let histogram = Histogram::default();
        for us in [0, 1_000, 1_001, 60_000_000, 60_000_001] {
            histogram.record(us);
        }
        let counts: Vec<u64> = histogram.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect();
        assert_eq!((counts[0], counts[1]), (2, 1));
        assert_eq!(counts[EDGES_MS.len() - 1..], [1, 1]);
        assert_eq!(histogram.sum_us.load(Relaxed), 120_002_002);
    }

    #[test]
    fn labels_are_bounded_and_come_free_again() {
        let metrics = Metrics::default();
        let all: Vec<AppCounts> = (0..NAMED_APPS + 1).map(|_| AppCounts::default()).collect();
        all.iter().for_each(|counts| metrics.app_came(counts));
        let named = |counts: &&AppCounts| counts.named.load(SeqCst);
        assert_eq!(all.iter().filter(named).count(), NAMED_APPS);
        metrics.app_gone(&all[0]);
        metrics.app_gone(&all[NAMED_APPS]);
        let next = AppCounts::default();
        metrics.app_came(&next);
        assert!(next.named.load(SeqCst));
    }
}
