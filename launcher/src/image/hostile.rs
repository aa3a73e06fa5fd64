//! Archives that honest tools do not make, and what becomes of them: nothing outside the image changes. Needs root.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use tar::{EntryType, Header};
use tempfile::TempDir;

use super::{Bounds, ImageError, ImageStore, Layers, Options};

/// A host with a file that must not change, and a store.
struct Lab {
    dir: TempDir,
    store: ImageStore,
}

#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn add(mut self, kind: EntryType, name: &str, link: &str, content: &[u8]) -> Archive {
        self.push(kind, name.as_bytes(), link.as_bytes(), content, |_| {});
        self
    }

    fn file(self, name: &str, content: &str) -> Archive {
        self.add(EntryType::Regular, name, "", content.as_bytes())
    }

    fn with(mut self, name: &str, change: impl FnOnce(&mut Header)) -> Archive {
        self.push(EntryType::Regular, name.as_bytes(), b"", b"x", change);
        self
    }

    /// Writes names as they are: the builder of the `tar` crate is too honest.
    fn push(
        &mut self,
        kind: EntryType,
        name: &[u8],
        link: &[u8],
        content: &[u8],
        change: impl FnOnce(&mut Header),
    ) {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000);
        header.set_size(content.len() as u64);
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name);
        old.linkname[..link.len()].copy_from_slice(link);
        change(&mut header);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }

    fn bytes(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

impl Lab {
    fn new() -> Lab {
        Lab::with(Bounds::default())
    }

    fn with(bounds: Bounds) -> Lab {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("host")).unwrap();
        fs::write(dir.path().join("host/secret"), "secret").unwrap();
        let store = ImageStore::new(
            &dir.path().join("images"),
            Options { bounds, fetch_dir: dir.path().join("fetch"), ..Options::for_tests() },
        )
        .unwrap();
        Lab { dir, store }
    }

    fn host(&self) -> PathBuf {
        self.dir.path().join("host")
    }

    async fn unpack(&self, archive: Archive) -> Result<Layers, ImageError> {
        self.unpack_bytes(&archive.bytes()).await
    }

    async fn unpack_bytes(&self, bytes: &[u8]) -> Result<Layers, ImageError> {
        let path = self.dir.path().join("image.tar");
        fs::write(&path, bytes).unwrap();
        self.store.resolve(&format!("tar:{}", path.display())).await
    }

    fn root(&self, layers: &Layers) -> PathBuf {
        self.dir.path().join("images").join(&layers.id)
    }

    /// The archive is refused for the reason given, the host is as it was, and nothing is left in the store.
    async fn refuses(&self, archive: Archive, reason: &str) {
        let error = self.unpack(archive).await.expect_err(reason).to_string();
        assert!(error.contains(reason), "{error}");
        self.is_untouched();
        let left: Vec<_> = fs::read_dir(self.dir.path().join("images")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }

    fn is_untouched(&self) {
        assert_eq!(fs::read_to_string(self.host().join("secret")).unwrap(), "secret");
        assert_eq!(fs::metadata(self.host().join("secret")).unwrap().nlink(), 1);
        assert_eq!(fs::read_dir(self.host()).unwrap().count(), 1);
    }
}

#[tokio::test]
async fn an_honest_archive_keeps_owners_modes_and_times() {
    let lab = Lab::new();
    let mut archive = Archive::default();
    archive.push(EntryType::Directory, b"./", b"", b"", |header| header.set_mode(0o755));
    archive.push(EntryType::Directory, b"./bin/", b"", b"", |header| header.set_mode(0o750));
    archive.push(EntryType::Regular, b"./bin/su", b"", b"program", |header| {
        header.set_mode(0o4755);
        header.set_uid(33);
        header.set_gid(34);
    });
    let archive = archive
        .add(EntryType::Symlink, "lib", "/usr/lib", b"")
        .add(EntryType::Link, "bin/same", "./bin/su", b"")
        .add(EntryType::Fifo, "pipe", "", b"")
        .add(EntryType::Char, "dev/mem", "", b"")
        .file("deep/er/file", "text");

    let layers = lab.unpack(archive).await.unwrap();

    let root = lab.root(&layers);
    let su = fs::symlink_metadata(root.join("bin/su")).unwrap();
    assert_eq!(
        (su.mode() & 0o7777, su.uid(), su.gid(), su.mtime(), su.nlink()),
        (0o4755, 33, 34, 1_000_000, 2)
    );
    let bin = fs::metadata(root.join("bin")).unwrap();
    assert_eq!((bin.mode() & 0o7777, bin.mtime()), (0o750, 1_000_000));
    assert_eq!(fs::metadata(&root).unwrap().mode() & 0o7777, 0o755);
    assert_eq!(fs::read_link(root.join("lib")).unwrap(), Path::new("/usr/lib"));
    assert_eq!(fs::read_to_string(root.join("deep/er/file")).unwrap(), "text");
    assert!(!root.join("pipe").exists() && !root.join("dev/mem").exists(), "left out");
}

#[tokio::test]
async fn names_that_lead_out_are_refused() {
    for name in ["../host/secret", "/etc/fc-test", "a/../../host/secret", ".."] {
        let reason = if name.starts_with('/') { "absolute" } else { "\"..\"" };
        Lab::new().refuses(Archive::default().file(name, "evil"), reason).await;
    }
}

#[tokio::test]
async fn nothing_is_written_through_a_symbolic_link() {
    let lab = Lab::new();
    let out = lab.host();
    let out = out.to_str().unwrap();
    let link = |name: &str, to: &str| Archive::default().add(EntryType::Symlink, name, to, b"");
    lab.refuses(link("a", out).file("a/new", "evil"), "symbolic link").await;
    lab.refuses(link("a", "../../host").file("a/secret", "evil"), "symbolic link").await;
    lab.refuses(link("a", out).add(EntryType::Directory, "a/new", "", b""), "symbolic link").await;
    lab.refuses(link("a", out).add(EntryType::Link, "b", "a/secret", b""), "not a file of this archive")
        .await;
    lab.refuses(link("a", out).add(EntryType::Directory, "a/b/c", "", b""), "symbolic link").await;

    // A file, a directory or a mode for a name that is a link replaces the link, never what it points to.
    let secret = format!("{out}/secret");
    let layers = lab.unpack(link("a", &secret).file("a", "mine")).await.unwrap();
    assert_eq!(fs::read_to_string(lab.root(&layers).join("a")).unwrap(), "mine");
    let layers =
        lab.unpack(link("d", out).add(EntryType::Directory, "d", "", b"").file("d/in", "x")).await.unwrap();
    assert!(fs::symlink_metadata(lab.root(&layers).join("d")).unwrap().is_dir());
    lab.is_untouched();
}

#[tokio::test]
async fn hard_links_stay_within_the_archive() {
    let link = |to: &str| Archive::default().file("f", "x").add(EntryType::Link, "l", to, b"");
    Lab::new().refuses(link("../host/secret"), "\"..\"").await;
    Lab::new().refuses(link("/etc/passwd"), "absolute").await;
    Lab::new().refuses(link("missing"), "not a file of this archive").await;
    Lab::new().refuses(link("."), "not a file of this archive").await;

    // Writing to one name again does not change the other.
    let lab = Lab::new();
    let layers = lab.unpack(link("f").file("l", "new")).await.unwrap();
    assert_eq!(fs::read_to_string(lab.root(&layers).join("f")).unwrap(), "x");
}

#[tokio::test]
async fn what_is_there_twice_is_there_once_and_last() {
    let lab = Lab::new();
    let layers =
        lab.unpack(Archive::default().file("a", "first").file("a", "second").file("d/x", "1")).await.unwrap();
    assert_eq!(fs::read_to_string(lab.root(&layers).join("a")).unwrap(), "second");

    let lab = Lab::new();
    let swapped = Archive::default().file("d/x", "1").add(EntryType::Symlink, "d", "/", b"");
    lab.refuses(swapped, "not empty").await;
    let emptied =
        Archive::default().add(EntryType::Directory, "d", "", b"").add(EntryType::Symlink, "d", "/", b"");
    lab.refuses(emptied.file("d/fc-test-evil", "x"), "symbolic link").await;
    assert!(!Path::new("/fc-test-evil").exists());
}

#[tokio::test]
async fn what_is_too_much_is_refused() {
    let small = Bounds { entries: 4, bytes: 1000, depth: 3 };
    let many = (0..5).fold(Archive::default(), |archive, n| archive.file(&n.to_string(), ""));
    Lab::with(small).refuses(many, "more than 4 entries").await;
    Lab::with(small).refuses(Archive::default().file("big", &"x".repeat(1001)), "more than 1000 bytes").await;
    Lab::with(small).refuses(Archive::default().file("a/b/c/d", ""), "too deep").await;
    let claims = Archive::default().with("huge", |header| header.set_size(1 << 40));
    Lab::new().refuses(claims, "bytes").await;
    let long_name = Archive::default().add(EntryType::GNULongName, "@", "", &[b'n'; 5000]).file("x", "");
    Lab::new().refuses(long_name, "descriptive header").await;
    let mut component = Archive::default().add(EntryType::GNULongName, "@", "", &[b'n'; 300]);
    component = component.file("x", "");
    Lab::new().refuses(component, "too long").await;
}

#[tokio::test]
async fn sizes_and_ids_that_do_not_fit_are_refused() {
    let pax = |text: &str| {
        Archive::default().add(EntryType::XHeader, "pax", "", text.as_bytes()).file("f", "content")
    };
    Lab::new().refuses(pax("13 size=1000\n"), "different sizes").await;
    Lab::new().refuses(pax("13 uid=70000\n"), "user or group id 70000").await;
    Lab::new().refuses(pax("22 GNU.sparse.major=1\n"), "sparse").await;
    Lab::new().refuses(pax("99 nonsense"), "cannot be read").await;
    Lab::new().refuses(Archive::default().with("f", |h| h.set_uid(65_536)), "user or group id 65536").await;
    Lab::new()
        .refuses(Archive::default().with("f", |h| h.set_entry_type(EntryType::GNUSparse)), "not understood")
        .await;

    let lab = Lab::new();
    let layers = lab.unpack(pax("17 path=pax/name\n")).await.unwrap();
    assert_eq!(fs::read_to_string(lab.root(&layers).join("pax/name")).unwrap(), "content");
}

#[tokio::test]
async fn what_is_no_archive_is_said_to_be_none() {
    let lab = Lab::new();
    let cut = &Archive::default().file("f", &"x".repeat(5000)).bytes()[..3000];
    for (bytes, reason) in [
        (&b""[..], "is empty"),
        (&[0; 1024][..], "is empty"),
        (&b"this is no archive, however long it may be".repeat(50)[..], "cannot be read"),
        (&b"\x1f\x8b\x08nonsense"[..], "cannot be read"),
        (&b"\x28\xb5\x2f\xfdnonsense"[..], "cannot be read"),
        (&b"BZh9nonsense"[..], "bzip2"),
        (cut, "cut off"),
    ] {
        let error = lab.unpack_bytes(bytes).await.expect_err(reason).to_string();
        assert!(error.contains(reason), "{reason}: {error}");
    }
}

#[tokio::test]
async fn compressed_archives_are_known_by_their_first_bytes() {
    let lab = Lab::new();
    let plain = Archive::default().file("f", "content").bytes();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    for bytes in [plain.clone(), gzip.finish().unwrap(), zstd::encode_all(&plain[..], 1).unwrap()] {
        let layers = lab.unpack_bytes(&bytes).await.unwrap();
        assert_eq!(fs::read_to_string(lab.root(&layers).join("f")).unwrap(), "content");
    }
}

#[tokio::test]
async fn the_newest_content_is_used_and_the_old_is_removed_when_nobody_uses_it() {
    let lab = Lab::new();
    let first = lab.unpack(Archive::default().file("v", "1")).await.unwrap();
    let again =
        lab.store.resolve(&format!("tar:{}", lab.dir.path().join("image.tar").display())).await.unwrap();
    assert_eq!(first.id, again.id);
    drop(again);

    let second = lab.unpack(Archive::default().file("v", "22")).await.unwrap();
    assert_eq!(fs::read_to_string(lab.root(&second).join("v")).unwrap(), "22");
    assert!(lab.root(&first).exists(), "still used");

    let first_root = lab.root(&first);
    drop(first);
    let third = lab.unpack(Archive::default().file("v", "333")).await.unwrap();
    assert!(!first_root.exists() && lab.root(&second).exists() && lab.root(&third).exists());

    // A warm start trusts the index and reads nothing of the archive.
    let warm = ImageStore::new(&lab.dir.path().join("images"), Options::for_tests()).unwrap();
    let path = lab.dir.path().join("image.tar");
    assert_eq!(warm.resolve(&format!("tar:{}", path.display())).await.unwrap().id, third.id);
}

#[tokio::test]
async fn many_starts_at_once_unpack_once() {
    let lab = Lab::new();
    let path = lab.dir.path().join("many.tar");
    fs::write(&path, Archive::default().file("f", "content").bytes()).unwrap();
    let image = format!("tar:{}", path.display());
    let starts: Vec<_> = (0..20)
        .map(|_| {
            let (store, image) = (lab.store.clone(), image.clone());
            tokio::spawn(async move { store.resolve(&image).await.unwrap().id })
        })
        .collect();
    let mut ids = Vec::new();
    for start in starts {
        ids.push(start.await.unwrap());
    }
    ids.dedup();
    assert_eq!(ids.len(), 1);
    assert_eq!(fs::read_dir(lab.dir.path().join("images")).unwrap().count(), 2, "the image and the index");
}

#[tokio::test]
async fn directories_are_used_as_they_are_and_errors_are_plain() {
    let lab = Lab::new();
    let at = |path: &Path| format!("dir:{}", path.display());
    let layers = lab.store.resolve(&at(&lab.host())).await.unwrap();
    assert_eq!(layers.fds.len(), 1);
    assert!(layers.id.starts_with("dir-"));

    let empty = lab.dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    symlink(lab.host(), lab.dir.path().join("link")).unwrap();
    for (image, reason) in [
        (at(&lab.dir.path().join("none")), "does not exist"),
        (at(&lab.host().join("secret")), "is not a directory"),
        (at(&empty), "is empty"),
        (format!("tar:{}", lab.host().display()), "is not a regular file"),
        (format!("tar:{}/none", lab.host().display()), "does not exist"),
        ("dir:relative".to_owned(), "expected dir:, tar: or oci:"),
        ("ftp://x".to_owned(), "expected dir:, tar: or oci:"),
        (String::new(), "expected dir:, tar: or oci:"),
    ] {
        let error = lab.store.resolve(&image).await.expect_err(reason).to_string();
        assert!(error.contains(reason), "{error}");
    }
    assert!(lab.store.resolve(&at(&lab.dir.path().join("link"))).await.is_ok());
    assert!(!fs::metadata(lab.host()).unwrap().file_type().is_fifo());
}
