//! The words between daemon and spawner: one JSON message per packet of a `SOCK_SEQPACKET` socket, descriptors beside it.
//!
//! Both ends use the same two functions, [`send`] and [`receive`], on non-blocking sockets.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::sandbox::{ContainerId, Plan, PlanFds, StepError, StepTiming};

/// No message is longer, in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// No message carries more descriptors (the kernel's SCM_MAX_FD).
pub const MAX_FDS: usize = 253;
/// Version of this protocol; a daemon does not talk to a spawner of another version.
pub const VERSION: u32 = 4;

/// What the daemon asks.
#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// Make a container. Descriptors: see [`FdCounts`].
    Create {
        /// The container.
        plan: Box<Plan>,
        /// How the descriptors divide.
        fds: FdCounts,
    },
    /// Take over a container that another spawner made and left behind. Descriptors: pidfd, then notify if `notify`,
    /// then the outputs.
    Adopt {
        /// Which container.
        id: ContainerId,
        /// Its first process.
        pid: i32,
        /// The port it is to listen on, as in [`Plan::port`].
        port: Option<u16>,
        /// Since when it listens, if it does.
        listening: Option<Listening>,
        /// Whether the notify descriptor is there.
        notify: bool,
        /// [`Plan::note`].
        #[serde(default)]
        note: String,
    },
    /// Send a signal to the container's first process.
    Kill {
        /// Which container.
        id: ContainerId,
        /// Signal number.
        signal: i32,
    },
    /// Tell all containers: answered by `present` for each, then `listed`.
    List,
    /// The daemon knows that this container has ended; drop its record.
    Forget {
        /// Which container.
        id: ContainerId,
    },
    /// Kill what is left and exit.
    Shutdown,
}

/// What the spawner tells.
#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The process exists. Descriptor: pidfd.
    Created {
        /// Which container.
        id: ContainerId,
        /// Its first process, as the host numbers it.
        pid: i32,
        /// When, in microseconds of [`monotonic_us`].
        at_us: u64,
    },
    /// The notify descriptor, as soon as the spawner has it. Descriptor: notify.
    Notify {
        /// Which container.
        id: ContainerId,
    },
    /// The program runs.
    Execed {
        /// Which container.
        id: ContainerId,
        /// How long the steps took.
        timings: Vec<StepTiming>,
        /// Whether `listen()` is noticed; otherwise readiness must be probed.
        notify: bool,
        /// When, in microseconds of [`monotonic_us`].
        at_us: u64,
    },
    /// It could not be made. If `created` came before, `exited` follows.
    Failed {
        /// Which container.
        id: ContainerId,
        /// Where and why.
        error: StepError,
    },
    /// The app listens on the wanted port.
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
        /// How.
        exit: Exit,
    },
    /// Answer to `list`, one per container. Descriptors: pidfd unless it has ended, then notify if `notify`,
    /// then the outputs.
    Present(Box<Present>),
    /// End of the answer to `list`.
    Listed {
        /// [`VERSION`] of the spawner.
        version: u32,
        /// The spawner's process.
        pid: u32,
    },
}

/// One container, as `list` tells it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Present {
    /// Which container.
    pub id: ContainerId,
    /// Its first process.
    pub pid: i32,
    /// The port it is to listen on.
    pub port: Option<u16>,
    /// Whether the program runs (otherwise it is still being made).
    pub execed: bool,
    /// Since when it listens, if it does.
    pub listening: Option<Listening>,
    /// How it ended, if it has.
    pub exited: Option<Exit>,
    /// Why it could not be made, if so.
    pub failed: Option<StepError>,
    /// Whether the notify descriptor is there.
    pub notify: bool,
    /// [`Plan::note`].
    pub note: String,
    /// How many of [`PlanFds::outputs`] are there.
    pub outputs: usize,
}

/// Where an app listens and since when.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Listening {
    /// TCP port.
    pub port: u16,
    /// Local address of the listening socket: usually `0.0.0.0` or `::`. An app that listens only on `::1` is
    /// reached only by an IPv6 socket.
    pub address: IpAddr,
    /// When it became so, in microseconds of [`monotonic_us`].
    pub at_us: u64,
}

/// How a container's first process ended.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// It exited with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// Nobody could tell: its parent, an earlier spawner, is gone.
    Unknown,
}

/// How the descriptors of [`Request::Create`] divide, in this order, followed by stdout and stderr, and last the outputs.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct FdCounts {
    /// [`PlanFds::layers`].
    pub layers: usize,
    /// [`PlanFds::cgroup_tasks`].
    pub cgroup_tasks: usize,
    /// [`PlanFds::cgroup_dir`].
    pub cgroup_dir: bool,
    /// [`PlanFds::hosts`].
    #[serde(default)]
    pub hosts: bool,
    /// [`PlanFds::gate`].
    #[serde(default)]
    pub gate: bool,
    /// [`PlanFds::upper`].
    #[serde(default)]
    pub upper: bool,
    /// [`PlanFds::outputs`].
    pub outputs: usize,
}

impl FdCounts {
    /// Lays the descriptors of a plan in a row.
    pub fn pack(fds: PlanFds) -> (FdCounts, Vec<OwnedFd>) {
        let counts = FdCounts {
            layers: fds.layers.len(),
            cgroup_tasks: fds.cgroup_tasks.len(),
            cgroup_dir: fds.cgroup_dir.is_some(),
            hosts: fds.hosts.is_some(),
            gate: fds.gate.is_some(),
            upper: fds.upper.is_some(),
            outputs: fds.outputs.len(),
        };
        let mut row = fds.layers;
        row.extend(fds.cgroup_tasks);
        row.extend(fds.cgroup_dir);
        row.extend(fds.hosts);
        row.extend(fds.gate);
        row.extend(fds.upper);
        row.push(fds.stdout);
        row.push(fds.stderr);
        row.extend(fds.outputs);
        (counts, row)
    }

    /// The inverse of [`FdCounts::pack`]; `None` when the number of descriptors is not what the counts say.
    pub fn unpack(self, row: Vec<OwnedFd>) -> Option<PlanFds> {
        let named = self.layers.checked_add(self.cgroup_tasks)?.checked_add(self.outputs)?;
        let single =
            [self.cgroup_dir, self.hosts, self.gate, self.upper].map(usize::from).iter().sum::<usize>();
        if row.len() != named.checked_add(single + 2)? {
            return None;
        }
        let mut row = row.into_iter();
        Some(PlanFds {
            layers: row.by_ref().take(self.layers).collect(),
            cgroup_tasks: row.by_ref().take(self.cgroup_tasks).collect(),
            cgroup_dir: if self.cgroup_dir { row.next() } else { None },
            hosts: if self.hosts { row.next() } else { None },
            gate: if self.gate { row.next() } else { None },
            upper: if self.upper { row.next() } else { None },
            stdout: row.next()?,
            stderr: row.next()?,
            outputs: row.collect(),
        })
    }
}

/// Microseconds of the system's monotonic clock: the same for every process of this host.
pub fn monotonic_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1000
}

/// Turns a message into the bytes of one packet.
///
/// # Errors
/// `InvalidInput` when it is longer than [`MAX_MESSAGE`].
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message of {} bytes: at most {MAX_MESSAGE} fit", bytes.len()),
        ));
    }
    Ok(bytes)
}

/// Sends one packet with its descriptors; `WouldBlock` when the socket's buffer is full.
///
/// # Errors
/// The system's; `InvalidInput` for more than [`MAX_FDS`] descriptors.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if fds.len() > MAX_FDS || (!fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds))) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} descriptors in one message", fds.len()),
        ));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?;
    Ok(())
}

/// Receives one packet; `None` at the end, `WouldBlock` when there is none yet.
///
/// # Errors
/// The system's; `InvalidData` for a packet that is too long, is not understood or lost descriptors.
pub fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = rustix::net::recvmsg(socket.as_fd(), &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    if got.bytes == 0 {
        return Ok(None);
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a truncated packet"));
    }
    let message = serde_json::from_slice(&bytes[..got.bytes])?;
    Ok(Some((message, fds)))
}
