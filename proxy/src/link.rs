//! The connection to the launcher: the watch that feeds the cache, wakes, sockets, and what the launcher is told. It runs
//! on a runtime of its own, so that no request's future owns a wake (law 5) and no busy request delays one.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::Ordering::{Relaxed, SeqCst},
    },
    time::Duration,
};

use async_trait::async_trait;
use cmdb::{
    AppName, Change, Generation,
    redis::{self, RedisStore, Role},
    store::Store as _,
};
use launcher_client::{
    Client, ClientError,
    wire::{Activity, RefusalCode, Request},
};
use pingora::{connectors::http::Connector, server::ShutdownWatch, services::background::BackgroundService};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, sleep, timeout},
};

use crate::{
    bill,
    config::Cluster,
    house::House,
    memory,
    pages::Fault,
    stock::Stock,
    tenant::AppRuntime,
    upstream::Upstream,
    wake::{self, Verdict, Waker},
};

/// How often the launcher hears what instances do.
const REPORT_EVERY: Duration = Duration::from_millis(250);
/// How often it hears of apps whose response time is judged.
const SUMMARY_EVERY: Duration = Duration::from_millis(100);
/// Most reports in one packet.
const REPORT_CHUNK: usize = 256;

/// What the rest of the proxy asks of the link.
#[derive(Debug)]
pub enum Command {
    /// Have an instance ready.
    Wake(Arc<AppRuntime>),
    /// Have an instance ready on this host, for requests that another one's proxy sent.
    WakeForGuests(Arc<AppRuntime>),
    /// Have an instance ready on this host, for another one's proxy.
    WakeForAnother {
        /// Of which app.
        app: AppName,
        /// Where the answer goes.
        verdict: watch::Sender<Option<Verdict>>,
    },
    /// Fetch sockets.
    Refill(Arc<Stock>),
    /// An instance answered for the first time.
    FirstByte {
        /// Its app.
        app: AppName,
        /// Its generation.
        generation: Generation,
    },
    /// An instance has become slower than its app's `scale.response-time`.
    Breach(Arc<Upstream>),
    /// Connecting to an instance failed.
    Suspect {
        /// Its app.
        app: AppName,
        /// Its generation.
        generation: Generation,
        /// The error in words.
        reason: String,
    },
    /// A draining instance has no request of ours.
    Quiesced {
        /// Its app.
        app: AppName,
        /// Its generation.
        generation: Generation,
    },
}

/// The link as a Pingora background service.
#[derive(Debug)]
pub struct Link {
    house: Arc<House>,
    /// Taken by the service when it starts.
    commands: Mutex<Option<mpsc::UnboundedReceiver<Command>>>,
}

/// The connection of the moment, for tasks that need one.
pub(crate) type Line = watch::Receiver<Option<Client>>;

impl Link {
    /// `commands` is what [`House::new`] gave.
    #[must_use]
    pub fn new(house: Arc<House>, commands: mpsc::UnboundedReceiver<Command>) -> Self {
        Self { house, commands: Mutex::new(Some(commands)) }
    }

    /// Runs until the runtime ends. `shutdown` begins the end: see [`end_of_grace`].
    pub async fn run(&self, shutdown: ShutdownWatch) {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(commands) = commands else { return };
        // An edge alone has a store of its own, which remembers.
        let alone = is_alone(&self.house);
        if !alone {
            memory::recall(&self.house);
        }
        let (sender, line) = watch::channel(None);
        tokio::join!(
            follow(&self.house, sender),
            obey(&self.house, commands, line.clone()),
            report(&self.house, line.clone()),
            bill::report(&self.house, line),
            end_of_grace(&self.house, shutdown),
            async {
                if !alone {
                    memory::keep(&self.house).await;
                }
            },
        );
    }
}

#[async_trait]
impl BackgroundService for Link {
    async fn start(&self, shutdown: ShutdownWatch) {
        self.run(shutdown).await;
    }
}

/// Whether this is an edge alone, without a launcher beside it.
fn is_alone(house: &House) -> bool {
    matches!(house.config.cluster, Some(Cluster { node: None, cmdb: Some(_), .. }))
}

/// Keeps the cache in step with the CMDB: with the launcher's, over its socket, or as an edge alone with Redis itself.
async fn follow(house: &Arc<House>, line: watch::Sender<Option<Client>>) {
    match house.config.cluster.as_ref() {
        Some(Cluster { node: None, cmdb: Some(address), .. }) => follow_redis(house, address).await,
        _ => follow_launcher(house, &line).await,
    }
}

async fn follow_launcher(house: &Arc<House>, line: &watch::Sender<Option<Client>>) {
    let path = house.config.state.launcher_socket();
    let mut pause = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    loop {
        let watching = async {
            let client = Client::connect(&path).await?;
            let changes = client.watch(true).await?;
            Ok::<_, ClientError>((client, changes))
        };
        match watching.await {
            Ok((client, changes)) => {
                tracing::info!(path = %path.display(), "connected to the launcher");
                line.send_replace(Some(client));
                take_in(house, changes, || {
                    pause.reset();
                    // A launcher that has just come has not heard what was said to the one before.
                    house.apps().iter().flat_map(|app| app.upstreams()).for_each(|one| one.repeat_quiesced());
                })
                .await;
                line.send_replace(None);
                tracing::warn!("the launcher went away; warm apps are served on");
            }
            Err(error) => tracing::debug!(%error, "the launcher cannot be reached"),
        }
        sleep(pause.next()).await;
    }
}

async fn follow_redis(house: &Arc<House>, address: &str) {
    let known = house.config.state.proxy().join("cmdb.last-known-good");
    let store = match RedisStore::open_remembering(address, Role::Reader, redis::BUDGET, &known) {
        Ok(store) => store,
        // It was parsed before it came here.
        Err(error) => return tracing::error!(%error, "the CMDB cannot be followed"),
    };
    let mut pause = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    loop {
        match store.watch().await {
            Ok(changes) => {
                tracing::info!("following the CMDB");
                take_in(house, changes, || pause.reset()).await;
                tracing::warn!("the CMDB's changes came faster than they could be taken in; beginning again");
            }
            Err(error) => tracing::debug!(%error, "the CMDB cannot be followed"),
        }
        sleep(pause.next()).await;
    }
}

/// Takes in a watch until it ends; `synced` is called when all that was there has come.
async fn take_in(house: &Arc<House>, mut changes: mpsc::Receiver<Change>, mut synced: impl FnMut()) {
    house.linked.store(true, SeqCst);
    house.metrics.launcher(true, house.begun.elapsed());
    house.synced.store(false, SeqCst);
    house.cache.begin_sync();
    while let Some(change) = changes.recv().await {
        if let Change::Nodes(nodes) = &change {
            house.learn_hosts(Arc::clone(nodes));
        }
        let all = matches!(change, Change::Synced);
        // A record that nobody thought of may cost its own app, never the link (and with it all apps).
        let applied = catch_unwind(AssertUnwindSafe(|| house.admit(|cache| cache.apply(change))));
        if applied.is_err() {
            tracing::error!("a record of the CMDB could not be taken over; this is a bug");
        }
        if all {
            house.synced.store(true, SeqCst);
            house.informed.store(true, SeqCst);
            synced();
        }
    }
    house.linked.store(false, SeqCst);
    house.metrics.launcher(false, house.begun.elapsed());
}

/// Carries out commands, each in a task of its own.
async fn obey(house: &Arc<House>, mut commands: mpsc::UnboundedReceiver<Command>, line: Line) {
    let caller = Arc::new(Connector::new(None));
    while let Some(command) = commands.recv().await {
        match command {
            Command::Wake(app) => {
                let (line, caller) = (line.clone(), Arc::clone(&caller));
                tokio::spawn(Waker { app, guests: false, line, caller }.run());
            }
            Command::WakeForGuests(app) => {
                let (line, caller) = (line.clone(), Arc::clone(&caller));
                tokio::spawn(Waker { app, guests: true, line, caller }.run());
            }
            Command::WakeForAnother { app, verdict } => {
                tokio::spawn(wake::for_another(Arc::clone(house), app, line.clone(), verdict));
            }
            Command::Refill(stock) => {
                tokio::spawn(refill(stock, line.clone()));
            }
            Command::FirstByte { app, generation } => {
                tell(&line, Request::FirstByte { app, generation }).await
            }
            Command::Breach(upstream) => {
                let activity = vec![activity_of(house, &upstream)];
                tell(&line, Request::Report { activity }).await;
            }
            Command::Suspect { app, generation, reason } => {
                tell(&line, Request::Suspect { app, generation, reason }).await;
            }
            Command::Quiesced { app, generation } => tell(&line, Request::Quiesced { app, generation }).await,
        }
    }
}

async fn refill(stock: Arc<Stock>, mut line: Line) {
    let mut pause = Backoff::new(Duration::from_millis(10), Duration::from_millis(500));
    while !stock.is_closed() {
        let Some(client) = connection(&mut line).await else { continue };
        match client.sockets(&stock.app, stock.generation, stock.batch()).await {
            Ok(sockets) => {
                stock.put(sockets);
                break;
            }
            Err(ClientError::Refused(refusal)) if refusal.code == RefusalCode::UnknownInstance => {
                stock.close();
                break;
            }
            Err(error) => {
                tracing::debug!(app = %stock.app, generation = %stock.generation, %error, "no sockets; trying again");
            }
        }
        sleep(pause.next()).await;
    }
    stock.refilled();
}

/// The connection, waited for a second at most, so that the caller can see whether it is still wanted.
pub(crate) async fn connection(line: &mut Line) -> Option<Client> {
    let waited = timeout(Duration::from_secs(1), line.wait_for(Option::is_some))
        .await
        .map(|client| client.map(|client| client.clone()).ok());
    match waited {
        Ok(Some(client)) => client,
        Ok(None) => {
            // The link has ended, and the runtime is about to.
            sleep(Duration::from_secs(1)).await;
            None
        }
        Err(_) => None,
    }
}

pub(crate) async fn tell(line: &Line, request: Request) {
    let client = line.borrow().clone();
    // Without a connection there is nobody to tell; a new launcher learns what matters after the resync.
    if let Some(client) = client
        && let Err(error) = client.tell(request).await
    {
        tracing::debug!(%error, "the launcher was not told");
    }
}

/// Tells the launcher what instances did, and lets apps with waiting requests go on.
async fn report(house: &Arc<House>, line: Line) {
    let mut active: HashMap<(AppName, Generation), Arc<Upstream>> = HashMap::new();
    let mut ticks = tokio::time::interval(SUMMARY_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last_report = Instant::now();
    loop {
        ticks.tick().await;
        let all = last_report.elapsed() >= REPORT_EVERY;
        if all {
            last_report = Instant::now();
        }
        while let Some(upstream) = house.active.pop() {
            active.insert((upstream.app.clone(), upstream.generation), upstream);
        }
        let mut activity = Vec::new();
        active.retain(|_, upstream| {
            if !all && !house.app(&upstream.app).is_some_and(|app| app.is_judged()) {
                return true;
            }
            let what = activity_of(house, upstream);
            let quiet = what.in_flight == 0 && what.requests == 0;
            // Also the last one, with nothing in it: the launcher must not believe in requests that have ended.
            activity.push(what);
            if quiet {
                // A request that comes right now puts it on the list again.
                upstream.listed.store(false, SeqCst);
                if upstream.in_flight() != 0 || upstream.requests.load(Relaxed) != 0 {
                    upstream.listed.store(true, SeqCst);
                    return true;
                }
                if let Some(stock) = upstream.stock() {
                    stock.settle();
                }
            }
            !quiet
        });
        let mut rest = activity.into_iter().peekable();
        while rest.peek().is_some() {
            let activity = rest.by_ref().take(REPORT_CHUNK).collect();
            tell(&line, Request::Report { activity }).await;
        }
        if all && house.seats.taken() > 0 {
            house.apps().iter().filter(|app| app.is_waited_for()).for_each(|app| app.tick());
        }
    }
}

fn activity_of(house: &House, upstream: &Upstream) -> Activity {
    let window = upstream.window.summary(house.tick(std::time::Instant::now()));
    upstream.rate.store(window.count, Relaxed);
    let held = house.app(&upstream.app).map_or(0, |app| app.waiting());
    Activity {
        app: upstream.app.clone(),
        generation: upstream.generation,
        in_flight: upstream.in_flight(),
        requests: upstream.requests.swap(0, Relaxed),
        window,
        held: u32::try_from(held).unwrap_or(u32::MAX),
    }
}

/// After SIGTERM held requests may still be answered; shortly before the grace ends those that are left get a 503 rather
/// than a closed connection.
async fn end_of_grace(house: &Arc<House>, mut shutdown: ShutdownWatch) {
    // An error means that the server itself is gone.
    let _ = shutdown.wait_for(|begun| *begun).await;
    sleep(house.config.grace.saturating_sub(Duration::from_secs(1))).await;
    house.stopping.store(true, SeqCst);
    house.apps().iter().for_each(|app| app.refuse(&Fault::Stopping));
}

/// Pauses that double from `first` to `most`, with jitter so that many do not come at once.
pub(crate) struct Backoff {
    first: Duration,
    most: Duration,
    pause: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, most: Duration) -> Self {
        Self { first, most, pause: first }
    }

    pub(crate) fn next(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).min(self.most);
        pause.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    fn reset(&mut self) {
        self.pause = self.first;
    }
}
