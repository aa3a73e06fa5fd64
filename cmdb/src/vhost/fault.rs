//! What is wrong with a vhost file, and how it is shown.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet, renderer::DecorStyle};
use serde::Serialize;

/// One fault.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Fault {
    /// The file.
    pub file: PathBuf,
    /// Line, from 1; 0 when the fault is the whole file's.
    pub line: usize,
    /// Column in characters, from 1; 0 when the fault is the whole file's.
    pub column: usize,
    /// What stands there; empty for the whole file.
    pub text: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub mend: String,
    /// Where in the file, in bytes.
    #[serde(skip)]
    pub(super) span: std::ops::Range<usize>,
}

impl Fault {
    /// A fault of a file as a whole.
    pub(super) fn of_file(file: &Path, message: String, mend: &str) -> Self {
        let (file, mend) = (file.to_owned(), mend.to_owned());
        Self { file, line: 0, column: 0, text: String::new(), message, mend, span: 0..0 }
    }

    /// A fault at a place of `source`.
    pub(super) fn at(
        file: &Path,
        source: &str,
        span: std::ops::Range<usize>,
        message: String,
        mend: String,
    ) -> Self {
        let start = floor_boundary(source, span.start);
        let end = floor_boundary(source, span.end.max(start));
        let before = &source[..start];
        let line = before.bytes().filter(|b| *b == b'\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        let text = source[start..end].lines().next().unwrap_or_default().chars().take(80).collect();
        let (message, mend) = (printable(message), printable(mend));
        Self { file: file.to_owned(), line, column, text, message, mend, span: start..end }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if self.line > 0 {
            write!(f, "{}:{}:", self.line, self.column)?;
        }
        write!(f, " {}", self.message)?;
        if !self.mend.is_empty() {
            write!(f, "; {}", self.mend)?;
        }
        Ok(())
    }
}

/// The fault as a compiler would show it. `source` is the file's text where it is at hand.
#[must_use]
pub fn render(fault: &Fault, source: Option<&str>, colour: bool) -> String {
    let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
    let renderer = renderer.decor_style(DecorStyle::Ascii);
    let path = fault.file.to_string_lossy();
    let title = Level::ERROR.primary_title(fault.message.as_str());
    let help = Level::HELP.message(fault.mend.as_str());
    let source = source.map(without_mark);
    // The file may have changed since the fault was found: then only its place is told.
    let shows = source.filter(|source| {
        fault.line > 0
            && source.get(fault.span.clone()).is_some_and(|text| text.starts_with(first_chars(&fault.text)))
    });
    match shows {
        Some(source) => {
            let mark = AnnotationKind::Primary.span(fault.span.clone());
            let report = &[title.element(Snippet::source(source).path(path).annotation(mark)).element(help)];
            renderer.render(report)
        }
        None => {
            let place = if fault.line > 0 {
                format!("{path}:{}:{}", fault.line, fault.column)
            } else {
                path.into_owned()
            };
            let at = Level::NOTE.message(format!("in {place}"));
            let report = &[title.element(at).element(help)];
            renderer.render(report)
        }
    }
}

/// The text without a byte order mark: places are counted from after it.
pub(super) fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// Messages quote what the file says. They stay on one line, and steer no terminal.
fn printable(text: String) -> String {
    if !text.contains(char::is_control) {
        return text;
    }
    let mut shown = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if c.is_control() { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown
}

fn first_chars(text: &str) -> &str {
    text.char_indices().nth(20).map_or(text, |(end, _)| &text[..end])
}

fn floor_boundary(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}
