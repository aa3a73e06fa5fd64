use proptest::prelude::*;

use super::*;

const POLICY: Policy = Policy {
    response_time_us: Some(100_000),
    cpu: Some(300),
    cpu_max: Some(600),
    min: 0,
    max: 2,
    concurrency: None,
    cool_down_ms: 2_000,
};

fn fine() -> Evidence {
    Evidence {
        at_ms: 10_000,
        loaded_ms: 5_000,
        responses: 50,
        p50_us: 10_000,
        p90_us: 20_000,
        in_flight: 4,
        used: 250,
        host_busy: 300,
        quota: Some(300),
        serving: 1,
        ..Evidence::default()
    }
}

fn slow() -> Evidence {
    Evidence { p90_us: 250_000, in_flight: 20, ..fine() }
}

fn throttled(evidence: Evidence) -> Evidence {
    Evidence { periods: 10, throttled: 10, ..evidence }
}

/// What is decided when it has been like that for a second.
fn decided(evidence: Evidence) -> Decision {
    let mut history = History::default();
    for ago in (0..=10).rev() {
        history.observe(&Evidence { at_ms: evidence.at_ms - ago * 100, ..evidence }, &POLICY);
    }
    decide(&evidence, &POLICY, &history)
}

#[test]
fn the_table_of_causes_and_cures() {
    let at_max = Evidence { quota: Some(600), ..throttled(slow()) };
    let full = |evidence| Evidence { host_busy: 1_000, cpu_stalled: 500, ..evidence };
    let queue = Evidence { backlog: 5, ..slow() };
    let held = Evidence { held: 5, ..fine() };
    for (evidence, cause, cure) in [
        (fine(), Cause::Fine, Cure::Nothing),
        (throttled(fine()), Cause::Fine, Cure::Nothing),
        (throttled(slow()), Cause::Quota, Cure::Raise(600)),
        (at_max, Cause::Ceiling, Cure::Add),
        (full(at_max), Cause::Ceiling, Cure::Add),
        (Evidence { serving: 2, ..at_max }, Cause::Ceiling, Cure::Nothing),
        (queue, Cause::Workers, Cure::Add),
        (held, Cause::Workers, Cure::Add),
        (full(queue), Cause::Host, Cure::Nothing),
        (full(slow()), Cause::Host, Cure::Nothing),
        (slow(), Cause::Elsewhere, Cure::Nothing),
        (Evidence { cpu_stalled: 10, ..full(slow()) }, Cause::Elsewhere, Cure::Nothing),
        (Evidence { cpu_stalled: 500, ..slow() }, Cause::Host, Cure::Nothing),
        (Evidence { throttled: 7, ..throttled(slow()) }, Cause::Unclear, Cure::Nothing),
        (Evidence { other_host: true, ..full(slow()) }, Cause::Host, Cure::Add),
        (Evidence { other_host: true, elsewhere: 1, ..full(slow()) }, Cause::Host, Cure::Nothing),
        (Evidence { other_host: true, ..slow() }, Cause::Elsewhere, Cure::Nothing),
        (Evidence { elsewhere: 1, ..queue }, Cause::Workers, Cure::Nothing),
    ] {
        let decision = decided(evidence);
        assert_eq!((decision.cause, decision.cure), (cause, cure), "{evidence:?}");
        assert_eq!(decision.words.is_empty(), matches!(cause, Cause::Fine | Cause::Unclear), "{decision:?}");
    }
}

#[test]
fn a_slow_database_is_named_in_words() {
    let words = decided(slow()).words;
    assert!(words.ends_with("nothing to do here: the time is spent elsewhere"), "{words}");
    assert!(words.starts_with("p90 250 ms (at most 100 ms) over 50 responses"), "{words}");
}

#[test]
fn a_step_that_did_not_help_is_not_repeated_until_the_load_changes() {
    let evidence = throttled(slow());
    let mut history = History::default();
    history.stepped(Cure::Raise(600), &Evidence { at_ms: 0, ..evidence }, &POLICY);
    history.judged(Kind::Raise, Some(evidence.demand()));
    history.observe(&evidence, &POLICY);
    assert_eq!(decide(&evidence, &POLICY, &history).cure, Cure::Nothing);
    let more = Evidence { in_flight: 60, ..evidence };
    assert_eq!(decide(&more, &POLICY, &history).cure, Cure::Raise(600));
}

#[test]
fn instances_go_before_the_quota_and_only_after_calm() {
    let mut history = History::default();
    let mut evidence = Evidence { quota: Some(600), serving: 2, used: 50, ..fine() };
    let mut cures = Vec::new();
    for _ in 0..100 {
        evidence.at_ms += 100;
        history.observe(&evidence, &POLICY);
        let cure = decide(&evidence, &POLICY, &history).cure;
        match cure {
            Cure::Nothing => continue,
            Cure::Remove => evidence.serving -= 1,
            Cure::Lower(to) => evidence.quota = Some(to),
            other => panic!("{other:?}"),
        }
        history.stepped(cure, &evidence, &POLICY);
        cures.push(cure);
    }
    assert_eq!(cures, [Cure::Remove, Cure::Lower(300)]);
}

#[test]
fn a_verdict_needs_load_and_a_difference() {
    let before = throttled(slow());
    let after = |p90_us| Evidence { p90_us, ..before };
    assert_eq!(judge(&before, &after(240_000), &POLICY), Verdict::InVain);
    assert_eq!(judge(&before, &after(130_000), &POLICY), Verdict::Helped);
    assert_eq!(judge(&before, &Evidence { responses: 90, ..before }, &POLICY), Verdict::Helped);
    let early = Evidence { loaded_ms: 300, responses: 4, ..before };
    assert_eq!(judge(&early, &Evidence { responses: 90, ..before }, &POLICY), Verdict::InVain);
    assert_eq!(judge(&early, &Evidence { used: 500, ..before }, &POLICY), Verdict::Helped);
    assert_eq!(judge(&before, &Evidence { in_flight: 1, ..before }, &POLICY), Verdict::Unknown);
    let starved = Evidence { throttled: 0, cpu_stalled: 700, ..before };
    assert_eq!(judge(&before, &starved, &POLICY), Verdict::Unknown);
}

#[test]
fn a_step_soon_after_the_load_began_is_judged_by_the_pace_of_the_responses() {
    let mut history = History::default();
    let at = |at_ms: u64, responses| Evidence {
        at_ms: 10_000 + at_ms,
        loaded_ms: at_ms,
        responses,
        backlog: 4,
        in_flight: 6,
        p90_us: 160_000,
        ..fine()
    };
    for (ms, responses) in [(20, 0), (100, 4), (200, 8), (300, 12)] {
        history.observe(&at(ms, responses), &POLICY);
    }
    let before = history.before(&at(300, 12));
    assert_eq!(before.responses, 40);
    assert_eq!(judge(&before, &at(2_400, 78), &POLICY), Verdict::Helped);
    assert_eq!(judge(&before, &at(2_400, 42), &POLICY), Verdict::InVain);
    let throttled = throttled(at(300, 12));
    assert_eq!(history.before(&throttled), throttled, "it comes in bursts");
}

fn any_evidence() -> impl Strategy<Value = Evidence> {
    let speed = (0u32..200, 0u64..300_000);
    let load = (0u32..50, 0u32..4, 0u32..4);
    let cpu = (0u64..20, 0u64..20, 0u32..1_300, 0u32..=1_000);
    (speed, load, cpu).prop_map(
        |((responses, p90_us), (in_flight, held, backlog), (periods, throttled, used, host_busy))| Evidence {
            responses,
            p50_us: p90_us / 2,
            p90_us,
            in_flight,
            held,
            backlog,
            periods: periods.max(throttled),
            throttled,
            used,
            host_busy,
            cpu_stalled: host_busy / 2,
            ..Evidence::default()
        },
    )
}

proptest! {
    /// A scaler that is obeyed, through any weather.
    #[test]
    fn limits_hold_steps_are_apart_and_all_well_is_left_alone(
        weather in prop::collection::vec((any_evidence(), 1u64..20, any::<bool>()), 1..120),
        (cpu, more, min, extra) in (100u32..1_000, 0u32..1_000, 0u32..3, 0u32..4),
    ) {
        let policy = Policy {
            cpu: Some(cpu), cpu_max: Some(cpu + more), min, max: min.max(1) + extra, ..POLICY
        };
        let mut history = History::default();
        let (mut quota, mut serving, mut now) = (cpu, policy.least(), 0);
        let mut last = None;
        for (evidence, times, helped) in weather {
            for _ in 0..times {
                now += 100;
                let evidence = Evidence { at_ms: now, quota: Some(quota), serving, ..evidence };
                history.observe(&evidence, &policy);
                let Decision { cause, cure, .. } = decide(&evidence, &policy, &history);
                if cure == Cure::Nothing {
                    continue;
                }
                if let Some(last) = last {
                    prop_assert!(now - last >= policy.cool_down_ms, "two steps within the cool-down");
                }
                last = Some(now);
                let adds = matches!(cure, Cure::Raise(_) | Cure::Add);
                prop_assert_eq!(adds, cause != Cause::Fine);
                prop_assert!(!(adds && history.was_in_vain(cure, &evidence)));
                history.stepped(cure, &evidence, &policy);
                match cure {
                    Cure::Raise(to) | Cure::Lower(to) => quota = to,
                    Cure::Add => serving += 1,
                    Cure::Remove => serving -= 1,
                    Cure::Nothing => {}
                }
                prop_assert!((cpu..=cpu + more).contains(&quota));
                prop_assert!((policy.least()..=policy.max).contains(&serving));
                if let Some(kind) = Kind::of(cure).filter(|_| adds) {
                    prop_assert_eq!(decide(&evidence, &policy, &history).cure, Cure::Nothing);
                    history.judged(kind, (!helped).then(|| evidence.demand()));
                }
            }
        }
    }
}

#[test]
fn what_an_instance_does_in_its_boost_is_no_pressure() {
    let hungry = CpuUse { periods: 10, throttled: 10, used: 900, stalled: Some(900) };
    let mut evidence = Evidence { quota: None, cpu_stalled: 0, host_busy: 1_000, ..slow() };
    evidence.add_cpu(&hungry, Some(300), true);
    assert_eq!((evidence.periods, evidence.throttled, evidence.cpu_stalled), (0, 0, 0));
    assert!(!matches!(decided(evidence).cure, Cure::Raise(_) | Cure::Add), "{:?}", decided(evidence));
    assert_ne!(decided(evidence).cause, Cause::Host);

    // The same from an instance that has its quota is.
    evidence.add_cpu(&hungry, Some(300), false);
    assert_eq!(decided(evidence).cure, Cure::Raise(600));
}
