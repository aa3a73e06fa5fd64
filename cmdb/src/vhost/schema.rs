//! The keys of a vhost file: one table, from which the parser checks names and suggests others, and from which
//! `docs/vhost.md` is made.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

/// One key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    /// The table that it stands in; empty for the top.
    pub(super) section: &'static str,
    /// Its name.
    pub(super) name: &'static str,
    /// What it takes, in words.
    pub(super) takes: &'static str,
    /// What holds without it; empty: it must be given.
    pub(super) default: &'static str,
    /// A value as it is written.
    pub(super) example: &'static str,
    /// What it does.
    doc: &'static str,
}

const fn key(
    section: &'static str,
    name: &'static str,
    takes: &'static str,
    default: &'static str,
    example: &'static str,
    doc: &'static str,
) -> Key {
    Key { section, name, takes, default, example, doc }
}

/// The sections in the order of the reference, with what each is about. `volume` is an array of tables.
pub(super) const SECTIONS: [(&str, &str); 10] = [
    ("", "Which requests are the app's."),
    ("container", "What runs."),
    (
        "provision",
        "Steps that are done to the image once, in the file's order, before anything runs from it; each `[[provision]]` is one. A step runs in a container of its own, made of the image and of what the steps before it have written, with the app's limits of memory and processes, one core, the destinations of `[network]`, and without volumes. What it writes is a read-only layer over the image from then on; the image itself is never changed. It is known by its content: a step runs again when the image, `outbound`, the step or one before it has changed, and never otherwise; apps with the same image and the same steps share what was made. Steps run as soon as the file is there, ahead of the first request. A step fails when it exits with another status than 0 or takes too long; it is tried again later and later. While the steps are done anew because the image has changed, what they made of the one before is used. A `dir:` image counts as changed when something at its top has; its apps wait for the steps.",
    ),
    ("volume", "Folders of the DataPool inside the container; each `[[volume]]` is one."),
    ("network", "Where it may connect to. Requests reach it without any of this."),
    ("resources", "What it may use."),
    ("lifecycle", "When it starts and ends."),
    ("scale", "How many run."),
    ("hold", "How requests wait while nothing is ready for them."),
    (
        "hook",
        "Programs of the operator's that run at points of an instance's life, on a signal, or in time; each `[[hook]]` is one, and has one of `on`, `on-signal`, `after` and `every`. Several at one point run one after the other, in the file's order. They run outside of the container, as an unprivileged user, in a cgroup of their own. What runs already keeps the hooks with which it was started.",
    ),
];

/// All keys.
pub(super) const KEYS: &[Key] = &[
    key(
        "",
        "server-name",
        "a list of host names",
        "",
        "[\"blog.example.com\", \"*.blog.example.com\"]",
        "The host names that lead to this app. `*.` in front stands for one label or more. An exact name wins over a wildcard, a longer wildcard over a shorter one. A name belongs to one file.",
    ),
    key(
        "container",
        "image",
        "an image",
        "",
        "\"dir:/srv/images/wordpress\"",
        "`dir:PATH` is a folder that is the root of a file system; `tar:PATH` an archive of one (plain, gzip or zstd), unpacked once. `oci:PATH` is an OCI image layout: a folder, or an archive (plain tar) of one; `oci:PATH:TAG` or `oci:PATH@sha256:DIGEST` picks one of several images in it. `docker://HOST[:PORT]/NAME[:TAG|@sha256:DIGEST]` is fetched from a registry (`up --registry-auth` for those that ask who you are). `git+https://HOST/REPOSITORY#REVISION:FOLDER:/PLACE` (or `git+file:///PATH#…`) is a folder of a Git repository at a branch, tag or commit, laid at a place in the image; each part after `#` may be left out. Images from elsewhere are fetched ahead of the first start, and looked for anew every ten minutes and at each start. A relative path starts at the folder in which `conf.d` lies. The image is never written to; each start uses it as it is then.",
    ),
    key(
        "container",
        "base",
        "an image",
        "nothing beneath the image",
        "\"docker://registry.example.com/php:8-apache\"",
        "An image that `image` is laid over, named in the same way: what runs the app, with `image` the app's own files, for example a folder of a Git repository. Command, environment, user and so on are the base's, unless `image` brings its own.",
    ),
    key(
        "container",
        "command",
        "a list of texts",
        "the image's own",
        "[\"apache2ctl\", \"-D\", \"FOREGROUND\"]",
        "Program and arguments; takes the place of the `Entrypoint` and `Cmd` of an `oci:` image. `dir:` and `tar:` images know no command: there it must be given. A program without `/` is looked for in the `PATH` of `env`. It must stay in the foreground.",
    ),
    key(
        "container",
        "port",
        "a number from 1 to 65535",
        "the first port on which it listens",
        "80",
        "The TCP port on which the app listens, on 127.0.0.1 or on all addresses. Without it, an `oci:` image that exposes a single TCP port says it. Any port can be used by any user, also 80.",
    ),
    key(
        "container",
        "user",
        "a text",
        "the image's, else the container's root",
        "\"www-data\"",
        "Whom the program runs as: a name or number of the image's own passwd file, `user` or `user:group`. The container's root has no rights on the host.",
    ),
    key(
        "container",
        "workdir",
        "an absolute path",
        "the image's, else \"/\"",
        "\"/var/www/html\"",
        "Working directory inside the container.",
    ),
    key(
        "container",
        "env",
        "a table of texts",
        "the image's",
        "{ WORDPRESS_DB_HOST = \"10.0.0.5\" }",
        "Environment, added to that of an `oci:` image. `PATH`, `HOME`, `HOSTNAME`, `PORT`, `FC_APP` and `FC_GENERATION` are given unless set here.",
    ),
    key(
        "provision",
        "name",
        "a text",
        "",
        "\"php\"",
        "What it is called in `events` and `images`; at most 64 characters, each name once.",
    ),
    key(
        "provision",
        "run",
        "a list of texts",
        "",
        "[\"/bin/sh\", \"-c\", \"apt-get update && apt-get -y install php\"]",
        "Program and arguments, of the image. What it leaves running is ended when it ends. Devices, sockets and fifos are not kept, nor what it does to `/etc/hosts`, `/etc/hostname` and `/etc/resolv.conf`, which every container gets from the launcher.",
    ),
    key(
        "provision",
        "user",
        "a text",
        "the container's root",
        "\"www-data\"",
        "Whom it runs as, as `container.user`; not the image's own user, for whom there would be little to provision.",
    ),
    key(
        "provision",
        "env",
        "a table of texts",
        "the image's",
        "{ DEBIAN_FRONTEND = \"noninteractive\" }",
        "Environment, added to the image's. The app's own `env` is not there: what the step makes is to depend on the step alone.",
    ),
    key(
        "provision",
        "timeout",
        "a duration, at most 1h",
        "\"10m\"",
        "\"2m\"",
        "After it the step has failed, and is ended with everything that it started.",
    ),
    key(
        "volume",
        "source",
        "a relative path",
        "",
        "\"blog/wp-content\"",
        "Folder beneath the DataPool. It must be there: a folder that is made by itself hides that the DataPool is not mounted. Files keep the ids that the app's users have inside: what its www-data (33) writes belongs to 33 in the DataPool, on every host.",
    ),
    key(
        "volume",
        "target",
        "an absolute path",
        "",
        "\"/var/www/html/wp-content\"",
        "Where it appears inside; made if the image lacks it.",
    ),
    key("volume", "read-only", "true or false", "false", "true", "Whether the app may only read it."),
    key(
        "volume",
        "exclusive",
        "true or false",
        "false",
        "true",
        "Whether no more than one instance at a time may have it, on whichever host: for what cannot be shared, such as an SQLite file. `scale.max` must be 1, and an instance is replaced only when the old one has ended. A host that is cut off from the CMDB ends it after 5 s, if its launcher runs; others take over after 10 s.",
    ),
    key(
        "volume",
        "quota",
        "a size",
        "as much as the file system holds",
        "\"1GiB\"",
        "Most that the folder may hold; over it, writing fails with \"Disk quota exceeded\". The DataPool's file system must keep project quotas (ext4 or XFS, mounted with prjquota); elsewhere the app does not start, and says so.",
    ),
    key(
        "network",
        "outbound",
        "\"none\", \"internet\" or a list of destinations",
        "\"none\"",
        "[\"10.0.0.5:3306\", \"db.internal:5432\"]",
        "Where the app may connect to. A destination is `\"ADDRESS:PORT\"`, `\"NETWORK/PREFIX:PORT\"`, `\"[IPv6]:PORT\"` or `\"NAME:PORT\"`, TCP unless `/udp` follows. Names are looked up by the launcher, again and again, and stand in the app's /etc/hosts. `\"internet\"`, alone or in the list, is every public address, and DNS; never private networks, other apps, this host, or a cloud's metadata address.",
    ),
    key(
        "resources",
        "cpu",
        "an amount of CPU",
        "unlimited",
        "\"30%\"",
        "CPU quota: a share of one core, or a number of cores such as \"1.5\". It begins with the first response, so that the start is quick.",
    ),
    key(
        "resources",
        "cpu-max",
        "an amount of CPU",
        "the same as `cpu`",
        "\"60%\"",
        "How far the quota may be raised.",
    ),
    key(
        "resources",
        "memory",
        "a size",
        "\"512MiB\"",
        "\"256MiB\"",
        "Memory limit, with what is written to the container's own disk and /dev/shm. Over it, a process of this app is ended and nobody else's.",
    ),
    key("resources", "pids", "a number", "256", "128", "Most processes and threads."),
    key(
        "resources",
        "disk",
        "a size",
        "\"1GiB\"",
        "\"64MiB\"",
        "Most that may be written over the image; it lies in memory and is gone with the instance.",
    ),
    key(
        "lifecycle",
        "start-timeout",
        "a duration",
        "\"30s\"",
        "\"20s\"",
        "From the start to listening; after it the start has failed.",
    ),
    key(
        "lifecycle",
        "freeze-after",
        "a duration or \"never\"",
        "\"never\"",
        "\"30s\"",
        "Idle time after which the instance is frozen: it keeps its memory and uses no CPU, and the next request thaws it in well under a millisecond. Shorter than `idle-timeout` to be of use.",
    ),
    key(
        "lifecycle",
        "reclaim-after",
        "a duration or \"never\"",
        "\"never\"",
        "\"5m\"",
        "Idle time after which a frozen instance's memory is reclaimed: to swap where the host has some, otherwise only what can be read again from files. The next request thaws it as always and pays for what it touches. Not shorter than `freeze-after`. When the host's memory gets short this happens by itself.",
    ),
    key(
        "lifecycle",
        "idle-timeout",
        "a duration or \"never\"",
        "\"10m\"",
        "\"10m\"",
        "Idle time after which the instance ends. The next request starts another.",
    ),
    key(
        "lifecycle",
        "lifetime",
        "a duration or \"never\"",
        "\"never\"",
        "\"1h\"",
        "Age (give or take a tenth) at which an instance is replaced: the new one is ready before the old one ends.",
    ),
    key(
        "lifecycle",
        "drain-timeout",
        "a duration",
        "\"30s\"",
        "\"30s\"",
        "How long requests under way may hold up the end of an instance.",
    ),
    key("lifecycle", "stop-timeout", "a duration", "\"10s\"", "\"10s\"", "From SIGTERM to SIGKILL."),
    key(
        "lifecycle",
        "recycle-at",
        "a share of `resources.memory`, \"10%\" to \"99%\"",
        "never",
        "\"80%\"",
        "An instance that grows on with its requests, and whose memory has come so far, is replaced, the new one first: better so than by the OOM killer in the middle of a request.",
    ),
    key("scale", "min", "a number", "0", "0", "Fewest instances."),
    key(
        "scale",
        "max",
        "a number",
        "1",
        "4",
        "Most instances. They are added when the app is slower than `response-time` for want of CPU or of workers.",
    ),
    key(
        "scale",
        "response-time",
        "a duration or \"never\"",
        "\"never\"",
        "\"500ms\"",
        "First-byte time (p90 of the last second) above which the app counts as slow.",
    ),
    key(
        "scale",
        "cool-down",
        "a duration",
        "\"10s\"",
        "\"10s\"",
        "After a step of the scaler there is no other for so long; a raised quota is lowered, and an added instance ended, when all has been well for so long.",
    ),
    key(
        "scale",
        "concurrency",
        "a number",
        "unlimited",
        "64",
        "Requests in one instance at a time; more wait.",
    ),
    key(
        "scale",
        "pick",
        "\"random\" or \"p2c\"",
        "\"random\"",
        "\"p2c\"",
        "How one of several instances is picked: at random, or the less busy one of two random ones.",
    ),
    key(
        "scale",
        "slow-start",
        "a duration or \"never\"",
        "\"never\"",
        "\"20s\"",
        "An instance that is added beside others begins with a tenth of a full share of the requests, which grows to a full one over this time: for apps that compile or fill caches as they go. What nobody else has room for goes to it all the same.",
    ),
    key(
        "hold",
        "queue",
        "a number",
        "1000",
        "1000",
        "Most requests that wait for this app at a time; the next gets 503.",
    ),
    key("hold", "timeout", "a duration", "\"30s\"", "\"30s\"", "Longest wait; after it 504."),
    key(
        "hold",
        "page",
        "true or false",
        "false",
        "false",
        "Whether a browser that opens a page of an app that is not ready is shown a waiting page, which opens it when it is. Everything else is held all the same: other programs, scripts, pictures, forms.",
    ),
    key(
        "hold",
        "page-after",
        "a duration",
        "\"500ms\"",
        "\"500ms\"",
        "How long a browser is held before it is shown the waiting page.",
    ),
    key(
        "hook",
        "on",
        "a point",
        "one of the four must be given",
        "\"after-ready\"",
        "In this order: `before-create` (nothing of the instance is there), `after-create` (its cgroup is, with its limits), `before-start`, `after-start` (its program runs), `before-ready` (it listens and gets no requests yet), `after-ready`, `before-stop` (it is to end and was not told yet), `after-stop` (it has), `oom` (it ran out of memory), `before-exit` (its processes have ended, its cgroup is there), `after-exit` (nothing of it is left). At a `before-` point the start or the end waits for the hook; the others delay nothing, and may still run when the next point comes.",
    ),
    key(
        "hook",
        "on-signal",
        "HUP, INT, USR1, USR2 or WINCH",
        "one of the four must be given",
        "\"USR1\"",
        "When the operator says `fastcontainer signal APP USR1`, for each instance that is ready. The app itself gets no signal.",
    ),
    key(
        "hook",
        "after",
        "a duration",
        "one of the four must be given",
        "\"30s\"",
        "So long after the instance was ready, once.",
    ),
    key(
        "hook",
        "every",
        "a duration of at least 1s",
        "one of the four must be given",
        "\"10s\"",
        "At this interval while the instance is ready; not while it is frozen, and not while the one before still runs.",
    ),
    key(
        "hook",
        "run",
        "a list of texts",
        "",
        "[\"announce\", \"up\"]",
        "Program and arguments. The program lies beneath the launcher's hooks folder (`up --hooks DIR`), belongs to root, and can be written to by nobody else. It gets a description of the instance as JSON on its standard input; what it writes is among the app's output (`logs`).",
    ),
    key(
        "hook",
        "timeout",
        "a duration, at most 5m",
        "\"5s\"",
        "\"2s\"",
        "After it the hook has failed, and is ended with everything that it started.",
    ),
    key(
        "hook",
        "on-failure",
        "\"warn\" or \"abort\"",
        "\"warn\"",
        "\"abort\"",
        "What its failure (it cannot be run, exits with another status than 0, takes too long) means: an event, or that the start has failed. `abort` is for `before-create`, `before-start` and `before-ready`.",
    ),
];

/// The key of that name.
pub(super) fn find(section: &str, name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.section == section && key.name == name)
}

/// The key or section that was probably meant, with its place.
pub(super) fn suggestion(section: &str, name: &str) -> Option<String> {
    let near = |other: &str| distance(name, other) <= 1 + other.len() / 4;
    let here = KEYS.iter().filter(|key| key.section == section && near(key.name));
    if let Some(key) = here.min_by_key(|key| distance(name, key.name)) {
        return Some(format!("did you mean \"{}\"?", key.name));
    }
    if section.is_empty()
        && let Some((other, _)) = SECTIONS
            .iter()
            .filter(|(other, _)| !other.is_empty() && near(other))
            .min_by_key(|(other, _)| distance(name, other))
    {
        return Some(format!("did you mean [{other}]?"));
    }
    let elsewhere = KEYS.iter().find(|key| key.name == name)?;
    Some(if elsewhere.section.is_empty() {
        format!("\"{name}\" stands at the top of the file, before the first [section]")
    } else {
        format!("\"{name}\" belongs into [{}]", elsewhere.section)
    })
}

/// The names that may stand in a section.
pub(super) fn names(section: &str) -> String {
    let mut names: Vec<String> =
        KEYS.iter().filter(|key| key.section == section).map(|key| key.name.to_owned()).collect();
    if section.is_empty() {
        names.extend(
            SECTIONS.iter().filter(|(name, _)| !name.is_empty()).map(|(name, _)| format!("[{name}]")),
        );
    }
    names.join(", ")
}

/// `docs/vhost.md`: every key of a vhost file.
#[must_use]
pub fn reference() -> String {
    let mut text = String::from(
        "<!-- Made from cmdb/src/vhost/schema.rs by `UPDATE_DOCS=1 cargo test -p fastcontainer-cmdb`. -->\n\
         # The vhost file\n\n\
         One TOML file in `conf.d/` is one app; the file's name without `.toml` is the app's name. Files that begin with a dot\n\
         or do not end in `.toml` are left alone. A change is taken over within a second; a file with a fault keeps its last\n\
         good version and disturbs no other. `fastcontainer check conf.d` tells of every fault.\n\n\
         Durations are written `\"500ms\"`, `\"30s\"`, `\"10m\"`, `\"1h30m\"`, `\"7d\"`; sizes `\"256MiB\"`, `\"1GiB\"`; CPU `\"30%\"` of one\n\
         core, or `\"1.5\"` cores. Unknown keys are refused.\n",
    );
    for (section, about) in SECTIONS {
        let title = match section {
            "" => "The top of the file".to_owned(),
            list if LISTS.contains(&list) => format!("`[[{section}]]`"),
            other => format!("`[{other}]`"),
        };
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "\n## {title}\n\n{about}\n\n| Key | Takes | Without it | Example |\n|---|---|---|---|\n"
        );
        for key in KEYS.iter().filter(|key| key.section == section) {
            let default = if key.default.is_empty() { "must be given" } else { key.default };
            let _ = writeln!(text, "| `{}` | {} | {default} | `{}` |", key.name, key.takes, key.example);
        }
        text.push('\n');
        for key in KEYS.iter().filter(|key| key.section == section) {
            let _ = writeln!(text, "- **`{}`**: {}", key.name, key.doc);
        }
    }
    text
}

/// The sections of which a file may have several.
const LISTS: [&str; 3] = ["provision", "volume", "hook"];

/// The JSON Schema of a vhost file that is written as JSON: the same keys, made from the same table. Durations, sizes and
/// the like are texts here, of which the parser knows more.
#[must_use]
pub fn json_schema() -> Value {
    let mut properties = Map::new();
    let mut required = Vec::new();
    for (section, about) in SECTIONS {
        let (keys, must) = section_schema(section);
        if section.is_empty() {
            properties.extend(keys);
            required.extend(must);
            continue;
        }
        let mut table = json!({ "type": "object", "additionalProperties": false, "properties": keys });
        if !must.is_empty() {
            table["required"] = must.into();
        }
        if LISTS.contains(&section) {
            table = json!({ "type": "array", "items": table });
        }
        table["description"] = about.into();
        may_be_null(&mut table);
        properties.insert(section.to_owned(), table);
    }
    required.push("container".into());
    json!({
        "type": "object",
        "description": "A vhost file as JSON: the same keys with the same meaning, docs/vhost.md.",
        "additionalProperties": false,
        "properties": properties,
        "required": required,
    })
}

/// The keys of a section, and which must be there.
fn section_schema(section: &str) -> (Map<String, Value>, Vec<Value>) {
    let keys = KEYS.iter().filter(|key| key.section == section);
    let must = keys.clone().filter(|key| key.default.is_empty()).map(|key| key.name.into()).collect();
    let schemas = keys.map(|key| {
        let mut schema = key_schema(key);
        schema["description"] = key.doc.into();
        may_be_null(&mut schema);
        (key.name.to_owned(), schema)
    });
    (schemas.collect(), must)
}

/// In JSON, null says that a key is not there.
fn may_be_null(schema: &mut Value) {
    let mut types = match schema["type"].take() {
        Value::Array(types) => types,
        one => vec![one],
    };
    types.push("null".into());
    schema["type"] = types.into();
}

/// What a key takes is what its example is.
fn key_schema(key: &Key) -> Value {
    let example = example(key);
    let mut schema = match &example {
        Value::Array(_) if key.takes.contains("or a list") => {
            json!({ "type": ["string", "array"], "items": { "type": "string" } })
        }
        Value::Array(_) => json!({ "type": "array", "items": { "type": "string" } }),
        Value::Object(_) => {
            json!({ "type": "object", "additionalProperties": { "type": ["string", "null"] } })
        }
        Value::Number(_) => json!({ "type": "integer", "minimum": 0 }),
        Value::Bool(_) => json!({ "type": "boolean" }),
        _ => json!({ "type": "string" }),
    };
    schema["example"] = example;
    schema
}

/// The key's example, as JSON.
fn example(key: &Key) -> Value {
    let table = toml::from_str::<toml::Table>(&format!("x = {}", key.example)).unwrap_or_default();
    table.get("x").and_then(|value| serde_json::to_value(value).ok()).unwrap_or_default()
}

/// Levenshtein's distance; names are short.
fn distance(a: &str, b: &str) -> usize {
    if a.len() > 64 {
        return usize::MAX / 2;
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_is_a_value_that_the_schema_describes() {
        for key in KEYS {
            assert_ne!(example(key), Value::Null, "[{}] {}", key.section, key.name);
        }
        let schema = json_schema();
        assert_eq!(schema["required"], json!(["server-name", "container"]));
        assert_eq!(schema["properties"]["scale"]["properties"]["max"]["type"], json!(["integer", "null"]));
        assert_eq!(schema["properties"]["volume"]["items"]["required"], json!(["source", "target"]));
        assert_eq!(
            schema["properties"]["network"]["properties"]["outbound"]["type"],
            json!(["string", "array", "null"])
        );
    }
}
