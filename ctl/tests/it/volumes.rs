//! Folders of the DataPool: who owns what apps write, what is said when something is wrong, and a file system that hangs.

use std::{
    fs,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::{host::Host, http::get, vhost::images};

/// Debian's shell does `first` as `user`, then becomes the probe, which lies in the volume.
fn debian(name: &str, source: &str, user: &str, first: &str, more: &str) -> (String, Vec<u8>) {
    let text = format!(
        "server-name = [\"{name}.test\"]\n[container]\nimage = \"dir:{}/phpinfo\"\nuser = \"{user}\"\n\
         command = [\"/bin/sh\", \"-c\", \"{first}; exec /data/probe\"]\nport = 8080\n\
         [[volume]]\nsource = \"{source}\"\ntarget = \"/data\"\n{more}\n",
        images().display()
    );
    (format!("{name}.toml"), text.into_bytes())
}

fn fill(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    fs::copy(images().join("probe/probe"), folder.join("probe")).unwrap();
}

#[test]
fn what_an_app_writes_belongs_to_the_same_user_in_the_datapool_whatever_app_and_start() {
    let apps = ["blog", "shop"]
        .map(|name| debian(name, name, "www-data", "umask 022; echo x > /data/uploads/$FC_GENERATION", ""));
    let host = Host::up_after(&apps, &[], |folder| {
        for name in ["blog", "shop"] {
            let content = folder.join("s/datapool").join(name);
            fill(&content);
            fs::create_dir(content.join("uploads")).unwrap();
            // As an operator would: Debian's www-data.
            std::os::unix::fs::chown(content.join("uploads"), Some(33), Some(33)).unwrap();
        }
    });

    for name in ["blog", "shop"] {
        for _ in 0..2 {
            host.ask(&get(&format!("{name}.test"), "/")).unwrap().expect_status(200);
            host.ctl_ok(&["stop", name]);
        }
        let uploads = host.state.join("datapool").join(name).join("uploads");
        let owners: Vec<_> = fs::read_dir(uploads)
            .unwrap()
            .map(|file| file.unwrap().metadata().unwrap())
            .map(|file| (file.uid(), file.gid()))
            .collect();
        assert_eq!(owners, [(33, 33), (33, 33)], "{name}");
    }
    host.end();
}

#[test]
fn a_folder_that_is_not_there_is_told_and_not_made() {
    let file = debian("blog", "blog/uploads", "", "true", "");
    let host =
        Host::up_after(&[file], &[], |folder| fs::create_dir_all(folder.join("s/datapool/blog")).unwrap());

    let woken = host.ctl(&["wake", "blog"]);

    assert_eq!(woken.status.code(), Some(1));
    let said = String::from_utf8_lossy(&woken.stderr).into_owned();
    assert!(
        said.contains("\"blog/uploads\" beneath the DataPool") && said.contains("No such file"),
        "{said}"
    );
    assert!(said.contains("make the folder, or is the DataPool not mounted?"), "{said}");
    assert!(!host.state.join("datapool/blog/uploads").exists());
    host.end();
}

#[test]
fn a_quota_that_the_file_system_cannot_keep_is_refused_with_the_mend() {
    let file = debian("blog", "blog", "", "true", "quota = \"10MiB\"");
    let host = Host::up_after(&[file], &[], |folder| fill(&folder.join("s/datapool/blog")));

    let woken = host.ctl(&["wake", "blog"]);

    assert_eq!(woken.status.code(), Some(1));
    let said = String::from_utf8_lossy(&woken.stderr).into_owned();
    assert!(said.contains("keeps no project quotas: mount it with prjquota"), "{said}");
    host.end();
}

#[test]
fn a_file_system_that_hangs_holds_up_only_the_app_whose_volume_is_on_it() {
    std::thread::scope(|scope| {
        let story = scope.spawn(|| {
            // What is mounted here, the machine does not see.
            unshare(CloneFlags::CLONE_NEWNS).expect("run the tests as root");
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
            let files = [
                debian("stuck", "hangs/content", "", "true", "[lifecycle]\nstart-timeout = \"3s\""),
                debian("fine", "fine", "", "true", ""),
            ];
            // Nobody ever answers what the kernel asks here.
            let silent = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
            let host = Host::up_after(&files, &[], |folder| {
                let pool = folder.join("s/datapool");
                fill(&pool.join("fine"));
                fs::create_dir(pool.join("hangs")).unwrap();
                let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", silent.as_raw_fd());
                let kind = Some("fuse");
                mount(kind, &pool.join("hangs"), kind, MsFlags::empty(), Some(options.as_str())).unwrap();
            });

            let answered = std::thread::scope(|scope| {
                let stuck = scope.spawn(|| host.ask(&get("stuck.test", "/")).unwrap().status);
                host.wait_for("the stuck one to be starting", || host.states("stuck") == ["starting"]);
                // The others start and end meanwhile, and the launcher answers.
                let mut beside = 0;
                while host.states("stuck") == ["starting"] && beside < 5 {
                    host.ask(&get("fine.test", "/")).unwrap().expect_status(200);
                    host.ctl_ok(&["stop", "fine"]);
                    beside += 1;
                }
                assert!(beside > 0);
                stuck.join().unwrap()
            });

            assert_eq!(answered, 504);
            let events = host.events("stuck");
            let told =
                |words: &str| events.iter().any(|event| event["message"].as_str().unwrap().contains(words));
            assert!(
                told("was not made within its start-timeout") && told("does the DataPool hang?"),
                "{events:#?}"
            );
            let began = Instant::now();
            host.end();
            assert!(began.elapsed() < Duration::from_secs(30), "the end is not held up either");
        });
        if let Err(panic) = story.join() {
            std::panic::resume_unwind(panic);
        }
    });
}
