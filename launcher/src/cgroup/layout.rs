//! Which hierarchy has which controller on this host.

use std::path::{Path, PathBuf};

use super::CgroupError;

/// The controllers without which there are no limits.
const NEEDED: [&str; 3] = ["cpu", "memory", "pids"];

/// Version of a hierarchy.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Version {
    /// One hierarchy per controller or pair of them.
    V1,
    /// The unified hierarchy.
    V2,
}

/// A controller's hierarchy.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// Which interface its files have.
    pub version: Version,
}

/// Where everything is. Pure data: see [`Layout::detect`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Layout {
    /// CPU quota.
    pub cpu: Hierarchy,
    /// Memory limit.
    pub memory: Hierarchy,
    /// Limit on the number of tasks.
    pub pids: Hierarchy,
    /// v1 CPU accounting; only where no unified hierarchy counts it, or where it comes with `cpu` for nothing.
    pub cpuacct: Option<PathBuf>,
    /// v1 freezer; only where there is no unified hierarchy.
    pub freezer: Option<PathBuf>,
    /// The unified hierarchy, with or without controllers: kill, freeze, birth inside a group.
    pub unified: Option<PathBuf>,
}

impl Layout {
    /// Reads what the kernel says of this process's mounts.
    pub(super) fn of_this_host() -> Result<Layout, CgroupError> {
        let path = Path::new("/proc/self/mountinfo");
        let mountinfo = std::fs::read_to_string(path)
            .map_err(|error| CgroupError::Detect { path: path.to_owned(), error })?;
        let controllers = match Mounts::parse(&mountinfo).unified {
            None => String::new(),
            Some(mount) => {
                let path = mount.join("cgroup.controllers");
                std::fs::read_to_string(&path).map_err(|error| CgroupError::Detect { path, error })?
            }
        };
        Layout::detect(&mountinfo, &controllers)
    }

    /// Decides from the text of `/proc/self/mountinfo` and of the unified hierarchy's `cgroup.controllers` (empty
    /// when there is none).
    ///
    /// # Errors
    /// When a controller that is needed is nowhere.
    pub fn detect(mountinfo: &str, unified_controllers: &str) -> Result<Layout, CgroupError> {
        let mounts = Mounts::parse(mountinfo);
        let find = |controller: &'static str| {
            if let Some(mount) = mounts.v1(controller) {
                return Ok(Hierarchy { mount: mount.to_owned(), version: Version::V1 });
            }
            match &mounts.unified {
                Some(mount) if unified_controllers.split_whitespace().any(|c| c == controller) => {
                    Ok(Hierarchy { mount: mount.clone(), version: Version::V2 })
                }
                _ => Err(CgroupError::Missing(controller)),
            }
        };
        let cpu = find("cpu")?;
        let cpuacct = mounts
            .v1("cpuacct")
            .filter(|mount| mounts.unified.is_none() || *mount == cpu.mount)
            .map(Path::to_owned);
        Ok(Layout {
            memory: find("memory")?,
            pids: find("pids")?,
            freezer: if mounts.unified.is_none() { mounts.v1("freezer").map(Path::to_owned) } else { None },
            cpuacct,
            cpu,
            unified: mounts.unified,
        })
    }

    /// Mount points of the hierarchies that we use, each once.
    pub fn mounts(&self) -> impl Iterator<Item = &Path> {
        let mut all: Vec<&Path> = vec![&self.cpu.mount, &self.memory.mount, &self.pids.mount];
        all.extend(self.cpuacct.as_deref());
        all.extend(self.freezer.as_deref());
        all.extend(self.unified.as_deref());
        all.sort_unstable();
        all.dedup();
        all.into_iter()
    }

    /// The controllers of v2 that the groups on this mount need handed down.
    pub(super) fn handed_down(&self, mount: &Path) -> Vec<&'static str> {
        let hierarchies = [&self.cpu, &self.memory, &self.pids];
        NEEDED
            .into_iter()
            .zip(hierarchies)
            .filter(|(_, hierarchy)| hierarchy.version == Version::V2 && hierarchy.mount == mount)
            .map(|(controller, _)| controller)
            .collect()
    }
}

/// The cgroup mounts of a mountinfo text.
#[derive(Default)]
struct Mounts {
    v1: Vec<(Vec<String>, PathBuf)>,
    unified: Option<PathBuf>,
}

impl Mounts {
    fn parse(mountinfo: &str) -> Mounts {
        let mut mounts = Mounts::default();
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let mut left = left.split(' ').skip(4);
            let mut right = right.split(' ');
            let (Some(point), Some(kind), options) = (left.next(), right.next(), right.nth(1)) else {
                continue;
            };
            match kind {
                "cgroup2" if mounts.unified.is_none() => mounts.unified = Some(unescape(point)),
                "cgroup" => {
                    let options = options.unwrap_or_default().split(',').map(str::to_owned).collect();
                    mounts.v1.push((options, unescape(point)));
                }
                _ => {}
            }
        }
        mounts
    }

    fn v1(&self, controller: &str) -> Option<&Path> {
        self.v1
            .iter()
            .find(|(options, _)| options.iter().any(|o| o == controller))
            .map(|(_, path)| path.as_path())
    }
}

/// Undoes the kernel's `\040` for a space and the like.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt as _;
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN_12: &str = "\
24 31 0:22 / /proc rw,nosuid,nodev,noexec,relatime shared:14 - proc proc rw
25 31 0:23 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
34 25 0:29 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
";

    const DEBIAN_12_HYBRID: &str = "\
25 30 0:23 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
32 25 0:28 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:9 - tmpfs tmpfs ro,size=4096k,nr_inodes=1024,mode=755
33 32 0:29 / /sys/fs/cgroup/unified rw,nosuid,nodev,noexec,relatime shared:10 - cgroup2 cgroup2 rw,nsdelegate
34 32 0:30 / /sys/fs/cgroup/systemd rw,nosuid,nodev,noexec,relatime shared:11 - cgroup cgroup rw,xattr,name=systemd
37 32 0:33 / /sys/fs/cgroup/memory rw,nosuid,nodev,noexec,relatime shared:15 - cgroup cgroup rw,memory
38 32 0:34 / /sys/fs/cgroup/freezer rw,nosuid,nodev,noexec,relatime shared:16 - cgroup cgroup rw,freezer
39 32 0:35 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid,nodev,noexec,relatime shared:17 - cgroup cgroup rw,cpu,cpuacct
40 32 0:36 / /sys/fs/cgroup/pids rw,nosuid,nodev,noexec,relatime shared:18 - cgroup cgroup rw,pids
";

    const SEPARATE_HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
33 31 0:30 / /sys/fs/cgroup/cpuacct rw,relatime - cgroup cgroup rw,cpuacct
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    fn v1(mount: &str) -> Hierarchy {
        Hierarchy { mount: mount.into(), version: Version::V1 }
    }

    #[test]
    fn debian_12_has_everything_on_v2() {
        let layout = Layout::detect(DEBIAN_12, "cpuset cpu io memory hugetlb pids rdma misc\n").unwrap();
        let root = Path::new("/sys/fs/cgroup");
        assert_eq!(layout.cpu, Hierarchy { mount: root.into(), version: Version::V2 });
        assert_eq!((layout.cpuacct.as_ref(), layout.freezer.as_ref()), (None, None));
        assert_eq!(layout.mounts().collect::<Vec<_>>(), [root]);
        assert_eq!(layout.handed_down(root), ["cpu", "memory", "pids"]);
    }

    #[test]
    fn a_hybrid_limits_on_v1_and_kills_on_v2() {
        let layout = Layout::detect(DEBIAN_12_HYBRID, "").unwrap();
        assert_eq!(layout.cpu, v1("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(layout.cpuacct.as_deref(), Some(Path::new("/sys/fs/cgroup/cpu,cpuacct")));
        assert_eq!(layout.unified.as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(layout.freezer, None);
        assert_eq!(layout.mounts().count(), 4);
        assert!(layout.handed_down(Path::new("/sys/fs/cgroup/unified")).is_empty());
    }

    #[test]
    fn a_hybrid_with_separate_mounts_counts_cpu_time_on_v2() {
        let layout = Layout::detect(SEPARATE_HYBRID, "hugetlb\n").unwrap();
        assert_eq!(layout.memory, v1("/sys/fs/cgroup/memory"));
        assert_eq!(layout.cpuacct, None);
        assert_eq!(layout.mounts().count(), 4);
    }

    #[test]
    fn without_v2_the_v1_freezer_and_accounting_are_used() {
        let text: String =
            SEPARATE_HYBRID.lines().filter(|l| !l.contains("cgroup2")).flat_map(|l| [l, "\n"]).collect();
        let layout = Layout::detect(&text, "").unwrap();
        assert_eq!(layout.unified, None);
        assert_eq!(layout.freezer.as_deref(), Some(Path::new("/sys/fs/cgroup/freezer")));
        assert_eq!(layout.mounts().count(), 5);
    }

    #[test]
    fn a_missing_controller_is_named() {
        let error = Layout::detect(DEBIAN_12, "cpu pids").unwrap_err();
        assert!(error.to_string().contains("memory"), "{error}");
        assert!(Layout::detect("", "").is_err());
        assert!(Layout::detect("garbage - \n - cgroup\n", "").is_err());
    }

    #[test]
    fn a_mount_point_with_a_space_is_understood() {
        assert_eq!(unescape(r"/a\040b\134c\0"), Path::new(r"/a b\c\0"));
    }
}
