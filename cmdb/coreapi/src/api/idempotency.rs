//! `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header): a POST that is sent again because its answer was lost is
//! done once, and answered alike. Kept in memory, bounded: a restart forgets.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{
    body::Bytes,
    http::{HeaderMap, StatusCode},
};

/// Most answers that are kept, and most bytes of them in all; the oldest go first.
const ANSWERS: usize = 1024;
const BYTES: usize = 4 << 20;

/// Whose key.
pub(crate) type Key = (Arc<str>, String);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Memory(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    slots: HashMap<Key, Slot>,
    /// Those with an answer, oldest first.
    order: VecDeque<Key>,
    bytes: usize,
}

#[derive(Debug)]
struct Slot {
    /// What was asked.
    fingerprint: [u8; 32],
    /// `None` while it is being done.
    answer: Option<Answer>,
}

/// An answer that was given.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// What to do about a request with a key.
#[derive(Debug)]
pub(crate) enum Turn {
    /// Do it, and tell the answer.
    Do(Doing),
    /// It was done.
    Done(Answer),
    /// It is being done.
    Busy,
    /// The key was used for something else.
    Other,
}

/// A request that is being done; forgotten unless it is answered.
#[derive(Debug)]
pub(crate) struct Doing {
    memory: Arc<Memory>,
    key: Key,
}

impl Memory {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose turn it is.
    pub(crate) fn turn(self: &Arc<Self>, key: Key, fingerprint: [u8; 32]) -> Turn {
        let mut inner = self.lock();
        match inner.slots.get(&key) {
            Some(slot) if slot.fingerprint != fingerprint => Turn::Other,
            Some(Slot { answer: Some(answer), .. }) => Turn::Done(answer.clone()),
            Some(_) => Turn::Busy,
            None => {
                inner.slots.insert(key.clone(), Slot { fingerprint, answer: None });
                Turn::Do(Doing { memory: Arc::clone(self), key })
            }
        }
    }
}

impl Doing {
    /// Keeps the answer.
    pub(crate) fn answered(self, answer: Answer) {
        let mut inner = self.memory.lock();
        let Some(slot) = inner.slots.get_mut(&self.key) else { return };
        let size = answer.body.len();
        slot.answer = Some(answer);
        inner.bytes += size;
        inner.order.push_back(self.key.clone());
        while inner.order.len() > ANSWERS || inner.bytes > BYTES {
            let Some(oldest) = inner.order.pop_front() else { break };
            let answer = inner.slots.remove(&oldest).and_then(|slot| slot.answer);
            inner.bytes -= answer.map_or(0, |answer| answer.body.len());
        }
    }
}

impl Drop for Doing {
    fn drop(&mut self) {
        let mut inner = self.memory.lock();
        if inner.slots.get(&self.key).is_some_and(|slot| slot.answer.is_none()) {
            inner.slots.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        ("bob".into(), name.to_owned())
    }

    fn answer(size: usize) -> Answer {
        Answer { status: StatusCode::OK, headers: HeaderMap::new(), body: vec![0; size].into() }
    }

    #[test]
    fn what_was_done_is_not_done_again() {
        let memory = Arc::new(Memory::default());
        let Turn::Do(doing) = memory.turn(key("a"), [1; 32]) else { panic!("the first is done") };
        assert!(matches!(memory.turn(key("a"), [1; 32]), Turn::Busy));
        assert!(matches!(memory.turn(key("a"), [2; 32]), Turn::Other));
        drop(doing);
        let Turn::Do(doing) = memory.turn(key("a"), [1; 32]) else { panic!("the first was given up") };
        doing.answered(answer(3));
        assert!(matches!(memory.turn(key("a"), [1; 32]), Turn::Done(answer) if answer.body.len() == 3));
        let others = ("eve".into(), "a".to_owned());
        assert!(matches!(memory.turn(others, [1; 32]), Turn::Do(_)), "a key is its holder's own");
    }

    #[test]
    fn memory_is_bounded() {
        let memory = Arc::new(Memory::default());
        for n in 0..ANSWERS + 10 {
            let Turn::Do(doing) = memory.turn(key(&n.to_string()), [1; 32]) else { panic!("{n}") };
            doing.answered(answer(10));
        }
        assert_eq!(memory.lock().slots.len(), ANSWERS);
        let Turn::Do(doing) = memory.turn(key("large"), [1; 32]) else { panic!("large") };
        doing.answered(answer(BYTES + 1));
        let inner = memory.lock();
        assert_eq!((inner.slots.len(), inner.bytes), (0, 0));
    }
}
