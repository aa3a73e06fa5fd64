//! The app's instances on other hosts, as far as they matter here: who has them, how many there are in all, and what others
//! have decided about those of this host.

use std::{cmp::Reverse, sync::Arc, time::Duration};

use cmdb::{AppRecord, Generation, Instance, Outcome, State, Transition, compute, placement};
use launcher_client::wire::{Refusal, RefusalCode};

use tokio::sync::oneshot;

use super::{Awake, Stage, Supervisor, running::Running};
use crate::{host::UNREACHED_FOR, instance::name};

/// An asker's word that a host cannot be reached holds for so long.
const UNREACHED: Duration = Duration::from_secs(5);
/// What others have given up ends within a second: time from SIGTERM to SIGKILL.
const FENCED_GRACE: Duration = Duration::from_millis(500);

impl Supervisor {
    /// The app's record as it is known now.
    pub(super) fn record(&self) -> Arc<AppRecord> {
        self.host.store.get(&self.app.name).map(|(_, record)| record).unwrap_or_default()
    }

    /// The refusal that names the host which has that instance; `None`: it is this host's.
    pub(super) fn elsewhere(&self, record: &AppRecord, generation: Generation) -> Option<Refusal> {
        let instance = record.instances.get(&generation).filter(|i| i.node != self.host.node)?;
        Some(self.is_on(&instance.node, instance.state))
    }

    fn is_on(&self, node: &str, state: State) -> Refusal {
        let doing = if state == State::Starting { "starts" } else { "runs" };
        let message = format!("{} {doing} on {node}", self.app.name);
        Refusal { elsewhere: Some(node.to_owned()), ..Refusal::new(RefusalCode::Elsewhere, message) }
    }

    /// Who has asked cannot reach the host that has the app: then it is started here, too, beside what runs there, though that
    /// is one too many; nobody is given up for it. Not so with a volume that only one may have.
    pub(super) async fn refuse_or_stand_in(
        &mut self,
        refusal: Refusal,
        reply: oneshot::Sender<Result<Awake, Refusal>>,
    ) {
        let there = refusal.elsewhere.clone().unwrap_or_default();
        if self.is_exclusive() || !self.host.could_not_reach(&there, UNREACHED) {
            return drop(reply.send(Err(refusal)));
        }
        let starts = self.running.values().any(|running| matches!(running.stage, Stage::Starting));
        let why = format!("{there}, which has it, cannot be reached");
        let here = self.host.node.clone();
        if starts || matches!(self.begin_on(here, true, &why).await, Ok(Outcome::Own(_))) {
            return self.wakers.push(reply);
        }
        drop(reply.send(Err(refusal)));
    }

    /// The app's instances on other hosts that are alive.
    fn others<'a>(&self, record: &'a AppRecord) -> Vec<&'a Instance> {
        if !self.host.several {
            return Vec::new();
        }
        let lost = self.lost();
        let others = record.instances.values().filter(|i| i.node != self.host.node);
        others.filter(|instance| !lost.contains(&instance.node)).collect()
    }

    /// Instances that serve or are about to, on all hosts.
    pub(super) fn serving_everywhere(&self) -> u32 {
        self.serving().saturating_add(self.serving_elsewhere())
    }

    /// The same on other hosts.
    pub(super) fn serving_elsewhere(&self) -> u32 {
        self.count_elsewhere(|state| state != State::Draining)
    }

    /// Instances of other hosts that are about to serve.
    pub(super) fn starting_elsewhere(&self) -> u32 {
        self.count_elsewhere(|state| state == State::Starting)
    }

    /// Instances of other hosts that are ready.
    pub(super) fn ready_elsewhere(&self) -> u32 {
        self.count_elsewhere(|state| matches!(state, State::Ready | State::Frozen))
    }

    fn count_elsewhere(&self, counts: impl Fn(State) -> bool) -> u32 {
        if !self.host.several {
            return 0;
        }
        let record = self.record();
        let others = self.others(&record).into_iter().filter(|instance| counts(instance.state)).count();
        u32::try_from(others).unwrap_or(u32::MAX)
    }

    /// Whether this host has no memory for one more.
    pub(super) fn lacks_room(&self) -> bool {
        self.host.several && self.host.governor.lacks_memory(&self.app.name, self.app.resources.memory.0)
    }

    /// Where a start that a request waits for is to be: here, unless this host is short of memory or to be emptied, and another
    /// one is not.
    pub(super) fn place(&self) -> String {
        let here = || self.host.node.clone();
        if !self.host.several || !(self.lacks_room() || self.is_draining()) {
            return here();
        }
        self.best_elsewhere().unwrap_or_else(here)
    }

    /// Whether this host is to be emptied.
    pub(super) fn is_draining(&self) -> bool {
        self.host.several
            && compute::find(&self.host.store.nodes(), &self.host.node).is_some_and(|node| node.draining)
    }

    /// Whether instances are to run here though nobody asks: not where another host is responsible for them.
    pub(super) fn is_home(&self) -> bool {
        !self.host.several || self.host.is_home(&self.app.name)
    }

    /// Where one more instance is to go when the app needs one and this host is as good as any: with fewest of it.
    pub(super) fn best_for_more(&self) -> String {
        let nodes = self.host.store.nodes();
        let best = placement::for_more(&self.app, &self.record(), &nodes);
        best.first().map_or_else(|| self.host.node.clone(), |node| node.name().to_owned())
    }

    /// The best host for one more instance that is not this one.
    pub(super) fn best_elsewhere(&self) -> Option<String> {
        if !self.host.several {
            return None;
        }
        let nodes = self.host.store.nodes();
        let order = placement::for_more(&self.app, &self.record(), &nodes);
        order.into_iter().map(compute::Node::name).find(|name| *name != self.host.node).map(ToOwned::to_owned)
    }

    /// One more instance on `node`; here it is launched at once, elsewhere by that host's launcher, which sees it in the CMDB.
    pub(super) async fn begin_on(
        &mut self,
        node: String,
        replacing: bool,
        why: &str,
    ) -> Result<Outcome, Refusal> {
        let here = node == self.host.node;
        let transition = Transition::Add {
            node: node.clone(),
            start_timeout_ms: self.start_timeout_ms(),
            max: self.app.scale.max,
            replacing,
            lost: self.lost(),
        };
        let outcome = self.apply(transition).await?;
        if let Outcome::Own(generation) = outcome {
            if here {
                self.launch(generation, None, why);
            } else {
                let id = name(&self.app.name, generation);
                self.emit("placed", generation, format!("{id} is to be started on {node}: {why}"));
            }
        }
        Ok(outcome)
    }

    /// Somebody else may have changed the record: what it says of this host's instances is carried out.
    pub(super) async fn look(&mut self) {
        if self.removed || self.ending {
            return;
        }
        let record = self.record();
        for generation in self.generations() {
            let Some(running) = self.running.get(&generation) else { continue };
            let known = record.instances.get(&generation);
            if !record.may_be_of(&self.host.node, generation) {
                self.end_fenced(generation);
            } else if known.is_some_and(|known| known.state == State::Draining) && !running.is_ending() {
                self.drain(generation, "stopped by way of another host").await;
            } else if !record.instances.contains_key(&generation) && !running.is_ending() {
                self.tell_again(generation).await;
            }
        }
        self.give_up_lost(&record).await;
        let unknown = record.instances.values().filter(|i| i.node == self.host.node);
        let unknown: Vec<Instance> =
            unknown.filter(|i| !self.running.contains_key(&i.generation)).cloned().collect();
        for instance in unknown {
            self.take_up(&instance).await;
        }
    }

    /// What hosts had that are lost is given up where something serves in its place: should they come back, they end it.
    async fn give_up_lost(&self, record: &AppRecord) {
        let lost = self.lost();
        let has_lost = record.instances.values().any(|i| lost.contains(&i.node));
        if has_lost && self.running.values().any(Running::is_ready) {
            drop(self.apply(Transition::GiveUp { lost }).await);
        }
    }

    /// An instance of this host that the record has and this host has not: one that another host has asked for is started;
    /// any other is of an earlier life.
    pub(super) async fn take_up(&mut self, instance: &Instance) {
        let generation = instance.generation;
        let asked_for = instance.state == State::Starting && instance.since_ms >= self.host.begun_unix_ms;
        if asked_for && self.is_taken(&self.record(), Some(generation)) {
            // Looked at again when the record changes.
            return;
        }
        if asked_for {
            return self.launch(generation, None, "another host has no room for it, or is to be emptied");
        }
        drop(self.apply(Transition::Gone { generation }).await);
    }

    /// This host ends: others shall know before its instances have ended.
    pub(super) async fn give_up_all(&mut self) {
        if !self.host.several {
            return;
        }
        for generation in self.generations() {
            if self.running.get(&generation).is_some_and(|running| !running.is_ending()) {
                drop(self.apply(Transition::Drain { generation }).await);
            }
        }
    }

    /// This host was thought dead, and others have taken its place.
    fn end_fenced(&mut self, generation: Generation) {
        let Some(running) = self.running.get_mut(&generation) else { return };
        if matches!(running.stage, Stage::Stopping { .. }) {
            return;
        }
        let reason = "this host was thought dead, and others have taken over";
        running.terminate(reason, FENCED_GRACE);
        self.emit("fenced", generation, format!("{} is ended: {reason}", name(&self.app.name, generation)));
    }

    /// The CMDB has lost an instance that serves.
    async fn tell_again(&mut self, generation: Generation) {
        let Some((live, _)) = self.running.get(&generation).and_then(Running::live) else { return };
        let transition = Transition::Adopt { generation, node: self.host.node.clone(), port: live.port };
        if let Ok(Outcome::Done) = self.apply(transition).await {
            let id = name(&self.app.name, generation);
            self.emit("told-again", generation, format!("{id} was missing in the CMDB, and is there again"));
        }
    }

    /// Those of this host that are too many for `scale.max`, over all hosts: the youngest, and those that do not serve yet
    /// before others. What leaves a host that is being emptied does not count.
    pub(super) fn surplus(&self) -> Vec<Generation> {
        // A replacement that starts may be one too many until the old one ends.
        let counts = |running: &Running| {
            let replacement_starts = running.replaces.is_some() && matches!(running.stage, Stage::Starting);
            !running.is_ending() && !replacement_starts
        };
        if !self.host.several && self.serving() <= self.app.scale.max {
            return Vec::new();
        }
        let nodes = self.host.store.nodes();
        let drains = |node: &str| compute::find(&nodes, node).is_some_and(|node| node.draining);
        if drains(&self.host.node) {
            return Vec::new();
        }
        let mut all: Vec<(bool, Reverse<Generation>, bool)> = self
            .running
            .iter()
            .filter(|(_, running)| counts(running))
            .map(|(generation, running)| (running.is_ready(), Reverse(*generation), true))
            .collect();
        let record = self.record();
        let others = self.others(&record).into_iter();
        // Whether one that starts elsewhere is a replacement is that host's to know.
        let others = others.filter(|i| matches!(i.state, State::Ready | State::Frozen) && !drains(&i.node));
        // What stands in for those that cannot be reached is not one too many.
        let others = others.filter(|i| !self.host.could_not_reach(&i.node, UNREACHED_FOR));
        all.extend(others.map(|instance| (true, Reverse(instance.generation), false)));
        let most = usize::try_from(self.app.scale.max).unwrap_or(usize::MAX);
        let surplus = all.len().saturating_sub(most);
        all.sort_unstable();
        let mine = all.into_iter().take(surplus).filter(|(_, _, here)| *here);
        mine.map(|(_, Reverse(generation), _)| generation).collect()
    }
}
