//! What a change of the configuration changes, told before it is done or after.

use std::collections::{BTreeMap, BTreeSet};

use cmdb::{App, vhost};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

/// What was done, or with `dry-run` would be.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct Outcome {
    /// Nothing was done: this is what would be.
    pub(crate) dry_run: bool,
    /// Each app that changes, by name; empty: nothing does.
    pub(crate) changes: Vec<Change>,
}

/// What changes of one app.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct Change {
    /// Its name.
    pub(crate) app: String,
    /// What is done to it.
    pub(crate) action: Action,
    /// Who has configured it so far: `conf.d`, `conf.d@HOST` or `api`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) origin: Option<String>,
    /// Which fields of its vhost, with `replace`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) fields: Vec<Field>,
}

/// What is done to an app.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Action {
    /// It is new.
    Create,
    /// It becomes another.
    Replace,
    /// It goes.
    Remove,
}

/// One field that changes.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, ToSchema)]
pub(crate) struct Field {
    /// JSON pointer (RFC 6901) into the vhost.
    pub(crate) pointer: String,
    /// Its value so far; absent: it had none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) before: Option<Value>,
    /// Its value from now on; absent: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) after: Option<Value>,
}

impl Change {
    /// From what is there to what is wanted; `None`: the same.
    pub(crate) fn between(old: Option<&App>, new: Option<&App>) -> Option<Self> {
        let (app, action, fields) = match (old, new) {
            (None, Some(new)) => (new, Action::Create, Vec::new()),
            (Some(old), None) => (old, Action::Remove, Vec::new()),
            (Some(old), Some(new)) if old != new => {
                (new, Action::Replace, fields(&vhost::to_json(old), &vhost::to_json(new)))
            }
            _ => return None,
        };
        let origin = old.map(|old| old.origin.to_string());
        Some(Self { app: app.name.to_string(), action, origin, fields })
    }
}

/// Each field that is another; lists are compared as a whole.
fn fields(old: &Value, new: &Value) -> Vec<Field> {
    let (mut before, mut after) = (BTreeMap::new(), BTreeMap::new());
    leaves(String::new(), old, &mut before);
    leaves(String::new(), new, &mut after);
    let pointers: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    pointers
        .into_iter()
        .filter(|pointer| before.get(*pointer) != after.get(*pointer))
        .map(|pointer| Field {
            pointer: pointer.clone(),
            before: before.get(pointer).map(|value| Value::clone(value)),
            after: after.get(pointer).map(|value| Value::clone(value)),
        })
        .collect()
}

fn leaves<'v>(pointer: String, value: &'v Value, found: &mut BTreeMap<String, &'v Value>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let key = key.replace('~', "~0").replace('/', "~1");
                leaves(format!("{pointer}/{key}"), value, found);
            }
        }
        other => drop(found.insert(pointer, other)),
    }
}

/// RFC 7396.
pub(crate) fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Value::Object(fields) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            fields.remove(&key);
        } else {
            merge(fields.entry(key).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_patch_is_merged_as_the_rfc_says() {
        for (target, patch, result) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
            (json!(["a", "b"]), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
            (json!({"a": "foo"}), json!("bar"), json!("bar")),
        ] {
            let mut merged = target;
            merge(&mut merged, patch);
            assert_eq!(merged, result);
        }
    }

    #[test]
    fn fields_that_change_are_named() {
        let old = json!({ "a": { "b/c": 1, "same": [1] }, "gone": "x" });
        let new = json!({ "a": { "b/c": 2, "same": [1] }, "new": true });

        let fields = fields(&old, &new);

        let told: Vec<_> =
            fields.iter().map(|f| (f.pointer.as_str(), f.before.clone(), f.after.clone())).collect();
        assert_eq!(
            told,
            [
                ("/a/b~1c", Some(json!(1)), Some(json!(2))),
                ("/gone", Some(json!("x")), None),
                ("/new", None, Some(json!(true))),
            ]
        );
    }
}
