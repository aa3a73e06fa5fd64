//! Properties of the one state machine, whatever is asked of it in whatever order, by hosts that can and cannot reach the store.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking; its name says what it is about"
)]

use std::collections::BTreeSet;

use cmdb::{AppRecord, Generation, Outcome, State, Transition};
use proptest::prelude::*;

const HOSTS: [&str; 3] = ["one", "two", "three"];

fn any_host() -> impl Strategy<Value = String> {
    prop::sample::select(&HOSTS[..]).prop_map(str::to_owned)
}

/// Seldom anybody.
fn any_lost() -> impl Strategy<Value = Vec<String>> {
    prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(any_host(), 1..3)]
}

fn any_transition() -> impl Strategy<Value = Transition> {
    let generation = (0u64..12).prop_map(|n| Generation(1_000 + n));
    prop_oneof![
        2 => (any_host(), any_lost()).prop_map(|(node, lost)| Transition::Wake {
            node,
            start_timeout_ms: 500,
            lost
        }),
        2 => (any_host(), 1u32..4, any::<bool>(), any_lost()).prop_map(|(node, max, replacing, lost)| {
            Transition::Add { node, start_timeout_ms: 500, max, replacing, lost }
        }),
        2 => (generation.clone(), any_host())
            .prop_map(|(generation, node)| Transition::Adopt { generation, node, port: 80 }),
        1 => generation.clone().prop_map(|generation| Transition::Ready { generation, port: 80 }),
        1 => generation
            .clone()
            .prop_map(|generation| Transition::Failed { generation, reason: "exited with status 3".into() }),
        1 => generation.clone().prop_map(|generation| Transition::Drain { generation }),
        1 => generation.clone().prop_map(|generation| Transition::Freeze { generation }),
        1 => generation.clone().prop_map(|generation| Transition::Thaw { generation }),
        1 => generation.prop_map(|generation| Transition::Gone { generation }),
        1 => any_lost().prop_map(|lost| Transition::GiveUp { lost }),
        1 => Just(Transition::ResetBackoff),
    ]
}

fn lost_of(transition: &Transition) -> &[String] {
    match transition {
        Transition::Wake { lost, .. } | Transition::Add { lost, .. } | Transition::GiveUp { lost } => lost,
        _ => &[],
    }
}

/// What holds of every record.
fn check_record(record: &AppRecord, before: &AppRecord) -> Result<(), TestCaseError> {
    prop_assert!(record.generation >= before.generation);
    for (generation, instance) in &record.instances {
        prop_assert_eq!(*generation, instance.generation);
        prop_assert!(*generation <= record.generation);
        prop_assert!(!record.is_fenced(&instance.node, *generation), "given up, and there: {:?}", record);
    }
    for (node, fence) in &before.fences {
        prop_assert!(record.fences.get(node) >= Some(fence), "a fence is never lowered");
    }
    Ok(())
}

proptest! {
    #[test]
    fn generations_rise_and_what_is_refused_changes_nothing(
        steps in prop::collection::vec((any_transition(), 0u64..300), 1..60)
    ) {
        let mut record = AppRecord::default();
        let mut now = 1_000;
        for (transition, pause) in steps {
            now += pause;
            let before = record.clone();
            let outcome = record.apply(&transition, now);
            let lost = lost_of(&transition);
            let given_up: Vec<_> = before.instances.values().filter(|i| lost.contains(&i.node)).collect();
            let stay = || before.instances.values().filter(|i| !lost.contains(&i.node));
            match outcome {
                Outcome::Own(generation) => {
                    prop_assert!(generation > before.generation);
                    prop_assert!(!before.instances.contains_key(&generation));
                    match transition {
                        Transition::Add { max, replacing, .. } => {
                            let serving = stay().filter(|i| i.state != State::Draining).count();
                            prop_assert!(serving < max as usize + usize::from(replacing));
                        }
                        // No second owner beside one that serves or whose start is under way.
                        _ => {
                            let owned = stay().any(|i| match i.state {
                                State::Ready | State::Frozen => true,
                                State::Starting => i.deadline_ms > now,
                                State::Draining => false,
                            });
                            prop_assert!(!owned);
                        }
                    }
                }
                Outcome::Done => {}
                _ if given_up.is_empty() => prop_assert_eq!(&record, &before),
                _ => {}
            }
            let changed = matches!(outcome, Outcome::Own(_) | Outcome::Done) || !given_up.is_empty();
            prop_assert_eq!(record.rev, before.rev + u64::from(changed));
            for instance in given_up {
                prop_assert!(record.is_fenced(&instance.node, instance.generation));
            }
            check_record(&record, &before)?;
        }
    }

    #[test]
    fn what_one_host_tells_changes_nobody_elses_instances(
        common in prop::collection::vec(any_transition(), 0..12),
        mine in prop::collection::vec(any_transition(), 0..12),
        theirs in prop::collection::vec(any_transition(), 0..12),
        node in any_host(),
    ) {
        let apply = |mut record: AppRecord, steps: &[Transition]| {
            for (n, step) in steps.iter().enumerate() {
                record.apply(step, 1_000 + n as u64);
            }
            record
        };
        let common = apply(AppRecord::default(), &common);
        let (mine, theirs) = (apply(common.clone(), &mine), apply(common, &theirs));

        let mut merged = theirs.clone();
        merged.take_over(&mine, &node);

        check_record(&merged, &theirs)?;
        check_record(&merged, &AppRecord { instances: theirs.instances.clone(), ..mine.clone() })?;
        prop_assert!(merged.rev > mine.rev && merged.rev > theirs.rev);
        for (generation, instance) in &merged.instances {
            let source = if instance.node == node { &mine } else { &theirs };
            prop_assert_eq!(source.instances.get(generation), Some(instance));
        }
        let disowned: BTreeSet<_> = merged.disowned(&mine, &node).collect();
        for instance in mine.instances.values().filter(|i| i.node == node) {
            let here = merged.instances.get(&instance.generation).is_some_and(|i| i.node == node);
            let ended = merged.is_fenced(&node, instance.generation) || disowned.contains(&instance.generation);
            prop_assert!(here != ended, "there, or to be ended for a reason");
        }
        let mut again = merged.clone();
        again.take_over(&mine, &node);
        prop_assert_eq!(&again.instances, &merged.instances, "told twice is told once");
    }
}

/// What happens in a world of three hosts and one store.
#[derive(Clone, Debug)]
enum Event {
    /// A visitor at that host finds nothing ready.
    Wake(usize),
    /// That host cannot reach the store from now on.
    Cut(usize),
    /// It can again: it tells what it runs, and learns what it has to end.
    Heal(usize),
    /// Its instances end.
    End(usize),
    /// Its starts succeed.
    Ready(usize),
    /// The store forgets everything.
    Flush,
    /// Time passes, ms.
    Pass(u64),
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0usize..3).prop_map(Event::Wake),
        2 => (0usize..3).prop_map(Event::Cut),
        2 => (0usize..3).prop_map(Event::Heal),
        1 => (0usize..3).prop_map(Event::End),
        2 => (0usize..3).prop_map(Event::Ready),
        1 => Just(Event::Flush),
        // Often none: two hosts that are apart give out one generation.
        2 => prop_oneof![Just(1u64), 1u64..3_000].prop_map(Event::Pass),
    ]
}

/// A host, as its launcher sees it.
#[derive(Clone, Debug, Default)]
struct Host {
    apart: bool,
    /// What it knows of the app.
    record: AppRecord,
    /// Instances that run there.
    runs: BTreeSet<Generation>,
}

#[derive(Debug)]
struct World {
    store: AppRecord,
    hosts: [Host; 3],
    now: u64,
}

impl World {
    fn new() -> Self {
        Self { store: AppRecord::default(), hosts: Default::default(), now: 1_000 }
    }

    fn lost(&self) -> Vec<String> {
        let apart = HOSTS.iter().zip(&self.hosts).filter(|(_, host)| host.apart);
        apart.map(|(name, _)| (*name).to_owned()).collect()
    }

    /// A transition by that host, in the store or on its own.
    fn apply(&mut self, host: usize, transition: &Transition) -> Outcome {
        let apart = self.hosts[host].apart;
        let record = if apart { &mut self.hosts[host].record } else { &mut self.store };
        let outcome = record.apply(transition, self.now);
        if !apart {
            self.spread();
        }
        outcome
    }

    /// Everybody in reach sees the store, and ends what it has to.
    fn spread(&mut self) {
        for (host, name) in self.hosts.iter_mut().zip(HOSTS).filter(|(host, _)| !host.apart) {
            host.record = self.store.clone();
            let stays = |g: &Generation| host.record.instances.get(g).is_some_and(|i| i.node == name);
            host.runs.retain(stays);
        }
    }

    /// Instances that run on hosts which can reach the store.
    fn in_reach(&self) -> usize {
        self.hosts.iter().filter(|host| !host.apart).map(|host| host.runs.len()).sum()
    }

    fn happen(&mut self, event: &Event) -> Result<(), TestCaseError> {
        match event {
            Event::Wake(host) => {
                // Whoever cannot reach the store gives nobody up.
                let lost = if self.hosts[*host].apart { Vec::new() } else { self.lost() };
                let wake = Transition::Wake { node: HOSTS[*host].into(), start_timeout_ms: 1_000_000, lost };
                let before = self.in_reach();
                if let Outcome::Own(generation) = self.apply(*host, &wake) {
                    let apart = self.hosts[*host].apart;
                    prop_assert!(apart || before == 0, "{} run, and one more starts: {:?}", before, self);
                    self.hosts[*host].runs.insert(generation);
                }
            }
            Event::Cut(host) => self.hosts[*host].apart = true,
            Event::Heal(host) => {
                if std::mem::take(&mut self.hosts[*host].apart) {
                    self.tell(*host);
                }
                self.spread();
            }
            Event::End(host) => {
                for generation in std::mem::take(&mut self.hosts[*host].runs) {
                    self.apply(*host, &Transition::Gone { generation });
                }
            }
            Event::Ready(host) => {
                for generation in self.hosts[*host].runs.clone() {
                    self.apply(*host, &Transition::Ready { generation, port: 80 });
                }
            }
            Event::Flush => {
                self.store = AppRecord::default();
                let in_reach: Vec<_> = (0..3).filter(|host| !self.hosts[*host].apart).collect();
                in_reach.into_iter().for_each(|host| self.tell(host));
                self.spread();
            }
            Event::Pass(ms) => self.now += ms,
        }
        Ok(())
    }

    fn tell(&mut self, host: usize) {
        self.store.take_over(&self.hosts[host].record, HOSTS[host]);
    }

    fn check(&self) -> Result<(), TestCaseError> {
        for (name, host) in HOSTS.iter().zip(&self.hosts).filter(|(_, host)| !host.apart) {
            let known: BTreeSet<_> =
                self.store.instances.values().filter(|i| i.node == *name).map(|i| i.generation).collect();
            prop_assert_eq!(&known, &host.runs, "what {} runs is what everybody knows", name);
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn hosts_in_reach_of_the_store_never_own_two_and_those_that_come_back_converge(
        events in prop::collection::vec(any_event(), 1..60)
    ) {
        let mut world = World::new();
        for event in &events {
            world.happen(event)?;
            world.check()?;
        }
        // At last all are in reach again: one view, and every generation is one host's.
        for host in 0..3 {
            world.happen(&Event::Heal(host))?;
        }
        world.check()?;
        let runs: Vec<_> = world.hosts.iter().flat_map(|host| &host.runs).collect();
        let once: BTreeSet<_> = runs.iter().collect();
        prop_assert_eq!(once.len(), runs.len(), "no generation has two owners");
    }
}

#[test]
fn of_two_hosts_that_gave_out_one_generation_apart_the_first_to_tell_keeps_it() {
    let wake = |node: &str| Transition::Wake { node: node.into(), start_timeout_ms: 500, lost: Vec::new() };
    let (mut one, mut two) = (AppRecord::default(), AppRecord::default());
    let (Outcome::Own(first), Outcome::Own(second)) =
        (one.apply(&wake("one"), 5_000), two.apply(&wake("two"), 5_000))
    else {
        panic!("both start")
    };
    assert_eq!(first, second);
    let mut store = AppRecord::default();

    store.take_over(&one, "one");
    store.take_over(&two, "two");

    assert_eq!(store.instances.values().map(|i| i.node.as_str()).collect::<Vec<_>>(), ["one"]);
    assert_eq!(store.disowned(&two, "two").collect::<Vec<_>>(), [second]);
    let adopt = Transition::Adopt { generation: second, node: "two".into(), port: 80 };
    assert_eq!(store.apply(&adopt, 5_001), Outcome::Fenced);
}
