//! What each app's visitors did, for the launcher's ledger: totals since this proxy began, so that none is lost when a
//! report or the launcher is.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cmdb::AppName;
use launcher_client::{
    usage::{Totals, Traffic},
    wire::Request,
};
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    house::House,
    link::{Line, tell},
    telemetry::micros,
};

/// How often the ledger hears of what has changed.
const REPORT_EVERY: Duration = Duration::from_millis(500);
/// Most apps in one packet.
const REPORT_CHUNK: usize = 256;

/// One app's totals. They outlive the app, which may be removed before they are told.
#[derive(Debug, Default)]
pub struct Bill {
    requests: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    held_us: AtomicU64,
}

/// All apps'.
#[derive(Debug)]
pub struct Bills {
    /// When counting began, µs since the Unix epoch.
    since_us: u64,
    apps: Mutex<HashMap<AppName, Arc<Bill>>>,
}

impl Default for Bills {
    fn default() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { since_us: micros(since), apps: Mutex::default() }
    }
}

impl Bill {
    /// One more request has ended: the bytes of its body and of the answer's, and how long it was held.
    pub fn add(&self, read: usize, sent: usize, held: Duration) {
        self.requests.fetch_add(1, Relaxed);
        if read > 0 {
            self.bytes_in.fetch_add(read as u64, Relaxed);
        }
        self.bytes_out.fetch_add(sent as u64, Relaxed);
        if !held.is_zero() {
            self.held_us.fetch_add(micros(held), Relaxed);
        }
    }

    fn totals(&self) -> Totals {
        Totals {
            requests: self.requests.load(Relaxed),
            bytes_in: self.bytes_in.load(Relaxed),
            bytes_out: self.bytes_out.load(Relaxed),
            held_us: self.held_us.load(Relaxed),
        }
    }
}

impl Bills {
    /// That app's.
    #[must_use]
    pub fn of(&self, app: &AppName) -> Arc<Bill> {
        let mut apps = self.apps.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(apps.entry(app.clone()).or_default())
    }

    fn changed(&self, told: &HashMap<AppName, Totals>) -> Vec<Traffic> {
        let apps = self.apps.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = apps.iter().filter_map(|(app, bill)| {
            let totals = bill.totals();
            let before = told.get(app).copied().unwrap_or_default();
            (totals != before).then(|| Traffic { app: app.clone(), totals })
        });
        changed.collect()
    }
}

/// Tells the launcher for ever.
pub(crate) async fn report(house: &House, mut line: Line) {
    let mut told = HashMap::new();
    let mut ticks = interval(REPORT_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if line.has_changed().unwrap_or(false) {
            // Another launcher, perhaps: what the one before had not written down yet, this one has to hear again.
            line.mark_unchanged();
            told.clear();
        }
        if line.borrow().is_none() {
            continue;
        }
        let changed = house.bills.changed(&told);
        for apps in changed.chunks(REPORT_CHUNK) {
            tell(&line, Request::Traffic { since_us: house.bills.since_us, apps: apps.to_vec() }).await;
        }
        told.extend(changed.into_iter().map(|traffic| (traffic.app, traffic.totals)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_changed_is_told_as_totals() {
        let bills = Bills::default();
        let app: AppName = "blog".parse().unwrap();
        bills.of(&app).add(10, 200, Duration::from_millis(3));
        let first = bills.changed(&HashMap::new());
        let totals = Totals { requests: 1, bytes_in: 10, bytes_out: 200, held_us: 3_000 };
        assert_eq!(first, [Traffic { app: app.clone(), totals }]);

        let told = HashMap::from([(app.clone(), totals)]);
        assert!(bills.changed(&told).is_empty());
        bills.of(&app).add(0, 1, Duration::ZERO);
        assert_eq!(bills.changed(&told)[0].totals.requests, 2, "the same bill, by whomever it is asked for");
    }
}
