//! The groups of one container, in all hierarchies, as one thing.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::layout::{Hierarchy, Layout, Version};
use super::{CgroupError, CpuQuota, CpuWeight, files};

/// The groups of one container. Dropping it leaves them; [`Group::remove`] removes them.
#[derive(Debug)]
pub struct Group {
    pub(super) name: String,
    pub(super) directories: Vec<Directory>,
    pub(super) roles: Roles,
    /// The quota as last written here, to find the right order for the next; v1 needs two writes.
    cpu: Mutex<Option<CpuQuota>>,
    /// The limits of memory and of tasks as last written here: what stays as it is costs no system call.
    memory: Mutex<Option<u64>>,
    pids: Mutex<Option<u64>>,
    pub(super) sleep: Mutex<Sleep>,
    pub(super) quarantine: Arc<Mutex<Vec<PathBuf>>>,
}

/// For how long it was frozen through this value.
#[derive(Debug, Default)]
pub(super) struct Sleep {
    pub(super) since: Option<Instant>,
    pub(super) before: Duration,
}

#[derive(Debug)]
pub(super) struct Directory {
    /// Opened for each operation: a descriptor for each directory of thousands of groups would be too many, and the name
    /// never means another group, for generations are not used twice.
    pub(super) path: PathBuf,
    pub(super) version: Version,
}

/// Which of the directories does what (indices).
#[derive(Clone, Copy, Debug)]
pub(super) struct Roles {
    cpu: Option<usize>,
    memory: Option<usize>,
    pids: Option<usize>,
    cpuacct: Option<usize>,
    pub(super) freezer: Option<usize>,
    pub(super) unified: Option<usize>,
}

/// CPU time used and denied, since the group was made.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct CpuStat {
    /// Microseconds of CPU time used.
    pub usage_us: u64,
    /// Periods in which the group was active and had a quota.
    pub nr_periods: u64,
    /// Those of them in which it was throttled.
    pub nr_throttled: u64,
    /// Microseconds for which its tasks were throttled, summed.
    pub throttled_us: u64,
}

/// Memory in use, in bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct MemoryStat {
    /// Now.
    pub current: u64,
    /// The limit, if there is one.
    pub limit: Option<u64>,
    /// The most there has been, where the kernel remembers it.
    pub peak: Option<u64>,
    /// Processes killed because the limit was reached: tells "out of memory" from a crash.
    pub oom_kills: u64,
}

impl Group {
    pub(super) fn create(
        layout: &Layout,
        parent: &str,
        name: &str,
        quarantine: Arc<Mutex<Vec<PathBuf>>>,
    ) -> Result<Group, CgroupError> {
        let paths: Vec<PathBuf> = layout.mounts().map(|mount| mount.join(parent).join(name)).collect();
        for (made, path) in paths.iter().enumerate() {
            if let Err(error) = std::fs::create_dir(path) {
                for path in &paths[..made] {
                    let _ = std::fs::remove_dir(path);
                }
                return Err(CgroupError::io(path, "make the group", error));
            }
        }
        Group::open(layout, parent, name, quarantine).inspect_err(|_| {
            for path in &paths {
                let _ = std::fs::remove_dir(path);
            }
        })
    }

    pub(super) fn open(
        layout: &Layout,
        parent: &str,
        name: &str,
        quarantine: Arc<Mutex<Vec<PathBuf>>>,
    ) -> Result<Group, CgroupError> {
        Group::open_some(layout, parent, name, quarantine, true)
    }

    /// As `open`, but content with any part of the groups: for the sweep.
    pub(super) fn open_what_is_there(
        layout: &Layout,
        parent: &str,
        name: &str,
        quarantine: Arc<Mutex<Vec<PathBuf>>>,
    ) -> Result<Group, CgroupError> {
        Group::open_some(layout, parent, name, quarantine, false)
    }

    fn open_some(
        layout: &Layout,
        parent: &str,
        name: &str,
        quarantine: Arc<Mutex<Vec<PathBuf>>>,
        all: bool,
    ) -> Result<Group, CgroupError> {
        let mut directories = Vec::new();
        let mut mounts = Vec::new();
        for mount in layout.mounts() {
            let path = mount.join(parent).join(name);
            match files::open_dir(&path) {
                Ok(_) => {
                    let version =
                        if layout.unified.as_deref() == Some(mount) { Version::V2 } else { Version::V1 };
                    directories.push(Directory { path, version });
                    mounts.push(mount);
                }
                Err(error) if !all && error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(CgroupError::io(&path, "open the group", error)),
            }
        }
        let at = |wanted: &Path| mounts.iter().position(|mount| *mount == wanted);
        let of = |hierarchy: &Hierarchy| at(&hierarchy.mount);
        let roles = Roles {
            cpu: of(&layout.cpu),
            memory: of(&layout.memory),
            pids: of(&layout.pids),
            cpuacct: layout.cpuacct.as_deref().and_then(at),
            freezer: layout.freezer.as_deref().and_then(at),
            unified: layout.unified.as_deref().and_then(at),
        };
        Ok(Group {
            name: name.to_owned(),
            directories,
            roles,
            cpu: Mutex::new(None),
            memory: Mutex::new(None),
            pids: Mutex::new(None),
            sleep: Mutex::default(),
            quarantine,
        })
    }

    /// Name of the group beneath the parent.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directories, one per hierarchy.
    pub fn directories(&self) -> Vec<&Path> {
        self.directories.iter().map(|directory| directory.path.as_path()).collect()
    }

    /// The files to each of which a process with one thread writes `0` to move itself here.
    pub fn join_files(&self) -> Vec<PathBuf> {
        let file = |directory: &Directory| match directory.version {
            Version::V1 => directory.path.join("tasks"),
            Version::V2 => directory.path.join("cgroup.procs"),
        };
        self.directories.iter().map(file).collect()
    }

    /// What a process needs in order to be born here: the `tasks` files of v1 (it writes `0` to each, while it has
    /// one thread) and the directory of v2 (for `CLONE_INTO_CGROUP`).
    ///
    /// # Errors
    /// When a descriptor cannot be made.
    pub fn join_fds(&self) -> Result<(Vec<OwnedFd>, Option<OwnedFd>), CgroupError> {
        let mut tasks = Vec::new();
        for directory in self.directories.iter().filter(|directory| directory.version == Version::V1) {
            tasks.push(directory.run("open tasks", |fd| files::open_write(fd, "tasks"))?);
        }
        let unified = match self.roles.unified.map(|index| &self.directories[index]) {
            Some(directory) => Some(directory.run("duplicate", |fd| fd.try_clone_to_owned())?),
            None => None,
        };
        Ok((tasks, unified))
    }

    /// Sets the CPU quota; takes effect at once for the running processes.
    ///
    /// # Errors
    /// The system's.
    pub fn set_cpu(&self, quota: CpuQuota) -> Result<(), CgroupError> {
        let directory = self.directory(self.roles.cpu, "cpu")?;
        let mut last = self.cpu.lock().unwrap_or_else(PoisonError::into_inner);
        if directory.version == Version::V2 {
            let value = match quota {
                CpuQuota::Unlimited => "max".to_owned(),
                CpuQuota::Limited { quota_us, period_us } => format!("{quota_us} {period_us}"),
            };
            directory.run("write cpu.max", |fd| files::write(fd, "cpu.max", &value))?;
        } else {
            directory.run("write the CPU quota", |fd| {
                for (file, value) in v1_cpu_writes(*last, quota) {
                    files::write(fd, file, &value)?;
                }
                Ok(())
            })?;
        }
        *last = Some(quota);
        Ok(())
    }

    /// Sets how much of a busy CPU the group gets beside others.
    ///
    /// # Errors
    /// The system's.
    pub fn set_weight(&self, weight: CpuWeight) -> Result<(), CgroupError> {
        let directory = self.directory(self.roles.cpu, "cpu")?;
        let (file, value) = match (directory.version, weight) {
            (Version::V2, CpuWeight::Usual) => ("cpu.weight", "100"),
            (Version::V2, CpuWeight::Starting) => ("cpu.weight", "12"),
            (Version::V1, CpuWeight::Usual) => ("cpu.shares", "1024"),
            (Version::V1, CpuWeight::Starting) => ("cpu.shares", "128"),
        };
        directory.run("set the CPU weight", |fd| files::write(fd, file, value))
    }

    /// Sets the memory limit, in bytes; it bounds swap too where the kernel can: v1 counts memory and swap together,
    /// v2 allows no swap at all beneath a limit.
    ///
    /// # Errors
    /// The system's; `EBUSY` when more is in use and cannot be reclaimed.
    pub fn set_memory(&self, bytes: u64) -> Result<(), CgroupError> {
        let mut last = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        if *last == Some(bytes) {
            return Ok(());
        }
        let directory = self.directory(self.roles.memory, "memory")?;
        let value = bytes.to_string();
        directory.run("set the memory limit", |fd| {
            if directory.version == Version::V2 {
                files::write(fd, "memory.max", &value)?;
                files::write_if_there(fd, "memory.swap.max", "0")?;
                files::write_if_there(fd, "memory.oom.group", "1")?;
                return Ok(());
            }
            // The sum with swap may never be below the limit without: widen it first, narrow it last.
            let raised =
                files::limit(&files::read(fd, "memory.limit_in_bytes")?).is_some_and(|now| bytes > now);
            if raised {
                files::write_if_there(fd, "memory.memsw.limit_in_bytes", &value)?;
            }
            files::write(fd, "memory.limit_in_bytes", &value)?;
            if !raised {
                files::write_if_there(fd, "memory.memsw.limit_in_bytes", &value)?;
            }
            Ok(())
        })?;
        *last = Some(bytes);
        Ok(())
    }

    /// Sets the limit on the number of tasks.
    ///
    /// # Errors
    /// The system's.
    pub fn set_pids(&self, count: u64) -> Result<(), CgroupError> {
        let directory = self.directory(self.roles.pids, "pids")?;
        let mut last = self.pids.lock().unwrap_or_else(PoisonError::into_inner);
        if *last != Some(count) {
            directory.run("set the limit of tasks", |fd| files::write(fd, "pids.max", &count.to_string()))?;
            *last = Some(count);
        }
        Ok(())
    }

    /// CPU time used and denied. Cheap enough for every few milliseconds.
    ///
    /// # Errors
    /// The system's; `ENOENT` when the group is gone.
    pub fn cpu_stat(&self) -> Result<CpuStat, CgroupError> {
        let cpu = self.directory(self.roles.cpu, "cpu")?;
        let text = cpu.run("read cpu.stat", |fd| files::read(fd, "cpu.stat"))?;
        let value = |key| files::keyed(&text, key).unwrap_or(0);
        let (usage_us, throttled_us) = match cpu.version {
            Version::V2 => (value("usage_usec"), value("throttled_usec")),
            Version::V1 => (self.usage_us()?, value("throttled_time") / 1000),
        };
        Ok(CpuStat {
            usage_us,
            nr_periods: value("nr_periods"),
            nr_throttled: value("nr_throttled"),
            throttled_us,
        })
    }

    /// Microseconds in which a process of the group wanted a CPU and had none, be it for its own quota or for others on
    /// the host; `None` where the kernel does not count it.
    pub fn cpu_stalled_us(&self) -> Option<u64> {
        let directory = &self.directories[self.roles.unified?];
        let text = directory.run("read cpu.pressure", |fd| files::read(fd, "cpu.pressure")).ok()?;
        let some = text.lines().find(|line| line.starts_with("some"))?;
        some.rsplit("total=").next()?.trim().parse().ok()
    }

    /// Microseconds of CPU time used, of groups beneath too, also of those that are gone.
    ///
    /// # Errors
    /// The system's; `ENOENT` when the group is gone.
    pub fn usage_us(&self) -> Result<u64, CgroupError> {
        if let Some(directory) = self.roles.cpuacct.map(|index| &self.directories[index]) {
            let text = directory.run("read cpuacct.usage", |fd| files::read(fd, "cpuacct.usage"))?;
            return Ok(text.trim().parse::<u64>().unwrap_or(0) / 1000);
        }
        let text = self
            .directory(self.roles.unified, "unified")?
            .run("read cpu.stat", |fd| files::read(fd, "cpu.stat"))?;
        Ok(files::keyed(&text, "usage_usec").unwrap_or(0))
    }

    /// [`Self::usage_us`] when no process is left, so that it is the last word; waited for 200 ms at most. `None` when
    /// the group cannot be read.
    pub async fn final_usage_us(&self) -> Option<u64> {
        for _ in 0..40 {
            match self.populated() {
                Ok(true) => tokio::time::sleep(Duration::from_millis(5)).await,
                _ => break,
            }
        }
        self.usage_us().ok()
    }

    /// Bytes of memory in use.
    ///
    /// # Errors
    /// The system's; `ENOENT` when the group is gone.
    pub fn memory_current(&self) -> Result<u64, CgroupError> {
        let directory = self.directory(self.roles.memory, "memory")?;
        let file = match directory.version {
            Version::V1 => "memory.usage_in_bytes",
            Version::V2 => "memory.current",
        };
        let text = directory.run("read memory", |fd| files::read(fd, file))?;
        Ok(text.trim().parse().unwrap_or(0))
    }

    /// Bytes of memory that the kernel cannot take back: the processes' own, and files in memory.
    ///
    /// # Errors
    /// The system's; `ENODEV` when the group is gone.
    pub fn memory_unreclaimable(&self) -> Result<u64, CgroupError> {
        let directory = self.directory(self.roles.memory, "memory")?;
        let text = directory.run("read memory.stat", |fd| files::read(fd, "memory.stat"))?;
        let own = if directory.version == Version::V2 { "anon" } else { "rss" };
        let sum = [own, "shmem"].iter().filter_map(|key| files::keyed(&text, key)).sum();
        Ok(sum)
    }

    /// Memory in use, its limit and its peak, and how often the limit killed.
    ///
    /// # Errors
    /// The system's; `ENOENT` when the group is gone.
    pub fn memory(&self) -> Result<MemoryStat, CgroupError> {
        let directory = self.directory(self.roles.memory, "memory")?;
        let [current, limit, peak, events] = match directory.version {
            Version::V1 => [
                "memory.usage_in_bytes",
                "memory.limit_in_bytes",
                "memory.max_usage_in_bytes",
                "memory.oom_control",
            ],
            Version::V2 => ["memory.current", "memory.max", "memory.peak", "memory.events"],
        };
        directory.run("read memory", |fd| {
            Ok(MemoryStat {
                current: files::read(fd, current)?.trim().parse().unwrap_or(0),
                limit: files::limit(&files::read(fd, limit)?),
                peak: if files::exists(fd, peak) { files::limit(&files::read(fd, peak)?) } else { None },
                oom_kills: files::keyed(&files::read(fd, events)?, "oom_kill").unwrap_or(0),
            })
        })
    }

    /// Number of tasks now.
    ///
    /// # Errors
    /// The system's; `ENOENT` when the group is gone.
    pub fn pids_current(&self) -> Result<u64, CgroupError> {
        let text = self
            .directory(self.roles.pids, "pids")?
            .run("read pids.current", |fd| files::read(fd, "pids.current"))?;
        Ok(text.trim().parse().unwrap_or(0))
    }

    /// How often a fork was refused because of the limit on tasks.
    ///
    /// # Errors
    /// The system's; `ENOENT` when the group is gone.
    pub fn pids_refused(&self) -> Result<u64, CgroupError> {
        let text = self
            .directory(self.roles.pids, "pids")?
            .run("read pids.events", |fd| files::read(fd, "pids.events"))?;
        Ok(files::keyed(&text, "max").unwrap_or(0))
    }

    pub(super) fn memory_directory(&self) -> Result<&Directory, CgroupError> {
        self.directory(self.roles.memory, "memory")
    }

    pub(super) fn directory(
        &self,
        index: Option<usize>,
        controller: &'static str,
    ) -> Result<&Directory, CgroupError> {
        index.map(|index| &self.directories[index]).ok_or(CgroupError::Missing(controller))
    }
}

impl Directory {
    pub(super) fn run<T>(
        &self,
        what: &'static str,
        operation: impl FnOnce(BorrowedFd<'_>) -> io::Result<T>,
    ) -> Result<T, CgroupError> {
        files::open_dir(&self.path)
            .and_then(|directory| operation(directory.as_fd()))
            .map_err(|error| CgroupError::io(&self.path, what, error))
    }
}

/// The writes that lead from one quota to another on v1, where quota and period are two files. Between the two the
/// group has more than before and after when it is being raised, less when it is being lowered.
fn v1_cpu_writes(last: Option<CpuQuota>, next: CpuQuota) -> Vec<(&'static str, String)> {
    const QUOTA: &str = "cpu.cfs_quota_us";
    const PERIOD: &str = "cpu.cfs_period_us";
    let CpuQuota::Limited { quota_us, period_us } = next else { return vec![(QUOTA, "-1".to_owned())] };
    let quota = (QUOTA, quota_us.to_string());
    let period = (PERIOD, period_us.to_string());
    match last {
        Some(CpuQuota::Limited { period_us: same, .. }) if same == period_us => vec![quota],
        Some(CpuQuota::Limited { quota_us: old_quota, period_us: old_period }) => {
            let raised = quota_us * old_period >= old_quota * period_us;
            let more_quota = quota_us >= old_quota;
            if raised == more_quota { vec![quota, period] } else { vec![period, quota] }
        }
        // Without a quota the period has no effect yet.
        Some(CpuQuota::Unlimited) => vec![period, quota],
        None => vec![(QUOTA, "-1".to_owned()), period, quota],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_with_the_same_period_is_one_write() {
        let last = Some(CpuQuota::from_millicores(300));
        assert_eq!(
            v1_cpu_writes(last, CpuQuota::from_millicores(400)),
            [("cpu.cfs_quota_us", "4000".to_owned())]
        );
        assert_eq!(v1_cpu_writes(last, CpuQuota::Unlimited), [("cpu.cfs_quota_us", "-1".to_owned())]);
    }

    #[test]
    fn on_the_way_up_there_is_never_less_than_before() {
        let writes = v1_cpu_writes(Some(CpuQuota::from_millicores(300)), CpuQuota::from_millicores(600));
        assert_eq!(writes[0].0, "cpu.cfs_quota_us");
    }

    #[test]
    fn a_first_quota_forgets_what_was_there() {
        let writes = v1_cpu_writes(None, CpuQuota::from_millicores(300));
        assert_eq!(writes.len(), 3);
        assert_eq!(writes[0].1, "-1");
    }
}
