//! The waiting room: where requests wait for an instance. Bounded, first come first served, and left by dropping. When all rooms
//! of a proxy together are full, the one with most in it gives up a place, so that one app's crowd never locks out another's
//! first visitor.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed, Ordering::SeqCst},
    },
};

use tokio::sync::oneshot;

/// Bounds how many requests wait in all rooms of a proxy together, and knows in constant time which room holds most.
#[derive(Debug)]
pub struct Seats<A> {
    taken: AtomicUsize,
    limit: usize,
    ranking: Mutex<Ranking<A>>,
}

/// Rooms by how many seats they have taken: those with one, with two, …; the last row is never empty.
#[derive(Debug)]
struct Ranking<A>(Vec<Vec<Arc<WaitingRoom<A>>>>);

/// One taken seat; dropping it frees it.
#[derive(Debug)]
struct Seat<A> {
    seats: Arc<Seats<A>>,
    room: Arc<WaitingRoom<A>>,
}

/// The waiting room of one app. `A` is what a waiting request is answered with.
#[derive(Debug)]
pub struct WaitingRoom<A> {
    queue: Mutex<Queue<A>>,
    /// Length of the queue, readable without the lock: the warm path only looks here.
    length: AtomicUsize,
    /// Seats taken, and the place in that row of the ranking; changed under the ranking's lock only.
    rank: (AtomicUsize, AtomicUsize),
}

#[derive(Debug)]
struct Queue<A> {
    next: u64,
    waiting: BTreeMap<u64, Waiting<A>>,
}

#[derive(Debug)]
struct Waiting<A> {
    answer: oneshot::Sender<A>,
    _seat: Seat<A>,
}

/// A place in a [`WaitingRoom`]; dropping it leaves the queue and frees the place at once. An answer that was on its way is dropped with it.
#[derive(Debug)]
pub struct Place<A> {
    number: u64,
    answer: oneshot::Receiver<A>,
    room: Arc<WaitingRoom<A>>,
}

/// No place is free.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Full {
    /// In this room.
    Room,
    /// In all rooms together, and no other holds clearly more than this one.
    All,
}

impl<A> Seats<A> {
    /// `limit` seats.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { taken: AtomicUsize::new(0), limit, ranking: Mutex::new(Ranking(Vec::new())) })
    }

    /// How many are taken.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.taken.load(SeqCst)
    }

    /// A seat for `room`, and when none was free the room that has to give up one for it.
    #[expect(clippy::type_complexity, reason = "two things, both named in the line above")]
    fn take(
        self: &Arc<Self>,
        room: &Arc<WaitingRoom<A>>,
    ) -> Result<(Seat<A>, Option<Arc<WaitingRoom<A>>>), Full> {
        let mut ranking = self.ranking();
        let most = if self.taken() < self.limit {
            None
        } else {
            let most = ranking.most().filter(|most| room.seats() + 1 < most.seats());
            // Not when both would hold the same: the two would only push each other's visitors out in turns.
            Some(Arc::clone(most.ok_or(Full::All)?))
        };
        ranking.raise(room);
        self.taken.fetch_add(1, SeqCst);
        drop(ranking);
        Ok((Seat { seats: Arc::clone(self), room: Arc::clone(room) }, most))
    }

    fn ranking(&self) -> MutexGuard<'_, Ranking<A>> {
        self.ranking.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<A> Drop for Seat<A> {
    fn drop(&mut self) {
        let mut ranking = self.seats.ranking();
        ranking.lower(&self.room);
        self.seats.taken.fetch_sub(1, SeqCst);
    }
}

impl<A> Ranking<A> {
    fn most(&self) -> Option<&Arc<WaitingRoom<A>>> {
        self.0.last().and_then(|row| row.last())
    }

    fn raise(&mut self, room: &Arc<WaitingRoom<A>>) {
        let seats = room.seats();
        self.remove(room);
        self.insert(room, seats + 1);
    }

    fn lower(&mut self, room: &Arc<WaitingRoom<A>>) {
        let seats = room.seats();
        self.remove(room);
        self.insert(room, seats.saturating_sub(1));
        // Whoever left the last row is in the one before it now, so that this is never empty as well.
        if self.0.last().is_some_and(Vec::is_empty) {
            self.0.pop();
        }
    }

    fn insert(&mut self, room: &Arc<WaitingRoom<A>>, seats: usize) {
        room.rank.0.store(seats, Relaxed);
        let Some(row) = seats.checked_sub(1) else { return };
        if self.0.len() == row {
            self.0.push(Vec::new());
        }
        if let Some(row) = self.0.get_mut(row) {
            room.rank.1.store(row.len(), Relaxed);
            row.push(Arc::clone(room));
        }
    }

    fn remove(&mut self, room: &Arc<WaitingRoom<A>>) {
        let Some(row) = room.seats().checked_sub(1).and_then(|row| self.0.get_mut(row)) else { return };
        let at = room.rank.1.load(Relaxed);
        if at < row.len() {
            row.swap_remove(at);
        }
        if let Some(moved) = row.get(at) {
            moved.rank.1.store(at, Relaxed);
        }
    }
}

impl<A> WaitingRoom<A> {
    /// An empty room.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::new(Queue { next: 0, waiting: BTreeMap::new() }),
            length: AtomicUsize::new(0),
            rank: Default::default(),
        })
    }

    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length.load(SeqCst)
    }

    /// Whether nobody waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A place at the end of the queue, unless `limit` wait here already. When all rooms together are full, the last in the
    /// queue of the room with most is answered with `refusal`, unless that is this one.
    ///
    /// # Errors
    /// [`Full`].
    pub fn enter(
        self: &Arc<Self>,
        limit: usize,
        seats: &Arc<Seats<A>>,
        refusal: impl FnOnce() -> A,
    ) -> Result<Place<A>, Full> {
        if self.len() >= limit {
            return Err(Full::Room);
        }
        let (seat, most) = seats.take(self)?;
        if let Some(most) = most {
            most.refuse_last(refusal);
        }
        let (sender, answer) = oneshot::channel();
        let waiting = Waiting { answer: sender, _seat: seat };
        let mut queue = self.lock();
        if queue.waiting.len() >= limit {
            drop(queue);
            return Err(Full::Room);
        }
        let number = queue.next;
        queue.next += 1;
        queue.waiting.insert(number, waiting);
        self.length.store(queue.waiting.len(), SeqCst);
        drop(queue);
        Ok(Place { number, answer, room: Arc::clone(self) })
    }

    /// Answers who has waited longest.
    ///
    /// # Errors
    /// The answer comes back when nobody waits.
    pub fn serve(&self, mut answer: A) -> Result<(), A> {
        loop {
            let first = {
                let mut queue = self.lock();
                let first = queue.waiting.pop_first();
                self.length.store(queue.waiting.len(), SeqCst);
                first
            };
            let Some((_, first)) = first else { return Err(answer) };
            match first.answer.send(answer) {
                Ok(()) => return Ok(()),
                Err(returned) => answer = returned,
            }
        }
    }

    /// Answers everybody who waits now.
    pub fn serve_all(&self, mut answer: impl FnMut() -> A) {
        let waiting = {
            let mut queue = self.lock();
            self.length.store(0, SeqCst);
            std::mem::take(&mut queue.waiting)
        };
        for waiting in waiting.into_values() {
            // Who left meanwhile needs no answer.
            let _ = waiting.answer.send(answer());
        }
    }

    /// Answers who came last: who waited longest is nearest to being served.
    fn refuse_last(&self, refusal: impl FnOnce() -> A) {
        let last = {
            let mut queue = self.lock();
            let last = queue.waiting.pop_last();
            self.length.store(queue.waiting.len(), SeqCst);
            last
        };
        // Nobody: they were all served since, and their seats are free.
        if let Some((_, last)) = last {
            let _ = last.answer.send(refusal());
        }
    }

    fn seats(&self) -> usize {
        self.rank.0.load(Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Queue<A>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<A> Place<A> {
    /// The answer; `None` never comes while the room stands. Cancel-safe.
    pub async fn answer(&mut self) -> Option<A> {
        (&mut self.answer).await.ok()
    }
}

impl<A> Drop for Place<A> {
    fn drop(&mut self) {
        let mut queue = self.room.lock();
        let left = queue.waiting.remove(&self.number);
        if left.is_some() {
            self.room.length.store(queue.waiting.len(), SeqCst);
        }
        // Before its seat is freed: only one lock at a time.
        drop(queue);
        drop(left);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REFUSED: &str = "refused";

    #[tokio::test(start_paused = true)]
    async fn who_comes_first_is_served_first() {
        let (room, seats) = (WaitingRoom::new(), Seats::new(10));
        let mut places: Vec<_> = (0..3).map(|_| room.enter(10, &seats, || REFUSED).unwrap()).collect();
        for answer in ["a", "b", "c"] {
            room.serve(answer).unwrap();
        }
        for (place, answer) in places.iter_mut().zip(["a", "b", "c"]) {
            assert_eq!(place.answer().await, Some(answer));
        }
        assert_eq!(room.serve("d"), Err("d"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_room_refuses_and_a_leaver_makes_room() {
        let (room, seats) = (WaitingRoom::new(), Seats::new(10));
        let first = room.enter(2, &seats, || REFUSED).unwrap();
        let _second = room.enter(2, &seats, || REFUSED).unwrap();
        assert!(room.enter(2, &seats, || REFUSED).is_err());
        assert_eq!(seats.taken(), 2, "who was refused holds no seat");
        drop(first);
        assert_eq!((room.len(), seats.taken()), (1, 1));
        assert!(room.enter(2, &seats, || REFUSED).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn all_rooms_together_are_bounded() {
        let seats = Seats::new(2);
        let (one, other) = (WaitingRoom::new(), WaitingRoom::new());
        let _a = one.enter(9, &seats, || REFUSED).unwrap();
        let b = other.enter(9, &seats, || REFUSED).unwrap();
        assert!(one.enter(9, &seats, || REFUSED).is_err());
        drop(b);
        assert!(one.enter(9, &seats, || REFUSED).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn the_place_of_a_leaver_goes_to_the_next() {
        let (room, seats) = (WaitingRoom::new(), Seats::new(10));
        let first = room.enter(10, &seats, || REFUSED).unwrap();
        let mut second = room.enter(10, &seats, || REFUSED).unwrap();
        drop(first);
        room.serve("lease").unwrap();
        assert_eq!(second.answer().await, Some("lease"));
    }

    #[tokio::test(start_paused = true)]
    async fn everybody_is_told_at_once() {
        let (room, seats) = (WaitingRoom::new(), Seats::new(10));
        let mut places: Vec<_> = (0..5).map(|_| room.enter(10, &seats, || REFUSED).unwrap()).collect();
        room.serve_all(|| "refused");
        assert!(room.is_empty());
        for place in &mut places {
            assert_eq!(place.answer().await, Some("refused"));
        }
        drop(places);
        assert_eq!(seats.taken(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn when_all_is_full_the_room_with_most_gives_up_its_last() {
        let seats = Seats::new(6);
        let (crowd, quiet) = (WaitingRoom::new(), WaitingRoom::new());
        let mut many: Vec<_> = (0..6).map(|_| crowd.enter(9, &seats, || REFUSED).unwrap()).collect();
        assert_eq!(
            crowd.enter(9, &seats, || REFUSED).err(),
            Some(Full::All),
            "whose crowd it is, waits for itself"
        );
        let few: Vec<_> = (0..2).map(|_| quiet.enter(9, &seats, || REFUSED).unwrap()).collect();
        assert_eq!((crowd.len(), quiet.len(), seats.taken()), (4, 2, 6));
        for place in &mut many[4..] {
            assert_eq!(place.answer().await, Some(REFUSED), "who came last is refused first");
        }
        let _third = quiet.enter(9, &seats, || REFUSED).unwrap();
        assert_eq!(quiet.enter(9, &seats, || REFUSED).err(), Some(Full::All), "they hold the same");
        drop(few);
        assert_eq!((crowd.len(), quiet.len(), seats.taken()), (3, 1, 4));
    }

    proptest! {
        #[test]
        fn the_ranking_always_knows_who_holds_most(steps in prop::collection::vec((0usize..4, any::<bool>()), 0..200)) {
            let seats = Seats::new(20);
            let rooms: Vec<_> = (0..4).map(|_| WaitingRoom::new()).collect();
            let mut places: [Vec<Place<&str>>; 4] = Default::default();
            for (room, come) in steps {
                if come {
                    places[room].extend(rooms[room].enter(9, &seats, || REFUSED));
                } else {
                    places[room].pop();
                }
                let ranking = seats.ranking();
                let most = rooms.iter().map(|room| room.len()).max().unwrap_or(0);
                prop_assert_eq!(ranking.0.len(), most);
                prop_assert!(ranking.most().is_none_or(|room| room.len() == most));
                drop(ranking);
                prop_assert!(rooms.iter().all(|room| room.seats() == room.len()));
                prop_assert_eq!(seats.taken(), rooms.iter().map(|room| room.len()).sum::<usize>());
                prop_assert!(seats.taken() <= 20);
            }
            drop(places);
            prop_assert_eq!(seats.taken(), 0);
            prop_assert!(seats.ranking().0.is_empty());
        }
    }
}
