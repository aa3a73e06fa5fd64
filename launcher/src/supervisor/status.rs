//! What `ps` shows of an app.

use std::time::Duration;

use cmdb::{App, AppRecord};
use launcher_client::wire::Status;
use tokio::time::Instant;

use super::{Running, Supervisor};
use crate::clock::unix_ms;

impl Supervisor {
    /// A line for each instance, or one that says that there is none.
    pub(super) fn status(&self) -> Vec<Status> {
        if self.running.is_empty() {
            let record = self.host.store.get(&self.app.name).map(|(_, record)| record);
            let decision = self.decision.clone();
            return vec![Status { decision, leak: self.suspicion(), ..absent(&self.app, record.as_deref()) }];
        }
        self.running.iter().map(|(generation, running)| self.line(*generation, running)).collect()
    }

    fn line(&self, generation: cmdb::Generation, running: &Running) -> Status {
        let group = running.group.as_deref();
        let memory = group.and_then(|g| g.memory().ok());
        let mut status = absent(&self.app, None);
        status.generation = Some(generation);
        status.state = running.state().as_str().to_owned();
        status.reason = [running.waits.as_str(), running.why_ending()].concat();
        status.pid = running.pid;
        status.port = running.live().map(|(live, _)| live.port);
        status.age_ms = Some(ms(running.age()));
        status.in_flight = running.in_flight();
        status.idle_ms =
            Some(if status.in_flight > 0 { 0 } else { ms(Instant::now() - running.last_active) });
        status.requests = running.requests;
        status.window = running
            .recent_reports()
            .map(|(_, activity)| activity.window)
            .filter(|window| window.count > 0)
            .max_by_key(|window| window.count);
        let cpu = group.and_then(|g| g.cpu_stat().ok());
        status.cpu_us = cpu.map(|s| s.usage_us);
        status.throttled = cpu.and_then(|s| share(s.nr_throttled, s.nr_periods));
        status.cpu_limit = self.quota().filter(|_| running.quota_applied);
        status.memory_bytes = memory.map(|m| m.current);
        status.reclaimed = running.is_reclaimed();
        status.swap_bytes = group.and_then(crate::cgroup::Group::swap);
        status.memory_limit = memory.and_then(|m| m.limit);
        status.pids = group.and_then(|g| g.pids_current().ok());
        status.image.clone_from(&running.image);
        status.decision.clone_from(&self.decision);
        let current = self.host.images.current(&self.app);
        status.image_is_old = !running.image.is_empty() && current.is_some_and(|id| id != running.image);
        status.leak = self.suspicion();
        status
    }
}

/// The line of an app without an instance.
pub(crate) fn absent(app: &App, record: Option<&AppRecord>) -> Status {
    let waits = record.filter(|r| r.backoff_until_ms > unix_ms());
    Status {
        app: app.name.clone(),
        server_names: app.server_names.iter().map(ToString::to_string).collect(),
        node: String::new(),
        generation: None,
        state: if waits.is_some() { Status::BACKING_OFF } else { Status::ABSENT }.to_owned(),
        reason: record.map_or(String::new(), |r| r.last_failure.clone()),
        pid: None,
        port: None,
        age_ms: None,
        idle_ms: None,
        in_flight: 0,
        requests: 0,
        window: None,
        cpu_us: None,
        cpu_limit: None,
        throttled: None,
        memory_bytes: None,
        memory_limit: None,
        swap_bytes: None,
        reclaimed: false,
        pids: None,
        image: app.container.image.clone(),
        overrides: Vec::new(),
        decision: None,
        image_is_old: false,
        leak: None,
    }
}

/// Per mille.
fn share(part: u64, whole: u64) -> Option<u32> {
    u32::try_from(part.saturating_mul(1_000).checked_div(whole)?).ok()
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
