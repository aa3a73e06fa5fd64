//! A live launcher and peers that mean it ill: damaged packets, descriptors that nobody asked for, floods, ends in the
//! middle; as root, as the proxy, as the CoreAPI and as nobody. Needs root.

use std::fs;
use std::io::{IoSlice, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use launcher_client::paths::{COREAPI_UID, GROUP_ID, PROXY_UID};
use launcher_client::wire::{ClientPacket, Reply, Request, ServerPacket, VERSION};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Gid, Uid};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};

use crate::damage::{cases, corpus, damaged};

const PATIENCE: Duration = Duration::from_secs(20);
/// How many packets a peer sends before it leaves.
const VISIT: usize = 200;
/// Growth of the launcher's memory that a crowd of such peers may cause, KiB.
const GROWTH: u64 = 64 * 1024;

struct Launcher {
    process: Child,
    folder: tempfile::TempDir,
    cgroup: String,
}

impl Launcher {
    fn start() -> Launcher {
        let folder = tempfile::Builder::new().prefix("fcz").tempdir_in("/tmp").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(folder.path(), mode).unwrap();
        let cgroup = format!("fc-fuzz-{}", std::process::id());
        let process = Command::new(env!("CARGO_BIN_EXE_fastcontainer-launcher"))
            .args(["--cgroup-parent", &cgroup, "--state"])
            .arg(folder.path().join("s"))
            .env("RUST_LOG", "off")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let launcher = Launcher { process, folder, cgroup };
        let end = Instant::now() + PATIENCE;
        while rustix::net::connect(new_socket(), &launcher.address()).is_err() {
            assert!(Instant::now() < end, "the launcher serves");
            std::thread::sleep(Duration::from_millis(20));
        }
        launcher
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("s/run/launcher.sock")
    }

    fn address(&self) -> SocketAddrUnix {
        SocketAddrUnix::new(self.path()).unwrap()
    }

    /// A connection as this user; `None` where it is refused at the door.
    fn connect_as(&self, user: u32, group: u32) -> Option<OwnedFd> {
        let address = self.address();
        // A thread of its own may be somebody else; the others stay root.
        let connected = std::thread::spawn(move || {
            let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
            rustix::thread::set_thread_groups(&[]).unwrap();
            rustix::thread::set_thread_res_gid(Some(group), Some(group), Some(group)).unwrap();
            rustix::thread::set_thread_res_uid(Some(user), Some(user), Some(user)).unwrap();
            let socket = new_socket();
            rustix::net::connect(&socket, &address).map(|()| socket).ok()
        });
        connected.join().unwrap()
    }

    /// It answers root at once, whatever the others do.
    fn answers(&self) {
        let socket = self.connect_as(0, 0).expect("root is let in");
        let packet = ClientPacket { v: VERSION, id: 7, body: Request::Ps { app: None } };
        send(socket.as_fd(), &serde_json::to_vec(&packet).unwrap(), &[]).unwrap();
        let end = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < end, "ps is answered");
            let Some(answer) = receive(socket.as_fd(), Duration::from_secs(1)) else { continue };
            let answer: ServerPacket = serde_json::from_slice(&answer).unwrap();
            if answer.id == 7 && matches!(answer.body, Reply::End) {
                return;
            }
        }
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.process.id())).unwrap().count()
    }

    fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        resident.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Ends by itself when it is told to, and leaves nothing.
    fn end(mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(self.process.wait().unwrap().success());
        assert!(!Path::new("/sys/fs/cgroup").join(&self.cgroup).exists());
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn new_socket() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(250))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    // A peer that is not read from any more does not wait.
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags).map(drop)
}

fn receive(socket: BorrowedFd<'_>, patience: Duration) -> Option<Vec<u8>> {
    let mut polled = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    let timeout = Timespec::try_from(patience).unwrap();
    if poll(&mut polled, Some(&timeout)).unwrap() == 0 {
        return None;
    }
    let mut bytes = vec![0; 256 * 1024];
    let (length, _) = rustix::net::recv(socket, &mut bytes[..], RecvFlags::DONTWAIT).ok()?;
    bytes.truncate(length);
    Some(bytes)
}

#[test]
fn hostile_peers_cost_the_launcher_nothing_that_lasts() {
    let launcher = Launcher::start();
    launcher.answers();
    let (descriptors, memory) = (launcher.descriptors(), launcher.memory());
    let junk = fs::File::open("/dev/null").unwrap();
    let config = cases(3_000);
    let visits = usize::try_from(config.cases).unwrap().div_ceil(VISIT);
    let mut runner = TestRunner::new(config);
    let packets = damaged(corpus("packets"));

    for visit in 0..visits {
        let (user, group) =
            [(0, 0), (PROXY_UID, GROUP_ID), (COREAPI_UID, GROUP_ID), (12_345, GROUP_ID)][visit % 4];
        let Some(socket) = launcher.connect_as(user, group) else { continue };
        for number in 0..VISIT {
            let bytes = packets.new_tree(&mut runner).unwrap().current();
            if bytes.is_empty() {
                continue; // an empty packet is an end
            }
            // The kernel lets no packet carry more than 253 descriptors, and 250 fit our own buffer.
            let fds = vec![junk.as_fd(); [0, 0, 0, 1, 64, 65, 250][number % 7]];
            // Reading keeps the conversation going, not reading fills the launcher's side: both must do.
            if visit % 3 > 0 {
                while receive(socket.as_fd(), Duration::ZERO).is_some_and(|bytes| !bytes.is_empty()) {}
            }
            if matches!(send(socket.as_fd(), &bytes, &fds), Err(rustix::io::Errno::PIPE)) {
                break;
            }
        }
        match visit % 5 {
            0 => drop(rustix::net::shutdown(&socket, rustix::net::Shutdown::Write)),
            1 => drop(rustix::net::shutdown(&socket, rustix::net::Shutdown::Read)),
            _ => {}
        }
        if visit % 10 == 0 {
            launcher.answers();
        }
    }

    launcher.answers();
    let end = Instant::now() + PATIENCE;
    while launcher.descriptors() > descriptors {
        assert!(Instant::now() < end, "{} descriptors, {descriptors} before", launcher.descriptors());
        std::thread::sleep(Duration::from_millis(50));
    }
    let grown = launcher.memory().saturating_sub(memory);
    assert!(grown < GROWTH, "{grown} KiB more than before");
    launcher.end();
}

#[test]
fn a_flood_from_one_peer_does_not_keep_others_waiting() {
    let launcher = Launcher::start();
    let packet = ClientPacket { v: VERSION, id: 1, body: Request::Events { since: 0, follow: false } };
    let bytes = serde_json::to_vec(&packet).unwrap();
    let flooders: Vec<OwnedFd> =
        (0..8).map(|_| launcher.connect_as(PROXY_UID, GROUP_ID).expect("the proxy is let in")).collect();
    // Each says as much as it can and reads nothing.
    for socket in &flooders {
        while send(socket.as_fd(), &bytes, &[]).is_ok() {}
    }

    launcher.answers();

    drop(flooders);
    launcher.answers();
    launcher.end();
}

#[test]
fn strangers_are_not_let_in() {
    let launcher = Launcher::start();
    assert!(launcher.connect_as(12_345, 12_345).is_none(), "the socket's mode");
    let member = launcher.connect_as(12_345, GROUP_ID).expect("a member of the group is let in");
    let stop = corpus("packets").into_iter().find(|packet| packet.windows(4).any(|part| part == b"stop"));
    send(member.as_fd(), &stop.unwrap(), &[]).unwrap();
    let answer = receive(member.as_fd(), PATIENCE).expect("an answer");
    let answer: ServerPacket = serde_json::from_slice(&answer).unwrap();
    assert!(matches!(answer.body, Reply::Error(refusal) if refusal.code.to_string() == "forbidden"));
    // The spawner is root's alone, and its folder is closed.
    let mut nothing = String::new();
    let state = launcher.folder.path().join("s/launcher");
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&state).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700);
    assert!(fs::File::open(launcher.path()).and_then(|mut file| file.read_to_string(&mut nothing)).is_err());
    launcher.end();
}
