//! Starts that fail on purpose: how tests of the whole launcher see that a failed start leaves nothing behind.
//!
//! Only a build for development looks for them: `FC_FAULTS=SEED:PERCENT` in the environment of the daemon, which is
//! root's, makes that share of all starts fail at a step and with an error that follow from the seed, the app and the
//! generation. In a release build nothing fails on purpose, whatever the environment says.

use cmdb::fingerprint::fnv1a;

use crate::sandbox::{ContainerId, Fault, STEPS};

/// Errors that a busy, full, misconfigured or hostile host gives.
pub const ERRNOS: [i32; 12] = [
    libc::EPERM,
    libc::ENOENT,
    libc::EINTR,
    libc::EIO,
    libc::EAGAIN,
    libc::ENOMEM,
    libc::EACCES,
    libc::EBUSY,
    libc::EINVAL,
    libc::EMFILE,
    libc::ENOSPC,
    libc::ELOOP,
];

/// Which starts fail on purpose. The default: none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    seed: u64,
    percent: u64,
}

impl Faults {
    /// Those that the environment asks for; none in a release build.
    #[must_use]
    pub fn from_env() -> Faults {
        if !cfg!(debug_assertions) {
            return Faults::default();
        }
        let faults =
            std::env::var("FC_FAULTS").ok().and_then(|text| Faults::parse(&text)).unwrap_or_default();
        if faults.percent > 0 {
            tracing::warn!(?faults, "FC_FAULTS: starts fail on purpose");
        }
        faults
    }

    fn parse(text: &str) -> Option<Faults> {
        let (seed, percent) = text.split_once(':')?;
        Some(Faults { seed: seed.parse().ok()?, percent: percent.parse().ok()? })
    }

    /// How the start of this container is to fail, if it is.
    #[must_use]
    pub fn of(&self, id: &ContainerId) -> Option<Fault> {
        if self.percent == 0 {
            return None;
        }
        let mut number = fnv1a(format!("{} {} {}", self.seed, id.app, id.generation).as_bytes());
        let mut choose = |among: u64| {
            // The low digits of fnv1a are its best ones, and each choice uses some of them up.
            let chosen = number % among;
            number /= among;
            usize::try_from(chosen).unwrap_or(0)
        };
        if u64::try_from(choose(100)).unwrap_or(0) >= self.percent {
            return None;
        }
        let step = STEPS.get(choose(STEPS.len() as u64))?;
        let errno = *ERRNOS.get(choose(ERRNOS.len() as u64))?;
        Some(Fault { step: (*step).to_owned(), errno, done: choose(2) == 1 })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn id(generation: u64) -> ContainerId {
        ContainerId { app: "blog".to_owned(), generation }
    }

    #[test]
    fn every_step_has_its_turn_and_the_share_is_kept() {
        let faults = Faults::parse("7:50").unwrap();

        let planned: Vec<Fault> = (0..10_000).filter_map(|generation| faults.of(&id(generation))).collect();

        assert!((4_500..5_500).contains(&planned.len()), "{}", planned.len());
        let steps: BTreeSet<&str> = planned.iter().map(|fault| fault.step.as_str()).collect();
        assert_eq!(steps, STEPS.iter().copied().collect());
        assert_eq!(faults.of(&id(3)), faults.of(&id(3)));
    }

    #[test]
    fn nothing_fails_on_purpose_unless_it_is_asked_for() {
        assert!((0..1000).all(|generation| Faults::default().of(&id(generation)).is_none()));
        for nonsense in ["", "1", "x:y", "1:", ":", "-1:5"] {
            assert!(Faults::parse(nonsense).is_none(), "{nonsense}");
        }
    }
}
