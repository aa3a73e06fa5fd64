//! `events`: what happened, and what happens.

use launcher_client::wire::Event;

use crate::{
    cli::{self, Global},
    failure::Failure,
    output::{Output, Style},
    ps,
    target::Target,
    text,
};

/// Runs the command.
pub(crate) async fn run(global: &Global, options: &cli::Events, out: &mut Output) -> Result<(), Failure> {
    let target = Target::reach(global, &options.remote).await?;
    let mut written = Ok(());
    let streamed = target.events(options.since, options.follow, |event| {
        if options.app.is_none() || options.app == event.app {
            written = show(&event, out);
        }
        written.is_ok()
    });
    let streamed = streamed.await;
    written?;
    streamed
}

fn show(event: &Event, out: &mut Output) -> Result<(), Failure> {
    if out.is_json() {
        out.json(event)?;
    } else {
        let line = line(event);
        match colour(&event.kind) {
            Some(style) => out.line(&out.paint(style, &line))?,
            None => out.line(&line)?,
        }
    }
    out.flush()
}

fn line(event: &Event) -> String {
    let about = match (&event.app, event.generation) {
        (Some(app), Some(generation)) => format!("{app}.{}", ps::short(generation)),
        (Some(app), None) => app.to_string(),
        (None, _) => "-".to_owned(),
    };
    format!(
        "{}  {:>6}  {:<14}  {:<20}  {}",
        text::local_time(event.at_unix_ms),
        event.seq,
        text::clean(&event.kind),
        about,
        text::clean(&event.message)
    )
    .trim_end()
    .to_owned()
}

fn colour(kind: &str) -> Option<Style> {
    match kind {
        "start-failed" | "back-off" | "oom" | "config-error" => Some(Style::Red),
        "suspect" | "exited" => Some(Style::Yellow),
        "ready" => Some(Style::Green),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use cmdb::Generation;

    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_it_says() {
        let event = Event {
            seq: 7,
            at_unix_ms: 1_763_972_712_345,
            kind: "start-failed".into(),
            app: Some("blog".parse().unwrap()),
            generation: Some(Generation(1_763_972_712_345)),
            message: "exit status 1: no such\nfile".into(),
        };

        let line = line(&event);

        assert!(
            line.ends_with("7  start-failed    blog.712345           exit status 1: no such\\nfile"),
            "{line}"
        );
        assert!(line.contains(":12.345  "), "{line}");
    }
}
