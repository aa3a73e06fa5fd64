//! Answers one `listen()` call of a container.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{SocketType, getsockname, sockopt};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::wire::{Listening, monotonic_us};
use crate::sandbox::notify::{Answer, Call, Listener};

/// Takes the next call and answers it. If it makes the app ready (the first on the wanted port, or the first on any),
/// the call is made here, on the app's own socket: so readiness is known before the app itself goes on.
///
/// Nothing that a container does here can do more than spoil its own readiness.
///
/// # Errors
/// When the listener itself is broken.
pub(super) fn answer(listener: &Listener, wanted: Option<u16>, ready: bool) -> io::Result<Option<Listening>> {
    let Some(call) = listener.receive()? else { return Ok(None) };
    let socket = if ready { None } else { wanted_socket(listener, &call, wanted) };
    let Some(socket) = socket else {
        listener.answer(&call, Answer::Continue)?;
        return Ok(None);
    };
    match rustix::net::listen(&socket, backlog(&call)) {
        Ok(()) => {
            let at_us = monotonic_us();
            let listening = address(&socket).map(|address| Listening {
                port: address.port(),
                address: address.ip(),
                at_us,
            });
            listener.answer(&call, Answer::Done)?;
            Ok(listening)
        }
        Err(errno) => {
            listener.answer(&call, Answer::Failed(errno.raw_os_error()))?;
            Ok(None)
        }
    }
}

/// A duplicate of the socket that the call is about, if it is TCP on the wanted port.
fn wanted_socket(listener: &Listener, call: &Call, wanted: Option<u16>) -> Option<OwnedFd> {
    let thread = open_thread(call.tid).ok()?;
    // The low half is the argument: an int.
    let number = i32::try_from(call.args[0] & 0xffff_ffff).ok()?;
    let socket = pidfd_getfd(&thread, number, PidfdGetfdFlags::empty()).ok()?;
    // Still waiting now means that the id was this thread's when it was opened.
    if !listener.is_waiting(call) {
        return None;
    }
    let is_stream = sockopt::socket_type(&socket).is_ok_and(|kind| kind == SocketType::STREAM);
    let port = address(&socket).filter(|_| is_stream)?.port();
    wanted.is_none_or(|wanted| wanted == port).then_some(socket)
}

/// A pidfd for a thread; before Linux 6.9 only for its process, which shares its descriptors in all but odd programs.
fn open_thread(tid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(tid).ok_or(Errno::SRCH)?;
    let of_thread = PidfdFlags::from_bits_retain(libc::O_EXCL.unsigned_abs());
    match pidfd_open(pid, of_thread) {
        Err(Errno::INVAL) => {}
        other => return Ok(other?),
    }
    match pidfd_open(pid, PidfdFlags::empty()) {
        Err(Errno::INVAL | Errno::NOENT) => Ok(pidfd_open(leader(tid)?, PidfdFlags::empty())?),
        other => Ok(other?),
    }
}

fn leader(tid: i32) -> io::Result<Pid> {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status"))?;
    let tgid = status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    Ok(tgid.and_then(Pid::from_raw).ok_or(Errno::SRCH)?)
}

fn address(socket: &OwnedFd) -> Option<SocketAddr> {
    let name = getsockname(socket).ok()?;
    SocketAddr::try_from(name).ok()
}

fn backlog(call: &Call) -> i32 {
    #[expect(clippy::cast_possible_truncation, reason = "the kernel reads this argument as an int, too")]
    #[expect(clippy::cast_possible_wrap, reason = "a negative backlog is the app's to ask for")]
    let backlog = call.args[1] as u32 as i32;
    backlog
}

/// Whether the peer of a Unix socket is root.
pub(super) fn is_root(socket: BorrowedFd<'_>) -> bool {
    sockopt::socket_peercred(socket).is_ok_and(|peer| peer.uid.is_root())
}
