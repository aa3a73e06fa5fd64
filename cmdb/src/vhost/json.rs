//! A vhost file as JSON: the same keys, read by the same reader. The JSON is written out as TOML, and each fault's place in
//! that is turned back into the JSON pointer (RFC 6901) of the field that it is about.

use std::{ops::Range, path::Path};

use serde::Serialize;
use serde_json::Value;

use super::{Fault, read};
use crate::app::{App, AppName};

/// What is wrong with one field.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct FieldFault {
    /// Which field: a JSON pointer into the vhost; empty for the whole.
    pub pointer: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub mend: String,
}

/// Reads a vhost; relative paths of images start at `base`. A field that is `null` is one that is not there.
///
/// # Errors
/// Every fault, never just the first.
pub fn from_json(name: &AppName, vhost: &Value, base: &Path) -> Result<App, Vec<FieldFault>> {
    let Value::Object(fields) = vhost else {
        let mend = "write an object with the keys of a vhost file (docs/vhost.md)".to_owned();
        return Err(vec![FieldFault {
            pointer: String::new(),
            message: "a vhost is an object".into(),
            mend,
        }]);
    };
    // What is missing is told of at the text's beginning, which must be nobody's place.
    let mut toml = Toml { text: "# \n".into(), ..Toml::default() };
    for (key, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        toml.pair("", key, value);
        toml.text.push('\n');
    }
    let path = format!("{name}.toml");
    let read = read::file(Path::new(&path), toml.text.as_bytes(), base);
    let mut faults = std::mem::take(&mut toml.faults);
    match read {
        Ok((app, _)) if faults.is_empty() => Ok(app),
        Ok(_) => Err(faults),
        Err(found) => {
            faults.extend(found.into_iter().map(|fault| toml.field(fault)));
            Err(faults)
        }
    }
}

/// TOML text, and which part of it is which field.
#[derive(Default)]
struct Toml {
    text: String,
    /// In the order of their ends: what is inside comes before what is around it.
    places: Vec<(Range<usize>, String)>,
    faults: Vec<FieldFault>,
}

impl Toml {
    /// `key = value`, both of which are the place of that field.
    fn pair(&mut self, parent: &str, key: &str, value: &Value) {
        let pointer = format!("{parent}/{}", key.replace('~', "~0").replace('/', "~1"));
        let start = self.text.len();
        self.quoted(key);
        self.text.push_str(" = ");
        self.value(&pointer, value);
        self.places.push((start..self.text.len(), pointer));
    }

    fn value(&mut self, pointer: &str, value: &Value) {
        match value {
            Value::String(text) => self.quoted(text),
            Value::Object(fields) => {
                self.text.push_str("{ ");
                let mut separator = "";
                for (key, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
                    self.text.push_str(separator);
                    self.pair(pointer, key, value);
                    separator = ", ";
                }
                self.text.push_str(" }");
            }
            Value::Array(items) => {
                self.text.push('[');
                for (index, item) in items.iter().enumerate() {
                    let pointer = format!("{pointer}/{index}");
                    if item.is_null() {
                        let (message, mend) = ("null stands in a list".into(), "take it out".into());
                        self.faults.push(FieldFault { pointer, message, mend });
                        continue;
                    }
                    let start = self.text.len();
                    self.value(&pointer, item);
                    self.places.push((start..self.text.len(), pointer));
                    self.text.push_str(", ");
                }
                self.text.push(']');
            }
            // True, false and numbers are written alike. Null never comes here: nobody may be told of what is not there.
            Value::Bool(_) | Value::Number(_) | Value::Null => self.text.push_str(&value.to_string()),
        }
    }

    /// JSON's way to quote is TOML's, but for DEL, which TOML wants escaped.
    fn quoted(&mut self, text: &str) {
        self.text.push_str(&Value::from(text).to_string().replace('\u{7f}', "\\u007F"));
    }

    fn field(&self, fault: Fault) -> FieldFault {
        let at = fault.span.start;
        let inmost = self.places.iter().find(|(place, _)| fault.line > 0 && place.contains(&at));
        let pointer = inmost.map(|(_, pointer)| pointer.clone()).unwrap_or_default();
        FieldFault { pointer, message: fault.message, mend: fault.mend }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(vhost: &Value) -> Result<App, Vec<FieldFault>> {
        from_json(&"blog".parse().unwrap(), vhost, Path::new("/srv"))
    }

    fn pointers(vhost: &Value) -> Vec<String> {
        read(vhost).unwrap_err().into_iter().map(|fault| fault.pointer).collect()
    }

    #[test]
    fn the_keys_and_values_are_those_of_a_file() {
        let app = read(&json!({
            "server-name": ["blog.example.com"],
            "container": {
                "image": "dir:images/blog", "command": ["/blog", "a\"b\\\u{7f}\n"], "port": null,
                "env": { "A/~ b".replace(' ', "_"): "ü\u{1}" },
            },
            "volume": [{ "source": "blog", "target": "/data", "read-only": true }],
            "resources": { "memory": "64MiB" },
        }))
        .unwrap();

        assert_eq!((app.name.as_str(), app.container.image.as_str()), ("blog", "dir:/srv/images/blog"));
        assert_eq!(app.container.command[1], "a\"b\\\u{7f}\n");
        assert_eq!(app.container.env["A/~_b"], "ü\u{1}");
        assert!(app.volumes[0].read_only && app.container.port.is_none());
    }

    #[test]
    fn every_fault_points_at_its_field() {
        let vhost = json!({
            "server-name": ["blog.example.com", "a..b", null],
            "container": { "image": "dir:/x", "command": ["/x"], "prot": 80, "env": { "A B": "x", "C/D": 1 } },
            "volume": [{ "source": "a", "target": "/a" }, { "source": "../b", "target": "/b" }],
            "resources": { "memory": "lots" },
            "scale": { "max": 1e300 },
        });

        let mut found = pointers(&vhost);
        found.sort();

        let expected = [
            "/container/env/A B",
            "/container/env/C~1D",
            "/container/prot",
            "/resources/memory",
            "/scale/max",
            "/server-name/1",
            "/server-name/2",
            "/volume/1/source",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn what_is_missing_is_told_of_where_it_should_be() {
        assert_eq!(pointers(&json!({})), ["", "", ""]);
        assert_eq!(pointers(&json!([])), [""]);
        let no_image = json!({ "server-name": ["a.b"], "container": { "command": ["/x"] } });
        assert_eq!(pointers(&no_image), ["/container"]);
        assert_eq!(
            pointers(&json!({ "server-name": "a.b", "container": 3 }))[..2],
            ["/server-name", "/container"]
        );
    }

    #[test]
    fn depth_and_size_are_bounded() {
        let mut deep = json!("x");
        for _ in 0..100 {
            deep = json!([deep]);
        }
        assert!(!pointers(&json!({ "server-name": deep })).is_empty());
        let large = "x".repeat(100_000);
        assert_eq!(pointers(&json!({ "server-name": [large] })), [""]);
    }
}
