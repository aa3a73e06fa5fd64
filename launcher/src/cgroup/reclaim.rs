//! Taking a sleeping container's memory back.

use std::os::fd::OwnedFd;

use super::group::Group;
use super::layout::Version;
use super::{CgroupError, files};

impl Group {
    /// The file that makes the kernel reclaim the group's memory, open, and what is to be written there. The write takes as
    /// long as the work does, and ends early only when a signal comes (cgroups-v1/memory `memory.force_empty`, cgroup-v2
    /// `memory.reclaim`, the latter since Linux 5.19).
    ///
    /// # Errors
    /// The system's; `ENOENT` on a kernel without.
    pub fn reclaim_order(&self) -> Result<(OwnedFd, String), CgroupError> {
        let directory = self.memory_directory()?;
        let (file, order) = match directory.version {
            Version::V1 => ("memory.force_empty", "0".to_owned()),
            Version::V2 => ("memory.reclaim", self.memory_current()?.to_string()),
        };
        Ok((directory.run("open to reclaim", |fd| files::open_write(fd, file))?, order))
    }

    /// Whether memory of the group may go to swap. With v2 it may not but while it is being reclaimed (what is there then
    /// stays there until it is used); v1 counts swap and memory together and needs no such care.
    ///
    /// # Errors
    /// The system's.
    pub fn allow_swap(&self, allowed: bool) -> Result<(), CgroupError> {
        let directory = self.memory_directory()?;
        if directory.version == Version::V2 {
            let most = if allowed { "max" } else { "0" };
            directory.run("limit swap", |fd| files::write_if_there(fd, "memory.swap.max", most))?;
        }
        Ok(())
    }

    /// Memory of the group that is in swap, bytes; `None` where the kernel does not count it.
    pub fn swap(&self) -> Option<u64> {
        let directory = self.memory_directory().ok()?;
        let read = |file| directory.run("read swap", |fd| files::read(fd, file)).ok();
        match directory.version {
            Version::V1 => files::keyed(&read("memory.stat")?, "swap"),
            Version::V2 => read("memory.swap.current")?.trim().parse().ok(),
        }
    }
}
