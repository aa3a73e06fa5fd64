//! Measures the CMDB of many hosts on loopback: how soon a change of routes is seen by a reader, what a look-up costs with a
//! hundred thousand hosts, and how much memory one app takes in a mirror. Prints rows of a Markdown table.
//!
//! `cargo run --release -p fastcontainer-cmdb --example routes [APPS]`; needs `redis-server` and `redis-cli`.
#![expect(clippy::print_stdout, reason = "its purpose")]

use std::{
    error::Error,
    fs,
    hint::black_box,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use cmdb::{
    App, AppRecord, Change, Outcome, Store, Transition,
    cache::{CmCache, Tenant},
    redis::{RedisStore, Role},
};
use tokio::sync::mpsc::Receiver;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Changes that are timed.
const CHANGES: usize = 5_000;
/// Look-ups that are timed.
const LOOKUPS: usize = 4_000_000;
/// A page of memory, bytes.
const PAGE: usize = 4_096;
/// Patient: what is measured is not what happens when Redis is away.
const BUDGET: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> Result<()> {
    let apps = std::env::args().nth(1).map_or(Ok(100_000), |text| text.parse())?;
    let redis = Redis::start()?;
    visible(&redis).await?;
    let before = resident()?;
    let store = mirrored(&redis, apps).await?;
    let mirror = resident()?.saturating_sub(before);
    println!("| Memory of one app in a mirror of {apps} | {} B |", mirror / apps);
    lookups(&store, apps)
}

/// From the moment when a writer begins to write until a reader's watch has it.
async fn visible(redis: &Redis) -> Result<()> {
    let writer = RedisStore::open(&redis.address(), Role::Node("here".into()), BUDGET)?;
    writer.put_app(app("blog")?).await?;
    let reader = RedisStore::open(&redis.address(), Role::Reader, BUDGET)?;
    let mut watch = reader.watch().await?;
    while !matches!(watch.recv().await, Some(Change::Synced) | None) {}
    let name = "blog".parse()?;
    let wake = Transition::Wake { node: "here".into(), start_timeout_ms: 60_000, lost: Vec::new() };
    let (Outcome::Own(generation), record) = writer.apply(&name, wake).await? else {
        return Err("no owner".into());
    };
    seen(&mut watch, record.rev).await?;
    let ready = Transition::Ready { generation, port: 80 };
    seen(&mut watch, writer.apply(&name, ready).await?.1.rev).await?;

    let (mut written, mut seen_after) = (Vec::with_capacity(CHANGES), Vec::with_capacity(CHANGES));
    for n in 0..CHANGES {
        let change =
            if n % 2 == 0 { Transition::Freeze { generation } } else { Transition::Thaw { generation } };
        let began = Instant::now();
        let (_, record) = writer.apply(&name, change).await?;
        written.push(began.elapsed());
        seen(&mut watch, record.rev).await?;
        seen_after.push(began.elapsed());
    }
    println!("| A transition by way of Redis, p50 / p99 / most | {} |", spread(&mut written));
    println!("| A change of routes seen by a reader, p50 / p99 / most | {} |", spread(&mut seen_after));
    Ok(())
}

async fn seen(watch: &mut Receiver<Change>, rev: u64) -> Result<()> {
    loop {
        match watch.recv().await {
            Some(Change::Put { record, .. }) if record.rev >= rev => return Ok(()),
            Some(_) => {}
            None => return Err("the watch was cut".into()),
        }
    }
}

async fn mirrored(redis: &Redis, apps: usize) -> Result<RedisStore> {
    let spec = serde_json::to_string(&app("placeholder")?)?;
    let fill = "for i = 1, tonumber(ARGV[2]) do local n = string.format('app-%d', i - 1) \
                local s = string.gsub(ARGV[1], 'placeholder', n) \
                redis.call('HSET', 'fc:{' .. n .. '}', 'spec', s, 'srev', '1') end";
    redis.cli(&["EVAL", fill, "0", &spec, &apps.to_string()])?;
    let began = Instant::now();
    let store = RedisStore::open(&redis.address(), Role::Reader, BUDGET)?;
    store.link().wait_for(|link| link.connected).await?;
    println!("| {apps} apps read from Redis | {} ms |", began.elapsed().as_millis());
    Ok(store)
}

struct Site(AppRecord);

impl Tenant for Site {
    fn new(_: Arc<App>, record: Arc<AppRecord>) -> Self {
        Self(AppRecord::clone(&record))
    }

    fn update(&self, _: Arc<App>, _: Arc<AppRecord>) {}

    fn removed(&self) {}
}

fn lookups(store: &RedisStore, apps: usize) -> Result<()> {
    let cache = CmCache::<Site>::new();
    cache.begin_sync();
    for (app, record) in store.list() {
        cache.apply(Change::Put { app, record });
    }
    cache.apply(Change::Synced);
    // In an order that no processor's cache expects: a thousand hosts that are often visited, and all of them.
    for some in [1_000.min(apps), apps] {
        let hosts: Vec<String> = (0..some).map(|n| format!("app-{}.example.com", n * 7_919 % apps)).collect();
        let begun = on_processor()?;
        let found = hosts.iter().cycle().take(LOOKUPS).filter(|host| {
            cache.lookup(black_box(host)).is_some_and(|site| black_box(&site.0).rev < u64::MAX)
        });
        let found = found.count();
        let each = (on_processor()? - begun) / LOOKUPS;
        println!(
            "| A look-up of one of {some} among {apps} hosts ({found} of {LOOKUPS} found) | {each} ns |"
        );
    }
    Ok(())
}

/// Time that this thread has had a processor, ns: others may be busy with something else.
fn on_processor() -> Result<usize> {
    let times = fs::read_to_string("/proc/thread-self/schedstat")?;
    Ok(times.split(' ').next().ok_or("nothing in schedstat")?.parse()?)
}

fn app(name: &str) -> Result<App> {
    let text = format!(
        "server-name = [\"{name}.example.com\"]\n[container]\nimage = \"dir:/srv/hello\"\ncommand = [\"/hello\"]\n"
    );
    let file = PathBuf::from(format!("{name}.toml"));
    cmdb::vhost::parse_file(&file, text.as_bytes(), Path::new("/etc"))
        .map_err(|faults| format!("{faults:?}").into())
}

fn spread(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at = |share: usize| times[(times.len() * share / 1_000).min(times.len() - 1)].as_micros();
    format!("{} / {} / {} µs", at(500), at(990), at(1_000))
}

/// Bytes of memory that this process has in use.
fn resident() -> Result<usize> {
    let pages = fs::read_to_string("/proc/self/statm")?;
    let pages: usize = pages.split(' ').nth(1).ok_or("no resident set in statm")?.parse()?;
    Ok(pages * PAGE)
}

/// A server of the measurement's own; killed when dropped.
struct Redis {
    folder: PathBuf,
    child: Child,
}

impl Redis {
    fn start() -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("fc-routes-{}", std::process::id()));
        fs::create_dir(&folder)?;
        let child = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
            .arg(folder.join("redis.sock"))
            .stdout(Stdio::null())
            .spawn()?;
        let redis = Self { folder, child };
        for _ in 0..500 {
            if redis.cli(&["PING"])?.contains("PONG") {
                return Ok(redis);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err("redis-server does not answer".into())
    }

    fn address(&self) -> String {
        format!("redis+unix://{}", self.folder.join("redis.sock").display())
    }

    fn cli(&self, arguments: &[&str]) -> Result<String> {
        let mut cli = Command::new("redis-cli");
        let output = cli.arg("-s").arg(self.folder.join("redis.sock")).args(arguments).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}
