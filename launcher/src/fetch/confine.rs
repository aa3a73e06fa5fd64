//! Giving up every privilege.

use std::io;

use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use super::Order;

/// Address space, bytes: for buffers, TLS and `git`, not for whatever a server would like to have kept.
const MEMORY: u64 = 4 << 30;
const FILES: u64 = 256;

/// Becomes the order's user in the working directory that was given, with bounded appetite, for good.
///
/// Must be called before any thread that does work exists.
pub(super) fn become_nobody(order: &Order) -> io::Result<()> {
    for (resource, most) in [
        (Resource::RLIMIT_FSIZE, order.bytes.max(1 << 20)),
        (Resource::RLIMIT_AS, MEMORY),
        (Resource::RLIMIT_NOFILE, FILES),
        (Resource::RLIMIT_CORE, 0),
    ] {
        setrlimit(resource, most, most)?;
    }
    let (uid, gid) = (Uid::from_raw(order.uid), Gid::from_raw(order.gid));
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    nix::sys::prctl::set_no_new_privs()?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    Ok(())
}
