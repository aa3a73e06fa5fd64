//! The supervisor's end of a seccomp listener: hears of `listen()` calls and answers them.

use std::io;
use std::mem::zeroed;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

/// `SECCOMP_IOCTL_NOTIF_RECV`
const RECEIVE: u32 = 0xc050_2100;
/// `SECCOMP_IOCTL_NOTIF_SEND`
const SEND: u32 = 0xc018_2101;
/// `SECCOMP_IOCTL_NOTIF_ID_VALID`
const IS_VALID: u32 = 0x4008_2102;

/// A seccomp listener. Only one process at a time may receive from it: then [`Listener::receive`] never blocks when
/// the descriptor is readable.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
}

/// One system call that waits for its answer.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Names it in the answer.
    pub id: u64,
    /// The calling thread, as this process sees it.
    pub tid: i32,
    /// The call's arguments.
    pub args: [u64; 6],
}

/// What the calling thread gets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// The kernel does what was asked.
    Continue,
    /// The call returns 0 without having been done.
    Done,
    /// The call fails with this error number.
    Failed(i32),
}

impl Listener {
    /// Takes over the descriptor of a listener.
    pub fn new(fd: OwnedFd) -> Listener {
        Listener { fd }
    }

    /// Takes the next call; `None` when its thread has died in between. To be called when readable.
    ///
    /// # Errors
    /// The system's.
    pub fn receive(&self) -> io::Result<Option<Call>> {
        // SAFETY: the structure is plain data for which zero is a value (and the kernel demands it).
        let mut request: libc::seccomp_notif = unsafe { zeroed() };
        match self.ioctl(RECEIVE, &mut request) {
            Ok(()) => {
                let tid = i32::try_from(request.pid).unwrap_or(0);
                Ok(Some(Call { id: request.id, tid, args: request.data.args }))
            }
            Err(Errno::NOENT | Errno::INTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Whether the call still waits; only then is its thread's id still its own.
    pub fn is_waiting(&self, call: &Call) -> bool {
        let mut id = call.id;
        self.ioctl(IS_VALID, &mut id).is_ok()
    }

    /// Answers a call. A thread that has died needs no answer: no error.
    ///
    /// # Errors
    /// The system's.
    pub fn answer(&self, call: &Call, answer: Answer) -> io::Result<()> {
        let (error, flags) = match answer {
            Answer::Continue => (0, u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).unwrap_or(1)),
            Answer::Done => (0, 0),
            Answer::Failed(errno) => (-errno.abs(), 0),
        };
        let mut response = libc::seccomp_notif_resp { id: call.id, val: 0, error, flags };
        match self.ioctl(SEND, &mut response) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn ioctl<T>(&self, request: u32, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: private to this type, which pairs each request with the structure (or, for IS_VALID, the u64) that
        // the kernel expects for it; the exclusive reference is valid for reads and writes across the call.
        let result =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), request.into(), std::ptr::from_mut(argument)) };
        if result >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
