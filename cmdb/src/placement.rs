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
