//! Images and tenants that try to reach the host, and plans that cannot be carried out.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};

use tempfile::TempDir;

use crate::lab::{Container, ID_BASE, Image, fingerprint};

/// A directory of the host that must never change.
fn victim() -> TempDir {
    let victim = TempDir::new().unwrap();
    fs::set_permissions(victim.path(), fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(victim.path().join("hosts"), "").unwrap();
    fs::write(victim.path().join("secret"), "root:x:0:0::/root:/bin/sh\nevil:x:0:0::/:\n").unwrap();
    victim
}

pub fn an_image_whose_standard_directories_are_links_is_refused() {
    let victim = victim();
    let before = fingerprint(victim.path());
    for name in ["dev", "proc", "sys", "tmp", "run", "etc"] {
        for target in [victim.path().to_str().unwrap(), "bin", "/", "../../.."] {
            let image = Image::new();
            let _ = fs::remove_dir_all(image.path().join(name));
            symlink(target, image.path().join(name)).unwrap();

            let outcome = Container::shell(&image, "echo never").run();

            assert_eq!(outcome.failed_at(), ("check image directories", libc::ELOOP), "/{name} -> {target}");
            assert_eq!(outcome.stdout, "");
        }
    }
    let image = Image::new();
    fs::write(image.path().join("dev"), "").unwrap();
    let outcome = Container::shell(&image, "echo never").run();
    assert_eq!(outcome.failed_at(), ("check image directories", libc::ENOTDIR));
    assert_eq!(fingerprint(victim.path()), before);
}

pub fn links_in_etc_lead_nowhere() {
    let victim = victim();
    let before = fingerprint(victim.path());
    let image = Image::new();
    let etc = image.path().join("etc");
    symlink(victim.path().join("hosts"), etc.join("hosts")).unwrap();
    symlink(victim.path().join("new"), etc.join("resolv.conf")).unwrap();
    symlink("../../../../../../../etc/hostname", etc.join("hostname")).unwrap();

    let fine = Container::shell(&image, "readlink /etc/resolv.conf").run();
    fs::remove_file(etc.join("passwd")).unwrap();
    symlink(victim.path().join("secret"), etc.join("passwd")).unwrap();
    let stranger = Container::shell(&image, "id").user("evil").run();

    assert_eq!(fine.stdout.trim(), victim.path().join("new").to_str().unwrap());
    assert_eq!(stranger.failed_at(), ("look up user", libc::ENOENT));
    assert_eq!(fingerprint(victim.path()), before);
}

pub fn account_files_are_read_with_care() {
    let image = Image::new();
    let passwd = image.path().join("etc/passwd");

    fs::write(&passwd, "x".repeat(1024 * 1024 + 1)).unwrap();
    let huge = Container::shell(&image, "id").user("www-data").run();
    fs::remove_file(&passwd).unwrap();
    nix::unistd::mkfifo(&passwd, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let pipe = Container::shell(&image, "id").user("www-data").run();

    assert_eq!(huge.failed_at(), ("look up user", libc::EFBIG));
    assert_eq!(pipe.failed_at(), ("look up user", libc::EINVAL));
}

pub fn volumes_are_written_or_not_as_planned_and_show_the_containers_ids() {
    let image = Image::new();
    let (data, pages) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::write(pages.path().join("page"), "hello").unwrap();
    let script = "echo mine > /srv/deep/data/file; stat -c %u /srv/deep/data/file /pages/page; cat /pages/page; \
                  touch /pages/x || echo; busybox grep -E ' /(pages|srv/deep/data) ' /proc/self/mountinfo";

    let seen = Container::shell(&image, script)
        .volume(data.path(), "/srv/deep/data", false)
        .volume(pages.path(), "/pages", true)
        .run();

    assert!(seen.stdout.starts_with("0\n0\nhello\n"), "{seen:#?}");
    assert!(seen.stderr.contains("Read-only file system"), "{seen:#?}");
    assert_eq!(seen.stdout.matches("nosuid,nodev").count(), 2, "{seen:#?}");
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(data.path().join("file")).unwrap().uid(), 0, "ids are mapped back on the disk");
}

pub fn a_volume_that_knows_no_id_mapping_shows_the_hosts_ids_and_obeys_them() {
    let image = Image::new();
    let volume = TempDir::new().unwrap();
    rustix::mount::mount("ramfs", volume.path(), "ramfs", rustix::mount::MountFlags::empty(), None).unwrap();
    for (name, owner) in [("mine", ID_BASE), ("hosts", 0)] {
        fs::write(volume.path().join(name), "old").unwrap();
        chown(volume.path().join(name), Some(owner), Some(owner)).unwrap();
    }
    let script = "stat -c %u /data/mine /data/hosts; echo new > /data/mine; echo new > /data/hosts";

    let seen = Container::shell(&image, script).volume(volume.path(), "/data", false).run();

    assert_eq!(seen.stdout, "0\n65534\n", "{seen:#?}");
    assert!(seen.stderr.contains("Permission denied"), "{seen:#?}");
    assert_eq!(fs::read_to_string(volume.path().join("mine")).unwrap(), "new\n");
    assert_eq!(fs::read_to_string(volume.path().join("hosts")).unwrap(), "old");
    rustix::mount::unmount(volume.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
}

pub fn volume_targets_do_not_leave_the_root() {
    let victim = victim();
    let before = fingerprint(victim.path());
    let data = TempDir::new().unwrap();
    fs::write(data.path().join("mine"), "").unwrap();
    let image = Image::new();
    symlink(victim.path(), image.path().join("away")).unwrap();
    symlink("../../../../../../..", image.path().join("up")).unwrap();
    symlink("/var/www", image.path().join("inside")).unwrap();

    let away = Container::shell(&image, "ls /away").volume(data.path(), "/away", false).run();
    let beneath = Container::shell(&image, "ls /away").volume(data.path(), "/away/sub", false).run();
    let up = Container::shell(&image, "ls /up/new").volume(data.path(), "/up/new", false).run();
    let inside = Container::shell(&image, "ls /var/www").volume(data.path(), "/inside", false).run();

    assert_eq!(away.failed_at(), ("mount volumes", libc::EEXIST));
    assert_eq!(beneath.failed_at(), ("mount volumes", libc::EEXIST));
    assert_eq!(up.stdout, "mine\n", "the parent of the root is the root");
    assert_eq!(inside.stdout, "mine\n");
    assert_eq!(fingerprint(victim.path()), before);
    assert!(!std::path::Path::new("/new").exists());
}

pub fn a_volumes_own_links_do_not_move_the_next_volume_out() {
    let victim = victim();
    let before = fingerprint(victim.path());
    let (tenant, second) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    symlink(victim.path(), tenant.path().join("away")).unwrap();
    symlink("/proc", tenant.path().join("proc")).unwrap();
    symlink("/etc", tenant.path().join("etc")).unwrap();
    fs::write(second.path().join("mine"), "").unwrap();
    let image = Image::new();

    let with_second = |target: &str, script: &str| {
        let container = Container::shell(&image, script).volume(tenant.path(), "/data", false);
        container.volume(second.path(), target, false).run()
    };
    let away = with_second("/data/away", "true");
    let proc = with_second("/data/proc/x", "readlink /proc/self/exe");
    let etc = with_second("/data/etc/apt", "ls /etc/apt");

    assert_eq!(away.failed_at(), ("mount volumes", libc::EEXIST));
    assert_eq!(proc.stdout, "/bin/busybox\n", "{proc:#?}");
    assert_eq!(etc.stdout, "mine\n", "the container's own /etc, as the tenant could have asked for directly");
    assert_eq!(fingerprint(victim.path()), before);
    assert!(!std::path::Path::new("/etc/apt/mine").exists());
}

pub fn every_failure_names_its_step_and_error() {
    let image = Image::new();
    fs::write(image.path().join("bin/data"), "no program").unwrap();
    let shell = || Container::shell(&image, "true");
    let failure = |container: Container| container.run();

    let missing = failure(Container::new(&image, &["no-such-program", "x"]));
    assert_eq!(missing.failed_at(), ("exec", libc::ENOENT));
    assert_eq!(
        missing.error.as_ref().unwrap().to_string(),
        "exec (no-such-program): No such file or directory (os error 2)"
    );
    assert_eq!(missing.code, 125);
    assert_eq!(failure(Container::new(&image, &["/bin/data"])).failed_at(), ("exec", libc::EACCES));
    assert_eq!(failure(Container::new(&image, &[])).failed_at(), ("check plan", libc::EINVAL));
    assert_eq!(failure(shell().user("stranger")).failed_at(), ("look up user", libc::ENOENT));

    let mut container = shell();
    container.plan.workdir = "/nowhere".to_owned();
    assert_eq!(failure(container).failed_at(), ("enter workdir", libc::ENOENT));

    let mut container = shell();
    container.plan.staging = "/no/such/directory".to_owned();
    let outcome = failure(container);
    assert_eq!(outcome.failed_at(), ("mount staging", libc::ENOENT));
    assert_eq!(outcome.error.unwrap().detail, "/no/such/directory");

    let mut container = shell();
    container.plan.hostname = "x".repeat(65);
    assert_eq!(failure(container).failed_at(), ("check plan", libc::EINVAL));

    let volume = TempDir::new().unwrap();
    assert_eq!(
        failure(shell().volume(volume.path(), "/proc/1", false)).failed_at(),
        ("check plan", libc::EINVAL)
    );
}
