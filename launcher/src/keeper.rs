//! The daemon's side of the spawner: starts it or finds it, asks it for containers, hears from it, and replaces it
//! when it dies.
//!
//! One task owns the connection and a table of the containers. It keeps a pidfd and the notify descriptor of each, so
//! that a fresh spawner can take over containers whose maker is gone.

mod actor;
mod link;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use crate::sandbox::{ContainerId, Plan, PlanFds, StepError, StepTiming};
pub use crate::spawner::{Exit, Listening, Present, monotonic_us};

/// Name of the spawner's socket in the launcher's state folder.
pub const SOCKET_NAME: &str = "spawner.sock";

/// The daemon's handle on the spawner; cheap to clone.
#[derive(Clone, Debug)]
pub struct Keeper {
    commands: mpsc::UnboundedSender<Command>,
}

/// What [`Keeper::start`] gives.
#[derive(Debug)]
pub struct Started {
    /// To ask with.
    pub keeper: Keeper,
    /// To hear with. Only what happens after the start; ends when every [`Keeper`] is dropped.
    pub events: mpsc::UnboundedReceiver<KeeperEvent>,
    /// Containers that were already there, running or ended, when the spawner was found.
    pub present: Vec<Found>,
    /// The spawner's process, at the start; a later one has another.
    pub spawner_pid: u32,
}

/// A container that was there before this daemon.
#[derive(Debug)]
pub struct Found {
    /// What the spawner knows of it.
    pub state: Present,
    /// Its first process; `None` when it has ended (then [`Present::exited`] says how).
    pub pidfd: Option<OwnedFd>,
    /// The read ends of its standard output and error.
    pub outputs: Vec<OwnedFd>,
}

/// A container that has just been made: its process and namespaces exist, its program does not run yet.
#[derive(Debug)]
pub struct Created {
    /// Its first process, as the host numbers it.
    pub pid: i32,
    /// The same, free of the reuse of pids. Good for [`crate::network::NetNs::open`] at once.
    pub pidfd: OwnedFd,
    /// When, in microseconds of [`monotonic_us`].
    pub at_us: u64,
}

/// What the spawner tells, in order of time for each container: `Execed` or `Failed`, `Listening`, `Exited`.
/// `Exited` is always the last and always comes for a container that [`Keeper::create`] returned.
#[derive(Debug)]
pub enum KeeperEvent {
    /// The program runs.
    Execed {
        /// Which container.
        id: ContainerId,
        /// How long the steps of its making took.
        timings: Vec<StepTiming>,
        /// Whether `Listening` will be told; otherwise readiness must be probed ([`crate::ready::probe`]).
        notify: bool,
        /// When, in microseconds of [`monotonic_us`].
        at_us: u64,
    },
    /// A step of its making failed. `Exited` follows.
    Failed {
        /// Which container.
        id: ContainerId,
        /// Where and why.
        error: StepError,
    },
    /// The app listens on the wanted port; a connection made now is accepted.
    Listening {
        /// Which container.
        id: ContainerId,
        /// Where and since when.
        listening: Listening,
    },
    /// The first process has ended, and with it the whole container.
    Exited {
        /// Which container.
        id: ContainerId,
        /// How; [`Exit::Unknown`] when its parent died before it.
        exit: Exit,
    },
    /// The spawner died. Its containers live on; a new one is being started.
    SpawnerLost,
    /// A spawner answers again and has taken over the containers.
    SpawnerBack,
}

/// Why the spawner did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// A step failed before there was a process.
    #[error("making container {}.{}: {error}", id.app, id.generation)]
    Step {
        /// Which container.
        id: ContainerId,
        /// Where and why.
        error: StepError,
    },
    /// The spawner died in between: whether the container exists is not known, but nothing will tell of it.
    #[error("the spawner died while it was making container {}.{}", id.app, id.generation)]
    Lost {
        /// Which container.
        id: ContainerId,
    },
    /// The request cannot be put to the spawner.
    #[error("asking the spawner for container {}.{}: {error}", id.app, id.generation)]
    Send {
        /// Which container.
        id: ContainerId,
        /// The system's error, or a plan that is too long.
        error: io::Error,
    },
    /// A container of this name is known already.
    #[error("container {}.{} exists already", id.app, id.generation)]
    Exists {
        /// Which container.
        id: ContainerId,
    },
    /// The keeper's task has ended.
    #[error("the keeper has been shut down")]
    Closed,
}

#[derive(Debug)]
enum Command {
    Create { plan: Box<Plan>, fds: PlanFds, reply: oneshot::Sender<Result<Created, KeeperError>> },
    Kill { id: ContainerId, signal: i32 },
    Dead { id: ContainerId },
    Shutdown { reply: oneshot::Sender<()> },
}

/// Where the spawner's socket is and which program it is.
#[derive(Clone, Debug)]
struct Place {
    socket: PathBuf,
    exe: PathBuf,
}

impl Keeper {
    /// Connects to the spawner of `state_dir` (`STATE/launcher`), or starts one (`exe spawner`, its listening
    /// socket as standard input) when none answers. To be called early, while the daemon is small.
    ///
    /// # Errors
    /// When the socket cannot be made, the program cannot be started, or what answers is no spawner of this version.
    pub async fn start(state_dir: &Path, exe: &Path) -> io::Result<Started> {
        let place = Place { socket: state_dir.join(SOCKET_NAME), exe: exe.to_owned() };
        let (commands, inbox) = mpsc::unbounded_channel();
        let (outbox, events) = mpsc::unbounded_channel();
        let (present, spawner_pid) = actor::start(place, inbox, commands.downgrade(), outbox).await?;
        Ok(Started { keeper: Keeper { commands }, events, present, spawner_pid })
    }

    /// Makes a container. Returns when its process exists; its events follow.
    ///
    /// Dropping the future does not undo it: the container may come to exist, and `kill` ends it.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub async fn create(&self, plan: Plan, fds: PlanFds) -> Result<Created, KeeperError> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Create { plan: Box::new(plan), fds, reply };
        self.commands.send(command).map_err(|_| KeeperError::Closed)?;
        answer.await.unwrap_or(Err(KeeperError::Closed))
    }

    /// Sends a signal to the container's first process, through a pidfd. A container that is not known has ended:
    /// no error.
    pub fn kill(&self, id: &ContainerId, signal: i32) {
        // A closed channel means that the actor has been shut down, and its containers with it.
        let _ = self.commands.send(Command::Kill { id: id.clone(), signal });
    }

    /// Ends the spawner, and with it every container that is left. Returns when it is gone.
    pub async fn shutdown(&self) {
        let (reply, done) = oneshot::channel();
        if self.commands.send(Command::Shutdown { reply }).is_ok() {
            let _ = done.await;
        }
    }
}

/// Shared by the table and whoever watches.
type SharedFd = Arc<OwnedFd>;
