//! Images in layers, with a configuration of their own.

use std::{fs, path::Path, process::Command};

use serde_json::{Value, json};

use crate::{host::Host, http::get, vhost::images};

/// The one that the launcher's own tests use.
#[path = "../../../launcher/src/image/oci/fixture.rs"]
pub(crate) mod fixture;

use fixture::{Blob, Layout, Pack, tar_of};

/// A vhost file of an image, with further lines of `[container]`.
pub(crate) fn file(name: &str, image: &str, lines: &str) -> (String, Vec<u8>) {
    let text = format!("server-name = [\"{name}.test\"]\n[container]\nimage = \"{image}\"\n{lines}\n");
    (format!("{name}.toml"), text.into_bytes())
}

/// A layer with the probe as `/opt/probe`, and some files.
pub(crate) fn probe_layer(layout: &Layout, pack: Pack) -> Blob {
    let probe = fs::read(images().join("probe/probe")).unwrap();
    let entries: [(&str, &[u8]); 5] =
        [("opt/", b""), ("opt/probe", &probe), ("srv/", b""), ("old", b"old"), ("motd", b"base")];
    layout.layer(&tar_of(&entries), pack)
}

/// How the images of the probe want to be run.
pub(crate) fn probe_config() -> Value {
    json!({
        "Entrypoint": ["probe"], "Cmd": ["--ignored"], "Env": ["PATH=/opt", "GREETING=image", "KEPT=yes"],
        "User": "1000:1001", "WorkingDir": "/srv", "ExposedPorts": { "9000/tcp": {} },
    })
}

fn root_entries(host: &Host, name: &str) -> (Value, Vec<String>) {
    let answer = host.ask(&get(&format!("{name}.test"), "/escape")).unwrap().expect_status(200).json();
    let facts = answer["facts"].clone();
    let entries = serde_json::from_value(facts["root_entries"].clone()).unwrap();
    (facts, entries)
}

fn env(host: &Host, name: &str) -> Value {
    host.ask(&get(&format!("{name}.test"), "/env")).unwrap().expect_status(200).json()
}

#[test]
fn a_layered_image_runs_as_it_wants_unless_the_vhost_file_says_otherwise() {
    let folder = tempfile::Builder::new().prefix("fcoci").tempdir_in("/tmp").unwrap();
    let mut layout = Layout::new(&folder.path().join("probe"));
    let base = probe_layer(&layout, Pack::Zstd);
    let over = layout.layer(&tar_of(&[(".wh.old", b""), ("new", b"new"), ("motd", b"over")]), Pack::Gzip);
    let plain = layout.manifest(std::slice::from_ref(&base), probe_config());
    let changed = layout.manifest(&[base, over], probe_config());
    layout.list(plain, "plain").list(changed, "changed");
    let image = |tag: &str| format!("oci:{}:{tag}", layout.path.display());
    let own = "command = [\"/opt/probe\"]\nuser = \"7:8\"\nworkdir = \"/opt\"\nport = 8888\nenv = { GREETING = \"file\" }";
    let host = Host::up_with(&[
        file("plain", &image("plain"), ""),
        file("changed", &image("changed"), ""),
        file("own", &image("changed"), own),
    ]);

    let (facts, entries) = root_entries(&host, "plain");
    assert!(entries.contains(&"old".into()) && !entries.contains(&"new".into()), "{entries:?}");
    assert_eq!((facts["uid"].as_u64(), facts["gid"].as_u64()), (Some(1000), Some(1001)));
    assert_eq!(facts["cwd"], "/srv");
    let says = env(&host, "plain");
    assert_eq!((says["GREETING"].as_str(), says["PORT"].as_str()), (Some("image"), Some("9000")));

    let (_, entries) = root_entries(&host, "changed");
    assert!(entries.contains(&"new".into()) && !entries.contains(&"old".into()), "{entries:?}");

    let (facts, _) = root_entries(&host, "own");
    assert_eq!((facts["uid"].as_u64(), facts["gid"].as_u64()), (Some(7), Some(8)));
    assert_eq!(facts["cwd"], "/opt");
    let says = env(&host, "own");
    assert_eq!((says["GREETING"].as_str(), says["PORT"].as_str()), (Some("file"), Some("8888")));
    assert_eq!(says["KEPT"], "yes", "the vhost file adds to the image's environment");

    let stored = fs::read_dir(host.state.join("launcher/images")).unwrap().flatten();
    let layers = stored.filter(|e| e.file_name().to_string_lossy().starts_with("layer-")).count();
    assert_eq!(layers, 2, "both images and all three apps share them");
    assert!(host.ps("own")[0]["image"].as_str().unwrap().starts_with("oci-"));
    host.end();
}

/// Debian's Apache as one layer, without what a web server has no use for.
fn apache_layer(layout: &Layout, scratch: &Path) -> Blob {
    let archive = scratch.join("apache.tar");
    let status = Command::new("tar")
        .args(["--create", "--numeric-owner", "--exclude=./usr/share/perl*", "--exclude=./usr/lib/*/perl*"])
        .args(["--exclude=./usr/share/zoneinfo", "--exclude=./var/lib/dpkg", "--exclude=./usr/lib/*/gconv"])
        .args(["--exclude=./usr/lib/gcc*", "--exclude=./usr/bin/perl*"])
        .arg("--file")
        .arg(&archive)
        .arg("--directory")
        .arg(images().join("phpinfo"))
        .arg(".")
        .status()
        .unwrap();
    assert!(status.success());
    let layer = layout.layer(&fs::read(&archive).unwrap(), Pack::Plain);
    fs::remove_file(archive).unwrap();
    layer
}

#[test]
fn apache_and_a_site_are_layers_of_an_archive() {
    let folder = tempfile::Builder::new().prefix("fcoci").tempdir_in("/tmp").unwrap();
    let mut layout = Layout::new(&folder.path().join("layout"));
    let apache = apache_layer(&layout, folder.path());
    let site = layout.layer(
        &tar_of(&[
            ("var/", b""),
            ("var/www/", b""),
            ("var/www/html/", b""),
            ("var/www/html/.wh..wh..opq", b""),
            ("var/www/html/site.php", b"<?php echo 'the site, ', 6 * 7;"),
        ]),
        Pack::Gzip,
    );
    let run = json!({
        "Entrypoint": ["/usr/sbin/apache2", "-D", "FOREGROUND"], "ExposedPorts": { "80/tcp": {} },
        "Env": [
            "APACHE_RUN_USER=www-data", "APACHE_RUN_GROUP=www-data", "APACHE_RUN_DIR=/run/apache2",
            "APACHE_LOCK_DIR=/run/lock/apache2", "APACHE_LOG_DIR=/var/log/apache2", "APACHE_PID_FILE=/run/apache2/apache2.pid",
        ],
        "StopSignal": "SIGWINCH",
    });
    layout.image(&[apache, site], run);
    let archive = folder.path().join("site.tar");
    layout.archive(&archive);
    fs::remove_dir_all(&layout.path).unwrap();
    let host = Host::up_with(&[file("site", &format!("oci:{}", archive.display()), "")]);

    let page = host.ask(&get("site.test", "/site.php")).unwrap().expect_status(200);
    assert_eq!(page.text(), "the site, 42");
    host.ask(&get("site.test", "/index.php")).unwrap().expect_status(404);

    host.ctl_ok(&["stop", "site"]);
    let events = host.events("site");
    let ended = events.iter().find(|event| event["kind"] == "stopped").expect("it ended");
    assert!(ended["message"].as_str().unwrap().contains("stopped by the operator"), "{ended}");
    host.end();
}

#[test]
fn a_newer_image_is_used_from_the_next_start_and_a_damaged_one_is_explained() {
    let folder = tempfile::Builder::new().prefix("fcoci").tempdir_in("/tmp").unwrap();
    let mut layout = Layout::new(&folder.path().join("probe"));
    let base = probe_layer(&layout, Pack::Gzip);
    layout.image(std::slice::from_ref(&base), probe_config());
    let host = Host::up_with(&[file("blog", &format!("oci:{}", layout.path.display()), "")]);
    assert!(!root_entries(&host, "blog").1.contains(&"news".into()));

    let news = layout.layer(&tar_of(&[("news", b"spring")]), Pack::Gzip);
    layout.image(&[base.clone(), news], probe_config());
    host.ctl_ok(&["stop", "blog"]);
    assert!(root_entries(&host, "blog").1.contains(&"news".into()));

    let mut forged = layout.layer(&tar_of(&[("x", b"x")]), Pack::Gzip);
    forged.diff_id = base.diff_id.clone();
    layout.image(&[base, forged], probe_config());
    host.ctl_ok(&["stop", "blog"]);
    let woken = host.ctl(&["wake", "blog"]);
    let said = String::from_utf8_lossy(&woken.stderr).into_owned();
    assert!(said.contains("damaged or forged"), "{said}");
    host.end();
}
