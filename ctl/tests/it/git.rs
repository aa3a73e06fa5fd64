//! An app's own files from a Git repository, over an image that runs them.

use std::{fs, path::Path, process::Command};

use serde_json::Value;

use crate::{
    host::Host,
    http::get,
    oci::{
        file,
        fixture::{Layout, Pack},
        probe_config, probe_layer,
    },
};

fn git(repository: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git")
        .arg("-C")
        .arg(repository)
        .args(["-c", "user.name=test", "-c", "user.email=test@localhost"])
        .args(arguments)
        .output()
        .expect("git is installed (scripts/install-missing test)");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn commit(repository: &Path, name: &str) -> String {
    fs::create_dir_all(repository.join("public")).unwrap();
    fs::write(repository.join("public").join(name), name).unwrap();
    fs::write(repository.join("secret.key"), "not for visitors").unwrap();
    git(repository, &["add", "--all"]);
    git(repository, &["commit", "--quiet", "--message", name]);
    git(repository, &["rev-parse", "HEAD"])
}

fn root_entries(host: &Host, name: &str) -> Vec<String> {
    let answer: Value = host.ask(&get(&format!("{name}.test"), "/escape")).unwrap().expect_status(200).json();
    serde_json::from_value(answer["facts"]["root_entries"].clone()).unwrap()
}

#[test]
fn a_folder_of_a_repository_is_laid_over_a_base_and_a_moved_branch_is_followed() {
    let folder = tempfile::Builder::new().prefix("fcgit").tempdir_in("/tmp").unwrap();
    // The fetcher is nobody.
    fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let repository = folder.path().join("site");
    fs::create_dir(&repository).unwrap();
    git(&repository, &["init", "--quiet", "--initial-branch", "main"]);
    let first = commit(&repository, "first");
    let mut layout = Layout::new(&folder.path().join("base"));
    let probe = probe_layer(&layout, Pack::Gzip);
    layout.image(&[probe], probe_config());
    let base = format!("base = \"oci:{}\"", layout.path.display());
    let site = |revision: &str| format!("git+file://{}#{revision}:public", repository.display());
    let host = Host::up_with(&[
        file("site", &site("main"), &base),
        file("pinned", &site(&first), &base),
        file("lost", &site("nowhere"), &base),
    ]);
    let is_ready = |image: &str| {
        let images: Vec<Value> = serde_json::from_str(&host.ctl_ok(&["images", "--json"])).unwrap();
        images.iter().any(|known| known["image"] == image && known["state"] == "ready")
    };
    host.wait_for("the tree to be there", || is_ready(&site("main")) && is_ready(&site(&first)));

    let entries = root_entries(&host, "site");
    assert!(entries.contains(&"first".into()) && entries.contains(&"opt".into()), "{entries:?}");
    assert!(!entries.contains(&"secret.key".into()) && !entries.contains(&".git".into()), "{entries:?}");
    host.wait_for("the failure to be told", || host.count("lost", "image-failed") > 0);
    let told = host.events("lost");
    assert!(told.iter().any(|e| e["message"].as_str().unwrap().contains("git fetch")), "{told:?}");

    commit(&repository, "second");
    host.ctl_ok(&["stop", "site"]);
    root_entries(&host, "site");
    host.wait_for("the newer commit to be there", || host.ps("site")[0]["image_is_old"] == true);
    host.ctl_ok(&["stop", "site"]);
    assert!(root_entries(&host, "site").contains(&"second".into()));
    assert!(!root_entries(&host, "pinned").contains(&"second".into()), "a commit does not move");
    host.end();
}
