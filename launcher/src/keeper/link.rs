//! The connection to a spawner, and the spawner's process if it was started here.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::{Child, Command};

use super::Place;
use crate::spawner::wire::{self, Event, Present, Request};

/// How long a spawner may take to say what it has, and to end after it closed the connection.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often one may be found that is just leaving.
const MEETINGS: usize = 3;

pub(super) struct Link {
    socket: AsyncFd<OwnedFd>,
    /// The tokio runtime buries it if it is dropped before its end.
    child: Option<Child>,
    /// The spawner's process.
    pub(super) pid: u32,
}

/// One container of the spawner's answer to `list`.
pub(super) struct Listed {
    pub(super) state: Present,
    pub(super) pidfd: Option<OwnedFd>,
    pub(super) notify: Option<OwnedFd>,
    pub(super) outputs: Vec<OwnedFd>,
}

impl Link {
    /// Connects to the spawner that is there, or to one that is started now.
    pub(super) async fn open(place: &Place) -> io::Result<(Link, Vec<Listed>)> {
        for _ in 0..MEETINGS {
            match Link::meet(place).await {
                // It was on its way out.
                Err(error) if is_parting(&error) => tracing::debug!(%error, "the spawner left; asking again"),
                other => return other,
            }
        }
        Link::meet(place).await
    }

    async fn meet(place: &Place) -> io::Result<(Link, Vec<Listed>)> {
        let (socket, child) = match connect(&place.socket) {
            Ok(socket) => (socket, None),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                let child = spawn(place)?;
                (connect(&place.socket)?, Some(child))
            }
            Err(error) => return Err(error),
        };
        let mut link = Link {
            socket: crate::asyncfd::register(socket, Interest::READABLE | Interest::WRITABLE)?,
            child,
            pid: 0,
        };
        let (listed, pid) = tokio::time::timeout(PATIENCE, link.list())
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the spawner does not say what it has"))??;
        link.pid = pid;
        Ok((link, listed))
    }

    async fn list(&self) -> io::Result<(Vec<Listed>, u32)> {
        self.send(&Request::List, &[]).await?;
        let mut listed = Vec::new();
        loop {
            match self.receive().await? {
                None => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the spawner closed the connection",
                    ));
                }
                Some((Event::Present(state), fds)) => {
                    let mut fds = fds.into_iter();
                    let pidfd = if state.exited.is_none() { fds.next() } else { None };
                    let notify = if state.notify { fds.next() } else { None };
                    listed.push(Listed { state: *state, pidfd, notify, outputs: fds.collect() });
                }
                Some((Event::Listed { version, pid }, _)) if version == wire::VERSION => {
                    return Ok((listed, pid));
                }
                Some((Event::Listed { version, pid }, _)) => {
                    let text = format!(
                        "a spawner of another version ({version}, ours is {}) runs as process {pid}: end it first",
                        wire::VERSION
                    );
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
                Some(_) => {}
            }
        }
    }

    pub(super) async fn send(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = wire::encode(request)?;
        self.socket.async_io(Interest::WRITABLE, |socket| wire::send(socket.as_fd(), &bytes, fds)).await
    }

    pub(super) async fn receive(&self) -> io::Result<Option<(Event, Vec<OwnedFd>)>> {
        self.socket.async_io(Interest::READABLE, |socket| wire::receive(socket.as_fd())).await
    }

    /// Lets a spawner go that is lost; the runtime buries the one that was started here.
    pub(super) fn lose(self) {
        if self.child.is_none() {
            let pid = self.pid;
            tokio::spawn(async move { ended(pid).await });
        }
    }

    /// Closes the connection and waits for the end of a spawner that was told to end.
    pub(super) async fn close(mut self) {
        let gone = async {
            match &mut self.child {
                Some(child) => drop(child.wait().await),
                // An earlier daemon's.
                None => drop(ended(self.pid).await),
            }
        };
        if tokio::time::timeout(PATIENCE, gone).await.is_err() {
            tracing::warn!(pid = self.pid, "the spawner does not end");
        }
    }
}

/// Waits for the end of a process that was not started here.
async fn ended(pid: u32) -> io::Result<()> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK)?;
    crate::asyncfd::register(pidfd, Interest::READABLE)?.readable().await?.retain_ready();
    // It is this process's child after all if this program was started anew.
    let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::NOHANG);
    Ok(())
}

fn is_parting(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Starts a spawner. It inherits a socket that listens already, so that there is nothing to wait for.
fn spawn(place: &Place) -> io::Result<Child> {
    match std::fs::remove_file(&place.socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = new_socket()?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(&place.socket)?)?;
    std::fs::set_permissions(&place.socket, std::fs::Permissions::from_mode(0o600))?;
    rustix::net::listen(&listener, 8)?;
    Command::new(&place.exe)
        .arg("spawner")
        // It lives with the containers, and has no business with the CMDB.
        .env_remove(launcher_client::home::VARIABLE)
        .stdin(Stdio::from(listener))
        .stdout(Stdio::null())
        .spawn()
        .map_err(|error| io::Error::new(error.kind(), format!("{} spawner: {error}", place.exe.display())))
}
