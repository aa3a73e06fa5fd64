//! The spawner: the small process that makes containers and is the parent of each of them.
//!
//! It outlives a daemon that dies: it keeps what must not be lost, pidfds and seccomp listeners, and answers the
//! containers' `listen()` calls itself, so that no app ever waits for a dead daemon. One daemon is connected at a time;
//! it begins with `list`.

mod container;
mod listen;
mod peer;
mod server;
pub mod wire;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use rustix::fs::{Mode, OFlags};
use rustix::net::{SocketAddrUnix, getsockname};

use server::Server;
pub use wire::{Exit, Listening, Present, monotonic_us};

/// The life of the spawner's process, `fastcontainer-launcher spawner`: serves the listening socket that it finds as
/// its standard input until it is told to end, or until neither a daemon nor a container is left.
pub fn run() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).try_init();
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the spawner ends; started by hand? It expects a listening socket as standard input");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    settle()?;
    let listener = take_listener()?;
    let name = SocketAddrUnix::try_from(getsockname(&listener)?)?;
    let served = Server::new(listener.try_clone()?)?.run();
    // While it still listens: a daemon that finds no socket makes a new one, which must not be removed.
    if let Some(path) = name.path() {
        let _ = rustix::fs::unlink(&*path);
    }
    served
}

/// Nobody's signals, nobody's terminal, nobody's directory; as many descriptors as may be had.
fn settle() -> io::Result<()> {
    let _ = rustix::thread::set_name(c"fc-spawner");
    let mut signals = SigSet::empty();
    for signal in
        [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2]
    {
        signals.add(signal);
    }
    signals.thread_block()?;
    // Fails only for who leads a process group, and is out of the terminal's reach then, too.
    let _ = rustix::process::setsid();
    rustix::process::chdir("/")?;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    Ok(())
}

/// Moves the socket away from standard input, where every program looks.
fn take_listener() -> io::Result<OwnedFd> {
    let listener = io::stdin().as_fd().try_clone_to_owned()?;
    let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    nix::unistd::dup2_stdin(&null)?;
    if !rustix::net::sockopt::socket_acceptconn(&listener)? {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "standard input does not listen"));
    }
    rustix::io::ioctl_fionbio(&listener, true)?;
    Ok(listener)
}
