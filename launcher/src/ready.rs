//! Readiness by trying: the fall-back for a container whose `listen()` cannot be noticed.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::Interest;

use crate::asyncfd;
use crate::network::NetSockets;
use crate::spawner::monotonic_us;

/// First pause between two attempts; each next one is half as long again, up to [`LONGEST`].
const SHORTEST: Duration = Duration::from_micros(100);
const LONGEST: Duration = Duration::from_millis(2);

/// The app answers on its port.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ready {
    /// When a connection was first accepted, in microseconds of [`monotonic_us`].
    pub at_us: u64,
    /// How many attempts it took.
    pub attempts: u32,
}

/// Connects to 127.0.0.1:`port` inside the container until it is accepted. Never gives up: the caller has the
/// deadline, and drops the future.
///
/// # Errors
/// When no socket can be made in the container's namespace, or for a failure that time does not mend.
pub async fn probe(sockets: &NetSockets, port: u16) -> io::Result<Ready> {
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    let mut pause = SHORTEST;
    let mut attempts = 0;
    loop {
        attempts += 1;
        let socket = sockets.take(1).await?.pop().ok_or_else(|| io::Error::other("no socket"))?;
        match connect(socket, address).await {
            Ok(()) => return Ok(Ready { at_us: monotonic_us(), attempts }),
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(error),
        }
        sleep(pause).await?;
        pause = (pause * 3 / 2).min(LONGEST);
    }
}

async fn connect(socket: OwnedFd, address: SocketAddrV4) -> io::Result<()> {
    match rustix::net::connect(&socket, &address) {
        Ok(()) => Ok(()),
        Err(Errno::INPROGRESS) => {
            let socket = asyncfd::register(socket, Interest::WRITABLE)?;
            let _ = socket.writable().await?;
            match rustix::net::sockopt::socket_error(socket.get_ref())? {
                Ok(()) => Ok(()),
                Err(errno) => Err(errno.into()),
            }
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Nobody listens yet, or `lo` is not up yet.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(
            Errno::CONNREFUSED
                | Errno::CONNRESET
                | Errno::NETUNREACH
                | Errno::HOSTUNREACH
                | Errno::NETDOWN
                | Errno::TIMEDOUT
                | Errno::AGAIN
                | Errno::ADDRNOTAVAIL
        )
    )
}

/// A pause of microseconds: the runtime's own timer counts milliseconds.
async fn sleep(pause: Duration) -> io::Result<()> {
    let timer = rustix::time::timerfd_create(
        TimerfdClockId::Monotonic,
        TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
    )?;
    let value = Timespec::try_from(pause).map_err(io::Error::other)?;
    let once = Itimerspec { it_interval: Timespec::default(), it_value: value };
    rustix::time::timerfd_settime(timer.as_fd(), TimerfdTimerFlags::empty(), &once)?;
    let _ = asyncfd::register(timer, Interest::READABLE)?.readable().await?;
    Ok(())
}
