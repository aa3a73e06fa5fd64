//! Sockets born inside a container's network namespace.
//!
//! A socket stays in the namespace where it was made, whoever holds it. One thread enters the container's namespace,
//! makes sockets and returns to its own: no addresses, no bridge, no port clashes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use nix::sched::{CloneFlags, setns};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, netlink, sockopt};
use tokio::sync::oneshot;

use crate::backlog::Backlog;

/// At most so many sockets are made at once.
pub const MAX_SOCKETS: usize = 253;

/// The thread that visits network namespaces; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct NetNs {
    worker: Arc<Mutex<Option<mpsc::Sender<Job>>>>,
}

/// A source of sockets of one container. Holding it keeps the network namespace alive, so it is to be dropped with
/// the instance; it never reaches another container, even when the first process has ended and its pid is reused.
#[derive(Clone, Debug)]
pub struct NetSockets {
    maker: NetNs,
    netns: Arc<OwnedFd>,
}

/// IP version of the sockets to make.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Family {
    /// To connect to 127.0.0.1.
    V4,
    /// To connect to ::1.
    V6,
}

#[derive(Debug)]
struct Job {
    target: Arc<OwnedFd>,
    want: Want,
    reply: oneshot::Sender<io::Result<Vec<OwnedFd>>>,
}

#[derive(Clone, Copy, Debug)]
enum Want {
    /// A descriptor of the namespace itself, then so many sockets.
    Namespace,
    Sockets(Family, usize),
    /// A netlink socket, to give the namespace addresses and routes.
    Netlink,
    /// One that answers questions about the namespace's sockets.
    Diagnosis,
}

impl NetNs {
    /// A maker of sockets; its thread starts with the first use.
    pub fn new() -> NetNs {
        NetNs::default()
    }

    /// Opens the network namespace of a process, by pidfd.
    ///
    /// # Errors
    /// `ESRCH` when the process has ended; others of `setns` and `open`.
    pub async fn open(&self, pidfd: OwnedFd) -> io::Result<NetSockets> {
        let mut made = self.ask(Arc::new(pidfd), Want::Namespace).await?;
        let netns = made.pop().ok_or_else(|| io::Error::other("no namespace descriptor"))?;
        Ok(NetSockets { maker: self.clone(), netns: Arc::new(netns) })
    }

    /// Makes `count` unconnected, non-blocking TCP sockets in the namespace that `target` (a pidfd or a namespace
    /// descriptor) names.
    ///
    /// # Errors
    /// Those of `setns` and `socket`.
    pub async fn make_sockets(
        &self,
        target: Arc<OwnedFd>,
        family: Family,
        count: usize,
    ) -> io::Result<Vec<OwnedFd>> {
        self.ask(target, Want::Sockets(family, count.min(MAX_SOCKETS))).await
    }

    /// Makes a non-blocking netlink socket of `NETLINK_SOCK_DIAG` in the namespace.
    ///
    /// # Errors
    /// Those of `setns` and `socket`.
    pub async fn make_diagnosis(&self, target: Arc<OwnedFd>) -> io::Result<OwnedFd> {
        let mut made = self.ask(target, Want::Diagnosis).await?;
        made.pop().ok_or_else(|| io::Error::other("no socket"))
    }

    async fn ask(&self, target: Arc<OwnedFd>, want: Want) -> io::Result<Vec<OwnedFd>> {
        // A thread that could not return home drops its jobs unanswered; they are put to its successor, once.
        for _ in 0..2 {
            let (reply, answer) = oneshot::channel();
            self.send(Job { target: target.clone(), want, reply })?;
            if let Ok(result) = answer.await {
                return result;
            }
        }
        Err(io::Error::other("the thread for network namespaces cannot return to its own"))
    }

    fn send(&self, job: Job) -> io::Result<()> {
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        let job = match worker.as_ref() {
            Some(sender) => match sender.send(job) {
                Ok(()) => return Ok(()),
                Err(mpsc::SendError(job)) => job,
            },
            None => job,
        };
        let (sender, jobs) = mpsc::channel();
        let home = File::open("/proc/thread-self/ns/net")?;
        std::thread::Builder::new().name("netns".to_owned()).spawn(move || work(&home, &jobs))?;
        sender.send(job).map_err(|_| io::Error::other("the thread for network namespaces did not start"))?;
        *worker = Some(sender);
        Ok(())
    }
}

impl NetSockets {
    /// Makes `count` unconnected, non-blocking IPv4 TCP sockets with `TCP_NODELAY`, to be connected to
    /// 127.0.0.1:port.
    ///
    /// # Errors
    /// Those of `setns` and `socket`.
    pub async fn take(&self, count: usize) -> io::Result<Vec<OwnedFd>> {
        self.take_family(Family::V4, count).await
    }

    /// What tells the length of the queue before `port`.
    ///
    /// # Errors
    /// Those of `setns` and `socket`.
    pub async fn backlog(&self, port: u16) -> io::Result<Backlog> {
        Ok(Backlog::new(self.maker.make_diagnosis(self.netns.clone()).await?, port))
    }

    /// As [`NetSockets::take`], for an IP version.
    ///
    /// # Errors
    /// Those of `setns` and `socket`.
    pub async fn take_family(&self, family: Family, count: usize) -> io::Result<Vec<OwnedFd>> {
        self.maker.make_sockets(self.netns.clone(), family, count).await
    }

    /// The namespace itself.
    pub fn netns(&self) -> BorrowedFd<'_> {
        self.netns.as_fd()
    }

    /// A netlink socket (NETLINK_ROUTE) in the namespace.
    ///
    /// # Errors
    /// Those of `setns` and `socket`.
    pub async fn rtnl(&self) -> io::Result<OwnedFd> {
        let mut made = self.maker.ask(self.netns.clone(), Want::Netlink).await?;
        made.pop().ok_or_else(|| io::Error::other("no netlink socket"))
    }
}

/// The thread's life: until nobody can ask any more, or until it is lost in a foreign namespace.
fn work(home: &File, jobs: &mpsc::Receiver<Job>) {
    while let Ok(job) = jobs.recv() {
        let result = match setns(job.target.as_fd(), CloneFlags::CLONE_NEWNET) {
            Ok(()) => make(job.want),
            Err(errno) => Err(errno.into()),
        };
        let back = setns(home.as_fd(), CloneFlags::CLONE_NEWNET);
        // Whoever asked may have left; then the sockets close here.
        let _ = job.reply.send(result);
        if let Err(error) = back {
            tracing::error!(%error, "netns thread cannot return to its namespace; it is replaced");
            return;
        }
    }
}

fn make(want: Want) -> io::Result<Vec<OwnedFd>> {
    match want {
        Want::Namespace => Ok(vec![File::open("/proc/thread-self/ns/net")?.into()]),
        Want::Diagnosis => {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let protocol = Some(netlink::SOCK_DIAG);
            let made = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol)?;
            Ok(vec![made])
        }
        Want::Sockets(family, count) => (0..count).map(|_| socket(family)).collect(),
        Want::Netlink => Ok(vec![rtnl_socket()?]),
    }
}

fn socket(family: Family) -> io::Result<OwnedFd> {
    let domain = match family {
        Family::V4 => AddressFamily::INET,
        Family::V6 => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(domain, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    Ok(socket)
}

/// A blocking NETLINK_ROUTE socket in the caller's network namespace.
pub(crate) fn rtnl_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    // NETLINK_ROUTE is protocol 0.
    Ok(rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?)
}
