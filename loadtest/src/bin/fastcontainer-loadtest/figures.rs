//! From what was seen to pictures.

use crate::{
    host::Request,
    kernel::of_app,
    moments::{self, MomentKind},
    run::Recorded,
    scenario::{Figure, Paper, Scenario},
    sheet::{Bar, Line, Mark, Panel, Picture, Sheet},
    stats::{mean, means, quantile},
};

/// Runs that last longer are drawn second by second, shorter ones in more detail.
const LONG_RUN_S: f64 = 60.0;

/// Nothing measured for so long is a gap in the curve.
const GAP_S: f64 = 2.5;

/// All pictures of a scenario.
pub(crate) fn draw(scenario: &Scenario, runs: &[Recorded]) -> anyhow::Result<Vec<Picture>> {
    let mut pictures = Vec::new();
    for figure in &scenario.figures {
        match figure {
            Figure::ResponseTime => pictures.push(response_times(scenario, runs).draw()?),
            Figure::Steps => {
                for run in runs {
                    pictures.push(steps(scenario, run).draw()?);
                }
            }
            Figure::Latency => pictures.push(latencies(&scenario.title, runs).draw()?),
        }
    }
    if let Some(paper) = &scenario.paper {
        pictures.push(of_paper(paper).draw()?);
    }
    Ok(pictures)
}

/// The app that a scenario's figures are about: that of the run's first load.
fn subject(run: &Recorded) -> &str {
    run.loads.first().map_or("", |load| &load.app)
}

fn response_times(scenario: &Scenario, runs: &[Recorded]) -> Sheet {
    let limit = runs.first().and_then(|run| run.app(subject(run))?.limit_ms());
    let mut panel = Panel {
        x_name: "seconds since the load began".into(),
        y_name: "mean response time of each second, ms".into(),
        height: 420,
        ..Panel::default()
    };
    for (index, run) in runs.iter().enumerate() {
        panel.curves.push(Line {
            name: run.name.clone(),
            colour: index,
            points: curve(run, subject(run), 1.0),
            is_stairs: false,
        });
        for (at, words) in &run.changes {
            panel.marks.push(Mark { at: (at - run.began_ms) / 1_000.0, words: words.clone(), colour: index });
        }
        for moment in moments::all(run, subject(run)) {
            let since = moment.at_ms - moments::since(run);
            let words = match moment.kind {
                MomentKind::Breach => moment.kind.name().to_owned(),
                kind => format!("{}, {since:.0} ms", kind.name()),
            };
            panel.marks.push(Mark { at: (moment.at_ms - run.began_ms) / 1_000.0, words, colour: index });
        }
    }
    if let Some(limit) = limit {
        let end = panel.curves.iter().flat_map(|line| &line.points).map(|(x, _)| *x).fold(1.0, f64::max);
        let points = vec![(0.0, limit), (end, limit)];
        panel.curves.push(Line { name: "[scale] response-time".into(), colour: 5, points, is_stairs: false });
    }
    Sheet { title: scenario.title.clone(), panels: vec![panel] }
}

/// Mean response times over slots of some seconds, each at its slot's middle.
pub(crate) fn curve(run: &Recorded, app: &str, width_s: f64) -> Vec<(f64, f64)> {
    let at = |request: &Request| (request.end_ms() - run.began_ms) / 1_000.0;
    let points: Vec<(f64, f64)> =
        run.requests_of(app).map(|request| (at(request), request.total_ms())).collect();
    means(&points, width_s).into_iter().map(|(at, ms)| (at + width_s / 2.0, ms)).collect()
}

fn of_paper(paper: &Paper) -> Sheet {
    let curves = paper.curves.iter().enumerate().map(|(colour, curve)| Line {
        name: curve.name.clone(),
        colour,
        points: curve.points.clone(),
        is_stairs: false,
    });
    let panel = Panel {
        x_name: "seconds".into(),
        y_name: "response time, ms".into(),
        height: 260,
        curves: curves.collect(),
        ..Panel::default()
    };
    Sheet { title: paper.words.clone(), panels: vec![panel] }
}

fn steps(scenario: &Scenario, run: &Recorded) -> Sheet {
    let app = subject(run);
    let seconds = |at_ms: f64| (at_ms - run.began_ms) / 1_000.0;
    let end = run.watched_until_ms;
    let x_range = Some((0.0, seconds(end).max(1.0)));
    let spans: Vec<(f64, f64)> = run
        .loads
        .iter()
        .filter(|load| load.app == app)
        .map(|load| (seconds(load.from_ms), seconds(load.to_ms)))
        .collect();
    let width = if seconds(end) > LONG_RUN_S { 1.0 } else { 0.25 };
    let line = |colour, points, is_stairs| Line { name: String::new(), colour, points, is_stairs };
    let scaled = run.events.iter().filter(|event| {
        event.app.as_deref().is_some_and(|name| name == app) && event.kind.starts_with("scale-")
    });
    let marks = scaled.map(|event| Mark {
        at: seconds(moments::event_ms(event)),
        words: event.kind.clone(),
        colour: 2,
    });
    let time = Panel {
        y_name: "response time, ms".into(),
        height: 240,
        x_range,
        curves: pieces(curve(run, app, width)).into_iter().map(|points| line(1, points, false)).collect(),
        marks: marks.collect(),
        spans: spans.clone(),
        ..Panel::default()
    };
    let stairs = |of: &dyn Fn(&crate::kernel::Sight) -> f64| -> Vec<(f64, f64)> {
        let mut points: Vec<(f64, f64)> =
            run.kernel.iter().map(|sight| (seconds(sight.at_ms).max(0.0), of(sight))).collect();
        points.extend(points.last().map(|(_, y)| (seconds(end), *y)));
        points
    };
    #[expect(clippy::cast_precision_loss, reason = "a handful of instances, thousandths of a core")]
    let instances = stairs(&|sight| of_app(sight, app).count() as f64);
    #[expect(clippy::cast_precision_loss, reason = "a handful of instances, thousandths of a core")]
    let quota = stairs(&|sight| {
        of_app(sight, app).filter_map(|(_, seen)| seen.quota).max().unwrap_or(0) as f64 / 10.0
    });
    let panel = |y_name: &str, y_least, points, colour, x_name: &str| Panel {
        x_name: x_name.into(),
        y_name: y_name.into(),
        height: 140,
        x_range,
        y_least,
        curves: vec![line(colour, points, true)],
        spans: spans.clone(),
        ..Panel::default()
    };
    Sheet {
        title: format!("{}: {}", scenario.title, run.name),
        panels: vec![
            time,
            panel("instances", 1.0, instances, 3, ""),
            panel("quota, % of a core", 10.0, quota, 4, "seconds since the begin; grey: load"),
        ],
    }
}

/// A curve without the stretches over which nothing was measured.
fn pieces(points: Vec<(f64, f64)>) -> Vec<Vec<(f64, f64)>> {
    let mut pieces: Vec<Vec<(f64, f64)>> = Vec::new();
    for point in points {
        match pieces.last_mut() {
            Some(piece) if piece.last().is_some_and(|(at, _)| point.0 - at < GAP_S) => piece.push(point),
            _ => pieces.push(vec![point]),
        }
    }
    pieces
}

fn latencies(title: &str, runs: &[Recorded]) -> Sheet {
    let mut panels = Vec::new();
    for run in runs {
        let mut bars = Vec::new();
        for (name, told) in by_load(run) {
            let figures = [("p50", told[0]), ("p90", told[1]), ("p99", told[2])];
            bars.extend(figures.into_iter().enumerate().map(|(colour, (quantile, value))| Bar {
                name: format!("{name}, {quantile}"),
                colour: colour + 1,
                value,
            }));
        }
        panels.push(Panel { y_name: format!("{}: ms", run.name), height: 240, bars, ..Panel::default() });
    }
    Sheet { title: title.to_owned(), panels }
}

/// p50, p90, p99 of each load, and of the other loads' apps while it runs.
fn by_load(run: &Recorded) -> Vec<(String, [f64; 3])> {
    let mut names: Vec<&str> = Vec::new();
    run.loads.iter().for_each(|load| {
        if !names.contains(&&*load.name) {
            names.push(&load.name)
        }
    });
    let quantiles = |name: &str| {
        let meant = run.loads.iter().find(|load| load.name == name)?;
        let spans: Vec<_> =
            run.loads.iter().filter(|l| l.name == name).map(|l| (l.from_ms, l.to_ms + 50.0)).collect();
        let within =
            |request: &&Request| spans.iter().any(|(from, to)| (*from..*to).contains(&request.end_ms()));
        let times: Vec<f64> = run.requests_of(&meant.app).filter(within).map(Request::total_ms).collect();
        mean(times.iter().copied())?;
        Some([0.5, 0.9, 0.99].map(|share| quantile(&times, share).unwrap_or(0.0)))
    };
    // Where other loads come while the first one goes on: how it fares before, and meanwhile.
    let disturbed = names.get(1..).unwrap_or_default().iter().flat_map(|other| {
        let app = subject(run);
        let spans: Vec<_> =
            run.loads.iter().filter(|l| l.name == *other).map(|l| (l.from_ms, l.to_ms)).collect();
        let begin = spans.iter().map(|(from, _)| *from).fold(f64::INFINITY, f64::min);
        let of = |times: Vec<f64>| [0.5, 0.9, 0.99].map(|share| quantile(&times, share).unwrap_or(0.0));
        let meets = |r: &&Request| {
            spans.iter().any(|(from, to)| r.end_ms() - r.total_ms() < *to && r.end_ms() > *from)
        };
        let before: Vec<f64> =
            run.requests_of(app).filter(|r| r.end_ms() < begin).map(Request::total_ms).collect();
        let meanwhile: Vec<f64> = run.requests_of(app).filter(meets).map(Request::total_ms).collect();
        let is_disturbed = names.first() != Some(other) && !before.is_empty();
        let both =
            [(format!("{app} before {other}"), of(before)), (format!("{app} during {other}"), of(meanwhile))];
        both.into_iter().filter(move |_| is_disturbed)
    });
    let disturbed: Vec<_> = disturbed.collect();
    names.into_iter().filter_map(|name| Some((name.to_owned(), quantiles(name)?))).chain(disturbed).collect()
}
