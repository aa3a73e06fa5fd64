//! What automatic scaling costs: gathering the evidence about one instance, and deciding upon it. Run as root:
//!
//! ```text
//! cargo run --release -p fastcontainer-launcher --example decide
//! ```

use std::{
    hint::black_box,
    io::Write as _,
    net::TcpListener,
    time::{Duration, Instant},
};

use launcher::{
    backlog::Backlog,
    cgroup::{Cgroups, Limits},
    monitor::{HostMeter, Monitor},
    sandbox::ContainerId,
    scaler::{Evidence, History, Policy, decide},
};

/// A scaler looks at an active app so often.
const TICK: Duration = Duration::from_millis(100);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let policy = Policy {
        response_time_us: Some(100_000),
        cpu: Some(300),
        cpu_max: Some(600),
        min: 0,
        max: 4,
        concurrency: None,
        cool_down_ms: 10_000,
    };
    // An app that is slow for a reason that is looked for: the longest way through the table.
    let slow = Evidence {
        at_ms: 10_000,
        loaded_ms: 5_000,
        responses: 50,
        p50_us: 150_000,
        p90_us: 250_000,
        in_flight: 20,
        used: 100,
        quota: Some(300),
        serving: 1,
        ..Evidence::default()
    };
    let mut history = History::default();
    let decision = measure(2_000, |n| {
        let evidence = Evidence { at_ms: slow.at_ms + n * 100, ..slow };
        history.observe(&evidence, &policy);
        black_box(decide(black_box(&evidence), &policy, &history));
    });

    let cgroups = Cgroups::detect("fastcontainer-decide")?;
    let id = ContainerId { app: "decide".into(), generation: 1 };
    let group = cgroups.create(&id, &Limits::default())?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::NETLINK,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        Some(rustix::net::netlink::SOCK_DIAG),
    )?;
    let listening = Backlog::new(socket, port);
    let mut monitor = Monitor::default();
    let cpu = measure(100, |_| {
        monitor.sample(Instant::now(), &group);
        black_box(monitor.cpu());
    });
    let queue = measure(100, |_| {
        black_box(listening.length().unwrap_or(0));
    });
    let meter = HostMeter::default();
    let host = measure(2_000, |_| {
        black_box(meter.load(Instant::now()));
    });
    group.remove().await?;
    cgroups.remove_parent().await?;

    let whole = decision + cpu + queue + host;
    let share = whole.as_secs_f64() / TICK.as_secs_f64();
    let mut out = std::io::stdout().lock();
    writeln!(out, "| Part of a look at an app with one instance | µs |\n|---|---|")?;
    for (name, time) in [
        ("reading cpu.stat and cpu.pressure", cpu),
        ("reading the listen queue", queue),
        ("the host's load, shared by all apps", host),
        ("deciding", decision),
        ("in all", whole),
    ] {
        writeln!(out, "| {name} | {:.2} |", time.as_secs_f64() * 1e6)?;
    }
    writeln!(
        out,
        "\nEvery {} ms while the app is active: {:.3} % of a core",
        TICK.as_millis(),
        share * 100.0
    )?;
    Ok(())
}

/// The median of several rounds, so that a busy moment of the machine does not count.
fn measure(times: u32, mut work: impl FnMut(u64)) -> Duration {
    let mut number = 0;
    let mut rounds: Vec<Duration> = (0..9)
        .map(|_| {
            let begun = Instant::now();
            for _ in 0..times {
                number += 1;
                work(number);
            }
            begun.elapsed() / times
        })
        .collect();
    rounds.sort_unstable();
    rounds[rounds.len() / 2]
}
