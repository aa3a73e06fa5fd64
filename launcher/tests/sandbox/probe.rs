//! What runs inside: this very test program, copied into the image, tells what it sees as `key=value` lines.

use std::fs;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

/// Runs the part that is asked for.
pub fn run(part: &str) {
    match part {
        "status" => status(),
        "calls" => calls(),
        "foreign-call" => foreign_call(),
        "listen" => listen(),
        other => panic!("the probe has no part {other}"),
    }
}

fn status() {
    println!("pid={}", std::process::id());
    println!("hostname={}", nix::unistd::gethostname().unwrap().display());
    println!("cwd={}", std::env::current_dir().unwrap().display());
    println!("exe={}", fs::read_link("/proc/1/exe").unwrap().display());
    println!("home={}", std::env::var("HOME").unwrap());
    println!("uid_map={}", words(&fs::read_to_string("/proc/self/uid_map").unwrap()));
    println!("gid_map={}", words(&fs::read_to_string("/proc/self/gid_map").unwrap()));
    println!("cgroup={}", words(&fs::read_to_string("/proc/self/cgroup").unwrap()));
    for line in fs::read_to_string("/proc/self/status").unwrap().lines() {
        let (key, value) = line.split_once(':').unwrap();
        println!("{key}={}", words(value));
    }
    println!("sid={}", nix::unistd::getsid(None).unwrap());
    println!(
        "processes={}",
        entries("/proc").into_iter().filter(|name| name.parse::<u32>().is_ok()).collect::<String>()
    );
    println!("interfaces={}", entries("/sys/class/net").join(" "));
    // The one beyond the standard three is the directory being read.
    println!("fds={}", entries("/proc/self/fd").join(" "));
    println!("dev={}", entries("/dev").join(" "));
    println!("firmware={}", entries("/sys/firmware").join(" "));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let targets: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    println!("mounts={}", targets.join(" "));
    println!("propagation={}", mounts.contains("shared:") || mounts.contains("master:"));
    let (soft, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    println!("nofile={soft} {hard}");
    let (_, core) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_CORE).unwrap();
    println!("core={core}");
    println!("sysfs={:?}", fs::write("/sys/kernel/x", "").unwrap_err().kind());
    println!("proc_sys={:?}", fs::read("/proc/sys/kernel/core_pattern").unwrap_err().kind());
    println!("sysrq={:?}", fs::write("/proc/sysrq-trigger", "").unwrap_err().kind());
    println!("own_exe={:?}", fs::File::options().write(true).open("/proc/self/exe").unwrap_err().kind());
}

/// Makes one forbidden call after the other and prints each one's error number (0 if it succeeded).
fn calls() {
    const NEWUSER: libc::c_long = libc::CLONE_NEWUSER as libc::c_long;
    let path = c"/tmp/x".as_ptr() as libc::c_long;
    let own = nix::unistd::getpid().as_raw().into();
    let node = libc::makedev(1, 3).try_into().unwrap();
    let namespace = std::os::fd::IntoRawFd::into_raw_fd(fs::File::open("/proc/self/ns/net").unwrap()).into();
    let table: &[(&str, libc::c_long, [libc::c_long; 5])] = &[
        ("mount", libc::SYS_mount, [path, path, 0, libc::MS_BIND as libc::c_long, 0]),
        ("umount", libc::SYS_umount2, [c"/proc".as_ptr() as libc::c_long, 2, 0, 0, 0]),
        ("fsopen", libc::SYS_fsopen, [c"tmpfs".as_ptr() as libc::c_long, 0, 0, 0, 0]),
        ("open_tree", libc::SYS_open_tree, [-100, c"/".as_ptr() as libc::c_long, 1, 0, 0]),
        ("pivot_root", libc::SYS_pivot_root, [path, path, 0, 0, 0]),
        ("chroot", libc::SYS_chroot, [c"/".as_ptr() as libc::c_long, 0, 0, 0, 0]),
        ("unshare", libc::SYS_unshare, [NEWUSER, 0, 0, 0, 0]),
        ("clone", libc::SYS_clone, [NEWUSER, 0, 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [0, 0, 0, 0, 0]),
        ("setns", libc::SYS_setns, [namespace, 0, 0, 0, 0]),
        ("mknod", libc::SYS_mknodat, [-100, path, libc::S_IFCHR as libc::c_long | 0o666, node, 0]),
        ("sethostname", libc::SYS_sethostname, [path, 1, 0, 0, 0]),
        ("keyctl", libc::SYS_keyctl, [0, -3, 0, 0, 0]),
        ("add_key", libc::SYS_add_key, [path, path, 0, 0, -3]),
        ("bpf", libc::SYS_bpf, [0, 0, 0, 0, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, [1, 0, 0, 0, 0]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [0, 0, 0, 0, 0]),
        ("process_vm_readv", libc::SYS_process_vm_readv, [own, 0, 0, 0, 0]),
        ("perf_event_open", libc::SYS_perf_event_open, [0, 0, -1, -1, 0]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, [-100, 0, 0, 0, 0]),
        ("init_module", libc::SYS_init_module, [0, 0, 0, 0, 0]),
        ("kexec_load", libc::SYS_kexec_load, [0, 0, 0, 0, 0]),
        ("reboot", libc::SYS_reboot, [0, 0, 0, 0, 0]),
        ("swapon", libc::SYS_swapon, [path, 0, 0, 0, 0]),
        ("syslog", libc::SYS_syslog, [10, 0, 0, 0, 0]),
        ("vsock", libc::SYS_socket, [40, 1, 0, 0, 0]),
        ("alg", libc::SYS_socket, [38, 5, 0, 0, 0]),
        ("packet", libc::SYS_socket, [17, 3, 0, 0, 0]),
        ("raw", libc::SYS_socket, [2, 3, 1, 0, 0]),
        ("personality", libc::SYS_personality, [0x0004_0000, 0, 0, 0, 0]),
        ("from_the_future", 600, [0; 5]),
        ("x32", 0x4000_0001, [0; 5]),
    ];
    for (name, number, [a, b, c, d, e]) in table {
        // SAFETY: each call is refused before it looks at its arguments; if one is not, the test fails.
        let result = unsafe { libc::syscall(*number, *a, *b, *c, *d, *e) };
        let errno = if result < 0 { std::io::Error::last_os_error().raw_os_error().unwrap() } else { 0 };
        println!("{name}={errno}");
    }
    // Threads and processes are made with `clone`, after `clone3` said that it does not exist.
    println!("threads={}", std::thread::spawn(|| 7).join().unwrap());
    let ended = Command::new("/bin/probe").arg("foreign-call").status().unwrap();
    println!("foreign_call={}", ended.signal().unwrap_or_default());
}

/// A call of the 32-bit instruction set, whose numbers mean other things.
fn foreign_call() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: call 20 of the 32-bit table is getpid, which touches no memory.
    unsafe {
        std::arch::asm!("int 0x80", inout("eax") 20 => _, out("rcx") _, out("r11") _);
    }
}

fn listen() {
    let listener = TcpListener::bind("127.0.0.1:80").unwrap();
    println!("bound={}", listener.local_addr().unwrap());
    println!("taken={}", TcpListener::bind("127.0.0.1:80").unwrap_err().kind() == ErrorKind::AddrInUse);
}

fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn entries(directory: &str) -> Vec<String> {
    let list = fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        list.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
