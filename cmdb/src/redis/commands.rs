//! Commands to Redis for which somebody waits: bounded in time, and given up at once while Redis does not answer.

use std::{
    sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use redis::{RedisError, RedisResult, Script, aio::MultiplexedConnection};
use tokio::{sync::Mutex, time::timeout};

use super::{
    address::Address,
    stored::{self, Stored},
};
use crate::{
    app::{AppName, HostPattern},
    store::StoreError,
};

/// After so many failures in a row nobody waits any more, until the follower has seen Redis answer again.
const BREAKS_AFTER: u32 = 3;
/// How far a caller's idea of the server's clock may be off, ms.
const CLOCK_MAY_BE_OFF_MS: u64 = 250;
/// A confirmation of many removals holds for so long, s: also those learn of it that are just connecting.
const REMOVALS_MEANT_S: u64 = 60;
/// A removed app is remembered for so long, s: whoever was cut off learns of it.
const TOMBSTONE_S: u64 = 86_400;

/// A name that was claimed stands for so long, ms, before the app that claimed it must be seen to have it.
const CLAIM_STANDS_MS: u64 = 10_000;

pub(super) static SWAP: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("swap.lua")));
pub(super) static READ: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("read.lua")));
static CLAIM: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("claim.lua")));

/// See the module.
#[derive(Debug)]
pub(super) struct Commands {
    address: Address,
    budget: Duration,
    connection: Mutex<Option<MultiplexedConnection>>,
    failures: AtomicU32,
    breaks_after: u32,
}

/// What became of a [`Commands::swap`]. Times in ms since the Unix epoch, by the server's clock.
pub(super) enum Swapped {
    /// Done, at this time.
    Done(u64),
    /// It is not as the caller thought, or the time is not: this is how it is.
    Otherwise(u64, Vec<Vec<u8>>),
}

/// What is to be written in place of what.
pub(super) struct Swap<'a> {
    pub(super) app: &'a AppName,
    /// What is there, as far as the caller knows.
    pub(super) from: &'a Stored,
    /// The caller's idea of the server's clock, ms; `None`: the time does not matter.
    pub(super) now_ms: Option<u64>,
    /// Fields and values; an empty value removes the field.
    pub(super) to: Vec<(&'static str, String)>,
}

impl Commands {
    pub(super) fn new(address: Address, budget: Duration) -> Self {
        let (connection, failures) = (Mutex::new(None), AtomicU32::new(0));
        Self { address, budget, connection, failures, breaks_after: BREAKS_AFTER }
    }

    /// Tries each command, however many have failed: for those for which no request waits.
    pub(super) fn untiring(address: Address, budget: Duration) -> Self {
        Self { breaks_after: u32::MAX, ..Self::new(address, budget) }
    }

    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// Redis answers others: the next command is tried again, and one more failure is enough to give up.
    pub(super) fn half_open(&self) {
        self.failures.fetch_min(BREAKS_AFTER - 1, Ordering::Relaxed);
    }

    /// The next command goes to whoever is primary by then.
    pub(super) async fn leave(&self) {
        *self.connection.lock().await = None;
    }

    /// Replaces an app's hash if it is as the caller thinks. A swap that writes nothing confirms what the caller knows.
    pub(super) async fn swap(&self, swap: &Swap<'_>) -> Result<Swapped, StoreError> {
        let mut call = SWAP.key(stored::key(swap.app));
        let (now, off) = match swap.now_ms {
            Some(now) => (now, CLOCK_MAY_BE_OFF_MS),
            None => (0, u64::MAX >> 11),
        };
        let removes = swap.to.iter().any(|(field, value)| *field == "spec" && value.is_empty());
        call.arg(&swap.from.rev).arg(&swap.from.srev).arg(now).arg(off);
        call.arg(if removes { TOMBSTONE_S } else { 0 });
        for (field, value) in &swap.to {
            call.arg(*field).arg(value);
        }
        let reply: Vec<Vec<u8>> = self.call(async |mut to| call.invoke_async(&mut to).await).await?;
        let now = reply.get(1).and_then(|now| std::str::from_utf8(now).ok()?.parse().ok());
        match (reply.first().map(Vec::as_slice), now) {
            (Some(b"1"), Some(now)) => Ok(Swapped::Done(now)),
            (Some(b"0"), Some(now)) => Ok(Swapped::Otherwise(now, reply[2..].to_vec())),
            _ => Err(StoreError::Unavailable("Redis answered a script with something else".to_owned())),
        }
    }

    /// An app's hash as it is.
    pub(super) async fn read(&self, app: &AppName) -> Result<Vec<Vec<u8>>, StoreError> {
        let mut call = READ.key(stored::key(app));
        call.arg(stored::RECORD_MAX).arg(stored::SPEC_MAX);
        self.call(async |mut to| call.invoke_async(&mut to).await).await
    }

    /// Takes a server-name for `app`, also from `left`, which is not seen to have it, unless it has just claimed it. Returns whose it is now.
    pub(super) async fn claim(
        &self,
        name: &HostPattern,
        app: &AppName,
        left: Option<&AppName>,
    ) -> Result<String, StoreError> {
        let mut call = CLAIM.key(stored::name_key(name));
        call.arg(app.as_str()).arg(left.map_or("", AppName::as_str)).arg("1").arg(CLAIM_STANDS_MS);
        self.call(async |mut to| call.invoke_async(&mut to).await).await
    }

    /// Gives a server-name back, if it is `app`'s.
    pub(super) async fn give_back(&self, name: &HostPattern, app: &AppName) -> Result<(), StoreError> {
        let mut call = CLAIM.key(stored::name_key(name));
        call.arg(app.as_str()).arg("").arg("0").arg(0);
        self.call(async |mut to| call.invoke_async::<String>(&mut to).await).await.map(drop)
    }

    /// Every process that has kept apps because too many were missing at once lets them go.
    pub(super) async fn confirm_removals(&self) -> Result<(), StoreError> {
        let mut set = redis::cmd("SET");
        set.arg(stored::REMOVALS_MEANT).arg("1").arg("EX").arg(REMOVALS_MEANT_S);
        self.call(async |mut to| set.query_async(&mut to).await).await
    }

    /// One command on the shared connection, within the budget.
    pub(super) async fn call<T>(
        &self,
        command: impl AsyncFnOnce(MultiplexedConnection) -> RedisResult<T>,
    ) -> Result<T, StoreError> {
        if self.failures.load(Ordering::Relaxed) >= self.breaks_after {
            return Err(StoreError::Unavailable("Redis has not answered lately".to_owned()));
        }
        let within_budget = timeout(self.budget, async { command(self.connection().await?).await }).await;
        let failed = match within_budget {
            Ok(Ok(value)) => {
                self.failures.store(0, Ordering::Relaxed);
                return Ok(value);
            }
            Ok(Err(error)) if is_refusal(&error) => return Err(StoreError::Unavailable(error.to_string())),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("Redis has not answered within {} ms", self.budget.as_millis()),
        };
        self.failures.fetch_add(1, Ordering::Relaxed);
        // Answers that come late must not be taken for those of later commands, and a demoted primary must be left.
        if let Ok(mut connection) = self.connection.try_lock() {
            *connection = None;
        }
        Err(StoreError::Unavailable(failed))
    }

    async fn connection(&self) -> RedisResult<MultiplexedConnection> {
        let mut connection = self.connection.lock().await;
        if let Some(connection) = &*connection {
            return Ok(connection.clone());
        }
        let new = self.address.connect(self.budget, None::<NoPushes>).await?;
        *connection = Some(new.clone());
        Ok(new)
    }
}

/// The kind of a push sender that is not there.
pub(super) type NoPushes = tokio::sync::mpsc::UnboundedSender<redis::PushInfo>;

/// Redis answered, and said no, for a reason that a new connection does not mend.
fn is_refusal(error: &RedisError) -> bool {
    let code = error.code().unwrap_or_default();
    !error.is_io_error()
        && !error.is_connection_dropped()
        && !matches!(code, "READONLY" | "NOREPLICAS" | "LOADING" | "MASTERDOWN" | "")
}
