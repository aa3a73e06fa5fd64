//! A decision as an operator reads it.

use super::{Cause, Cure, Evidence, HOST_FULL, Policy};

/// Evidence, cause, cure.
pub(super) fn decision(e: &Evidence, policy: &Policy, cause: Cause, cure: Cure, in_vain: bool) -> String {
    format!("{}: {}; {}", evidence(e, policy), why(e, policy, cause), what(e, policy, cause, cure, in_vain))
}

fn evidence(e: &Evidence, policy: &Policy) -> String {
    let limit = policy.response_time_us.map_or(String::new(), |limit| format!(" (at most {})", ms(limit)));
    let mut text = if e.p90_us > 0 {
        format!("p90 {}{limit} over {} responses, {} in flight", ms(e.p90_us), e.responses, e.in_flight)
    } else {
        format!("{} responses in the last second, {} in flight", e.responses, e.in_flight)
    };
    if e.throttled > 0 {
        text += &format!(", throttled in {} of {} periods", e.throttled, e.periods);
    }
    if e.queue() > 0 {
        text += &format!(", {} held and {} not accepted", e.held, e.backlog);
    }
    if e.host_busy >= HOST_FULL {
        text += ", host CPU full";
    }
    if e.memory_stalled >= 100 {
        text += ", host short of memory";
    }
    text + &format!(", {} of a core used", cores(e.used))
}

fn why(e: &Evidence, policy: &Policy, cause: Cause) -> String {
    let quota = e.quota.map_or_else(|| "none".to_owned(), cores);
    match cause {
        Cause::Fine if e.p90_us == 0 => "calm".to_owned(),
        Cause::Fine => "fast enough".to_owned(),
        Cause::Unclear => "the cause is not clear yet".to_owned(),
        Cause::Quota => format!("its CPU quota of {quota} is the cause"),
        Cause::Ceiling if policy.cpu_max > policy.cpu => {
            format!("its CPU quota is the cause, and at its ceiling of {quota}")
        }
        Cause::Ceiling => format!("its CPU quota of {quota} is the cause, and there is no higher cpu-max"),
        Cause::Workers => "its instances have no worker free".to_owned(),
        Cause::Host => "this host has no CPU left".to_owned(),
        Cause::Elsewhere => "neither CPU nor workers are short".to_owned(),
    }
}

fn what(e: &Evidence, policy: &Policy, cause: Cause, cure: Cure, in_vain: bool) -> String {
    match (cure, cause) {
        (Cure::Raise(to), _) => format!("the quota is raised to {}", cores(to)),
        (Cure::Add, Cause::Host) => "an instance is added on another host".to_owned(),
        (Cure::Add, _) => "an instance is added".to_owned(),
        (Cure::Lower(to), _) => format!("the quota is lowered to {}", cores(to)),
        (Cure::Remove, _) => "the youngest instance is drained".to_owned(),
        (Cure::Nothing, _) if in_vain => {
            "nothing is done: the step that would follow did not help before".to_owned()
        }
        (Cure::Nothing, Cause::Elsewhere) => "nothing to do here: the time is spent elsewhere".to_owned(),
        (Cure::Nothing, Cause::Host) if !e.other_host => {
            "nothing to do here: there is no other host".to_owned()
        }
        (Cure::Nothing, Cause::Host) => {
            format!("nothing is done: no more than {} instance(s) may run (scale.max)", policy.max)
        }
        (Cure::Nothing, Cause::Ceiling | Cause::Workers) => {
            format!("nothing is done: no more than {} instance(s) may run (scale.max)", policy.max)
        }
        (Cure::Nothing, _) => "nothing is done".to_owned(),
    }
}

/// Thousandths of a core as an operator writes them.
#[must_use]
pub fn cores(millicores: u32) -> String {
    match millicores % 10 {
        0 => format!("{}%", millicores / 10),
        rest => format!("{}.{rest}%", millicores / 10),
    }
}

fn ms(us: u64) -> String {
    format!("{} ms", us.div_ceil(1_000))
}
