//! What the kernel says, looked at from outside of FastContainer: which containers there are, their quotas and processes.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The containers at one moment; kept whenever they differ from the moment before.
#[derive(Clone, Debug)]
pub(crate) struct Sight {
    /// ms since 1970.
    pub(crate) at_ms: f64,
    /// By name: `APP.GENERATION`.
    pub(crate) groups: BTreeMap<String, Seen>,
}

/// One container's cgroup.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Seen {
    /// Thousandths of a core; `None`: unlimited.
    pub(crate) quota: Option<u64>,
    /// Its first process, the one with the lowest number, as the host sees it; `None` while it has none.
    pub(crate) pid: Option<i32>,
}

/// A thread that looks again and again.
#[derive(Debug)]
pub(crate) struct Watch {
    goes_on: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Sight>>,
}

/// Now, ms since 1970.
pub(crate) fn now_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64() * 1_000.0
}

impl Watch {
    /// Looks at the groups beneath `parent`. With many containers less often: looking costs CPU, too.
    pub(crate) fn begin(parent: &str, many: bool) -> Self {
        let goes_on = Arc::new(AtomicBool::new(true));
        let (parents, flag) = (parents(parent), Arc::clone(&goes_on));
        let pause = Duration::from_millis(if many { 100 } else { 4 });
        let thread = std::thread::spawn(move || {
            let mut sights: Vec<Sight> = Vec::new();
            while flag.load(Relaxed) {
                let groups = look(&parents);
                if sights.last().is_none_or(|last| last.groups != groups) {
                    sights.push(Sight { at_ms: now_ms(), groups });
                }
                std::thread::sleep(pause);
            }
            sights
        });
        Self { goes_on, thread }
    }

    /// What was seen.
    pub(crate) fn end(self) -> Vec<Sight> {
        self.goes_on.store(false, Relaxed);
        self.thread.join().unwrap_or_default()
    }
}

/// The parent's folder in the hierarchy that knows of CPU quotas: v1 or v2, wherever it is mounted beneath the usual place.
fn parents(name: &str) -> Vec<PathBuf> {
    let top = Path::new("/sys/fs/cgroup");
    let beneath = fs::read_dir(top).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> = std::iter::once(top.to_owned())
        .chain(beneath)
        .map(|mount| mount.join(name))
        .filter(|parent| parent.join("cpu.max").exists() || parent.join("cpu.cfs_quota_us").exists())
        .collect();
    // `cpu` and `cpuacct` may be two names of one mount.
    found.truncate(1);
    found
}

/// Gives the groups beneath `parent` the weight of a process at nice -10, so that a busy machine disturbs them little. Not
/// more: they must not go before the launcher and the proxy.
pub(crate) fn put_before_others(parent: &str) -> std::io::Result<()> {
    parents(parent).iter().try_for_each(|parent| {
        let (file, weight) =
            if parent.join("cpu.weight").exists() { ("cpu.weight", "932") } else { ("cpu.shares", "9548") };
        fs::write(parent.join(file), weight)
    })
}

fn look(parents: &[PathBuf]) -> BTreeMap<String, Seen> {
    let mut groups = BTreeMap::new();
    for entry in parents.iter().filter_map(|parent| fs::read_dir(parent).ok()).flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let read = |file| fs::read_to_string(entry.path().join(file)).ok();
        let text = read("cpu.max")
            .or_else(|| Some(format!("{} {}", read("cpu.cfs_quota_us")?.trim(), read("cpu.cfs_period_us")?)));
        let pid = read("cgroup.procs").and_then(|pids| pids.lines().filter_map(|pid| pid.parse().ok()).min());
        if let Some(text) = text {
            let name = entry.file_name().to_string_lossy().into_owned();
            groups.insert(name, Seen { quota: quota(&text), pid });
        }
    }
    groups
}

/// `QUOTA PERIOD` in µs; "max" or -1: unlimited.
fn quota(text: &str) -> Option<u64> {
    let mut numbers = text.split_whitespace().map(str::parse::<u64>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(quota)), Some(Ok(period))) => (quota * 1_000).checked_div(period),
        _ => None,
    }
}

/// The groups of one app.
pub(crate) fn of_app<'a>(sight: &'a Sight, app: &'a str) -> impl Iterator<Item = (&'a str, &'a Seen)> {
    let mine = move |name: &str| name.rsplit_once('.').is_some_and(|(owner, _)| owner == app);
    sight.groups.iter().map(|(name, seen)| (&**name, seen)).filter(move |(name, _)| mine(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_of_both_versions_are_understood() {
        assert_eq!(quota("3000 10000\n"), Some(300));
        assert_eq!(quota("max 100000\n"), None);
        assert_eq!(quota("-1 100000\n"), None);
    }

    #[test]
    fn groups_belong_to_their_app() {
        let seen = Seen { quota: None, pid: None };
        let groups = ["shop.12", "shop.x.7", "blog.3"].map(|name| (name.to_owned(), seen.clone())).into();
        let sight = Sight { at_ms: 0.0, groups };
        assert_eq!(of_app(&sight, "shop").map(|(name, _)| name).collect::<Vec<_>>(), ["shop.12"]);
    }
}
