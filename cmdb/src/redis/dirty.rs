//! What has changed in Redis and was not read again yet.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use redis::{PushInfo, PushKind, Value, aio::SendError};
use tokio::sync::Notify;

use super::stored;
use crate::app::AppName;

/// More than so many changed apps are read all in one go.
const MANY: usize = 50_000;

/// Filled by the connection's own task, which must never wait (notes: a slow reader makes the server drop it).
#[derive(Debug, Default)]
pub(super) struct Dirty {
    changed: Mutex<Changed>,
    notify: Notify,
}

/// See [`Dirty`].
#[derive(Debug, Default)]
pub(super) struct Changed {
    /// These have.
    pub(super) apps: HashSet<AppName>,
    /// Anything may have.
    pub(super) all: bool,
    /// The connection is gone: what changes from now on is not told.
    pub(super) lost: bool,
}

impl Dirty {
    /// What a connection calls for each push message.
    pub(super) fn listener(
        self: &Arc<Self>,
    ) -> impl Fn(PushInfo) -> Result<(), SendError> + Send + Sync + 'static {
        let dirty = Arc::clone(self);
        move |push: PushInfo| {
            dirty.take_in(&push);
            Ok(())
        }
    }

    /// Waits until something has changed, and hands it over. A change that comes while it is read again is marked anew.
    pub(super) async fn changed(&self) -> Changed {
        loop {
            let notified = self.notify.notified();
            let changed = std::mem::take(&mut *self.lock());
            if changed.all || changed.lost || !changed.apps.is_empty() {
                return changed;
            }
            notified.await;
        }
    }

    fn take_in(&self, push: &PushInfo) {
        let mut changed = self.lock();
        match (&push.kind, push.data.first()) {
            (PushKind::Disconnection, _) => changed.lost = true,
            (PushKind::Invalidate, Some(Value::Array(keys))) => {
                for key in keys {
                    match key {
                        Value::BulkString(key)
                            if [stored::EPOCH, stored::REMOVALS_MEANT]
                                .map(str::as_bytes)
                                .contains(&&**key) =>
                        {
                            changed.all = true;
                        }
                        Value::BulkString(key) => changed.apps.extend(stored::app_of(key)),
                        _ => {}
                    }
                }
            }
            // FLUSHALL and FLUSHDB name no keys.
            (PushKind::Invalidate, _) => changed.all = true,
            _ => return,
        }
        if changed.apps.len() > MANY {
            changed.apps.clear();
            changed.all = true;
        }
        drop(changed);
        self.notify.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Changed> {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
