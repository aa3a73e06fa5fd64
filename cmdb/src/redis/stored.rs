//! How an app is kept in Redis: one hash that holds its spec and the record of its instances, each with its revision.

use std::sync::Arc;

use crate::{
    app::{App, AppName},
    transition::AppRecord,
};

/// Most bytes of a record: some 5,000 instances.
pub(super) const RECORD_MAX: usize = 1 << 20;
/// Most bytes of a spec.
pub(super) const SPEC_MAX: usize = 1 << 18;
/// The largest number that a record may hold: there is room above it to count on, and Redis's scripts count exactly up to it.
const LARGEST: u64 = 1 << 53;
/// All keys whose changes matter to a mirror begin so; chatty ones (heartbeats) do not.
pub(super) const TRACKED: &str = "fc:";
/// Which CMDB this is: a random name that is lost with it.
pub(super) const EPOCH: &str = "fc:epoch";
/// There for a while when a loss of many apps at once was meant, says the operator.
pub(super) const REMOVALS_MEANT: &str = "fc:removals-meant";

const BEFORE: &str = "fc:{";
const AFTER: &str = "}";

/// What a hash holds.
#[derive(Clone, Debug, Default)]
pub(super) struct Stored {
    /// Revision of the record, as written; empty when there is none.
    pub(super) rev: String,
    /// Revision of the spec, as written. One without a spec is a removed app's: its generations go on if it comes back.
    pub(super) srev: String,
    pub(super) record: Arc<AppRecord>,
    pub(super) app: Option<Arc<App>>,
}

/// The hash of an app. The braces keep all that may ever belong to it in one slot of a Cluster.
pub(super) fn key(app: &AppName) -> String {
    format!("{BEFORE}{app}{AFTER}")
}

/// Pattern of all apps' hashes.
pub(super) fn all_keys() -> String {
    format!("{BEFORE}*{AFTER}")
}

/// The app whose hash a key names.
pub(super) fn app_of(key: &[u8]) -> Option<AppName> {
    let name = key.strip_prefix(BEFORE.as_bytes())?.strip_suffix(AFTER.as_bytes())?;
    std::str::from_utf8(name).ok()?.parse().ok()
}

/// Who has a server-name; not tracked, for only writers ask.
pub(super) fn name_key(name: &crate::app::HostPattern) -> String {
    format!("fcn:{name}")
}

impl Stored {
    /// Reads what [`read.lua`](self) or a refused swap returned: revision, spec's revision, record, spec.
    pub(super) fn decode(name: &AppName, fields: &[Vec<u8>]) -> Result<Self, String> {
        let [rev, srev, record, spec] = fields else {
            return Err(fields.first().map_or_else(
                || "there is nothing to read".to_owned(),
                |reason| String::from_utf8_lossy(reason).into_owned(),
            ));
        };
        let text = |field: &[u8], which: &str| {
            let text = std::str::from_utf8(field).map_err(|_| format!("its {which} is no text"))?;
            let number = text.is_empty() || text.parse::<u64>().is_ok_and(|number| number <= LARGEST);
            if number { Ok(text.to_owned()) } else { Err(format!("its {which} is no number")) }
        };
        let (rev, srev) = (text(rev, "rev")?, text(srev, "srev")?);
        let mut decoded = match record.as_slice() {
            b"" => AppRecord::default(),
            record => serde_json::from_slice::<AppRecord>(record).map_err(|e| format!("its record: {e}"))?,
        };
        if decoded.instances.iter().any(|(generation, instance)| *generation != instance.generation) {
            return Err("its record: an instance is under another generation than its own".to_owned());
        }
        decoded.rev = rev.parse().unwrap_or(0);
        let generations =
            decoded.instances.keys().chain(decoded.fences.values()).chain([&decoded.generation]);
        if generations.map(|generation| generation.0).max() > Some(LARGEST)
            || decoded.backoff_until_ms > LARGEST
        {
            return Err("its record: a number in it is too large to be ours".to_owned());
        }
        let app = match spec.as_slice() {
            b"" => None,
            spec => Some(serde_json::from_slice::<App>(spec).map_err(|e| format!("its spec: {e}"))?),
        };
        if app.as_ref().is_some_and(|app| app.name != *name || app.server_names.is_empty()) {
            return Err("its spec is another app's, or has no server-name".to_owned());
        }
        Ok(Self { rev, srev, record: Arc::new(decoded), app: app.map(Arc::new) })
    }

    /// Revision of the spec.
    pub(super) fn spec_revision(&self) -> u64 {
        self.srev.parse().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(all: [&str; 4]) -> Vec<Vec<u8>> {
        all.map(|field| field.as_bytes().to_vec()).to_vec()
    }

    #[test]
    fn a_key_names_its_app_and_nothing_else_does() {
        let name: AppName = "blog".parse().unwrap();
        assert_eq!(app_of(key(&name).as_bytes()), Some(name));
        for other in ["fc:epoch", "fc:{}", "fc:{../x}", "fc:{blog", "blog", "fc:{\u{fe}}"] {
            assert_eq!(app_of(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn what_is_no_record_of_ours_is_refused_in_words() {
        let name: AppName = "blog".parse().unwrap();
        for (bad, why) in [
            (fields(["x", "", "", ""]), "rev"),
            (fields(["1", "1", "{", ""]), "record"),
            (fields(["18446744073709551615", "1", "", ""]), "rev"),
            (
                fields([
                    "1",
                    "1",
                    r#"{"rev":1,"generation":18446744073709551615,"failures":0,"backoff_until_ms":0,"instances":{}}"#,
                    "",
                ]),
                "too large",
            ),
            (fields(["1", "1", "", "{\"name\":\"blog\"}"]), "spec"),
            (vec![b"it is a list, not a hash".to_vec()], "list"),
            (Vec::new(), "nothing"),
        ] {
            let reason = Stored::decode(&name, &bad).unwrap_err();
            assert!(reason.contains(why), "{reason}");
        }
    }
}
