//! What a container sees, and what it cannot do.

use std::fs;
use std::os::unix::fs::chown;

use crate::lab::{Container, ID_BASE, Image};

pub fn the_first_process_is_alone_in_its_own_world() {
    let image = Image::new();

    let seen = Container::new(&image, &["probe", "status"]).run();

    assert_eq!((seen.code, seen.stderr.as_str()), (0, ""), "{seen:#?}");
    let expected = [
        ("pid", "1"),
        ("sid", "1"),
        ("PPid", "0"),
        ("hostname", "lab-1"),
        ("cwd", "/"),
        ("exe", "/bin/probe"),
        ("home", "/root"),
        ("processes", "1"),
        ("interfaces", "lo"),
        ("fds", "0 1 2 3"),
        ("dev", "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero"),
        ("firmware", ""),
        ("mounts", "/ /proc /dev /dev/pts /dev/shm /sys /sys/firmware"),
        ("propagation", "false"),
        ("nofile", "256 256"),
        ("core", "0"),
        ("Umask", "0022"),
        ("SigBlk", "0000000000000000"),
        ("sysfs", "ReadOnlyFilesystem"),
        ("proc_sys", "NotFound"),
        ("sysrq", "NotFound"),
    ];
    for (key, value) in expected {
        // Machines with other firmware tables have one or two masks more.
        let found = seen.value(key);
        let found = if key == "mounts" { found.split(" /sys/devices").next().unwrap() } else { found };
        assert_eq!(found, value, "{key}");
    }
    assert!(
        ["ExecutableFileBusy", "ReadOnlyFilesystem"].contains(&seen.value("own_exe")),
        "{}",
        seen.value("own_exe")
    );
}

pub fn root_inside_has_nine_capabilities_over_its_own_ids_and_no_way_to_more() {
    let image = Image::new();

    let seen = Container::new(&image, &["probe", "status"]).run();

    let nine = "00000000000005fb";
    assert_eq!(seen.value("Uid"), "0 0 0 0");
    assert_eq!(seen.value("uid_map"), format!("0 {ID_BASE} 65536"));
    assert_eq!(seen.value("gid_map"), format!("0 {ID_BASE} 65536"));
    for (set, value) in [("CapPrm", nine), ("CapEff", nine), ("CapBnd", nine)] {
        assert_eq!(seen.value(set), value, "{set}");
    }
    assert_eq!((seen.value("CapInh"), seen.value("CapAmb")), ("0000000000000000", "0000000000000000"));
    assert_eq!(
        (seen.value("NoNewPrivs"), seen.value("Seccomp"), seen.value("Seccomp_filters")),
        ("1", "2", "1")
    );
}

pub fn an_ordinary_user_has_its_groups_and_home_and_no_capability() {
    let image = Image::new();

    let seen = Container::new(&image, &["probe", "status"]).user("www-data").run();

    assert_eq!(seen.value("Uid"), "33 33 33 33");
    assert_eq!(seen.value("Gid"), "33 33 33 33");
    assert_eq!(seen.value("Groups"), "101");
    assert_eq!(seen.value("home"), "/var/www");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(seen.value(set), "0000000000000000", "{set}");
    }
}

pub fn forbidden_calls_fail_with_the_documented_error() {
    let image = Image::new();

    for user in ["", "www-data"] {
        let seen = Container::new(&image, &["probe", "calls"]).user(user).run();

        assert_eq!(seen.code, 0, "{seen:#?}");
        let mut checked = 0;
        for line in seen.stdout.lines() {
            let (name, result) = line.split_once('=').unwrap();
            let expected = match name {
                "clone3" | "from_the_future" | "x32" => libc::ENOSYS,
                "vsock" | "alg" | "packet" => libc::EAFNOSUPPORT,
                "threads" => 7,
                "foreign_call" => libc::SIGSYS,
                _ => libc::EPERM,
            };
            assert_eq!(result, expected.to_string(), "{name}");
            checked += 1;
        }
        assert_eq!(checked, 35);
    }
}

pub fn a_user_without_capabilities_binds_port_80_and_its_listen_is_announced() {
    let image = Image::new();

    let seen = Container::new(&image, &["probe", "listen"]).user("www-data").run();

    assert_eq!(seen.value("bound"), "127.0.0.1:80");
    assert_eq!(seen.value("taken"), "true");
    assert_eq!(seen.listens, 1, "{seen:#?}");
}

pub fn the_image_belongs_to_the_containers_ids() {
    let image = Image::new();
    let page = image.path().join("var/www/page");
    fs::write(&page, "hello").unwrap();
    chown(&page, Some(33), Some(33)).unwrap();

    let seen =
        Container::shell(&image, "stat -c %u:%g /etc/passwd /var/www/page /etc/hosts /tmp /run / /dev/null")
            .run();

    assert_eq!(seen.stdout, "0:0\n33:33\n0:0\n0:0\n0:0\n0:0\n0:0\n");
}

pub fn writing_changes_the_upper_layer_only_and_ends_with_it() {
    let image = Image::new();
    let before = image.fingerprint();
    let script = "echo changed > /etc/passwd; rm /etc/group; mv /var/www /var/moved && touch /var/moved/x; \
                  chmod 777 /bin; touch /new; ls -d /new /var/moved/x";

    let first = Container::shell(&image, script).run();
    let second = Container::shell(&image, "ls -d /etc/group /var/www && ls /new").run();

    assert_eq!(first.stdout, "/new\n/var/moved/x\n", "{first:#?}");
    assert_eq!(second.stdout, "/etc/group\n/var/www\n");
    assert_eq!(second.code, 1, "what the first one made is gone");
    assert_eq!(image.fingerprint(), before);
}

pub fn the_writable_layer_and_shared_memory_are_limited() {
    let image = Image::new();
    let script = "head() { busybox dd if=/dev/zero of=$1 bs=1M count=64 2>&1 | grep -c 'No space'; rm $1; }; \
                  grep() { busybox grep \"$@\"; }; head /big; head /dev/shm/big; head /dev/big";

    let seen = Container::shell(&image, script).run();

    assert_eq!(seen.stdout, "1\n1\n1\n", "{seen:#?}");
}

pub fn a_higher_layer_covers_a_lower_one() {
    let (lower, upper) = (Image::new(), Image::bare());
    fs::create_dir(upper.path().join("etc")).unwrap();
    fs::write(upper.path().join("etc/motd"), "from above").unwrap();
    fs::write(lower.path().join("etc/motd"), "from below").unwrap();
    fs::write(lower.path().join("etc/issue"), "still here").unwrap();
    let middle: Vec<Image> = (0..20).map(|_| Image::bare()).collect();
    let container =
        middle.iter().fold(Container::shell(&lower, "cat /etc/motd /etc/issue"), Container::layer);

    let seen = container.layer(&upper).run();

    assert_eq!(seen.stdout, "from abovestill here", "{seen:#?}");
}

pub fn standard_output_can_be_reopened_by_an_ordinary_user() {
    let image = Image::new();

    let seen = Container::shell(&image, "echo out > /dev/stdout; echo err > /dev/stderr; cat < /dev/stdin")
        .user("33")
        .run();

    assert_eq!((seen.stdout.as_str(), seen.stderr.as_str(), seen.code), ("out\n", "err\n", 0));
}

pub fn files_that_the_image_lacks_are_provided_and_what_it_has_stays() {
    let (bare, own) = (Image::new(), Image::new());
    fs::write(own.path().join("etc/hosts"), "10.0.0.1 mine\n").unwrap();
    fs::write(own.path().join("etc/hostname"), "").unwrap();

    let script = "cat /etc/hosts /etc/hostname";
    let (provided, kept) = (Container::shell(&bare, script).run(), Container::shell(&own, script).run());

    assert!(provided.stdout.starts_with("127.0.0.1\tlocalhost lab-1\n"), "{provided:#?}");
    assert_eq!(kept.stdout, "10.0.0.1 mine\nlab-1\n");
}
