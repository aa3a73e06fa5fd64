//! Which system calls a container may make, and the filter that holds it to them.
//!
//! The policy is data ([`table`]); [`bpf`] turns it into a program of the kernel's filter machine. A container is
//! always an unprivileged one, so the policy is stricter than Docker's default profile: what needs a capability of
//! the host is refused before the kernel has to.

mod bpf;
mod table;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use super::step::{About, Failure};
use super::sys;

/// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV` (Linux 5.19): once the supervisor has taken a notification, only a fatal
/// signal interrupts the caller, so that a timer's signal does not make the app repeat its `listen()`.
const WAIT_KILLABLE_RECV: libc::c_ulong = 1 << 5;

/// What the filter says to one call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verdict {
    Allow,
    /// The call fails with this error.
    Refuse(u16),
    /// The supervisor is asked.
    Notify,
    /// The process ends: only for a foreign instruction set.
    Kill,
}

/// What the policy says about one call number.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Rule {
    Always(Verdict),
    /// Allowed if none of these bits is set in an argument's lower half, else refused.
    NoneOf {
        argument: u32,
        bits: u32,
        refusal: u16,
    },
    /// Allowed if an argument's lower half (all that the kernel reads of an `int`) is one of these, else refused.
    OneOf {
        argument: u32,
        values: &'static [u32],
        refusal: u16,
    },
}

/// A whole policy, for one instruction set.
struct Policy {
    /// `AUDIT_ARCH_…` of the only instruction set that may run.
    arch: u32,
    rules: BTreeMap<u32, Rule>,
    /// The highest number that the policy knows. What is newer "does not exist", so that libraries fall back.
    newest: u32,
}

/// The programs that containers get, made once and used for all of them.
pub(super) struct Filters {
    notifying: Vec<libc::sock_filter>,
    plain: Vec<libc::sock_filter>,
}

impl Filters {
    /// The programs; the first call makes them.
    pub(super) fn prepared() -> &'static Filters {
        static FILTERS: OnceLock<Filters> = OnceLock::new();
        FILTERS.get_or_init(|| {
            let mut policy = table::policy();
            let notifying = bpf::compile(&policy);
            policy.allow_notified();
            Filters { notifying, plain: bpf::compile(&policy) }
        })
    }

    /// Puts this process and its descendants under the policy; returns where `listen()` calls are announced, or
    /// `None` if the kernel allows no listener because there already is one above us.
    pub(super) fn install(&self) -> Result<Option<OwnedFd>, Failure> {
        let einval = |error: &std::io::Error| error.raw_os_error() == Some(libc::EINVAL);
        let listener = match sys::seccomp_listener(&self.notifying, WAIT_KILLABLE_RECV) {
            Err(error) if einval(&error) => sys::seccomp_listener(&self.notifying, 0),
            other => other,
        };
        match listener {
            Ok(listener) => Ok(Some(listener)),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                sys::seccomp_filter(&self.plain).about("without listener")?;
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl Policy {
    /// For a container without supervisor: what would be announced is simply allowed.
    fn allow_notified(&mut self) {
        for rule in self.rules.values_mut() {
            if *rule == Rule::Always(Verdict::Notify) {
                *rule = Rule::Always(Verdict::Allow);
            }
        }
    }

    /// The rule for a call number, listed or not.
    fn rule(&self, number: u32) -> Rule {
        let unlisted = if number > self.newest { libc::ENOSYS } else { libc::EPERM };
        self.rules.get(&number).cloned().unwrap_or(Rule::Always(refuse(unlisted)))
    }
}

fn refuse(errno: i32) -> Verdict {
    Verdict::Refuse(u16::try_from(errno).unwrap_or(1))
}
