//! The report: one HTML page that needs nothing else, the same as Markdown, the figures as SVG and PNG, the numbers as JSON and CSV.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::{
    claim::{Finding, Part, mean_of},
    figures::curve,
    run::Recorded,
    sheet::Picture,
};

/// What is said of one scenario.
#[derive(Debug)]
pub(crate) struct Chapter {
    /// The scenario file's name without `.toml`.
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) about: String,
    pub(crate) findings: Vec<Finding>,
    pub(crate) tables: Vec<Table>,
    /// What the scaler decided, and other words.
    pub(crate) notes: Vec<String>,
    pub(crate) pictures: Vec<Picture>,
    /// For each run: what FastContainer logged.
    pub(crate) logs: Vec<String>,
    /// For each run: seconds and mean response times.
    pub(crate) curves: Vec<(String, Vec<(f64, f64)>)>,
}

/// A table.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) head: Vec<String>,
    pub(crate) rows: Vec<Vec<String>>,
}

impl Chapter {
    /// Whether all holds.
    pub(crate) fn holds(&self) -> bool {
        self.findings.iter().all(|finding| finding.holds)
    }
}

/// The loads of all runs.
pub(crate) fn loads_table(runs: &[Recorded]) -> Table {
    let head = [
        "run",
        "load",
        "requests",
        "failed",
        "seconds",
        "requests/s",
        "mean ms",
        "p50 ms",
        "p99 ms",
        "log: halves' means ms",
    ];
    let ms = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |ms| format!("{ms:.1}"));
    let mut rows = Vec::new();
    for run in runs {
        for load in &run.loads {
            let told = &load.told;
            #[expect(clippy::cast_precision_loss, reason = "a count of requests")]
            let rate = if told.seconds > 0.0 { told.complete as f64 / told.seconds } else { 0.0 };
            let half =
                |part| mean_of(run, &load.app, part).map_or_else(|| "–".to_owned(), |ms| format!("{ms:.0}"));
            rows.push(vec![
                run.name.clone(),
                load.name.clone(),
                told.complete.to_string(),
                told.failed.to_string(),
                format!("{:.1}", told.seconds),
                format!("{rate:.0}"),
                ms(told.mean_ms),
                ms(told.p50_ms),
                ms(told.p99_ms),
                format!("{}, {}", half(Part::FirstHalf), half(Part::SecondHalf)),
            ]);
        }
    }
    Table { head: head.map(ToOwned::to_owned).into(), rows }
}

/// What the scaler said, run by run.
pub(crate) fn decisions(runs: &[Recorded]) -> Vec<String> {
    let mut notes = Vec::new();
    for run in runs {
        let words = if run.about.is_empty() { String::new() } else { format!(": {}", run.about) };
        notes.push(format!("{}{words}", run.name));
        let told =
            run.events.iter().filter(|event| event.kind.starts_with("scale-") || event.kind == "verdict");
        for event in told.take(40) {
            let at = (crate::moments::event_ms(event) - run.began_ms) / 1_000.0;
            let app = event.app.as_deref().unwrap_or("-");
            notes.push(format!("    {at:.3} s  {app}  {}: {}", event.kind, event.message));
        }
    }
    notes
}

/// Curves for the CSV file.
pub(crate) fn curves(runs: &[Recorded]) -> Vec<(String, Vec<(f64, f64)>)> {
    let subject = |run: &Recorded| run.loads.first().map_or(String::new(), |load| load.app.clone());
    runs.iter().map(|run| (run.name.clone(), curve(run, &subject(run), 1.0))).collect()
}

/// Writes everything into the folder.
pub(crate) fn write(folder: &Path, machine: &str, chapters: &[Chapter]) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let keep = |name: String, bytes: &[u8]| {
        fs::write(folder.join(&name), bytes).with_context(|| folder.join(&name).display().to_string())
    };
    for chapter in chapters {
        for (index, picture) in chapter.pictures.iter().enumerate() {
            keep(format!("{}-{}.svg", chapter.id, index + 1), picture.svg.as_bytes())?;
            keep(format!("{}-{}.png", chapter.id, index + 1), &picture.png)?;
        }
        for (index, log) in chapter.logs.iter().enumerate() {
            keep(format!("{}-{}.log", chapter.id, index + 1), log.as_bytes())?;
        }
        let mut csv = "run,second,mean_ms\n".to_owned();
        for (run, points) in &chapter.curves {
            for (at, ms) in points {
                // Writing to a String cannot fail.
                let _ = writeln!(csv, "\"{run}\",{at},{ms:.3}");
            }
        }
        keep(format!("{}.csv", chapter.id), csv.as_bytes())?;
    }
    keep("report.json".into(), serde_json::to_string_pretty(&as_json(machine, chapters))?.as_bytes())?;
    keep("report.md".into(), as_markdown(machine, chapters).as_bytes())?;
    keep("report.html".into(), as_html(machine, chapters).as_bytes())
}

fn as_json(machine: &str, chapters: &[Chapter]) -> Value {
    let chapter = |chapter: &Chapter| {
        let finding = |f: &Finding| json!({ "claim": f.words, "measured": f.measured, "holds": f.holds });
        let table = |t: &Table| json!({ "head": t.head, "rows": t.rows });
        json!({
            "scenario": chapter.id,
            "holds": chapter.holds(),
            "claims": chapter.findings.iter().map(finding).collect::<Vec<_>>(),
            "tables": chapter.tables.iter().map(table).collect::<Vec<_>>(),
            "notes": chapter.notes,
        })
    };
    json!({ "machine": machine, "scenarios": chapters.iter().map(chapter).collect::<Vec<_>>() })
}

/// As a text.
pub(crate) fn as_markdown(machine: &str, chapters: &[Chapter]) -> String {
    let mut text = format!("# FastContainer under load\n\n{machine}\n");
    for chapter in chapters {
        let _ = write!(text, "\n## {} ({})\n\n{}\n\n", chapter.title, chapter.id, chapter.about.trim());
        for finding in &chapter.findings {
            let _ = writeln!(text, "- {} {}: {}", sign(finding), finding.words, finding.measured);
        }
        for table in &chapter.tables {
            let row = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
            let rule = vec!["---".to_owned(); table.head.len()];
            text += "\n";
            text += &(row(&table.head)
                + &row(&rule)
                + &table.rows.iter().map(|cells| row(cells)).collect::<String>());
        }
        if !chapter.notes.is_empty() {
            let _ = write!(text, "\n```\n{}\n```\n", chapter.notes.join("\n"));
        }
    }
    text
}

fn sign(finding: &Finding) -> &'static str {
    if finding.holds { "holds" } else { "**DOES NOT HOLD**" }
}

fn as_html(machine: &str, chapters: &[Chapter]) -> String {
    let mut page = HEAD.to_owned();
    let _ =
        write!(page, "<h1>FastContainer under load</h1><p>{}</p><ul class=\"contents\">", escape(machine));
    for chapter in chapters {
        let (class, word) =
            if chapter.holds() { ("holds", "all holds") } else { ("fails", "something does not hold") };
        let (id, title) = (escape(&chapter.id), escape(&chapter.title));
        let _ = write!(page, "<li><a href=\"#{id}\">{title}</a> <span class=\"{class}\">{word}</span></li>");
    }
    page += "</ul>";
    for chapter in chapters {
        let _ = write!(page, "<section id=\"{}\"><h2>{}</h2>", escape(&chapter.id), escape(&chapter.title));
        for paragraph in chapter.about.trim().split("\n\n") {
            let _ = write!(page, "<p>{}</p>", escape(paragraph));
        }
        page += "<table class=\"claims\"><tr><th></th><th>What must hold</th><th>What was measured</th></tr>";
        for finding in &chapter.findings {
            let (class, word) = if finding.holds { ("holds", "holds") } else { ("fails", "does not hold") };
            let (words, measured) = (escape(&finding.words), escape(&finding.measured));
            let _ =
                write!(page, "<tr><td class=\"{class}\">{word}</td><td>{words}</td><td>{measured}</td></tr>");
        }
        page += "</table>";
        for picture in &chapter.pictures {
            let _ =
                write!(page, "<figure aria-label=\"{}\">{}</figure>", escape(&picture.title), picture.svg);
        }
        for table in &chapter.tables {
            let cells = |tag: &str, cells: &[String]| {
                cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect::<String>()
            };
            let _ = write!(page, "<table><tr>{}</tr>", cells("th", &table.head));
            for row in &table.rows {
                let _ = write!(page, "<tr>{}</tr>", cells("td", row));
            }
            page += "</table>";
        }
        if !chapter.notes.is_empty() {
            let notes = escape(&chapter.notes.join("\n"));
            let _ =
                write!(page, "<details open><summary>What was decided</summary><pre>{notes}</pre></details>");
        }
        page += "</section>";
    }
    page + "</main></body></html>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const HEAD: &str = "<!doctype html>
<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">
<title>FastContainer under load</title><style>
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif }
body { margin: 0; background: #f4f7f8; color: #1d2528 }
main { max-width: 64rem; margin: auto; padding: 1rem 1.5rem 4rem }
h1, h2 { color: #0b7285 } h2 { margin-top: 0 }
section { background: #fff; border-radius: .6rem; padding: 1.2rem 1.5rem; margin: 1.5rem 0; box-shadow: 0 2px 12px #0001 }
table { border-collapse: collapse; font-size: .88rem; margin: 1rem 0; display: block; overflow-x: auto }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #dde5e7; vertical-align: top }
.holds { color: #087f5b; font-weight: 600; white-space: nowrap } .fails { color: #c92a2a; font-weight: 600; white-space: nowrap }
figure { margin: 1rem 0 } figure svg { width: 100%; height: auto }
pre { background: #f4f7f8; padding: .8rem; overflow-x: auto; font-size: .8rem }
</style></head><body><main>
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_says_what_holds_and_what_does_not() {
        let finding = |holds| Finding { words: "p90 < 1".into(), measured: "2".into(), holds };
        let chapter = Chapter {
            id: "fig3".into(),
            title: "Scale-out".into(),
            about: "Once.\n\nTwice.".into(),
            findings: vec![finding(true), finding(false)],
            tables: vec![Table { head: vec!["run".into()], rows: vec![vec!["<one>".into()]] }],
            notes: vec!["a note".into()],
            pictures: vec![],
            logs: vec!["said".into()],
            curves: vec![("one".into(), vec![(0.5, 10.0)])],
        };
        assert!(!chapter.holds());
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "2 cores", &[chapter]).unwrap();
        let read = |name| fs::read_to_string(folder.path().join(name)).unwrap();
        assert!(read("report.html").contains("p90 &lt; 1") && read("report.html").contains("does not hold"));
        assert!(read("report.md").contains("- **DOES NOT HOLD** p90 < 1: 2"));
        assert_eq!(read("fig3.csv"), "run,second,mean_ms\n\"one\",0.5,10.000\n");
        assert!(read("report.json").contains("\"holds\": false"));
    }
}
