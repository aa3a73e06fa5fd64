//! Picking up after a restart of the daemon: instances live on, and are supervised again.

use std::sync::Arc;

use cmdb::{Generation, Outcome, Transition};
use launcher_client::wire::WakeTiming;
use nix::libc::SIGKILL;

use super::{Awake, Supervisor};
use crate::instance::{Adoption, Live, fingerprint, name};

impl Supervisor {
    /// Goes on with an instance of an earlier daemon.
    pub(super) async fn adopt(&mut self, generation: Generation, mut adoption: Adoption) {
        let id = name(&self.app.name, generation);
        let outdated = adoption.tag.runs != fingerprint(&self.app);
        let (pid, image, port) = (adoption.pid, adoption.tag.image.clone(), adoption.port);
        let node = self.host.node.clone();
        let adopted = self.apply(Transition::Adopt { generation, node, port }).await;
        if !matches!(adopted, Ok(Outcome::Done)) {
            // The app was removed in this very moment, and the instance's task would have nobody to tell; or others thought
            // this host dead and have taken over.
            self.host.keeper.kill(
                &crate::sandbox::ContainerId { app: self.app.name.to_string(), generation: generation.0 },
                SIGKILL,
            );
            if matches!(adopted, Ok(Outcome::Fenced)) {
                let message =
                    format!("{id} is ended: this host was thought dead, and others have taken over");
                self.emit("fenced", generation, message);
            }
            return tracing::warn!(?adopted, "{id} is not adopted");
        }
        let launch = self.admit(generation, None);
        if let Some(running) = self.running.get_mut(&generation) {
            running.adopted(pid, image, adoption.under_way.take());
            if outdated {
                running.wants_replacement =
                    Some("its configuration changed while no launcher ran".to_owned());
            }
        }
        self.emit(
            "adopted",
            generation,
            format!("{id} has gone on without a launcher and is supervised again"),
        );
        tokio::spawn(launch.adopt(adoption));
    }

    /// An adopted instance's task has picked up what it needs.
    pub(super) fn adopted(&mut self, live: Arc<Live>, timing: WakeTiming) {
        let generation = live.id.generation;
        if let Some(running) = self.running.get_mut(&generation).filter(|r| r.is_adopted()) {
            running.group = Some(Arc::clone(&live.group));
            running.ready(Arc::clone(&live), timing.clone());
        }
        for waker in self.wakers.drain(..) {
            let _ = waker.send(Ok(Awake { live: Arc::clone(&live), timing: timing.clone() }));
        }
    }
}
