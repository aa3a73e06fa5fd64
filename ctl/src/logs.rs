//! `logs`: the last output of an app.

use launcher_client::wire::{LogLine, Reply, Request};

use crate::{
    cli::{self, Global},
    failure::Failure,
    output::{Output, Style},
    ps,
    target::Target,
    text,
};

/// Runs the command.
pub(crate) async fn run(global: &Global, options: cli::Logs, out: &mut Output) -> Result<(), Failure> {
    let target = Target::reach(global, &options.remote).await?;
    let request = Request::Logs { app: options.app, lines: options.lines };
    let lines = target
        .list(request, |reply| match reply {
            Reply::Log(line) => Some(line),
            _ => None,
        })
        .await?;
    for line in &lines {
        if out.is_json() {
            out.json(line)?;
        } else {
            let shown = shown(line);
            match line.stream.as_str() {
                "stderr" => out.line(&out.paint(Style::Yellow, &shown))?,
                _ => out.line(&shown)?,
            }
        }
    }
    Ok(())
}

fn shown(line: &LogLine) -> String {
    let time = text::local_time(line.at_unix_ms);
    let stream = text::clean(&line.stream);
    format!("{time}  {}  {stream:<6}  {}", ps::short(line.generation), text::clean(&line.line))
}

#[cfg(test)]
mod tests {
    use cmdb::Generation;

    use super::*;

    #[test]
    fn output_of_a_container_stays_on_its_line() {
        let line = LogLine {
            generation: Generation(1_763_972_712_345),
            at_unix_ms: 1_763_972_712_345,
            stream: "stderr".into(),
            line: "AH00558: \x1b]0;owned\x07".into(),
        };

        assert!(shown(&line).ends_with("712345  stderr  AH00558: \\x1b]0;owned\\x07"), "{}", shown(&line));
    }
}
