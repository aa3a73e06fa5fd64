//! A whole proxy in this process, against a launcher that is fake and apps that are a few lines each.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "shared by several test programs")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends at what it did not expect")]

use std::{
    collections::HashMap,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    time::Duration,
};

use cmdb::{
    App, AppName, AppRecord, Generation, Instance, State,
    app::{Container, Hold, Lifecycle, Pick, Resources, Scale},
    compute::{Compute, Node, Nodes},
    units::Bytes,
};
use fastcontainer_proxy::{
    Config, FastContainer, config::Cluster, doorman, house::House, seal::ClusterKey, tls::ClusterTls,
};
use launcher_client::{
    packet,
    paths::StateDir,
    wire::{ClientPacket, Refusal, RefusalCode, Reply, Request, ServerPacket, VERSION, WakeTiming},
};
use pingora::server::{RunArgs, Server, ShutdownSignal, ShutdownSignalWatch};
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener};

mod web;

pub use web::*;

/// What the proxies of a cluster share.
pub const KEY: &[u8] = b"0123456789abcdef0123456789abcdef";
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Stands in for the launcher (which needs root): speaks its protocol, and "starts" apps that run in the test already.
pub struct FakeLauncher {
    pub state: StateDir,
    shared: Arc<Shared>,
    _folder: tempfile::TempDir,
}

pub type SocketMaker = Arc<dyn Fn() -> OwnedFd + Send + Sync>;

/// What the fake launcher does when one app is woken.
#[derive(Clone)]
pub struct Script {
    pub port: u16,
    pub delay: Duration,
    pub refusal: Option<Refusal>,
    pub sockets: SocketMaker,
}

#[derive(Default)]
pub struct Shared {
    /// The name of its host; what it starts is there.
    node: String,
    nodes: Mutex<Nodes>,
    /// Those whose CMDB is the same: they hear of what this one starts.
    others: Mutex<Vec<Arc<Shared>>>,
    apps: Mutex<HashMap<AppName, FakeApp>>,
    heard: Mutex<Vec<Request>>,
    changes: Mutex<Vec<mpsc::UnboundedSender<Reply>>>,
    connections: Mutex<Vec<watch::Sender<bool>>>,
}

struct FakeApp {
    app: Arc<App>,
    record: AppRecord,
    script: Script,
    wakes: usize,
}

impl FakeLauncher {
    pub fn start() -> Self {
        Self::start_on("here")
    }

    /// On a host of that name.
    pub fn start_on(node: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        std::fs::create_dir_all(state.run()).unwrap();
        std::fs::create_dir_all(state.proxy()).unwrap();
        let launcher = Self {
            state,
            shared: Arc::new(Shared { node: node.into(), ..Shared::default() }),
            _folder: folder,
        };
        launcher.listen();
        launcher
    }

    fn listen(&self) {
        let path = self.state.launcher_socket();
        let _ = std::fs::remove_file(&path);
        let mut listener = UnixSeqpacketListener::bind(&path).unwrap();
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            while let Ok(socket) = listener.accept().await {
                tokio::spawn(serve(Arc::new(socket), Arc::clone(&shared)));
            }
        });
    }

    /// Makes an app known; `port` is where it listens already.
    pub fn put(&self, app: App, port: u16) {
        self.put_with(
            app,
            Script { port, delay: Duration::ZERO, refusal: None, sockets: Arc::new(loopback_socket) },
        );
    }

    pub fn put_with(&self, app: App, script: Script) {
        let app = Arc::new(app);
        let record = AppRecord { rev: 1, ..AppRecord::default() };
        let reply = Reply::Put { app: Arc::clone(&app), record: Arc::new(record.clone()) };
        self.shared.apps.lock().unwrap().insert(app.name.clone(), FakeApp { app, record, script, wakes: 0 });
        self.shared.tell(reply);
    }

    /// From now on others hear of what this one starts.
    pub fn share_with(&self, others: &[&Self]) {
        *self.shared.others.lock().unwrap() = others.iter().map(|other| Arc::clone(&other.shared)).collect();
    }

    /// The hosts are these from now on.
    pub fn set_nodes(&self, nodes: &[Node]) {
        let nodes: Nodes = nodes.into();
        *self.shared.nodes.lock().unwrap() = Arc::clone(&nodes);
        self.shared.tell(Reply::Nodes { nodes });
    }

    pub fn script(&self, app: &str, change: impl FnOnce(&mut Script)) {
        change(&mut self.shared.apps.lock().unwrap().get_mut(&name(app)).unwrap().script);
    }

    pub fn remove(&self, app: &str) {
        self.shared.apps.lock().unwrap().remove(&name(app));
        self.shared.tell(Reply::Removed { app: name(app) });
    }

    /// Changes an instance's state as the launcher would, and tells the proxies.
    pub fn change(&self, app: &str, change: impl FnOnce(&mut AppRecord)) {
        let reply = {
            let mut apps = self.shared.apps.lock().unwrap();
            let app = apps.get_mut(&name(app)).unwrap();
            change(&mut app.record);
            app.record.rev += 1;
            Reply::Put { app: Arc::clone(&app.app), record: Arc::new(app.record.clone()) }
        };
        self.shared.tell(reply);
    }

    /// The launcher dies; what it knows is kept by the fake.
    pub fn disconnect(&self) {
        std::fs::remove_file(self.state.launcher_socket()).unwrap();
        self.shared.changes.lock().unwrap().clear();
        for connection in self.shared.connections.lock().unwrap().drain(..) {
            let _ = connection.send(true);
        }
    }

    pub fn reconnect(&self) {
        self.listen();
    }

    pub fn wakes(&self, app: &str) -> usize {
        self.shared.apps.lock().unwrap()[&name(app)].wakes
    }

    pub fn generation(&self, app: &str) -> Generation {
        self.shared.apps.lock().unwrap()[&name(app)].record.generation
    }

    pub fn heard(&self, which: impl Fn(&Request) -> bool) -> usize {
        self.shared.heard.lock().unwrap().iter().filter(|request| which(request)).count()
    }
}

impl Shared {
    fn learn(&self, name: &AppName, record: &AppRecord) {
        let mut apps = self.apps.lock().unwrap();
        let Some(app) = apps.get_mut(name) else { return };
        app.record = record.clone();
        self.tell(Reply::Put { app: Arc::clone(&app.app), record: Arc::new(record.clone()) });
    }

    fn tell(&self, reply: Reply) {
        self.changes.lock().unwrap().retain(|sender| sender.send(reply.clone()).is_ok());
    }
}

async fn serve(socket: Arc<UnixSeqpacket>, shared: Arc<Shared>) {
    let (killer, mut killed) = watch::channel(false);
    shared.connections.lock().unwrap().push(killer);
    let mut buffer = Vec::new();
    loop {
        let packet = tokio::select! {
            packet = packet::receive::<ClientPacket>(&socket, &mut buffer) => packet,
            _ = killed.changed() => return,
        };
        let Ok((packet, _)) = packet else { return };
        tokio::spawn(answer(
            Arc::clone(&socket),
            Arc::clone(&shared),
            packet.id,
            packet.body,
            killed.clone(),
        ));
    }
}

async fn answer(
    socket: Arc<UnixSeqpacket>,
    shared: Arc<Shared>,
    id: u64,
    request: Request,
    mut killed: watch::Receiver<bool>,
) {
    let reply = |body| ServerPacket { v: VERSION, id, body };
    shared.heard.lock().unwrap().push(request.clone());
    match request {
        Request::Watch { .. } => {
            let (sender, mut changes) = mpsc::unbounded_channel();
            let present: Vec<_> = {
                let apps = shared.apps.lock().unwrap();
                shared.changes.lock().unwrap().push(sender);
                let nodes = Arc::clone(&shared.nodes.lock().unwrap());
                apps.values()
                    .map(|app| Reply::Put { app: Arc::clone(&app.app), record: Arc::new(app.record.clone()) })
                    .chain((!nodes.is_empty()).then_some(Reply::Nodes { nodes }))
                    .chain([Reply::Synced])
                    .collect()
            };
            for body in present {
                packet::send(&socket, &reply(body), &[]).await.unwrap();
            }
            loop {
                let body = tokio::select! { body = changes.recv() => body, _ = killed.changed() => None };
                let Some(body) = body else { return };
                if packet::send(&socket, &reply(body), &[]).await.is_err() {
                    return;
                }
            }
        }
        Request::Wake { app, sockets } => {
            let script = shared.apps.lock().unwrap().get_mut(&app).map(|app| {
                app.wakes += 1;
                app.script.clone()
            });
            let Some(script) = script else {
                let refusal = Refusal::new(RefusalCode::UnknownApp, "no such app");
                let _ = packet::send(&socket, &reply(Reply::Error(refusal)), &[]).await;
                return;
            };
            sleep(script.delay).await;
            if let Some(refusal) = script.refusal {
                let _ = packet::send(&socket, &reply(Reply::Error(refusal)), &[]).await;
                return;
            }
            let (generation, put, begun) = {
                let mut apps = shared.apps.lock().unwrap();
                let Some(app) = apps.get_mut(&app) else { return };
                let ready = app.record.ready().map(|instance| instance.generation).next();
                let generation = ready.unwrap_or(Generation(app.record.generation.0 + 1));
                if ready.is_none() {
                    app.record.rev += 1;
                    app.record.generation = generation;
                    app.record.instances.insert(
                        generation,
                        Instance { node: shared.node.clone(), ..instance(generation, script.port) },
                    );
                    for other in shared.others.lock().unwrap().iter() {
                        other.learn(&app.app.name, &app.record);
                    }
                }
                let put = Reply::Put { app: Arc::clone(&app.app), record: Arc::new(app.record.clone()) };
                (generation, put, ready.is_none())
            };
            shared.tell(put);
            let timing = WakeTiming { warm: !begun, total_us: 1234, ..WakeTiming::default() };
            let fds: Vec<_> = (0..sockets).map(|_| (script.sockets)()).collect();
            let woken = Reply::Woken { generation, port: script.port, timing };
            let _ = packet::send(&socket, &reply(woken), &fds).await;
        }
        Request::Sockets { app, generation, count } => {
            let maker = {
                let apps = shared.apps.lock().unwrap();
                apps.get(&app)
                    .filter(|app| app.record.instances.contains_key(&generation))
                    .map(|app| Arc::clone(&app.script.sockets))
            };
            match maker {
                Some(maker) => {
                    let fds: Vec<_> = (0..count).map(|_| maker()).collect();
                    let _ = packet::send(&socket, &reply(Reply::Sockets { count }), &fds).await;
                }
                None => {
                    let refusal = Refusal::new(RefusalCode::UnknownInstance, "no such instance");
                    let _ = packet::send(&socket, &reply(Reply::Error(refusal)), &[]).await;
                }
            }
        }
        _ => {}
    }
}

pub fn instance(generation: Generation, port: u16) -> Instance {
    Instance { generation, state: State::Ready, node: "here".into(), port, since_ms: 0, deadline_ms: 0 }
}

pub fn loopback_socket() -> OwnedFd {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap()
}

pub fn name(app: &str) -> AppName {
    app.parse().unwrap()
}

/// An app called `app`, reached as `app.test`.
pub fn app(app: &str) -> App {
    App {
        name: name(app),
        origin: cmdb::Origin::default(),
        server_names: vec![format!("{app}.test").parse().unwrap()],
        container: Container {
            image: "dir:/".into(),
            base: None,
            command: vec!["x".into()],
            port: None,
            user: String::new(),
            workdir: "/".into(),
            env: Default::default(),
            provision: Vec::new(),
        },
        volumes: Vec::new(),
        network: Default::default(),
        resources: Resources {
            cpu: None,
            cpu_max: None,
            memory: Bytes(1 << 28),
            pids: 64,
            disk: Bytes(1 << 28),
        },
        lifecycle: Lifecycle {
            start_timeout: Duration::from_secs(10),
            freeze_after: None,
            reclaim_after: None,
            idle_timeout: None,
            lifetime: None,
            drain_timeout: Duration::from_secs(10),
            stop_timeout: Duration::from_secs(1),
            recycle_at: None,
        },
        scale: Scale {
            min: 0,
            max: 4,
            response_time: None,
            cool_down: Scale::usual_cool_down(),
            concurrency: None,
            pick: Pick::Random,
            slow_start: None,
        },
        hold: Hold {
            queue: 1000,
            timeout: Duration::from_secs(15),
            page: false,
            page_after: Hold::usual_page_after(),
        },
        hooks: Vec::new(),
    }
}

/// A proxy that serves the apps of a launcher until it is dropped.
pub struct Proxy {
    pub address: SocketAddr,
    /// Where it takes requests of other hosts' proxies.
    pub dispatch: SocketAddr,
    pub house: Arc<House>,
    stop: watch::Sender<Option<bool>>,
}

impl Proxy {
    pub async fn start(launcher: &FakeLauncher) -> Self {
        Self::start_with(launcher, |_| {}).await
    }

    pub async fn start_with(launcher: &FakeLauncher, change: impl FnOnce(&mut Config)) -> Self {
        Self::start_h2(launcher, change, false).await
    }

    pub async fn start_h2(launcher: &FakeLauncher, change: impl FnOnce(&mut Config), h2c: bool) -> Self {
        let (address, dispatch) = (free_address(), free_address());
        let mut config = Config::new(launcher.state.clone());
        change(&mut config);
        let conf = FastContainer::server_conf(&config, 2);
        let (proxy, attendants) = FastContainer::new(config, vec![address, dispatch]);
        let (house, dispatcher) = (Arc::clone(proxy.house()), proxy.dispatcher());
        let (stop, stopped) = watch::channel(None);
        std::thread::spawn(move || {
            let mut server = Server::new_with_opt_and_conf(None, conf);
            server.bootstrap();
            let mut options = pingora::apps::HttpServerOptions::default();
            options.h2c = h2c;
            let mut service = doorman::service(&server.configuration, proxy, Some(options));
            service.add_tcp(&address.to_string());
            let config = dispatcher.house().config.clone();
            let mut dispatcher = doorman::service(&server.configuration, dispatcher, None);
            doorman::listen(&mut dispatcher, &config, dispatch).unwrap();
            server.add_service(dispatcher);
            server.add_service(attendants.link);
            server.add_service(attendants.office);
            server.add_service(service);
            server.run(RunArgs { shutdown_signal: Box::new(Stop(stopped)) });
        });
        // Its admin socket says when it serves.
        eventually(|| launcher.state.proxy_socket().exists()).await;
        Self { address, dispatch, house, stop }
    }

    /// As one of several hosts' proxies; `node`: the host that it is on, with a launcher and a dispatcher.
    pub async fn start_in_cluster(launcher: &FakeLauncher, node: Option<&str>) -> Self {
        Self::start_knowing(launcher, node, ClusterKey::new(KEY), None).await
    }

    /// The same with other credentials.
    pub async fn start_knowing(
        launcher: &FakeLauncher,
        node: Option<&str>,
        key: Option<ClusterKey>,
        tls: Option<ClusterTls>,
    ) -> Self {
        let cluster = Cluster { node: node.map(str::to_owned), cmdb: None, key, tls: tls.map(Arc::new) };
        Self::start_with(launcher, |config| config.cluster = Some(cluster)).await
    }

    /// As the others know its host.
    pub fn as_node(&self, name: &str, alive: bool) -> Node {
        let compute =
            Compute { name: name.to_owned(), dispatch: self.dispatch.to_string(), ..Compute::default() };
        Node { compute, alive, ..Node::default() }
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        let _ = self.stop.send(Some(true));
    }

    /// Its process ends: nobody listens there any more.
    pub async fn kill(self) {
        let dispatch = self.dispatch;
        drop(self);
        while tokio::net::TcpStream::connect(dispatch).await.is_ok() {
            sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn held(&self) -> usize {
        self.house.seats.taken()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.stop.send(Some(false));
    }
}

struct Stop(watch::Receiver<Option<bool>>);

#[async_trait::async_trait]
impl ShutdownSignalWatch for Stop {
    async fn recv(&self) -> ShutdownSignal {
        match self.0.clone().wait_for(Option::is_some).await.map(|graceful| *graceful) {
            Ok(Some(true)) => ShutdownSignal::GracefulTerminate,
            _ => ShutdownSignal::FastShutdown,
        }
    }
}

pub fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Waits until something is so.
pub async fn eventually(mut so: impl FnMut() -> bool) {
    timeout(PATIENCE, async {
        while !so() {
            sleep(Duration::from_millis(2)).await;
        }
    })
    .await
    .expect("it never came to be so");
}
