//! `[[provision]]`: what an image lacks is made once, by steps that run in a container of their own.

use std::{
    fs,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::{host::Host, http::get, vhost::images};

/// The probe over Debian, so that there is a shell; `steps` is the rest of the file.
fn file(name: &str, steps: &str) -> (String, Vec<u8>) {
    let folder = images();
    let text = format!(
        "server-name = [\"{name}.test\"]\n[container]\nimage = \"dir:{0}/probe\"\nbase = \"dir:{0}/phpinfo\"\n\
         command = [\"/probe\"]\nport = 8080\n{steps}\n",
        folder.display()
    );
    (format!("{name}.toml"), text.into_bytes())
}

fn step(name: &str, script: &str) -> String {
    format!("[[provision]]\nname = \"{name}\"\nrun = [\"/bin/sh\", \"-c\", {script:?}]\n")
}

fn write(host: &Host, file: &(String, Vec<u8>)) {
    fs::write(host.conf.join(&file.0), &file.1).unwrap();
}

/// What the app sees at the top of its root.
fn root_of(host: &Host, app: &str) -> Vec<String> {
    let answer = host.ask(&get(&format!("{app}.test"), "/escape")).unwrap();
    assert_eq!(answer.status, 200, "{}\n{}", answer.text(), host.log_tail());
    let entries = answer.json()["facts"]["root_entries"].clone();
    entries.as_array().unwrap().iter().map(|entry| entry.as_str().unwrap().to_owned()).collect()
}

/// How often a step has been begun.
fn runs(host: &Host, app: &str, step: &str) -> usize {
    let begun = format!("{step:?}, runs");
    let events = host.events(app);
    events.iter().filter(|event| event["message"].as_str().unwrap().contains(&begun)).count()
}

fn layers(host: &Host) -> Vec<PathBuf> {
    let entries = fs::read_dir(host.state.join("launcher/images")).unwrap().flatten();
    let mut layers: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    layers.retain(|path| path.file_name().unwrap().to_string_lossy().starts_with("step-"));
    layers
}

fn recipe(host: &Host) -> Value {
    let images: Vec<Value> = serde_json::from_str(&host.ctl_ok(&["images", "--json"])).unwrap();
    images.into_iter().find(|image| image["image"].as_str().unwrap().contains(" + ")).unwrap_or_default()
}

#[test]
fn a_step_is_done_once_ahead_of_the_first_visit_and_again_when_it_has_changed() {
    let tools = step("tools", "echo tools > /made-tools; rm -r /usr/share/perl5; env > /made-env");
    let site = step("site", "test -e /made-tools && cp /made-tools /made-site-1");
    let host = Host::up_with(&[file("blog", &format!("{tools}{site}"))]);

    host.wait_for("the image to be provisioned", || host.count("blog", "image-provisioned") == 1);
    assert_eq!(host.states("blog"), ["absent"], "nobody has asked for it yet");
    let known = recipe(&host);
    assert_eq!((&known["state"], &known["apps"][0]), (&"ready".into(), &"blog".into()), "{known}");
    assert!(known["image"].as_str().unwrap().ends_with("/probe + tools + site"), "{known}");

    for visit in 0..3 {
        let root = root_of(&host, "blog");
        assert!(root.contains(&"made-tools".into()) && root.contains(&"made-site-1".into()), "{root:?}");
        assert_eq!((runs(&host, "blog", "tools"), runs(&host, "blog", "site")), (1, 1), "visit {visit}");
        host.ctl_ok(&["stop", "blog"]);
    }
    // An app that is made of the same finds it done.
    write(&host, &file("shop", &format!("{tools}{site}")));
    host.wait_for("the other app", || host.count("shop", "config-applied") == 1);
    assert!(root_of(&host, "shop").contains(&"made-site-1".into()));
    assert_eq!(runs(&host, "shop", "tools"), 0);
    fs::remove_file(host.conf.join("shop.toml")).unwrap();

    let site = step("site", "test ! -e /made-site-1 && cp /made-tools /made-site-2");
    write(&host, &file("blog", &format!("{tools}{site}")));
    host.wait_for("the changed step to be done", || host.count("blog", "image-provisioned") == 2);
    let root = root_of(&host, "blog");
    assert!(root.contains(&"made-site-2".into()) && !root.contains(&"made-site-1".into()), "{root:?}");
    assert_eq!((runs(&host, "blog", "tools"), runs(&host, "blog", "site")), (1, 2));
    host.wait_for("what nobody wants to be removed", || {
        host.ctl_ok(&["stop", "blog"]);
        write(&host, &file("shop", ""));
        std::thread::sleep(std::time::Duration::from_millis(300));
        fs::remove_file(host.conf.join("shop.toml")).unwrap();
        layers(&host).len() == 2
    });

    // What is in the layers: the whiteout of a folder, owners as they are inside, nothing of the step's own container.
    let of_tools = layers(&host).into_iter().find(|layer| layer.join("tree/made-env").exists()).unwrap();
    let gone = fs::symlink_metadata(of_tools.join("tree/usr/share/perl5")).unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    assert_eq!(fs::metadata(of_tools.join("tree/made-tools")).unwrap().uid(), 0);
    assert!(!of_tools.join("tree/etc/hosts").exists());
    assert!(images().join("phpinfo/usr/share/perl5").is_dir(), "the image itself is as it was");

    fs::remove_file(host.conf.join("blog.toml")).unwrap();
    host.wait_for("all to be removed", || {
        write(&host, &file("shop", ""));
        std::thread::sleep(std::time::Duration::from_millis(300));
        fs::remove_file(host.conf.join("shop.toml")).unwrap();
        layers(&host).is_empty()
    });
    host.end();
}

/// The probe alone, in an archive, with so many more files beside it; its step writes nothing.
fn archive(at: &Path, files: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(images().join("probe/probe"), folder.path().join("probe")).unwrap();
    for name in files {
        fs::write(folder.path().join(name), name).unwrap();
    }
    let new = at.with_extension("new");
    let made =
        Command::new("tar").args(["-C", &folder.path().to_string_lossy(), "-cf"]).arg(&new).arg(".").status();
    assert!(made.unwrap().success());
    fs::rename(new, at).unwrap();
}

#[test]
fn a_changed_image_is_provisioned_anew_while_the_one_before_serves() {
    let folder = tempfile::tempdir().unwrap();
    let tar = folder.path().join("site.tar");
    archive(&tar, &["old"]);
    let text = format!(
        "server-name = [\"blog.test\"]\n[container]\nimage = \"tar:{}\"\ncommand = [\"/probe\"]\nport = 8080\n\
         [[provision]]\nname = \"look\"\nrun = [\"/probe\"]\nenv = {{ EXIT_AFTER_MS = \"10\", EXIT_CODE = \"0\" }}\n",
        tar.display()
    );
    let host = Host::up_with(&[("blog.toml".into(), text.into_bytes())]);
    assert!(root_of(&host, "blog").contains(&"old".into()));
    assert_eq!(runs(&host, "blog", "look"), 1);

    archive(&tar, &["new"]);
    host.ctl_ok(&["stop", "blog"]);
    // Whichever it is: nobody waits for the step.
    let root = root_of(&host, "blog");
    assert!(root.contains(&"old".into()) || root.contains(&"new".into()), "{root:?}");
    host.wait_for("the new one", || host.count("blog", "image-provisioned") == 2);
    if root.contains(&"old".into()) {
        assert_eq!(host.ps("blog")[0]["image_is_old"], true);
    }
    host.ctl_ok(&["restart", "blog"]);
    host.wait_for("the new one to serve", || root_of(&host, "blog").contains(&"new".into()));
    assert_eq!(runs(&host, "blog", "look"), 2);
    host.end();
}

#[test]
fn a_launcher_that_is_killed_while_a_step_runs_begins_it_anew_and_leaves_nothing() {
    let slow = step("slow", "echo begun > /made; sleep 2; echo done >> /made");
    let host = Host::up_with(&[file("blog", &slow)]);
    host.wait_for("the step to run", || runs(&host, "blog", "slow") == 1);
    let launcher = host.pid_of("fastcontainer-launcher");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(launcher), nix::sys::signal::Signal::SIGKILL).unwrap();

    host.wait_for("another launcher", || {
        host.find_pid_of("fastcontainer-launcher").is_some_and(|pid| pid != launcher)
            && host.ctl(&["ps"]).status.success()
    });
    host.wait_for("the image to be provisioned", || host.count("blog", "image-provisioned") == 1);
    assert!(root_of(&host, "blog").contains(&"made".into()));
    let made = layers(&host).pop().unwrap().join("tree/made");
    assert_eq!(fs::read_to_string(made).unwrap(), "begun\ndone\n");
    let entries = fs::read_dir(host.state.join("launcher/images")).unwrap().flatten();
    let unfinished = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(".unfinished"));
    assert_eq!(unfinished.count(), 0);
    host.end();
}

#[test]
fn a_step_that_fails_or_takes_too_long_says_why_and_is_tried_again() {
    let failing = step("database", "echo no such table; echo cannot go on >&2; exit 3");
    let slow = format!("{}timeout = \"1s\"\n", step("slow", "echo wait; sleep 1000"));
    let host = Host::up_with(&[file("blog", &failing), file("shop", &slow)]);

    host.wait_for("the failure", || host.count("blog", "image-failed") > 0);
    let events = host.events("blog");
    let told = events.iter().find(|event| event["kind"] == "image-failed").unwrap();
    let told = told["message"].as_str().unwrap();
    for word in ["step 1 of 1", "\"database\"", "status 3", "no such table", "cannot go on", "tried again in"]
    {
        assert!(told.contains(word), "{word}: {told}");
    }
    assert_eq!(recipe(&host)["state"], "failed");
    let answer = host.ask(&get("blog.test", "/")).unwrap();
    assert!([502, 503].contains(&answer.status), "{}", answer.status);
    assert!(!answer.text().contains("no such table"), "what a step says is for its operator");
    let woken = host.ctl(&["wake", "blog"]);
    let said = String::from_utf8_lossy(&woken.stderr).into_owned();
    assert!(said.contains("\"database\"") && said.contains("status 3"), "{said}");
    host.wait_for("another try", || runs(&host, "blog", "database") > 1);
    assert_eq!(host.count("blog", "image-failed"), 1, "told once, not with every try");

    host.wait_for("the timeout", || host.count("shop", "image-failed") > 0);
    let events = host.events("shop");
    assert!(
        events.iter().any(|event| event["message"].as_str().unwrap().contains("timeout of 1s")),
        "{events:?}"
    );

    let good = step("database", "echo ok > /made");
    write(&host, &file("blog", &good));
    host.wait_for("the mended step", || host.count("blog", "image-provisioned") == 1);
    host.wait_for("an answer", || host.ask(&get("blog.test", "/")).unwrap().status == 200);
    assert!(root_of(&host, "blog").contains(&"made".into()));
    host.end();
}

#[test]
fn what_a_step_leaves_is_a_tenants_and_no_more_than_there_is_room_for() {
    let hostile = step(
        "odd",
        "mkfifo /fifo; mknod /disk b 8 0; cp /bin/true /root-shell; chmod 4755 /root-shell; ln -s /etc/shadow /link; \
         chown -h www-data /link /var/www; ln /root-shell /second-name; mkdir /opaque; rm -r /etc/perl; mkdir /etc/perl; \
         setfattr -n user.x -v y /opaque; sleep 1000 & echo x > /etc/hosts; echo x > /etc/hostname",
    );
    let hog = step("hog", "head -c 60000000 /dev/zero > /big");
    let files = [file("blog", &hostile), file("hog", &hog)];
    let host = Host::up_after(&files, &["--image-space", "32MiB"], |_| {});

    host.wait_for("the odd one", || host.count("blog", "image-provisioned") == 1);
    let tree = layers(&host).pop().unwrap().join("tree");
    for gone in ["fifo", "disk", "etc/hosts", "etc/hostname"] {
        assert!(fs::symlink_metadata(tree.join(gone)).is_err(), "{gone}");
    }
    let shell = fs::metadata(tree.join("root-shell")).unwrap();
    assert_eq!((shell.uid(), shell.nlink(), shell.permissions().mode() & 0o7777), (0, 2, 0o4755));
    assert_eq!(
        fs::symlink_metadata(tree.join("link")).unwrap().uid(),
        fs::metadata(tree.join("var/www")).unwrap().uid()
    );
    assert!(root_of(&host, "blog").contains(&"second-name".into()));

    host.wait_for("the refusal", || host.count("hog", "image-failed") > 0);
    let events = host.events("hog");
    assert!(
        events.iter().any(|event| {
            let said = event["message"].as_str().unwrap();
            said.contains("--image-space") || said.contains("bytes")
        }),
        "{events:?}"
    );
    assert_eq!(layers(&host).len(), 1, "nothing of it is kept");
    host.end();
}
