//! Image archives. They are unpacked where everything but a scratch folder is read-only, so that a way out would be seen
//! and do no harm. Needs root.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use launcher::image::{Bounds, ImageStore, Options};
use proptest::test_runner::TestRunner;

use crate::damage::{cases, corpus, damaged};

/// A private view of the machine, in which only a new `/mnt` can be written; then the test below.
const CONFINE: &str = "mount -t tmpfs tmpfs /mnt && mount -o remount,bind,ro / && exec \"$0\" \
                       --exact archives::unpacking_in_a_confined_view --ignored --nocapture";

const BOUNDS: Bounds = Bounds { entries: 5_000, bytes: 16 << 20, depth: 32 };
/// Longest time for one archive on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// Most memory for all of them, in KiB.
const MOST_MEMORY: u64 = 512 * 1024;

#[test]
fn no_archive_changes_anything_outside_its_image_or_makes_the_launcher_panic() {
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", CONFINE])
        .arg(std::env::current_exe().unwrap())
        .env("TMPDIR", "/mnt")
        .output()
        .expect("util-linux is installed");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "the test above runs it in a view of its own"]
fn unpacking_in_a_confined_view() {
    assert!(fs::write("/etc/fc-fuzz", "").is_err(), "only in the confined view");
    fs::create_dir_all("/mnt/host/folder").unwrap();
    fs::write("/mnt/host/secret", "secret").unwrap();
    let before = tree(Path::new("/mnt/host"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let unpack = |bytes: Vec<u8>| {
        let (begun, images) = (Instant::now(), Path::new("/mnt/work/images"));
        fs::create_dir_all(images).unwrap();
        // Nothing is fetched here, so the folder for that need not be another one.
        let options = Options { bounds: BOUNDS, ..Options::new("/nonexistent".into(), images.to_owned()) };
        let store = ImageStore::new(images, options).unwrap();
        fs::write("/mnt/work/image.tar", bytes).unwrap();
        let unpacked = runtime.block_on(store.resolve("tar:/mnt/work/image.tar"));
        assert_eq!(tree(Path::new("/mnt/host")), before);
        let top: Vec<_> = fs::read_dir("/mnt").unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(top.len(), 2, "{top:?}");
        let in_work: Vec<_> =
            fs::read_dir("/mnt/work").unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(in_work.len(), 2, "{in_work:?}");
        match unpacked {
            Ok(layers) => no_device_is_in(&images.join(&layers.id)),
            Err(error) => {
                // That would have been an attempt to write somewhere else.
                assert!(!error.to_string().contains("Read-only file system"), "{error}");
                assert_eq!(fs::read_dir(images).unwrap().count(), 0, "a refused one leaves nothing: {error}");
            }
        }
        fs::remove_dir_all("/mnt/work").unwrap();
        assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    };
    corpus("archives").into_iter().for_each(unpack);
    let mut runner = TestRunner::new(cases(400));
    let result = runner.run(&damaged(corpus("archives")), |bytes| {
        unpack(bytes);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let most: u64 = most.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(most < MOST_MEMORY, "{most} KiB of memory");
}

/// Everything beneath a folder: owner, mode, links, size and content.
fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        let content =
            if meta.is_file() { fs::read_to_string(&path).unwrap_or_default() } else { String::new() };
        let about = format!(
            "{:o} {}:{} {} {} {content}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.nlink(),
            meta.mtime()
        );
        found.insert(path, about);
    }
    found
}

/// No device node has been made, except overlay's own mark for "nothing here" (0:0).
fn no_device_is_in(root: &Path) {
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        assert_eq!(meta.rdev(), 0, "{}", path.display());
        if meta.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
}
