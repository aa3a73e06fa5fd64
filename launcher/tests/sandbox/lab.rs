//! A laboratory for containers: makes images, runs containers to their end, and keeps everything that they said.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use launcher::sandbox::{
    ContainerId, Plan, PlanFds, Report, Started, StepError, StepTiming, UserNs, VolumePlan, start,
};
use rustix::event::{PollFd, PollFlags, poll};
use tempfile::TempDir;

/// The ids of the laboratory's containers begin here.
pub const ID_BASE: u32 = 1_900_544;

/// No container of these tests has reason to live longer.
const PATIENCE: Duration = Duration::from_secs(20);

/// An image with busybox, the probe (this very test program, see `probe.rs`) and a few accounts.
pub struct Image {
    pub dir: TempDir,
}

impl Image {
    pub fn new() -> Image {
        let image = Image::bare();
        let root = image.path();
        for directory in ["bin", "etc", "lib64", "var/www", "usr/bin"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
        for name in
            ["sh", "cat", "ls", "id", "touch", "mkdir", "mount", "mknod", "nc", "sleep", "readlink", "stat"]
        {
            symlink("busybox", root.join("bin").join(name)).unwrap();
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/sh\n")
            .unwrap();
        fs::write(root.join("etc/group"), "root:x:0:\nwww-data:x:33:\ncerts:x:101:www-data\n").unwrap();
        image.add_probe();
        image
    }

    /// An image with nothing in it.
    pub fn bare() -> Image {
        let dir = TempDir::new().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Image { dir }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Copies this program and the libraries that it has loaded.
    fn add_probe(&self) {
        fs::copy("/proc/self/exe", self.path().join("bin/probe")).unwrap();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let mut libraries: Vec<&str> =
            maps.lines().filter_map(|line| line.split_whitespace().nth(5)).collect();
        libraries.retain(|path| path.contains(".so"));
        libraries.dedup();
        for library in libraries {
            let name = Path::new(library).file_name().unwrap();
            let place =
                if name.to_str().unwrap().starts_with("ld-") { "lib64" } else { "lib/x86_64-linux-gnu" };
            fs::create_dir_all(self.path().join(place)).unwrap();
            fs::copy(library, self.path().join(place).join(name)).unwrap();
        }
    }

    /// Every path of the image with its kind, size, owner and mode: what must not change.
    pub fn fingerprint(&self) -> BTreeMap<PathBuf, String> {
        fingerprint(self.path())
    }
}

/// Every path beneath a directory with its kind, size, owner, mode and link target.
pub fn fingerprint(root: &Path) -> BTreeMap<PathBuf, String> {
    use std::os::unix::fs::MetadataExt;
    let mut all = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        let link = fs::read_link(&path).unwrap_or_default();
        let about = format!("{:o} {} {} {} {link:?}", meta.mode(), meta.uid(), meta.gid(), meta.size());
        all.insert(path, about);
    }
    all
}

/// What a container left behind.
#[derive(Debug, Default)]
pub struct Outcome {
    pub stdout: String,
    pub stderr: String,
    /// The failure of a step, if the app was never started.
    pub error: Option<StepError>,
    pub timings: Vec<StepTiming>,
    /// The wait status's exit code; -1 if killed.
    pub code: i32,
    /// How many `listen()` calls were announced.
    pub listens: usize,
    pub no_notify: bool,
    /// From `start` to the end of the report socket, which is exec.
    pub to_exec: Duration,
}

impl Outcome {
    /// The first line of standard output that begins with `key=`, without that.
    pub fn value(&self, key: &str) -> &str {
        let line = self.stdout.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_else(|| panic!("no line {key}= in {self:#?}"))
    }

    /// The step and error number that stopped the creation.
    pub fn failed_at(&self) -> (&str, i32) {
        let error = self.error.as_ref().unwrap_or_else(|| panic!("nothing failed: {self:#?}"));
        (&error.step, error.errno)
    }
}

/// A container to be made.
pub struct Container {
    pub plan: Plan,
    layers: Vec<PathBuf>,
    pub cgroup_tasks: Vec<PathBuf>,
    pub cgroup_dir: Option<PathBuf>,
    staging: TempDir,
}

impl Container {
    pub fn new(image: &Image, argv: &[&str]) -> Container {
        let staging = TempDir::new().unwrap();
        let plan = Plan {
            id: ContainerId { app: "lab".to_owned(), generation: 1 },
            hostname: "lab-1".to_owned(),
            argv: argv.iter().map(|argument| (*argument).to_owned()).collect(),
            env: vec!["PATH=/bin:/usr/bin".to_owned()],
            workdir: "/".to_owned(),
            user: String::new(),
            port: None,
            id_base: ID_BASE,
            upper_bytes: 16 << 20,
            shm_bytes: 4 << 20,
            nofile: 256,
            datapool: Some("/".to_owned()),
            volumes: Vec::new(),
            note: String::new(),
            network: None,
            staging: staging.path().to_str().unwrap().to_owned(),
            fault: None,
        };
        let layers = vec![image.path().to_owned()];
        Container { plan, layers, cgroup_tasks: Vec::new(), cgroup_dir: None, staging }
    }

    pub fn shell(image: &Image, script: &str) -> Container {
        Container::new(image, &["sh", "-c", script])
    }

    pub fn user(mut self, user: &str) -> Container {
        user.clone_into(&mut self.plan.user);
        self
    }

    /// Puts an image above the others.
    pub fn layer(mut self, image: &Image) -> Container {
        self.layers.push(image.path().to_owned());
        self
    }

    pub fn volume(mut self, source: &Path, target: &str, read_only: bool) -> Container {
        let source = source.strip_prefix("/").unwrap().to_str().unwrap().to_owned();
        self.plan.volumes.push(VolumePlan { source, quota: None, target: target.to_owned(), read_only });
        self
    }

    /// The descriptors of the plan, with output to these two.
    pub fn fds(&self, stdout: OwnedFd, stderr: OwnedFd) -> PlanFds {
        PlanFds {
            layers: self.layers.iter().map(|path| directory(path)).collect(),
            cgroup_tasks: self.cgroup_tasks.iter().map(|path| writable(path)).collect(),
            cgroup_dir: self.cgroup_dir.as_deref().map(directory),
            hosts: None,
            gate: None,
            upper: None,
            stdout,
            stderr,
            outputs: Vec::new(),
        }
    }

    /// Starts it, answers its `listen()` calls, and waits for its end.
    pub fn run(&self) -> Outcome {
        self.run_in(&UserNs::new(ID_BASE).unwrap())
    }

    pub fn run_in(&self, userns: &UserNs) -> Outcome {
        let (stdout, stdout_end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let (stderr, stderr_end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let fds = self.fds(stdout_end, stderr_end);
        let began = Instant::now();
        let started = match start(&self.plan, fds, userns) {
            Ok(started) => started,
            Err(error) => return Outcome { error: Some(error), ..Outcome::default() },
        };
        let outcome = watch(began, started, stdout, stderr);
        assert!(
            fs::read_dir(self.staging.path()).unwrap().next().is_none(),
            "the staging directory stays empty"
        );
        outcome
    }
}

/// Follows a container to its end, in one thread.
fn watch(began: Instant, started: Started, out: OwnedFd, err: OwnedFd) -> Outcome {
    let Started { pidfd, report, lent, .. } = started;
    let mut lent = Some(lent);
    let mut outcome = Outcome::default();
    let mut report = Some(report);
    let mut listener: Option<OwnedFd> = None;
    let mut streams = [Some(File::from(out)), Some(File::from(err))];
    let mut texts = [Vec::new(), Vec::new()];
    while report.is_some() || streams.iter().any(Option::is_some) {
        if began.elapsed() > PATIENCE {
            rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL).unwrap();
        }
        let sources = [report.as_ref().map(AsFd::as_fd), listener.as_ref().map(AsFd::as_fd)];
        let sources =
            sources.into_iter().chain(streams.iter().map(|stream| stream.as_ref().map(AsFd::as_fd)));
        let sources: Vec<Option<BorrowedFd<'_>>> = sources.collect();
        let ready = wait_for(&sources);
        if ready[0] {
            drop(lent.take());
            match Report::recv(report.as_ref().unwrap().as_fd()).unwrap() {
                Some(Report::Notify(fd)) => listener = Some(fd),
                Some(Report::NoNotify) => outcome.no_notify = true,
                Some(Report::Failed(error)) => outcome.error = Some(error),
                Some(Report::Execed { timings }) => outcome.timings = timings,
                None => {
                    outcome.to_exec = began.elapsed();
                    report = None;
                }
            }
        }
        if ready[1] {
            if crate::notify::answer(listener.as_ref().unwrap().as_fd()) {
                outcome.listens += 1;
            } else {
                listener = None; // the container has ended
            }
        }
        for (index, stream) in streams.iter_mut().enumerate().filter(|(index, _)| ready[index + 2]) {
            let mut bytes = [0; 4096];
            match stream.as_mut().unwrap().read(&mut bytes) {
                Ok(0) => *stream = None,
                Ok(length) => texts[index].extend_from_slice(&bytes[..length]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
    [outcome.stdout, outcome.stderr] = texts.map(|text| String::from_utf8_lossy(&text).into_owned());
    outcome.code = reap(pidfd.as_fd());
    outcome
}

fn wait_for(sources: &[Option<BorrowedFd<'_>>]) -> Vec<bool> {
    let mut polled: Vec<PollFd<'_>> =
        sources.iter().flatten().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
    poll(&mut polled, Some(&second)).unwrap();
    let mut results = polled.iter().map(|fd| !fd.revents().is_empty());
    sources.iter().map(|source| source.is_some() && results.next().unwrap()).collect()
}

fn reap(pidfd: BorrowedFd<'_>) -> i32 {
    use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
    match waitid(Id::PIDFd(pidfd), WaitPidFlag::WEXITED).unwrap() {
        WaitStatus::Exited(_, code) => code,
        _ => -1,
    }
}

/// Opens a directory as the daemon does.
fn directory(path: &Path) -> OwnedFd {
    File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(path).unwrap().into()
}

fn writable(path: &Path) -> OwnedFd {
    let file = File::options().write(true).open(path).unwrap();
    assert!(file.as_raw_fd() > 2);
    file.into()
}
