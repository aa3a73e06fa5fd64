//! What the kernel knows of an app's slowness: throttled periods, a busy host. (The listen queue: [`crate::backlog`].)

use std::{
    collections::VecDeque,
    fs,
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::{
    cgroup::{CpuStat, Group},
    host::lock,
};

/// How far back an instance's figures reach: a few of the longest usual periods, and no more, so that a cure shows soon.
const REACH: Duration = Duration::from_millis(350);
/// The host's figures are taken over at least this time.
const HOST_REACH: Duration = Duration::from_millis(300);
/// The recent past of one instance.
#[derive(Debug, Default)]
pub struct Monitor {
    samples: VecDeque<(Instant, CpuStat, Option<u64>)>,
}

/// CPU that an instance got, and did not get, lately.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct CpuUse {
    /// Periods of its quota.
    pub periods: u64,
    /// Those of them in which it was throttled.
    pub throttled: u64,
    /// CPU used, thousandths of a core.
    pub used: u32,
    /// Time in which one of its processes wanted a CPU and had none, per mille; `None`: the kernel does not tell.
    pub stalled: Option<u32>,
}

/// The host's own load, read at most every [`HOST_REACH`].
#[derive(Debug, Default)]
pub struct HostMeter(Mutex<Option<(Instant, HostSample, HostLoad)>>);

/// How busy the host is, per mille of the time.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct HostLoad {
    /// CPU that is not idle. What runs at a low priority counts as idle, for it gives way.
    pub busy: u32,
    /// Time in which something waited for memory.
    pub memory_stalled: u32,
}

/// What the kernel has counted until now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HostSample {
    busy: u64,
    total: u64,
    memory_stalled_us: u64,
}

impl Monitor {
    /// Takes a sample.
    pub fn sample(&mut self, now: Instant, group: &Group) {
        // A group that cannot be read is about to go; it has no figures then.
        let Ok(stat) = group.cpu_stat() else { return self.forget() };
        while self.samples.len() > 1 && self.samples.front().is_some_and(|(at, ..)| *at + REACH < now) {
            self.samples.pop_front();
        }
        self.samples.push_back((now, stat, group.cpu_stalled_us()));
    }

    /// What was is of no interest any more: the quota has changed.
    pub fn forget(&mut self) {
        self.samples.clear();
    }

    /// What the samples say.
    #[must_use]
    pub fn cpu(&self) -> CpuUse {
        let (Some((begin, first, waited)), Some((end, last, waits))) =
            (self.samples.front(), self.samples.back())
        else {
            return CpuUse::default();
        };
        let us = (*end - *begin).as_micros();
        let used = u128::from(last.usage_us.saturating_sub(first.usage_us)) * 1_000;
        CpuUse {
            periods: last.nr_periods.saturating_sub(first.nr_periods),
            throttled: last.nr_throttled.saturating_sub(first.nr_throttled),
            used: used.checked_div(us).map_or(0, |used| u32::try_from(used).unwrap_or(u32::MAX)),
            stalled: waited.zip(*waits).map(|(waited, waits)| {
                per_mille(waits.saturating_sub(waited), u64::try_from(us).unwrap_or(u64::MAX))
            }),
        }
    }
}

impl HostMeter {
    /// The load over the last moments; the first call knows of none yet.
    pub fn load(&self, now: Instant) -> HostLoad {
        let mut last = lock(&self.0);
        match *last {
            Some((at, _, load)) if at + HOST_REACH > now => load,
            before => {
                let sample = HostSample::take();
                // Older than a few seconds: an average over a time that nobody asked about.
                let before = before.filter(|(at, _, _)| *at + HOST_REACH * 10 > now);
                let load =
                    before.map_or(HostLoad::default(), |(at, before, _)| sample.since(&before, now - at));
                *last = Some((now, sample, load));
                load
            }
        }
    }
}

impl HostSample {
    pub(crate) fn take() -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let pressure = fs::read_to_string("/proc/pressure/memory").unwrap_or_default();
        Self { memory_stalled_us: stalled_us(&pressure), ..Self::of_stat(&stat) }
    }

    fn of_stat(stat: &str) -> Self {
        let ticks: Vec<u64> = stat
            .lines()
            .next()
            .unwrap_or_default()
            .split_ascii_whitespace()
            .skip(1)
            .take(8)
            .map(|word| word.parse().unwrap_or(0))
            .collect();
        let at = |index: usize| ticks.get(index).copied().unwrap_or(0);
        let total: u64 = ticks.iter().sum();
        let (nice, idle, iowait) = (at(1), at(3), at(4));
        Self { busy: total.saturating_sub(nice + idle + iowait), total, memory_stalled_us: 0 }
    }

    pub(crate) fn since(&self, before: &Self, time: Duration) -> HostLoad {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        HostLoad {
            busy: per_mille(self.busy.saturating_sub(before.busy), self.total.saturating_sub(before.total)),
            memory_stalled: per_mille(self.memory_stalled_us.saturating_sub(before.memory_stalled_us), us),
        }
    }
}

pub(crate) fn per_mille(part: u64, whole: u64) -> u32 {
    let share = part.saturating_mul(1_000).checked_div(whole).unwrap_or(0);
    u32::try_from(share.min(1_000)).unwrap_or(1_000)
}

pub(crate) fn stalled_us(pressure: &str) -> u64 {
    let some = pressure.lines().find(|line| line.starts_with("some")).unwrap_or_default();
    some.rsplit("total=").next().and_then(|total| total.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_of_low_priority_leaves_the_host_free() {
        let before = HostSample::of_stat("cpu  100 1000 100 1000 10 0 0 0 0 0\n");
        let after = HostSample::of_stat("cpu  130 1050 120 1000 10 0 0 0 0 0\ncpu0 1 2 3\n");
        assert_eq!(after.since(&before, HOST_REACH).busy, 500);
        assert_eq!(
            stalled_us("some avg10=0.37 avg60=0.56 avg300=0.96 total=75811756\nfull total=1\n"),
            75_811_756
        );
    }
}
