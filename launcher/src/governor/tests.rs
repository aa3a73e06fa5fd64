//! The governor with a host of the test's own making, in time that passes only when all tasks wait.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};

use super::*;

/// A host of two cores, as busy and as full as the test says.
#[derive(Clone, Debug)]
struct Made(Arc<(AtomicU32, AtomicU64)>);

impl Made {
    fn new(busy: u32, free: u64) -> Self {
        Self(Arc::new((AtomicU32::new(busy), AtomicU64::new(free))))
    }
}

impl Gauge for Made {
    fn cores(&self) -> usize {
        2
    }

    fn begin(&self) {}

    fn busy(&self) -> u32 {
        self.0.0.load(Relaxed)
    }

    fn free(&self) -> u64 {
        self.0.1.load(Relaxed)
    }
}

const PLENTY: u64 = 1 << 40;

fn app(number: usize) -> AppName {
    format!("app{number}").parse().unwrap()
}

fn governor(host: &Made) -> Arc<Governor> {
    Governor::new(GovernorMode::On, 100 << 20, Box::new(host.clone()))
}

async fn admitted(governor: &Arc<Governor>, app: &AppName, patience: Duration) -> Result<Slot, Why> {
    governor.admit(app, true, 1 << 30, Instant::now() + patience, |_| {}).await
}

/// Has so many apps start at once, each taking `time`; the most that were under way, and how long it took in all.
async fn storm(governor: &Arc<Governor>, apps: usize, time: Duration) -> (usize, Duration) {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let begun = Instant::now();
    let starts: Vec<_> = (0..apps)
        .map(|number| {
            let (governor, now, most) = (Arc::clone(governor), Arc::clone(&now), Arc::clone(&most));
            tokio::spawn(async move {
                let slot = admitted(&governor, &app(number), Duration::from_secs(60)).await.unwrap();
                most.fetch_max(now.fetch_add(1, Relaxed) + 1, Relaxed);
                tokio::time::sleep(time).await;
                now.fetch_sub(1, Relaxed);
                drop(slot);
            })
        })
        .collect();
    for start in starts {
        start.await.unwrap();
    }
    (most.load(Relaxed), begun.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_single_start_passes_without_a_wait_and_without_a_timer() {
    let governor = governor(&Made::new(1_000, PLENTY));
    let begun = Instant::now();
    let slot = governor.admit(&app(1), true, 1 << 30, begun, |_| panic!("it waits")).await.unwrap();
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert_eq!(governor.figures(), Figures { under_way: 1, waiting: 0, limit: 4 });
    drop(slot);
    assert_eq!(governor.figures().under_way, 0);
}

#[tokio::test(start_paused = true)]
async fn on_a_full_host_a_hundred_starts_go_through_a_few_at_a_time() {
    let governor = governor(&Made::new(1_000, PLENTY));
    let (most, took) = storm(&governor, 100, Duration::from_millis(20)).await;
    assert_eq!(most, 4, "two for each core, and fewer when the host is seen to be full");
    assert!(took < Duration::from_millis(20) * 100, "{took:?}");
    assert_eq!((governor.figures().under_way, governor.figures().waiting), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn starts_that_only_wait_are_soon_all_under_way() {
    let governor = governor(&Made::new(50, PLENTY));
    let (most, took) = storm(&governor, 100, Duration::from_millis(1_500)).await;
    assert!(most > 32 && most <= 64, "{most}");
    assert!(took < Duration::from_millis(3_500), "one after the other would take 150 s: {took:?}");
}

#[tokio::test(start_paused = true)]
async fn switched_off_it_lets_everybody_pass() {
    let governor = Governor::new(GovernorMode::Off, PLENTY, Box::new(Made::new(1_000, 0)));
    let (most, took) = storm(&governor, 100, Duration::from_millis(20)).await;
    assert_eq!((most, took), (100, Duration::from_millis(20)));
}

#[tokio::test(start_paused = true)]
async fn an_operators_bound_holds_however_idle_the_host_is() {
    let mode = "3".parse().unwrap();
    let governor = Governor::new(mode, 0, Box::new(Made::new(0, PLENTY)));
    let (most, _) = storm(&governor, 50, Duration::from_millis(300)).await;
    assert_eq!(most, 3);
}

#[tokio::test(start_paused = true)]
async fn without_memory_a_start_is_refused_at_its_deadline_with_the_reason() {
    let host = Made::new(0, 130 << 20);
    let governor = governor(&host);
    let begun = Instant::now();
    let why = admitted(&governor, &app(1), Duration::from_secs(5)).await.unwrap_err();
    assert_eq!(begun.elapsed(), Duration::from_secs(5));
    assert_eq!(
        why.to_string(),
        "it is likely to need 64MiB of memory, and the host has 30MiB for starts (it keeps 100MiB free)"
    );
    assert_eq!(governor.figures().waiting, 0);
}

#[tokio::test(start_paused = true)]
async fn memory_that_becomes_free_is_noticed() {
    let host = Made::new(0, 130 << 20);
    let governor = governor(&host);
    let waiter = tokio::spawn({
        let governor = Arc::clone(&governor);
        async move { admitted(&governor, &app(1), Duration::from_secs(5)).await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    host.0.1.store(200 << 20, Relaxed);
    tokio::time::sleep(TICK * 2).await;
    assert!(waiter.is_finished());
    waiter.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_was_promised_to_starts_under_way_is_not_promised_again() {
    let governor = governor(&Made::new(0, 200 << 20));
    let slot = admitted(&governor, &app(1), Duration::ZERO).await.unwrap();
    admitted(&governor, &app(2), Duration::from_millis(1)).await.unwrap_err();
    drop(slot);
    admitted(&governor, &app(2), Duration::ZERO).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_app_that_is_known_is_taken_to_need_what_it_used() {
    let governor = governor(&Made::new(0, 200 << 20));
    governor.learn(&app(1), 150 << 20);
    admitted(&governor, &app(1), Duration::from_millis(1)).await.unwrap_err();
    governor.learn(&app(2), 1 << 20);
    let _slots: Vec<Slot> = {
        let mut slots = Vec::new();
        for _ in 0..4 {
            slots.push(admitted(&governor, &app(2), Duration::ZERO).await.unwrap());
        }
        slots
    };
}

#[tokio::test(start_paused = true)]
async fn whoever_leaves_the_line_takes_no_slot_with_it() {
    let governor = governor(&Made::new(1_000, PLENTY));
    let mut slots = Vec::new();
    for number in 0..4 {
        slots.push(admitted(&governor, &app(number), Duration::ZERO).await.unwrap());
    }
    let waiter = tokio::spawn({
        let governor = Arc::clone(&governor);
        async move { admitted(&governor, &app(9), Duration::from_secs(5)).await }
    });
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(governor.figures().waiting, 1);
    waiter.abort();
    let _ = waiter.await;
    slots.clear();
    assert_eq!((governor.figures().under_way, governor.figures().waiting), (0, 0));
}
