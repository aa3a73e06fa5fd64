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
