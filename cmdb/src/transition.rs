//! The one state machine of an app's instances: pure, no I/O, no clock of its own; used by every store.
//!
//! A refused transition changes nothing. Every accepted one raises `rev`, so a reader can order what it sees.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::instance::{Generation, Instance, State};

/// Longest back-off between two starts of an app that fails to start, in ms.
pub const BACKOFF_MAX_MS: u64 = 60_000;
/// First back-off, in ms; doubles with each failure in a row.
pub const BACKOFF_FIRST_MS: u64 = 1_000;

/// The mutable state of one app: one record, one transition at a time.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct AppRecord {
    /// Rises with each change.
    pub rev: u64,
    /// The highest generation ever given out.
    pub generation: Generation,
    /// Starts that failed in a row.
    pub failures: u32,
    /// No start before this time (ms since the Unix epoch); 0: none in force.
    pub backoff_until_ms: u64,
    /// Why the last start failed; empty when it did not.
    #[serde(default)]
    pub last_failure: String,
    /// The instances that are there, by generation.
    pub instances: BTreeMap<Generation, Instance>,
    /// For hosts that were thought dead: their instances up to this generation were given up for good. Should such a host
    /// be alive after all, it ends them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub fences: BTreeMap<String, Generation>,
}

/// A change that is asked for.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transition {
    /// A request needs an instance and none is ready: join the start that is under way, or begin one on `node`.
    Wake {
        /// Host that would run it.
        node: String,
        /// Time that the start may take, ms.
        start_timeout_ms: u64,
        /// Hosts that are thought dead: their instances are given up.
        #[serde(default)]
        lost: Vec<String>,
    },
    /// One more instance, beside those that are there (scale-out, or make-before-break replacement).
    Add {
        /// Host that is to run it.
        node: String,
        /// Time that the start may take, ms.
        start_timeout_ms: u64,
        /// Most instances that may serve at a time (starting, ready and frozen count; draining do not).
        max: u32,
        /// A replacement may exceed `max` by one while the old instance still serves.
        replacing: bool,
        /// As in `Wake`.
        #[serde(default)]
        lost: Vec<String>,
    },
    /// An instance that this record does not know runs and listens: its host's launcher has found it after a restart.
    Adopt {
        /// Which.
        generation: Generation,
        /// Host that runs it.
        node: String,
        /// On which port.
        port: u16,
    },
    /// The instance listens.
    Ready {
        /// Which.
        generation: Generation,
        /// On which port.
        port: u16,
    },
    /// The start failed (`during_start`) or a running instance ended by itself.
    Failed {
        /// Which.
        generation: Generation,
        /// Why, in words.
        reason: String,
    },
    /// No new requests for it.
    Drain {
        /// Which.
        generation: Generation,
    },
    /// Stopped by the freezer.
    Freeze {
        /// Which.
        generation: Generation,
    },
    /// Runs again.
    Thaw {
        /// Which.
        generation: Generation,
    },
    /// It is gone (ended as planned).
    Gone {
        /// Which.
        generation: Generation,
    },
    /// Hosts are thought dead, or will not come back: their instances are given up.
    GiveUp {
        /// Which hosts.
        lost: Vec<String>,
    },
    /// Forget failures and back-off (the operator or a new configuration says so).
    ResetBackoff,
}

/// What came of a [`Transition`].
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Done.
    Done,
    /// `Wake`: an instance is ready (or frozen: thaw it).
    Ready(Generation),
    /// `Wake`: this one is starting; wait for it.
    Join(Generation),
    /// `Wake`, `Add`: the caller must start this one.
    Own(Generation),
    /// `Wake`, `Add`: not before this time, ms since the Unix epoch.
    Backoff {
        /// End of the back-off.
        until_ms: u64,
        /// Why.
        reason: String,
    },
    /// `Add`: `max` is reached.
    Full,
    /// The instance is not there (any more) or not in a state from which this can be done: the caller is late.
    Fenced,
}

impl Transition {
    /// Which instance it is about; `None` when it is about the app.
    #[must_use]
    pub fn generation(&self) -> Option<Generation> {
        match self {
            Self::Adopt { generation, .. }
            | Self::Ready { generation, .. }
            | Self::Failed { generation, .. }
            | Self::Drain { generation }
            | Self::Freeze { generation }
            | Self::Thaw { generation }
            | Self::Gone { generation } => Some(*generation),
            Self::Wake { .. } | Self::Add { .. } | Self::GiveUp { .. } | Self::ResetBackoff => None,
        }
    }
}

impl AppRecord {
    /// Carries out `transition` at time `now_ms` (ms since the Unix epoch); on refusal the record is unchanged.
    pub fn apply(&mut self, transition: &Transition, now_ms: u64) -> Outcome {
        let given_up = match transition {
            Transition::Wake { lost, .. } | Transition::Add { lost, .. } | Transition::GiveUp { lost } => {
                self.give_up(lost)
            }
            _ => false,
        };
        let outcome = self.decide(transition, now_ms);
        let refused = matches!(
            outcome,
            Outcome::Ready(_) | Outcome::Join(_) | Outcome::Backoff { .. } | Outcome::Full | Outcome::Fenced
        );
        if given_up || !refused {
            self.rev += 1;
        }
        outcome
    }

    /// Whether others have given up this instance of `node`, so that it has to end.
    #[must_use]
    pub fn is_fenced(&self, node: &str, generation: Generation) -> bool {
        self.fences.get(node).is_some_and(|fence| generation <= *fence)
    }

    /// The instances that may get requests.
    pub fn ready(&self) -> impl Iterator<Item = &Instance> {
        self.instances.values().filter(|i| i.state == State::Ready)
    }

    /// Whether an instance of `node` may have this generation: it was not given up, and is not another host's. If not, it has
    /// to end.
    #[must_use]
    pub fn may_be_of(&self, node: &str, generation: Generation) -> bool {
        !self.is_fenced(node, generation) && self.instances.get(&generation).is_none_or(|i| i.node == node)
    }

    /// Two histories of one app have grown apart (a store could not be reached, or has lost something): `node`'s instances
    /// are as `mine` has them, for it is the authority about what it runs; everybody else's stay as they are here, but for
    /// those that either side has given up.
    ///
    /// Two hosts that were apart may have given out one generation in the same millisecond. Then it is the one's who has told
    /// of it first; see [`AppRecord::disowned`].
    pub fn take_over(&mut self, mine: &Self, node: &str) {
        for (lost, fence) in &mine.fences {
            let known = self.fences.entry(lost.clone()).or_default();
            *known = (*known).max(*fence);
        }
        let fences = &self.fences;
        let given_up = |i: &Instance| fences.get(&i.node).is_some_and(|fence| i.generation <= *fence);
        self.instances.retain(|_, instance| instance.node != node && !given_up(instance));
        for (generation, instance) in mine.instances.iter().filter(|(_, instance)| instance.node == node) {
            if self.may_be_of(node, *generation) {
                self.instances.insert(*generation, instance.clone());
            }
        }
        self.generation = self.generation.max(mine.generation);
        if mine.backoff_until_ms > self.backoff_until_ms {
            self.failures = mine.failures;
            self.backoff_until_ms = mine.backoff_until_ms;
            self.last_failure.clone_from(&mine.last_failure);
        }
        self.rev = self.rev.max(mine.rev) + 1;
    }

    /// Generations of `node`'s instances in `mine` that are another host's here: `node` has to end those instances, and must
    /// say nothing more of them.
    pub fn disowned<'a>(&'a self, mine: &'a Self, node: &'a str) -> impl Iterator<Item = Generation> + 'a {
        let theirs = move |g: &Generation| self.instances.get(g).is_some_and(|i| i.node != node);
        let of_node = mine.instances.values().filter(move |i| i.node == node);
        of_node.map(|i| i.generation).filter(theirs)
    }

    fn decide(&mut self, transition: &Transition, now_ms: u64) -> Outcome {
        match transition {
            Transition::Wake { node, start_timeout_ms, .. } => self.wake(node, *start_timeout_ms, now_ms),
            Transition::Add { node, start_timeout_ms, max, replacing, .. } => {
                let serving = self.instances.values().filter(|i| i.state != State::Draining).count();
                let allowed = *max as usize + usize::from(*replacing);
                if serving >= allowed {
                    return Outcome::Full;
                }
                self.begin(node, *start_timeout_ms, now_ms)
            }
            Transition::Adopt { generation, node, .. } if !self.may_be_of(node, *generation) => {
                Outcome::Fenced
            }
            Transition::Adopt { generation, node, port } => {
                let instance = Instance {
                    generation: *generation,
                    state: State::Ready,
                    node: node.clone(),
                    port: *port,
                    since_ms: now_ms,
                    deadline_ms: 0,
                };
                self.generation = self.generation.max(*generation);
                self.instances.insert(*generation, instance);
                Outcome::Done
            }
            Transition::Ready { generation, port } => {
                let Some(instance) = self.in_state(*generation, &[State::Starting]) else {
                    return Outcome::Fenced;
                };
                *instance = Instance {
                    state: State::Ready,
                    port: *port,
                    since_ms: now_ms,
                    deadline_ms: 0,
                    ..instance.clone()
                };
                // `failures` stays until the instance has proved itself: one that listens and dies, over and over, is a
                // crash loop too.
                self.backoff_until_ms = 0;
                self.last_failure.clear();
                Outcome::Done
            }
            Transition::Failed { generation, reason } => {
                let Some(instance) = self.instances.remove(generation) else { return Outcome::Fenced };
                // Only a failed start backs off: an instance that served and then ended is simply woken again. One
                // that dies right after it began to listen, and again, is a crash loop all the same.
                let served = instance.state != State::Starting;
                let at_once = now_ms.saturating_sub(instance.since_ms) < BACKOFF_FIRST_MS;
                self.failures = if !served || at_once { self.failures.saturating_add(1) } else { 0 };
                if !served || (at_once && self.failures > 1) {
                    let doubling = BACKOFF_FIRST_MS << self.failures.saturating_sub(1).min(16);
                    self.backoff_until_ms = now_ms + doubling.min(BACKOFF_MAX_MS);
                }
                self.last_failure.clone_from(reason);
                Outcome::Done
            }
            Transition::Drain { generation } => self.change(
                *generation,
                &[State::Starting, State::Ready, State::Frozen],
                State::Draining,
                now_ms,
            ),
            Transition::Freeze { generation } => {
                self.change(*generation, &[State::Ready], State::Frozen, now_ms)
            }
            Transition::Thaw { generation } => {
                self.change(*generation, &[State::Frozen], State::Ready, now_ms)
            }
            Transition::Gone { generation } => match self.instances.remove(generation) {
                Some(instance) => {
                    if instance.state != State::Starting {
                        self.failures = 0;
                    }
                    Outcome::Done
                }
                None => Outcome::Fenced,
            },
            // Done before anything is decided.
            Transition::GiveUp { .. } => Outcome::Done,
            Transition::ResetBackoff => {
                self.failures = 0;
                self.backoff_until_ms = 0;
                self.last_failure.clear();
                Outcome::Done
            }
        }
    }

    /// Removes and fences the instances of hosts that are thought dead. Whether there were any.
    fn give_up(&mut self, lost: &[String]) -> bool {
        let before = self.instances.len();
        for node in lost {
            let last = self.instances.values().filter(|i| i.node == *node).map(|i| i.generation).max();
            if let Some(last) = last {
                let fence = self.fences.entry(node.clone()).or_default();
                *fence = (*fence).max(last);
                self.instances.retain(|_, instance| instance.node != *node);
            }
        }
        self.instances.len() != before
    }

    fn wake(&mut self, node: &str, start_timeout_ms: u64, now_ms: u64) -> Outcome {
        let serving = || self.instances.values().filter(|i| matches!(i.state, State::Ready | State::Frozen));
        // One of the asker's own host first: for another's it would have to send the request on.
        if let Some(instance) = serving().find(|i| i.node == node).or_else(|| serving().next()) {
            return Outcome::Ready(instance.generation);
        }
        // A start whose deadline has passed has lost its owner (its host died): it must not be waited for.
        let starting = self.instances.values().find(|i| i.state == State::Starting && i.deadline_ms > now_ms);
        if let Some(instance) = starting {
            return Outcome::Join(instance.generation);
        }
        self.begin(node, start_timeout_ms, now_ms)
    }

    fn begin(&mut self, node: &str, start_timeout_ms: u64, now_ms: u64) -> Outcome {
        if self.backoff_until_ms > now_ms {
            return Outcome::Backoff { until_ms: self.backoff_until_ms, reason: self.last_failure.clone() };
        }
        // Time as a floor keeps generations rising even when the record itself was lost (notes: Redis restored, journal deleted).
        let generation = Generation((self.generation.0 + 1).max(now_ms));
        self.generation = generation;
        self.instances.insert(
            generation,
            Instance {
                generation,
                state: State::Starting,
                node: node.to_owned(),
                port: 0,
                since_ms: now_ms,
                deadline_ms: now_ms + start_timeout_ms,
            },
        );
        Outcome::Own(generation)
    }

    fn change(&mut self, generation: Generation, from: &[State], to: State, now_ms: u64) -> Outcome {
        match self.in_state(generation, from) {
            Some(instance) => {
                instance.state = to;
                instance.since_ms = now_ms;
                Outcome::Done
            }
            None => Outcome::Fenced,
        }
    }

    fn in_state(&mut self, generation: Generation, states: &[State]) -> Option<&mut Instance> {
        self.instances.get_mut(&generation).filter(|i| states.contains(&i.state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wake() -> Transition {
        Transition::Wake { node: "here".into(), start_timeout_ms: 20_000, lost: Vec::new() }
    }

    fn started(record: &mut AppRecord, now_ms: u64) -> Generation {
        match record.apply(&wake(), now_ms) {
            Outcome::Own(generation) => generation,
            other => panic!("{other:?}"),
        }
    }

    fn failed(generation: Generation) -> Transition {
        Transition::Failed { generation, reason: "exited with status 3".into() }
    }

    #[test]
    fn the_first_waker_starts_and_the_others_join() {
        let mut record = AppRecord::default();
        let generation = started(&mut record, 1_000);
        assert_eq!(record.apply(&wake(), 1_001), Outcome::Join(generation));
        record.apply(&Transition::Ready { generation, port: 80 }, 1_002);
        assert_eq!(record.apply(&wake(), 1_003), Outcome::Ready(generation));
    }

    #[test]
    fn a_start_whose_owner_was_lost_is_not_waited_for() {
        let mut record = AppRecord::default();
        let lost = started(&mut record, 1_000);
        let next = started(&mut record, 21_001);
        assert!(next > lost);
    }

    #[test]
    fn what_others_have_given_up_never_comes_back() {
        let mut record = AppRecord::default();
        let old = started(&mut record, 1_000);
        record.apply(&Transition::Ready { generation: old, port: 80 }, 1_001);
        let cut_off = record.clone();
        let elsewhere =
            Transition::Wake { node: "there".into(), start_timeout_ms: 500, lost: vec!["here".into()] };
        let Outcome::Own(new) = record.apply(&elsewhere, 2_000) else { panic!("{record:?}") };
        assert_eq!(record.instances.keys().copied().collect::<Vec<_>>(), [new]);

        let adopt = Transition::Adopt { generation: old, node: "here".into(), port: 80 };
        assert_eq!(record.apply(&adopt, 2_001), Outcome::Fenced);
        record.take_over(&cut_off, "here");
        assert!(record.is_fenced("here", old) && !record.instances.contains_key(&old));
    }

    #[test]
    fn back_off_doubles_up_to_its_bound_and_a_good_life_ends_it() {
        let mut record = AppRecord::default();
        let mut now = 1_000_000;
        let mut waits = Vec::new();
        for _ in 0..9 {
            let generation = started(&mut record, now);
            record.apply(&failed(generation), now);
            waits.push(record.backoff_until_ms - now);
            assert!(matches!(record.apply(&wake(), now), Outcome::Backoff { .. }));
            now = record.backoff_until_ms;
        }
        assert_eq!(waits, [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000, 60_000]);

        let generation = started(&mut record, now);
        record.apply(&Transition::Ready { generation, port: 80 }, now);
        record.apply(&failed(generation), now + 10_000);
        assert_eq!((record.failures, record.backoff_until_ms), (0, 0));
    }

    #[test]
    fn one_death_right_after_listening_is_forgiven_and_a_series_is_a_crash_loop() {
        let mut record = AppRecord::default();
        let die = |record: &mut AppRecord, now| {
            let generation = started(record, now);
            record.apply(&Transition::Ready { generation, port: 80 }, now);
            record.apply(&failed(generation), now + 10);
        };
        die(&mut record, 1_000);
        assert_eq!(record.backoff_until_ms, 0);
        die(&mut record, 2_000);
        assert_eq!(record.backoff_until_ms, 2_010 + 2_000);
    }
}
