//! Requests that another host's proxy sent here and that wait for an instance of this one. They have a waiting room of their
//! own, for no instance elsewhere is of use to them: they would be sent in circles.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::SeqCst},
};

use crate::{hold::WaitingRoom, tenant::Answer};

/// The guests of one app.
#[derive(Debug)]
pub struct Guests {
    /// Those who wait.
    pub room: Arc<WaitingRoom<Answer>>,
    waking: AtomicBool,
}

impl Guests {
    /// Nobody.
    #[must_use]
    pub fn new() -> Self {
        Self { room: WaitingRoom::new(), waking: AtomicBool::new(false) }
    }

    /// Whether the caller is to have an instance woken; false: somebody does already.
    #[must_use]
    pub fn begin_waking(&self) -> bool {
        !self.waking.swap(true, SeqCst)
    }

    /// The waker has ended.
    pub fn end_waking(&self) {
        self.waking.store(false, SeqCst);
    }
}

impl Default for Guests {
    fn default() -> Self {
        Self::new()
    }
}
