use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

fn candidate(app: &str, tier: Tier, idle_s: u64, wake_us: u64) -> Candidate {
    Candidate {
        app: app.parse().unwrap(),
        generation: Generation(7),
        tier,
        idle: Duration::from_secs(idle_s),
        in_flight: 0,
        memory: 50 * MIB,
        descends: false,
        may_stop: true,
        wake_us,
    }
}

fn chosen(candidates: &[Candidate], shortage: u64, swap_free: u64) -> Vec<(String, Tier)> {
    choose(candidates, shortage, swap_free, 8)
        .into_iter()
        .map(|step| (step.app.to_string(), step.to))
        .collect()
}

#[test]
fn the_coldest_goes_first_of_those_that_wake_alike() {
    let all =
        [candidate("warm", Tier::Reclaimed, 60, 30_000), candidate("cold", Tier::Reclaimed, 600, 30_000)];
    assert_eq!(chosen(&all, 50 * MIB, 0), [("cold".to_owned(), Tier::Stopped)]);
}

#[test]
fn what_wakes_cheaply_goes_before_what_is_a_little_colder() {
    let all =
        [candidate("php", Tier::Reclaimed, 120, 80_000), candidate("static", Tier::Reclaimed, 100, 3_000)];
    assert_eq!(chosen(&all, 50 * MIB, 0), [("static".to_owned(), Tier::Stopped)]);
}

#[test]
fn all_go_to_sleep_before_any_is_stopped() {
    let all = [
        candidate("a", Tier::Running, 30, 1_000),
        candidate("b", Tier::Frozen, 300, 20_000),
        candidate("c", Tier::Reclaimed, 300, 300_000),
    ];
    let steps = chosen(&all, 1_000 * MIB, 10_000 * MIB);
    assert_eq!(
        steps.iter().map(|(_, to)| *to).collect::<Vec<_>>(),
        [Tier::Frozen, Tier::Reclaimed, Tier::Stopped]
    );
}

#[test]
fn no_more_than_is_needed_is_given_up_and_what_is_under_way_counts() {
    let mut all: Vec<_> = ["a", "b", "c", "d"].map(|app| candidate(app, Tier::Reclaimed, 100, 1_000)).into();
    assert_eq!(chosen(&all, 60 * MIB, 0).len(), 2);
    all[3].descends = true;
    assert_eq!(chosen(&all, 60 * MIB, 0).len(), 1);
    assert_eq!(chosen(&all, 40 * MIB, 0).len(), 0);
}

#[test]
fn the_apps_minimum_stays() {
    let all = [Candidate { may_stop: false, ..candidate("kept", Tier::Reclaimed, 1_000, 1) }];
    assert!(chosen(&all, MIB, 0).is_empty());
}

#[test]
fn an_app_teaches_what_its_wakes_take() {
    let mut costs = WakeCosts::default();
    let unknown = costs.of(Tier::Stopped);
    costs.learn(Tier::Stopped, 4_000);
    assert!(costs.of(Tier::Stopped) == 4_000 && unknown > 100_000);
    costs.learn(Tier::Stopped, 14_000);
    assert_eq!(costs.of(Tier::Stopped), 7_000);
    assert_eq!((costs.of(Tier::Running), costs.of(Tier::Frozen)), (0, 1_000));
}

#[test]
fn shortness_does_not_waver() {
    let marks = Marks { low: 1_000 * MIB, stalled: 100 };
    let mut gauge = Gauge::default();
    let mut at = |available: u64, stalled: u32| {
        let reading = Reading { available: available * MIB, stalled, ..Reading::default() };
        (gauge.observe(&reading, &marks), gauge.shortage(&reading, &marks).map(|bytes| bytes / MIB))
    };
    assert_eq!(at(1_100, 0), (None, None));
    assert_eq!(at(900, 0), (Some(Turn::Short), Some(350)));
    assert_eq!(at(1_100, 0), (None, Some(150)));
    assert_eq!(at(1_250, 0), (Some(Turn::Relieved), None));
    assert_eq!(at(2_000, 200), (Some(Turn::Short), Some(0)));
    assert_eq!(at(2_000, 60), (None, Some(0)));
    assert_eq!(at(2_000, 40), (Some(Turn::Relieved), None));
    // A tenant that thrashes within its own limit is nobody else's trouble.
    assert_eq!(at(9_000, 900), (None, None));
}

#[test]
fn the_kernels_account_is_read_and_told() {
    let text =
        "MemTotal:  8388608 kB\nMemFree: 1 kB\nMemAvailable:  524288 kB\nSwapTotal: 5 kB\nSwapFree: 4 kB\n";
    let reading = Reading::of(text, 123);
    assert_eq!(reading, Reading { available: 512 * MIB, total: 8_192 * MIB, swap_free: 4_096, stalled: 123 });
    assert_eq!(
        reading.words(&Marks { low: 800 * MIB, stalled: 100 }),
        "512MiB of 8GiB available (to be kept: 800MiB), something waited for memory in 12.3 % of the time (limit 10.0 %)"
    );
    assert_eq!(Reading::of("", 0).available, u64::MAX);
}

fn anyone() -> impl Strategy<Value = Candidate> {
    let tier =
        prop_oneof![Just(Tier::Running), Just(Tier::Frozen), Just(Tier::Reclaimed), Just(Tier::Stopped)];
    let counts = (0u64..5_000, 0u32..2, 0u64..1 << 30, 0u64..2_000_000);
    (tier, "[a-d]", 1u64..6, counts, any::<bool>(), any::<bool>()).prop_map(
        |(tier, app, generation, (idle_ms, in_flight, memory, wake_us), descends, may_stop)| Candidate {
            app: app.parse().unwrap(),
            generation: Generation(generation),
            tier,
            idle: Duration::from_millis(idle_ms),
            in_flight,
            memory,
            descends,
            may_stop,
            wake_us,
        },
    )
}

proptest! {
    #[test]
    fn whatever_there_is(
        mut all in proptest::collection::vec(anyone(), 0..40),
        shortage in 0u64..1 << 34,
        swap in 0u64..1 << 31,
        most in 0usize..10,
    ) {
        all.sort_by_key(|c| (c.app.clone(), c.generation));
        all.dedup_by_key(|c| (c.app.clone(), c.generation));
        let steps = choose(&all, shortage, swap, most);

        prop_assert!(steps.len() <= most);
        let mut seen = std::collections::BTreeSet::new();
        let mut given = all.iter().filter(|c| c.descends).map(|c| c.memory).sum::<u64>();
        for step in &steps {
            prop_assert!(given < shortage, "nothing more was needed");
            prop_assert!(seen.insert((step.app.clone(), step.generation)), "each goes one tier at a time");
            let it = all.iter().find(|c| (&c.app, c.generation) == (&step.app, step.generation)).unwrap();
            prop_assert_eq!(it.tier.next(), Some(step.to));
            prop_assert!(it.in_flight == 0 && !it.descends && it.idle >= LEAST_IDLE);
            prop_assert!(step.to != Tier::Stopped || it.may_stop);
            given += match step.to { Tier::Stopped => it.memory, Tier::Reclaimed => it.memory.min(swap), _ => 0 };
        }
        // The same host, told in another order, decides the same.
        let mut reversed = all.clone();
        reversed.reverse();
        prop_assert_eq!(choose(&reversed, shortage, swap, most), steps.clone());
        // Whoever was passed over is warmer, or dearer to wake, than the last that was taken.
        if let Some(last) = steps.last() {
            let last = all.iter().find(|c| (&c.app, c.generation) == (&last.app, last.generation)).unwrap();
            for other in all.iter().filter(|c| c.next().is_some() && !seen.contains(&(c.app.clone(), c.generation))) {
                prop_assert!(
                    other.idle.as_micros() * u128::from(last.wake_us.max(1))
                        <= last.idle.as_micros() * u128::from(other.wake_us.max(1))
                );
            }
        }
    }
}
