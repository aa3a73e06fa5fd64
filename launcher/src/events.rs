//! What happened, for operators: a bounded ring that can be followed.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use cmdb::{AppName, Generation};
use launcher_client::wire::Event;
use tokio::sync::broadcast;

use crate::{clock::unix_ms, metrics::Counts};

/// How many events are kept.
const KEPT: usize = 10_000;
/// How far a follower may lag before it misses some.
const FOLLOWER_LAG: usize = 1_024;

/// The events of this launcher since it began.
#[derive(Debug)]
pub struct Events {
    ring: Mutex<Ring>,
    live: broadcast::Sender<Event>,
    counts: Counts<1>,
}

#[derive(Debug, Default)]
struct Ring {
    last_seq: u64,
    events: VecDeque<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Self { ring: Mutex::default(), live: broadcast::channel(FOLLOWER_LAG).0, counts: Counts::default() }
    }
}

impl Events {
    /// Records an event, shows it to followers and in the log.
    pub fn emit(&self, kind: &str, app: Option<&AppName>, generation: Option<Generation>, message: String) {
        let name = app.map_or("-", AppName::as_str);
        tracing::info!(kind, app = name, generation = generation.map(|g| g.0), "{message}");
        self.counts.get_or_create(&[("kind", kind.to_owned())]).inc();
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.last_seq += 1;
        let event = Event {
            seq: ring.last_seq,
            at_unix_ms: unix_ms(),
            kind: kind.to_owned(),
            app: app.cloned(),
            generation,
            message,
        };
        if ring.events.len() == KEPT {
            ring.events.pop_front();
        }
        ring.events.push_back(event.clone());
        // Sent under the lock, so that followers see the ring's order. Nobody may be following; that is no error.
        let _ = self.live.send(event);
    }

    /// How many there were of each kind.
    pub fn counts(&self) -> Counts<1> {
        self.counts.clone()
    }

    /// The kept events after `since`, and a receiver of those that follow them, without a gap between.
    pub fn since(&self, since: u64) -> (Vec<Event>, broadcast::Receiver<Event>) {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        (ring.events.iter().filter(|e| e.seq > since).cloned().collect(), self.live.subscribe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_follower_sees_every_event_once_and_in_order() {
        let events = Events::default();
        events.emit("wake", None, None, "first".into());
        events.emit("ready", None, None, "second".into());

        let (kept, mut live) = events.since(1);
        events.emit("stopped", None, None, "third".into());

        assert_eq!(kept.iter().map(|e| e.message.as_str()).collect::<Vec<_>>(), ["second"]);
        assert_eq!(live.try_recv().unwrap().message, "third");
        assert!(live.try_recv().is_err());
    }

    #[test]
    fn old_events_make_room() {
        let events = Events::default();
        for n in 0..KEPT + 5 {
            events.emit("wake", None, None, n.to_string());
        }
        let (kept, _) = events.since(0);
        assert_eq!(kept.len(), KEPT);
        assert_eq!(kept[0].message, "5");
    }
}
