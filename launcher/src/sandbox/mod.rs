//! Making one container: namespaces, root, mounts, cgroup, network, seccomp, in the order of execution.

mod plan;

pub use plan::{ContainerId, Plan, PlanFds, StepError, StepTiming, VolumePlan};
