//! A place on an instance.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed, Ordering::SeqCst},
};

use crate::{link::Command, tenant::AppRuntime, upstream::Upstream};

/// A place on an instance for one request; dropping it gives the place to the next.
#[derive(Debug)]
pub struct Lease {
    /// The instance.
    pub upstream: Arc<Upstream>,
    pub(crate) app: Arc<AppRuntime>,
    /// Whether it counts among the held requests that are on their way.
    pub(crate) opening: AtomicBool,
}

impl Lease {
    /// The first byte came after `us` µs. When it shows that the instance has become too slow, the launcher hears of it now.
    pub fn first_byte(&self, tick: u64, us: u64) {
        self.upstream.first_byte(tick, us);
        let slow_us = self.app.slow_us();
        if us > slow_us && self.upstream.is_here() && self.upstream.breaches(tick, slow_us) {
            self.app.counts.breach();
            self.app.house().command(Command::Breach(Arc::clone(&self.upstream)));
        }
    }

    /// The instance has answered (or is known not to): the next held request may follow.
    pub fn opened(&self) {
        if self.opening.load(Relaxed) && self.opening.swap(false, SeqCst) {
            self.upstream.opened();
            if self.app.is_waited_for() {
                self.app.serve();
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if *self.opening.get_mut() {
            self.upstream.opened();
        }
        self.upstream.leave();
        if self.app.is_waited_for() {
            self.app.serve();
        }
    }
}
