//! `fastcontainer-loadtest`: drives a real FastContainer with `ab` and `wrk`, and says what came of it. `docs/loadtest.md` is its manual.
#![forbid(unsafe_code)]

mod claim;
mod figures;
mod host;
mod kernel;
mod moments;
mod peers;
mod report;
mod run;
mod scenario;
mod sheet;
mod stats;
mod tools;

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, bail};
use clap::Parser;

use crate::{report::Chapter, run::Place, scenario::Scenario};

const AFTER: &str = "\
Exit codes:
  0  everything that the scenarios claim holds
  1  something does not hold; the report says what
  2  wrong usage, or something could not be run

Examples:
  fastcontainer-loadtest                          the short form of every scenario
  fastcontainer-loadtest fig3 fig4 --long         the paper's experiment in full: about half an hour
  fastcontainer-loadtest ./my-shop.toml           a scenario of one's own";

/// Runs scenarios against FastContainer and draws what happened.
#[derive(Debug, Parser)]
#[command(name = "fastcontainer-loadtest", version, after_help = AFTER, max_term_width = 110)]
struct Cli {
    /// Names of shipped scenarios or paths of scenario files; all shipped ones if none is given
    scenario: Vec<String>,
    /// The long form: as many requests as in the paper
    #[arg(long)]
    long: bool,
    /// Where the report goes
    #[arg(long, value_name = "DIR", default_value = "target/loadtest")]
    out: PathBuf,
    /// Folder of the built programs; the folder of this program if not given
    #[arg(long, value_name = "DIR", env = "FC_BIN_DIR")]
    programs: Option<PathBuf>,
    /// On a machine that others use, too: give the containers' cgroup the weight of nice -10 (run this program with `nice -n -10`, too)
    #[arg(long)]
    before_others: bool,
    /// Folder of the shipped scenarios
    #[arg(long, value_name = "DIR", default_value = "loadtest/scenarios")]
    scenarios: PathBuf,
}

fn main() -> ExitCode {
    match work(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Runs everything; whether all holds.
fn work(cli: &Cli) -> anyhow::Result<bool> {
    let missing = tools::missing();
    if !missing.is_empty() {
        bail!("{} not found: `scripts/install-missing loadtest` installs them", missing.join(", "));
    }
    let own = std::env::current_exe()?;
    let programs =
        cli.programs.clone().or_else(|| own.parent().map(Path::to_owned)).context("no folder of programs")?;
    let root = std::env::current_dir()?;
    let place = Place { programs: &programs, root: &root, long: cli.long, before_others: cli.before_others };
    let mut chapters = Vec::new();
    let mut failed = Vec::new();
    for path in paths(cli)? {
        let id = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let scenario = Scenario::read(&path)?;
        match chapter(&id, &scenario, place) {
            Ok(chapter) => {
                chapter.findings.iter().for_each(|finding| {
                    let sign = if finding.holds { "holds" } else { "DOES NOT HOLD" };
                    say(&format!("    {sign}: {}: {}", finding.words, finding.measured));
                });
                chapters.push(chapter);
            }
            // The others may still tell something.
            Err(error) => failed.push(format!("{id}: {error:#}")),
        }
        // After each: a long evening's work must not be lost with its last hour.
        report::write(&cli.out, &machine(cli.long), &chapters)?;
    }
    say(&format!("==> {}", cli.out.join("report.html").display()));
    if !failed.is_empty() {
        bail!("{}", failed.join("\n"));
    }
    Ok(chapters.iter().all(Chapter::holds))
}

fn paths(cli: &Cli) -> anyhow::Result<Vec<PathBuf>> {
    if cli.scenario.is_empty() {
        let folder =
            std::fs::read_dir(&cli.scenarios).with_context(|| cli.scenarios.display().to_string())?;
        let mut all: Vec<PathBuf> = folder.flatten().map(|entry| entry.path()).collect();
        all.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
        all.sort();
        return Ok(all);
    }
    let path = |name: &String| {
        if name.ends_with(".toml") { PathBuf::from(name) } else { cli.scenarios.join(format!("{name}.toml")) }
    };
    Ok(cli.scenario.iter().map(path).collect())
}

fn chapter(id: &str, scenario: &Scenario, place: Place<'_>) -> anyhow::Result<Chapter> {
    say(&format!("==> {id}: {}", scenario.title));
    let mut runs = Vec::new();
    for plan in scenario.runs.iter().filter(|plan| place.long || !plan.long_only) {
        say(&format!("    {}", plan.name));
        runs.push(run::make(scenario, plan, place).with_context(|| format!("run {:?}", plan.name))?);
    }
    let mut chapter = Chapter {
        id: id.to_owned(),
        title: scenario.title.clone(),
        about: scenario.about.clone(),
        findings: scenario.expect.iter().filter_map(|claim| claim.check(&runs)).collect(),
        tables: Vec::new(),
        notes: report::decisions(&runs),
        pictures: figures::draw(scenario, &runs)?,
        logs: runs.iter().map(|run| run.log.clone()).collect(),
        curves: report::curves(&runs),
    };
    if !runs.is_empty() {
        chapter.tables.push(report::loads_table(&runs));
    }
    if let Some(plan) = &scenario.peers {
        say("    in turns");
        let compared = peers::compare(plan, &scenario.apps_of(None, place.long, place.root), place)?;
        chapter.findings.extend(compared.findings);
        chapter.tables.push(compared.table);
        chapter.notes.extend(compared.notes);
        chapter.pictures.extend(compared.pictures);
    }
    Ok(chapter)
}

/// What it was run on, for whoever compares.
fn machine(long: bool) -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("?", |(_, m)| m);
    let count = cpus.lines().filter(|line| line.starts_with("processor")).count();
    let kernel = read("/proc/sys/kernel/osrelease");
    let load = read("/proc/loadavg");
    let form = if long { "long" } else { "short" };
    format!(
        "{form} form; {count} × {model}, Linux {}, load average at the end {}",
        kernel.trim(),
        load.split(' ').take(3).collect::<Vec<_>>().join(" ")
    )
}

/// One line for whoever waits.
fn say(line: &str) {
    // Nobody reads any more: the report is written all the same.
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}
