//! Layouts, honest and forged. Needs root.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::lgetxattr;
use serde_json::json;
use tempfile::TempDir;

use super::super::{Bounds, ImageError, ImageStore, Layers, Options};
use super::Reference;
use super::fixture::{Blob, Layout, Pack, architecture, index, tar_of};

/// A layout, and a store to take it in.
struct Lab {
    dir: TempDir,
    store: ImageStore,
    layout: Layout,
}

impl Lab {
    fn new() -> Lab {
        Lab::with(Bounds::default())
    }

    fn with(bounds: Bounds) -> Lab {
        let dir = TempDir::new().unwrap();
        let store = ImageStore::new(
            &dir.path().join("images"),
            Options { bounds, fetch_dir: dir.path().join("fetch"), ..Options::for_tests() },
        )
        .unwrap();
        let layout = Layout::new(&dir.path().join("layout"));
        Lab { dir, store, layout }
    }

    async fn take(&self, what: &str) -> Result<Layers, ImageError> {
        self.store.resolve(&format!("oci:{}{what}", self.layout.path.display())).await
    }

    async fn refuses(&self, reason: &str) {
        let error = self.take("").await.expect_err(reason).to_string();
        assert!(error.contains(reason), "{error}");
        let left: Vec<_> = self.stored("").into_iter().filter(|name| !name.starts_with("layer-")).collect();
        assert!(left.is_empty(), "{left:?}");
    }

    fn stored(&self, prefix: &str) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path().join("images")).unwrap().flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        names.filter(|name| name.starts_with(prefix)).collect()
    }

    /// A layer's tree in the store.
    fn tree(&self, layer: &Blob) -> PathBuf {
        let digest = layer.descriptor["digest"].as_str().unwrap();
        let name = format!("layer-{}", digest.trim_start_matches("sha256:"));
        self.dir.path().join("images").join(name).join("tree")
    }

    fn blob_file(&self, descriptor: &serde_json::Value) -> PathBuf {
        let digest = descriptor["digest"].as_str().unwrap();
        self.layout.path.join("blobs/sha256").join(digest.trim_start_matches("sha256:"))
    }
}

fn hello() -> Vec<u8> {
    tar_of(&[("etc/", b""), ("etc/motd", b"hello"), ("old", b"old"), ("full/", b""), ("full/a", b"a")])
}

#[tokio::test]
async fn layers_are_unpacked_once_each_and_shared() {
    let mut lab = Lab::new();
    let base = lab.layout.layer(&hello(), Pack::Gzip);
    let one = lab.layout.layer(&tar_of(&[("one", b"1")]), Pack::Zstd);
    let two = lab.layout.layer(&tar_of(&[("two", b"2")]), Pack::Plain);
    let first = lab.layout.manifest(&[base.clone(), one], json!({}));
    let second = lab.layout.manifest(&[base.clone(), two], json!({}));
    lab.layout.list(first, "v1").list(second, "v2");

    let first = lab.take(":v1").await.unwrap();
    let inode = fs::metadata(lab.tree(&base)).unwrap().ino();
    let second = lab.take(":v2").await.unwrap();

    assert_ne!(first.id, second.id);
    assert_eq!((first.fds.len(), second.fds.len()), (2, 2));
    assert_eq!(rustix::fs::fstat(&first.fds[0]).unwrap().st_ino, inode, "the lowest comes first");
    assert_eq!(rustix::fs::fstat(&second.fds[0]).unwrap().st_ino, inode, "the same folder");
    assert_eq!(lab.stored("layer-").len(), 3);
    assert_eq!(fs::read_to_string(lab.tree(&base).join("etc/motd")).unwrap(), "hello");
}

#[tokio::test]
async fn what_a_layer_takes_away_is_marked_in_the_form_of_overlayfs() {
    let mut lab = Lab::new();
    let base = lab.layout.layer(&hello(), Pack::Gzip);
    let over = lab.layout.layer(
        &tar_of(&[
            (".wh.old", b""),
            ("full/", b""),
            ("full/.wh..wh..opq", b""),
            ("etc/", b""),
            ("etc/.wh.motd", b""),
            (".wh.turned", b""),
            ("turned/", b""),
            (".wh.implied", b""),
            ("implied/x", b"x"),
            ("kept", b"mine"),
            (".wh.kept", b""),
            (".wh..wh.plnk", b""),
        ]),
        Pack::Gzip,
    );
    lab.layout.image(&[base, over.clone()], json!({}));

    lab.take("").await.unwrap();

    let tree = lab.tree(&over);
    for gone in ["old", "etc/motd"] {
        let meta = fs::symlink_metadata(tree.join(gone)).unwrap();
        assert!(meta.file_type().is_char_device() && meta.rdev() == 0, "{gone}");
    }
    let opaque = |name: &str| {
        let mut value = [0; 4];
        lgetxattr(tree.join(name), "trusted.overlay.opaque", &mut value).is_ok_and(|n| &value[..n] == b"y")
    };
    assert!(opaque("full") && opaque("turned") && opaque("implied"));
    assert!(!opaque("etc"));
    assert_eq!(fs::read_to_string(tree.join("kept")).unwrap(), "mine", "a layer does not take away its own");
    assert!(
        fs::read_dir(&tree).unwrap().flatten().all(|e| !e.file_name().to_string_lossy().contains(".wh."))
    );
}

#[tokio::test]
async fn a_layer_that_hides_everything_is_the_lowest() {
    let mut lab = Lab::new();
    let base = lab.layout.layer(&hello(), Pack::Gzip);
    let over = lab.layout.layer(&tar_of(&[(".wh..wh..opq", b""), ("new", b"new")]), Pack::Gzip);
    lab.layout.image(&[base, over.clone()], json!({}));

    let layers = lab.take("").await.unwrap();

    assert_eq!(layers.fds.len(), 1);
    assert!(lab.tree(&over).join("new").exists());
}

#[tokio::test]
async fn whiteouts_of_nothing_and_through_links_are_refused() {
    for (name, reason) in [(".wh.", "of no name"), (".wh..", "of no name"), (".wh...", "of no name")] {
        let mut lab = Lab::new();
        let layer = lab.layout.layer(&tar_of(&[(name, b"")]), Pack::Plain);
        lab.layout.image(&[layer], json!({}));
        lab.refuses(reason).await;
    }
    let mut lab = Lab::new();
    let layer = lab.layout.layer(&tar_of(&[(".wh.a/b", b"")]), Pack::Plain);
    lab.layout.image(&[layer], json!({}));
    lab.refuses("lies in a whiteout").await;

    let mut lab = Lab::new();
    let host = lab.dir.path().join("host");
    fs::create_dir(&host).unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mode(0o777);
    header.set_mtime(0);
    builder.append_link(&mut header, "link", &host).unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mode(0o777);
    header.set_mtime(0);
    builder.append_data(&mut header, "link/.wh.secret", &b""[..]).unwrap();
    let layer = lab.layout.layer(&builder.into_inner().unwrap(), Pack::Plain);
    lab.layout.image(&[layer], json!({}));
    lab.refuses("symbolic link").await;
    assert_eq!(fs::read_dir(&host).unwrap().count(), 0);
}

#[tokio::test]
async fn an_archive_of_a_layout_is_as_good() {
    let mut lab = Lab::new();
    let base = lab.layout.layer(&hello(), Pack::Gzip);
    let digest = lab.layout.image(&[base], json!({ "Cmd": ["/hello"] }));
    let archive = lab.dir.path().join("image.tar");
    lab.layout.archive(&archive);

    let layers = lab.store.resolve(&format!("oci:{}", archive.display())).await.unwrap();

    assert_eq!(layers.id, digest.replace("sha256:", "oci-"));
    assert_eq!(layers.config.command, ["/hello"]);
    let by_digest = lab.store.resolve(&format!("oci:{}@{digest}", archive.display())).await.unwrap();
    assert_eq!(by_digest.id, layers.id);
}

#[tokio::test]
async fn how_it_wants_to_be_run_is_read() {
    let mut lab = Lab::new();
    let base = lab.layout.layer(&hello(), Pack::Gzip);
    let run = json!({
        "Entrypoint": ["/bin/server"], "Cmd": ["--port", "80"], "Env": ["PATH=/bin", "EMPTY=", "X=a=b"],
        "User": "www-data:www-data", "WorkingDir": "/srv", "ExposedPorts": { "80/tcp": {} }, "StopSignal": "SIGQUIT",
        "Labels": { "x": "y" }, "Volumes": { "/data": {} },
    });
    lab.layout.image(&[base], run);

    let config = lab.take("").await.unwrap().config;

    assert_eq!(config.command, ["/bin/server", "--port", "80"]);
    let env: Vec<(&str, &str)> = config.env.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    assert_eq!(env, [("PATH", "/bin"), ("EMPTY", ""), ("X", "a=b")]);
    assert_eq!((config.user.as_str(), config.workdir.as_str()), ("www-data:www-data", "/srv"));
    assert_eq!((config.port, config.stop_signal()), (Some(80), 3));
}

#[tokio::test]
async fn the_image_for_this_machine_is_taken() {
    let mut lab = Lab::new();
    let base = lab.layout.layer(&hello(), Pack::Gzip);
    let other = if architecture() == "amd64" { "arm64" } else { "amd64" };
    let mut foreign = lab.layout.manifest_for(other, std::slice::from_ref(&base), json!({}));
    let mut ours = lab.layout.manifest(&[base], json!({}));
    let digest = ours["digest"].as_str().unwrap().to_owned();
    foreign["platform"] = json!({ "architecture": other, "os": "linux" });
    ours["platform"] = json!({ "architecture": architecture(), "os": "linux" });
    let mut provenance = foreign.clone();
    provenance["platform"] = json!({ "architecture": "unknown", "os": "unknown" });
    let both = index(&[foreign.clone(), ours, provenance]);
    let both =
        lab.layout.blob("application/vnd.oci.image.index.v1+json", &serde_json::to_vec(&both).unwrap());
    lab.layout.list(both, "v1").list(foreign, "foreign");

    assert_eq!(lab.take(":v1").await.unwrap().id, digest.replace("sha256:", "oci-"));
    let error = lab.take(":foreign").await.unwrap_err().to_string();
    assert!(error.contains("no image for linux/") && error.contains(other), "{error}");
    let error = lab.take(":v2").await.unwrap_err().to_string();
    assert!(error.contains("no image \"v2\"") && error.contains("v1, foreign"), "{error}");
}

#[tokio::test]
async fn what_is_damaged_or_forged_is_refused() {
    let good = || {
        let lab = Lab::new();
        let layer = lab.layout.layer(&hello(), Pack::Gzip);
        (lab, layer)
    };

    let (mut lab, layer) = good();
    lab.layout.image(std::slice::from_ref(&layer), json!({}));
    let file = lab.blob_file(&layer.descriptor);
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    // The length in gzip's trailer: everything before it is unpacked as it should be.
    bytes[last] ^= 1;
    fs::write(&file, &bytes).unwrap();
    lab.refuses("layer sha256:").await;
    assert!(lab.stored("layer-").is_empty());

    // Another layer under this one's name: what it says of itself is true, and it has the right size.
    let (mut lab, layer) = good();
    lab.layout.image(std::slice::from_ref(&layer), json!({}));
    let file = lab.blob_file(&layer.descriptor);
    let size = fs::read(&file).unwrap().len();
    let mut other = tar_of(&[("evil", b"evil")]);
    other.resize(size.max(other.len()), 0);
    fs::write(&file, &other).unwrap();
    lab.refuses(if other.len() == size { "damaged or forged" } else { "bytes instead of" }).await;
    assert!(lab.stored("layer-").is_empty());

    // A layer that is not what the configuration says.
    let (mut lab, layer) = good();
    let liar = lab.layout.layer(&tar_of(&[("x", b"x")]), Pack::Gzip);
    let forged = Blob { descriptor: layer.descriptor.clone(), ..liar };
    lab.layout.image(&[forged], json!({}));
    lab.refuses("without its compression").await;
    assert!(lab.stored("layer-").is_empty());

    // A manifest that was changed where it lies.
    let (mut lab, layer) = good();
    let manifest = lab.layout.manifest(&[layer], json!({}));
    let file = lab.blob_file(&manifest);
    let text = fs::read_to_string(&file).unwrap().replace("schemaVersion\":2", "schemaVersion\":3");
    fs::write(&file, text).unwrap();
    lab.layout.list(manifest, "");
    lab.refuses("manifest sha256:").await;

    let (mut lab, layer) = good();
    lab.layout.image(std::slice::from_ref(&layer), json!({}));
    fs::remove_file(lab.blob_file(&layer.descriptor)).unwrap();
    lab.refuses("is missing").await;
}

#[tokio::test]
async fn what_is_no_image_is_said_to_be_none() {
    let lab = Lab::new();
    lab.refuses("no index.json").await;

    let lab = Lab::new();
    fs::write(lab.layout.path.join("index.json"), "{").unwrap();
    lab.refuses("index cannot be understood").await;

    let lab = Lab::new();
    lab.layout.write_index(&index(&[]));
    lab.refuses("holds no image").await;

    let mut lab = Lab::new();
    lab.layout.image(&[], json!({}));
    lab.refuses("0 layers").await;

    let mut lab = Lab::new();
    let layer = lab.layout.layer(&hello(), Pack::Gzip);
    lab.layout.image(&vec![layer; 129], json!({}));
    lab.refuses("129 layers").await;

    let mut lab = Lab::new();
    let mut layer = lab.layout.layer(&hello(), Pack::Gzip);
    layer.descriptor["mediaType"] = "application/vnd.example.model".into();
    lab.layout.image(&[layer], json!({}));
    lab.refuses("not understood").await;

    let mut lab = Lab::new();
    let manifest = lab.layout.manifest(&[], json!({}));
    let mut inner = lab
        .layout
        .blob("application/vnd.oci.image.index.v1+json", &serde_json::to_vec(&index(&[manifest])).unwrap());
    for _ in 0..6 {
        let bytes = serde_json::to_vec(&index(&[inner])).unwrap();
        inner = lab.layout.blob("application/vnd.oci.image.index.v1+json", &bytes);
    }
    lab.layout.list(inner, "");
    lab.refuses("too deep").await;
}

#[tokio::test]
async fn all_layers_together_stay_within_the_bounds() {
    let mut lab = Lab::with(Bounds { bytes: 1500, ..Bounds::default() });
    let layers: Vec<Blob> = ["a", "b"]
        .iter()
        .map(|name| lab.layout.layer(&tar_of(&[(name, &[b'x'; 1000])]), Pack::Gzip))
        .collect();
    lab.layout.image(&layers, json!({}));

    lab.refuses("more than 500 bytes").await;
}

#[tokio::test]
async fn what_nobody_uses_any_more_is_removed() {
    let mut lab = Lab::new();
    let base = lab.layout.layer(&hello(), Pack::Gzip);
    let old = lab.layout.layer(&tar_of(&[("version", b"1")]), Pack::Gzip);
    let new = lab.layout.layer(&tar_of(&[("version", b"2")]), Pack::Gzip);
    lab.layout.image(&[base.clone(), old.clone()], json!({}));
    let running = lab.take("").await.unwrap();

    lab.layout.image(&[base.clone(), new.clone()], json!({}));
    let next = lab.take("").await.unwrap();
    assert_ne!(running.id, next.id);
    assert!(lab.tree(&old).exists(), "an instance runs on it");

    // Another daemon takes the instance over; then the instance ends.
    let adopted = lab.store.lease(&running.id);
    drop(running);
    lab.layout.image(std::slice::from_ref(&new), json!({}));
    lab.take("").await.unwrap();
    assert!(lab.tree(&old).exists() && lab.tree(&base).exists());
    drop((adopted, next));
    lab.layout.image(&[new.clone(), base.clone()], json!({}));
    lab.take("").await.unwrap();

    assert!(!lab.tree(&old).exists());
    assert!(lab.tree(&base).exists() && lab.tree(&new).exists());
    assert_eq!(lab.stored("oci-").len(), 1);
}

#[test]
fn references_name_a_path_and_perhaps_an_image() {
    let parse = |text| {
        let Reference { path, wanted } = Reference::parse(text);
        (path, wanted)
    };
    let path = |text: &str| Path::new(text).to_owned();
    assert_eq!(parse("/a/b"), (path("/a/b"), None));
    assert_eq!(parse("/a:x/b"), (path("/a:x/b"), None));
    assert_eq!(parse("/a/b:v1"), (path("/a/b"), Some("v1".into())));
    assert_eq!(parse("/a/b@sha256:12"), (path("/a/b"), Some("sha256:12".into())));
}
