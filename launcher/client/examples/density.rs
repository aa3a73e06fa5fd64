//! How many idle apps a host holds, and at what cost: starts a launcher of its own, wakes `COUNT` apps, lets them idle,
//! freezes and thaws them, changes their quota, and ends them all. Run as root (`make bench` does):
//!
//! ```text
//! cargo run --release -p fastcontainer-launcher-client --example density -- LAUNCHER IMAGE COUNT
//! ```
//! `LAUNCHER` is the program, `IMAGE` a folder with `/hello`. Prints one line of Markdown for each figure.

use std::{
    error::Error,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use cmdb::{App, AppName};
use launcher_client::{
    Client,
    paths::StateDir,
    wire::{Reply, Request, Status},
};
use tokio::task::JoinSet;

/// How many starts, and ends, are under way at once.
const AT_ONCE: usize = 4;
/// For how long idleness is watched.
const WATCHED: Duration = Duration::from_secs(10);
/// A tick of `/proc/PID/stat` (proc(5)); 100 a second on every Linux that FastContainer runs on.
const TICK: Duration = Duration::from_millis(10);

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(program), Some(image), Some(count)) = (arguments.next(), arguments.next(), arguments.next())
    else {
        return Err("usage: density LAUNCHER IMAGE COUNT".into());
    };
    let count: usize = count.parse()?;
    let mut bench = Bench::begin(Path::new(&program))?;
    let client = Arc::new(bench.client().await?);
    let result = measure(&bench, &client, &image, count).await;
    bench.end();
    result
}

async fn measure(bench: &Bench, client: &Arc<Client>, image: &str, count: usize) -> Result<()> {
    let apps = put_apps(client, image, count, "").await?;
    let before = available_kib()?;
    let empty = bench.rss_kib()?;

    let begun = Instant::now();
    let mut wakes = each(client, &apps, wake).await?;
    let took = begun.elapsed();
    wakes.sort_unstable();
    let rate = count as f64 / took.as_secs_f64();
    say(&format!("{count} idle apps, created per second ({AT_ONCE} at once)"), &format!("{rate:.0}"))?;
    say("one start, with so many under way: p50, p99", &spread(&wakes))?;

    // A quota begins a second after the start; idle is what follows.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let kib = before.saturating_sub(available_kib()?);
    say(
        "memory of the host for each, kernel and all, KiB (MemAvailable)",
        &(kib / count as u64).to_string(),
    )?;
    for (name, before, now) in bench.rss_since(&empty)? {
        say(&format!("RSS of the {name}, before and with them, MiB"), &format!("{before:.1}, {now:.1}"))?;
    }
    say("CPU of daemon and spawner while they idle, % of a core", &bench.cpu_percent().await?)?;

    let mut quotas = Vec::new();
    for (turn, app) in apps.iter().cycle().take(500).enumerate() {
        let cpu = Some(if turn % 2 == 0 { 300 } else { 600 });
        let begun = Instant::now();
        client.done(Request::Limit { app: app.clone(), cpu, memory: None, pids: None, reset: false }).await?;
        quotas.push(begun.elapsed());
    }
    quotas.sort_unstable();
    say("a changed quota, asked for over the socket until in force: p50, p99", &spread(&quotas))?;

    put_apps(client, image, count, "[lifecycle]\nfreeze-after = \"100ms\"\n").await?;
    let begun = Instant::now();
    while states(client).await?.iter().any(|status| status.state != "frozen") {
        if begun.elapsed() > Duration::from_secs(60) {
            return Err("they do not freeze".into());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    tokio::time::sleep(Duration::from_millis(1500)).await;
    say("CPU of daemon and spawner while they are frozen, % of a core", &bench.cpu_percent().await?)?;
    let mut thaws = Vec::new();
    let mut round_trips = Vec::new();
    for app in apps.iter().take(500) {
        let begun = Instant::now();
        let woken = client.wake(app, 1).await?;
        round_trips.push(begun.elapsed());
        thaws.push(Duration::from_micros(woken.timing.total_us));
    }
    thaws.sort_unstable();
    round_trips.sort_unstable();
    say("thaw, in the launcher: p50, p99", &spread(&thaws))?;
    say(
        "thaw, asked for over the socket until a socket to the app is here: p50, p99",
        &spread(&round_trips),
    )?;

    let begun = Instant::now();
    each(client, &apps, stop).await?;
    let each_ms = begun.elapsed().as_secs_f64() * 1e3 / count as f64;
    say(&format!("teardown of each, until nothing is left ({AT_ONCE} at once), ms"), &format!("{each_ms:.2}"))
}

/// Puts `count` apps in place, alike but for their names.
async fn put_apps(client: &Arc<Client>, image: &str, count: usize, more: &str) -> Result<Vec<AppName>> {
    let mut apps = Vec::new();
    let mut puts = JoinSet::new();
    for n in 0..count {
        let text = format!(
            "server-name = [\"a{n}.bench\"]\n[container]\nimage = \"dir:{image}\"\ncommand = [\"/hello\"]\nport = 8080\n\
             [resources]\ncpu = \"30%\"\nmemory = \"64MiB\"\n{more}"
        );
        let app: App =
            cmdb::vhost::parse_file(Path::new(&format!("a{n}.toml")), text.as_bytes(), Path::new("/"))
                .map_err(|faults| format!("{faults:?}"))?;
        apps.push(app.name.clone());
        let client = Arc::clone(client);
        puts.spawn(async move { client.put_app(app).await });
        while puts.len() >= 64 {
            next(&mut puts).await?;
        }
    }
    while !puts.is_empty() {
        next(&mut puts).await?;
    }
    Ok(apps)
}

async fn next<T: 'static, E: Into<Box<dyn Error + Send + Sync>> + 'static>(
    set: &mut JoinSet<std::result::Result<T, E>>,
) -> Result<T> {
    set.join_next().await.ok_or("nothing is under way")??.map_err(Into::into)
}

/// Does something to each app, [`AT_ONCE`] at once; how long each took.
async fn each<F>(
    client: &Arc<Client>,
    apps: &[AppName],
    act: fn(Arc<Client>, AppName) -> F,
) -> Result<Vec<Duration>>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let mut all = Vec::with_capacity(apps.len());
    let mut acts = JoinSet::new();
    for app in apps {
        let act = act(Arc::clone(client), app.clone());
        acts.spawn(async move {
            let begun = Instant::now();
            act.await.map(|()| begun.elapsed())
        });
        if acts.len() == AT_ONCE {
            all.push(next(&mut acts).await?);
        }
    }
    while !acts.is_empty() {
        all.push(next(&mut acts).await?);
    }
    Ok(all)
}

async fn wake(client: Arc<Client>, app: AppName) -> Result<()> {
    client.wake(&app, 1).await?;
    Ok(())
}

async fn stop(client: Arc<Client>, app: AppName) -> Result<()> {
    Ok(client.done(Request::Stop { app }).await?)
}

async fn states(client: &Client) -> Result<Vec<Status>> {
    let mut all = Vec::new();
    client
        .stream(Request::Ps { app: None }, |reply| {
            if let Reply::Status(status) = reply {
                all.push(*status);
            }
            true
        })
        .await?;
    Ok(all)
}

/// A launcher of this bench's own.
struct Bench {
    child: Child,
    folder: PathBuf,
}

impl Bench {
    fn begin(program: &Path) -> Result<Self> {
        let folder = PathBuf::from(format!("/tmp/fcd{}", std::process::id()));
        fs::create_dir(&folder)?;
        let child = Command::new(program)
            .arg("--state")
            .arg(folder.join("s"))
            .args(["--cgroup-parent", &format!("fcdensity{}", std::process::id()), "--die-with-parent"])
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "warn".into()))
            .stdin(Stdio::null())
            .stderr(fs::File::create(folder.join("log"))?)
            .spawn()?;
        Ok(Self { child, folder })
    }

    async fn client(&self) -> Result<Client> {
        let socket = StateDir::new(self.folder.join("s")).launcher_socket();
        let begun = Instant::now();
        loop {
            match Client::connect(&socket).await {
                Ok(client) => return Ok(client),
                Err(error) if begun.elapsed() > Duration::from_secs(20) => return Err(error.into()),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// The daemon, and the spawner.
    fn pids(&self) -> Result<[(&'static str, u32); 2]> {
        let daemon = self.child.id();
        let children = fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children"))?;
        let spawner = children.split_whitespace().next().ok_or("there is no spawner")?.parse()?;
        Ok([("daemon", daemon), ("spawner", spawner)])
    }

    fn rss_kib(&self) -> Result<Vec<(&'static str, u64)>> {
        self.pids()?
            .into_iter()
            .map(|(name, pid)| {
                Ok((name, kib(&fs::read_to_string(format!("/proc/{pid}/status"))?, "VmRSS:")?))
            })
            .collect()
    }

    fn rss_since(&self, before: &[(&'static str, u64)]) -> Result<Vec<(&'static str, f64, f64)>> {
        let mib = |kib: u64| kib as f64 / 1024.0;
        let now = self.rss_kib()?;
        Ok(before.iter().zip(now).map(|(old, new)| (old.0, mib(old.1), mib(new.1))).collect())
    }

    async fn cpu_percent(&self) -> Result<String> {
        let before = self.ticks()?;
        tokio::time::sleep(WATCHED).await;
        let used = TICK.as_secs_f64() * (self.ticks()? - before) as f64;
        Ok(format!("{:.2}", used * 100.0 / WATCHED.as_secs_f64()))
    }

    fn ticks(&self) -> Result<u64> {
        let mut sum = 0;
        for (_, pid) in self.pids()? {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
            let words: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
            for word in words.iter().skip(11).take(2) {
                sum += word.parse::<u64>()?;
            }
        }
        Ok(sum)
    }

    /// As an operator would: SIGTERM, and everything is gone.
    fn end(&mut self) {
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let _ = self.child.wait();
        let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let _ = std::io::stderr().write_all(log.as_bytes());
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn available_kib() -> Result<u64> {
    kib(&fs::read_to_string("/proc/meminfo")?, "MemAvailable:")
}

fn kib(text: &str, key: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)).ok_or("a line is missing")?;
    Ok(line.split_whitespace().next().unwrap_or_default().parse()?)
}

fn spread(sorted: &[Duration]) -> String {
    let at = |share: usize| sorted.get((sorted.len() * share / 100).min(sorted.len().saturating_sub(1)));
    let ms = |time: Option<&Duration>| time.map_or(0.0, |time| time.as_secs_f64() * 1e3);
    format!("{:.3} ms, {:.3} ms", ms(at(50)), ms(at(99)))
}

fn say(what: &str, value: &str) -> Result<()> {
    writeln!(std::io::stdout(), "| {what} | {value} |")?;
    Ok(())
}
