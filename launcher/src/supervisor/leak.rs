//! Watching an app for lost memory, by what its lifetimes have in common: see [`crate::leak`].

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use cmdb::{Generation, units::Bytes};

use super::{Supervisor, running::Running};
use crate::{
    instance::name,
    leak::{Curve, Evidence, LIFETIMES, judge},
};

/// An instance is looked at this often at most.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What is known of an app's lifetimes.
#[derive(Debug, Default)]
pub(super) struct Leak {
    /// Those that have ended and were long enough to tell something, the last ones last.
    past: VecDeque<Curve>,
    /// What they ran: another image is another app.
    image: String,
    /// Why the app is suspected, when it is.
    pub(super) evidence: Option<Evidence>,
}

/// What is known of one instance's memory.
#[derive(Debug, Default)]
pub(super) struct Growth {
    curve: Curve,
    looked: Option<Instant>,
}

impl Supervisor {
    /// An instance has answered requests: how much memory has it now? One file is read, and only twice a second.
    pub(super) fn look_for_leak(&mut self, generation: Generation) {
        let now = Instant::now();
        let Some(running) = self.running.get_mut(&generation) else { return };
        let growth = &running.growth;
        // How many requests an adopted one has answered is not known.
        if running.is_adopted()
            || !running.is_ready()
            || growth.looked.is_some_and(|at| at + LOOK_EVERY > now)
        {
            return;
        }
        running.growth.looked = Some(now);
        let Some(bytes) = running.group.as_ref().and_then(|group| group.memory_unreclaimable().ok()) else {
            return;
        };
        // Between two points only what is lower counts: what a garbage collector is about to take is no evidence.
        let is_new = running.growth.curve.wants(running.requests);
        running.growth.curve.push(running.requests, bytes);
        if !is_new {
            return;
        }
        let grows = running.growth.curve.grows_on();
        // Evidence against another image says nothing about this one.
        let of_this_image = running.image == self.leak.image;
        self.judge_leak(generation);
        if grows || (of_this_image && self.leak.evidence.is_some()) {
            self.recycle_at(generation, bytes);
        }
    }

    /// A lifetime is over.
    pub(super) fn remember_growth(&mut self, running: &Running) {
        if running.growth.curve.is_telling() {
            if self.leak.image != running.image {
                self.leak = Leak { image: running.image.clone(), ..Leak::default() };
            }
            self.leak.past.push_back(running.growth.curve.clone());
            if self.leak.past.len() > LIFETIMES {
                self.leak.past.pop_front();
            }
        }
    }

    /// In words, for `ps`.
    pub(super) fn suspicion(&self) -> Option<String> {
        self.leak.evidence.map(|evidence| evidence.words(self.app.resources.memory.0))
    }

    fn judge_leak(&mut self, generation: Generation) {
        let Some(running) = self.running.get(&generation) else { return };
        if running.image != self.leak.image && !self.leak.past.is_empty() {
            return;
        }
        let evidence = judge(self.leak.past.iter().chain([&running.growth.curve]));
        let before = std::mem::replace(&mut self.leak.evidence, evidence);
        let id = name(&self.app.name, generation);
        match (before, self.suspicion()) {
            (None, Some(words)) => {
                self.emit("leak-suspected", generation, format!("{}: {words}", self.app.name))
            }
            (Some(_), None) => {
                self.emit(
                    "leak-cleared",
                    generation,
                    format!("the memory of {id} levels off: no leak is suspected any more"),
                );
            }
            _ => {}
        }
    }

    fn recycle_at(&mut self, generation: Generation, bytes: u64) {
        let Some(share) = self.app.lifecycle.recycle_at else { return };
        let limit = self.app.resources.memory.0;
        let Some(running) = self.running.get_mut(&generation) else { return };
        if bytes.saturating_mul(100) >= limit.saturating_mul(u64::from(share))
            && running.wants_replacement.is_none()
        {
            let why = format!("its memory grows on and has come to {} of {}", Bytes(bytes), Bytes(limit));
            running.wants_replacement = Some(why);
        }
    }
}
