//! What a scaler remembers: when it last acted, what was in vain, and since when things are as they are.

use std::collections::VecDeque;

use super::{Cure, Evidence, FEW, Policy, is_calm, verdict::FULL_WINDOW_MS};

/// A step back that was soon regretted makes the next one wait twice as long, up to so many cool-downs.
const PATIENCE_MAX: u64 = 64;

/// See the module.
#[derive(Clone, Debug)]
pub struct History {
    /// When the last step was made, and which.
    last: Option<(u64, Kind)>,
    being_tried: bool,
    in_vain: Vec<(Kind, u32)>,
    slow_since: Option<u64>,
    fine_since: Option<u64>,
    queue_since: Option<u64>,
    calm_since: Option<u64>,
    /// Responses in a second, as counted over the last second: they come in bursts.
    responses: VecDeque<(u64, u32)>,
    /// Cool-downs of calm before a step back.
    patience: u64,
}

/// A [`Cure`] without its number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Of the quota, upwards.
    Raise,
    /// Of the number of instances, upwards.
    Add,
    /// Of either, downwards.
    Back,
}

impl Kind {
    /// Of that cure; `None`: it is no step.
    #[must_use]
    pub fn of(cure: Cure) -> Option<Self> {
        match cure {
            Cure::Nothing => None,
            Cure::Raise(_) => Some(Self::Raise),
            Cure::Add => Some(Self::Add),
            Cure::Lower(_) | Cure::Remove => Some(Self::Back),
        }
    }
}

impl Default for History {
    fn default() -> Self {
        Self {
            last: None,
            being_tried: false,
            in_vain: Vec::new(),
            slow_since: None,
            fine_since: None,
            queue_since: None,
            calm_since: None,
            responses: VecDeque::new(),
            patience: 1,
        }
    }
}

impl History {
    /// Takes note of how things are. To be called with each evidence, before [`super::decide`].
    pub fn observe(&mut self, evidence: &Evidence, policy: &Policy) {
        let now = evidence.at_ms;
        let slow = evidence.is_slow(policy);
        keep_since(&mut self.slow_since, slow, now);
        keep_since(&mut self.queue_since, evidence.queue() > 0, now);
        keep_since(&mut self.calm_since, is_calm(evidence, policy), now);
        keep_since(&mut self.fine_since, !slow && evidence.queue() == 0, now);
        self.responses.retain(|(at, _)| at + 1_000 > now);
        self.responses.push_back((now, evidence.responses));
        // All well for a while: what comes next is another matter.
        if lasts(self.fine_since, now) > policy.cool_down_ms.max(1_000) {
            self.in_vain.clear();
        }
    }

    /// A step is made; one that adds something is on trial until [`Self::judged`].
    pub fn stepped(&mut self, cure: Cure, evidence: &Evidence, policy: &Policy) {
        let Some(kind) = Kind::of(cure) else { return };
        if let Some((at, Kind::Back)) = self.last
            && kind != Kind::Back
        {
            let soon = evidence.at_ms.saturating_sub(at) < policy.cool_down_ms.saturating_mul(3);
            self.patience = if soon { (self.patience * 2).min(PATIENCE_MAX) } else { 1 };
        }
        self.last = Some((evidence.at_ms, kind));
        self.being_tried = kind != Kind::Back;
        self.calm_since = None;
    }

    /// The step on trial is judged; `in_vain` is what was asked of the app when it was made for nothing.
    pub fn judged(&mut self, kind: Kind, in_vain: Option<u32>) {
        self.being_tried = false;
        if let Some(demand) = in_vain {
            self.in_vain.retain(|(other, _)| *other != kind);
            self.in_vain.push((kind, demand));
        }
    }

    /// How things are before a step, with the most responses that were counted in a second lately. Where the load has not
    /// lasted a second yet, it is their pace so far that counts; what a quota stops comes in bursts and has none.
    #[must_use]
    pub fn before(&self, evidence: &Evidence) -> Evidence {
        match self.pace() {
            Some(pace) if evidence.loaded_ms < FULL_WINDOW_MS && !evidence.is_throttled() => {
                Evidence { responses: pace, loaded_ms: FULL_WINDOW_MS, ..*evidence }
            }
            _ => {
                let most = self.responses.iter().map(|(_, count)| *count).max().unwrap_or(0);
                Evidence { responses: most, ..*evidence }
            }
        }
    }

    /// Responses in a second, as they came since the first of this load; `None`: too few to say.
    fn pace(&self) -> Option<u32> {
        let (first, then) = self.responses.iter().find(|(_, count)| *count > 0)?;
        let (last, now) = self.responses.back()?;
        let (time, count) = (last - first, now.checked_sub(*then).filter(|count| *count >= FEW)?);
        let pace = (u64::from(count) * 1_000).checked_div(time)?;
        u32::try_from(pace).ok()
    }

    /// Whether a step waits for its verdict.
    #[must_use]
    pub fn is_being_tried(&self) -> bool {
        self.being_tried
    }

    pub(super) fn must_wait(&self, evidence: &Evidence, policy: &Policy) -> bool {
        let cools = |(at, _)| evidence.at_ms.saturating_sub(at) < policy.cool_down_ms;
        self.being_tried || self.last.is_some_and(cools)
    }

    /// Whether that step did not help while about as much was asked of the app as now.
    pub(super) fn was_in_vain(&self, cure: Cure, evidence: &Evidence) -> bool {
        let now = u64::from(evidence.demand());
        let like = |then: u32| now <= u64::from(then) * 2 && u64::from(then) <= now * 2;
        Kind::of(cure).is_some_and(|kind| self.in_vain.iter().any(|(k, then)| *k == kind && like(*then)))
    }

    pub(super) fn has_been_calm(&self, evidence: &Evidence, policy: &Policy) -> bool {
        let wanted = policy.cool_down_ms.saturating_mul(self.patience);
        self.calm_since.is_some_and(|since| evidence.at_ms.saturating_sub(since) >= wanted)
    }

    pub(super) fn slow_lasts_ms(&self, evidence: &Evidence) -> u64 {
        lasts(self.slow_since, evidence.at_ms)
    }

    pub(super) fn queue_lasts_ms(&self, evidence: &Evidence) -> u64 {
        lasts(self.queue_since, evidence.at_ms)
    }
}

fn lasts(since: Option<u64>, now: u64) -> u64 {
    since.map_or(0, |since| now.saturating_sub(since))
}

fn keep_since(since: &mut Option<u64>, is_so: bool, now: u64) {
    *since = is_so.then(|| since.unwrap_or(now));
}
