//! Scenario files: what is run, how hard, and what must hold afterwards. `docs/loadtest.md` explains them.

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::{Context as _, bail};
use serde::Deserialize;

use crate::{claim::Claim, peers::PeersPlan};

/// A scenario file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Scenario {
    /// Heading of its chapter of the report.
    pub(crate) title: String,
    /// What is run and why, in words.
    pub(crate) about: String,
    /// Which figures are drawn.
    #[serde(default)]
    pub(crate) figures: Vec<Figure>,
    /// What somebody else measured, drawn beside.
    pub(crate) paper: Option<Paper>,
    /// The apps.
    #[serde(rename = "app", default)]
    pub(crate) apps: Vec<AppPlan>,
    /// Each run has a host of its own.
    #[serde(rename = "run", default)]
    pub(crate) runs: Vec<RunPlan>,
    /// The same work for others.
    pub(crate) peers: Option<PeersPlan>,
    /// What must hold afterwards.
    #[serde(rename = "expect", default)]
    pub(crate) expect: Vec<Claim>,
}

/// A figure of the report.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Figure {
    /// Mean response time over time, a curve for each run, with the scaler's moments.
    ResponseTime,
    /// Load, response time, instances and quota over time, a picture for each run.
    Steps,
    /// p50, p90 and p99 of each load of each run.
    Latency,
}

/// Figures of a publication.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Paper {
    /// Caption.
    pub(crate) words: String,
    /// Its curves: seconds, ms.
    pub(crate) curves: Vec<Curve>,
}

/// A curve of a publication.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Curve {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// An app, or several of one kind.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct AppPlan {
    /// Its name; with `count` a number is added: `shop-1`, `shop-2`.
    pub(crate) name: String,
    /// How many of them.
    pub(crate) count: Option<Amount>,
    /// It is asked once before the loads begin, and has its quota then.
    #[serde(default)]
    pub(crate) warm: bool,
    /// What is asked to see that it is there.
    #[serde(default = "slash")]
    pub(crate) path: String,
    /// Its vhost file, as in `conf.d`; `server-name` may be left out.
    pub(crate) vhost: toml::Table,
}

/// One run: a host with the apps, loads, changes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct RunPlan {
    /// Short, for the legend.
    pub(crate) name: String,
    /// What is different in it.
    #[serde(default)]
    pub(crate) about: String,
    /// Keys of vhost files that differ: app name → tables and keys.
    #[serde(default)]
    pub(crate) set: BTreeMap<String, toml::Table>,
    /// More arguments for `fastcontainer up`.
    #[serde(default)]
    pub(crate) up: Vec<String>,
    /// The loads.
    pub(crate) load: Vec<LoadPlan>,
    /// Vhost files that change meanwhile.
    #[serde(default)]
    pub(crate) change: Vec<ChangePlan>,
    /// How long it is watched after the last load.
    pub(crate) settle: Option<Amount>,
    /// Only with `--long`.
    #[serde(default)]
    pub(crate) long_only: bool,
}

/// Requests of one kind.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct LoadPlan {
    /// What makes them.
    pub(crate) tool: Tool,
    /// For which app; `shop-*`: for each of them.
    pub(crate) app: String,
    /// Legend; the app's name if not given.
    pub(crate) name: Option<String>,
    /// Path and query.
    #[serde(default = "slash")]
    pub(crate) path: String,
    /// Connections at a time.
    #[serde(default = "one")]
    pub(crate) clients: Amount,
    /// wrk: so long each client waits before its next request.
    pub(crate) think_ms: Option<u32>,
    /// ab: how many in all.
    pub(crate) requests: Option<Amount>,
    /// wrk and ab: for how long.
    pub(crate) seconds: Option<Amount>,
    /// When it begins.
    #[serde(default)]
    pub(crate) at: Option<Amount>,
    /// So many times, with `pause` between.
    pub(crate) times: Option<Amount>,
    /// Seconds between.
    pub(crate) pause: Option<Amount>,
    /// ab: keeps its connections.
    #[serde(default)]
    pub(crate) keep_alive: bool,
}

/// What makes requests.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Tool {
    /// ApacheBench.
    Ab,
    /// wrk.
    Wrk,
    /// Our own: all connections are made first, then all requests are sent at once, one each.
    Burst,
}

/// A vhost file that changes while loads run.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct ChangePlan {
    /// Which app's.
    pub(crate) app: String,
    /// When this share of the first load's requests is answered.
    pub(crate) after_share: f64,
    /// What changes.
    pub(crate) set: toml::Table,
    /// In words, for the figure.
    pub(crate) about: String,
}

/// A number that may differ between the short and the long form.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(untagged)]
pub(crate) enum Amount {
    Same(f64),
    Each { short: f64, long: f64 },
}

impl Amount {
    /// The number.
    pub(crate) fn of(self, long: bool) -> f64 {
        match self {
            Self::Same(number) => number,
            Self::Each { long: number, .. } if long => number,
            Self::Each { short, .. } => short,
        }
    }

    /// As a whole number that is not negative.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped first")]
    pub(crate) fn whole(self, long: bool) -> u32 {
        self.of(long).round().clamp(0.0, f64::from(u32::MAX)) as u32
    }

    /// As seconds.
    pub(crate) fn seconds(self, long: bool) -> Duration {
        Duration::try_from_secs_f64(self.of(long)).unwrap_or_default()
    }
}

fn slash() -> String {
    "/".to_owned()
}

fn one() -> Amount {
    Amount::Same(1.0)
}

/// An app as it is put into `conf.d`.
#[derive(Clone, Debug)]
pub(crate) struct App {
    pub(crate) name: String,
    pub(crate) vhost: toml::Table,
    pub(crate) warm: bool,
    pub(crate) path: String,
}

impl App {
    /// The host name to ask for.
    pub(crate) fn host(&self) -> String {
        let names = self.vhost.get("server-name").and_then(toml::Value::as_array);
        let first = names.and_then(|names| names.first()).and_then(toml::Value::as_str);
        first.map_or_else(|| format!("{}.test", self.name), ToOwned::to_owned)
    }

    /// `[scale] response-time`, ms.
    pub(crate) fn limit_ms(&self) -> Option<f64> {
        milliseconds(self.text("scale", "response-time")?)
    }

    /// `[resources] KEY`, thousandths of a core.
    pub(crate) fn cpu(&self, key: &str) -> Option<u64> {
        let text = self.text("resources", key)?;
        let number: f64 = text.trim_end_matches('%').trim().parse().ok()?;
        let thousandths = number * if text.ends_with('%') { 10.0 } else { 1_000.0 };
        Some(u64::from(Amount::Same(thousandths).whole(false)))
    }

    fn text(&self, table: &str, key: &str) -> Option<&str> {
        self.vhost.get(table)?.get(key)?.as_str()
    }
}

fn milliseconds(text: &str) -> Option<f64> {
    let unit = [("ms", 1.0), ("s", 1_000.0), ("m", 60_000.0)];
    unit.into_iter().find_map(|(unit, ms)| Some(text.strip_suffix(unit)?.trim().parse::<f64>().ok()? * ms))
}

impl Scenario {
    /// Reads a file and looks whether its parts fit together.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let scenario: Self = toml::from_str(text)?;
        for run in &scenario.runs {
            for name in run.set.keys().chain(run.change.iter().map(|change| &change.app)) {
                if !scenario.apps.iter().any(|app| app.name == *name) {
                    bail!("run {:?} changes the app {name:?}, which is none", run.name);
                }
            }
            for load in &run.load {
                let stem = load.app.trim_end_matches("-*");
                if !scenario.apps.iter().any(|app| app.name == stem) {
                    bail!("run {:?} loads the app {:?}, which is none", run.name, load.app);
                }
                if load.tool == Tool::Wrk && load.seconds.is_none() {
                    bail!("run {:?}: wrk needs `seconds`", run.name);
                }
                if load.tool == Tool::Ab && load.seconds.is_none() && load.requests.is_none() {
                    bail!("run {:?}: ab needs `requests` or `seconds`", run.name);
                }
            }
        }
        for claim in &scenario.expect {
            for run in claim.runs() {
                if !scenario.runs.iter().any(|known| known.name == run) {
                    bail!("{claim:?} is about the run {run:?}, which is none");
                }
            }
        }
        Ok(scenario)
    }

    /// The apps, with what is different in that run.
    pub(crate) fn apps_of(&self, run: Option<&RunPlan>, long: bool, root: &Path) -> Vec<App> {
        let mut apps = Vec::new();
        for plan in &self.apps {
            let mut vhost = plan.vhost.clone();
            if let Some(set) = run.and_then(|run| run.set.get(&plan.name)) {
                merge(&mut vhost, set);
            }
            absolute_image(&mut vhost, root);
            let names = match plan.count {
                None => vec![plan.name.clone()],
                Some(count) => (1..=count.whole(long)).map(|n| format!("{}-{n}", plan.name)).collect(),
            };
            for name in names {
                let mut vhost = vhost.clone();
                let host = toml::Value::Array(vec![format!("{name}.test").into()]);
                vhost.entry("server-name").or_insert(host);
                apps.push(App { name, vhost, warm: plan.warm, path: plan.path.clone() });
            }
        }
        apps
    }
}

/// Lays `over` over `under`, table by table.
pub(crate) fn merge(under: &mut toml::Table, over: &toml::Table) {
    for (key, value) in over {
        match (under.get_mut(key), value) {
            (Some(toml::Value::Table(under)), toml::Value::Table(over)) => merge(under, over),
            _ => drop(under.insert(key.clone(), value.clone())),
        }
    }
}

/// A relative path of an image starts where the load test runs, not in the run's own folder.
fn absolute_image(vhost: &mut toml::Table, root: &Path) {
    let container = vhost.get_mut("container").and_then(toml::Value::as_table_mut);
    let Some(toml::Value::String(image)) = container.and_then(|table| table.get_mut("image")) else { return };
    if let Some((kind @ ("dir" | "tar" | "oci"), path)) = image.split_once(':') {
        *image = format!("{kind}:{}", root.join(path).display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shipped_scenario_is_right() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        let mut count = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let scenario = Scenario::read(&path).unwrap_or_else(|error| panic!("{error:#}"));
            assert!(!scenario.about.is_empty());
            count += 1;
        }
        assert!(count > 1);
    }

    const SMALL: &str = r#"
        title = "t"
        about = "a"
        [[app]]
        name = "shop"
        count = { short = 2, long = 3 }
        [app.vhost.container]
        image = "dir:images/hello"
        [app.vhost.scale]
        max = 1
        response-time = "250ms"
        [[run]]
        name = "one"
        set.shop.scale.max = 2
        [[run.load]]
        tool = "ab"
        app = "shop-*"
        requests = { short = 10, long = 1e3 }
    "#;

    #[test]
    fn a_run_lays_its_keys_over_the_apps() {
        let scenario = Scenario::parse(SMALL).unwrap();
        let run = &scenario.runs[0];
        let apps = scenario.apps_of(Some(run), false, Path::new("/top"));
        assert_eq!(apps.iter().map(|app| &*app.name).collect::<Vec<_>>(), ["shop-1", "shop-2"]);
        assert_eq!(apps[0].vhost["scale"]["max"].as_integer(), Some(2));
        assert_eq!(apps[0].limit_ms(), Some(250.0));
        assert_eq!(apps[0].vhost["container"]["image"].as_str(), Some("dir:/top/images/hello"));
        assert_eq!(apps[1].host(), "shop-2.test");
        assert_eq!(run.load[0].requests.unwrap().whole(true), 1000);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (from, to) in
            [("app = \"shop-*\"", "app = \"blog\""), ("requests", "requets"), ("\"ab\"", "\"wrk\"")]
        {
            assert!(Scenario::parse(&SMALL.replace(from, to)).is_err(), "{to}");
        }
    }
}
