//! What goes to stdout: lines for people, or JSON for programs.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::failure::Failure;

/// The command's stdout.
#[derive(Debug)]
pub(crate) struct Output {
    writer: io::BufWriter<io::Stdout>,
    json: bool,
    colour: bool,
}

/// A colour or weight; only terminals see it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Style {
    Bold,
    Dim,
    Red,
    Green,
    Yellow,
    Cyan,
}

impl Output {
    /// Stdout as it is; no colours unless it is a terminal, none with `NO_COLOR`.
    pub(crate) fn new(json: bool) -> Self {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let colour = wanted && !json && io::stdout().is_terminal();
        Self { writer: io::BufWriter::new(io::stdout()), json, colour }
    }

    /// Whether `--json` was given.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// One line.
    pub(crate) fn line(&mut self, line: &str) -> Result<(), Failure> {
        written(writeln!(self.writer, "{line}"))
    }

    /// One line of JSON.
    pub(crate) fn json(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let line = serde_json::to_string(value).map_err(|error| Failure::failed(error.to_string()))?;
        self.line(&line)
    }

    /// Shows what was written so far; streams flush each line.
    pub(crate) fn flush(&mut self) -> Result<(), Failure> {
        written(self.writer.flush())
    }

    /// `text` in a style, where that is seen.
    pub(crate) fn paint(&self, style: Style, text: &str) -> String {
        if !self.colour {
            return text.to_owned();
        }
        let code = match style {
            Style::Bold => "1",
            Style::Dim => "2",
            Style::Red => "31",
            Style::Green => "32",
            Style::Yellow => "33",
            Style::Cyan => "36",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

fn written(result: io::Result<()>) -> Result<(), Failure> {
    result.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::ReaderLeft,
        _ => Failure::failed(format!("cannot write to stdout: {error}")),
    })
}
