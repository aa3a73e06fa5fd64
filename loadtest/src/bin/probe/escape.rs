//! The isolation checklist, from inside: everything here must be refused to a tenant.
//!
//! Each attempt is one system call in a child of its own, with arguments that do no harm where it is allowed after all.

use serde_json::{Map, Value};

use crate::raw::Arg::{self, Now, Number as N, Opened, Text, Words};
use crate::raw::call_in_child;

type Attempt = (&'static str, libc::c_long, &'static [Arg]);

/// Every attempt's name with `ok`, an errno's name (`EPERM`, `ENOSYS`, `EROFS`, …) or the signal that ended it.
/// Nothing is tried unless this is pid 1: on a host, as root, most of it would succeed.
pub(crate) fn attempts() -> Value {
    if std::process::id() != 1 {
        return Value::from("not tried: this is not pid 1 of a container");
    }
    let tables = [NAMESPACES, MOUNTS, KERNEL, PROCESSES, SOCKETS, FILES];
    let tried: Map<String, Value> = tables
        .into_iter()
        .flatten()
        .map(|(name, number, arguments)| ((*name).to_owned(), Value::from(call_in_child(*number, arguments))))
        .collect();
    let _ = std::fs::remove_file("/escape-block");
    let _ = std::fs::remove_file("/escape-char");
    Value::from(tried)
}

const fn flag(bits: i32) -> Arg {
    N(bits as i64)
}

const NULL: Arg = N(0);
const CHILD_EXITS: i64 = libc::SIGCHLD as i64;
const HERE: Arg = flag(libc::AT_FDCWD);

const NAMESPACES: &[Attempt] = &[
    ("unshare(NEWUSER)", libc::SYS_unshare, &[flag(libc::CLONE_NEWUSER)]),
    ("unshare(NEWNS)", libc::SYS_unshare, &[flag(libc::CLONE_NEWNS)]),
    ("unshare(NEWNET)", libc::SYS_unshare, &[flag(libc::CLONE_NEWNET)]),
    (
        "clone(NEWUSER)",
        libc::SYS_clone,
        &[N(libc::CLONE_NEWUSER as i64 | CHILD_EXITS), NULL, NULL, NULL, NULL],
    ),
    ("clone(NEWNS)", libc::SYS_clone, &[N(libc::CLONE_NEWNS as i64 | CHILD_EXITS), NULL, NULL, NULL, NULL]),
    ("clone3", libc::SYS_clone3, &[Words(&[0, 0, 0, 0, CHILD_EXITS as u64, 0, 0, 0, 0, 0, 0]), N(88)]),
    ("setns", libc::SYS_setns, &[Opened(c"/proc/self/ns/net"), NULL]),
];

const MOUNTS: &[Attempt] = &[
    ("mount", libc::SYS_mount, &[Text(c"none"), Text(c"/"), Text(c"tmpfs"), NULL, NULL]),
    ("mount(proc)", libc::SYS_mount, &[Text(c"proc"), Text(c"/"), Text(c"proc"), NULL, NULL]),
    (
        "mount(cgroup)",
        libc::SYS_mount,
        &[Text(c"cgroup"), Text(c"/"), Text(c"cgroup"), NULL, Text(c"memory")],
    ),
    ("umount2", libc::SYS_umount2, &[Text(c"/dev"), flag(libc::MNT_EXPIRE)]),
    ("fsopen", libc::SYS_fsopen, &[Text(c"tmpfs"), NULL]),
    ("open_tree", libc::SYS_open_tree, &[HERE, Text(c"/"), N(1)]),
    ("move_mount", libc::SYS_move_mount, &[HERE, Text(c"/dev"), HERE, Text(c"/"), NULL]),
    ("mount_setattr", libc::SYS_mount_setattr, &[HERE, Text(c"/"), NULL, Words(&[0, 0, 0, 0]), N(32)]),
    ("pivot_root", libc::SYS_pivot_root, &[Text(c"."), Text(c".")]),
    ("chroot", libc::SYS_chroot, &[Text(c"/")]),
    (
        "open_by_handle_at",
        libc::SYS_open_by_handle_at,
        &[Opened(c"/"), Words(&[0x1_0000_0008, 2, 0, 0]), NULL],
    ),
    ("mknod(block)", libc::SYS_mknodat, &[HERE, Text(c"/escape-block"), flag(0o060_600), N(0x800)]),
    ("mknod(char)", libc::SYS_mknodat, &[HERE, Text(c"/escape-char"), flag(0o020_600), N(0x101)]),
];

const KERNEL: &[Attempt] = &[
    ("keyctl", libc::SYS_keyctl, &[NULL, N(-3), NULL, NULL, NULL]),
    ("add_key", libc::SYS_add_key, &[Text(c"user"), Text(c"escape"), Text(c"x"), N(1), N(-2)]),
    ("request_key", libc::SYS_request_key, &[Text(c"user"), Text(c"escape"), NULL, NULL]),
    ("bpf", libc::SYS_bpf, &[NULL, Words(&[0x4_0000_0002, 0x1_0000_0004, 0, 0, 0, 0, 0, 0, 0]), N(72)]),
    ("userfaultfd", libc::SYS_userfaultfd, &[N(1)]),
    ("io_uring_setup", libc::SYS_io_uring_setup, &[N(1), Words(&[0; 15])]),
    ("perf_event_open", libc::SYS_perf_event_open, &[Words(&PERF_CLOCK), NULL, N(-1), N(-1), NULL]),
    ("init_module", libc::SYS_init_module, &[Text(c"x"), N(1), Text(c"")]),
    ("finit_module", libc::SYS_finit_module, &[N(-1), Text(c""), NULL]),
    ("delete_module", libc::SYS_delete_module, &[Text(c"no_such_module"), flag(libc::O_NONBLOCK)]),
    ("kexec_load", libc::SYS_kexec_load, &[NULL, NULL, NULL, NULL]),
    ("kexec_file_load", libc::SYS_kexec_file_load, &[N(-1), N(-1), NULL, Text(c""), NULL]),
    // Ctrl-Alt-Del off: what it is in a container anyway.
    ("reboot", libc::SYS_reboot, &[N(0xfee1_dead), N(672_274_793), NULL, NULL]),
    ("settimeofday", libc::SYS_settimeofday, &[Now, NULL]),
    ("clock_settime", libc::SYS_clock_settime, &[NULL, Now]),
    ("swapon", libc::SYS_swapon, &[Text(c"/dev/null"), NULL]),
    ("acct", libc::SYS_acct, &[Text(c"/dev/null")]),
    ("syslog", libc::SYS_syslog, &[N(3), Words(&[0; 8]), N(64)]),
    ("fanotify_init", libc::SYS_fanotify_init, &[NULL, NULL]),
    ("quotactl", libc::SYS_quotactl, &[NULL, NULL, NULL, NULL]),
    #[cfg(target_arch = "x86_64")]
    ("iopl", libc::SYS_iopl, &[N(3)]),
    #[cfg(target_arch = "x86_64")]
    ("ioperm", libc::SYS_ioperm, &[N(0x80), N(1), N(1)]),
];

/// `perf_event_attr` of the software CPU clock: type 1, size 128.
const PERF_CLOCK: [u64; 16] = [0x80_0000_0001, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

const PROCESSES: &[Attempt] = &[
    ("ptrace(pid 1)", libc::SYS_ptrace, &[N(0x4206), N(1), NULL, NULL]),
    ("personality(ADDR_NO_RANDOMIZE)", libc::SYS_personality, &[flag(libc::ADDR_NO_RANDOMIZE)]),
    ("vhangup", libc::SYS_vhangup, &[]),
    ("ioctl(TIOCSTI)", libc::SYS_ioctl, &[NULL, N(0x5412), Text(c"x")]),
];

const SOCKETS: &[Attempt] = &[
    ("socket(AF_VSOCK)", libc::SYS_socket, &[flag(libc::AF_VSOCK), flag(libc::SOCK_STREAM), NULL]),
    ("socket(AF_ALG)", libc::SYS_socket, &[flag(libc::AF_ALG), flag(libc::SOCK_SEQPACKET), NULL]),
    ("socket(AF_PACKET)", libc::SYS_socket, &[flag(libc::AF_PACKET), flag(libc::SOCK_RAW), NULL]),
    ("socket(AF_KEY)", libc::SYS_socket, &[flag(libc::AF_KEY), flag(libc::SOCK_RAW), N(2)]),
    ("socket(raw icmp)", libc::SYS_socket, &[flag(libc::AF_INET), flag(libc::SOCK_RAW), N(1)]),
];

const FILES: &[Attempt] = &[
    (
        "write /proc/sys/kernel/core_pattern",
        libc::SYS_openat,
        &[HERE, Text(c"/proc/sys/kernel/core_pattern"), WRITE],
    ),
    ("write /proc/sys/kernel/hostname", libc::SYS_openat, &[HERE, Text(c"/proc/sys/kernel/hostname"), WRITE]),
    ("write /proc/sysrq-trigger", libc::SYS_openat, &[HERE, Text(c"/proc/sysrq-trigger"), WRITE]),
    ("write /proc/irq", libc::SYS_openat, &[HERE, Text(c"/proc/irq/default_smp_affinity"), WRITE]),
    ("write /proc/self/exe", libc::SYS_openat, &[HERE, Text(c"/proc/self/exe"), WRITE]),
    ("write /sys", libc::SYS_openat, &[HERE, Text(c"/sys/escape"), CREATE, flag(0o600)]),
    ("write /sys/kernel/uevent_helper", libc::SYS_openat, &[HERE, Text(c"/sys/kernel/uevent_helper"), WRITE]),
    ("release_agent", libc::SYS_openat, &[HERE, Text(c"/sys/fs/cgroup/release_agent"), WRITE]),
    ("release_agent(memory)", libc::SYS_openat, &[HERE, Text(c"/sys/fs/cgroup/memory/release_agent"), WRITE]),
    ("cgroup.procs", libc::SYS_openat, &[HERE, Text(c"/sys/fs/cgroup/cgroup.procs"), WRITE]),
    ("cgroup.procs(pids)", libc::SYS_openat, &[HERE, Text(c"/sys/fs/cgroup/pids/cgroup.procs"), WRITE]),
    ("read /proc/kcore", libc::SYS_openat, &[HERE, Text(c"/proc/kcore"), READ]),
    ("open /dev/kmsg", libc::SYS_openat, &[HERE, Text(c"/dev/kmsg"), READ]),
    ("open /dev/mem", libc::SYS_openat, &[HERE, Text(c"/dev/mem"), READ]),
    ("open /dev/kvm", libc::SYS_openat, &[HERE, Text(c"/dev/kvm"), READ]),
    ("open /dev/fuse", libc::SYS_openat, &[HERE, Text(c"/dev/fuse"), READ]),
    ("open /dev/vda", libc::SYS_openat, &[HERE, Text(c"/dev/vda"), READ]),
];

const READ: Arg = flag(libc::O_RDONLY);
const WRITE: Arg = flag(libc::O_WRONLY);
const CREATE: Arg = flag(libc::O_WRONLY | libc::O_CREAT);
