//! The way of a container's first process from clone to exec. The order is the security argument: read it as one.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::OFlags;

use super::exec::{self, Program};
use super::mount;
use super::plan::{Plan, StepError};
use super::report::Reporter;
use super::root::{self, Root, Staging};
use super::seccomp::Filters;
use super::step::{About, Failure, Steps};
use super::{files, kernelfs, process, sys, user, volumes};

/// What the child got from its parent, by inheritance.
pub(super) struct Inheritance<'a> {
    pub(super) plan: &'a Plan,
    /// Detached, id-mapped, read-only; lowest first.
    pub(super) layers: Vec<OwnedFd>,
    /// The detached file for `/etc/hosts`.
    pub(super) hosts: Option<OwnedFd>,
    /// The detached directory of [`super::plan::PlanFds::upper`].
    pub(super) upper: Option<OwnedFd>,
    /// See [`super::plan::PlanFds::gate`].
    pub(super) gate: Option<OwnedFd>,
    pub(super) cgroup_tasks: Vec<OwnedFd>,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
    pub(super) userns: OwnedFd,
    pub(super) filters: &'static Filters,
    /// Whether the launcher, and so far the child, is protected from the out-of-memory killer.
    pub(super) protected: bool,
}

/// Makes the container around this process and becomes the app. Returns only the failure.
pub(super) fn become_container(
    given: Inheritance<'_>,
    reporter: &Reporter,
    mut steps: Steps<'_>,
) -> StepError {
    match prepare(given, reporter, &mut steps) {
        Ok(program) => match steps.fail_on_purpose("exec", false) {
            Ok(()) => program.exec().at("exec"),
            Err(error) => error,
        },
        Err(error) => error,
    }
}

fn prepare(given: Inheritance<'_>, reporter: &Reporter, steps: &mut Steps<'_>) -> Result<Program, StepError> {
    let plan = given.plan;

    // Ours alone first: die with the spawner, hold none of its descriptors, be counted and limited.
    steps.run("die with parent", process::die_with_parent)?;
    let kept = given.descriptors(reporter);
    steps.run("close inherited descriptors", || Ok(sys::close_all_except(&kept)?))?;
    steps.run("join cgroups", || process::join_cgroups(&given.cgroup_tasks))?;
    steps.run("unshare cgroup namespace", process::unshare_cgroup)?;
    steps.run("new session", process::new_session)?;
    steps.run("reset oom score", || process::reset_oom_score(given.protected))?;

    // The root, put together where only this mount namespace sees it.
    steps.run("make mounts private", root::make_mounts_private)?;
    let volumes = steps.run("open volumes", || volumes::open(plan, given.userns.as_fd()))?;
    let mut staging = steps.run("mount staging", || Staging::mount(plan))?;
    if let Some(upper) = &given.upper {
        steps.run("attach upper layer", || staging.attach_upper(upper.as_fd()))?;
    }
    steps.run("attach layers", || staging.attach_layers(&given.layers))?;
    steps.run("provide files", || {
        files::provide(staging.upper()?.as_fd(), &given.layers, plan, given.hosts.is_some())
    })?;
    let root = steps.run("mount overlay", || staging.mount_overlay(given.layers.len()))?;
    let points = steps.run("check image directories", || root.standard_directories())?;
    let account = steps.run("look up user", || user::look_up(&root, &plan.user))?;

    // Network settings go through the host's /proc, so before ours; after this nothing of the host is needed.
    steps.run("write sysctls", process::write_sysctls)?;
    steps.run("loopback up", process::loopback_up)?;

    if let Some(hosts) = &given.hosts {
        steps.run("mount hosts", || mount_hosts(&root, hosts.as_fd()))?;
    }

    // The tenant's directories, then the kernel's file systems on the places that were checked before.
    steps.run("mount volumes", || volumes::attach(&root, plan, &volumes))?;
    steps.run("mount proc", || kernelfs::mount_proc(points.proc.as_fd()))?;
    let dev = steps.run("mount dev", || kernelfs::mount_dev(&staging, points.dev.as_fd(), plan.id_base))?;
    steps.run("mount devpts", || kernelfs::mount_devpts(dev.as_fd(), plan.id_base))?;
    steps.run("mount shm", || kernelfs::mount_shm(dev.as_fd(), plan))?;
    steps.run("mount sys", || kernelfs::mount_sys(&staging, points.sys.as_fd()))?;
    steps.run("pivot root", || root.pivot())?;

    // The process.
    steps.run("set hostname", || process::set_hostname(plan))?;
    steps.run("set limits", || process::set_limits(plan))?;
    steps.run("new keyring", process::new_keyring)?;
    steps.run("connect output", || {
        process::connect_output(given.stdout.as_fd(), given.stderr.as_fd(), plan, &account)
    })?;

    // Power goes, in the order in which each part can still be given up.
    steps.run("enter user namespace", || process::enter_user_namespace(given.userns.as_fd()))?;
    steps.run("limit capabilities", || process::limit_capabilities(&account))?;
    steps.run("become user", || process::become_user(&account))?;
    steps.run("drop capabilities", || process::drop_capabilities(&account))?;
    steps.run("no new privileges", process::no_new_privileges)?;
    steps.run("enter workdir", || exec::enter_workdir(plan))?;
    let program = steps.run("prepare exec", || Program::new(plan, &account))?;
    if let Some(gate) = &given.gate {
        steps.run("wait for network", || process::wait_for(gate.as_fd()))?;
    }
    let listener = steps.run("install seccomp", || given.filters.install())?;

    // Nothing comes after the filter but telling, and exec.
    steps.run("report listener", || reporter.listener(listener))?;
    steps.fail_on_purpose("report timings", false)?;
    reporter.execed(steps.timings()).map_err(|failure| failure.at("report timings"))?;
    Ok(program)
}

impl Inheritance<'_> {
    /// Before anything is opened or dropped: until then all descriptors are the parent's as well.
    pub(super) fn own(&self, reporter: &Reporter) -> Result<(), Failure> {
        let last = self.descriptors(reporter).into_iter().max().unwrap_or(2);
        Ok(sys::own_descriptors(last)?)
    }

    fn descriptors(&self, reporter: &Reporter) -> Vec<RawFd> {
        let lists = [&self.layers, &self.cgroup_tasks];
        let mut all: Vec<RawFd> = lists.into_iter().flatten().map(AsRawFd::as_raw_fd).collect();
        let single = [self.stdout.as_fd(), self.stderr.as_fd(), self.userns.as_fd(), reporter.as_fd()];
        all.extend(single.iter().map(AsRawFd::as_raw_fd));
        all.extend([&self.hosts, &self.gate, &self.upper].into_iter().flatten().map(AsRawFd::as_raw_fd));
        all
    }
}

/// The place was made by [`files::provide`], so it is no link of the image's.
fn mount_hosts(root: &Root, hosts: BorrowedFd<'_>) -> Result<(), Failure> {
    let place = root.resolve("/etc/hosts", OFlags::PATH | OFlags::NOFOLLOW).about("/etc/hosts")?;
    mount::attach(hosts, place.as_fd()).about("/etc/hosts")
}
