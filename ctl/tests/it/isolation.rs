//! What an app sees and can do from inside its container: the checklist of the container runtimes' CVEs.

use serde_json::Value;

use crate::{host::Host, vhost::Vhost};

fn from_inside(vhost: &Vhost) -> Value {
    let host = Host::up(&[vhost]);
    let report = host.get(vhost, "/escape").json();
    host.end();
    report
}

/// What the seccomp filter refuses, whoever asks.
const REFUSED: &[&str] = &[
    "acct",
    "add_key",
    "bpf",
    "chroot",
    "clock_settime",
    "clone(NEWNS)",
    "clone(NEWUSER)",
    "delete_module",
    "fanotify_init",
    "finit_module",
    "fsopen",
    "init_module",
    "io_uring_setup",
    "ioperm",
    "iopl",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "mknod(block)",
    "mknod(char)",
    "mount",
    "mount(cgroup)",
    "mount(proc)",
    "mount_setattr",
    "move_mount",
    "open_by_handle_at",
    "open_tree",
    "perf_event_open",
    "personality(ADDR_NO_RANDOMIZE)",
    "pivot_root",
    "ptrace(pid 1)",
    "quotactl",
    "reboot",
    "request_key",
    "setns",
    "settimeofday",
    "swapon",
    "syslog",
    "umount2",
    "unshare(NEWNET)",
    "unshare(NEWNS)",
    "unshare(NEWUSER)",
    "userfaultfd",
    "vhangup",
    "socket(raw icmp)",
];

#[test]
fn every_way_out_is_refused_with_its_documented_error() {
    let report = from_inside(&Vhost::probe("blog"));
    let attempts = report["attempts"].as_object().unwrap_or_else(|| panic!("{report}"));

    for name in REFUSED.iter().filter(|name| !cfg!(not(target_arch = "x86_64")) || !name.starts_with("io")) {
        assert_eq!(attempts[*name], "EPERM", "{name}");
    }
    // libc falls back to what the filter can look into.
    assert_eq!(attempts["clone3"], "ENOSYS");
    for family in ["AF_ALG", "AF_VSOCK", "AF_KEY", "AF_PACKET"] {
        assert_eq!(attempts[&format!("socket({family})")], "EAFNOSUPPORT", "{family}");
    }
    assert_eq!(attempts["write /sys"], "EROFS");
    assert_eq!(attempts["write /proc/self/exe"], "ETXTBSY");
    for (name, outcome) in attempts {
        assert_ne!(outcome, "ok", "{name} must not succeed");
        if name.starts_with("open /dev/")
            || name.starts_with("write /proc/sys")
            || name.starts_with("release_agent")
        {
            assert_eq!(outcome, "ENOENT", "{name}");
        }
    }
}

#[test]
fn an_app_sees_itself_and_nothing_else() {
    let report = from_inside(&Vhost::probe("blog"));
    let facts = &report["facts"];

    assert_eq!(facts["inherited_descriptors"], serde_json::json!([]));
    assert_eq!(facts["cwd"], "/");
    assert_eq!((&facts["pid"], &facts["other_processes"]), (&1.into(), &0.into()));
    assert_eq!(facts["hostname"], "blog");
    assert_eq!(facts["interfaces"], serde_json::json!(["lo"]));
    assert_eq!(facts["dev_null_is_the_device"], true);
    assert_eq!(facts["readable_secrets"], serde_json::json!([]));
    assert_eq!((&facts["no_new_privs"], &facts["seccomp"]), (&"1".into(), &"2".into()));
    for (name, set) in
        [("cap_inheritable", 0), ("cap_ambient", 0), ("cap_bounding", 0x5fb), ("cap_effective", 0x5fb)]
    {
        assert_eq!(
            facts[name],
            format!("{set:016x}"),
            "{name}: chown … kill and net_bind_service, containerd's nine"
        );
    }
    let map: Vec<u64> =
        facts["uid_map"].as_str().unwrap().split_whitespace().map(|n| n.parse().unwrap()).collect();
    assert_eq!((map[0], map[2]), (0, 65_536));
    assert!(map[1] >= 0x4000_0000, "its root is nobody on the host");
    let writable: Vec<&str> = facts["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .filter(|mount| mount.contains(" rw,") && !mount.contains("nosuid"))
        .collect();
    assert!(writable.is_empty(), "{writable:?}");
    let cgroups = facts["cgroup"].as_str().unwrap();
    assert!(!cgroups.contains("fastcontainer"), "its own cgroup is the root of its view: {cgroups}");
}

#[test]
fn an_app_that_is_not_its_root_has_no_capability() {
    let facts = from_inside(&Vhost::probe("blog").container("user = \"1000:1000\""))["facts"].clone();
    assert_eq!((&facts["uid"], &facts["gid"]), (&1000.into(), &1000.into()));
    for name in ["cap_permitted", "cap_effective", "cap_inheritable", "cap_ambient"] {
        assert_eq!(facts[name], "0000000000000000", "{name}");
    }
}

#[test]
fn two_apps_have_different_users_on_the_host() {
    let (red, blue) = (Vhost::probe("red"), Vhost::probe("blue"));
    let host = Host::up(&[&red, &blue]);
    let map = |vhost| host.get(vhost, "/escape").json()["facts"]["uid_map"].clone();
    assert_ne!(map(&red), map(&blue));
    host.end();
}
