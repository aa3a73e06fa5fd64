//! What the operator orders for one app: other limits, another number of instances, a pause.

use std::sync::Arc;

use cmdb::{
    App, Generation,
    units::{Bytes, Millicores},
};
use launcher_client::wire::{Refusal, RefusalCode, ScaleOrder};

use super::{Limits, Supervisor};
use crate::overrides::{Override, Set};

/// Most instances that may be ordered: a slip of the finger shall not fill the host.
const MOST: u32 = 1_000;

impl Supervisor {
    /// Other limits; they hold until the vhost file changes them.
    pub(super) fn limit(&mut self, limits: Limits) -> Result<(), Refusal> {
        let file = Arc::clone(&self.file);
        let resources = &file.resources;
        self.order(|known| {
            if limits.reset {
                (known.cpu, known.memory, known.pids) = (None, None, None);
            }
            if let Some(cpu) = limits.cpu {
                known.cpu = Some(Set { value: Some(Millicores(cpu)), file: resources.cpu });
            }
            if let Some(memory) = limits.memory {
                known.memory = Some(Set { value: Bytes(memory), file: resources.memory });
            }
            if let Some(pids) = limits.pids {
                known.pids = Some(Set { value: pids, file: resources.pids });
            }
        })?;
        self.begin_scaling_anew();
        self.apply_limits()
    }

    /// Another number of instances, or a pause. What has to start or to drain is a duty like others.
    pub(super) fn scale(&mut self, order: ScaleOrder) -> Result<(), Refusal> {
        let wanted = ordered(&self.host.overrides.of(&self.app.name), &self.file, order)?;
        let was_paused = self.paused;
        let old = self.order(|known| *known = wanted)?;
        if old.scale != self.app.scale {
            self.begin_scaling_anew();
            self.retry_at = None;
        }
        if was_paused != self.paused {
            self.forget_trial();
        }
        Ok(())
    }

    /// Puts the overrides of now in force; the app as it was before.
    pub(super) fn take_overrides(&mut self) -> Arc<App> {
        let known = self.host.overrides.of(&self.file.name);
        self.paused = known.paused;
        std::mem::replace(&mut self.app, Arc::new(known.of_file(&self.file)))
    }

    fn order(&mut self, change: impl FnOnce(&mut Override)) -> Result<Arc<App>, Refusal> {
        let overrides = &self.host.overrides;
        let known = tokio::task::block_in_place(|| overrides.update(&self.file.name, change))
            .map_err(|error| Refusal::new(RefusalCode::Internal, error.to_string()))?;
        let message = match known.words() {
            words if words.is_empty() => "the vhost file holds again, by the operator".to_owned(),
            words => format!("by the operator, until the vhost file changes it: {}", words.join(", ")),
        };
        self.host.events.emit("override", Some(&self.file.name), None::<Generation>, message);
        Ok(self.take_overrides())
    }
}

/// The overrides after `order`.
fn ordered(known: &Override, file: &App, order: ScaleOrder) -> Result<Override, Refusal> {
    let mut new = known.clone();
    if order.auto {
        (new.min, new.max, new.paused) = (None, None, false);
    }
    let min = order.instances.or(order.min);
    let max = order.instances.or(order.max);
    if let Some(value) = min {
        new.min = Some(Set { value, file: file.scale.min });
    }
    if let Some(value) = max {
        new.max = Some(Set { value, file: file.scale.max });
    }
    new.paused = order.paused.unwrap_or(new.paused);
    let scale = new.of_file(file).scale;
    let fault = if scale.max == 0 {
        format!(
            "an app has at least 1 instance when it is asked for; `fastcontainer stop {}` ends those that run",
            file.name
        )
    } else if scale.min > scale.max {
        format!("{} instances are more than the {} that are allowed; give --max, too", scale.min, scale.max)
    } else if scale.max > 1 && file.volumes.iter().any(|volume| volume.exclusive) {
        "an exclusive volume is for one instance at a time".to_owned()
    } else if max.is_some() && scale.max > MOST {
        format!("{} instances are more than {MOST}", scale.max)
    } else {
        return Ok(new);
    };
    Err(Refusal::new(RefusalCode::BadRequest, fault))
}
