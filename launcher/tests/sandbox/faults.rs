//! Every step of a creation fails, with every error: each failure says so, and nothing is left of it.
//!
//! `FC_CHAOS=long` tries all of Linux's errors instead of the usual ones.

use std::fs;

use launcher::faults::ERRNOS;
use launcher::sandbox::{Fault, STEPS, UserNs};
use tempfile::TempDir;

use crate::lab::{Container, ID_BASE, Image, fingerprint};
use crate::outside::{Group, host};

/// The highest error number of Linux (asm-generic/errno.h, EHWPOISON).
const LAST_ERRNO: i32 = 133;

pub fn every_step_fails_with_every_error_and_leaves_nothing() {
    let image = Image::new();
    let volume = TempDir::new().unwrap();
    fs::write(volume.path().join("precious"), "").unwrap();
    let userns = UserNs::new(ID_BASE).unwrap();
    // With something in it for as many steps as can be.
    let group = Group::new("/sys/fs/cgroup/pids");
    let mut container =
        Container::shell(&image, "echo alive").user("www-data").volume(volume.path(), "/data", false);
    container.cgroup_tasks.extend(group.iter().map(|group| group.path.join("tasks")));
    let whole = container.run_in(&userns);
    let steps: Vec<&str> = whole.timings.iter().map(|timing| timing.step.as_str()).collect();
    let untold = ["report timings", "exec"]; // the list is sent before these
    assert_eq!(steps, STEPS[..STEPS.len() - untold.len()], "the published list is what happens: {whole:#?}");
    let (all_of_the_host, files) = (host(), (image.fingerprint(), fingerprint(volume.path())));
    let errnos: Vec<i32> =
        if std::env::var_os("FC_CHAOS").is_some() { (1..=LAST_ERRNO).collect() } else { ERRNOS.to_vec() };

    let mut tried = 0;
    for (step, done) in STEPS.iter().flat_map(|step| [(*step, false), (*step, true)]) {
        if done && ["clone", "report timings", "exec"].contains(&step) {
            continue; // these have no way to fail once they are done
        }
        for errno in &errnos {
            container.plan.fault = Some(Fault { step: step.to_owned(), errno: *errno, done });

            let outcome = container.run_in(&userns);

            assert_eq!(outcome.failed_at(), (step, *errno), "done: {done}");
            let text = outcome.error.as_ref().unwrap().to_string();
            assert!(text.starts_with(&format!("{step} (on purpose): ")), "{text}");
            assert!(text.ends_with(&format!("(os error {errno})")), "{text}");
            assert_eq!(outcome.stdout, "", "the program has not run");
            tried += 1;
        }
        assert_no_child();
    }

    assert_eq!(tried, (2 * STEPS.len() - 3) * errnos.len());
    let (mounts, networks, descriptors) = host();
    assert_eq!((mounts, descriptors), (all_of_the_host.0, all_of_the_host.2));
    assert!(networks.is_subset(&all_of_the_host.1), "{networks:?}");
    assert_eq!(
        (image.fingerprint(), fingerprint(volume.path())),
        files,
        "neither image nor volume has changed"
    );
    container.plan.fault = None;
    assert_eq!(container.run_in(&userns).stdout, "alive\n", "the next one is none the worse for it");
}

fn assert_no_child() {
    use nix::errno::Errno;
    use nix::sys::wait::{WaitPidFlag, waitpid};
    assert_eq!(
        waitpid(None, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)),
        Err(Errno::ECHILD),
        "no process"
    );
}
