//! The program itself, and the example, as processes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at what it did not expect"
)]

mod common;

use std::{
    fs::{self, Permissions},
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use common::*;
use launcher_client::admin::{self, Answer, Question};
use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use tokio::time::sleep;

/// Ends the process when the test ends, however it ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(program: &Path, arguments: &[&str]) -> Running {
    Running(Command::new(program).args(arguments).stdout(Stdio::null()).spawn().unwrap())
}

fn open_up(launcher: &FakeLauncher) {
    // The launcher would see to it that the proxy's user gets to its socket.
    for (path, mode) in [
        (launcher.state.root().to_owned(), 0o755),
        (launcher.state.run(), 0o755),
        (launcher.state.launcher_socket(), 0o666),
    ] {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_gives_up_root_serves_and_ends_when_it_is_idle() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    launcher.put(app("blog"), web.port);
    open_up(&launcher);
    let address = free_address();
    let state = launcher.state.root().to_str().unwrap();
    let listen = address.to_string();
    let program = Path::new(env!("CARGO_BIN_EXE_fastcontainer-proxy"));
    let metrics = free_address();
    let port = metrics.port().to_string();
    let mut running = start(
        program,
        &["--listen", &listen, "--state", state, "--threads", "2", "--die-with-parent", "--metrics", &port],
    );
    eventually(|| launcher.state.proxy_socket().exists()).await;
    assert_eq!(get(address, "blog.test", "/").await.body, "hello");
    figures_are_told(&launcher, metrics).await;
    let status = fs::read_to_string(format!("/proc/{}/status", running.0.id())).unwrap();
    if nix::unistd::geteuid().is_root() {
        let line = |key: &str| status.lines().find(|line| line.starts_with(key)).unwrap().to_owned();
        assert!(line("Uid:").contains("60902\t60902\t60902\t60902"), "{status}");
        assert!(line("Gid:").contains("60900\t60900"), "{status}");
        assert!(line("CapEff:").ends_with("0000000000000400"), "only CAP_NET_BIND_SERVICE: {status}");
        assert!(line("CapPrm:").ends_with("0000000000000400"), "{status}");
        assert!(line("NoNewPrivs:").ends_with('1'), "{status}");
    }
    let pid = Pid::from_raw(i32::try_from(running.0.id()).unwrap());
    let log = launcher.state.proxy().join("access.log");
    let lines = |path: &Path| fs::read_to_string(path).map_or(0, |log| log.lines().count());
    eventually(|| lines(&log) == 1).await;
    let rotated = log.with_extension("1");
    fs::rename(&log, &rotated).unwrap();
    kill(pid, Signal::SIGHUP).unwrap();
    assert_eq!(get(address, "blog.test", "/").await.status, 200);
    eventually(|| lines(&log) + lines(&rotated) == 2).await;
    assert_eq!(get(address, "blog.test", "/").await.status, 200);
    kill(pid, Signal::SIGTERM).unwrap();
    let mut ended = None;
    eventually(|| {
        ended = running.0.try_wait().unwrap();
        ended.is_some()
    })
    .await;
    assert!(ended.unwrap().success());
    assert!(!launcher.state.proxy_socket().exists());
    assert!(lines(&log) >= 1, "the log was opened anew");
    assert_eq!(lines(&log) + lines(&rotated), 3, "the last request is in the log too");
}

/// After one cold request, over HTTP and on the admin socket.
async fn figures_are_told(launcher: &FakeLauncher, address: SocketAddr) {
    let mut page = get(address, "localhost", "/metrics").await;
    // The request is counted a moment after the client has the answer.
    for _ in 0..100 {
        if page.body.contains("requests_total") && page.body.contains("class=\"2xx\"") {
            break;
        }
        sleep(Duration::from_millis(20)).await;
        page = get(address, "localhost", "/metrics").await;
    }
    assert_eq!(
        (page.status, page.header("content-type")),
        (200, Some("text/plain; version=0.0.4; charset=utf-8"))
    );
    let own = admin::metrics(&launcher.state.proxy_socket()).await.unwrap();
    for text in [page.body, own] {
        for line in [
            "fastcontainer_proxy_requests_total{app=\"blog\",class=\"2xx\"} 1",
            "fastcontainer_proxy_cold_requests_total{app=\"blog\"} 1",
            "fastcontainer_proxy_in_flight{app=\"blog\"} 0",
            "fastcontainer_proxy_hold_seconds_count 1",
            "fastcontainer_proxy_request_duration_seconds_bucket{le=\"+Inf\"} 1",
            "fastcontainer_proxy_connections_total{kind=\"new\"} 1",
            "fastcontainer_proxy_unanswered_total{reason=\"queue-full\"} 0",
            "fastcontainer_proxy_launcher_up 1",
            "# TYPE fastcontainer_proxy_first_byte_seconds histogram",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is not in:\n{text}");
        }
    }
    assert_eq!(get(address, "localhost", "/").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_held_requests_are_cheap_and_all_answered() {
    const CROWD: usize = 4_000;
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    let mut wide = app("blog");
    wide.hold.queue = 10_000;
    launcher.put(wide, web.port);
    launcher.script("blog", |script| script.delay = Duration::from_secs(4));
    open_up(&launcher);
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let address = free_address();
    let (state, listen) = (launcher.state.root().to_str().unwrap(), address.to_string());
    let running =
        start(Path::new(env!("CARGO_BIN_EXE_fastcontainer-proxy")), &["--listen", &listen, "--state", state]);
    eventually(|| launcher.state.proxy_socket().exists()).await;
    let before = resident_kib(&running);
    let requests: Vec<_> = (0..CROWD).map(|_| tokio::spawn(get(address, "blog.test", "/"))).collect();
    let mut held = 0;
    while held < CROWD as u64 {
        let Answer::Stats(stats) =
            admin::ask(&launcher.state.proxy_socket(), &Question::Stats {}).await.unwrap()
        else {
            panic!()
        };
        held = stats.held;
        assert!(launcher.wakes("blog") <= 1);
        sleep(Duration::from_millis(10)).await;
    }
    let each = (resident_kib(&running) - before) / CROWD;
    // Without optimisation the futures of a request are larger.
    let most = if cfg!(debug_assertions) { 56 } else { 32 };
    assert!(each <= most, "{each} KiB for each held request");
    for request in requests {
        assert_eq!(request.await.unwrap().status, 200);
    }
}

fn resident_kib(running: &Running) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", running.0.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_taken_is_a_clear_error() {
    let launcher = FakeLauncher::start();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap().to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_fastcontainer-proxy"))
        .args(["--listen", &listen, "--state", launcher.state.root().to_str().unwrap()])
        .output()
        .unwrap();
    assert!(!output.status.success() && output.stdout.is_empty());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains(&format!("cannot listen on {listen}")), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_embeds_the_phases_in_a_server_of_its_own() {
    let example = example();
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    launcher.put(app("blog"), web.port);
    launcher.script("blog", |script| script.delay = Duration::from_millis(100));
    let address: SocketAddr = free_address();
    let _running = start(&example, &[launcher.state.root().to_str().unwrap(), &address.to_string()]);
    eventually(|| launcher.state.proxy_socket().exists()).await;
    assert_eq!(get(address, "blog.test", "/healthz").await.body, "fine\n");
    assert_eq!(launcher.wakes("blog"), 0);
    let response = get(address, "blog.test", "/").await;
    assert_eq!((response.body.as_str(), response.header("x-served-by")), ("hello", Some("my-own-pingora")));
    assert_eq!(launcher.wakes("blog"), 1);
}

/// Cargo builds examples with the tests, next to the programs.
fn example() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_fastcontainer-proxy")).with_file_name("examples").join("embedded")
}
