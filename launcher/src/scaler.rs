//! From evidence to cause and cure: the table of the design, as a function without side effects.
//!
//! Nothing in here reads a clock or a file: [`crate::monitor`] gathers the evidence, the supervisor applies the cure, and
//! [`History`] remembers what may not be done again yet.

mod history;
mod verdict;
mod words;

use std::time::Duration;

use cmdb::App;

pub use history::{History, Kind};
pub use verdict::{Verdict, judge};
pub use words::cores;

use crate::monitor::CpuUse;

/// Fewest responses that say something about response times.
pub const FEW: u32 = 4;
/// Fewest throttled periods that say something about the quota.
const FEW_PERIODS: u64 = 3;
/// The host is full when it is busy for so much of the time, per mille.
pub const HOST_FULL: u32 = 970;
/// An app is short of CPU when it waits for some for so much of the time, per mille.
const CPU_SHORT: u32 = 200;
/// A queue that has been there for so long is no accident, ms.
const QUEUE_LASTS_MS: u64 = 200;
/// So long an app is slow before its slowness is said to be made elsewhere: throttling takes a moment to show, ms.
const ELSEWHERE_AFTER_MS: u64 = 500;

/// What is known of an app at one moment. Durations in µs, CPU in thousandths of a core.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Evidence {
    /// When, ms on a clock that only rises.
    pub at_ms: u64,
    /// For how long requests have been under way without a pause, ms.
    pub loaded_ms: u64,
    /// Responses in the last second, of all instances.
    pub responses: u32,
    /// Half of the slowest instance's first bytes came within this time.
    pub p50_us: u64,
    /// Nine of ten did; 0: too few to say.
    pub p90_us: u64,
    /// Requests under way on all instances.
    pub in_flight: u32,
    /// Requests that proxies hold because every instance is at its limit of concurrency.
    pub held: u32,
    /// Connections that no instance has accepted yet.
    pub backlog: u32,
    /// Periods of the most throttled instance's quota, lately.
    pub periods: u64,
    /// Those of them in which it was throttled.
    pub throttled: u64,
    /// CPU that all instances use.
    pub used: u32,
    /// Time in which an instance wanted a CPU and had none, per mille, for the one that waited longest. Its own quota
    /// makes this rise, too.
    pub cpu_stalled: u32,
    /// CPU in use on the whole host, per mille of what there is.
    pub host_busy: u32,
    /// Time in which something on the host waited for memory, per mille.
    pub memory_stalled: u32,
    /// The quota that is in force for each instance; `None`: unlimited.
    pub quota: Option<u32>,
    /// Instances that serve or are about to.
    pub serving: u32,
    /// Those of them that are about to.
    pub starting: u32,
    /// Instances that serve or are about to on other hosts.
    pub elsewhere: u32,
    /// Those of them that are about to.
    pub starting_elsewhere: u32,
    /// Whether another host could take one.
    pub other_host: bool,
}

/// What the operator allows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Policy {
    /// Above this p90 the app is slow, µs; `None`: not judged.
    pub response_time_us: Option<u64>,
    /// The quota, thousandths of a core.
    pub cpu: Option<u32>,
    /// How far it may be raised.
    pub cpu_max: Option<u32>,
    /// Fewest instances.
    pub min: u32,
    /// Most instances.
    pub max: u32,
    /// Requests in one instance at a time.
    pub concurrency: Option<u32>,
    /// No two steps within this time, ms.
    pub cool_down_ms: u64,
}

/// Why an app is slow.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Cause {
    /// It is not.
    Fine,
    /// It is, but it is too soon to say why.
    Unclear,
    /// Its quota holds it back, and may be raised.
    Quota,
    /// Its quota holds it back, and may not be raised.
    Ceiling,
    /// Its instances have no free worker.
    Workers,
    /// The host has no CPU left.
    Host,
    /// Not what can be had here: it waits for something else, such as a database.
    Elsewhere,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Cure {
    /// Nothing.
    Nothing,
    /// Set the quota of every instance, thousandths of a core.
    Raise(u32),
    /// Start another instance.
    Add,
    /// Set the quota back.
    Lower(u32),
    /// Drain the youngest instance.
    Remove,
}

/// A cause, its cure, and both in words.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Decision {
    /// Why it is slow.
    pub cause: Cause,
    /// What to do about it.
    pub cure: Cure,
    /// Evidence, cause and cure, for an operator. Empty where nothing is to be said: all is well, or a step is being tried.
    pub words: String,
}

impl Cause {
    /// As metrics name it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fine => "fine",
            Self::Unclear => "unclear",
            Self::Quota => "quota",
            Self::Ceiling => "ceiling",
            Self::Workers => "workers",
            Self::Host => "host",
            Self::Elsewhere => "elsewhere",
        }
    }
}

impl Policy {
    /// What the app's file says.
    #[must_use]
    pub fn of(app: &App) -> Self {
        let us = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        let cpu = app.resources.cpu.map(|cpu| cpu.0);
        Self {
            response_time_us: app.scale.response_time.map(us),
            cpu,
            cpu_max: app.resources.cpu_max.map(|cpu| cpu.0).max(cpu),
            min: app.scale.min,
            max: app.scale.max,
            concurrency: app.scale.concurrency,
            cool_down_ms: us(app.scale.cool_down) / 1_000,
        }
    }

    /// Whether there is anything to decide for such an app.
    #[must_use]
    pub fn is_of_use(&self) -> bool {
        self.response_time_us.is_some() || self.cpu_max > self.cpu
    }

    /// Fewest instances while the app is awake.
    fn least(&self) -> u32 {
        self.min.max(1)
    }
}

impl Evidence {
    /// Whether its own quota stops it in almost every period. A single burst is throttled once, too.
    #[must_use]
    pub fn is_throttled(&self) -> bool {
        self.quota.is_some() && self.throttled >= FEW_PERIODS && self.throttled * 10 >= self.periods * 8
    }

    /// Whether its own quota stops it often enough to be felt, though not in almost every period.
    fn is_held_back(&self) -> bool {
        self.quota.is_some() && self.throttled >= FEW_PERIODS && self.throttled * 10 >= self.periods * 2
    }

    /// Adds what one instance got of the CPU, and did not get, under this quota. Until its first byte an instance has none,
    /// and gives way to others: what it does in that time of its boost, and what it waits for, is no pressure.
    pub(crate) fn add_cpu(&mut self, cpu: &CpuUse, quota: Option<u32>, boosted: bool) {
        self.used = self.used.saturating_add(cpu.used);
        if boosted {
            return;
        }
        self.quota = quota;
        // Where the kernel does not tell, a full host is taken to be felt.
        let unknown = if self.host_busy >= HOST_FULL { 1_000 } else { 0 };
        self.cpu_stalled = self.cpu_stalled.max(cpu.stalled.unwrap_or(unknown));
        if cpu.throttled >= self.throttled {
            (self.periods, self.throttled) = (cpu.periods, cpu.throttled);
        }
    }

    /// Requests that wait for a worker.
    #[must_use]
    pub fn queue(&self) -> u32 {
        self.held.saturating_add(self.backlog)
    }

    /// Whether the app is slower than it should be.
    #[must_use]
    pub fn is_slow(&self, policy: &Policy) -> bool {
        match policy.response_time_us {
            Some(limit) => self.p90_us > limit,
            None => self.is_throttled() && self.in_flight > 0,
        }
    }

    /// How much is asked of it, to tell whether the load has changed.
    #[must_use]
    pub fn demand(&self) -> u32 {
        self.in_flight.saturating_add(self.held)
    }
}

/// What is wrong, and what is to be done about it.
#[must_use]
pub fn decide(evidence: &Evidence, policy: &Policy, history: &History) -> Decision {
    let cause = cause(evidence, policy, history);
    let wanted = match cause {
        Cause::Quota => policy.cpu_max.map_or(Cure::Nothing, Cure::Raise),
        Cause::Ceiling | Cause::Workers if may_add(evidence, policy) => Cure::Add,
        Cause::Host if evidence.other_host && may_add(evidence, policy) => Cure::Add,
        Cause::Fine => step_back(evidence, policy, history),
        _ => Cure::Nothing,
    };
    let waits = wanted != Cure::Nothing && history.must_wait(evidence, policy);
    let in_vain = history.was_in_vain(wanted, evidence);
    let cure = if waits || in_vain { Cure::Nothing } else { wanted };
    let silent = waits || matches!(cause, Cause::Unclear) || (cause == Cause::Fine && cure == Cure::Nothing);
    let words = if silent || history.is_being_tried() {
        String::new()
    } else {
        words::decision(evidence, policy, cause, cure, in_vain)
    };
    Decision { cause, cure, words }
}

fn cause(evidence: &Evidence, policy: &Policy, history: &History) -> Cause {
    let queue_ms = history.queue_lasts_ms(evidence);
    let queue = evidence.queue() > 0 && queue_ms >= QUEUE_LASTS_MS;
    // The time that a request is held is not the app's response time, and the client's all the same.
    let held_up = queue && evidence.held > 0 && policy.response_time_us.is_some();
    if !evidence.is_slow(policy) && !held_up {
        return Cause::Fine;
    }
    // Whoever is throttled in every period got all that its quota allows, however busy the host is.
    if evidence.is_throttled() {
        return if evidence.quota < policy.cpu_max { Cause::Quota } else { Cause::Ceiling };
    }
    // A full host is nothing to an app that wants no CPU.
    if evidence.host_busy >= HOST_FULL && evidence.cpu_stalled >= CPU_SHORT {
        return Cause::Host;
    }
    if queue {
        return Cause::Workers;
    }
    if evidence.queue() > 0 || history.slow_lasts_ms(evidence) < ELSEWHERE_AFTER_MS || evidence.is_held_back()
    {
        return Cause::Unclear;
    }
    // Nobody waits for a CPU that is free: what runs at a low priority takes its time, too.
    if evidence.cpu_stalled >= CPU_SHORT { Cause::Host } else { Cause::Elsewhere }
}

fn may_add(evidence: &Evidence, policy: &Policy) -> bool {
    policy.response_time_us.is_some()
        && evidence.serving.saturating_add(evidence.elsewhere) < policy.max
        && evidence.starting + evidence.starting_elsewhere == 0
}

/// The instances go first: each costs memory, an unused quota costs nothing.
fn step_back(evidence: &Evidence, policy: &Policy, history: &History) -> Cure {
    if !history.has_been_calm(evidence, policy) {
        return Cure::Nothing;
    }
    if fits_fewer(evidence, policy) {
        return Cure::Remove;
    }
    match policy.cpu {
        Some(cpu) if fits_less(evidence, policy) => Cure::Lower(cpu),
        _ => Cure::Nothing,
    }
}

/// Whether one instance less would do, with something to spare.
fn fits_fewer(evidence: &Evidence, policy: &Policy) -> bool {
    if evidence.serving <= policy.least() || evidence.starting > 0 {
        return false;
    }
    let left = evidence.serving - 1;
    let fits = |now: u32, each: u32| u64::from(now) * 10 <= u64::from(each) * u64::from(left) * 7;
    evidence.quota.is_none_or(|quota| fits(evidence.used, quota))
        && policy.concurrency.is_none_or(|most| fits(evidence.in_flight, most))
}

/// Whether the quota that the file gives would do, with something to spare.
fn fits_less(evidence: &Evidence, policy: &Policy) -> bool {
    let (Some(now), Some(cpu)) = (evidence.quota, policy.cpu) else { return false };
    let serving = u64::from(evidence.serving.max(1));
    now > cpu && u64::from(evidence.used) * 10 <= u64::from(cpu) * serving * 7
}

/// Whether all is so well that a step back could be taken.
fn is_calm(evidence: &Evidence, policy: &Policy) -> bool {
    let fast = policy.response_time_us.is_none_or(|limit| evidence.p90_us * 10 <= limit * 8);
    fast && !evidence.is_throttled()
        && evidence.queue() == 0
        && (fits_fewer(evidence, policy) || fits_less(evidence, policy))
}

#[cfg(test)]
mod tests;
