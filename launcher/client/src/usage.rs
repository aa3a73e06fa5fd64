//! What apps have used, as the launcher's ledger counts it.

use cmdb::AppName;
use serde::{Deserialize, Serialize};

/// Seconds in an hour, the ledger's smallest span.
pub const HOUR_S: u64 = 3_600;

/// What was used in some span of time.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Figures {
    /// CPU time, µs.
    pub cpu_us: u64,
    /// Memory charged, integrated over time: bytes × seconds.
    pub memory_byte_s: u64,
    /// Time for which instances existed and were not frozen, summed over the instances, µs.
    pub running_us: u64,
    /// Time for which instances were frozen, summed over them, µs.
    pub frozen_us: u64,
    /// Time for which requests waited for an instance, summed over the requests, µs.
    pub held_us: u64,
    /// Requests that have ended.
    pub requests: u64,
    /// Bytes of request bodies.
    pub bytes_in: u64,
    /// Bytes of response bodies.
    pub bytes_out: u64,
    /// Instances begun, failed starts among them.
    pub wakes: u64,
}

/// One line of the ledger.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Usage {
    /// Begin of the span, seconds since the Unix epoch.
    pub from_unix_s: u64,
    /// Its length, seconds.
    pub span_s: u64,
    /// Which app; `None`: the parent of all cgroups, of which only the CPU time is counted.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub app: Option<AppName>,
    /// What was used.
    #[serde(flatten)]
    pub figures: Figures,
}

/// Into which spans usage is summed up. Hours and days are UTC's.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Span {
    /// The whole time that was asked for.
    All,
    /// Days.
    Day,
    /// Hours; what is older than the hours that are kept, days.
    Hour,
}

/// What one app's visitors did since the proxy that counts them began. Totals, so that none is lost or counted twice
/// when a report is, or when the launcher dies.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Traffic {
    /// Which app.
    pub app: AppName,
    /// Its totals.
    pub totals: Totals,
}

/// See [`Traffic`]; each is the [`Figures`]' one of the same name.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Totals {
    /// Requests that have ended.
    pub requests: u64,
    /// Bytes of request bodies.
    pub bytes_in: u64,
    /// Bytes of response bodies.
    pub bytes_out: u64,
    /// Time for which requests waited, µs.
    pub held_us: u64,
}

impl Figures {
    /// In the order in which they are written down.
    #[must_use]
    pub fn to_array(self) -> [u64; 9] {
        [
            self.cpu_us,
            self.memory_byte_s,
            self.running_us,
            self.frozen_us,
            self.held_us,
            self.requests,
            self.bytes_in,
            self.bytes_out,
            self.wakes,
        ]
    }

    /// From what [`Self::to_array`] gave.
    #[must_use]
    pub fn from_array(values: [u64; 9]) -> Self {
        let [cpu_us, memory_byte_s, running_us, frozen_us, held_us, requests, bytes_in, bytes_out, wakes] =
            values;
        Self { cpu_us, memory_byte_s, running_us, frozen_us, held_us, requests, bytes_in, bytes_out, wakes }
    }
}

impl std::ops::AddAssign for Figures {
    fn add_assign(&mut self, other: Self) {
        let mut sum = self.to_array();
        sum.iter_mut().zip(other.to_array()).for_each(|(a, b)| *a = a.saturating_add(b));
        *self = Self::from_array(sum);
    }
}
