//! The supervisor's side of seccomp notifications, as simple as can be: every call goes on.

use std::os::fd::{AsRawFd, BorrowedFd};

const RECEIVE: libc::c_ulong = 0xc050_2100; // SECCOMP_IOCTL_NOTIF_RECV
const SEND: libc::c_ulong = 0xc018_2101; // SECCOMP_IOCTL_NOTIF_SEND

/// Lets one announced call go on; false if there is none because all who could call have ended.
pub fn answer(listener: BorrowedFd<'_>) -> bool {
    // SAFETY: both structures are plain data for which zero is a value, and the kernel's own size.
    let (mut request, mut response): (libc::seccomp_notif, libc::seccomp_notif_resp) =
        unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    // SAFETY: the kernel fills the structure that it is given.
    if unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut request) } != 0 {
        return false;
    }
    assert_eq!(i64::from(request.data.nr), libc::SYS_listen);
    response.id = request.id;
    response.flags = u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).unwrap();
    // SAFETY: the kernel reads the structure that it is given.
    unsafe { libc::ioctl(listener.as_raw_fd(), SEND, &raw mut response) == 0 }
}

/// Puts this process beneath a listener whose filter allows everything.
pub fn install_listener() -> std::io::Result<()> {
    let mut allow = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
    let program = libc::sock_fprog { len: 1, filter: &raw mut allow };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    // SAFETY: the program is one valid instruction that outlives the call.
    let fd =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    // The listener must stay open across exec, or there is none to be in the way.
    let fd = i32::try_from(fd).map_err(std::io::Error::other)?;
    // SAFETY: this changes a mark of a descriptor that we have just got.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(())
    }
}
