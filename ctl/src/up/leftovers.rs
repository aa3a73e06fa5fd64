//! After the end: what is left of a run, and sweeping it up.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use launcher_client::paths::StateDir;
use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Removes what a clean end leaves (empty cgroups, socket files), with `force` also ends processes of a launcher that
/// was killed; returns what would not go, in words.
pub(crate) async fn sweep(root: &Path, cgroup: &str, force: bool) -> Vec<String> {
    let mut left = Vec::new();
    for attempt in 0..40 {
        let processes = processes(root, cgroup);
        if force {
            for process in &processes {
                let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
            }
        }
        let groups = remove_cgroups(cgroup);
        let mounts = remove_mounts(root, force);
        left = processes
            .iter()
            .map(|process| format!("process {} ({})", process.pid, process.name))
            .chain(groups.iter().map(|path| format!("cgroup {}", path.display())))
            .chain(mounts.iter().map(|path| format!("mount {}", path.display())))
            .collect();
        if left.is_empty() {
            break;
        }
        tracing::debug!(attempt, ?left, "not everything is gone yet");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    if left.is_empty() {
        let dirs = StateDir::new(root);
        for socket in [
            dirs.launcher_socket(),
            dirs.proxy_socket(),
            dirs.api_socket(),
            dirs.launcher().join("spawner.sock"),
        ] {
            if let Err(error) = fs::remove_file(&socket)
                && error.kind() != io::ErrorKind::NotFound
            {
                left.push(format!("socket {} ({error})", socket.display()));
            }
        }
    }
    left
}

struct Process {
    pid: i32,
    name: String,
}

/// Daemons of this state folder, and whatever is in its cgroups.
fn processes(root: &Path, cgroup: &str) -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let listeners = listeners(root);
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(|pid| {
            let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let command_line = read("cmdline");
            let name = command_line.replace('\0', " ").trim().chars().take(80).collect();
            // A zombie has ended; its parent will notice.
            let dead = read("stat").rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'));
            let ours = is_in(&read("cgroup"), cgroup)
                || is_daemon_of(&command_line, root)
                || (is_spawner(&command_line) && holds(pid, &listeners));
            (ours && !dead).then_some(Process { pid, name })
        })
        .collect()
}

/// Whether `/proc/PID/cgroup` names the group or one beneath it.
fn is_in(cgroups: &str, name: &str) -> bool {
    cgroups
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
        .any(|path| path.trim_start_matches('/').split('/').next() == Some(name))
}

/// Whether a command line is one of our daemons (not `up` itself, nor other commands) with this state folder.
fn is_daemon_of(command_line: &str, root: &Path) -> bool {
    let mut args = command_line.split('\0');
    let program = args.next().and_then(|program| program.rsplit('/').next()).unwrap_or_default();
    super::PROGRAMS.contains(&program)
        && args.any(|arg| Path::new(arg.strip_prefix("--state=").unwrap_or(arg)) == root)
}

/// Whether a command line is a launcher's spawner; it does not say of which state folder.
fn is_spawner(command_line: &str) -> bool {
    command_line.trim_end_matches('\0').ends_with("fastcontainer-launcher\0spawner")
}

/// The sockets on which a spawner of this state folder listens, as `/proc/PID/fd` shows them.
fn listeners(root: &Path) -> Vec<PathBuf> {
    let socket = StateDir::new(root).launcher().join("spawner.sock");
    let text = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    text.lines()
        .map(|line| line.split_whitespace().skip(6).collect::<Vec<_>>())
        .filter(|fields| fields.get(1).is_some_and(|path| Path::new(path) == socket))
        .filter_map(|fields| Some(format!("socket:[{}]", fields.first()?).into()))
        .collect()
}

fn holds(pid: i32, sockets: &[PathBuf]) -> bool {
    let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok()).any(|target| sockets.contains(&target))
}

/// Removes our empty cgroups; returns those that are not empty.
fn remove_cgroups(name: &str) -> Vec<PathBuf> {
    let mut stuck = Vec::new();
    for mount in mounts().into_iter().filter(|mount| mount.kind.starts_with("cgroup")) {
        remove_group(&mount.at.join(name), &mut stuck);
    }
    stuck
}

fn remove_group(group: &Path, stuck: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(group) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_group(&entry.path(), stuck);
    }
    if fs::remove_dir(group).is_err() && group.exists() {
        stuck.push(group.to_owned());
    }
}

/// Mounts strictly beneath the state folder; with `force` they are detached.
fn remove_mounts(root: &Path, force: bool) -> Vec<PathBuf> {
    // What the operator has mounted as the DataPool, or in it, is the operator's.
    let pool = root.join("datapool");
    let ours = |at: &PathBuf| at != root && at.starts_with(root) && !at.starts_with(&pool);
    let mut left: Vec<PathBuf> = mounts().into_iter().map(|mount| mount.at).filter(ours).collect();
    if force {
        left.reverse();
        left.retain(|at| umount2(at, MntFlags::MNT_DETACH).is_err());
    }
    left
}

struct Mount {
    at: PathBuf,
    kind: String,
}

fn mounts() -> Vec<Mount> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let (fields, rest) = line.split_once(" - ")?;
            let at = fields.split(' ').nth(4)?.replace("\\040", " ").into();
            Some(Mount { at, kind: rest.split(' ').next()?.to_owned() })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_are_swept() {
        assert!(is_in("7:pids:/fastcontainer/hello.1\n0::/", "fastcontainer"));
        assert!(!is_in("7:pids:/fastcontainer-0123abcd/hello.1\n0::/user.slice", "fastcontainer"));
        let root = Path::new("/srv/state");
        assert!(is_daemon_of("/usr/bin/fastcontainer-launcher\0spawner\0--state\0/srv/state\0", root));
        assert!(!is_daemon_of("/usr/bin/fastcontainer-launcher\0--state\0/srv/other\0", root));
        assert!(!is_daemon_of("/usr/bin/fastcontainer\0up\0--state\0/srv/state\0", root));
    }
}
