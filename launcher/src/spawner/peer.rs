//! The daemon's end of the spawner's connection: never blocks, whatever the daemon does.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::wire::{self, Event};

/// A daemon that lets more pile up than this is dropped; it connects again and asks for the list.
const MAX_QUEUE: usize = 10_000;

pub(super) struct Peer {
    socket: OwnedFd,
    queue: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    /// It has asked for the list; before that it is told nothing, so that nothing is told twice.
    pub(super) informed: bool,
}

impl Peer {
    pub(super) fn new(socket: OwnedFd) -> Peer {
        Peer { socket, queue: VecDeque::new(), informed: false }
    }

    /// Sends an event now or as soon as there is room.
    pub(super) fn tell(&mut self, event: &Event, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = wire::encode(event)?;
        if self.queue.is_empty() {
            match wire::send(self.socket.as_fd(), &bytes, fds) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
        if self.queue.len() >= MAX_QUEUE {
            return Err(io::Error::other("the daemon does not listen"));
        }
        let fds = fds.iter().map(|fd| fd.try_clone_to_owned()).collect::<io::Result<_>>()?;
        self.queue.push_back((bytes, fds));
        Ok(())
    }

    /// Sends what has waited, as far as there is room.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while let Some((bytes, fds)) = self.queue.front() {
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            match wire::send(self.socket.as_fd(), bytes, &borrowed) {
                Ok(()) => drop(self.queue.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(super) fn is_waiting(&self) -> bool {
        !self.queue.is_empty()
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
