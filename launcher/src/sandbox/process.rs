//! What belongs to the process rather than to its file system: session, limits, network, identity, privileges.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use capctl::caps::{Cap, CapSet, CapState, ambient, bounding};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::mount::MountAttrFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{DumpableBehavior, Signal};
use rustix::thread::LinkNameSpaceType;

use super::mount;
use super::plan::Plan;
use super::step::{About, Failure};
use super::sys;
use super::user::Account;

/// containerd's set for a container's root: enough to change owners and users inside, as Apache does.
/// Each one counts only in the container's own user namespace.
const ROOT_CAPABILITIES: [Cap; 9] = [
    Cap::CHOWN,
    Cap::DAC_OVERRIDE,
    Cap::FOWNER,
    Cap::FSETID,
    Cap::KILL,
    Cap::SETGID,
    Cap::SETUID,
    Cap::SETPCAP,
    Cap::NET_BIND_SERVICE,
];

const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// Makes sure that a half-made container does not outlive the spawner, who alone would know of it. The kernel
/// forgets this when the ids change, which is when the container becomes the app's.
pub(super) fn die_with_parent() -> Result<(), Failure> {
    Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?)
}

/// Joins the cgroups of v1. A single-threaded process that moves *itself* through `tasks` is moved in 0.1 ms; by
/// anybody else, or through `cgroup.procs`, it takes 7 ms, because the kernel waits for an RCU grace period.
pub(super) fn join_cgroups(tasks: &[OwnedFd]) -> Result<(), Failure> {
    for (index, file) in tasks.iter().enumerate() {
        rustix::io::write(file, b"0").about(format!("tasks file {index}"))?;
    }
    Ok(())
}

/// Makes the cgroups joined above the root of the container's view. After joining, not by the clone: a cgroup
/// namespace is rooted where its maker is.
pub(super) fn unshare_cgroup() -> Result<(), Failure> {
    Ok(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWCGROUP)?)
}

/// A session without terminal; plain signals. Files are created with the modes that are asked for.
pub(super) fn new_session() -> Result<(), Failure> {
    rustix::process::setsid().about("setsid")?;
    sys::reset_signals().about("signals")?;
    rustix::process::umask(Mode::empty());
    Ok(())
}

/// Whether this launcher is protected from the out-of-memory killer. Asked by the parent, whose entry in `/proc` is
/// warm: a new process's costs 0.05 ms.
pub(super) fn is_protected_from_oom() -> Result<bool, Failure> {
    Ok(std::fs::read_to_string(OOM_SCORE).about(OOM_SCORE)?.trim_start().starts_with('-'))
}

/// A tenant is not protected, whatever the launcher is.
pub(super) fn reset_oom_score(protected: bool) -> Result<(), Failure> {
    if protected { std::fs::write(OOM_SCORE, "0").about(OOM_SCORE) } else { Ok(()) }
}

/// Lets programs without privileges bind ports below 1024: the network namespace is not owned by the container's
/// user namespace, so no capability of the container would. Written through a `/proc` that nobody else sees: in the
/// host's the kernel keeps a setting of every network namespace under one name, and goes through all of them.
pub(super) fn write_sysctls() -> Result<(), Failure> {
    let path = "sys/net/ipv4/ip_unprivileged_port_start";
    let proc = mount::new_file_system("proc", &[], MountAttrFlags::empty())?;
    let file =
        rustix::fs::openat(&proc, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).about(path)?;
    rustix::io::write(&file, b"0").about(path)?;
    Ok(())
}

/// Loopback is the only network that a container begins with.
pub(super) fn loopback_up() -> Result<(), Failure> {
    let flags = SocketFlags::CLOEXEC;
    let socket =
        rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None).about("socket")?;
    sys::interface_up(socket.as_fd(), c"lo").about("lo")
}

/// Waits for one byte; the other end closes without one when it never will come.
pub(super) fn wait_for(gate: BorrowedFd<'_>) -> Result<(), Failure> {
    let mut byte = [0; 1];
    match rustix::io::retry_on_intr(|| rustix::io::read(gate, &mut byte)).about("gate")? {
        0 => Err(Failure::new(libc::ECANCELED, "the launcher has not made it")),
        _ => Ok(()),
    }
}

/// The name that `hostname` prints.
pub(super) fn set_hostname(plan: &Plan) -> Result<(), Failure> {
    rustix::system::sethostname(plan.hostname.as_bytes()).about(&plan.hostname)
}

/// No core dumps; the plan's number of open files, or as many as this launcher may give.
pub(super) fn set_limits(plan: &Plan) -> Result<(), Failure> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).about("core")?;
    let wanted = plan.nofile.max(64);
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_err() {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).about("nofile")?;
        let given = wanted.min(most);
        setrlimit(Resource::RLIMIT_NOFILE, given, given).about(format!("nofile {given}"))?;
    }
    Ok(())
}

/// Keys of the launcher's session are nobody's business inside.
pub(super) fn new_keyring() -> Result<(), Failure> {
    Ok(sys::new_session_keyring()?)
}

/// Nothing to read; output to the daemon. The pipes are given to the app's user, so that `/dev/stderr` can be opened.
pub(super) fn connect_output(
    stdout: BorrowedFd<'_>,
    stderr: BorrowedFd<'_>,
    plan: &Plan,
    account: &Account,
) -> Result<(), Failure> {
    let null =
        rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).about("/dev/null")?;
    nix::unistd::dup2_stdin(&null).about("stdin")?;
    for pipe in [stdout, stderr] {
        let (user, group) =
            (Uid::from_raw(plan.id_base + account.uid), Gid::from_raw(plan.id_base + account.gid));
        rustix::fs::fchown(pipe, Some(user), Some(group)).about("fchown")?;
    }
    nix::unistd::dup2_stdout(stdout).about("stdout")?;
    nix::unistd::dup2_stderr(stderr).about("stderr")?;
    Ok(())
}

/// Enters the prepared user namespace, last of all namespaces: its root owns none of the others.
pub(super) fn enter_user_namespace(userns: BorrowedFd<'_>) -> Result<(), Failure> {
    // Not readable by anybody inside while host privileges may still be in this memory (CVE-2016-9962).
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).about("dumpable")?;
    rustix::thread::move_into_link_name_space(userns, Some(LinkNameSpaceType::User)).about("setns")
}

/// Removes from the bounding set what no program inside may ever have. Before the ids change, while it is allowed.
pub(super) fn limit_capabilities(account: &Account) -> Result<(), Failure> {
    let kept = capabilities(account);
    for capability in Cap::iter().filter(|capability| !kept.has(*capability)) {
        match bounding::drop(capability) {
            Err(error) if error.code() == libc::EINVAL => {} // not of this kernel
            other => other.about(format!("drop {capability}"))?,
        }
    }
    bounding::clear_unknown().about("drop unknown ones")
}

/// Becomes the app's user: groups first, while that is allowed.
pub(super) fn become_user(account: &Account) -> Result<(), Failure> {
    let groups: Vec<Gid> = account.groups.iter().map(|group| Gid::from_raw(*group)).collect();
    let (gid, uid) = (Gid::from_raw(account.gid), Uid::from_raw(account.uid));
    rustix::thread::set_thread_groups(&groups).about("setgroups")?;
    rustix::thread::set_thread_res_gid(Some(gid), Some(gid), Some(gid))
        .about(format!("setresgid {}", account.gid))?;
    rustix::thread::set_thread_res_uid(Some(uid), Some(uid), Some(uid))
        .about(format!("setresuid {}", account.uid))
}

/// Keeps what the bounding set allows to root, and nothing for others; nothing is inheritable or ambient.
pub(super) fn drop_capabilities(account: &Account) -> Result<(), Failure> {
    ambient::clear().about("ambient")?;
    let kept = capabilities(account);
    CapState { effective: kept, permitted: kept, inheritable: CapSet::empty() }.set_current().about("capset")
}

/// No program can give more than its caller has: set-user-id bits and file capabilities are void.
pub(super) fn no_new_privileges() -> Result<(), Failure> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

fn capabilities(account: &Account) -> CapSet {
    if account.is_root() { ROOT_CAPABILITIES.into_iter().collect() } else { CapSet::empty() }
}
