//! `ab`, `wrk` and our own burst: started, and their words understood.

use std::{
    net::TcpStream,
    path::Path,
    process::Command,
    sync::Barrier,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

use crate::{
    host::finish_get,
    scenario::{LoadPlan, Tool},
    stats::{mean, quantile},
};

/// What a tool tells of the requests that it made.
#[derive(Clone, Debug, Default)]
pub(crate) struct Told {
    /// Requests that were answered.
    pub(crate) complete: u64,
    /// Of those, and of those that were not: without an answer, or not with 2xx.
    pub(crate) failed: u64,
    /// For how long it ran, seconds.
    pub(crate) seconds: f64,
    /// As the client saw it, ms.
    pub(crate) mean_ms: Option<f64>,
    pub(crate) p50_ms: Option<f64>,
    pub(crate) p99_ms: Option<f64>,
}

/// Where a load goes.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) port: u16,
    pub(crate) host: String,
    pub(crate) path: String,
}

/// Makes the requests of one load, and waits for the end. `long`: in its long form.
pub(crate) fn make_requests(
    plan: &LoadPlan,
    targets: &[Target],
    long: bool,
    scratch: &Path,
) -> anyhow::Result<Told> {
    let seconds = plan.seconds.map(|seconds| seconds.of(long));
    let clients = plan.clients.whole(long);
    match plan.tool {
        Tool::Burst => burst(targets, clients),
        Tool::Ab => {
            let requests = plan.requests.map(|requests| requests.whole(long));
            let each = |target: &Target| ab(target, clients, requests, seconds, plan.keep_alive, scratch);
            side_by_side(targets, each)
        }
        Tool::Wrk => {
            let script = plan.think_ms.map(|ms| (scratch.with_extension("lua"), ms));
            if let Some((path, ms)) = &script {
                std::fs::write(path, format!("function delay() return {ms} end\n"))?;
            }
            let script = script.as_ref().map(|(path, _)| &**path);
            side_by_side(targets, |target| wrk(target, clients, seconds.unwrap_or(10.0), script))
        }
    }
}

/// The tools that are needed and missing.
pub(crate) fn missing() -> Vec<&'static str> {
    let there = |tool: &&str| Command::new(tool).arg("-h").output().is_ok();
    ["ab", "wrk"].into_iter().filter(|tool| !there(tool)).collect()
}

fn side_by_side(
    targets: &[Target],
    one: impl Fn(&Target) -> anyhow::Result<Told> + Sync,
) -> anyhow::Result<Told> {
    if let [only] = targets {
        return one(only);
    }
    let all: Vec<anyhow::Result<Told>> = std::thread::scope(|scope| {
        let threads: Vec<_> = targets.iter().map(|target| scope.spawn(|| one(target))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread died"))).collect()
    });
    let mut sum = Told::default();
    for told in all {
        let told = told?;
        sum.complete += told.complete;
        sum.failed += told.failed;
        sum.seconds = sum.seconds.max(told.seconds);
    }
    Ok(sum)
}

fn ab(
    target: &Target,
    clients: u32,
    requests: Option<u32>,
    seconds: Option<f64>,
    keep_alive: bool,
    scratch: &Path,
) -> anyhow::Result<Told> {
    let file = scratch.with_extension(format!("{}.tsv", target.host));
    let mut command = Command::new("ab");
    // -l: pages such as phpinfo() differ in length, which is no failure. -r: one broken connection does not end it.
    command.args(["-q", "-l", "-r", "-s", "120", "-c", &clients.to_string(), "-g"]).arg(&file);
    if let Some(seconds) = seconds {
        // -t sets -n to 50,000, so it comes first.
        command.args(["-t", &format!("{}", seconds.ceil())]);
    }
    command.args(["-n", &requests.unwrap_or(10_000_000).to_string()]);
    if keep_alive {
        command.arg("-k");
    }
    command.args(["-H", &format!("Host: {}", target.host)]);
    command.arg(format!("http://127.0.0.1:{}{}", target.port, target.path));
    let output = command.output().context("ab, of Debian's apache2-utils")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let told = ab_told(&text);
    let Some(mut told) = told.filter(|_| output.status.success()) else {
        bail!("ab: {}\n{text}", String::from_utf8_lossy(&output.stderr));
    };
    let times = ab_times(&std::fs::read_to_string(&file).unwrap_or_default());
    told.mean_ms = mean(times.iter().copied());
    (told.p50_ms, told.p99_ms) = (quantile(&times, 0.5), quantile(&times, 0.99));
    Ok(told)
}

/// What `ab` prints.
fn ab_told(text: &str) -> Option<Told> {
    let number = |label: &str| {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(label))?;
        line.split_whitespace().next()?.parse::<f64>().ok()
    };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
    let count = |label: &str| number(label).map(|number| number.max(0.0) as u64);
    Some(Told {
        complete: count("Complete requests:")?,
        // ab leaves the second line out where it is 0.
        failed: count("Failed requests:")? + count("Non-2xx responses:").unwrap_or(0),
        seconds: number("Time taken for tests:")?,
        ..Told::default()
    })
}

/// The total times in the file that `ab -g` writes, ms.
fn ab_times(tsv: &str) -> Vec<f64> {
    tsv.lines().skip(1).filter_map(|line| line.split('\t').nth(4)?.trim().parse().ok()).collect()
}

/// One load by wrk; `script` is in Lua.
pub(crate) fn wrk(
    target: &Target,
    clients: u32,
    seconds: f64,
    script: Option<&Path>,
) -> anyhow::Result<Told> {
    let mut command = Command::new("wrk");
    command.args(["-t1", &format!("-c{clients}"), &format!("-d{seconds}s"), "--timeout", "30s", "--latency"]);
    command.args(["-H", &format!("Host: {}", target.host)]);
    if let Some(script) = script {
        command.arg("-s").arg(script);
    }
    command.arg(format!("http://127.0.0.1:{}{}", target.port, target.path));
    let output = command.output().context("wrk, of Debian's package of that name")?;
    let text = String::from_utf8_lossy(&output.stdout);
    match wrk_told(&text) {
        Some(told) if output.status.success() => Ok(told),
        _ => bail!("wrk: {}\n{text}", String::from_utf8_lossy(&output.stderr)),
    }
}

/// What `wrk --latency` prints.
fn wrk_told(text: &str) -> Option<Told> {
    let line = |label: &str| text.lines().find_map(|line| line.trim().strip_prefix(label));
    let requests = text.lines().find(|line| line.contains(" requests in "))?;
    let words: Vec<&str> = requests.split_whitespace().collect();
    let refused = line("Non-2xx or 3xx responses:").and_then(|rest| rest.trim().parse().ok()).unwrap_or(0);
    let numbers =
        |rest: &str| -> u64 { rest.split([' ', ',']).filter_map(|word| word.parse::<u64>().ok()).sum() };
    let time = |label: &str| line(label).and_then(|rest| wrk_ms(rest.split_whitespace().next()?));
    Some(Told {
        complete: words.first()?.parse().ok()?,
        failed: refused + line("Socket errors:").map_or(0, numbers),
        seconds: wrk_ms(words.get(3)?.trim_end_matches(','))? / 1_000.0,
        mean_ms: time("Latency "),
        p50_ms: time("50%"),
        p99_ms: time("99%"),
    })
}

/// `1.23ms`, `45.00us`, `2.01s`, `1.10m`.
fn wrk_ms(text: &str) -> Option<f64> {
    let units = [("us", 0.001), ("ms", 1.0), ("s", 1_000.0), ("m", 60_000.0)];
    units.into_iter().find_map(|(unit, ms)| Some(text.strip_suffix(unit)?.parse::<f64>().ok()? * ms))
}

/// All connections first, then all requests at the same moment.
fn burst(targets: &[Target], clients: u32) -> anyhow::Result<Told> {
    let all: Vec<&Target> = targets.iter().flat_map(|target| (0..clients).map(move |_| target)).collect();
    let gate = Barrier::new(all.len() + 1);
    let mut begun = Instant::now();
    let answers: Vec<(bool, Duration)> = std::thread::scope(|scope| {
        let threads: Vec<_> = all
            .iter()
            .map(|target| {
                let gate = &gate;
                scope.spawn(move || {
                    let stream = TcpStream::connect(("127.0.0.1", target.port));
                    gate.wait();
                    let begun = Instant::now();
                    let status =
                        stream.ok().and_then(|stream| finish_get(stream, &target.host, &target.path).ok());
                    (status.is_some_and(|status| (200..300).contains(&status)), begun.elapsed())
                })
            })
            .collect();
        gate.wait();
        begun = Instant::now();
        threads.into_iter().map(|thread| thread.join().unwrap_or((false, Duration::ZERO))).collect()
    });
    let times: Vec<f64> = answers.iter().map(|(_, time)| time.as_secs_f64() * 1_000.0).collect();
    let failed = answers.iter().filter(|(fine, _)| !fine).count();
    Ok(Told {
        complete: answers.len() as u64,
        failed: failed as u64,
        seconds: begun.elapsed().as_secs_f64(),
        mean_ms: mean(times.iter().copied()),
        p50_ms: quantile(&times, 0.5),
        p99_ms: quantile(&times, 0.99),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ab_prints_is_understood() {
        let text = "Concurrency Level:      100\nTime taken for tests:   7.381 seconds\nComplete requests:      4000\n\
                    Failed requests:        5\n   (Connect: 0, Receive: 5, Length: 0, Exceptions: 0)\nNon-2xx responses:      3\n";
        let told = ab_told(text).unwrap();
        assert_eq!((told.complete, told.failed, told.seconds), (4000, 8, 7.381));
        assert!(ab_told("ab: could not connect").is_none());
        let tsv = "starttime\tseconds\tctime\tdtime\tttime\twait\n\
                   Tue Nov 24 11:46:50 2026\t1795520810\t3\t13\t16\t13\nTue Nov 24 11:46:50 2026\t1795520810\t0\t17\t18\t0\n";
        assert_eq!(ab_times(tsv), [16.0, 18.0]);
    }

    #[test]
    fn what_wrk_prints_is_understood() {
        let text = "Running 2s test @ http://127.0.0.1:8795/\n  1 threads and 32 connections\n  Thread Stats   Avg      Stdev     Max   +/- Stdev\n    \
                    Latency     1.25ms  300.00us   9.00ms   75.00%\n    Req/Sec    12.00k     1.00k   13.00k    70.00%\n  Latency Distribution\n     \
                    50%    1.10ms\n     75%    1.40ms\n     90%    1.60ms\n     99%    2.50ms\n  48210 requests in 2.00s, 5.00MB read\n  \
                    Socket errors: connect 0, read 1, write 0, timeout 2\n  Non-2xx or 3xx responses: 4\nRequests/sec:  24105.00\n";
        let told = wrk_told(text).unwrap();
        assert_eq!((told.complete, told.failed, told.seconds), (48210, 7, 2.0));
        assert_eq!((told.mean_ms, told.p50_ms, told.p99_ms), (Some(1.25), Some(1.1), Some(2.5)));
    }
}
