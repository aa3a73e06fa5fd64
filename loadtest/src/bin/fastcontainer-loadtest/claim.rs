//! What a scenario says must hold, and whether it does.

use serde::Deserialize;

use crate::{
    host::Request,
    kernel::of_app,
    moments::{self, event_ms},
    run::Recorded,
    stats::{mean, quantile},
};

/// The scaler's steps.
const STEPS_UP: [&str; 2] = ["scale-up", "scale-out"];
const STEPS_DOWN: [&str; 2] = ["scale-down", "scale-in"];
/// Both clocks of a comparison are whole milliseconds.
const ROUNDING_MS: f64 = 2.0;

/// A line of `expect` in a scenario file. `docs/loadtest.md` has them all.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "claim", deny_unknown_fields, rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub(crate) enum Claim {
    /// Every request of every run was answered with 2xx.
    NoneFailed {},
    /// No request was given to an instance before it listened, and none had to be tried twice.
    NoneBeforeListening { run: String },
    /// From the breach to the first answer of the added instance.
    ServedWithin { run: String, app: String, ms: f64 },
    /// From the breach until the kernel has a higher quota.
    RaisedWithin { run: String, app: String, ms: f64 },
    /// The mean response time of one part of a run beside that of another.
    MeanRatio { run: String, app: String, part: Part, to_run: Option<String>, to_part: Part, at_most: f64 },
    /// One process from the begin to the end.
    OneProcess { run: String, app: String },
    /// The first thing that the scaler did, and its words.
    Decided { run: String, app: String, kind: String, says: String },
    /// What it did not do.
    Never { run: String, app: String, kinds: Vec<String> },
    /// What is there at the end, as the kernel has it.
    Ends { run: String, app: String, instances: Option<usize>, cpu: Option<u64> },
    /// Never more than that, as the kernel has it.
    AtMost { run: String, app: String, instances: usize, cpu: Option<u64> },
    /// Steps after each begin and end of the app's load, from the second period on.
    StepsPerEdge { run: String, app: String, at_most: usize },
    /// p99 while another load runs, beside that before it, or beside that of another run.
    P99Ratio { run: String, app: String, during: String, to_run: Option<String>, at_most: f64 },
    /// Instances that were started.
    Started { run: String, app: String, at_least: Option<usize>, at_most: Option<usize> },
}

/// Part of an app's requests, by the order of their ends.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Part {
    All,
    FirstHalf,
    SecondHalf,
}

/// A claim in words, and what was measured.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    pub(crate) words: String,
    pub(crate) measured: String,
    pub(crate) holds: bool,
}

impl Claim {
    /// The runs that it is about.
    pub(crate) fn runs(&self) -> Vec<&str> {
        match self {
            Self::NoneFailed {} => vec![],
            Self::MeanRatio { run, to_run, .. } | Self::P99Ratio { run, to_run, .. } => {
                std::iter::once(&**run).chain(to_run.as_deref()).collect()
            }
            Self::NoneBeforeListening { run }
            | Self::ServedWithin { run, .. }
            | Self::RaisedWithin { run, .. }
            | Self::OneProcess { run, .. }
            | Self::Decided { run, .. }
            | Self::Never { run, .. }
            | Self::Ends { run, .. }
            | Self::AtMost { run, .. }
            | Self::StepsPerEdge { run, .. }
            | Self::Started { run, .. } => vec![run],
        }
    }

    /// Whether it holds; `None`: a run that it is about was not made this time.
    pub(crate) fn check(&self, runs: &[Recorded]) -> Option<Finding> {
        let all: Option<Vec<&Recorded>> =
            self.runs().into_iter().map(|name| runs.iter().find(|run| run.name == name)).collect();
        let all = all?;
        let Some(run) = all.first() else { return Some(none_failed(runs)) };
        let (words, measured, holds) = match self {
            Self::NoneFailed {} => return Some(none_failed(runs)),
            Self::NoneBeforeListening { .. } => none_before_listening(run),
            Self::ServedWithin { app, ms, .. } => served_within(run, app, *ms),
            Self::RaisedWithin { app, ms, .. } => raised_within(run, app, *ms),
            Self::MeanRatio { app, part, to_part, at_most, .. } => {
                let other = all.get(1).unwrap_or(run);
                mean_ratio((run, *part), (other, *to_part), app, *at_most)
            }
            Self::OneProcess { app, .. } => one_process(run, app),
            Self::Decided { app, kind, says, .. } => decided(run, app, kind, says),
            Self::Never { app, kinds, .. } => never(run, app, kinds),
            Self::Ends { app, instances, cpu, .. } => ends(run, app, *instances, *cpu),
            Self::AtMost { app, instances, cpu, .. } => at_most(run, app, *instances, *cpu),
            Self::StepsPerEdge { app, at_most, .. } => steps_per_edge(run, app, *at_most),
            Self::P99Ratio { app, during, at_most, .. } => {
                p99_ratio(run, all.get(1).copied(), app, during, *at_most)
            }
            Self::Started { app, at_least, at_most, .. } => started(run, app, *at_least, *at_most),
        };
        let measured = measured.unwrap_or_else(|| "it did not happen".to_owned());
        Some(Finding { words: format!("{}: {words}", run.name), measured, holds })
    }
}

type Outcome = (String, Option<String>, bool);

fn none_failed(runs: &[Recorded]) -> Finding {
    let complete: u64 = runs.iter().flat_map(|run| &run.loads).map(|load| load.told.complete).sum();
    let failed: u64 = runs.iter().flat_map(|run| &run.loads).map(|load| load.told.failed).sum();
    // A client that leaves when its time is over is no failure; its request has no status.
    let refused = runs.iter().flat_map(|run| &run.requests).filter(|request| request.status >= 300).count();
    Finding {
        words: "every request was answered with 2xx".to_owned(),
        measured: format!(
            "{complete} requests, {failed} failed at the client, {refused} refused by the proxy"
        ),
        holds: complete > 0 && failed == 0 && refused == 0,
    }
}

fn none_before_listening(run: &Recorded) -> Outcome {
    let listened = |request: &Request| {
        let ready = run.events.iter().find(|e| e.kind == "ready" && e.generation == Some(request.generation));
        ready.is_some_and(|event| event_ms(event) <= request.forwarded_ms() + ROUNDING_MS)
    };
    let given: Vec<&Request> = run.requests.iter().filter(|request| request.generation != 0).collect();
    let early = given.iter().filter(|request| !listened(request)).count();
    let retries: u32 = run.requests.iter().map(|request| request.retries).sum();
    let words = "no request went to an instance that had not listened, none was tried twice".to_owned();
    (
        words,
        Some(format!("{early} of {} too early, {retries} second tries", given.len())),
        early == 0 && retries == 0,
    )
}

fn served_within(run: &Recorded, app: &str, ms: f64) -> Outcome {
    let words = format!("the added instance serves within {ms} ms after the breach");
    let (breach, served) = (moments::breach(run, app), moments::served(run, app));
    let (Some(breach), Some(served)) = (breach, served) else { return (words, None, false) };
    let part = |name: &str, at: Option<f64>| {
        at.map_or(String::new(), |at| format!("{name} {:.0} ms, ", at - breach))
    };
    let decided = part("decision", moments::decision(run, app).map(event_ms));
    let ready = part("listens", moments::ready(run, app).map(event_ms));
    (words, Some(format!("{decided}{ready}first answer {:.0} ms", served - breach)), served - breach <= ms)
}

fn raised_within(run: &Recorded, app: &str, ms: f64) -> Outcome {
    let words = format!("the kernel has a higher quota within {ms} ms after the breach");
    let quota = run.app(app).and_then(|app| app.cpu("cpu")).unwrap_or(u64::MAX);
    let (breach, raised) = (moments::breach(run, app), moments::raised(&run.kernel, app, quota));
    let (Some(breach), Some(raised)) = (breach, raised) else { return (words, None, false) };
    (words, Some(format!("{:.0} ms", raised - breach)), raised - breach <= ms)
}

/// The mean response time of a part of the app's requests, ms.
pub(crate) fn mean_of(run: &Recorded, app: &str, part: Part) -> Option<f64> {
    let times: Vec<f64> = run.requests_of(app).map(Request::total_ms).collect();
    let (first, second) = times.split_at(times.len() / 2);
    mean(match part {
        Part::All => times.iter().copied(),
        Part::FirstHalf => first.iter().copied(),
        Part::SecondHalf => second.iter().copied(),
    })
}

fn mean_ratio(one: (&Recorded, Part), other: (&Recorded, Part), app: &str, at_most: f64) -> Outcome {
    let name = |part| match part {
        Part::All => "all",
        Part::FirstHalf => "the first half",
        Part::SecondHalf => "the second half",
    };
    let of = if one.0.name == other.0.name { String::new() } else { format!(" of {:?}", other.0.name) };
    let words = format!(
        "mean response time of {} at most {:.0} % of that of {}{of}",
        name(one.1),
        at_most * 100.0,
        name(other.1)
    );
    match (mean_of(one.0, app, one.1), mean_of(other.0, app, other.1)) {
        (Some(one), Some(other)) => {
            let measured = format!("{one:.0} ms of {other:.0} ms: {:.0} %", one / other * 100.0);
            (words, Some(measured), one <= other * at_most)
        }
        _ => (words, None, false),
    }
}

fn one_process(run: &Recorded, app: &str) -> Outcome {
    let seen: std::collections::BTreeSet<(&str, i32)> = run
        .kernel
        .iter()
        .flat_map(|sight| of_app(sight, app))
        .filter_map(|(name, seen)| Some((name, seen.pid?)))
        .collect();
    let pids: Vec<String> = seen.iter().map(|(_, pid)| pid.to_string()).collect();
    (
        "the same process from begin to end".to_owned(),
        Some(format!("pid {}", pids.join(", "))),
        seen.len() == 1,
    )
}

fn decided(run: &Recorded, app: &str, kind: &str, says: &str) -> Outcome {
    let kinds = STEPS_UP.iter().chain(&STEPS_DOWN).chain(&["scale-none"]);
    let first = kinds.flat_map(|kind| run.events_of(app, kind).next()).min_by_key(|event| event.at_unix_ms);
    let holds = first.is_some_and(|event| event.kind == kind && event.message.contains(says));
    let measured = first.map(|event| format!("{}: {}", event.kind, event.message));
    (format!("the first decision is {kind}, because “{says}”"), measured, holds)
}

fn never(run: &Recorded, app: &str, kinds: &[String]) -> Outcome {
    let count: usize = kinds.iter().map(|kind| run.events_of(app, kind).count()).sum();
    (format!("no {}", kinds.join(", no ")), Some(format!("{count} of them")), count == 0)
}

fn ends(run: &Recorded, app: &str, instances: Option<usize>, cpu: Option<u64>) -> Outcome {
    let Some(last) = run.kernel.last() else { return ("the end".to_owned(), None, false) };
    let quotas: Vec<Option<u64>> = of_app(last, app).map(|(_, seen)| seen.quota).collect();
    let mut wanted = Vec::new();
    wanted.extend(instances.map(|count| format!("{count} instance(s)")));
    wanted.extend(cpu.map(|cpu| format!("a quota of {}", percent(Some(cpu)))));
    let holds = instances.is_none_or(|count| quotas.len() == count)
        && cpu.is_none_or(|cpu| quotas.iter().all(|quota| *quota == Some(cpu)));
    let shown: Vec<String> = quotas.iter().map(|quota| percent(*quota)).collect();
    let measured = format!("{} instance(s), quota {}", quotas.len(), shown.join(", "));
    (format!("after calm, in the kernel: {}", wanted.join(" with ")), Some(measured), holds)
}

fn at_most(run: &Recorded, app: &str, instances: usize, cpu: Option<u64>) -> Outcome {
    let most = run.kernel.iter().map(|sight| of_app(sight, app).count()).max().unwrap_or(0);
    let quotas = || run.kernel.iter().flat_map(|sight| of_app(sight, app)).filter_map(|(_, seen)| seen.quota);
    let highest = quotas().max();
    let mut words = format!("in the kernel never more than {instances} instance(s)");
    if let Some(cpu) = cpu {
        words += &format!(" with {} each", percent(Some(cpu)));
    }
    let measured =
        format!("at most {most}, the highest quota {}, {} changes seen", percent(highest), run.kernel.len());
    (
        words,
        Some(measured),
        most <= instances && cpu.is_none_or(|cpu| highest.is_none_or(|highest| highest <= cpu)),
    )
}

fn steps_per_edge(run: &Recorded, app: &str, at_most: usize) -> Outcome {
    let mut loads: Vec<(f64, f64)> =
        run.loads.iter().filter(|load| load.app == app).map(|load| (load.from_ms, load.to_ms)).collect();
    loads.sort_by(|one, other| one.0.total_cmp(&other.0));
    let steps = |kinds: &[&str], from: f64, to: f64| {
        let within = |event: &&crate::host::Event| (from..to).contains(&event_ms(event));
        kinds.iter().map(|kind| run.events_of(app, kind).filter(within).count()).sum::<usize>()
    };
    let mut told = Vec::new();
    let mut worst = 0;
    for (index, (from, to)) in loads.iter().enumerate() {
        let next = loads.get(index + 1).map_or(f64::INFINITY, |(next, _)| *next);
        let counts = [
            steps(&STEPS_UP, *from, *to),
            steps(&STEPS_DOWN, *from, *to),
            steps(&STEPS_UP, *to, next),
            steps(&STEPS_DOWN, *to, next),
        ];
        told.push(format!("+{}−{} / +{}−{}", counts[0], counts[1], counts[2], counts[3]));
        if index > 0 {
            worst = counts.into_iter().max().unwrap_or(0).max(worst);
        }
    }
    let measured =
        format!("steps up and down under load / in the pause, period by period: {}", told.join("; "));
    let words = format!("at most {at_most} step(s) per edge and direction after the first period");
    (words, Some(measured), worst <= at_most && loads.len() > 1)
}

/// p99 of the app's requests while a load of that name runs.
pub(crate) fn p99_during(run: &Recorded, app: &str, during: &str) -> Option<f64> {
    let loads: Vec<(f64, f64)> =
        run.loads.iter().filter(|load| load.name == during).map(|load| (load.from_ms, load.to_ms)).collect();
    let meets = |request: &&Request| {
        let begin = request.end_ms() - request.total_ms();
        loads.iter().any(|(from, to)| begin < *to && request.end_ms() > *from)
    };
    let times: Vec<f64> = run.requests_of(app).filter(meets).map(Request::total_ms).collect();
    quantile(&times, 0.99)
}

fn p99_before(run: &Recorded, app: &str, during: &str) -> Option<f64> {
    let first = run
        .loads
        .iter()
        .filter(|load| load.name == during)
        .map(|load| load.from_ms)
        .min_by(f64::total_cmp)?;
    let times: Vec<f64> =
        run.requests_of(app).filter(|request| request.end_ms() < first).map(Request::total_ms).collect();
    quantile(&times, 0.99)
}

fn p99_ratio(run: &Recorded, other: Option<&Recorded>, app: &str, during: &str, at_most: f64) -> Outcome {
    let (beside, base) = match other {
        Some(other) => (format!("that of {:?}", other.name), p99_during(other, app, during)),
        None => ("that before".to_owned(), p99_before(run, app, during)),
    };
    let words = format!("{app}'s p99 during {during} at most {at_most} times {beside}");
    match (p99_during(run, app, during), base) {
        (Some(now), Some(base)) => {
            let measured = format!("{now:.1} ms, {base:.1} ms: {:.2} times", now / base);
            (words, Some(measured), now <= base * at_most)
        }
        _ => (words, None, false),
    }
}

fn started(run: &Recorded, app: &str, at_least: Option<usize>, at_most: Option<usize>) -> Outcome {
    let began = |event: &&crate::host::Event| event_ms(event) >= run.began_ms;
    let count = run.events_of(app, "ready").filter(began).count();
    let wanted = match (at_least, at_most) {
        (Some(least), Some(most)) if least == most => format!("{least}"),
        (least, most) => {
            format!("{} to {}", least.unwrap_or(0), most.map_or("any".into(), |most| most.to_string()))
        }
    };
    let holds = at_least.is_none_or(|least| count >= least) && at_most.is_none_or(|most| count <= most);
    (format!("instances of {app} started: {wanted}"), Some(count.to_string()), holds)
}

/// Thousandths of a core as an operator writes them.
pub(crate) fn percent(thousandths: Option<u64>) -> String {
    thousandths.map_or_else(|| "none".to_owned(), |share| format!("{} %", share / 10))
}
