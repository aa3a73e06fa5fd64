//! What a container's first process tells the spawner on its way to exec: one message per packet.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::{Deserialize, Serialize};

use super::plan::{StepError, StepTiming};
use super::step::Failure;

/// More than the longest report: fifty steps with their names.
const PACKET: usize = 32 * 1024;

/// A message of a container's first process.
///
/// The usual sequence is `Notify`, `Execed`, end of the socket; or, at any point, `Failed`, end of the socket.
#[derive(Debug)]
pub enum Report {
    /// The seccomp listener on which `listen()` calls arrive; to be kept open for the container's life, because
    /// once it is closed every later `listen()` fails with ENOSYS.
    Notify(OwnedFd),
    /// A listener could not be had (EBUSY: the launcher itself runs beneath one); readiness must be found otherwise.
    NoNotify,
    /// A step failed; the process has ended or is about to.
    Failed(StepError),
    /// Everything is done and `execve` is the very next call. It is done when the socket ends without a `Failed`.
    Execed {
        /// How long each step took, in the order of execution, the parent's steps included.
        timings: Vec<StepTiming>,
    },
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Message {
    Notify,
    NoNotify,
    Failed(StepError),
    Execed(Vec<StepTiming>),
}

impl Report {
    /// Receives the next report; `None` is the end of the socket.
    ///
    /// Blocks or returns `WouldBlock` as the socket is set. A packet that is none of ours is `InvalidData`.
    pub fn recv(socket: BorrowedFd<'_>) -> io::Result<Option<Report>> {
        let mut bytes = vec![0; PACKET];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let length = loop {
            let flags = RecvFlags::CMSG_CLOEXEC;
            match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
                Ok(received) => break received.bytes,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        };
        if length == 0 {
            return Ok(None);
        }
        let listener = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let packet = bytes.get(..length).unwrap_or_default();
        let message = serde_json::from_slice(packet).map_err(invalid)?;
        Ok(Some(match message {
            Message::Notify => {
                Report::Notify(listener.ok_or_else(|| invalid("a listener without descriptor"))?)
            }
            Message::NoNotify => Report::NoNotify,
            Message::Failed(error) => Report::Failed(error),
            Message::Execed(timings) => Report::Execed { timings },
        }))
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// The child's end of the socket.
pub(super) struct Reporter {
    socket: OwnedFd,
}

impl Reporter {
    pub(super) fn new(socket: OwnedFd) -> Reporter {
        Reporter { socket }
    }

    /// Hands over the listener, or says that there is none.
    pub(super) fn listener(&self, listener: Option<OwnedFd>) -> Result<(), Failure> {
        match listener {
            Some(fd) => self.send(&Message::Notify, &[fd.as_fd()]),
            None => self.send(&Message::NoNotify, &[]),
        }
    }

    /// Says that exec comes next. Failing here means that the spawner is gone, and nobody would keep the container.
    pub(super) fn execed(&self, timings: &[StepTiming]) -> Result<(), Failure> {
        self.send(&Message::Execed(timings.to_vec()), &[])
    }

    /// Says what failed; best effort, because there is nobody else to tell.
    pub(super) fn failed(&self, error: StepError) {
        let _ = self.send(&Message::Failed(error), &[]);
    }

    fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<(), Failure> {
        let bytes = serde_json::to_vec(message).map_err(io::Error::other)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        rustix::net::sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

impl AsFd for Reporter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, Reporter) {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        (ours, Reporter::new(theirs))
    }

    #[test]
    fn a_start_reports_its_listener_and_its_timings_and_then_the_socket_ends() {
        let (ours, child) = pair();
        let timings = vec![StepTiming { step: "mount proc".to_owned(), us: 36 }; 60];

        child.listener(Some(std::fs::File::open("/dev/null").unwrap().into())).unwrap();
        child.execed(&timings).unwrap();
        drop(child);

        assert!(matches!(Report::recv(ours.as_fd()).unwrap(), Some(Report::Notify(_))));
        let Some(Report::Execed { timings: received }) = Report::recv(ours.as_fd()).unwrap() else {
            panic!("timings are next")
        };
        assert_eq!(received, timings);
        assert!(Report::recv(ours.as_fd()).unwrap().is_none());
    }

    #[test]
    fn a_failure_names_step_error_and_matter() {
        let (ours, child) = pair();
        let error = Failure::new(libc::ELOOP, "/dev is a symbolic link").at("check image directories");

        child.listener(None).unwrap();
        child.failed(error.clone());

        assert!(matches!(Report::recv(ours.as_fd()).unwrap(), Some(Report::NoNotify)));
        assert!(
            matches!(Report::recv(ours.as_fd()).unwrap(), Some(Report::Failed(received)) if received == error)
        );
        let text = "check image directories (/dev is a symbolic link): Too many levels of symbolic links (os error 40)";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn anything_else_is_invalid_and_a_spawner_that_is_gone_is_an_error() {
        let (ours, child) = pair();

        rustix::net::send(&child.socket, b"{}", SendFlags::empty()).unwrap();
        rustix::net::send(&child.socket, b"\"notify\"", SendFlags::empty()).unwrap();

        for _ in 0..2 {
            assert_eq!(Report::recv(ours.as_fd()).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        drop(ours);
        assert_eq!(child.execed(&[]).unwrap_err().errno(), libc::EPIPE);
    }
}
