//! When the host's memory gets short, idle apps go down the tiers of sleep until it is not any more. What to do is decided
//! in [`crate::tiers`]; each app's supervisor does it, and looks once more whether it may.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    sync::oneshot,
    time::{Instant, MissedTickBehavior},
};

use crate::{
    host::Host,
    monitor,
    supervisor::Message,
    tiers::{self, Candidate, Gauge, Marks, Reading, Turn},
};

/// How often memory is looked at. Two small reads: 0.01 % of a core.
const EVERY: Duration = Duration::from_secs(1);
/// Most steps at a time: what the last ones gave back shows only a moment later.
const STEPS: usize = 32;
/// The low mark where the operator sets none is this part of all memory.
const USUAL_SHARE: u64 = 10;

/// When the host's memory is short, and where that is read.
#[derive(Clone, Debug)]
pub struct MemoryWatch {
    /// Memory that is to stay available, bytes; `None`: a tenth.
    pub low: Option<u64>,
    /// Time in which something waits for memory that is too much, per mille.
    pub stalled: u32,
    /// `/proc/meminfo`.
    pub meminfo: PathBuf,
    /// `/proc/pressure/memory`; a kernel without has none, and then stalls are not known.
    pub pressure: PathBuf,
}

/// Watches for the daemon's life.
pub(crate) async fn watch(host: Arc<Host>, watched: MemoryWatch) {
    let mut clock = tokio::time::interval(EVERY);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut gauge = Gauge::default();
    let mut last = (Instant::now(), watched.stalled_us());
    let mut helpless = false;
    loop {
        clock.tick().await;
        let now = (Instant::now(), watched.stalled_us());
        let Some(reading) = watched.read(now.1.saturating_sub(last.1), now.0 - last.0) else { continue };
        last = now;
        let marks =
            Marks { low: watched.low.unwrap_or(reading.total / USUAL_SHARE), stalled: watched.stalled };
        match gauge.observe(&reading, &marks) {
            Some(Turn::Short) => {
                let words = reading.words(&marks);
                let message = format!("memory is short: {words}; idle apps go to a deeper sleep");
                host.events.emit("memory-short", None, None, message);
                helpless = false;
            }
            Some(Turn::Relieved) => {
                let message = format!("memory is not short any more: {}", reading.words(&marks));
                host.events.emit("memory-relieved", None, None, message);
            }
            None => {}
        }
        let Some(shortage) = gauge.shortage(&reading, &marks) else { continue };
        let candidates = candidates(&host).await;
        let steps = tiers::choose(&candidates, shortage, reading.swap_free, STEPS);
        if steps.is_empty() && !helpless && !candidates.iter().any(|c| c.descends) {
            helpless = true;
            let message = "memory is short, and no idle app is left that could give some back";
            host.events.emit("memory-short", None, None, message.into());
        }
        let stalled = (reading.stalled > 0).then(|| format!(", {} ‰ stalled", reading.stalled));
        let why = format!(
            "memory is short ({} MiB available{})",
            reading.available >> 20,
            stalled.unwrap_or_default()
        );
        for step in steps {
            if let Some(supervisor) = host.running_supervisor(&step.app) {
                let _ = supervisor.send(Message::Descend(step.generation, step.to, why.clone()));
            }
        }
    }
}

async fn candidates(host: &Arc<Host>) -> Vec<Candidate> {
    let asked: Vec<_> = host
        .supervisors()
        .into_iter()
        .map(|supervisor| {
            let (reply, answer) = oneshot::channel();
            let _ = supervisor.send(Message::Candidates(reply));
            answer
        })
        .collect();
    let mut all = Vec::new();
    for answer in asked {
        // A supervisor that has ended has no instances.
        all.extend(answer.await.unwrap_or_default());
    }
    all
}

impl MemoryWatch {
    fn read(&self, stalled_us: u64, time: Duration) -> Option<Reading> {
        let meminfo = std::fs::read_to_string(&self.meminfo).ok()?;
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Some(Reading::of(&meminfo, monitor::per_mille(stalled_us, us)))
    }

    fn stalled_us(&self) -> u64 {
        monitor::stalled_us(&std::fs::read_to_string(&self.pressure).unwrap_or_default())
    }
}
