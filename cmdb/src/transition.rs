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

impl AppRecord {
    /// Carries out `transition` at time `now_ms` (ms since the Unix epoch); on refusal the record is unchanged.
    pub fn apply(&mut self, transition: &Transition, now_ms: u64) -> Outcome {
        let outcome = self.decide(transition, now_ms);
        if !matches!(
            outcome,
            Outcome::Ready(_) | Outcome::Join(_) | Outcome::Backoff { .. } | Outcome::Full | Outcome::Fenced
        ) {
            self.rev += 1;
        }
        outcome
    }

    /// The instances that may get requests.
    pub fn ready(&self) -> impl Iterator<Item = &Instance> {
        self.instances.values().filter(|i| i.state == State::Ready)
    }

    fn decide(&mut self, transition: &Transition, now_ms: u64) -> Outcome {
        match transition {
            Transition::Wake { node, start_timeout_ms } => self.wake(node, *start_timeout_ms, now_ms),
            Transition::Add { node, start_timeout_ms, max, replacing } => {
                let serving = self.instances.values().filter(|i| i.state != State::Draining).count();
                let allowed = *max as usize + usize::from(*replacing);
                if serving >= allowed {
                    return Outcome::Full;
                }
                self.begin(node, *start_timeout_ms, now_ms)
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
                self.failures = 0;
                self.backoff_until_ms = 0;
                self.last_failure.clear();
                Outcome::Done
            }
            Transition::Failed { generation, reason } => {
                let Some(instance) = self.instances.remove(generation) else { return Outcome::Fenced };
                // Only a failed start backs off: an instance that served and then ended is simply woken again. One
                // that dies over and over right after it began to listen is a crash loop all the same.
                let served_ms = if instance.state == State::Starting {
                    0
                } else {
                    now_ms.saturating_sub(instance.since_ms)
                };
                if served_ms < BACKOFF_FIRST_MS {
                    self.failures = self.failures.saturating_add(1);
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
                Some(_) => Outcome::Done,
                None => Outcome::Fenced,
            },
            Transition::ResetBackoff => {
                self.failures = 0;
                self.backoff_until_ms = 0;
                self.last_failure.clear();
                Outcome::Done
            }
        }
    }

    fn wake(&mut self, node: &str, start_timeout_ms: u64, now_ms: u64) -> Outcome {
        let serving = |i: &&Instance| matches!(i.state, State::Ready | State::Frozen);
        if let Some(instance) = self.instances.values().find(serving) {
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
