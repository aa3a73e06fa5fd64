//! A host that is to be emptied: what is idle ends, what is busy moves to another host, the new instance first.

use std::time::Duration;

use cmdb::{Generation, Outcome, State};
use tokio::time::Instant;

use super::{Supervisor, running::Rest};
use crate::instance::name;

/// An instance with a request within this time is busy.
const BUSY_WITHIN: Duration = Duration::from_secs(1);
/// How often something that is to move is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// When a move is tried again that could not be made.
const AGAIN: Duration = Duration::from_secs(1);
const WHY: &str = "this host is to be emptied";

impl Supervisor {
    /// When an instance that is to move is to be looked at again.
    pub(super) fn moving_due(&self) -> Option<Instant> {
        (self.running.values().any(|running| !running.is_ending()) && self.is_draining())
            .then(|| Instant::now() + LOOK)
    }

    /// Moves or ends what runs here, while this host is to be emptied.
    pub(super) async fn mind_moving(&mut self, now: Instant) {
        if self.removed || self.ending || self.running.is_empty() || !self.is_draining() {
            return;
        }
        for generation in self.generations() {
            let Some(running) = self.running.get(&generation).filter(|running| running.is_ready()) else {
                continue;
            };
            let busy = running.in_flight() > 0 || running.last_active + BUSY_WITHIN > now;
            // An exclusive volume is given back before another host may have it.
            let idle =
                self.is_exclusive() || running.rest != Rest::Awake || (!busy && self.may_end_when_idle());
            let is_due = running.moves_to.is_none_or(|(_, tried)| tried + AGAIN <= now);
            if idle || self.has_moved(generation) {
                self.drain(generation, WHY).await;
            } else if is_due {
                self.move_away(generation, now).await;
            }
        }
    }

    /// Whether another host serves in its place.
    fn has_moved(&mut self, generation: Generation) -> bool {
        let record = self.record();
        let Some(running) = self.running.get_mut(&generation) else { return false };
        let Some((Some(to), _)) = running.moves_to else { return false };
        match record.instances.get(&to).map(|instance| instance.state) {
            Some(State::Ready | State::Frozen) => true,
            Some(State::Starting) => {
                running.moves_to = Some((Some(to), Instant::now()));
                false
            }
            // It did not come to serve, or has ended already.
            Some(State::Draining) | None => {
                running.moves_to = Some((None, Instant::now()));
                false
            }
        }
    }

    async fn move_away(&mut self, generation: Generation, now: Instant) {
        let told = self.running.get(&generation).is_some_and(|running| running.moves_to.is_some());
        let to = match self.best_elsewhere() {
            Some(node) => match self.begin_on(node, true, &format!("{generation} has to leave")).await {
                Ok(Outcome::Own(to)) => Some(to),
                _ => None,
            },
            None => {
                if !told {
                    let id = name(&self.app.name, generation);
                    let message = format!("{id} stays: {WHY}, and no other host takes it");
                    self.emit("node-stays", generation, message);
                }
                None
            }
        };
        if let Some(running) = self.running.get_mut(&generation) {
            running.moves_to = Some((to, now));
        }
    }
}
