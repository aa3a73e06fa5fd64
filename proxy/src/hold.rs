//! The waiting room: where requests wait for an instance. Bounded, first come first served, and left by dropping.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use tokio::sync::oneshot;

/// Bounds how many requests wait in all rooms of a proxy together.
#[derive(Debug)]
pub struct Seats {
    taken: AtomicUsize,
    limit: usize,
}

/// One taken seat; dropping it frees it.
#[derive(Debug)]
pub struct Seat(Arc<Seats>);

/// The waiting room of one app. `A` is what a waiting request is answered with.
#[derive(Debug)]
pub struct WaitingRoom<A> {
    queue: Mutex<Queue<A>>,
    /// Length of the queue, readable without the lock: the warm path only looks here.
    length: AtomicUsize,
}

#[derive(Debug)]
struct Queue<A> {
    next: u64,
    waiting: BTreeMap<u64, oneshot::Sender<A>>,
}

/// A place in a [`WaitingRoom`]; dropping it leaves the queue and frees the place at once. An answer that was on its way is dropped with it.
#[derive(Debug)]
pub struct Place<A> {
    number: u64,
    answer: oneshot::Receiver<A>,
    room: Arc<WaitingRoom<A>>,
    _seat: Seat,
}

/// No place is free.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Full;

impl Seats {
    /// `limit` seats.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { taken: AtomicUsize::new(0), limit })
    }

    /// How many are taken.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.taken.load(SeqCst)
    }

    fn take(self: &Arc<Self>) -> Result<Seat, Full> {
        if self.taken.fetch_add(1, SeqCst) < self.limit {
            Ok(Seat(Arc::clone(self)))
        } else {
            self.taken.fetch_sub(1, SeqCst);
            Err(Full)
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, SeqCst);
    }
}

impl<A> WaitingRoom<A> {
    /// An empty room.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::new(Queue { next: 0, waiting: BTreeMap::new() }),
            length: AtomicUsize::new(0),
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

    /// A place at the end of the queue, unless `limit` wait here already or no seat is left in all.
    ///
    /// # Errors
    /// [`Full`].
    pub fn enter(self: &Arc<Self>, limit: usize, seats: &Arc<Seats>) -> Result<Place<A>, Full> {
        let seat = seats.take()?;
        let mut queue = self.lock();
        if queue.waiting.len() >= limit {
            return Err(Full);
        }
        let number = queue.next;
        queue.next += 1;
        let (sender, answer) = oneshot::channel();
        queue.waiting.insert(number, sender);
        self.length.store(queue.waiting.len(), SeqCst);
        drop(queue);
        Ok(Place { number, answer, room: Arc::clone(self), _seat: seat })
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
            let Some((_, sender)) = first else { return Err(answer) };
            match sender.send(answer) {
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
        for sender in waiting.into_values() {
            // Who left meanwhile needs no answer.
            let _ = sender.send(answer());
        }
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
        if queue.waiting.remove(&self.number).is_some() {
            self.room.length.store(queue.waiting.len(), SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_comes_first_is_served_first() {
        let (room, seats) = (WaitingRoom::new(), Seats::new(10));
        let mut places: Vec<_> = (0..3).map(|_| room.enter(10, &seats).unwrap()).collect();
        for number in 0..3 {
            room.serve(number).unwrap();
        }
        for (number, place) in places.iter_mut().enumerate() {
            assert_eq!(place.answer().await, Some(number));
        }
        assert_eq!(room.serve(9), Err(9));
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_room_refuses_and_a_leaver_makes_room() {
        let (room, seats) = (WaitingRoom::<()>::new(), Seats::new(10));
        let first = room.enter(2, &seats).unwrap();
        let _second = room.enter(2, &seats).unwrap();
        assert!(room.enter(2, &seats).is_err());
        assert_eq!(seats.taken(), 2, "who was refused holds no seat");
        drop(first);
        assert_eq!((room.len(), seats.taken()), (1, 1));
        assert!(room.enter(2, &seats).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn all_rooms_together_are_bounded() {
        let seats = Seats::new(2);
        let (one, other) = (WaitingRoom::<()>::new(), WaitingRoom::<()>::new());
        let _a = one.enter(9, &seats).unwrap();
        let b = other.enter(9, &seats).unwrap();
        assert!(one.enter(9, &seats).is_err());
        drop(b);
        assert!(one.enter(9, &seats).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn the_place_of_a_leaver_goes_to_the_next() {
        let (room, seats) = (WaitingRoom::new(), Seats::new(10));
        let first = room.enter(10, &seats).unwrap();
        let mut second = room.enter(10, &seats).unwrap();
        drop(first);
        room.serve("lease").unwrap();
        assert_eq!(second.answer().await, Some("lease"));
    }

    #[tokio::test(start_paused = true)]
    async fn everybody_is_told_at_once() {
        let (room, seats) = (WaitingRoom::new(), Seats::new(10));
        let mut places: Vec<_> = (0..5).map(|_| room.enter(10, &seats).unwrap()).collect();
        room.serve_all(|| "refused");
        assert!(room.is_empty());
        for place in &mut places {
            assert_eq!(place.answer().await, Some("refused"));
        }
        drop(places);
        assert_eq!(seats.taken(), 0);
    }
}
