//! The whole system on a host with cgroup v2 only: Debian 12's own kernel, emulated. `scripts/cgroup-v2/guest` is what is
//! looked at there.
#![forbid(unsafe_code)]
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::{
    path::{Path, PathBuf},
    process::Command,
};

#[test]
fn debian_12_with_cgroup_v2_only_wakes_limits_and_cleans_up() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let programs = std::env::var_os("FC_BIN_DIR").map_or_else(
        || Path::new(env!("CARGO_BIN_EXE_fastcontainer")).parent().expect("a folder").to_owned(),
        Into::into,
    );
    let images = std::env::var_os("FC_IMAGES").map_or_else(|| top.join("images"), Into::into);

    let output = Command::new(top.join("scripts/cgroup-v2/run"))
        .args([programs, images, top.join("target/cgroup-v2"), launchers_cgroup_tests()])
        .output()
        .expect("scripts/cgroup-v2/run");

    let console = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}\n{console}");
    // The script's word is not taken for it. (Some slack: the kernel writes to the same console.)
    assert!(console.lines().filter(|line| line.starts_with("ok: ")).count() > 28, "{console}");
}

/// The launcher's tests of control groups (`launcher/tests/cgroup.rs`) as cargo last built them, beside this program.
fn launchers_cgroup_tests() -> PathBuf {
    let this = std::env::current_exe().expect("this program");
    let beside = this.parent().expect("a folder").read_dir().expect("the folder").flatten();
    beside
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_none())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("cgroup-")))
        .max_by_key(|path| path.metadata().and_then(|about| about.modified()).ok())
        .expect(
            "launcher/tests/cgroup.rs, which `make test` (cargo test --workspace) builds before this runs",
        )
}
