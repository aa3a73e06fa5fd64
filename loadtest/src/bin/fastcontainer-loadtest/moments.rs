//! The moments of a run that matter: when the app became too slow, what was decided, when it took effect.

use std::collections::{BTreeMap, VecDeque};

use crate::{
    host::Event,
    kernel::{Sight, of_app},
    run::Recorded,
    stats::{mean, quantile},
};

/// As in the proxy: a second is looked at, and fewer responses say nothing.
const WINDOW_MS: f64 = 1_000.0;
const FEW: usize = 4;

/// A moment, ms since 1970, in words.
#[derive(Clone, Debug)]
pub(crate) struct Moment {
    pub(crate) at_ms: f64,
    pub(crate) kind: MomentKind,
}

/// What it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum MomentKind {
    Breach,
    Decision,
    Ready,
    Effect,
}

impl MomentKind {
    /// For the legend.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Breach => "breach",
            Self::Decision => "decision",
            Self::Ready => "ready",
            Self::Effect => "effect",
        }
    }
}

/// From when on it could scale: from the last change of its file on.
pub(crate) fn since(run: &Recorded) -> f64 {
    run.changes.last().map_or(run.began_ms, |(at, _)| *at)
}

/// When the app was first too slow, by the access log: the p90 of an instance's first bytes within a second was above the limit.
pub(crate) fn breach(run: &Recorded, app: &str) -> Option<f64> {
    let limit = run.app(app)?.limit_ms()?;
    let since = since(run);
    let mut ends: Vec<_> = run.requests_of(app).filter(|request| request.generation != 0).collect();
    ends.sort_by(|one, other| one.first_byte_ms().total_cmp(&other.first_byte_ms()));
    let mut windows: BTreeMap<u64, VecDeque<(f64, f64)>> = BTreeMap::new();
    for request in ends {
        let now = request.first_byte_ms();
        let window = windows.entry(request.generation).or_default();
        window
            .push_back((now, f64::from(u32::try_from(request.first_byte_us).unwrap_or(u32::MAX)) / 1_000.0));
        while window.front().is_some_and(|(at, _)| at + WINDOW_MS < now) {
            window.pop_front();
        }
        if now >= since && window.len() >= FEW {
            let times: Vec<f64> = window.iter().map(|(_, ms)| *ms).collect();
            if quantile(&times, 0.9).is_some_and(|p90| p90 > limit) {
                return Some(now);
            }
        }
    }
    None
}

/// The first step upwards.
pub(crate) fn decision<'a>(run: &'a Recorded, app: &'a str) -> Option<&'a Event> {
    let up = run.events_of(app, "scale-up").next();
    let out = run.events_of(app, "scale-out").next();
    [up, out].into_iter().flatten().min_by_key(|event| event.at_unix_ms)
}

/// When the first added instance listened.
pub(crate) fn ready<'a>(run: &'a Recorded, app: &'a str) -> Option<&'a Event> {
    let added = run.events_of(app, "scale-out").next()?.generation;
    run.events_of(app, "ready").find(|event| event.generation == added)
}

/// When the first added instance had given its first answer.
pub(crate) fn served(run: &Recorded, app: &str) -> Option<f64> {
    let added = run.events_of(app, "scale-out").next()?.generation?;
    let mine = run.requests_of(app).filter(|request| request.generation == added && request.status == 200);
    mine.map(crate::host::Request::first_byte_ms).min_by(f64::total_cmp)
}

/// When the kernel had a quota above `configured`.
pub(crate) fn raised(sights: &[Sight], app: &str, configured: u64) -> Option<f64> {
    let high = |sight: &&Sight| {
        of_app(sight, app).any(|(_, seen)| seen.quota.is_some_and(|quota| quota > configured))
    };
    sights.iter().find(high).map(|sight| sight.at_ms)
}

/// The first quarter of a second after the decision in which responses took at most three quarters of what they took in
/// the second before it.
fn effect(run: &Recorded, app: &str, decided_ms: f64) -> Option<f64> {
    let within = |from: f64, to: f64| {
        let then = run.requests_of(app).filter(move |r| (from..to).contains(&r.end_ms()));
        mean(then.map(crate::host::Request::total_ms))
    };
    let before = within(decided_ms - 1_000.0, decided_ms)?;
    let last = run.requests_of(app).last()?.end_ms();
    let mut at = decided_ms;
    while at < last {
        if within(at, at + 250.0).is_some_and(|now| now <= before * 0.75) {
            return Some(at + 250.0);
        }
        at += 50.0;
    }
    None
}

/// All of them, in the order of time.
pub(crate) fn all(run: &Recorded, app: &str) -> Vec<Moment> {
    let decision = decision(run, app).map(event_ms);
    let mut moments = Vec::new();
    let mut add = |kind, at_ms: Option<f64>| moments.extend(at_ms.map(|at_ms| Moment { at_ms, kind }));
    if decision.is_some() {
        add(MomentKind::Breach, breach(run, app));
    }
    add(MomentKind::Decision, decision);
    let quota = run.app(app).and_then(|app| app.cpu("cpu"));
    let raised = quota.and_then(|quota| raised(&run.kernel, app, quota));
    add(MomentKind::Ready, ready(run, app).map(event_ms).or(raised));
    add(MomentKind::Effect, decision.and_then(|at| effect(run, app, at)));
    moments.sort_by(|one, other| one.at_ms.total_cmp(&other.at_ms));
    moments
}

/// An event's moment.
#[expect(clippy::cast_precision_loss, reason = "ms since 1970 are far below 2^53")]
pub(crate) fn event_ms(event: &Event) -> f64 {
    event.at_unix_ms as f64
}
