//! `fastcontainer-launcher hook-exec`: from a child of the daemon to the operator's program. Gives up everything that the
//! program is not to have, in an order in which each step can still be done, and becomes it.

use std::{fs, io, os::unix::process::CommandExt as _, path::PathBuf, process::Command};

use capctl::caps::bounding;
use nix::{
    sys::{
        prctl,
        resource::{Resource, setrlimit},
        stat::{Mode, umask},
    },
    unistd::{Gid, Uid, setgroups, setresgid, setresuid, setsid},
};

use crate::sandbox;

/// Descriptors that a hook may open.
const NOFILE: u64 = 1024;

/// What to become.
#[derive(Clone, Debug)]
pub struct Exec {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Files of the cgroup to each of which `0` is written, while this process has one thread.
    pub join: Vec<PathBuf>,
    /// Environment.
    pub env: Vec<(String, String)>,
    /// Program, relative to the working directory, and arguments.
    pub argv: Vec<String>,
}

/// Becomes the program; returns only why it cannot.
#[must_use]
pub fn exec(exec: &Exec) -> io::Error {
    match confine(exec) {
        Err(error) => error,
        Ok(()) => {
            let Some((program, arguments)) = exec.argv.split_first() else {
                return io::Error::from(io::ErrorKind::InvalidInput);
            };
            // `./`: what was checked, never what a PATH has.
            Command::new(format!("./{program}"))
                .args(arguments)
                .env_clear()
                .envs(exec.env.iter().cloned())
                .exec()
        }
    }
}

fn confine(exec: &Exec) -> io::Result<()> {
    for file in &exec.join {
        fs::write(file, "0")?;
    }
    setsid()?;
    umask(Mode::from_bits_truncate(0o077));
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    setrlimit(Resource::RLIMIT_NOFILE, NOFILE, NOFILE)?;
    // Whatever the daemon itself was started with.
    sandbox::close_on_exec()?;
    bounding::clear()?;
    setgroups(&[])?;
    let (uid, gid) = (Uid::from_raw(exec.uid), Gid::from_raw(exec.gid));
    setresgid(gid, gid, gid)?;
    // With root's id go all capabilities, and nothing brings them back.
    setresuid(uid, uid, uid)?;
    prctl::set_no_new_privs()?;
    Ok(())
}
