//! What can be seen from inside.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

/// The open descriptors from 3 on, each as `number -> target`, without the one that the look itself needs.
pub(crate) fn open_descriptors() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else {
        return vec!["/proc/self/fd cannot be read".to_owned()];
    };
    let numbers: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&fd| fd > 2)
        .collect();
    // The directory itself was among them and is closed by now: its link is gone.
    let describe =
        |fd: u32| Some(format!("{fd} -> {}", fs::read_link(format!("/proc/self/fd/{fd}")).ok()?.display()));
    numbers.into_iter().filter_map(describe).collect()
}

/// Facts about this process and its surroundings; `null` for what cannot be read.
pub(crate) fn facts(inherited: &[String]) -> Value {
    let status = status();
    let field = |name: &str| status.get(name).cloned();
    json!({
        "pid": std::process::id(),
        "ppid": std::os::unix::process::parent_id(),
        "uid": nix::unistd::getuid().as_raw(),
        "gid": nix::unistd::getgid().as_raw(),
        "groups": field("Groups"),
        "hostname": loadtest::socket::hostname(),
        "inherited_descriptors": inherited,
        "cwd": fs::read_link("/proc/self/cwd").ok(),
        "root": fs::read_link("/proc/self/root").ok(),
        "no_new_privs": field("NoNewPrivs"),
        "seccomp": field("Seccomp"),
        "cap_effective": field("CapEff"),
        "cap_permitted": field("CapPrm"),
        "cap_bounding": field("CapBnd"),
        "cap_inheritable": field("CapInh"),
        "cap_ambient": field("CapAmb"),
        "signals_blocked": field("SigBlk"),
        "signals_ignored": field("SigIgn"),
        "uid_map": text("/proc/self/uid_map"),
        "gid_map": text("/proc/self/gid_map"),
        "setgroups": text("/proc/self/setgroups"),
        "oom_score_adj": text("/proc/self/oom_score_adj"),
        "cgroup": text("/proc/self/cgroup"),
        "limits": text("/proc/self/limits"),
        "mounts": mounts(),
        "other_processes": other_processes(),
        "interfaces": interfaces(),
        "root_entries": entries("/"),
        "dev_entries": entries("/dev"),
        "proc_entries": proc_entries(),
        "readable_secrets": readable_secrets(),
        "dev_null_is_the_device": fs::metadata("/dev/null").ok().map(|meta| std::os::unix::fs::MetadataExt::rdev(&meta) == 0x103),
        "writable_root": probe_write("/"),
        "writable_tmp": probe_write("/tmp"),
    })
}

fn status() -> BTreeMap<String, String> {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

fn text(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Files that tell about the host, or belong to its root.
const SECRETS: &[&str] = &[
    "/etc/shadow",
    "/proc/kcore",
    "/proc/keys",
    "/proc/timer_list",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/kallsyms",
    "/sys/firmware",
];

fn readable_secrets() -> Vec<&'static str> {
    SECRETS.iter().copied().filter(|path| is_readable(path)).collect()
}

/// What /proc has besides processes.
fn proc_entries() -> Option<Vec<String>> {
    Some(entries("/proc")?.into_iter().filter(|name| name.parse::<u32>().is_err()).collect())
}

/// One `mountpoint type options` each.
fn mounts() -> Option<Vec<String>> {
    let text = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let describe = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(4);
        Some(format!("{} {} {}", left.next()?, right.split(' ').next()?, left.next()?))
    };
    Some(text.lines().filter_map(describe).collect())
}

/// Processes in /proc that are neither this one nor its children.
fn other_processes() -> Option<usize> {
    let own = std::process::id();
    let pids = entries("/proc")?.into_iter().filter_map(|name| name.parse::<u32>().ok());
    Some(pids.filter(|&pid| pid != own && parent_of(pid) != Some(own)).count())
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn interfaces() -> Option<Vec<String>> {
    nix::ifaddrs::getifaddrs().ok().map(|addresses| {
        let mut names: Vec<String> = addresses.map(|address| address.interface_name).collect();
        names.sort();
        names.dedup();
        names
    })
}

fn entries(path: impl AsRef<Path>) -> Option<Vec<String>> {
    let mut names: Vec<String> = fs::read_dir(path)
        .ok()?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    Some(names)
}

/// Whether there is anything to read: masked files are empty, masked directories have no entries.
fn is_readable(path: &str) -> bool {
    let mut byte = [0];
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => entries(path).is_some_and(|names| !names.is_empty()),
        Ok(_) => fs::File::open(path)
            .and_then(|mut file| std::io::Read::read(&mut file, &mut byte))
            .is_ok_and(|count| count > 0),
        Err(_) => false,
    }
}

/// "ok", or the error's name.
fn probe_write(directory: &str) -> String {
    let path = format!("{directory}/.probe-{}", std::process::id());
    let outcome = fs::write(&path, b"x").and_then(|()| fs::remove_file(&path));
    outcome.map_or_else(|error| crate::raw::name_of(error.raw_os_error()), |()| "ok".to_owned())
}
