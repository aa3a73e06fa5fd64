//! Apps with an exclusive volume: never two instances at a time, on whichever hosts.
//!
//! There is no lock that a dead host could keep. A host that the CMDB has not heard for [`UNHEARD`] ends its instance itself;
//! others take a host for lost, as far as such apps go, only after [`LOST_AFTER`], when that is done. It is this daemon that does it:
//! one that is away itself for longer than that, while its containers live on under the spawner, cannot.

use std::time::Duration;

use cmdb::{AppRecord, Generation, State};
use tokio::time::Instant;

use super::{Stage, Supervisor};
use crate::instance::name;

/// A host that has not been heard for so long gives its exclusive volumes back.
const UNHEARD: Duration = Duration::from_secs(5);
/// Time from SIGTERM to SIGKILL then.
const GRACE: Duration = Duration::from_secs(3);
/// A host with an exclusive volume is given up only when it has been lost for so long.
const LOST_AFTER: Duration = Duration::from_secs(10);
/// How often it is looked at whether this host is heard, and whether the volume has become free.
const LOOK: Duration = Duration::from_millis(200);

impl Supervisor {
    /// Whether only one instance may run at a time.
    pub(super) fn is_exclusive(&self) -> bool {
        self.app.volumes.iter().any(|volume| volume.exclusive)
    }

    /// Hosts whose instances of this app may be given up.
    pub(super) fn lost(&self) -> Vec<String> {
        self.host.lost_for(if self.is_exclusive() { LOST_AFTER } else { Duration::ZERO })
    }

    /// Whether an instance other than that one still has the exclusive volume, or may have it: one that drains, or one of a
    /// host that is lost, but not for long.
    pub(super) fn is_taken(&self, record: &AppRecord, but: Option<Generation>) -> bool {
        if !self.is_exclusive() {
            return false;
        }
        let given_up = self.lost();
        let lost = self.host.lost();
        let ending = self.running.iter().any(|(generation, r)| Some(*generation) != but && r.is_ending());
        let others = record.instances.values().filter(|i| i.node != self.host.node);
        let mut others = others.filter(|i| Some(i.generation) != but && !given_up.contains(&i.node));
        ending || others.any(|i| but.is_some() || i.state == State::Draining || lost.contains(&i.node))
    }

    /// Whether this host may have an exclusive volume: the CMDB hears it.
    pub(super) fn is_heard(&self) -> bool {
        !self.host.several || self.host.unheard_for() < UNHEARD
    }

    pub(super) fn exclusive_due(&self) -> Option<Instant> {
        let waits = !self.wakers.is_empty()
            || (self.host.several && (self.app.scale.min > 0 || !self.running.is_empty()));
        (waits && self.is_exclusive()).then(|| Instant::now() + LOOK)
    }

    /// Gives the volume back when this host is not heard; lets in who waits for a volume that has become free.
    pub(super) async fn mind_exclusive(&mut self) {
        if !self.is_exclusive() {
            return;
        }
        if !self.is_heard() {
            self.give_back();
        }
        let waits = !self.wakers.is_empty()
            && !self.running.values().any(|running| matches!(running.stage, Stage::Starting));
        if waits {
            for waker in std::mem::take(&mut self.wakers) {
                Box::pin(self.wake(waker)).await;
            }
        }
    }

    fn give_back(&mut self) {
        let reason = "the CMDB does not hear this host, and its exclusive volume may be another host's soon";
        for generation in self.generations() {
            let Some(running) = self.running.get_mut(&generation) else { continue };
            if matches!(running.stage, Stage::Stopping { .. }) {
                continue;
            }
            running.terminate(reason, GRACE);
            let message = format!("{} is ended: {reason}", name(&self.app.name, generation));
            self.emit("fenced", generation, message);
        }
    }
}
