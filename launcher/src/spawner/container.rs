//! What the spawner knows of one container.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

use super::wire::{Exit, Listening, Present};
use crate::sandbox::notify::Listener;
use crate::sandbox::{ContainerId, Lent, StepError, StepTiming};

pub(super) struct Container {
    pub(super) id: ContainerId,
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
    /// The first process's reports, until exec.
    pub(super) report: Option<OwnedFd>,
    /// Until its first report.
    pub(super) lent: Option<Lent>,
    pub(super) notify: Option<Listener>,
    pub(super) port: Option<u16>,
    pub(super) timings: Option<Vec<StepTiming>>,
    pub(super) execed: bool,
    pub(super) failed: Option<StepError>,
    pub(super) listening: Option<Listening>,
    pub(super) exited: Option<Exit>,
    /// [`crate::sandbox::Plan::note`].
    pub(super) note: String,
    /// [`crate::sandbox::PlanFds::outputs`].
    pub(super) outputs: Vec<OwnedFd>,
    /// The daemon wants to hear nothing more of it.
    pub(super) forgotten: bool,
}

impl Container {
    pub(super) fn new(id: ContainerId, pid: i32, pidfd: OwnedFd, port: Option<u16>) -> Container {
        Container {
            id,
            pid,
            pidfd,
            report: None,
            lent: None,
            notify: None,
            port,
            timings: None,
            execed: false,
            failed: None,
            listening: None,
            exited: None,
            note: String::new(),
            outputs: Vec::new(),
            forgotten: false,
        }
    }

    pub(super) fn signal(&self, signal: Signal) {
        if self.exited.is_none()
            && let Err(error) = pidfd_send_signal(&self.pidfd, signal)
            && error != Errno::SRCH
        {
            tracing::warn!(app = self.id.app, generation = self.id.generation, %error, "cannot signal a container");
        }
    }

    /// Buries the first process, which has ended. One that another spawner made is not ours to bury.
    pub(super) fn reap(&self) -> io::Result<Option<Exit>> {
        match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(None) => Ok(None),
            Ok(Some(status)) => Ok(Some(match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => Exit::Unknown,
            })),
            Err(Errno::CHILD) => Ok(Some(Exit::Unknown)),
            Err(errno) => Err(errno.into()),
        }
    }

    /// What `list` tells of it.
    pub(super) fn present(&self) -> (Present, Vec<BorrowedFd<'_>>) {
        let present = Present {
            id: self.id.clone(),
            pid: self.pid,
            port: self.port,
            execed: self.execed,
            listening: self.listening,
            exited: self.exited,
            failed: self.failed.clone(),
            notify: self.notify.is_some(),
            note: self.note.clone(),
            outputs: self.outputs.len(),
        };
        let mut fds = Vec::new();
        if self.exited.is_none() {
            fds.push(self.pidfd.as_fd());
        }
        fds.extend(self.notify.as_ref().map(AsFd::as_fd));
        fds.extend(self.outputs.iter().map(AsFd::as_fd));
        (present, fds)
    }
}
