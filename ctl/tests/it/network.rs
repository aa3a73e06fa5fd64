//! Where apps may connect to. Each story has a small world of network namespaces: this thread's own is the host; another is
//! everything outside, with a host of the internet, private hosts and a cloud's metadata service.

use std::{
    fs,
    io::Write as _,
    net::{SocketAddr, TcpListener, UdpSocket},
    os::fd::AsRawFd as _,
    process::Command,
    sync::mpsc,
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{host::Host, vhost::Vhost};

/// Of the world outside.
const OUTSIDE: [&str; 12] = [
    "203.0.113.1/24",
    "9.9.9.9/32",
    "10.9.0.5/32",
    "10.9.0.6/32",
    "192.168.7.7/32",
    "169.254.169.254/32",
    "100.100.100.200/32",
    "2001:db8:1::1/64",
    "2606:4700::1111/128",
    "fd99::5/128",
    "fd00:ec2::254/128",
    "64:ff9b::a09:5/128",
];
/// The host's own.
const HOST_V4: &str = "203.0.113.2";
const HOST_V6: &str = "2001:db8:1::2";

/// Runs a story on a thread whose network is the world's host, with its own `/etc/hosts` and `/etc/resolv.conf`.
fn in_a_world(story: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let told = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("run the tests as root");
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
            let etc = tempfile::Builder::new().prefix("fcetc").tempdir_in("/tmp").unwrap();
            for (name, text) in [
                ("hosts", "127.0.0.1 localhost\n10.9.0.5 db.internal\n127.0.1.1 this-host.internal\n"),
                ("resolv.conf", "nameserver 127.0.0.53\nnameserver 9.9.9.9\noptions timeout:1 attempts:1\n"),
            ] {
                let file = etc.path().join(name);
                fs::write(&file, text).unwrap();
                let place = fs::canonicalize(format!("/etc/{name}")).unwrap();
                mount(Some(&file), &place, none, MsFlags::MS_BIND, none).unwrap();
            }
            let outside = outside();
            serve("0.0.0.0:7000");
            serve("[::]:7000");
            serve("127.0.0.1:7001");
            story();
            drop(outside);
        });
        if let Err(panic) = told.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Makes the world outside; it is there until what is returned is dropped.
fn outside() -> mpsc::Sender<()> {
    let (end, ended) = mpsc::channel::<()>();
    let (ready, made) = mpsc::channel();
    let (go_on, linked) = mpsc::channel::<()>();
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        ready.send(fs::File::open("/proc/thread-self/ns/net").unwrap()).unwrap();
        linked.recv().unwrap();
        ip("link set lo up");
        ip("link set out0 up");
        for address in OUTSIDE {
            let device = if address.ends_with("/24") || address.ends_with("/64") { "out0" } else { "lo" };
            ip(&format!(
                "addr add {address} dev {device}{}",
                if address.contains(':') { " nodad" } else { "" }
            ));
        }
        for port in [80, 3306, 53] {
            serve(&format!("0.0.0.0:{port}"));
            serve(&format!("[::]:{port}"));
        }
        answer_datagrams("9.9.9.9:53");
        ready.send(fs::File::open("/dev/null").unwrap()).unwrap();
        let _ = ended.recv();
    });
    let netns = made.recv().unwrap();
    ip("link set lo up");
    // The tool opens the path itself, as a child of this thread.
    let path = format!("/proc/{}/fd/{}", std::process::id(), netns.as_raw_fd());
    ip(&format!("link add up0 type veth peer name out0 netns {path}"));
    ip("link set up0 up");
    go_on.send(()).unwrap();
    made.recv().unwrap();
    ip(&format!("addr add {HOST_V4}/24 dev up0"));
    ip(&format!("addr add {HOST_V6}/64 dev up0 nodad"));
    ip("route add default via 203.0.113.1");
    ip("-6 route add default via 2001:db8:1::1");
    end
}

fn ip(arguments: &str) {
    run("ip", arguments);
}

#[track_caller]
fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split(' ')).output();
    let output = output.unwrap_or_else(|error| panic!("{program} (see scripts/install-missing): {error}"));
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Tells everybody who connects who they are.
fn serve(address: &str) {
    // The IPv6 one must leave IPv4 to the other.
    let address: SocketAddr = address.parse().unwrap();
    let domain = if address.is_ipv4() {
        nix::sys::socket::AddressFamily::Inet
    } else {
        nix::sys::socket::AddressFamily::Inet6
    };
    let socket = nix::sys::socket::socket(
        domain,
        nix::sys::socket::SockType::Stream,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    if address.is_ipv6() {
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Ipv6V6Only, &true).unwrap();
    }
    nix::sys::socket::bind(socket.as_raw_fd(), &nix::sys::socket::SockaddrStorage::from(address)).unwrap();
    nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::new(64).unwrap()).unwrap();
    let listener = TcpListener::from(socket);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let peer = stream.peer_addr().map(|peer| peer.ip().to_string()).unwrap_or_default();
            let _ = stream.write_all(peer.as_bytes());
        }
    });
}

fn answer_datagrams(address: &str) {
    let socket = UdpSocket::bind(address).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(b"heard", peer);
        }
    });
}

fn app(name: &str, outbound: &str) -> Vhost {
    Vhost::probe(name).with("network", &format!("outbound = {outbound}"))
}

/// What comes of an attempt to connect from inside the app.
fn connect(host: &Host, app: &Vhost, to: &str) -> Value {
    host.get(app, &format!("/connect?to={to}")).json()
}

fn reaches(host: &Host, app: &Vhost, to: &str) -> bool {
    connect(host, app, to)["ok"] == true
}

/// The address of the app's own end, of that family.
fn address_of(host: &Host, app: &Vhost, family: &str) -> String {
    let pid = host.ps(app.name())[0]["pid"].as_u64().unwrap();
    let text = run("nsenter", &format!("-t {pid} -n ip -o {family} addr show dev eth0 scope global"));
    let address = text.split_whitespace().nth(3).unwrap_or_else(|| panic!("no address: {text}"));
    address.split('/').next().unwrap().to_owned()
}

#[test]
fn an_app_reaches_what_is_listed_and_nothing_else() {
    in_a_world(|| {
        let red = app("red", "\"internet\"");
        let blue =
            app("blue", "[\"10.9.0.5:3306\", \"[fd99::5]:3306\", \"203.0.113.2:7000\", \"0.0.0.0/0:80\"]");
        let green = Vhost::probe("green");
        let host = Host::up(&[&red, &blue, &green]);
        for vhost in [&red, &blue, &green] {
            host.get(vhost, "/");
        }
        let (red_v4, blue_v4) = (address_of(&host, &red, "-4"), address_of(&host, &blue, "-4"));
        let (red_v6, blue_v6) = (address_of(&host, &red, "-6"), address_of(&host, &blue, "-6"));
        let gateway =
            run("ip", "-o -4 addr show").lines().find(|line| line.contains(": fc")).unwrap().to_owned();
        let gateway = gateway.split_whitespace().nth(3).unwrap().split('/').next().unwrap().to_owned();

        // Destination, and whether red (the internet), blue (a list) reach it; green reaches nothing.
        let matrix: Vec<(String, bool, bool)> = [
            ("9.9.9.9:80", true, true),
            ("9.9.9.9:3306", true, false),
            ("[2606:4700::1111]:80", true, false),
            ("10.9.0.5:3306", false, true),
            ("10.9.0.5:80", false, true),
            ("10.9.0.6:3306", false, false),
            ("192.168.7.7:3306", false, false),
            ("[fd99::5]:3306", false, true),
            ("[fd99::5]:53", false, false),
            ("[64:ff9b::a09:5]:80", false, false),
            // Metadata, although 0.0.0.0/0:80 is listed.
            ("169.254.169.254:80", false, false),
            ("100.100.100.200:80", false, false),
            ("[fd00:ec2::254]:80", false, false),
            // The host itself: only by its listed address and port.
            ("203.0.113.2:7000", false, true),
            ("[2001:db8:1::2]:7000", false, false),
            ("127.0.0.1:7001", false, false),
            ("[::1]:7000", false, false),
        ]
        .map(|(to, red, blue)| (to.to_owned(), red, blue))
        .into_iter()
        // The way in, from the host's side of the links, and one another: the probe of each listens on 8080.
        .chain([
            (format!("{gateway}:7000"), false, false),
            ("[fe80::1%25eth0]:7000".to_owned(), false, false),
            (format!("203.0.113.2:{}", host.port), false, false),
        ])
        .collect();
        let mut wrong = Vec::new();
        for (to, red_may, blue_may) in &matrix {
            for (vhost, may) in [(&red, *red_may), (&blue, *blue_may), (&green, false)] {
                let outcome = connect(&host, vhost, to);
                if (outcome["ok"] == true) != may {
                    wrong.push(format!("{} to {to}: {outcome}", vhost.name()));
                }
            }
        }
        for (from, to) in [(&red, &blue_v4), (&blue, &red_v4), (&green, &red_v4)] {
            if reaches(&host, from, &format!("{to}:8080")) {
                wrong.push(format!("{} reaches {to}", from.name()));
            }
        }
        for (from, to) in [(&red, &blue_v6), (&blue, &red_v6)] {
            if reaches(&host, from, &format!("[{to}]:8080")) {
                wrong.push(format!("{} reaches {to}", from.name()));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}\n{}", run("nft", "list ruleset"));

        // Addresses are translated: the world sees the host.
        assert_eq!(connect(&host, &red, "9.9.9.9:80")["said"], HOST_V4);
        assert_eq!(connect(&host, &red, "[2606:4700::1111]:80")["said"], HOST_V6);
        // DNS for the internet alone; the name server on the loopback address is left out.
        let dns = |vhost| host.get(vhost, "/connect?to=9.9.9.9:53&udp=1").json()["ok"].clone();
        assert_eq!((dns(&red), dns(&blue)), (true.into(), false.into()));
        assert_eq!(host.get(&red, "/network").json()["resolv_conf"], "nameserver 9.9.9.9\n");
        // Refusals are quick, and told.
        let refused = connect(&host, &blue, "10.9.0.6:3306");
        assert!(refused["error"].as_str().unwrap().contains("refused"), "{refused}");
        host.wait_for("the refusal to be told", || {
            let told = host.events("blue").into_iter().filter(|event| event["kind"] == "network-refused");
            told.into_iter().any(|event| event["message"].as_str().unwrap().contains("10.9.0.6:3306"))
        });
        // Nothing that the container's root can do changes it: no capability over its network.
        let attempts = host.get(&red, "/escape").json()["attempts"].clone();
        assert_eq!(attempts["socket(raw icmp)"], "EPERM");
        host.end();
        assert_as_before();
    });
}

/// Nothing of the network is left, and the host forwards no more than before.
#[track_caller]
fn assert_as_before() {
    assert_eq!(run("nft", "list ruleset"), "", "rules are left");
    let routes = run("ip", "route") + &run("ip", "-6 route");
    assert!(!routes.contains("unreachable 10.") && !routes.contains("unreachable fd"), "{routes}");
    let read = |path: &str| fs::read_to_string(format!("/proc/sys/net/{path}")).unwrap();
    assert_eq!(read("ipv4/conf/up0/forwarding").trim(), "0");
    assert_eq!(read("ipv4/ip_forward").trim(), "0");
    let end = Instant::now() + crate::host::PATIENCE;
    while run("ip", "-o link").contains(": fc") {
        assert!(Instant::now() < end, "{}", run("ip", "-o link"));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_app_may_connect_in_its_first_moment() {
    in_a_world(|| {
        let blog = app("blog", "[\"10.9.0.5:3306\"]").env("CONNECT_FIRST", "10.9.0.5:3306");
        let host = Host::up(&[&blog]);
        for _ in 0..5 {
            host.get(&blog, "/");
            host.ctl_ok(&["stop", "blog"]);
        }
        let log = host.ctl_ok(&["logs", "blog"]);
        let slow: Vec<&str> = log.lines().filter(|line| line.contains("connected first")).collect();
        assert_eq!(slow.len(), 5, "{log}");
        // A first packet that is lost costs a whole second.
        assert!(slow.iter().all(|line| milliseconds(line) < 900.0), "{slow:#?}");
        host.end();
    });
}

fn milliseconds(line: &str) -> f64 {
    let (_, rest) = line.split_once("\"ms\":").unwrap();
    rest.split([',', '}']).next().unwrap().parse().unwrap()
}

#[test]
fn names_are_looked_up_by_the_launcher_and_followed() {
    in_a_world(|| {
        let blog = app("blog", "[\"db.internal:3306\", \"this-host.internal:7001\", \"nowhere.invalid:80\"]");
        let host = Host::up(&[&blog]);
        let network = host.get(&blog, "/network").json();
        assert!(network["hosts"].as_str().unwrap().contains("10.9.0.5\tdb.internal"), "{network}");
        assert_eq!(
            (&network["hosts_is_writable"], &network["nsswitch_conf"]),
            (&false.into(), &"hosts: files dns\n".into())
        );
        assert!(network["resolv_conf"].as_str().unwrap().starts_with('#'), "{network}");
        assert!(reaches(&host, &blog, "db.internal:3306"));
        let told: Vec<String> =
            host.events("blog").iter().map(|event| event["message"].to_string()).collect();
        assert!(
            told.iter().any(|told| told.contains("this-host.internal") && told.contains("127.0.1.1")),
            "{told:#?}"
        );
        assert!(told.iter().any(|told| told.contains("nowhere.invalid")), "{told:#?}");

        fs::write("/etc/hosts", "127.0.0.1 localhost\n10.9.0.6 db.internal\n").unwrap();

        host.wait_for("the running app to see the new address", || {
            host.get(&blog, "/network").json()["hosts"].as_str().unwrap().contains("10.9.0.6\tdb.internal")
        });
        assert!(reaches(&host, &blog, "db.internal:3306"));
        assert!(!reaches(&host, &blog, "10.9.0.5:3306"), "the old address is nobody's now");
        assert_eq!(host.ps("blog").len(), 1);
        host.end();
    });
}

#[test]
fn the_network_outlives_the_launcher_and_a_flush_of_the_packet_filter() {
    in_a_world(|| {
        let red = app("red", "\"internet\"");
        let blue = app("blue", "[\"10.9.0.5:3306\"]");
        let mut host = Host::up(&[&red, &blue]);
        let before = host.get(&red, "/").generation();
        host.get(&blue, "/");

        let killed = host.pid_of("fastcontainer-launcher");
        kill(Pid::from_raw(killed), Signal::SIGKILL).unwrap();
        assert!(reaches(&host, &red, "9.9.9.9:80"), "without a launcher");
        host.wait_for("a new launcher", || {
            host.find_pid_of("fastcontainer-launcher").is_some_and(|pid| pid != killed)
                && host.ctl(&["ps", "red", "--json"]).status.success()
                && host.states("red") == ["ready"]
        });
        assert_eq!(host.get(&red, "/").generation(), before, "the same instance");
        assert!(reaches(&host, &red, "9.9.9.9:80") && !reaches(&host, &red, "10.9.0.5:3306"));
        host.ctl_ok(&["stop", "blue"]);
        assert!(reaches(&host, &blue, "10.9.0.5:3306") && !reaches(&host, &blue, "9.9.9.9:80"));

        run("nft", "flush ruleset");
        host.wait_for("the rules to be back", || host.events_of_host("network-restored") > 0);
        assert!(reaches(&host, &red, "9.9.9.9:80") && !reaches(&host, &red, "203.0.113.2:7000"));

        // What is taken out of the list is out of reach at once, also for what runs.
        let narrower = app("red", "[\"9.9.9.9:3306\"]");
        host.apply(&narrower);
        host.wait_for("the narrower list to be in force", || !reaches(&host, &red, "9.9.9.9:80"));
        assert!(reaches(&host, &red, "9.9.9.9:3306"));

        // Everything dies at once; the next start finds what was left, and the end of that one leaves nothing.
        let cgroup = host.cgroup();
        let mut pids = vec![host.pid()];
        for program in ["fastcontainer-launcher", "fastcontainer-proxy", "fastcontainer-coreapi"] {
            pids.extend(host.find_pid_of(program));
        }
        for pid in pids {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        host.wait();
        host.again();
        host.get(&blue, "/");
        assert!(reaches(&host, &blue, "10.9.0.5:3306"));
        assert!(!cgroup.is_empty());
        host.end();
        assert_as_before();
    });
}

#[test]
fn an_app_whose_network_cannot_be_says_why() {
    in_a_world(|| {
        let blog = app("blog", "\"internet\"");
        // The host uses the addresses already.
        let file = ("blog.toml".to_owned(), blog.text().into_bytes());
        let host = Host::up_after(&[file], &["--network-pool", "203.0.113.0/25"], |_| {});
        let woken = host.ctl(&["wake", "blog"]);
        assert_eq!(woken.status.code(), Some(1));
        let said = String::from_utf8_lossy(&woken.stderr).into_owned();
        assert!(said.contains("203.0.113.0/25") && said.contains("--network-pool"), "{said}");
        assert_eq!(run("nft", "list ruleset"), "", "nothing was changed");
        drop(host);
    });
}

#[test]
fn a_provisioning_step_reaches_what_its_app_may_reach_and_nothing_else() {
    in_a_world(|| {
        let file = |name: &str, outbound: &str| {
            let step = "[[provision]]\nname = \"connect\"\nrun = [\"/probe\"]\n\
                        env = { CONNECT_FIRST = \"10.9.0.5:3306\", LISTEN_AFTER_MS = \"0\", EXIT_AFTER_MS = \"1500\", EXIT_CODE = \"0\" }\n";
            let vhost = Vhost::probe(name).with("network", &format!("outbound = {outbound}"));
            (format!("{name}.toml"), format!("{}{step}", vhost.text()).into_bytes())
        };
        let host = Host::up_with(&[file("open", "[\"db.internal:3306\"]"), file("closed", "\"none\"")]);

        host.wait_for("the one that may", || host.count("open", "image-provisioned") == 1);
        host.wait_for("the one that may not", || host.count("closed", "image-failed") > 0);
        assert_eq!(host.count("closed", "image-provisioned"), 0);
        host.end();
    });
}
