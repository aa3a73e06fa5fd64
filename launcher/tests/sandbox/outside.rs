//! What a container leaves on the host: nothing.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use launcher::sandbox::{UserNs, start};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::lab::{Container, ID_BASE, Image};

/// Everything of the host that a container could leave changed.
pub fn host() -> (String, BTreeSet<PathBuf>, usize) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let processes = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.ok()?.path().join("ns/net")).ok());
    let networks = processes.collect();
    let descriptors = fs::read_dir("/proc/self/fd").unwrap().count();
    (mounts, networks, descriptors)
}

pub fn nothing_is_left_after_a_container_nor_after_a_failed_one() {
    let image = Image::new();
    let before = host();

    for _ in 0..5 {
        assert_eq!(Container::shell(&image, "touch /x; sleep 0").run().code, 0);
        assert_eq!(Container::new(&image, &["nothing"]).run().code, 125);
        let _ = Container::shell(&image, "").user("stranger").run();
    }

    let (mounts, networks, descriptors) = host();
    assert_eq!(mounts, before.0);
    assert!(networks.is_subset(&before.1), "{networks:?}");
    assert_eq!(descriptors, before.2);
}

pub fn the_hosts_mounts_do_not_appear_inside_later() {
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count();
    let image = Image::new();
    let before = mounts();

    let seen = Container::shell(&image, "busybox wc -l < /proc/self/mountinfo").run();

    assert!(seen.stdout.trim().parse::<usize>().unwrap() < 12, "{seen:#?}");
    assert_eq!(mounts(), before);
}

pub fn cgroups_of_v1_are_joined_and_are_the_root_of_the_view() {
    let Some(group) = Group::new("/sys/fs/cgroup/pids") else { return };
    let image = Image::new();
    let mut container = Container::new(&image, &["probe", "status"]);
    container.cgroup_tasks.push(group.path.join("tasks"));
    fs::write(group.path.join("pids.max"), "5").unwrap();

    let seen = container.run();
    let mut bomb = Container::shell(&image, "for i in 1 2 3 4 5 6 7 8; do sleep 1 & done; wait");
    bomb.cgroup_tasks.push(group.path.join("tasks"));
    let bomb = bomb.run();

    assert!(
        seen.value("cgroup").split(' ').any(|line| line.ends_with(":pids:/")),
        "{}",
        seen.value("cgroup")
    );
    assert!(bomb.stderr.contains("fork"), "{bomb:#?}");
}

pub fn a_cgroup_of_v2_is_entered_by_the_clone_itself() {
    let unified = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .into_iter()
        .find(|root| Path::new(root).join("cgroup.procs").exists());
    let Some(group) = unified.and_then(Group::new) else { return };
    let image = Image::new();
    let mut container = Container::new(&image, &["probe", "status"]);
    container.cgroup_dir = Some(group.path.clone());

    let seen = container.run();

    assert!(seen.value("cgroup").split(' ').any(|line| line == "0::/"), "{}", seen.value("cgroup"));
}

/// A cgroup of this test's own; removing it must succeed, or the container has left something in it.
pub struct Group {
    pub path: PathBuf,
}

impl Group {
    /// `None`, and a word about it, where the hierarchy does not exist.
    pub fn new(hierarchy: &str) -> Option<Group> {
        let path = Path::new(hierarchy).join(format!("sandbox-test-{}", std::process::id()));
        match fs::create_dir(&path) {
            Ok(()) => Some(Group { path }),
            Err(error) => {
                println!("not tested here: {hierarchy}: {error}");
                None
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        fs::remove_dir(&self.path).expect("the cgroup is empty");
    }
}

pub fn a_spawner_with_many_descriptors_makes_containers_with_few() {
    let image = Image::new();
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let _held: Vec<File> = (0..3000).map(|_| File::open("/dev/null").unwrap()).collect();
    let mut container = Container::new(&image, &["probe", "status"]);
    container.plan.nofile = 64;

    let seen = container.run();

    assert_eq!((seen.value("fds"), seen.value("nofile")), ("0 1 2 3", "64 64"));
}

pub fn many_containers_share_one_prepared_user_namespace() {
    let image = Image::new();
    let userns = UserNs::new(ID_BASE).unwrap();

    for _ in 0..3 {
        assert_eq!(Container::shell(&image, "id -u").run_in(&userns).stdout, "0\n");
    }
    let unmapped = UserNs::new(0).unwrap_err();

    assert_eq!((unmapped.step.as_str(), unmapped.errno), ("make user namespace", libc::EINVAL));
}

/// Nobody else knows of it: whether the signal comes or the report socket is closed, it must end.
pub fn a_half_made_container_does_not_outlive_its_spawner() {
    let image = Image::new();
    let container = Container::shell(&image, "echo alive");
    let userns = UserNs::new(ID_BASE).unwrap();
    for _ in 0..20 {
        let (mut output, output_end) = std::io::pipe().unwrap();
        let ends = (output_end.try_clone().unwrap().into(), output_end.into());
        // SAFETY: this process has one thread, and the child ends without returning.
        let spawner = match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Parent { child } => child,
            nix::unistd::ForkResult::Child => {
                let started = start(&container.plan, container.fds(ends.0, ends.1), &userns);
                // SAFETY: `_exit` has no precondition.
                unsafe { libc::_exit(i32::from(started.is_err())) }
            }
        };
        drop(ends);
        let status = nix::sys::wait::waitpid(spawner, None).unwrap();
        assert_eq!(status, nix::sys::wait::WaitStatus::Exited(spawner, 0));

        let mut said = String::new();
        output.read_to_string(&mut said).unwrap(); // ends when the container has

        assert_eq!(said, "");
    }
}

/// Inside a sandbox that listens to notifications itself, there can be no second listener.
pub fn where_no_listener_can_be_had_the_container_runs_without() {
    let mut again = Command::new("/proc/self/exe");
    again.arg("beneath_a_listener");
    // SAFETY: between fork and exec only system calls are made.
    unsafe { again.pre_exec(crate::notify::install_listener) };

    let output = again.output().unwrap();

    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The part of the test above that runs beneath the other listener.
pub fn beneath_a_listener() {
    let seen = Container::new(&Image::new(), &["probe", "listen"]).run();
    assert!(seen.no_notify);
    assert_eq!((seen.value("bound"), seen.listens), ("127.0.0.1:80", 0));
}
