//! Where an app's files come from: images that change, and volumes of the DataPool.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::Path,
};

use crate::{
    host::Host,
    http::get,
    vhost::{Vhost, images},
};

/// Debian's shell does `first`, then becomes the probe, which lies in the volume: it is in no image of Debian.
fn debian_with_a_volume(name: &str, read_only: bool, first: &str) -> (String, Vec<u8>) {
    let text = format!(
        "server-name = [\"{name}.test\"]\n[container]\nimage = \"dir:{}/phpinfo\"\n\
         command = [\"/bin/sh\", \"-c\", \"{first}; exec /data/probe\"]\nport = 8080\n\
         [[volume]]\nsource = \"blog/content\"\ntarget = \"/data\"\nread-only = {read_only}\n",
        images().display()
    );
    (format!("{name}.toml"), text.into_bytes())
}

fn fill_datapool(pool: &Path) {
    let content = pool.join("blog/content");
    fs::create_dir_all(&content).unwrap();
    fs::copy(images().join("probe/probe"), content.join("probe")).unwrap();
}

#[test]
fn a_volume_keeps_what_the_app_writes() {
    let file = debian_with_a_volume("blog", false, "echo visitors >> /data/made");
    let host = Host::up_after(&[file], &[], |folder| fill_datapool(&folder.join("s/datapool")));
    let visit = || host.ask(&get("blog.test", "/")).unwrap().expect_status(200).generation();

    let first = visit();
    host.ctl_ok(&["stop", "blog"]);
    assert!(visit() > first, "another instance");

    let made = host.state.join("datapool/blog/content/made");
    assert_eq!(fs::read_to_string(&made).unwrap(), "visitors\nvisitors\n", "both wrote into the same file");
    let owner = fs::metadata(&made).unwrap().uid();
    assert_eq!(
        owner, 0,
        "ids are mapped: what the app's root makes belongs to root in the pool, for every app"
    );
    host.end();
}

#[test]
fn a_read_only_volume_cannot_be_written_to() {
    let pool = tempfile::Builder::new().prefix("fcpool").tempdir_in("/tmp").unwrap();
    fill_datapool(pool.path());
    let file = debian_with_a_volume("blog", true, "echo x > /data/made");
    let host = Host::up_after(&[file], &["--datapool", &pool.path().to_string_lossy()], |_| {});

    host.ask(&get("blog.test", "/")).unwrap().expect_status(200);

    assert!(!pool.path().join("blog/content/made").exists());
    let log = host.ctl_ok(&["logs", "blog"]);
    assert!(log.contains("Read-only file system"), "{log}");
    host.end();
}

#[test]
fn a_volume_never_leads_out_of_the_datapool() {
    let file = debian_with_a_volume("blog", false, "true");
    let host = Host::up_after(&[file], &[], |folder| {
        let elsewhere = folder.join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        fs::copy(images().join("probe/probe"), elsewhere.join("probe")).unwrap();
        fs::create_dir_all(folder.join("s/datapool/blog")).unwrap();
        symlink(&elsewhere, folder.join("s/datapool/blog/content")).unwrap();
    });

    host.ask(&get("blog.test", "/")).unwrap().expect_status(502);

    let events = host.events("blog");
    assert!(
        events.iter().any(|e| e["message"].as_str().unwrap().contains("beneath the DataPool")),
        "{events:?}"
    );
    host.end();
}

#[test]
fn an_app_with_volumes_on_a_host_without_a_datapool_is_told_how_to_give_one() {
    let host = Host::up_with(&[debian_with_a_volume("blog", false, "true")]);

    let woken = host.ctl(&["wake", "blog"]);

    assert_eq!(woken.status.code(), Some(1));
    let said = String::from_utf8_lossy(&woken.stderr).into_owned();
    assert!(said.contains("no DataPool") && said.contains("--datapool"), "{said}");
    host.end();
}

#[test]
fn a_changed_folder_of_an_image_is_used_from_the_next_start_on() {
    let image = tempfile::Builder::new().prefix("fcimg").tempdir_in("/tmp").unwrap();
    fs::set_permissions(image.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::copy(images().join("probe/probe"), image.path().join("probe")).unwrap();
    let blog = Vhost::probe("blog");
    let text = blog
        .text()
        .replace(&format!("dir:{}/probe", images().display()), &format!("dir:{}", image.path().display()));
    let host = Host::up_with(&[("blog.toml".into(), text.into_bytes())]);
    let has_news = || {
        let facts = host.get(&blog, "/escape").json()["facts"].clone();
        facts["root_entries"].as_array().unwrap().contains(&"news".into())
    };
    assert!(!has_news());

    fs::write(image.path().join("news"), "spring").unwrap();
    host.ctl_ok(&["stop", "blog"]);

    assert!(has_news());
    host.end();
}
