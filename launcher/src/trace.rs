//! Where the time of a start goes: each µs belongs to exactly one step, so that the steps sum to the whole.

use launcher_client::wire::{Step, WakeTiming};

use crate::{clock::unix_us, keeper::monotonic_us};

/// A start under way. All times but `begun_unix_us` are of [`monotonic_us`].
#[derive(Clone, Debug)]
pub(crate) struct Trace {
    begun_unix_us: u64,
    begun: u64,
    /// End of the last lap: from here on the spawner and the new process have the work.
    handed: u64,
    laps: Vec<Step>,
    sandbox: Vec<Step>,
    execed: Option<u64>,
}

impl Trace {
    /// The clock runs.
    pub(crate) fn begin() -> Self {
        Self::at(unix_us(), monotonic_us())
    }

    fn at(begun_unix_us: u64, now: u64) -> Self {
        Self { begun_unix_us, begun: now, handed: now, laps: Vec::new(), sandbox: Vec::new(), execed: None }
    }

    /// The start of an instance that an earlier daemon began: only when is known of it, see [`Self::unknown`].
    pub(crate) fn of_earlier(begun_unix_us: u64) -> Self {
        Self::at(begun_unix_us, monotonic_us())
    }

    /// What is told of a start that nobody has timed.
    pub(crate) fn unknown(&self) -> WakeTiming {
        WakeTiming { begun_us: self.begun_unix_us, ..WakeTiming::default() }
    }

    /// When it began, µs since the Unix epoch.
    pub(crate) fn begun_unix_us(&self) -> u64 {
        self.begun_unix_us
    }

    /// A part of the daemon's own work is done.
    pub(crate) fn lap(&mut self, name: &str) {
        self.lap_at(name, monotonic_us());
    }

    fn lap_at(&mut self, name: &str, now: u64) {
        self.laps.push(step(name, self.handed, now));
        self.handed = now.max(self.handed);
    }

    /// The app's program was executed at `at`, after the sandbox's own `steps`.
    pub(crate) fn execed(&mut self, steps: impl IntoIterator<Item = Step>, at: u64) {
        self.sandbox = steps.into_iter().collect();
        self.execed = Some(at);
    }

    /// The app listens since `at`, and we know it now.
    pub(crate) fn ready(&self, at: u64) -> WakeTiming {
        self.ready_at(at, monotonic_us())
    }

    fn ready_at(&self, listens: u64, now: u64) -> WakeTiming {
        let now = now.max(self.handed);
        let listens = listens.clamp(self.handed, now);
        // The spawner notes the exec when it gets to it, which may be after the app listened.
        let execed = self.execed.unwrap_or(self.handed).clamp(self.handed, listens);
        // The sandbox's steps lie between our handing over and the exec. What is left is the way there, the spawner's
        // own work, and its noticing of the exec. (The daemon's round trip to the spawner overlaps them: not a step.)
        let in_sandbox: u64 = self.sandbox.iter().map(|step| step.us).sum();
        let spawner = (execed - self.handed).saturating_sub(in_sandbox);
        let mut steps = self.laps.clone();
        steps.push(Step { name: "spawner".into(), us: spawner });
        steps.extend(self.sandbox.iter().cloned());
        steps.push(step("app", execed, listens));
        steps.push(step("notice", listens, now));
        WakeTiming {
            begun_us: self.begun_unix_us,
            total_us: now.saturating_sub(self.begun),
            steps,
            warm: false,
        }
    }
}

fn step(name: &str, from: u64, to: u64) -> Step {
    Step { name: name.to_owned(), us: to.saturating_sub(from) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox() -> [Step; 2] {
        [Step { name: "clone".into(), us: 900 }, Step { name: "mount".into(), us: 100 }]
    }

    fn begun() -> Trace {
        let mut trace = Trace::at(7, 1_000);
        trace.lap_at("image", 1_200);
        trace.lap_at("cgroup", 1_500);
        trace
    }

    fn shown(timing: &WakeTiming) -> Vec<(&str, u64)> {
        timing.steps.iter().map(|step| (step.name.as_str(), step.us)).collect()
    }

    fn sum(timing: &WakeTiming) -> u64 {
        timing.steps.iter().map(|step| step.us).sum()
    }

    #[test]
    fn each_microsecond_belongs_to_one_step() {
        let mut trace = begun();
        trace.execed(sandbox(), 2_800);

        let timing = trace.ready_at(3_400, 3_450);

        assert_eq!(
            shown(&timing),
            [
                ("image", 200),
                ("cgroup", 300),
                ("spawner", 300),
                ("clone", 900),
                ("mount", 100),
                ("app", 600),
                ("notice", 50)
            ]
        );
        assert_eq!((timing.begun_us, timing.total_us), (7, 2_450));
        assert_eq!(sum(&timing), timing.total_us);
    }

    #[test]
    fn a_spawner_that_notices_the_exec_late_does_not_spoil_the_sum() {
        let mut trace = begun();
        trace.execed(sandbox(), 3_900);

        let timing = trace.ready_at(3_400, 4_000);

        assert_eq!(sum(&timing), timing.total_us);
    }

    #[test]
    fn an_app_that_listens_before_its_exec_is_known_has_a_sum_too() {
        let timing = begun().ready_at(3_400, 3_450);

        assert_eq!(sum(&timing), timing.total_us);
    }
}
