//! On which host an app is to run next: everybody who asks with the same knowledge gets the same answer, without talking.

use std::cmp::Reverse;

use crate::{
    app::{App, AppName},
    compute::Node,
    fingerprint::fnv1a,
    instance::State,
    transition::AppRecord,
};

/// Loads within one such part of a host's whole are taken for the same, so that heartbeats that come a moment apart do not
/// make two askers differ.
const PARTS: u64 = 8;

/// The hosts that may be asked to wake the app, best first: those that have an instance to be woken or joined, then by room.
#[must_use]
pub fn for_wake<'a>(app: &App, record: &AppRecord, nodes: &'a [Node]) -> Vec<&'a Node> {
    let mut order: Vec<&Node> = nodes.iter().filter(|node| node.alive).collect();
    order.retain(|node| node.takes() || has_instance(record, node.name()));
    order.sort_by_cached_key(|node| (!has_instance(record, node.name()), rank(app, record, node)));
    order
}

/// The hosts that may take one more instance of the app, best first: those with fewest of it, then by room.
#[must_use]
pub fn for_more<'a>(app: &App, record: &AppRecord, nodes: &'a [Node]) -> Vec<&'a Node> {
    let mut order: Vec<&Node> = nodes.iter().filter(|node| node.takes()).collect();
    order.sort_by_cached_key(|node| rank(app, record, node));
    order
}

/// The host that is responsible for the app's `scale.min`: one of those that take something, the same for all askers.
#[must_use]
pub fn home<'a>(app: &AppName, nodes: &'a [Node]) -> Option<&'a Node> {
    nodes.iter().filter(|node| node.takes()).max_by_key(|node| score(app, node.name()))
}

/// Smaller is better: instances of this app there, room that it lacks, room that it has, and rendezvous hashing
/// (Thaler and Ravishankar, 1998) between equals.
fn rank(app: &App, record: &AppRecord, node: &Node) -> (usize, bool, Reverse<u64>, Reverse<u64>) {
    let of_app =
        record.instances.values().filter(|i| i.node == node.name() && i.state != State::Draining).count();
    let (cpu, memory) = parts(node);
    // In parts as well, for all askers must agree: two heartbeats lie on the same side of most apps' needs.
    let lacks = node.compute.memory / PARTS * memory < needed(app);
    (of_app, lacks, Reverse(cpu.min(memory)), Reverse(score(&app.name, node.name())))
}

/// Memory that a start should find free: a quarter of the limit, for few apps use all of theirs.
fn needed(app: &App) -> u64 {
    app.resources.memory.0 / 4
}

/// CPU and memory that it has left, in [`PARTS`] of the whole.
pub(crate) fn parts(node: &Node) -> (u64, u64) {
    let part =
        |free: u64, whole: u64| free.saturating_mul(PARTS).checked_div(whole).unwrap_or(PARTS).min(PARTS);
    let cpu = part(u64::from(node.load.free_cpu), u64::from(node.compute.cpu));
    (cpu, part(node.load.free_memory, node.compute.memory))
}

fn has_instance(record: &AppRecord, node: &str) -> bool {
    record.instances.values().any(|i| i.node == node && i.state != State::Draining)
}

fn score(app: &AppName, node: &str) -> u64 {
    let mut bytes = Vec::with_capacity(app.as_str().len() + node.len() + 1);
    bytes.extend_from_slice(app.as_str().as_bytes());
    bytes.push(0);
    bytes.extend_from_slice(node.as_bytes());
    // FNV's high bits hardly depend on the last bytes; a multiply and shift mixes them (splitmix64's finaliser).
    let mut mixed = fnv1a(&bytes);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        compute::{Compute, Load},
        instance::Instance,
        transition::{Outcome, Transition},
        vhost,
    };

    const GIB: u64 = 1 << 30;

    fn app(name: &str) -> App {
        let text = format!(
            "server-name = [\"{name}.example.com\"]\n[container]\nimage = \"dir:/srv/hello\"\ncommand = [\"/hello\"]\n\
             [resources]\nmemory = \"4GiB\"\n"
        );
        let path = std::path::PathBuf::from(format!("{name}.toml"));
        vhost::parse_file(&path, text.as_bytes(), std::path::Path::new("/etc")).unwrap()
    }

    fn node(name: &str) -> Node {
        Node {
            compute: Compute { name: name.into(), cpu: 8_000, memory: 16 * GIB, ..Compute::default() },
            load: Load { free_cpu: 8_000, free_memory: 16 * GIB, instances: 0 },
            alive: true,
            draining: false,
        }
    }

    fn nodes() -> Vec<Node> {
        (0..5).map(|n| node(&format!("host-{n}"))).collect()
    }

    fn names(order: &[&Node]) -> Vec<String> {
        order.iter().map(|node| node.name().to_owned()).collect()
    }

    fn instance(record: &mut AppRecord, node: &str, state: State) {
        let generation = crate::Generation(record.generation.0 + 1);
        record.generation = generation;
        let on = Instance { generation, state, node: node.into(), port: 80, since_ms: 0, deadline_ms: 0 };
        record.instances.insert(generation, on);
    }

    proptest! {
        #[test]
        fn all_askers_agree_whatever_order_they_learned_of_hosts_in(
            shuffled in Just(nodes()).prop_shuffle(),
            jitter in prop::collection::vec(0u64..1_000_000, 5),
        ) {
            let app = app("blog");
            let mut mine = nodes();
            mine.iter_mut().for_each(|node| node.load.free_memory = 10 * GIB);
            let mut theirs = shuffled;
            for (node, jitter) in theirs.iter_mut().zip(jitter) {
                // Heartbeats that were read a moment later.
                node.load.free_memory = 10 * GIB + jitter;
            }
            let record = AppRecord::default();
            prop_assert_eq!(names(&for_wake(&app, &record, &mine)), names(&for_wake(&app, &record, &theirs)));
            prop_assert_eq!(names(&for_more(&app, &record, &mine)), names(&for_more(&app, &record, &theirs)));
            prop_assert_eq!(home(&app.name, &mine).map(Node::name), home(&app.name, &theirs).map(Node::name));
        }
    }

    #[test]
    fn many_apps_are_spread_evenly_over_equal_hosts_and_few_move_when_one_goes() {
        let (all, record) = (nodes(), AppRecord::default());
        let four: Vec<Node> = all.iter().filter(|node| node.name() != "host-2").cloned().collect();
        let mut counts = BTreeMap::new();
        for n in 0..1_000 {
            let app = app(&format!("app-{n}"));
            let first = for_wake(&app, &record, &all)[0].name().to_owned();
            if first != "host-2" {
                assert_eq!(for_wake(&app, &record, &four)[0].name(), first, "it stays where it was");
            }
            assert_eq!(home(&app.name, &all).unwrap().name(), first);
            *counts.entry(first).or_insert(0) += 1;
        }
        assert!(counts.len() == 5 && counts.values().all(|count| (140..260).contains(count)), "{counts:?}");
    }

    #[test]
    fn one_app_grows_onto_hosts_that_have_least_of_it() {
        let (app, all, mut record) = (app("blog"), nodes(), AppRecord::default());
        for _ in 0..10 {
            let on = for_more(&app, &record, &all)[0].name().to_owned();
            instance(&mut record, &on, State::Ready);
        }
        for node in &all {
            let there = record.instances.values().filter(|i| i.node == node.name()).count();
            assert_eq!(there, 2, "on {}", node.name());
        }
    }

    #[test]
    fn a_wake_goes_where_the_app_is_and_more_of_it_where_it_is_not() {
        let (app, all, mut record) = (app("blog"), nodes(), AppRecord::default());
        let last = names(&for_wake(&app, &record, &all)).pop().unwrap();
        instance(&mut record, &last, State::Frozen);
        assert_eq!(for_wake(&app, &record, &all)[0].name(), last);
        assert_eq!(names(&for_more(&app, &record, &all)).pop().unwrap(), last);

        let mut ending = AppRecord::default();
        instance(&mut ending, &last, State::Draining);
        assert_ne!(for_wake(&app, &ending, &all)[0].name(), last, "what ends is not waited for");
    }

    #[test]
    fn hosts_with_more_room_come_first_and_those_that_lack_it_last() {
        let (app, mut all, record) = (app("blog"), nodes(), AppRecord::default());
        all[0].load.free_cpu = 800;
        all[1].load.free_memory = GIB / 2;
        all[2].load.free_cpu = 4_000;
        let order = names(&for_wake(&app, &record, &all));
        assert_eq!(order[2..], ["host-2", "host-0", "host-1"], "{order:?}");
    }

    #[test]
    fn nothing_new_goes_to_a_host_that_is_to_be_empty_or_is_dead() {
        let (app, mut all, mut record) = (app("blog"), nodes(), AppRecord::default());
        all[0].draining = true;
        all[1].alive = false;
        all[2].alive = false;
        all[3].draining = true;
        assert_eq!(names(&for_wake(&app, &record, &all)), ["host-4"]);
        assert_eq!(home(&app.name, &all).unwrap().name(), "host-4");

        instance(&mut record, "host-0", State::Ready);
        instance(&mut record, "host-1", State::Ready);
        let order = names(&for_wake(&app, &record, &all));
        assert_eq!(order, ["host-0", "host-4"], "what still serves there is used; what is dead is not");
        assert_eq!(names(&for_more(&app, &record, &all)), ["host-4"]);

        all[4].alive = false;
        assert!(for_more(&app, &record, &all).is_empty() && home(&app.name, &all).is_none());
    }

    #[test]
    fn a_host_that_says_nothing_of_itself_divides_by_nothing() {
        let (app, mut record) = (app("blog"), AppRecord::default());
        let bare = [Node { alive: true, ..Node::default() }, node("b")];
        assert_eq!(for_wake(&app, &record, &bare).len(), 2);
        let wake = Transition::Wake { node: String::new(), start_timeout_ms: 0, lost: Vec::new() };
        assert!(matches!(record.apply(&wake, 1), Outcome::Own(_)));
        assert_eq!(for_wake(&app, &record, &bare)[0].name(), "");
    }
}
