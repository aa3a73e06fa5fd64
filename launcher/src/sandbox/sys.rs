//! The system calls that neither rustix nor nix offers, each behind a safe function.

use std::ffi::CStr;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// `struct clone_args` of the kernel, version 2 (88 bytes, Linux 5.7).
#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// `struct mount_attr` of the kernel (Linux 5.12).
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct MountAttr {
    /// Attributes to set.
    pub(super) set: u64,
    /// Attributes to clear.
    pub(super) clear: u64,
    /// `MS_PRIVATE` and its kind, or 0.
    pub(super) propagation: u64,
    /// The user namespace of `MOUNT_ATTR_IDMAP`.
    pub(super) userns_fd: u64,
}

/// Which side of a clone this is.
pub(super) enum Cloned {
    /// In the new process.
    Child,
    /// In the caller.
    Parent {
        /// The new process's id, as the caller sees it.
        pid: i32,
        /// Its pidfd, close-on-exec.
        pidfd: OwnedFd,
    },
}

/// Forks with namespaces. `flags` must not contain `CLONE_VM` or `CLONE_PIDFD` (added here). With `CLONE_FILES` the child must
/// neither open nor close (drop) a descriptor before it has called [`own_descriptors`].
///
/// The caller must be single-threaded: the child has a copy of memory in which a lock of another thread would stay
/// locked for ever.
pub(super) fn clone3(flags: u64, exit_signal: i32, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    let mut pidfd: RawFd = -1;
    let mut arguments = CloneArgs {
        flags: flags | libc::CLONE_PIDFD as u64,
        pidfd: std::ptr::from_mut(&mut pidfd) as u64,
        exit_signal: u64::try_from(exit_signal).unwrap_or(0),
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::try_from(cgroup.as_raw_fd()).unwrap_or(u64::MAX);
    }
    // SAFETY: the arguments live across the call and have the size given; without CLONE_VM and a stack of its own the
    // child continues here on a private copy of this very stack, as after fork.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<CloneArgs>()) };
    match result {
        0 => Ok(Cloned::Child),
        pid if pid > 0 => {
            // SAFETY: in the parent a successful CLONE_PIDFD has stored a new descriptor that nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Cloned::Parent { pid: i32::try_from(pid).unwrap_or(-1), pidfd })
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// `CLONE_INTO_CGROUP` (Linux 5.7).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// `CLONE_CLEAR_SIGHAND` (Linux 5.5): no handler of the parent runs in the child.
pub(super) const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;

/// Ends this process without running anything that belongs to the parent (destructors, atexit handlers, buffers).
pub(super) fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` has no precondition.
    unsafe { libc::_exit(code) }
}

/// Changes the attributes of the one mount at whose root `mount` is open.
pub(super) fn mount_setattr(mount: BorrowedFd<'_>, attr: MountAttr) -> io::Result<()> {
    // SAFETY: the path is an empty C string, the structure outlives the call and has the size given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    check(result)
}

/// Marks every descriptor from `first` to `last` close-on-exec.
pub(super) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: this changes only the close-on-exec mark of descriptors, which owners do not rely on.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) })
}

/// First number of the descriptors that the caller holds for long; those of a creation under way are below, so that a child
/// that [owns](own_descriptors) only these copies few.
const SHELF: RawFd = 1024;

/// Moves a descriptor that is held for long to the numbers from [`SHELF`] on, if this process may have so many.
pub(super) fn shelve(fd: OwnedFd) -> OwnedFd {
    rustix::io::fcntl_dupfd_cloexec(&fd, SHELF).unwrap_or(fd)
}

/// Ends the sharing of descriptors with the parent (`CLONE_FILES`): the child has copies of those up to `last` from now on,
/// and none of the thousands above, which would take a millisecond to copy and to close.
pub(super) fn own_descriptors(last: RawFd) -> io::Result<()> {
    let first = u32::try_from(last).map_or(0, |last| last.saturating_add(1));
    // SAFETY: only this process's new table loses descriptors; nothing in this process uses or drops those above `last`.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_UNSHARE) })
}

/// Closes every descriptor above 2 except those `kept`.
///
/// For the first moments of a cloned child only: owners of the closed descriptors must never be used or dropped.
pub(super) fn close_all_except(kept: &[RawFd]) -> io::Result<()> {
    let mut kept: Vec<u32> =
        kept.iter().filter_map(|fd| u32::try_from(*fd).ok()).filter(|fd| *fd > 2).collect();
    kept.sort_unstable();
    let mut first: u32 = 3;
    for fd in kept.into_iter().chain([u32::MAX]) {
        if fd > first {
            // SAFETY: the child never touches these descriptors again; their owners are the parent's, whose
            // destructors do not run here because the child ends by exec or `_exit`.
            check(unsafe { libc::syscall(libc::SYS_close_range, first, fd - u32::from(fd != u32::MAX), 0) })?;
        }
        first = fd.saturating_add(1);
    }
    Ok(())
}

/// Sets every signal to its default action and unblocks all: a process inherits ignored signals and the mask
/// through exec, and Rust programs ignore SIGPIPE.
pub(super) fn reset_signals() -> io::Result<()> {
    /// `struct sigaction` of the kernel; the C library's own call refuses the signals that it keeps for itself.
    #[repr(C)]
    #[derive(Default)]
    struct Action {
        handler: usize, // 0 is SIG_DFL
        flags: libc::c_ulong,
        restorer: usize,
        mask: u64,
    }
    let default = Action::default();
    let no_old = std::ptr::null_mut::<Action>();
    for signal in 1..=64 {
        // SAFETY: SIG_DFL installs no code; KILL and STOP are refused by the call and always have their default.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, &raw const default, no_old, size_of::<u64>())
        };
    }
    let (none, no_old) = (0_u64, std::ptr::null_mut::<u64>());
    // SAFETY: the kernel reads eight bytes, the size of its signal set, from a variable of that size.
    let result = unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, no_old, size_of::<u64>())
    };
    check(result)
}

/// Leaves the launcher's session keyring for a new, empty one. A kernel without keyrings has nothing to leave.
pub(super) fn new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: a null name asks for an anonymous keyring; no memory is passed.
    let result = unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<libc::c_char>())
    };
    match check(result) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        other => other,
    }
}

/// Brings a network interface of this network namespace up.
pub(super) fn interface_up(socket: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    // SAFETY: `ifreq` is plain data for which zero is a value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.to_bytes()) {
        *to = libc::c_char::from_ne_bytes([*from]); // signed or not, by instruction set
    }
    // SAFETY: both calls get a valid `ifreq`; the flags are the member of the union that the first one fills.
    unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request).into())?;
        request.ifr_ifru.ifru_flags |= i16::try_from(libc::IFF_UP).unwrap_or(1);
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request).into())
    }
}

/// Installs a seccomp filter without a listener.
pub(super) fn seccomp_filter(program: &[libc::sock_filter]) -> io::Result<()> {
    seccomp(program, 0).map(drop)
}

/// Installs a seccomp filter and returns its listener (close-on-exec).
pub(super) fn seccomp_listener(program: &[libc::sock_filter], flags: libc::c_ulong) -> io::Result<OwnedFd> {
    let fd = seccomp(program, flags | libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)?;
    // SAFETY: with NEW_LISTENER a successful call returns a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn seccomp(program: &[libc::sock_filter], flags: libc::c_ulong) -> io::Result<RawFd> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies `len` instructions from a slice of that length and does not write to it.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    check(result)?;
    RawFd::try_from(result).map_err(io::Error::other)
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A descriptor's number, as structures of the kernel want it.
pub(super) fn fd_number(fd: BorrowedFd<'_>) -> u64 {
    u64::try_from(fd.as_raw_fd()).unwrap_or(u64::MAX)
}
