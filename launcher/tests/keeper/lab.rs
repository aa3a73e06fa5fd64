//! A laboratory: a keeper with its spawner, cgroups, and an image with busybox in it.

use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use launcher::cgroup::{Cgroups, Group, Limits};
use launcher::image::{ImageStore, Options};
use launcher::keeper::{Created, Exit, Found, Keeper, KeeperError, KeeperEvent, Listening};
use launcher::network::{NetNs, NetSockets};
use launcher::sandbox::{ContainerId, Plan, PlanFds};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;

/// Nothing here takes as long.
pub const PATIENCE: Duration = Duration::from_secs(20);
const ID_BASE: u32 = 1_835_008;

pub struct Lab {
    pub dir: TempDir,
    pub keeper: Keeper,
    pub events: mpsc::UnboundedReceiver<KeeperEvent>,
    pub found: Vec<Found>,
    pub spawner: u32,
    pub name: String,
    pub cgroups: Cgroups,
    pub netns: NetNs,
    images: ImageStore,
    _guard: Guard,
}

/// A test that fails leaves nothing behind either.
struct Guard {
    keeper: Keeper,
    cgroups: Cgroups,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let (keeper, cgroups) = (self.keeper.clone(), self.cgroups.clone());
            let cleaning = std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    cgroups.sweep(&[]).await;
                    let _ = cgroups.remove_parent().await;
                });
                drop(keeper);
            });
            let _ = cleaning.join();
        }
    }
}

/// A container as the daemon holds it.
pub struct Running {
    pub id: ContainerId,
    pub created: Created,
    pub group: Group,
    pub sockets: Option<NetSockets>,
    /// Held open: a program whose output nobody reads would be killed by SIGPIPE.
    pub _output: OwnedFd,
}

impl Lab {
    pub async fn new() -> Lab {
        let dir = TempDir::new().unwrap();
        let bin = dir.path().join("image/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::create_dir_all(dir.path().join("image/www")).unwrap();
        fs::create_dir_all(dir.path().join("staging")).unwrap();
        fs::write(dir.path().join("image/www/index.html"), "hello from inside\n").unwrap();
        fs::copy("/bin/busybox", bin.join("busybox")).expect("busybox-static is installed");
        for name in ["sh", "httpd", "sleep", "false", "ls"] {
            symlink("busybox", bin.join(name)).unwrap();
        }
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("fc-keeper-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        Lab::connect(dir, name).await
    }

    /// A daemon starts: with the state that an earlier one left, if there is any.
    pub async fn connect(dir: TempDir, name: String) -> Lab {
        let exe = Path::new(env!("CARGO_BIN_EXE_fastcontainer-launcher"));
        let started = Keeper::start(dir.path(), exe).await.expect("run as root");
        let cgroups = Cgroups::detect(&name).unwrap();
        Lab {
            _guard: Guard { keeper: started.keeper.clone(), cgroups: cgroups.clone() },
            images: ImageStore::new(
                &dir.path().join("images"),
                Options::new("/nonexistent".into(), dir.path().join("fetch")),
            )
            .unwrap(),
            cgroups,
            netns: NetNs::new(),
            keeper: started.keeper,
            events: started.events,
            found: started.present,
            spawner: started.spawner_pid,
            dir,
            name,
        }
    }

    /// Loses the daemon, keeps what is on disk.
    pub async fn lose_daemon(self) -> (TempDir, String) {
        (self.dir, self.name)
    }

    pub fn plan(&self, generation: u64, script: &str) -> Plan {
        Plan {
            id: ContainerId { app: "lab".to_owned(), generation },
            hostname: "lab".to_owned(),
            argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec!["PATH=/bin".to_owned()],
            workdir: "/".to_owned(),
            user: String::new(),
            port: Some(80),
            id_base: ID_BASE,
            upper_bytes: 16 << 20,
            shm_bytes: 1 << 20,
            nofile: 256,
            datapool: None,
            volumes: Vec::new(),
            note: String::new(),
            network: None,
            staging: self.dir.path().join("staging").to_str().unwrap().to_owned(),
            fault: None,
        }
    }

    pub async fn create(&self, plan: Plan) -> Running {
        self.try_create(plan).await.map_err(|(error, _)| error).unwrap()
    }

    /// What fails leaves its cgroup to the caller.
    pub async fn try_create(&self, plan: Plan) -> Result<Running, (KeeperError, Group)> {
        let id = plan.id.clone();
        let group = self.cgroups.create(&id, &Limits { memory: Some(128 << 20), pids: Some(64) }).unwrap();
        let (fds, output) = self.fds(&group).await;
        let created = match self.keeper.create(plan, fds).await {
            Ok(created) => created,
            Err(error) => return Err((error, group)),
        };
        // One that ends at once has no network any more.
        let sockets = self.netns.open(created.pidfd.as_fd().try_clone_to_owned().unwrap()).await.ok();
        Ok(Running { id, created, group, sockets, _output: output })
    }

    pub async fn fds(&self, group: &Group) -> (PlanFds, OwnedFd) {
        let (output, stdout) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let image = format!("dir:{}", self.dir.path().join("image").display());
        let layers = self.images.resolve(&image).await.unwrap().fds;
        let (cgroup_tasks, cgroup_dir) = group.join_fds().unwrap();
        let stderr = stdout.try_clone().unwrap();
        (
            PlanFds {
                layers,
                cgroup_tasks,
                cgroup_dir,
                hosts: None,
                gate: None,
                upper: None,
                stdout,
                stderr,
                outputs: Vec::new(),
            },
            output,
        )
    }

    pub async fn event(&mut self) -> KeeperEvent {
        tokio::time::timeout(PATIENCE, self.events.recv()).await.expect("an event in time").expect("a keeper")
    }

    pub async fn listening(&mut self, wanted: &ContainerId) -> Listening {
        loop {
            match self.event().await {
                KeeperEvent::Listening { id, listening } if id == *wanted => return listening,
                KeeperEvent::Exited { id, exit } if id == *wanted => panic!("exited: {exit:?}"),
                KeeperEvent::Failed { error, .. } => panic!("{error}"),
                _ => {}
            }
        }
    }

    pub async fn exited(&mut self, wanted: &ContainerId) -> Exit {
        loop {
            if let KeeperEvent::Exited { id, exit } = self.event().await
                && id == *wanted
            {
                return exit;
            }
        }
    }

    /// Kills a container, waits for its end and removes what it had.
    pub async fn end(&mut self, running: Running) -> Exit {
        self.keeper.kill(&running.id, 9);
        let exit = self.exited(&running.id).await;
        running.group.remove().await.unwrap();
        exit
    }

    /// Ends everything and looks whether anything is left.
    pub async fn close(self) {
        self.keeper.shutdown().await;
        assert!(!is_running(self.spawner), "the spawner has ended");
        assert!(!self.dir.path().join("spawner.sock").exists());
        self.cgroups.sweep(&[]).await;
        self.cgroups.remove_parent().await.unwrap();
    }
}

impl Running {
    pub async fn get(&self, port: u16) -> String {
        let socket = self.sockets.as_ref().unwrap().take(1).await.unwrap().pop().unwrap();
        let socket = tokio::net::TcpSocket::from_std_stream(socket.into());
        let mut stream = socket.connect(([127, 0, 0, 1], port).into()).await.unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }
}

/// Open descriptors of a process.
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Children of a process.
pub fn children(pid: u32) -> usize {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap().split_whitespace().count()
}

/// Lines of this mount namespace.
pub fn mounts() -> usize {
    fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count()
}

/// Whether a process is there and does not only wait to be buried.
pub fn is_running(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(" Z "))
}

/// Waits until something is so.
pub async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + PATIENCE;
    while !is_so() {
        assert!(tokio::time::Instant::now() < end, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
