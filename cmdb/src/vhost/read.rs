//! From the text of one file to an app.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    path::Path,
    time::Duration,
};

use toml::de::DeTable;

use super::{
    LARGEST, app_name,
    fault::{Fault, without_mark},
    hooks, image, provision,
    reader::{Reader, Section},
    too_large,
};
use crate::{
    app::{App, Container, Hold, HostPattern, Lifecycle, Pick, Resources, Scale, Volume},
    network::{Destination, Network},
    origin::Origin,
    units::{Bytes, Millicores},
};

/// A server-name and where it stands, for clashes with other files.
#[derive(Debug)]
pub(super) struct Named {
    pub(super) pattern: HostPattern,
    pub(super) line: usize,
    pub(super) column: usize,
    template: Fault,
}

impl Named {
    pub(super) fn fault(&self, message: String, mend: &str) -> Fault {
        Fault { message, mend: mend.to_owned(), ..self.template.clone() }
    }
}

/// Least memory that any program can start with.
const LEAST_MEMORY: Bytes = Bytes(1 << 20);
/// Least writable layer. It also keeps 0 out, which the kernel's tmpfs takes for "no limit".
const LEAST_DISK: Bytes = Bytes(64 << 10);
/// A smaller quota of a volume is refused.
const LEAST_QUOTA: Bytes = Bytes(1 << 20);
/// Faults told of one file. A file with more is of another kind, and each costs its reader time.
const MOST_FAULTS: usize = 100;

/// Reads one file.
pub(super) fn file(path: &Path, bytes: &[u8], base: &Path) -> Result<(App, Vec<Named>), Vec<Fault>> {
    let mut faults = Vec::new();
    let name = app_name(path, &mut faults);
    let Some(source) = text(path, bytes, &mut faults) else { return Err(faults) };
    let (root, errors) = DeTable::parse_recoverable(source);
    let whole = errors.is_empty();
    let untold = errors.len().saturating_sub(MOST_FAULTS);
    for error in errors.into_iter().take(MOST_FAULTS) {
        let span = error.span().unwrap_or(0..0);
        let message = error.message().lines().next().unwrap_or_default().to_owned();
        faults.push(Fault::at(path, source, span, message, "mend the TOML (toml.io describes it)".into()));
    }
    let mut reader = Reader { path, source, faults, whole, most: MOST_FAULTS, untold: 0 };
    let read = read(&mut reader, &root, base);
    let untold = untold + reader.untold;
    let mut faults = reader.faults;
    if untold > 0 {
        let message = format!("it has {untold} more faults");
        faults.push(Fault::of_file(path, message, "mend the ones above first; is this a vhost file?"));
    }
    match (name, read) {
        (Some(name), Some((app, names))) if faults.is_empty() => Ok((App { name, ..app }, names)),
        _ => Err(faults),
    }
}

fn text<'b>(path: &Path, bytes: &'b [u8], faults: &mut Vec<Fault>) -> Option<&'b str> {
    let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if length > LARGEST {
        faults.push(too_large(path, length));
        return None;
    }
    if bytes.iter().all(u8::is_ascii_whitespace) {
        let mend = "fill it (docs/vhost.md), or take it away";
        faults.push(Fault::of_file(path, "it is empty".into(), mend));
        return None;
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => Some(without_mark(text)),
        Err(error) => {
            let at = error.valid_up_to();
            let line = bytes[..at].iter().filter(|b| **b == b'\n').count() + 1;
            let message = format!("line {line} is no UTF-8 text");
            faults.push(Fault { line, column: 1, ..Fault::of_file(path, message, "save the file as UTF-8") });
            None
        }
    }
}

fn read(
    reader: &mut Reader<'_>,
    root: &toml::Spanned<DeTable<'_>>,
    base: &Path,
) -> Option<(App, Vec<Named>)> {
    let top = reader.top(root);
    let names = server_names(reader, top);
    let container = reader.section(top, "container");
    let container = read_container(reader, container, base);
    let volumes = reader.sections(top, "volume");
    let volumes: Vec<Option<Volume>> =
        volumes.into_iter().map(|volume| read_volume(reader, volume)).collect();
    let network = reader.section(top, "network");
    let network = read_network(reader, network);
    let resources = reader.section(top, "resources");
    let resources = read_resources(reader, resources);
    let lifecycle = reader.section(top, "lifecycle");
    let lifecycle = read_lifecycle(reader, lifecycle);
    let scale = reader.section(top, "scale");
    let exclusive = volumes.iter().flatten().any(|volume| volume.exclusive);
    let scale = read_scale(reader, scale, exclusive);
    let hold = reader.section(top, "hold");
    let hold = read_hold(reader, hold);
    let hooks = hooks::read(reader, top);
    let steps = provision::read(reader, top);
    let names = names?;
    let app = App {
        // The file's name is put in its place by the caller.
        name: "unnamed".parse().ok()?,
        // And so is this by whoever applies it.
        origin: Origin::default(),
        server_names: names.iter().map(|named| named.pattern.clone()).collect(),
        container: Container { provision: steps?, ..container? },
        volumes: volumes.into_iter().collect::<Option<_>>()?,
        network,
        resources,
        lifecycle,
        scale,
        hold,
        hooks: hooks?,
    };
    Some((app, names))
}

fn server_names(reader: &mut Reader<'_>, top: Section<'_>) -> Option<Vec<Named>> {
    if !top.has("server-name") {
        reader.missing(top, "server-name");
        return None;
    }
    let list = reader.texts(top, "server-name")?;
    if list.value.is_empty() {
        reader.absent(
            list.span,
            "\"server-name\" is empty",
            "name at least one host, for example \"blog.example.com\"",
        );
        return None;
    }
    let mut names: Vec<Named> = Vec::new();
    let mut seen: HashMap<HostPattern, Range<usize>> = HashMap::new();
    for text in list.value {
        let pattern = match text.value.parse::<HostPattern>() {
            Ok(pattern) => pattern,
            Err(error) => {
                let error = error.to_string();
                let (message, mend) = error.split_once("; ").unwrap_or((&error, ""));
                reader.fault(text.span, message, mend);
                continue;
            }
        };
        if seen.insert(pattern.clone(), text.span.clone()).is_some() {
            reader.fault(text.span, format!("\"{pattern}\" stands here twice"), "take one of the two out");
            continue;
        }
        let template = Fault::at(reader.path, reader.source, text.span, String::new(), String::new());
        names.push(Named { pattern, line: template.line, column: template.column, template });
    }
    Some(names)
}

fn read_container(reader: &mut Reader<'_>, section: Section<'_>, base: &Path) -> Option<Container> {
    if !section.has("image") {
        reader.missing(section, "image");
    }
    let image = reader.text(section, "image").and_then(|image| image::read(reader, image, base));
    // Only an image with a configuration of its own can do without.
    let base_image =
        reader.text(section, "base").and_then(|base_image| image::read(reader, base_image, base));
    let brings_command =
        [&image, &base_image].iter().any(|image| image.as_deref().is_some_and(image::is_oci));
    if !section.has("command") && !brings_command {
        reader.missing(section, "command");
    }
    let command = reader.texts(section, "command").map_or(Some(Vec::new()), |command| {
        if command.value.first().is_none_or(|program| program.value.is_empty()) {
            reader.absent(
                command.span,
                "\"command\" names no program",
                "write for example command = [\"/usr/sbin/nginx\", \"-g\", \"daemon off;\"]",
            );
            return None;
        }
        Some(command.value.into_iter().map(|text| text.value).collect())
    });
    let port = reader.number(section, "port", 1, 65_535).and_then(|port| u16::try_from(port.value).ok());
    let user = reader.text(section, "user").map(|user| user.value).unwrap_or_default();
    let workdir = match reader.text(section, "workdir") {
        Some(workdir) if workdir.value.starts_with('/') => workdir.value,
        Some(workdir) => {
            reader.fault(workdir.span, "\"workdir\" is no absolute path", "let it begin with \"/\"");
            String::new()
        }
        None => String::new(),
    };
    let env = read_env(reader, section);
    Some(Container {
        image: image?,
        base: base_image,
        command: command?,
        port,
        user,
        workdir,
        env,
        // Put in its place by the caller.
        provision: Vec::new(),
    })
}

pub(super) fn read_env(reader: &mut Reader<'_>, section: Section<'_>) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    for (name, value) in reader.pairs(section, "env").unwrap_or_default() {
        let unfit = |c: char| c == '=' || c.is_whitespace() || c.is_control();
        if name.value.is_empty() || name.value.contains(unfit) {
            let mend = "use letters, digits and '_'";
            reader.fault(name.span, format!("{:?} cannot be the name of a variable", name.value), mend);
        } else {
            env.insert(name.value, value.value);
        }
    }
    env
}

fn read_volume(reader: &mut Reader<'_>, section: Section<'_>) -> Option<Volume> {
    for name in ["source", "target"] {
        if !section.has(name) {
            reader.missing(section, name);
        }
    }
    let source = reader.text(section, "source").and_then(|source| {
        let path = Path::new(&source.value);
        let plain = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if source.value.is_empty() || !plain {
            let mend = "write a relative path without \"..\", for example \"blog/uploads\"";
            reader.fault(source.span, "\"source\" must lie beneath the DataPool", mend);
            return None;
        }
        Some(source.value)
    });
    let target = reader.text(section, "target").and_then(|target| {
        let path = Path::new(&target.value);
        let taken =
            ["/proc", "/sys", "/dev"].iter().any(|taken| path.starts_with(taken)) || target.value == "/";
        let climbs = path.components().any(|part| part == std::path::Component::ParentDir);
        if !path.is_absolute() || climbs || taken {
            let mend =
                "write an absolute path without \"..\" that is not /, and not beneath /proc, /sys or /dev";
            reader.fault(target.span, "\"target\" cannot be there", mend);
            return None;
        }
        Some(target.value)
    });
    let read_only = reader.flag(section, "read-only").unwrap_or(false);
    let quota = reader.unit::<Bytes>(section, "quota");
    if let Some(quota) = quota.as_ref().filter(|quota| quota.value < LEAST_QUOTA) {
        let mend = format!("write at least \"{LEAST_QUOTA}\"");
        reader.fault(quota.span.clone(), "this is too little to keep anything", mend);
    }
    let quota = quota.map(|quota| quota.value);
    let exclusive = reader.flag(section, "exclusive").unwrap_or(false);
    Some(Volume { source: source?, target: target?, read_only, quota, exclusive })
}

fn read_network(reader: &mut Reader<'_>, section: Section<'_>) -> Network {
    let mut network = Network::default();
    let Some(outbound) = reader.text_or_texts(section, "outbound") else { return network };
    for text in &outbound.value {
        match text.value.as_str() {
            "internet" => network.internet = true,
            "none" if outbound.value.len() == 1 => {}
            "none" => reader.fault(
                text.span.clone(),
                "\"none\" stands beside other destinations",
                "take \"none\" out, or the others",
            ),
            other => match other.parse::<Destination>() {
                Ok(destination) => network.destinations.push(destination),
                Err(error) => {
                    let error = error.to_string();
                    let (message, mend) = error.rsplit_once("; ").unwrap_or((&error, ""));
                    reader.fault(text.span.clone(), message, mend);
                }
            },
        }
    }
    network
}

fn read_resources(reader: &mut Reader<'_>, section: Section<'_>) -> Resources {
    let cpu = reader.unit::<Millicores>(section, "cpu");
    let cpu_max = reader.unit::<Millicores>(section, "cpu-max");
    match (&cpu, &cpu_max) {
        (Some(cpu), Some(max)) if max.value < cpu.value => {
            let message = format!("\"cpu-max\" is less than \"cpu\" ({})", cpu.value);
            reader.fault(max.span.clone(), message, "write at least as much as \"cpu\", or leave it out");
        }
        (None, Some(max)) if !section.has("cpu") => {
            let mend = "add \"cpu\", or take \"cpu-max\" out: without a quota there is nothing to raise";
            reader.fault(max.span.clone(), "there is \"cpu-max\" without \"cpu\"", mend);
        }
        _ => {}
    }
    let memory = reader.unit::<Bytes>(section, "memory");
    if let Some(memory) = memory.as_ref().filter(|memory| memory.value < LEAST_MEMORY) {
        reader.fault(
            memory.span.clone(),
            "this is too little memory to start anything",
            "write at least \"1MiB\"",
        );
    }
    let disk = reader.unit::<Bytes>(section, "disk");
    if let Some(disk) = disk.as_ref().filter(|disk| disk.value < LEAST_DISK) {
        reader.fault(
            disk.span.clone(),
            "this is too little to write anything",
            format!("write at least \"{LEAST_DISK}\""),
        );
    }
    let cpu = cpu.map(|cpu| cpu.value);
    Resources {
        cpu,
        cpu_max: cpu_max.map(|max| max.value).or(cpu),
        memory: memory.map_or(Bytes(512 << 20), |memory| memory.value),
        pids: reader.number(section, "pids", 1, 4_000_000).map_or(256, |pids| pids.value),
        disk: disk.map_or(Bytes(1 << 30), |disk| disk.value),
    }
}

fn read_lifecycle(reader: &mut Reader<'_>, section: Section<'_>) -> Lifecycle {
    let seconds = Duration::from_secs;
    let freeze_after = reader.duration_or_never(section, "freeze-after").unwrap_or(None);
    let reclaim_after = reader.duration_or_never(section, "reclaim-after").unwrap_or(None);
    if reclaim_after.is_some_and(|reclaim| freeze_after.is_none_or(|freeze| reclaim < freeze))
        && let Some(text) = reader.text(section, "reclaim-after")
    {
        reader.fault(
            text.span,
            "only a frozen instance's memory is reclaimed",
            "give freeze-after too, and let reclaim-after be no shorter",
        );
    }
    Lifecycle {
        start_timeout: reader.duration(section, "start-timeout").unwrap_or(seconds(30)),
        freeze_after,
        reclaim_after,
        idle_timeout: reader.duration_or_never(section, "idle-timeout").unwrap_or(Some(seconds(600))),
        lifetime: reader.duration_or_never(section, "lifetime").unwrap_or(None),
        drain_timeout: reader.duration(section, "drain-timeout").unwrap_or(seconds(30)),
        stop_timeout: reader.duration(section, "stop-timeout").unwrap_or(seconds(10)),
        recycle_at: reader.percent(section, "recycle-at", 10, 99),
    }
}

fn read_scale(reader: &mut Reader<'_>, section: Section<'_>, exclusive: bool) -> Scale {
    let min = reader.number(section, "min", 0, 1000);
    let max = reader.number(section, "max", 1, 1000);
    let (least, most) = (min.as_ref().map_or(0, |min| min.value), max.as_ref().map_or(1, |max| max.value));
    if exclusive && let Some(max) = max.as_ref().filter(|max| max.value > 1) {
        let message = format!("\"max\" is {most}, and an exclusive volume is for one instance at a time");
        reader.fault(max.span.clone(), message, "let max be 1, or take \"exclusive\" out of [[volume]]");
    }
    if least > most
        && let Some(at) = min.or(max)
    {
        reader.fault(at.span, format!("\"min\" is {least} and \"max\" is {most}"), "let max be at least min");
    }
    let pick = reader.text(section, "pick").and_then(|pick| match pick.value.as_str() {
        "random" => Some(Pick::Random),
        "p2c" => Some(Pick::P2c),
        _ => {
            reader.fault(pick.span, "\"pick\" takes \"random\" or \"p2c\"", "write one of the two");
            None
        }
    });
    Scale {
        min: least,
        max: most,
        response_time: reader.duration_or_never(section, "response-time").unwrap_or(None),
        cool_down: reader.duration(section, "cool-down").unwrap_or(Scale::usual_cool_down()),
        concurrency: reader.number(section, "concurrency", 1, 1_000_000).map(|n| n.value),
        pick: pick.unwrap_or_default(),
        slow_start: reader.duration_or_never(section, "slow-start").unwrap_or(None),
    }
}

fn read_hold(reader: &mut Reader<'_>, section: Section<'_>) -> Hold {
    Hold {
        queue: reader.number(section, "queue", 1, 1_000_000).map_or(1000, |queue| queue.value),
        timeout: reader.duration(section, "timeout").unwrap_or(Duration::from_secs(30)),
        page: reader.flag(section, "page").unwrap_or(false),
        page_after: reader.duration(section, "page-after").unwrap_or(Hold::usual_page_after()),
    }
}
