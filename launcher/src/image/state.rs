//! How far the preparation of each image has come, for operators and for whoever waits.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

/// Where an image's preparation is.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Stage {
    /// Waits for its turn.
    #[default]
    Waiting,
    /// Comes over the network.
    Fetching {
        /// Bytes that have come.
        bytes: u64,
        /// Of how many; 0 while that is not known.
        of: u64,
    },
    /// Is being unpacked and verified.
    Unpacking,
    /// A step of its provisioning runs.
    Provisioning {
        /// Which, from 1.
        step: usize,
        /// Of how many.
        of: usize,
        /// What it is called.
        name: String,
    },
    /// Can be used.
    Ready,
    /// Could not be had; it is tried again.
    Failed,
}

/// What is known of an image's preparation.
#[derive(Clone, Debug, Default)]
pub struct Preparation {
    /// Where it is.
    pub stage: Stage,
    /// What is used of it now, see [`super::Layers::id`]; empty when there is nothing.
    pub id: String,
    /// Failures in a row.
    pub failures: u32,
    /// Why the last one failed, when it did.
    pub error: String,
    /// When it is looked at again; `None`: now.
    pub due: Option<Instant>,
}

impl Preparation {
    /// In words, for somebody who waits for it; `None` when it can be used.
    #[must_use]
    pub fn why_not(&self) -> Option<String> {
        match self.stage {
            Stage::Ready => None,
            Stage::Waiting => Some("waits for its turn to be prepared".to_owned()),
            Stage::Fetching { bytes: 0, of: 0 } => Some("is being fetched".to_owned()),
            Stage::Fetching { bytes, of } => {
                Some(format!("is being fetched ({} of {} MiB have come)", bytes >> 20, of.max(bytes) >> 20))
            }
            Stage::Provisioning { step, of, ref name } => {
                Some(format!("is being provisioned: step {step} of {of}, {name:?}, runs"))
            }
            Stage::Unpacking => Some("is being unpacked".to_owned()),
            Stage::Failed => Some(format!("could not be prepared: {}", self.error)),
        }
    }
}

/// All that is known of all preparations, by the image's name.
#[derive(Debug, Default)]
pub(super) struct States {
    known: BTreeMap<String, Preparation>,
}

/// From the first failure to the longest wait between tries.
const FIRST_WAIT: Duration = Duration::from_secs(2);
const LONGEST_WAIT: Duration = Duration::from_secs(300);

impl States {
    pub(super) fn get(&self, image: &str) -> Option<&Preparation> {
        self.known.get(image)
    }

    pub(super) fn stage(&mut self, image: &str, stage: Stage) {
        self.known.entry(image.to_owned()).or_default().stage = stage;
    }

    pub(super) fn ready(&mut self, image: &str, id: &str, next_look: Duration) {
        let due = Some(Instant::now() + next_look);
        let ready = Preparation { stage: Stage::Ready, id: id.to_owned(), due, ..Preparation::default() };
        self.known.insert(image.to_owned(), ready);
    }

    /// What can still be used stays in use.
    pub(super) fn failed(&mut self, image: &str, error: &str, usable: Option<String>) {
        let state = self.known.entry(image.to_owned()).or_default();
        state.stage = if usable.is_some() { Stage::Ready } else { Stage::Failed };
        state.id = usable.unwrap_or_default();
        state.failures = state.failures.saturating_add(1);
        error.clone_into(&mut state.error);
        let wait = FIRST_WAIT * 2_u32.saturating_pow(state.failures.saturating_sub(1).min(10));
        state.due = Some(Instant::now() + wait.min(LONGEST_WAIT));
    }

    /// Has it looked at no later than then.
    pub(super) fn look_by(&mut self, image: &str, at: Instant) -> bool {
        let Some(state) = self.known.get_mut(image) else { return false };
        let sooner = state.due.is_some_and(|due| due > at);
        if sooner {
            state.due = Some(at);
        }
        sooner
    }

    pub(super) fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        self.known.retain(|image, _| wanted(image));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_tried_again_later_and_later() {
        let mut states = States::default();
        let mut waits = Vec::new();
        for _ in 0..12 {
            states.failed("a", "no", None);
            let wait = states.get("a").unwrap().due.unwrap() - Instant::now();
            waits.push((wait + Duration::from_millis(500)).as_secs());
        }
        assert_eq!(waits[..4], [2, 4, 8, 16]);
        assert_eq!(waits[11], 300);
        assert_eq!(states.get("a").unwrap().why_not().unwrap(), "could not be prepared: no");
    }

    #[test]
    fn a_failure_leaves_what_can_be_used() {
        let mut states = States::default();
        states.failed("a", "no", Some("oci-1".into()));
        assert_eq!(states.get("a").unwrap().why_not(), None);
        assert_eq!(states.get("a").unwrap().error, "no");
    }
}
