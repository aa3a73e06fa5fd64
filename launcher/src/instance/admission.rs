//! Waiting for a start slot, and giving way to what serves.

use launcher_client::wire::RefusalCode;
use tokio::time::Instant;

use super::{End, Launch, Note};
use crate::{
    cgroup::{CpuWeight, Group},
    trace::Trace,
};

impl Launch {
    /// Waits until the host has room for one more start. The time that it takes is none of the app's `start-timeout`.
    pub(super) async fn enter(&mut self, trace: &mut Trace) -> Result<(), End> {
        let begun = Instant::now();
        let deadline = begun + self.app.lifecycle.start_timeout;
        let mut waits = false;
        let (generation, supervisor) = (self.generation, &self.supervisor);
        let admitted = self.host.governor.admit(
            &self.app.name,
            self.first,
            self.app.resources.memory.0,
            deadline,
            |why| {
                waits = true;
                let _ = supervisor.send(crate::supervisor::Message::Note(Note::Waits { generation, why }));
            },
        );
        let admitted = tokio::select! {
            biased;
            admitted = admitted => admitted,
            // Whatever is asked of a start that has not begun, or if nobody is there to ask: it does not begin.
            _ = self.control.recv() => return Err(self.failed("was ended before its start began")),
        };
        match admitted {
            Ok(slot) => {
                let waited = waits.then(|| begun.elapsed());
                if waits {
                    trace.lap("start-slot");
                }
                self.tell(Note::Admitted { generation, slot, waited });
                Ok(())
            }
            Err(why) => {
                let reason = format!("could not be started within {:.1?}: {why}", begun.elapsed());
                Err(End { code: RefusalCode::Busy, reason, oom: false })
            }
        }
    }

    /// As long as it has no quota, it shall not take the CPU from those that serve.
    pub(super) fn give_way(&self, group: &Group) {
        if self.host.governor.is_on()
            && let Err(error) = group.set_weight(CpuWeight::Starting)
        {
            tracing::warn!(container = group.name(), %error, "its start does not give way to others");
        }
    }
}
