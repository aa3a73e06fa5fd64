//! The arithmetic of the ledger: counters that only rise become amounts per app and hour. Pure, no clock, no disk.
//!
//! Everything is counted as the difference to what was last taken down of the same counter, and the two are written in
//! one commit. So a launcher that dies between two commits loses nothing that the kernel or a proxy still counts.

use std::collections::{BTreeMap, HashMap};

use cmdb::AppName;
use launcher_client::usage::{Figures, HOUR_S, Totals};

use crate::sandbox::ContainerId;

const HOUR_US: u64 = HOUR_S * 1_000_000;
/// A span longer than this is a clock that was set, not time that passed; it is put down at its end.
const LONGEST_SPREAD_H: u64 = 24 * 62;

/// A moment on both clocks, µs.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Moment {
    /// Of the wall: decides in which hour something is put down.
    pub(super) unix: u64,
    /// Monotonic, since the boot: tells how much time has passed.
    pub(super) mono: u64,
}

/// Whom an amount is put down to.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) enum Account {
    /// The parent of all cgroups.
    Parent,
    /// An app.
    App(AppName),
}

/// What a container's counters say.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Sample {
    /// CPU time since its cgroup was made, µs.
    pub(super) cpu_us: u64,
    /// Memory charged now, bytes.
    pub(super) memory: u64,
    /// For how long it was frozen since this daemon has it, µs.
    pub(super) frozen_us: u64,
    /// Whether it is frozen now.
    pub(super) frozen: bool,
}

/// What was last taken down of a container.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Seen {
    /// Its counters then.
    pub(super) sample: Sample,
    /// When, monotonic µs.
    pub(super) at: u64,
}

/// Amounts and counters since the last commit, and all counters last taken down.
#[derive(Debug, Default)]
pub(super) struct Book {
    /// To be added to what is stored: per hour since the Unix epoch and account.
    pub(super) rows: BTreeMap<(u64, Account), Figures>,
    /// Containers, as last taken down.
    pub(super) seen: HashMap<ContainerId, Seen>,
    /// Of those, the ones to be written (`true`) or forgotten (`false`) by the next commit.
    pub(super) turned: HashMap<ContainerId, bool>,
    /// Proxies' totals as last taken down, per begin of the proxy and app.
    pub(super) totals: HashMap<(u64, AppName), Totals>,
    /// Of those, the ones to be written by the next commit.
    pub(super) turned_totals: Vec<(u64, AppName)>,
    /// CPU time of the parent cgroup, as last taken down.
    pub(super) parent_us: Option<u64>,
}

impl Book {
    /// Takes down a container's counters. One that is new has been there since `begun` (µs since the Unix epoch).
    pub(super) fn sample(
        &mut self,
        id: &ContainerId,
        app: &AppName,
        begun: u64,
        sample: Sample,
        now: Moment,
    ) {
        let last = self.seen.get(id).copied();
        self.put_down(app, last, begun, sample, now);
        self.seen.insert(id.clone(), Seen { sample, at: now.mono });
        self.turned.insert(id.clone(), true);
    }

    /// Takes down the last counters of a container that is gone.
    pub(super) fn settle(&mut self, id: &ContainerId, app: &AppName, begun: u64, cpu_us: u64, now: Moment) {
        let last = self.seen.remove(id);
        if last.is_some() {
            self.turned.insert(id.clone(), false);
        }
        let before = last.map_or(Sample::default(), |seen| seen.sample);
        // Its memory is no more: what it held last, it held until its end.
        self.put_down(app, last, begun, Sample { cpu_us, ..before }, now);
    }

    /// Puts down CPU time that none of the app's containers has used.
    pub(super) fn charge(&mut self, app: AppName, cpu_us: u64, now: Moment) {
        self.add(hour_of(now.unix), &Account::App(app), Figures { cpu_us, ..Figures::default() });
    }

    /// The container is not there any more, and nobody knows its last counters.
    pub(super) fn forget(&mut self, id: &ContainerId) {
        if self.seen.remove(id).is_some() {
            self.turned.insert(id.clone(), false);
        }
    }

    fn put_down(&mut self, app: &AppName, last: Option<Seen>, begun: u64, sample: Sample, now: Moment) {
        let age = now.unix.saturating_sub(begun.min(now.unix));
        let passed = last.map_or(age, |seen| now.mono.saturating_sub(seen.at));
        let before = last.map_or(Sample::default(), |seen| seen.sample);
        // The daemon that froze it is gone, and its successor thawed it a moment ago.
        let slept_alone = before.frozen && sample.frozen_us < before.frozen_us;
        let frozen = if slept_alone {
            passed
        } else if sample.frozen_us < before.frozen_us {
            sample.frozen_us
        } else {
            sample.frozen_us - before.frozen_us
        };
        let frozen = frozen.min(passed);
        let memory = if last.is_none() { sample.memory } else { before.memory.midpoint(sample.memory) };
        let figures = Figures {
            cpu_us: sample.cpu_us.saturating_sub(before.cpu_us),
            memory_byte_s: byte_seconds(memory, passed),
            running_us: passed - frozen,
            frozen_us: frozen,
            wakes: u64::from(last.is_none()),
            ..Figures::default()
        };
        self.spread(&Account::App(app.clone()), figures, passed, now);
    }

    /// Takes down a proxy's totals.
    pub(super) fn traffic(&mut self, proxy: u64, app: AppName, totals: Totals, now: Moment) {
        let key = (proxy, app);
        let before = self.totals.get(&key).copied().unwrap_or_default();
        let figures = Figures {
            requests: totals.requests.saturating_sub(before.requests),
            bytes_in: totals.bytes_in.saturating_sub(before.bytes_in),
            bytes_out: totals.bytes_out.saturating_sub(before.bytes_out),
            held_us: totals.held_us.saturating_sub(before.held_us),
            ..Figures::default()
        };
        self.add(hour_of(now.unix), &Account::App(key.1.clone()), figures);
        self.totals.insert(key.clone(), totals);
        self.turned_totals.push(key);
    }

    /// Takes down the CPU time of the parent cgroup.
    pub(super) fn parent(&mut self, cpu_us: u64, now: Moment) {
        let before = self.parent_us.unwrap_or(0);
        // Lower than before: it was made anew.
        let used = if cpu_us < before { cpu_us } else { cpu_us - before };
        if used > 0 || self.parent_us.is_none() {
            self.parent_us = Some(cpu_us);
            self.add(hour_of(now.unix), &Account::Parent, Figures { cpu_us: used, ..Figures::default() });
        }
    }

    /// Distributes what was used within the `passed` µs before `now` over their hours, to the last unit.
    fn spread(&mut self, account: &Account, figures: Figures, passed: u64, now: Moment) {
        let begin = now.unix.saturating_sub(passed);
        let (first, last) = (hour_of(begin), hour_of(now.unix));
        if first == last || last - first > LONGEST_SPREAD_H {
            return self.add(last, account, figures);
        }
        // A start is one, at its begin.
        self.add(first, account, Figures { wakes: figures.wakes, ..Figures::default() });
        let mut left = Figures { wakes: 0, ..figures }.to_array();
        let mut time_left = now.unix - begin;
        let mut from = begin;
        for hour in first..=last {
            let until = ((hour + 1) * HOUR_US).min(now.unix);
            let time = until - from;
            let share = left.map(|amount| part(amount, time, time_left));
            left.iter_mut().zip(share).for_each(|(left, share)| *left -= share);
            self.add(hour, account, Figures::from_array(share));
            time_left -= time;
            from = until;
        }
    }

    fn add(&mut self, hour: u64, account: &Account, figures: Figures) {
        if figures != Figures::default() {
            *self.rows.entry((hour, account.clone())).or_default() += figures;
        }
    }

    /// Whether a commit has something to write.
    pub(super) fn is_dirty(&self) -> bool {
        !(self.rows.is_empty() && self.turned.is_empty() && self.turned_totals.is_empty())
    }

    /// The file is another one, in which nothing is: the counters last taken down are written into it with the next commit.
    pub(super) fn move_house(&mut self) {
        self.turned = self.seen.keys().map(|id| (id.clone(), true)).collect();
        self.turned_totals = self.totals.keys().cloned().collect();
    }

    /// All is written.
    pub(super) fn written(&mut self) {
        self.rows.clear();
        self.turned.clear();
        self.turned_totals.clear();
    }
}

/// The hour of a time, both since the Unix epoch.
pub(super) fn hour_of(unix_us: u64) -> u64 {
    unix_us / HOUR_US
}

fn byte_seconds(bytes: u64, us: u64) -> u64 {
    u64::try_from(u128::from(bytes) * u128::from(us) / 1_000_000).unwrap_or(u64::MAX)
}

/// `amount × time / whole`; all of it when nothing is left of the whole but `time`.
fn part(amount: u64, time: u64, whole: u64) -> u64 {
    if time >= whole {
        return amount;
    }
    u64::try_from(u128::from(amount) * u128::from(time) / u128::from(whole)).unwrap_or(amount)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(generation: u64) -> ContainerId {
        ContainerId { app: "blog".into(), generation }
    }

    fn app() -> AppName {
        "blog".parse().unwrap()
    }

    fn sum(book: &Book) -> Figures {
        let mut sum = Figures::default();
        book.rows.values().for_each(|figures| sum += *figures);
        sum
    }

    fn at(us: u64) -> Moment {
        // The two clocks have different begins.
        Moment { unix: 1_700_000_000_000_000 + us, mono: 5_000_000 + us }
    }

    #[test]
    fn an_instance_that_nobody_saw_running_is_counted_at_its_end() {
        let mut book = Book::default();
        book.settle(&id(1), &app(), at(0).unix, 40_000, at(300_000));
        let figures = sum(&book);
        assert_eq!((figures.cpu_us, figures.running_us, figures.wakes), (40_000, 300_000, 1));
        assert!(book.turned.is_empty(), "nothing was stored of it, so nothing is to be removed");
    }

    #[test]
    fn an_hour_gets_what_was_used_in_it() {
        let mut book = Book::default();
        let turn = (hour_of(at(0).unix) + 1) * HOUR_US;
        let begin = turn - 1_000_000;
        let now = Moment { unix: turn + 3_000_000, mono: 9_000_000 };
        book.settle(&id(1), &app(), begin, 4_000, now);
        let rows: Vec<(u64, u64, u64)> =
            book.rows.values().map(|f| (f.cpu_us, f.running_us, f.wakes)).collect();
        assert_eq!(rows, [(1_000, 1_000_000, 1), (3_000, 3_000_000, 0)]);
    }

    #[test]
    fn time_without_a_daemon_is_counted_as_what_the_instance_was_doing() {
        for frozen in [false, true] {
            let mut book = Book::default();
            let first = Sample { cpu_us: 10, memory: 0, frozen_us: 500, frozen };
            book.sample(&id(1), &app(), at(0).unix, first, at(1_000));
            // The next daemon's group begins to count anew.
            let second = Sample { cpu_us: 20, memory: 0, frozen_us: 0, frozen: false };
            book.sample(&id(1), &app(), at(0).unix, second, at(61_000));
            let figures = sum(&book);
            assert_eq!(figures.cpu_us, 20);
            assert_eq!(figures.frozen_us, if frozen { 60_500 } else { 500 });
            assert_eq!(figures.running_us + figures.frozen_us, 61_000);
        }
    }

    #[test]
    fn a_proxys_report_that_comes_twice_counts_once() {
        let mut book = Book::default();
        let totals = |requests| Totals { requests, ..Totals::default() };
        for requests in [3, 3, 10, 10] {
            book.traffic(7, app(), totals(requests), at(0));
        }
        book.traffic(8, app(), totals(5), at(0));
        assert_eq!(sum(&book).requests, 15);
    }

    #[test]
    fn a_parent_that_is_made_anew_begins_at_nothing() {
        let mut book = Book::default();
        for cpu in [100, 300, 300, 50, 60] {
            book.parent(cpu, at(0));
        }
        assert_eq!(sum(&book).cpu_us, 360);
    }

    proptest! {
        /// However often and whenever it is looked at, and whenever daemons die in between, the sum is what the kernel
        /// counted, and running and frozen time make up the whole life.
        #[test]
        fn nothing_is_lost_and_nothing_counted_twice(
            steps in prop::collection::vec((0u64..20_000_000_000, 0u64..2_000_000, any::<bool>(), any::<bool>()), 1..40),
        ) {
            let mut stored = Figures::default();
            let mut book = Book::default();
            let mut kept = book.seen.clone();
            let (mut time, mut cpu) = (0, 0);
            for (pause, used, look, die) in steps {
                time += pause;
                cpu += used;
                if look {
                    let sample = Sample { cpu_us: cpu, memory: 1 << 20, frozen_us: 0, frozen: false };
                    book.sample(&id(1), &app(), at(0).unix, sample, at(time));
                }
                if die {
                    // What was not committed is gone, amounts and counters alike.
                    book = Book { seen: kept.clone(), ..Book::default() };
                } else {
                    stored += sum(&book);
                    book.written();
                    kept = book.seen.clone();
                }
            }
            book.settle(&id(1), &app(), at(0).unix, cpu, at(time));
            stored += sum(&book);
            prop_assert_eq!(stored.cpu_us, cpu);
            prop_assert_eq!(stored.running_us, time);
            prop_assert_eq!(stored.wakes, 1);
        }
    }
}
