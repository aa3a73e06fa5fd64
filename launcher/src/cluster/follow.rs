//! What the CMDB tells: apps that have come, changed or gone, instances that are another host's doing, hosts that come and go.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use cmdb::{App, AppName, AppRecord, Change, Transition, compute::Nodes, placement};
use tokio::time::sleep;

use crate::{host::Host, overrides::Override, supervisor::Message};

/// Rest before a watch that was cut begins again.
const AGAIN: Duration = Duration::from_millis(50);

struct Follower {
    host: Arc<Host>,
    specs: HashMap<AppName, Arc<App>>,
    /// While a watch brings what is there: the apps that it has brought so far.
    seen: Option<HashSet<AppName>>,
    /// What was there when this launcher began is no news.
    begun: bool,
    nodes: Nodes,
}

/// Follows for the daemon's life.
pub(crate) async fn follow(host: Arc<Host>) {
    let mut follower =
        Follower { host, specs: HashMap::new(), seen: None, begun: false, nodes: Nodes::default() };
    loop {
        follower.watch().await;
        sleep(AGAIN).await;
    }
}

impl Follower {
    async fn watch(&mut self) {
        let mut changes = match self.host.store.watch().await {
            Ok(changes) => changes,
            Err(error) => return tracing::warn!(%error, "the CMDB cannot be watched"),
        };
        self.seen = Some(HashSet::new());
        while let Some(change) = changes.recv().await {
            self.take(change);
        }
    }

    fn take(&mut self, change: Change) {
        match change {
            Change::Put { app, record } => {
                if let Some(seen) = &mut self.seen {
                    seen.insert(app.name.clone());
                }
                let known = self.specs.get(&app.name);
                if known.is_none_or(|known| !Arc::ptr_eq(known, &app) && **known != *app) {
                    self.specs.insert(app.name.clone(), Arc::clone(&app));
                    self.configured(&app, &record);
                }
                if self.host.several && self.concerns(&app, &record) {
                    self.look(&app.name);
                }
            }
            Change::Removed(app) => self.removed(&app),
            Change::Nodes(nodes) => self.nodes(nodes),
            Change::Synced => {
                let seen = self.seen.take().unwrap_or_default();
                let gone: Vec<AppName> =
                    self.specs.keys().filter(|app| !seen.contains(*app)).cloned().collect();
                gone.iter().for_each(|app| self.removed(app));
                self.begun = true;
            }
        }
    }

    /// An app is new, or its configuration is.
    fn configured(&mut self, app: &Arc<App>, record: &AppRecord) {
        let (host, name) = (&self.host, &app.name);
        if !self.begun {
            // What was adopted may have begun with what this launcher remembered, and another host has changed it since.
            if let Some(supervisor) = host.running_supervisor(name) {
                let _ = supervisor.send(Message::Spec(Arc::clone(app)));
            }
            return;
        }
        // Only a file that is in force ends what the operator has set.
        for key in tokio::task::block_in_place(|| host.overrides.settle(app)) {
            let message =
                format!("the vhost file of {name} has changed {key}: what the operator had set there ends");
            host.events.emit("override", Some(name), None, message);
        }
        host.events.emit(
            "config-applied",
            Some(name),
            None,
            format!("the configuration of {name} is in force"),
        );
        tokio::spawn({
            let (host, app) = (Arc::clone(host), Arc::clone(app));
            async move { host.outbound.configured(&app).await }
        });
        host.images.nudge();
        match host.running_supervisor(name) {
            Some(supervisor) => drop(supervisor.send(Message::Spec(Arc::clone(app)))),
            None if host.keeps_instances(app) => drop(host.supervisor(name)),
            // Nobody supervises it, so nobody else forgets its back-off.
            None if record.backoff_until_ms > 0 || record.failures > 0 => {
                let (host, name) = (Arc::clone(host), name.clone());
                tokio::spawn(async move { drop(host.store.apply(&name, Transition::ResetBackoff).await) });
            }
            None => {}
        }
    }

    fn removed(&mut self, app: &AppName) {
        if self.specs.remove(app).is_none() {
            return;
        }
        if let Some(supervisor) = self.host.running_supervisor(app) {
            // Told before, where it was removed by way of this launcher: once more does no harm.
            let _ = supervisor.send(Message::Removed);
        }
        let forgotten = tokio::task::block_in_place(|| {
            self.host.overrides.update(app, |known| *known = Override::default())
        });
        if let Err(error) = forgotten {
            tracing::warn!(%app, %error, "what the operator had set for a removed app is still on record");
        }
        self.host.images.nudge();
        self.host.events.emit("config-removed", Some(app), None, format!("{app} is not configured any more"));
    }

    /// Whether this host has something to do with the app's instances.
    fn concerns(&self, app: &App, record: &AppRecord) -> bool {
        let host = &self.host;
        record.instances.values().any(|instance| instance.node == host.node)
            || host.running_supervisor(&app.name).is_some()
            || (host.keeps_instances(app) && host.is_home(&app.name))
    }

    /// The app's supervisor is to look at the record: somebody else may have changed it.
    fn look(&self, app: &AppName) {
        if let Ok(supervisor) = self.host.supervisor(app) {
            let _ = supervisor.send(Message::Look);
        }
    }

    fn nodes(&mut self, nodes: Nodes) {
        let before = std::mem::replace(&mut self.nodes, nodes);
        self.host.are_lost(&cmdb::compute::lost(&self.nodes));
        let mut turned = before.len() != self.nodes.len();
        for node in self.nodes.iter() {
            let known = before.iter().find(|known| known.name() == node.name());
            turned |= known.is_none_or(|known| known.takes() != node.takes() || known.alive != node.alive);
            if let Some(words) = news(known, node).filter(|_| node.name() != self.host.node) {
                self.host.events.emit(words.0, None, None, words.1);
            }
            if node.name() == self.host.node && known.is_some_and(|known| known.draining != node.draining) {
                let (kind, what) = match node.draining {
                    true => ("node-draining", "is to be emptied: its apps move to other hosts"),
                    false => ("node-undrained", "takes apps again"),
                };
                self.host.events.emit(kind, None, None, format!("this host ({}) {what}", node.name()));
            }
        }
        if !turned {
            return;
        }
        // Whose home is where may have changed for every app, and so may have what a host has to do.
        for (app, record) in self.host.store.list() {
            if self.concerns(&app, &record) {
                self.look(&app.name);
            }
        }
    }
}

/// What is to be told of another host.
fn news(before: Option<&cmdb::compute::Node>, node: &cmdb::compute::Node) -> Option<(&'static str, String)> {
    let name = node.name();
    match (before, node.alive) {
        (None, true) => Some(("node-came", format!("{name} is there"))),
        (Some(before), false) if before.alive => Some((
            "node-lost",
            format!("{name} gives no sign of life: its apps are started elsewhere when they are needed"),
        )),
        (Some(before), true) if !before.alive => Some(("node-back", format!("{name} is there again"))),
        (Some(before), true) if before.draining != node.draining => {
            let what = if node.draining { "is being emptied" } else { "takes apps again" };
            Some(("node-draining", format!("{name} {what}")))
        }
        _ => None,
    }
}

impl Host {
    /// Whether this host is responsible for the app's `scale.min`.
    pub fn is_home(&self, app: &AppName) -> bool {
        let nodes = self.store.nodes();
        match placement::home(app, &nodes) {
            Some(home) => home.name() == self.node,
            // Nobody is known: whoever has it keeps it.
            None => !nodes.iter().any(|node| node.name() == self.node && node.draining),
        }
    }
}
