//! Images from a registry: Debian's `docker-registry` on the loopback.

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::Instant,
};

use serde_json::{Value, json};

use crate::{
    host::{Host, PATIENCE},
    http::{Connection, get, request},
    oci::{
        file,
        fixture::{Blob, Layout, Pack, tar_of},
        probe_config, probe_layer,
    },
};

/// `user:s3cret`, as HTTP has it and as the registry keeps it (bcrypt).
pub(crate) const SECRET: &str = "dXNlcjpzM2NyZXQ=";
const HTPASSWD: &str = "user:$2b$04$abcdefghijklmnopqrstuuLZYjhNQAOdpbzt4WxWlUHjv1wsyH5DG\n";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A registry that runs.
pub(crate) struct Registry {
    child: Option<Child>,
    pub(crate) port: u16,
    pub(crate) folder: tempfile::TempDir,
    locked: bool,
}

impl Registry {
    fn new(locked: bool) -> Registry {
        let folder = tempfile::Builder::new().prefix("fcreg").tempdir_in("/tmp").unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        fs::write(folder.path().join("htpasswd"), HTPASSWD).unwrap();
        let auth = if locked {
            format!("auth:\n  htpasswd:\n    realm: test\n    path: {}/htpasswd\n", folder.path().display())
        } else {
            String::new()
        };
        let config = format!(
            "version: 0.1\nlog:\n  level: debug\nstorage:\n  filesystem:\n    rootdirectory: {}/blobs\nhttp:\n  addr: 127.0.0.1:{port}\n{auth}",
            folder.path().display()
        );
        fs::write(folder.path().join("config.yml"), config).unwrap();
        Registry { child: None, port, folder, locked }
    }

    fn start(&mut self) {
        let log = fs::File::create(self.folder.path().join("log")).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(self.folder.path().join("config.yml"))
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("docker-registry is installed (scripts/install-missing test)");
        self.child = Some(child);
        let end = Instant::now() + PATIENCE;
        while Connection::try_open(self.port).is_err() {
            assert!(Instant::now() < end, "the registry does not listen: {}", self.log());
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    pub(crate) fn up(locked: bool) -> Registry {
        let mut registry = Registry::new(locked);
        registry.start();
        registry
    }

    /// Starts it again with more under `http` and at the end of its configuration.
    pub(crate) fn restart_with(&mut self, http: &str, more: &str) {
        self.stop();
        let path = self.folder.path().join("config.yml");
        let config = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{config}{http}{more}")).unwrap();
        self.start();
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    fn put(&self, path: &str, media_type: &str, bytes: &[u8]) {
        let host = format!("127.0.0.1:{}", self.port);
        let mut put = request("PUT", &host, path).header("Content-Type", media_type);
        if self.locked {
            put = put.header("Authorization", &format!("Basic {SECRET}"));
        }
        let answer = Connection::open(self.port).exchange(&put.body(bytes)).unwrap();
        assert_eq!(answer.status, 201, "{path}: {}", answer.text());
    }

    fn push_blob(&self, name: &str, layout: &Layout, descriptor: &Value) {
        let digest = descriptor["digest"].as_str().unwrap();
        let bytes = fs::read(layout.path.join("blobs/sha256").join(&digest[7..])).unwrap();
        let host = format!("127.0.0.1:{}", self.port);
        let mut begin = request("POST", &host, &format!("/v2/{name}/blobs/uploads/"));
        if self.locked {
            begin = begin.header("Authorization", &format!("Basic {SECRET}"));
        }
        let begun = Connection::open(self.port).exchange(&begin.body(b"")).unwrap().expect_status(202);
        let location = begun.header("location").unwrap();
        let path = location.split_once("://").map_or(location, |(_, rest)| &rest[rest.find('/').unwrap()..]);
        let sign = if path.contains('?') { '&' } else { '?' };
        self.put(&format!("{path}{sign}digest={digest}"), "application/octet-stream", &bytes);
    }

    /// Pushes an image of these layers under a name and tag; its digest.
    pub(crate) fn push(&self, name: &str, tag: &str, layout: &Layout, layers: &[Blob]) -> String {
        let manifest = layout.manifest(layers, probe_config());
        let digest = manifest["digest"].as_str().unwrap().to_owned();
        let text = fs::read(layout.path.join("blobs/sha256").join(&digest[7..])).unwrap();
        let parsed: Value = serde_json::from_slice(&text).unwrap();
        self.push_blob(name, layout, &parsed["config"]);
        for layer in layers {
            self.push_blob(name, layout, &layer.descriptor);
        }
        self.put(&format!("/v2/{name}/manifests/{tag}"), MANIFEST, &text);
        digest
    }

    fn image(&self, name: &str) -> String {
        format!("docker://127.0.0.1:{}/{name}", self.port)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop();
    }
}

pub(crate) fn layout(folder: &Path) -> Layout {
    Layout::new(&folder.join("layout"))
}

fn images(host: &Host) -> Vec<Value> {
    serde_json::from_str(&host.ctl_ok(&["images", "--json"])).unwrap()
}

pub(crate) fn state(host: &Host, image: &str) -> Value {
    images(host).into_iter().find(|known| known["image"] == image).unwrap_or_default()
}

pub(crate) fn greeting(host: &Host, name: &str) -> Value {
    let answer = host.ask(&get(&format!("{name}.test"), "/env")).unwrap().expect_status(200).json();
    answer["GREETING"].clone()
}

fn news(host: &Host, name: &str) -> bool {
    let answer = host.ask(&get(&format!("{name}.test"), "/escape")).unwrap().expect_status(200).json();
    answer["facts"]["root_entries"].as_array().unwrap().contains(&"news".into())
}

#[test]
fn an_image_is_fetched_ahead_of_the_first_request_and_a_moved_tag_is_followed() {
    let registry = Registry::up(false);
    let layout = layout(registry.folder.path());
    let base = probe_layer(&layout, Pack::Gzip);
    let first = registry.push("shop/blog", "v1", &layout, std::slice::from_ref(&base));
    let image = registry.image("shop/blog:v1");
    let by_digest = registry.image(&format!("shop/blog@{first}"));
    let host = Host::up_with(&[file("blog", &image, ""), file("pinned", &by_digest, "")]);

    host.wait_for("the image to be there", || state(&host, &image)["state"] == "ready");
    assert_eq!(host.count("blog", "image-ready"), 1, "{:?}", host.events("blog"));
    assert_eq!(host.count("blog", "wake"), 0, "nobody has asked for it");
    assert_eq!(greeting(&host, "blog"), "image");
    let known = state(&host, &image);
    assert_eq!(
        (known["id"].as_str(), &known["apps"]),
        (Some(first.replace("sha256:", "oci-").as_str()), &json!(["blog"]))
    );

    let over = layout.layer(&tar_of(&[("news", b"spring")]), Pack::Zstd);
    let second = registry.push("shop/blog", "v1", &layout, &[base, over]);
    // Each start has the tag looked at; the start after finds what came of it.
    host.ctl_ok(&["stop", "blog"]);
    assert!(!news(&host, "blog"));
    host.wait_for("the newer image to be there", || {
        state(&host, &image)["id"] == second.replace("sha256:", "oci-").as_str()
    });
    assert_eq!(host.ps("blog")[0]["image_is_old"], true);
    assert!(host.ctl_ok(&["ps", "blog"]).contains("(old)"));
    let table = host.ctl_ok(&["images"]);
    assert!(table.contains("ready") && table.contains("blog"), "{table}");

    host.ctl_ok(&["restart", "blog"]);
    host.wait_for("the newer image to run", || {
        host.ps("blog").iter().all(|line| line["image_is_old"] == false && line["state"] == "ready")
    });
    assert!(news(&host, "blog"));
    assert!(!news(&host, "pinned"), "a digest does not move");
    host.wait_for("the fetchers to be gone", || {
        fs::read_dir(host.state.join("fetch")).unwrap().next().is_none()
    });
    host.end();
}

#[test]
fn a_registry_that_asks_who_we_are_gets_what_the_file_says_and_nobody_else_sees_it() {
    let registry = Registry::up(true);
    let layout = layout(registry.folder.path());
    let base = probe_layer(&layout, Pack::Gzip);
    registry.push("secret/blog", "latest", &layout, &[base]);
    let image = registry.image("secret/blog");
    let auth = registry.folder.path().join("auth.json");
    fs::write(&auth, r#"{"auths":{}}"#).unwrap();
    let host =
        Host::up_after(&[file("blog", &image, "")], &["--registry-auth", &auth.to_string_lossy()], |_| {});

    host.wait_for("the refusal", || host.count("blog", "image-failed") > 0);
    let failed = state(&host, &image);
    assert!(failed["error"].as_str().unwrap().contains("--registry-auth"), "{failed}");
    let entry = json!({ "auths": { format!("127.0.0.1:{}", registry.port): { "auth": SECRET } } });
    fs::write(&auth, entry.to_string()).unwrap();

    // The first request is not to wait for the next try.
    assert_eq!(greeting(&host, "blog"), "image");
    let said = host.log() + &host.ctl_ok(&["events", "--json"]) + &host.ctl_ok(&["images", "--json"]);
    assert!(!said.contains("s3cret") && !said.contains(SECRET), "the password is in a log");
    host.end();
}

#[test]
fn what_cannot_be_fetched_is_tried_again_and_a_visitor_is_told_why() {
    let mut registry = Registry::new(false);
    let image = registry.image("blog:v1");
    let host = Host::up_with(&[file("blog", &image, "")]);

    host.wait_for("the failure", || state(&host, &image)["state"] == "failed");
    host.ask(&get("blog.test", "/env")).unwrap().expect_status(502);
    let woken = host.ctl(&["wake", "blog"]);
    let said = String::from_utf8_lossy(&woken.stderr).into_owned();
    assert!(!woken.status.success() && said.contains("127.0.0.1") && said.contains("refused"), "{said}");
    assert_eq!(host.count("blog", "image-failed"), 1, "told once, not with every try");

    registry.start();
    let layout = layout(registry.folder.path());
    let base = probe_layer(&layout, Pack::Gzip);
    registry.push("blog", "v1", &layout, &[base]);
    host.wait_for("another try to succeed", || state(&host, &image)["state"] == "ready");
    assert_eq!(host.count("blog", "image-ready"), 1);

    let missing = registry.image("blog:v2");
    fs::write(host.conf.join("blog.toml"), file("blog", &missing, "").1).unwrap();
    host.wait_for("the other tag to be missed", || state(&host, &missing)["state"] == "failed");
    let error = state(&host, &missing)["error"].as_str().unwrap().to_owned();
    assert!(error.contains("has no image") && error.contains("blog:v2"), "{error}");
    host.end();
}

#[test]
fn what_no_file_names_any_more_is_removed_and_what_has_no_room_is_refused() {
    let registry = Registry::up(false);
    let layout = layout(registry.folder.path());
    let base = probe_layer(&layout, Pack::Gzip);
    let big = layout.layer(&tar_of(&[("big", &[b'x'; 20 << 20])]), Pack::Gzip);
    registry.push("small", "v1", &layout, std::slice::from_ref(&base));
    registry.push("big", "v1", &layout, &[base, big]);
    let (small, big) = (registry.image("small:v1"), registry.image("big:v1"));
    let host = Host::up_after(
        &[file("small", &small, ""), file("other", &small, "")],
        &["--image-space", "16MiB"],
        |_| {},
    );
    host.wait_for("the image to be there", || state(&host, &small)["state"] == "ready");

    fs::write(host.conf.join("big.toml"), file("big", &big, "").1).unwrap();
    host.wait_for("the refusal", || state(&host, &big)["state"] == "failed");
    let error = state(&host, &big)["error"].as_str().unwrap().to_owned();
    assert!(error.contains("--image-space") && error.contains("16777216"), "{error}");
    assert_eq!(state(&host, &small)["state"], "ready");

    let stored = || {
        let entries = fs::read_dir(host.state.join("launcher/images")).unwrap().flatten();
        entries.filter(|e| e.file_name().to_string_lossy().starts_with("oci-")).count()
    };
    let layers = || {
        let entries = fs::read_dir(host.state.join("launcher/images")).unwrap().flatten();
        entries.filter(|e| e.file_name().to_string_lossy().starts_with("layer-")).count()
    };
    assert_eq!(greeting(&host, "small"), "image");
    fs::remove_file(host.conf.join("big.toml")).unwrap();
    fs::remove_file(host.conf.join("other.toml")).unwrap();
    host.wait_for("both to be gone", || images(&host).len() == 1);
    assert_eq!(stored(), 1, "another app has it still");
    fs::remove_file(host.conf.join("small.toml")).unwrap();
    host.wait_for("the instance to be gone", || images(&host).is_empty());
    // The next change makes room: an instance kept its image until it ended.
    host.wait_for("the image to be removed", || {
        fs::write(host.conf.join("other.toml"), file("other", "dir:/nonexistent", "command = [\"/x\"]").1)
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
        let _ = fs::remove_file(host.conf.join("other.toml"));
        stored() == 0 && layers() == 0
    });
    host.end();
}
