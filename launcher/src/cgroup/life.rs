//! Stopping, thawing and ending all that lives in a container's groups, and removing them.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::group::Group;
use super::layout::Version;
use super::{CgroupError, files, remove_dir};

/// How long the removal of a group waits for its last task to be buried.
const PATIENCE: Duration = Duration::from_secs(2);
/// v1 has no atomic kill: a fork can slip between list and signal so many times.
const KILL_ROUNDS: usize = 20;

impl Group {
    /// Asks that every process stop where it is. They stop within microseconds; [`Group::is_frozen`] tells.
    ///
    /// # Errors
    /// The system's, or when there is no freezer.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        self.set_frozen(true)
    }

    /// Lets every process go on.
    ///
    /// # Errors
    /// The system's, or when there is no freezer.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        self.set_frozen(false)
    }

    fn set_frozen(&self, frozen: bool) -> Result<(), CgroupError> {
        let directory = self.directory(self.roles.unified.or(self.roles.freezer), "freezer")?;
        let (file, value) = match (directory.version, frozen) {
            (Version::V2, true) => ("cgroup.freeze", "1"),
            (Version::V2, false) => ("cgroup.freeze", "0"),
            (Version::V1, true) => ("freezer.state", "FROZEN"),
            (Version::V1, false) => ("freezer.state", "THAWED"),
        };
        directory.run("freeze or thaw", |fd| files::write(fd, file, value))?;
        let mut sleep = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        match (frozen, sleep.since) {
            (true, None) => sleep.since = Some(Instant::now()),
            (false, Some(since)) => {
                sleep.before += since.elapsed();
                sleep.since = None;
            }
            _ => {}
        }
        Ok(())
    }

    /// A process that waits in the kernel where no signal ends the wait (state `D`): its pid, its program, and where in the kernel
    /// it is, in words, if that can be told.
    pub fn uninterruptible(&self) -> Option<(i32, String, String)> {
        let directory = self.directory(self.roles.unified.or(self.roles.freezer), "freezer").ok()?;
        let processes = directory.run("list processes", files::processes).ok()?;
        processes.into_iter().find_map(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let (before, after) = stat.rsplit_once(')')?;
            after.trim_start().starts_with('D').then_some(())?;
            let program = before.split_once('(').map_or(String::new(), |(_, program)| program.to_owned());
            let place = std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
            let place = if place.len() > 1 { format!(" ({place})") } else { String::new() };
            Some((pid, program, place))
        })
    }

    /// For how long it was frozen through this value, and whether it is now; costs no system call.
    pub fn slept(&self) -> (Duration, bool) {
        let sleep = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        let now = sleep.since.map_or(Duration::ZERO, |since| since.elapsed());
        (sleep.before + now, sleep.since.is_some())
    }

    /// Whether every process has stopped.
    ///
    /// # Errors
    /// The system's, or when there is no freezer.
    pub fn is_frozen(&self) -> Result<bool, CgroupError> {
        let directory = self.directory(self.roles.unified.or(self.roles.freezer), "freezer")?;
        directory.run("read the freezer's state", |fd| match directory.version {
            Version::V2 => Ok(files::keyed(&files::read(fd, "cgroup.events")?, "frozen") == Some(1)),
            Version::V1 => Ok(files::read(fd, "freezer.state")?.trim() == "FROZEN"),
        })
    }

    /// Sends SIGKILL to every process, frozen or not.
    ///
    /// # Errors
    /// The system's. A group that is gone is no error.
    pub fn kill(&self) -> Result<(), CgroupError> {
        self.kill_all().or_else(|error| if error.is_gone() { Ok(()) } else { Err(error) })
    }

    fn kill_all(&self) -> Result<(), CgroupError> {
        if let Some(directory) = self.roles.unified.map(|index| &self.directories[index])
            && directory.run("kill", |fd| files::write_if_there(fd, "cgroup.kill", "1"))?
        {
            return Ok(());
        }
        for _ in 0..KILL_ROUNDS {
            // Best effort: without a freezer the rounds alone must win the race against forks.
            let _ = self.freeze();
            let mut left = false;
            for directory in &self.directories {
                let processes = match directory.run("list processes", files::processes) {
                    Err(error) if error.is_gone() => continue,
                    listed => listed?,
                };
                for pid in processes {
                    left = true;
                    if let Some(pid) = Pid::from_raw(pid) {
                        let _ = kill_process(pid, Signal::KILL);
                    }
                }
            }
            let _ = self.thaw();
            if !left {
                break;
            }
        }
        Ok(())
    }

    /// Whether a process is left.
    ///
    /// # Errors
    /// The system's; a group that is gone has none.
    pub fn populated(&self) -> Result<bool, CgroupError> {
        self.has_tasks().or_else(|error| if error.is_gone() { Ok(false) } else { Err(error) })
    }

    fn has_tasks(&self) -> Result<bool, CgroupError> {
        if let Some(directory) = self.roles.unified.map(|index| &self.directories[index]) {
            let text = directory.run("read cgroup.events", |fd| files::read(fd, "cgroup.events"))?;
            return Ok(files::keyed(&text, "populated") == Some(1));
        }
        for directory in &self.directories {
            if !directory.run("list processes", files::processes)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Removes the groups, killing what is left and waiting for it with growing pauses, for 2 s at most.
    ///
    /// # Errors
    /// [`CgroupError::Stuck`]: what would not go is in quarantine and is tried again by the next sweep.
    pub async fn remove(self) -> Result<(), CgroupError> {
        let mut stuck = Vec::new();
        let mut patience = PATIENCE;
        for directory in &self.directories {
            if std::fs::remove_dir(&directory.path).is_ok() {
                continue;
            }
            if let Err(error) = self.kill() {
                tracing::debug!(group = self.name, %error, "killing what is left in a cgroup");
            }
            if !remove_dir(&directory.path, patience).await {
                stuck.push(directory.path.clone());
                patience = Duration::ZERO;
            }
        }
        if stuck.is_empty() {
            return Ok(());
        }
        self.quarantine.lock().unwrap_or_else(PoisonError::into_inner).extend(stuck.iter().cloned());
        Err(CgroupError::Stuck(stuck))
    }

    /// Removes groups in which no process has ever been.
    pub(super) fn remove_now(&self) {
        for directory in &self.directories {
            if let Err(error) = std::fs::remove_dir(&directory.path) {
                tracing::warn!(path = %directory.path.display(), %error, "an empty cgroup would not be removed");
            }
        }
    }
}
