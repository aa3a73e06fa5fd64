//! What the host has to give: CPU and memory.

use std::{fmt, fs, sync::Mutex, time::Instant};

use crate::{host::lock, monitor::HostSample};

/// What a [`super::Governor`] looks at.
pub trait Gauge: fmt::Debug + Send + Sync {
    /// Cores of the host.
    fn cores(&self) -> usize;
    /// From now on the CPU's use is of interest.
    fn begin(&self);
    /// CPU in use since the last call, or since [`Gauge::begin`], per mille.
    fn busy(&self) -> u32;
    /// Memory that can be had, bytes.
    fn free(&self) -> u64;
    /// Whether so much can be had.
    fn has_free(&self, bytes: u64) -> bool {
        self.free() >= bytes
    }
}

/// The host itself.
#[derive(Debug, Default)]
pub struct HostGauge(Mutex<Option<(Instant, HostSample)>>);

impl HostGauge {
    /// What is kept free where the operator says nothing, bytes: a part of the memory that there is, within bounds.
    #[must_use]
    pub fn usual_reserve() -> u64 {
        (Self::whole_memory() / 32).clamp(64 << 20, 512 << 20)
    }

    /// Memory that there is, bytes.
    #[must_use]
    pub fn whole_memory() -> u64 {
        meminfo("MemTotal:").unwrap_or(0)
    }
}

impl Gauge for HostGauge {
    fn cores(&self) -> usize {
        std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
    }

    fn begin(&self) {
        *lock(&self.0) = Some((Instant::now(), HostSample::take()));
    }

    fn busy(&self) -> u32 {
        let now = Instant::now();
        let sample = HostSample::take();
        let before = lock(&self.0).replace((now, sample));
        before.map_or(0, |(at, before)| sample.since(&before, now - at).busy)
    }

    fn free(&self) -> u64 {
        // A kernel that does not tell keeps nobody from starting.
        meminfo("MemAvailable:").unwrap_or(u64::MAX)
    }

    /// Usually memory lies about unused, and one system call knows; only else the kernel's longer account is read.
    fn has_free(&self, bytes: u64) -> bool {
        let info = rustix::system::sysinfo();
        let unused = info.freeram.saturating_mul(u64::from(info.mem_unit));
        unused >= bytes || self.free() >= bytes
    }
}

fn meminfo(key: &str) -> Option<u64> {
    value(&fs::read_to_string("/proc/meminfo").ok()?, key)
}

fn value(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_account_of_memory_is_read() {
        let text = "MemTotal:       24689764 kB\nMemFree:         3200000 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(value(text, "MemAvailable:"), Some(23_000_000 << 10));
        assert_eq!(value(text, "Nothing:"), None);
    }

    #[test]
    fn this_host_can_be_read() {
        let gauge = HostGauge::default();
        gauge.begin();
        assert!(gauge.cores() > 0 && gauge.busy() <= 1_000);
        assert!(gauge.free() > 0 && gauge.has_free(1) && !gauge.has_free(u64::MAX));
    }
}
