//! Becoming nobody in particular.

use anyhow::{Context as _, ensure};
use nix::{
    sys::{prctl, signal::Signal},
    unistd::{self, Gid, Uid},
};

/// Gives up root for good; does nothing when it was never had.
///
/// # Errors
/// The kernel's refusal; then the program must not go on.
pub(crate) fn drop_to(uid: u32, gid: u32) -> anyhow::Result<()> {
    if !unistd::geteuid().is_root() {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    unistd::setgroups(&[gid]).context("the supplementary groups cannot be given up")?;
    unistd::setresgid(gid, gid, gid).context("the group cannot be changed")?;
    unistd::setresuid(uid, uid, uid).context("the user cannot be changed")?;
    prctl::set_no_new_privs().context("no_new_privs cannot be set")?;
    Ok(())
}

/// Has the kernel end this process with the one that started it.
///
/// # Errors
/// The parent has ended already.
pub(crate) fn die_with_parent() -> anyhow::Result<()> {
    let parent = unistd::getppid();
    prctl::set_pdeathsig(Signal::SIGTERM).context("the parent's death cannot be asked for")?;
    ensure!(
        parent.as_raw() > 1 && unistd::getppid() == parent,
        "the process that started this one has ended"
    );
    Ok(())
}
