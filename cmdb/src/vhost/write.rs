//! An app as the JSON of its vhost file: what [`super::from_json`] reads again as the same app.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::{
    app::{App, Container, Hold, Lifecycle, Pick, Resources, Scale, Volume},
    hook::{Hook, OnFailure, When},
    network::Network,
    provision::ProvisionStep,
    units::Bytes,
};

/// The app's vhost, complete: with the values that hold where the file gives none. A key whose absence means something
/// that no value says is absent.
#[must_use]
pub fn to_json(app: &App) -> Value {
    // Taken apart by name, so that a new field cannot be forgotten here.
    let App {
        name: _,
        origin: _,
        server_names,
        container,
        volumes,
        network,
        resources,
        lifecycle,
        scale,
        hold,
        hooks,
    } = app;
    let names: Vec<String> = server_names.iter().map(ToString::to_string).collect();
    let mut vhost = Map::new();
    vhost.insert("server-name".into(), names.into());
    vhost.insert("container".into(), container_json(container));
    if !container.provision.is_empty() {
        vhost.insert("provision".into(), container.provision.iter().map(step_json).collect());
    }
    if !volumes.is_empty() {
        vhost.insert("volume".into(), volumes.iter().map(volume_json).collect());
    }
    vhost.insert("network".into(), network_json(network));
    vhost.insert("resources".into(), resources_json(resources));
    vhost.insert("lifecycle".into(), lifecycle_json(lifecycle));
    vhost.insert("scale".into(), scale_json(scale));
    vhost.insert("hold".into(), hold_json(hold));
    if !hooks.is_empty() {
        vhost.insert("hook".into(), hooks.iter().map(hook_json).collect());
    }
    vhost.into()
}

fn container_json(container: &Container) -> Value {
    let Container { image, base, command, port, user, workdir, env, provision: _ } = container;
    let mut table = json!({ "image": image });
    put(&mut table, "base", base.clone());
    put(&mut table, "command", (!command.is_empty()).then(|| command.clone()));
    put(&mut table, "port", *port);
    put(&mut table, "user", (!user.is_empty()).then(|| user.clone()));
    put(&mut table, "workdir", (!workdir.is_empty()).then(|| workdir.clone()));
    put(&mut table, "env", (!env.is_empty()).then(|| json!(env)));
    table
}

fn step_json(step: &ProvisionStep) -> Value {
    let ProvisionStep { name, run, user, env, timeout } = step;
    let mut table = json!({ "name": name, "run": run, "timeout": duration(*timeout) });
    put(&mut table, "user", (!user.is_empty()).then(|| user.clone()));
    put(&mut table, "env", (!env.is_empty()).then(|| json!(env)));
    table
}

fn volume_json(volume: &Volume) -> Value {
    let Volume { source, target, read_only, quota, exclusive } = volume;
    let mut table =
        json!({ "source": source, "target": target, "read-only": read_only, "exclusive": exclusive });
    put(&mut table, "quota", quota.map(size));
    table
}

fn network_json(network: &Network) -> Value {
    let Network { internet, destinations } = network;
    if network.is_closed() {
        return json!({ "outbound": "none" });
    }
    let internet = internet.then(|| "internet".to_owned());
    let outbound: Vec<String> =
        internet.into_iter().chain(destinations.iter().map(ToString::to_string)).collect();
    json!({ "outbound": outbound })
}

fn resources_json(resources: &Resources) -> Value {
    let Resources { cpu, cpu_max, memory, pids, disk } = resources;
    let mut table = json!({ "memory": size(*memory), "pids": pids, "disk": size(*disk) });
    put(&mut table, "cpu", cpu.map(|cpu| cpu.to_string()));
    // Not told where it follows `cpu`, so that it goes on following when `cpu` alone is changed.
    put(&mut table, "cpu-max", cpu_max.filter(|max| Some(*max) != *cpu).map(|max| max.to_string()));
    table
}

fn lifecycle_json(lifecycle: &Lifecycle) -> Value {
    let Lifecycle {
        start_timeout,
        freeze_after,
        reclaim_after,
        idle_timeout,
        lifetime,
        drain_timeout,
        stop_timeout,
        recycle_at,
    } = lifecycle;
    let mut table = json!({
        "start-timeout": duration(*start_timeout),
        "freeze-after": or_never(*freeze_after),
        "reclaim-after": or_never(*reclaim_after),
        "idle-timeout": or_never(*idle_timeout),
        "lifetime": or_never(*lifetime),
        "drain-timeout": duration(*drain_timeout),
        "stop-timeout": duration(*stop_timeout),
    });
    put(&mut table, "recycle-at", recycle_at.map(|share| format!("{share}%")));
    table
}

fn scale_json(scale: &Scale) -> Value {
    let Scale { min, max, response_time, cool_down, concurrency, pick, slow_start } = scale;
    let mut table = json!({
        "min": min,
        "max": max,
        "response-time": or_never(*response_time),
        "cool-down": duration(*cool_down),
        "pick": match pick { Pick::Random => "random", Pick::P2c => "p2c" },
        "slow-start": or_never(*slow_start),
    });
    put(&mut table, "concurrency", *concurrency);
    table
}

fn hold_json(hold: &Hold) -> Value {
    let Hold { queue, timeout, page, page_after } = hold;
    json!({ "queue": queue, "timeout": duration(*timeout), "page": page, "page-after": duration(*page_after) })
}

fn hook_json(hook: &Hook) -> Value {
    let Hook { when, run, timeout, on_failure } = hook;
    let failure = match on_failure {
        OnFailure::Warn => "warn",
        OnFailure::Abort => "abort",
    };
    let mut table = json!({ "run": run, "timeout": duration(*timeout), "on-failure": failure });
    let (key, value) = match when {
        When::On(point) => ("on", point.to_string()),
        When::Signal(name) => ("on-signal", name.clone()),
        When::After(time) => ("after", duration(*time)),
        When::Every(time) => ("every", duration(*time)),
    };
    put(&mut table, key, Some(value));
    table
}

fn put(table: &mut Value, key: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        table[key] = value.into();
    }
}

fn or_never(time: Option<Duration>) -> String {
    time.map_or_else(|| "never".to_owned(), duration)
}

/// As an operator would write it, and exactly (the parser knows no less than µs).
fn duration(time: Duration) -> String {
    let mut rest = time.as_micros();
    let mut text = String::new();
    for (unit, us) in [
        ("d", 86_400_000_000),
        ("h", 3_600_000_000),
        ("m", 60_000_000),
        ("s", 1_000_000),
        ("ms", 1_000),
        ("us", 1),
    ] {
        if rest >= us {
            text.push_str(&format!("{}{unit}", rest / us));
            rest %= us;
        }
    }
    if text.is_empty() { "0s".to_owned() } else { text }
}

/// In the largest unit that says it exactly.
fn size(bytes: Bytes) -> String {
    let units = [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.iter().find(|(_, scale)| bytes.0 >= *scale && bytes.0.is_multiple_of(*scale)) {
        Some((unit, scale)) => format!("{}{unit}", bytes.0 / scale),
        None => format!("{}B", bytes.0),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::vhost::{from_json, parse_file};

    const FULL: &str = r#"
server-name = ["blog.example.com", "*.blog.example.com"]
[container]
image = "dir:/srv/x"
base = "docker://registry.example.com/php:8"
command = ["/x", "-v"]
port = 80
user = "www-data"
workdir = "/srv"
env = { A = "1", "B/c" = "ü" }
[[provision]]
name = "packages"
run = ["/bin/true"]
user = "www-data"
env = { A = "1" }
timeout = "5m"
[[volume]]
source = "blog/a"
target = "/a"
read-only = true
quota = "1536MiB"
[[volume]]
source = "b"
target = "/b"
[network]
outbound = ["internet", "10.0.0.0/8:443", "db.internal:53/udp", "[2001:db8::5]:5432"]
[resources]
cpu = "12.5%"
cpu-max = "1.5"
memory = "100MB"
pids = 7
disk = "65537B"
[lifecycle]
start-timeout = "1m30s"
freeze-after = "1500us"
reclaim-after = "2h"
idle-timeout = "never"
lifetime = "7d"
drain-timeout = "1.25s"
stop-timeout = "3s"
recycle-at = "80%"
[scale]
min = 1
max = 4
response-time = "500ms"
cool-down = "3s"
concurrency = 64
pick = "p2c"
slow-start = "20s"
[hold]
queue = 5
timeout = "7s"
page = true
page-after = "100ms"
[[hook]]
on = "before-ready"
run = ["a", "b"]
on-failure = "abort"
[[hook]]
on-signal = "USR1"
run = ["a"]
[[hook]]
after = "30s"
run = ["a"]
timeout = "2s"
[[hook]]
every = "10s"
run = ["a"]
"#;

    #[test]
    fn what_is_written_is_read_as_the_same_app() {
        let few = "server-name = [\"a.b\"]\n[container]\nimage = \"oci:/x\"\n";
        for text in [FULL, few] {
            let base = Path::new("/srv");
            let app = parse_file(Path::new("blog.toml"), text.as_bytes(), base).unwrap();

            let vhost = to_json(&app);

            assert_eq!(from_json(&app.name, &vhost, base).unwrap(), app, "{vhost:#}");
        }
    }

    #[test]
    fn every_key_of_the_format_is_written() {
        let app = parse_file(Path::new("blog.toml"), FULL.as_bytes(), Path::new("/")).unwrap();
        let vhost = to_json(&app);
        let schema = crate::vhost::json_schema();
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        for section in keys(&schema["properties"]) {
            let (known, told) = (&schema["properties"][&section], &vhost[&section]);
            assert!(!told.is_null(), "{section}");
            let told: Vec<&Value> = told.as_array().map_or_else(|| vec![told], |list| list.iter().collect());
            let known = if known["items"]["properties"].is_object() { &known["items"] } else { known };
            for key in known["properties"].as_object().into_iter().flatten().map(|(key, _)| key) {
                assert!(told.iter().any(|table| !table[key].is_null()), "{section}.{key} is not written");
            }
        }
    }
}
