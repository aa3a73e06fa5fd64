//! Starts that wait for room on the host: what is told of them, and what happens when there is none in time.

use std::time::Duration;

use cmdb::{Generation, Transition};
use launcher_client::wire::{Refusal, RefusalCode};
use tokio::time::Instant;

use super::{Running, Supervisor};
use crate::{
    governor::{Slot, Why},
    instance::name,
};

/// When a start that nobody waits for is tried again, and when a visitor may come again.
const AGAIN: Duration = Duration::from_secs(2);

impl Supervisor {
    pub(super) fn waits(&mut self, generation: Generation, why: &Why) {
        let Some(running) = self.running.get_mut(&generation) else { return };
        running.waits = format!("waits for a start slot: {why}");
        let message = format!("{} {}", name(&self.app.name, generation), running.waits);
        self.emit("start-waits", generation, message);
    }

    pub(super) fn admitted(&mut self, generation: Generation, slot: Slot, waited: Option<Duration>) {
        // One that has ended meanwhile needs none.
        let Some(running) = self.running.get_mut(&generation) else { return };
        running.slot = Some(slot);
        running.waits.clear();
        if let Some(waited) = waited {
            let id = name(&self.app.name, generation);
            self.emit("start-admitted", generation, format!("{id} waited {waited:.1?} for a start slot"));
        }
    }

    /// It listens: another start may begin.
    pub(super) fn started(&mut self, generation: Generation) {
        if let Some(running) = self.running.get_mut(&generation) {
            running.slot = None;
        }
    }

    /// The host had no room for it in time. That is no failure of the app, so its next start is not put off.
    pub(super) async fn no_room(&mut self, generation: Generation, running: &Running, reason: String) {
        drop(self.apply(Transition::Gone { generation }).await);
        self.emit("no-room", generation, format!("{} {reason}", name(&self.app.name, generation)));
        self.retry_at = Some(Instant::now() + AGAIN);
        match running.replaces {
            Some(old) => {
                if let Some(old) = self.running.get_mut(&old) {
                    old.replacement = None;
                }
            }
            None => {
                let retry_after_ms = u64::try_from(AGAIN.as_millis()).ok();
                let refusal = Refusal::new(RefusalCode::Busy, format!("{} {reason}", self.app.name));
                self.refuse_wakers(&Refusal { retry_after_ms, ..refusal });
            }
        }
    }
}
