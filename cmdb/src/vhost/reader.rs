//! Reads values out of a parsed file and collects every fault on the way.

use std::{ops::Range, path::Path, time::Duration};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{fault::Fault, schema};
use crate::units::{UnitError, parse_duration};

/// The faults of one file.
#[derive(Debug)]
pub(super) struct Reader<'f> {
    pub(super) path: &'f Path,
    pub(super) source: &'f str,
    pub(super) faults: Vec<Fault>,
    /// Whether the text is TOML. Of text that could not be read whole, what is not there says nothing.
    pub(super) whole: bool,
    /// How many faults are told; those beyond are counted.
    pub(super) most: usize,
    pub(super) untold: usize,
}

/// One table of the file. A value that is missing or wrong has told its fault already, and reads as `None`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Section<'t> {
    pub(super) name: &'static str,
    table: Option<&'t DeTable<'t>>,
    /// Where to point for what is missing.
    pub(super) span: (usize, usize),
}

/// A value and where it stands.
#[derive(Clone, Debug)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) span: Range<usize>,
}

impl Section<'_> {
    /// Whether the key stands there, whatever its value.
    pub(super) fn has(self, name: &str) -> bool {
        lookup(self.table, name).is_some()
    }
}

impl Reader<'_> {
    pub(super) fn fault(&mut self, span: Range<usize>, message: impl Into<String>, mend: impl Into<String>) {
        if self.faults.len() >= self.most {
            self.untold += 1;
            return;
        }
        // The parser's stand-in for what it could not read is no second fault.
        if !self.whole && self.faults.iter().any(|told| told.line > 0 && told.span.start == span.start) {
            return;
        }
        self.faults.push(Fault::at(self.path, self.source, span, message.into(), mend.into()));
    }

    /// A fault that something is not there.
    pub(super) fn absent(&mut self, span: Range<usize>, message: impl Into<String>, mend: impl Into<String>) {
        if self.whole {
            self.fault(span, message, mend);
        }
    }

    /// The top of the file.
    pub(super) fn top<'t>(&mut self, root: &'t Spanned<DeTable<'t>>) -> Section<'t> {
        let table = root.get_ref();
        self.refuse_unknown("", table, |name| schema::SECTIONS.iter().any(|(section, _)| *section == name));
        Section { name: "", table: Some(table), span: (0, 0) }
    }

    /// A `[section]`; one that is not there is empty.
    pub(super) fn section<'t>(&mut self, top: Section<'t>, name: &'static str) -> Section<'t> {
        let absent = Section { name, table: None, span: (0, 0) };
        let Some((key, value)) = lookup(top.table, name) else { return absent };
        match value.get_ref() {
            DeValue::Table(table) => {
                self.refuse_unknown(name, table, |_| false);
                Section { name, table: Some(table), span: (key.start, key.end) }
            }
            _ => {
                self.fault(
                    value.span(),
                    format!("\"{name}\" must be a table"),
                    format!("write [{name}] on a line of its own"),
                );
                absent
            }
        }
    }

    /// The `[[section]]`s.
    pub(super) fn sections<'t>(&mut self, top: Section<'t>, name: &'static str) -> Vec<Section<'t>> {
        let Some((key, value)) = lookup(top.table, name) else { return Vec::new() };
        let mend = format!("write [[{name}]] on a line of its own, once for each");
        let DeValue::Array(items) = value.get_ref() else {
            self.fault(key, format!("\"{name}\" must be an array of tables"), mend);
            return Vec::new();
        };
        let mut sections = Vec::new();
        for item in items {
            match item.get_ref() {
                DeValue::Table(table) => {
                    self.refuse_unknown(name, table, |_| false);
                    sections.push(Section {
                        name,
                        table: Some(table),
                        span: (item.span().start, item.span().end),
                    });
                }
                _ => self.fault(item.span(), format!("each \"{name}\" must be a table"), mend.clone()),
            }
        }
        sections
    }

    /// Tells that something must be there and is not.
    pub(super) fn missing(&mut self, section: Section<'_>, name: &str) {
        let example = schema::find(section.name, name).map_or("", |key| key.example);
        let (message, mend) = match section.name {
            "" => (format!("\"{name}\" is missing"), format!("begin the file with {name} = {example}")),
            _ if section.table.is_none() => (
                format!("[{}] with \"{name}\" is missing", section.name),
                format!("add [{}] and beneath it {name} = {example}", section.name),
            ),
            other => (format!("[{other}] has no \"{name}\""), format!("add {name} = {example}")),
        };
        self.absent(section.span.0..section.span.1, message, mend);
    }

    pub(super) fn text(&mut self, section: Section<'_>, name: &str) -> Option<At<String>> {
        let (_, value) = lookup(section.table, name)?;
        match value.get_ref() {
            DeValue::String(text) => {
                let at = At { value: text.to_string(), span: value.span() };
                self.without_nul(at)
            }
            _ => self.wrong(section.name, name, value),
        }
    }

    pub(super) fn texts(&mut self, section: Section<'_>, name: &str) -> Option<At<Vec<At<String>>>> {
        let (_, value) = lookup(section.table, name)?;
        let DeValue::Array(items) = value.get_ref() else { return self.wrong(section.name, name, value) };
        let mut texts = Vec::new();
        let mut whole = true;
        for item in items {
            let text = match item.get_ref() {
                DeValue::String(text) => self.without_nul(At { value: text.to_string(), span: item.span() }),
                _ => self.wrong(section.name, name, item),
            };
            match text {
                Some(text) => texts.push(text),
                None => whole = false,
            }
        }
        whole.then_some(At { value: texts, span: value.span() })
    }

    /// A list of texts, or one alone.
    pub(super) fn text_or_texts(&mut self, section: Section<'_>, name: &str) -> Option<At<Vec<At<String>>>> {
        match lookup(section.table, name)?.1.get_ref() {
            DeValue::String(_) => {
                let text = self.text(section, name)?;
                Some(At { span: text.span.clone(), value: vec![text] })
            }
            _ => self.texts(section, name),
        }
    }

    /// A table of texts, with where each name stands.
    pub(super) fn pairs(
        &mut self,
        section: Section<'_>,
        name: &str,
    ) -> Option<Vec<(At<String>, At<String>)>> {
        let (_, value) = lookup(section.table, name)?;
        let DeValue::Table(table) = value.get_ref() else { return self.wrong(section.name, name, value) };
        let mut pairs = Vec::new();
        for (key, value) in table {
            let name_of = At { value: key.get_ref().to_string(), span: key.span() };
            match value.get_ref() {
                DeValue::String(text) => {
                    if let Some(text) = self.without_nul(At { value: text.to_string(), span: value.span() }) {
                        pairs.push((name_of, text));
                    }
                }
                _ => self.fault(
                    value.span(),
                    format!("\"{}\" must be a text", name_of.value),
                    "put it in quotes",
                ),
            }
        }
        Some(pairs)
    }

    pub(super) fn flag(&mut self, section: Section<'_>, name: &str) -> Option<bool> {
        let (_, value) = lookup(section.table, name)?;
        match value.get_ref() {
            DeValue::Boolean(flag) => Some(*flag),
            _ => self.wrong(section.name, name, value),
        }
    }

    /// A whole number from `least` to `most`.
    pub(super) fn number(
        &mut self,
        section: Section<'_>,
        name: &str,
        least: u32,
        most: u32,
    ) -> Option<At<u32>> {
        let (_, value) = lookup(section.table, name)?;
        let DeValue::Integer(number) = value.get_ref() else { return self.wrong(section.name, name, value) };
        match i128::from_str_radix(number.as_str(), number.radix()).ok().and_then(|n| u32::try_from(n).ok()) {
            Some(number) if (least..=most).contains(&number) => {
                Some(At { value: number, span: value.span() })
            }
            _ => {
                self.fault(
                    value.span(),
                    format!("\"{name}\" is out of range"),
                    format!("write a number from {least} to {most}"),
                );
                None
            }
        }
    }

    /// A share such as `"80%"`, from `least` to `most` per cent.
    pub(super) fn percent(&mut self, section: Section<'_>, name: &str, least: u32, most: u32) -> Option<u32> {
        let text = self.text(section, name)?;
        let share = text.value.strip_suffix('%').and_then(|number| number.parse().ok());
        let share = share.filter(|share| (least..=most).contains(share));
        if share.is_none() {
            let mend = format!("write a share from \"{least}%\" to \"{most}%\"");
            self.fault(text.span, format!("{:?} is no share that \"{name}\" takes", text.value), mend);
        }
        share
    }

    /// A text with a unit.
    pub(super) fn unit<T: std::str::FromStr<Err = UnitError>>(
        &mut self,
        section: Section<'_>,
        name: &str,
    ) -> Option<At<T>> {
        let text = self.text(section, name)?;
        match text.value.parse() {
            Ok(value) => Some(At { value, span: text.span }),
            Err(error) => self.refuse_unit(text.span, &error),
        }
    }

    /// A duration that is not zero.
    pub(super) fn duration(&mut self, section: Section<'_>, name: &str) -> Option<Duration> {
        let text = self.text(section, name)?;
        self.read_duration(name, &text)
    }

    /// A duration, or `"never"`; the outer `None` is for a key that is not there.
    pub(super) fn duration_or_never(&mut self, section: Section<'_>, name: &str) -> Option<Option<Duration>> {
        let text = self.text(section, name)?;
        if text.value == "never" { Some(None) } else { self.read_duration(name, &text).map(Some) }
    }

    fn read_duration(&mut self, name: &str, text: &At<String>) -> Option<Duration> {
        match parse_duration(&text.value) {
            Ok(duration) if duration.is_zero() => {
                self.fault(
                    text.span.clone(),
                    format!("\"{name}\" is zero"),
                    "write a duration such as \"30s\"",
                );
                None
            }
            Ok(duration) => Some(duration),
            Err(error) => self.refuse_unit(text.span.clone(), &error),
        }
    }

    fn refuse_unit<T>(&mut self, span: Range<usize>, error: &UnitError) -> Option<T> {
        let text = error.to_string();
        let (message, mend) = text.split_once("; ").unwrap_or((&text, ""));
        self.fault(span, message, mend);
        None
    }

    fn without_nul(&mut self, text: At<String>) -> Option<At<String>> {
        if text.value.contains('\0') {
            self.fault(
                text.span,
                "there is a NUL character in this text",
                "take it out; no program can be given one",
            );
            return None;
        }
        Some(text)
    }

    fn wrong<T>(&mut self, section: &str, name: &str, value: &Spanned<DeValue<'_>>) -> Option<T> {
        let (takes, example) = schema::find(section, name).map_or(("", ""), |key| (key.takes, key.example));
        let is = match value.get_ref() {
            DeValue::String(_) => "a text",
            DeValue::Integer(_) => "a whole number",
            DeValue::Float(_) => "a number with a fraction",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        let mend = format!("write for example {name} = {example}");
        self.fault(value.span(), format!("\"{name}\" takes {takes}, and this is {is}"), mend);
        None
    }

    fn refuse_unknown(&mut self, section: &str, table: &DeTable<'_>, is_section: impl Fn(&str) -> bool) {
        for key in table.keys() {
            let name: &str = key.get_ref();
            if schema::find(section, name).is_some() || is_section(name) {
                continue;
            }
            let place =
                if section.is_empty() { "the top of the file".to_owned() } else { format!("[{section}]") };
            let mend = schema::suggestion(section, name)
                .unwrap_or_else(|| format!("{place} takes {}", schema::names(section)));
            let shown: String = name.chars().take(60).collect();
            self.fault(key.span(), format!("{place} has no key {shown:?}"), mend);
        }
    }
}

fn lookup<'t>(
    table: Option<&'t DeTable<'t>>,
    name: &str,
) -> Option<(Range<usize>, &'t Spanned<DeValue<'t>>)> {
    let (key, value) = table?.iter().find(|(key, _)| &**key.get_ref() == name)?;
    Some((key.span(), value))
}
