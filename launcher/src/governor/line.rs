//! Who waits for a start slot, and who is next: pure, without a clock.

use std::collections::VecDeque;

use cmdb::AppName;

/// An app without an instance goes before one that wants another; but every so many starts the latter has a turn, so that
/// nobody waits for ever.
const FIRSTS_IN_A_ROW: u32 = 4;

/// One start that waits.
#[derive(Debug)]
pub(super) struct Ask<T> {
    /// Which one.
    pub(super) id: u64,
    /// Of which app.
    pub(super) app: AppName,
    /// Whether nothing of the app runs: somebody waits for this start.
    pub(super) first: bool,
    /// Memory that it is likely to need, bytes.
    pub(super) memory: u64,
    /// What is given to it when it is its turn.
    pub(super) ticket: T,
}

/// The starts that wait. Apps take turns; within an app they keep their order.
#[derive(Debug)]
pub(super) struct Line<T> {
    firsts: Turns<T>,
    others: Turns<T>,
    firsts_in_a_row: u32,
}

/// Apps in the order of their turns, each with what it waits for.
#[derive(Debug)]
struct Turns<T>(VecDeque<(AppName, VecDeque<Ask<T>>)>);

impl<T> Default for Line<T> {
    fn default() -> Self {
        Self { firsts: Turns(VecDeque::new()), others: Turns(VecDeque::new()), firsts_in_a_row: 0 }
    }
}

impl<T> Line<T> {
    /// At the end of its app's own.
    pub(super) fn push(&mut self, ask: Ask<T>) {
        if ask.first { self.firsts.push(ask) } else { self.others.push(ask) }
    }

    /// The next one that fits into `memory` bytes.
    pub(super) fn pop(&mut self, memory: u64) -> Option<Ask<T>> {
        let others_turn = self.firsts_in_a_row >= FIRSTS_IN_A_ROW;
        let (before, after) = match others_turn {
            true => (&mut self.others, &mut self.firsts),
            false => (&mut self.firsts, &mut self.others),
        };
        let ask = before.pop(memory).or_else(|| after.pop(memory))?;
        self.firsts_in_a_row = if ask.first { self.firsts_in_a_row + 1 } else { 0 };
        Some(ask)
    }

    /// It does not wait any more.
    pub(super) fn remove(&mut self, id: u64) {
        self.firsts.remove(id);
        self.others.remove(id);
    }

    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.firsts.len() + self.others.len()
    }

    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.firsts.0.is_empty() && self.others.0.is_empty()
    }
}

impl<T> Turns<T> {
    fn push(&mut self, ask: Ask<T>) {
        match self.0.iter_mut().find(|(app, _)| *app == ask.app) {
            Some((_, asks)) => asks.push_back(ask),
            None => self.0.push_back((ask.app.clone(), VecDeque::from([ask]))),
        }
    }

    fn pop(&mut self, memory: u64) -> Option<Ask<T>> {
        let fits = |(_, asks): &(AppName, VecDeque<Ask<T>>)| asks.front().is_some_and(|a| a.memory <= memory);
        let (app, mut asks) = self.0.remove(self.0.iter().position(fits)?)?;
        let ask = asks.pop_front();
        if !asks.is_empty() {
            self.0.push_back((app, asks));
        }
        ask
    }

    fn remove(&mut self, id: u64) {
        self.0.iter_mut().for_each(|(_, asks)| asks.retain(|ask| ask.id != id));
        self.0.retain(|(_, asks)| !asks.is_empty());
    }

    fn len(&self) -> usize {
        self.0.iter().map(|(_, asks)| asks.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(asks: &[(&str, bool, u64)]) -> Line<()> {
        let mut line = Line::default();
        for (id, (app, first, memory)) in asks.iter().enumerate() {
            let app = app.parse().unwrap();
            line.push(Ask { id: id as u64, app, first: *first, memory: *memory, ticket: () });
        }
        line
    }

    fn order(mut line: Line<()>, memory: u64) -> Vec<u64> {
        std::iter::from_fn(|| line.pop(memory).map(|ask| ask.id)).collect()
    }

    #[test]
    fn apps_take_turns_however_much_one_of_them_wants() {
        let line = line(&[
            ("greedy", false, 1),
            ("greedy", false, 1),
            ("greedy", false, 1),
            ("modest", false, 1),
            ("shy", false, 1),
        ]);
        assert_eq!(order(line, 1), [0, 3, 4, 1, 2]);
    }

    #[test]
    fn an_apps_first_instance_goes_before_anothers_second() {
        let line = line(&[("big", false, 1), ("big", false, 1), ("blog", true, 1), ("shop", true, 1)]);
        assert_eq!(order(line, 1), [2, 3, 0, 1]);
    }

    #[test]
    fn a_stream_of_first_starts_keeps_nobody_waiting_for_ever() {
        let mut asks = vec![("big", false, 1)];
        asks.extend(["a", "b", "c", "d", "e", "f"].map(|app| (app, true, 1)));
        assert_eq!(order(line(&asks), 1), [1, 2, 3, 4, 0, 5, 6]);
    }

    #[test]
    fn what_does_not_fit_is_passed_over_and_stays() {
        let mut line = line(&[("huge", true, 900), ("small", true, 10)]);
        assert_eq!(line.pop(100).map(|ask| ask.id), Some(1));
        assert_eq!(line.pop(100).map(|ask| ask.id), None);
        assert_eq!(line.len(), 1);
        assert_eq!(line.pop(900).map(|ask| ask.id), Some(0));
        assert!(line.is_empty());
    }

    #[test]
    fn whoever_leaves_is_not_called() {
        let mut line = line(&[("a", true, 1), ("b", true, 1)]);
        line.remove(0);
        assert_eq!(order(line, 1), [1]);
    }
}
