//! The only unsafe code: system calls by number, made in a child that ends right after, and a fork bomb.

use std::ffi::{CStr, c_int, c_long, c_void};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// One argument of a system call.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Arg {
    /// A number, or a null pointer.
    Number(i64),
    /// A pointer to a C string.
    Text(&'static CStr),
    /// A pointer to these words, which the kernel may also write to.
    Words(&'static [u64]),
    /// A descriptor of this path, opened for reading (-1 if that fails).
    Opened(&'static CStr),
    /// A pointer to the present time as a `timeval`.
    Now,
}

/// Makes a system call in a child of its own and says how it ended: `ok`, the errno's name, or the signal that the
/// call was answered with.
pub(crate) fn call_in_child(number: c_long, arguments: &[Arg]) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let mut now = [now.as_secs(), u64::from(now.subsec_micros())];
    // Pointers into these stay good until the child is gone: it has a copy of this memory.
    let mut words: Vec<Vec<u64>> = arguments
        .iter()
        .map(|argument| if let Arg::Words(words) = argument { words.to_vec() } else { Vec::new() })
        .collect();
    let mut values = [0_i64; 6];
    for ((value, argument), words) in values.iter_mut().zip(arguments).zip(&mut words) {
        *value = match argument {
            Arg::Number(number) => *number,
            Arg::Text(text) => text.as_ptr() as i64,
            Arg::Words(_) => words.as_mut_ptr() as i64,
            Arg::Opened(path) => i64::from(open(path)),
            Arg::Now => now.as_mut_ptr() as i64,
        };
    }
    let outcome = in_child(|| {
        let [a, b, c, d, e, f] = values;
        // SAFETY: every pointer is to live memory of this child; whatever the kernel makes of it, the child ends
        // without looking at its memory again.
        let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
        // A clone that succeeds comes here twice; both halves say "ok" and end.
        if result < 0 { errno() } else { 0 }
    });
    for (value, argument) in values.iter().zip(arguments) {
        if matches!(argument, Arg::Opened(_)) && *value >= 0 {
            // SAFETY: `open` above made this descriptor and nobody else knows it.
            unsafe { libc::syscall(libc::SYS_close, *value) };
        }
    }
    outcome
}

/// The symbolic name of an errno.
pub(crate) fn name_of(errno: Option<i32>) -> String {
    errno.map_or_else(|| "unknown".to_owned(), |errno| format!("{:?}", nix::errno::Errno::from_raw(errno)))
}

/// Starts a process that forks without end, as do its children; false if not even the first fork succeeds.
pub(crate) fn fork_bomb() -> bool {
    // SAFETY: the child calls nothing but fork and nanosleep, both safe after a fork.
    let pid = unsafe { libc::fork() };
    if pid != 0 {
        return pid > 0;
    }
    loop {
        // SAFETY: as above.
        if unsafe { libc::fork() } < 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn open(path: &CStr) -> c_int {
    // SAFETY: the path is a C string, and the flags need no mode.
    unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) }
}

fn errno() -> i32 {
    nix::errno::Errno::last_raw()
}

/// Runs `attempt` in a child, which must not allocate; its errno comes back in a pipe.
fn in_child(attempt: impl FnOnce() -> i32) -> String {
    let mut pipe = [0; 2];
    // SAFETY: the array has room for the two descriptors.
    if unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return format!("no pipe: {}", name_of(Some(errno())));
    }
    let [reader, writer] = pipe;
    // SAFETY: the child makes system calls only, and ends with `_exit`, so it meets no lock of another thread.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let result = attempt();
        // SAFETY: `result` lives on this stack and has the size that is said; `_exit` does not return.
        unsafe {
            libc::write(writer, (&raw const result).cast::<c_void>(), size_of::<i32>());
            libc::_exit(0);
        }
    }
    let (mut result, mut status) = (0_i32, 0);
    // SAFETY: the descriptors are ours, the buffers have the sizes that are said, and the child is ours to wait for.
    let read = unsafe {
        libc::close(writer);
        let read = libc::read(reader, (&raw mut result).cast::<c_void>(), size_of::<i32>());
        libc::close(reader);
        if pid > 0 {
            libc::waitpid(pid, &raw mut status, 0);
        }
        read
    };
    match read {
        _ if pid < 0 => "no child: fork was refused".to_owned(),
        4 if result == 0 => "ok".to_owned(),
        4 => name_of(Some(result)),
        _ if libc::WIFSIGNALED(status) => format!("signal {}", libc::WTERMSIG(status)),
        _ => "no answer".to_owned(),
    }
}
