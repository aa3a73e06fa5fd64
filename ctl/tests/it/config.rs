//! `conf.d`: good files serve, bad ones are told of and disturb nobody.

use std::fs;

use serde_json::Value;

use crate::{host::Host, http::get, vhost::Vhost};

fn bad_files() -> Vec<(String, Vec<u8>)> {
    let file = |name: &str, bytes: &[u8]| (name.to_owned(), bytes.to_vec());
    let mut huge = b"# ".to_vec();
    huge.resize(11 << 20, b'x');
    vec![
        file("broken.toml", b"server-name = [\"broken.test\"\n[container\n"),
        file("empty.toml", b""),
        file("binary.toml", b"\x00\x01\xfe\xff\x00"),
        file("huge.toml", &huge),
        file(
            "wrong.toml",
            b"server-name = [\"wrong.test\"]\n[container]\nimage = \"dir:/x\"\ncommand = [\"/x\"]\nprot = 80\n[resources]\nmemory = \"lots\"\n",
        ),
        file("zz-thief.toml", Vhost::probe("blog").text().as_bytes()),
    ]
}

#[test]
fn bad_files_are_all_told_of_and_the_good_ones_serve() {
    let blog = Vhost::probe("blog");
    let mut files = bad_files();
    files.push(("blog.toml".into(), blog.text().into_bytes()));
    let host = Host::up_with(&files);

    host.get(&blog, "/").expect_status(200);
    assert_eq!(host.get(&Vhost::probe("wrong"), "/").status, 404);

    let check = host.ctl(&["check", &host.conf.to_string_lossy()]);
    assert_eq!(check.status.code(), Some(1));
    let shown = String::from_utf8(check.stdout).unwrap();
    for expected in [
        "broken.toml:",
        "empty.toml",
        "binary.toml",
        "huge.toml",
        "wrong.toml:5:1",
        "did you mean \"port\"?",
        "wrong.toml:7:10",
        "\"lots\" is not a size",
        "zz-thief.toml:1:16",
        "belongs to",
        "blog.toml:1:16",
    ] {
        assert!(shown.contains(expected), "{expected:?} is not in\n{shown}");
    }

    let json: Value =
        serde_json::from_slice(&host.ctl(&["check", &host.conf.to_string_lossy(), "--json"]).stdout).unwrap();
    let faults = json["faults"].as_array().unwrap();
    assert!(faults.iter().any(|f| f["line"] == 7 && f["column"] == 10 && f["text"] == "\"lots\""), "{json}");
    assert!(host.events_of_host("config-error") >= 6);
    host.end();
}

#[test]
fn a_file_that_breaks_keeps_its_last_good_version() {
    let blog = Vhost::probe("blog");
    let host = Host::up(&[&blog]);
    let before = host.get(&blog, "/").generation();

    fs::write(host.conf.join("blog.toml"), "server-name = [").unwrap();
    host.wait_for("the fault", || host.count("blog", "config-error") > 0);
    assert_eq!(host.get(&blog, "/").generation(), before, "nothing has changed for its visitors");

    host.apply(&blog.clone().env("MENDED", 1));
    host.wait_for("the new version", || {
        let env = host.get(&blog, "/env").json().to_string();
        env.contains("MENDED")
    });
    host.end();
}

#[test]
fn a_file_that_is_taken_away_takes_its_app_along() {
    let (blog, shop) = (Vhost::probe("blog"), Vhost::probe("shop"));
    let host = Host::up(&[&blog, &shop]);
    host.get(&blog, "/").expect_status(200);

    fs::remove_file(host.conf.join("blog.toml")).unwrap();

    host.wait_for("the app to be unknown", || host.get(&blog, "/").status == 404);
    host.wait_for("its instances to be gone", || host.ctl(&["ps", "blog"]).status.code() == Some(4));
    host.get(&shop, "/").expect_status(200);

    host.apply(&blog);
    host.wait_for("the app to be back", || host.get(&blog, "/").status == 200);
    host.end();
}

#[test]
fn a_change_of_limits_reaches_the_running_instance() {
    let blog = Vhost::probe("blog").with("resources", "memory = \"64MiB\"");
    let host = Host::up(&[&blog]);
    host.get(&blog, "/").expect_status(200);
    let before = host.ps("blog")[0].clone();

    host.apply(&Vhost::probe("blog").with("resources", "memory = \"96MiB\""));

    host.wait_for("the new limit", || host.ps("blog")[0]["memory_limit"] == 96 << 20);
    assert_eq!(host.ps("blog")[0]["pid"], before["pid"], "the same process");
    host.end();
}

#[test]
fn the_operator_changes_limits_of_the_running_process() {
    let blog = Vhost::probe("blog").with("resources", "cpu = \"20%\"");
    let host = Host::up(&[&blog]);
    host.get(&blog, "/").expect_status(200);
    host.wait_for("the quota", || host.ps("blog")[0]["cpu_limit"] == 200);
    let before = host.ps("blog")[0].clone();

    host.ctl_ok(&["limit", "blog", "--cpu", "60%", "--memory", "96MiB"]);

    let after = host.ps("blog")[0].clone();
    assert_eq!(after["pid"], before["pid"]);
    assert_eq!((&after["cpu_limit"], &after["memory_limit"]), (&600.into(), &(96 << 20).into()), "{after}");
    assert_eq!(host.ctl(&["limit", "blog"]).status.code(), Some(2), "nothing to change");
    assert_eq!(host.ctl(&["limit", "nobody", "--pids", "9"]).status.code(), Some(4));
    host.end();
}

#[test]
fn a_change_of_what_runs_replaces_the_instance_and_fails_nobody() {
    let blog = Vhost::probe("blog").env("LISTEN_AFTER_MS", 200);
    let host = Host::up(&[&blog]);
    let before = host.get(&blog, "/").generation();

    host.apply(&blog.clone().env("EDITION", 2));

    host.wait_for("the replacement", || host.get(&blog, "/").expect_status(200).generation() > before);
    host.wait_for("the old one to be gone", || host.states("blog") == ["ready"]);
    host.end();
}

#[test]
fn a_server_name_may_move_from_one_file_to_another() {
    let (blog, shop) = (Vhost::probe("blog"), Vhost::probe("shop"));
    let host = Host::up(&[&blog, &shop]);
    host.get(&blog, "/").expect_status(200);

    let names = |text: String, names: &str| {
        text.replacen("[\"blog.test\"]", names, 1).replacen("[\"shop.test\"]", names, 1)
    };
    fs::write(host.conf.join("shop.toml"), names(shop.text(), "[\"shop.test\", \"blog.test\"]")).unwrap();
    fs::write(host.conf.join("blog.toml"), names(blog.text(), "[\"old.test\"]")).unwrap();

    host.wait_for("the name to have moved", || {
        host.ask(&get("blog.test", "/")).is_ok_and(|r| r.status == 200 && r.json()["app"] == "shop")
    });
    host.end();
}

#[test]
fn an_archive_is_an_image_too() {
    let images = crate::vhost::images();
    let file = |name: &str, archive: &str| {
        let text = format!(
            "server-name = [\"{name}.test\"]\n[container]\nimage = \"tar:{}/{archive}\"\ncommand = [\"/hello\"]\nport = 8080\n",
            images.display()
        );
        (format!("{name}.toml"), text.into_bytes())
    };
    let host = Host::up_with(&[file("plain", "hello.tar"), file("zstd", "hello.tar.zst")]);
    for name in ["plain", "zstd"] {
        let page = host.ask(&get(&format!("{name}.test"), "/")).unwrap().expect_status(200);
        assert!(page.text().contains("Hello"), "{}", page.text());
        let image = host.ps(name)[0]["image"].clone();
        assert!(image.as_str().is_some_and(|image| image.contains("sha256")), "{image}");
    }
    host.end();
}

#[test]
fn commands_tell_scripts_what_came_of_them() {
    let blog = Vhost::probe("blog");
    let host = Host::up(&[&blog]);
    let code = |arguments: &[&str]| host.ctl(arguments).status.code();
    assert_eq!(code(&["ps"]), Some(0));
    for command in ["wake", "stop", "restart", "logs", "ps"] {
        assert_eq!(code(&[command, "nobody"]), Some(4), "{command} of an app that is not there");
    }
    assert_eq!(code(&["why", "no-such-request"]), Some(4));
    assert_eq!(code(&["frobnicate"]), Some(2));
    assert_eq!(code(&["wake", "blog", "-v"]), Some(0));
    assert_eq!(code(&["restart", "blog"]), Some(0));

    let state = host.state.clone();
    host.end();
    let output = std::process::Command::new(crate::host::program("fastcontainer"))
        .args(["ps", "--state"])
        .arg(state)
        .output();
    assert_eq!(output.unwrap().status.code(), Some(3), "nothing runs there any more");
}

/// Moves `conf.d` beneath a folder that only root may enter; a link leads there.
fn hide_conf(folder: &std::path::Path) {
    let hidden = folder.join("hidden");
    fs::create_dir(&hidden).unwrap();
    fs::set_permissions(&hidden, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    fs::rename(folder.join("conf.d"), hidden.join("conf.d")).unwrap();
    std::os::unix::fs::symlink(hidden.join("conf.d"), folder.join("conf.d")).unwrap();
}

#[test]
fn conf_d_may_lie_where_only_root_may_go() {
    let blog = Vhost::probe("blog");
    let host = Host::up_after(&[("blog.toml".into(), blog.text().into_bytes())], &[], hide_conf);
    host.get(&blog, "/").expect_status(200);

    let shop = Vhost::probe("shop");
    host.apply(&shop);
    host.get(&shop, "/").expect_status(200);
    fs::remove_file(host.conf.join("blog.toml")).unwrap();
    host.wait_for("the app to be unknown", || host.get(&blog, "/").status == 404);
    host.end();
}

#[test]
fn a_hangup_has_the_configuration_read_again() {
    // A link to a file elsewhere: nothing in conf.d changes when that file does, so nobody is told of it.
    let blog = Vhost::probe("blog");
    let host = Host::up_after(&[("blog.toml".into(), blog.text().into_bytes())], &[], |folder| {
        fs::rename(folder.join("conf.d/blog.toml"), folder.join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(folder.join("elsewhere"), folder.join("conf.d/blog.toml")).unwrap();
    });
    let edited = host.conf.with_file_name("elsewhere");
    let hangup =
        |pid| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGHUP).unwrap();
    let coreapi = host.pid_of("fastcontainer-coreapi");

    for (edition, pid) in [("1", coreapi), ("2", host.pid())] {
        let read = || host.log().matches("SIGHUP: reading").count();
        let (reads, applied) = (read(), host.count("blog", "config-applied"));
        fs::write(&edited, blog.clone().env("EDITION", edition).text()).unwrap();
        hangup(pid);
        host.wait_for("the folder to be read", || read() > reads);
        host.wait_for("the change", || host.count("blog", "config-applied") > applied);
    }
    assert_eq!(host.pid_of("fastcontainer-coreapi"), coreapi, "the same process");
    assert_eq!(host.get(&blog, "/env").json()["EDITION"], "2");
    host.end();
}
