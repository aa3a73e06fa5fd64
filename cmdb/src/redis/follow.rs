//! Follows Redis: every change, every loss, for as long as the store lives.
//!
//! Rules (notes, A3): tracking is on before anything is read; what changes while it is read is read again; a link that is
//! silent is asked each second; after every gap all is read anew, and the mirror serves meanwhile.

use std::{collections::HashSet, sync::Arc, time::Duration};

use redis::{RedisError, RedisResult, aio::MultiplexedConnection};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};

use super::{
    Role, Shared,
    commands::{NoPushes, READ},
    dirty::{Changed, Dirty},
    remembered::Identity,
    stored::{self, Stored},
};
use crate::app::AppName;

/// The tracking link is asked so often whether it lives.
const PING_EVERY: Duration = Duration::from_secs(1);
/// It is dead when it does not answer for so long.
const PING_WITHIN: Duration = Duration::from_millis(500);
/// The Sentinels are asked so often whether they have another primary: one that was cut off from them goes on answering.
const ASK_EVERY: Duration = Duration::from_secs(2);
/// Everything is compared so often, should a message have been lost.
const COMPARE_EVERY: Duration = Duration::from_secs(60);
/// The longest that one reading of a batch may take.
const READ_WITHIN: Duration = Duration::from_secs(5);
/// Apps that are read in one go.
const BATCH: usize = 256;
/// Pauses between attempts to connect.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MOST: Duration = Duration::from_secs(2);

/// One life of a link to Redis.
struct Session<'a> {
    shared: &'a Shared,
    dirty: Arc<Dirty>,
    tracker: MultiplexedConnection,
    reader: MultiplexedConnection,
    /// Whom the Sentinels called primary when it began.
    primary: Option<String>,
    identity: Identity,
}

/// Never returns; the store aborts it.
pub(super) async fn follow(shared: Arc<Shared>) {
    let mut pause = RETRY_FIRST;
    let mut last = shared.lock().identity.clone();
    loop {
        let ended = match Session::begin(&shared).await {
            Ok(mut session) => {
                pause = RETRY_FIRST;
                session.run(&mut last).await
            }
            Err(error) => error,
        };
        let was_connected = shared.link.borrow().connected;
        shared.link.send_modify(|link| link.connected = false);
        if was_connected || pause == RETRY_FIRST {
            tracing::warn!(error = %ended, "the CMDB cannot be followed; what is known of it is used until it can");
        }
        // Many processes lose the same Redis: they must not all come back at the same moment.
        sleep(pause.mul_f64(0.5 + jitter())).await;
        pause = (pause * 2).min(RETRY_MOST);
    }
}

impl<'a> Session<'a> {
    async fn begin(shared: &'a Shared) -> RedisResult<Self> {
        let address = shared.commands.address();
        let dirty = Arc::new(Dirty::default());
        let primary = address.primary().await;
        let mut tracker = address.connect(PING_WITHIN, Some(dirty.listener())).await?;
        let reader = address.connect(READ_WITHIN, None::<NoPushes>).await?;
        let mut on = redis::cmd("CLIENT");
        on.arg("TRACKING").arg("ON").arg("BCAST").arg("PREFIX").arg(stored::TRACKED);
        on.query_async::<()>(&mut tracker).await?;
        Ok(Self { shared, dirty, tracker, reader, primary, identity: Identity::default() })
    }

    /// Returns why it ended.
    async fn run(&mut self, last: &mut Identity) -> RedisError {
        match self.work(last).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn work(&mut self, last: &mut Identity) -> RedisResult<std::convert::Infallible> {
        self.identity = self.identify().await?;
        let restored = *last != Identity::default() && *last != self.identity;
        self.read_all(restored).await?;
        self.set_last(last);
        self.tell_untold().await;
        if let Some(own) = self.shared.node() {
            let _ = self.shared.take_number(own).await;
        }
        // Before anybody learns that all is there; should it fail, they are looked at again at once by those who follow them.
        let _ = self.shared.look_at_hosts().await;
        self.shared.commands.half_open();
        self.shared.link.send_replace(super::Link { filled: true, connected: true });

        let mut ping = interval_at(Instant::now() + PING_EVERY, PING_EVERY);
        let mut compare = interval_at(Instant::now() + COMPARE_EVERY, COMPARE_EVERY);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        compare.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ask = interval_at(Instant::now() + ASK_EVERY, ASK_EVERY);
        ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (dirty, shared) = (Arc::clone(&self.dirty), self.shared);
        loop {
            tokio::select! {
                changed = dirty.changed() => self.take_in(changed, last).await?,
                () = shared.untold.notified() => self.tell_untold().await,
                _ = ping.tick() => self.check(last).await?,
                _ = ask.tick(), if self.primary.is_some() => self.check_primary().await?,
                _ = compare.tick() => self.read_all(false).await?,
            }
        }
    }

    async fn take_in(&mut self, changed: Changed, last: &mut Identity) -> RedisResult<()> {
        if changed.lost {
            return Err(RedisError::from((redis::ErrorKind::Io, "the connection was closed")));
        }
        if changed.all {
            return self.check_identity(last, true).await;
        }
        let apps: Vec<AppName> = changed.apps.into_iter().collect();
        let mut gone = Vec::new();
        for batch in apps.chunks(BATCH) {
            for (app, theirs) in self.read(batch).await? {
                if theirs.srev.is_empty() && theirs.rev.is_empty() {
                    gone.push(app);
                } else {
                    self.shared.lock().install(&app, theirs);
                }
            }
        }
        if gone.is_empty() {
            return Ok(());
        }
        // Deleted by hand, or all of Redis was flushed, and then it has been filled again by now.
        self.check_identity(last, false).await?;
        self.forget_missing(&gone).await
    }

    /// Once a second: is the link alive, is it the same Redis, is there something to tell?
    async fn check(&mut self, last: &mut Identity) -> RedisResult<()> {
        let ping = redis::cmd("PING");
        let answer = timeout(PING_WITHIN, ping.query_async::<()>(&mut self.tracker)).await;
        answer.unwrap_or_else(|_| Err(RedisError::from((redis::ErrorKind::Io, "it does not answer"))))?;
        self.shared.commands.half_open();
        self.check_identity(last, false).await?;
        self.tell_untold().await;
        Ok(())
    }

    async fn check_primary(&self) -> RedisResult<()> {
        let now = self.shared.commands.address().primary().await;
        if now.is_none() || now == self.primary {
            return Ok(());
        }
        self.shared.commands.leave().await;
        self.shared.hosts.leave().await;
        Err(RedisError::from((redis::ErrorKind::Io, "the Sentinels have another primary")))
    }

    /// Another epoch or another history: something may be lost. Then, or when asked to, everything is read.
    async fn check_identity(&mut self, last: &mut Identity, read_all: bool) -> RedisResult<()> {
        let now = self.identify().await?;
        let restored = now != self.identity;
        self.identity = now;
        if restored || read_all {
            self.read_all(restored).await?;
            self.tell_untold().await;
        }
        self.set_last(last);
        Ok(())
    }

    /// All has been compared with this Redis.
    fn set_last(&self, last: &mut Identity) {
        if *last != self.identity {
            last.clone_from(&self.identity);
            self.shared.lock().identity.clone_from(&self.identity);
        }
    }

    /// Which Redis this is; one that has no epoch gets one, if we may write.
    async fn identify(&mut self) -> RedisResult<Identity> {
        let get = redis::cmd("GET").arg(stored::EPOCH).to_owned();
        let mut epoch: Option<String> = get.query_async(&mut self.reader).await?;
        if epoch.is_none() && self.shared.role != Role::Reader {
            let mut set = redis::cmd("SET");
            set.arg(stored::EPOCH).arg(new_epoch()).arg("NX");
            set.query_async::<Option<String>>(&mut self.reader).await?;
            epoch = get.query_async(&mut self.reader).await?;
        }
        // Some providers do not tell; then the epoch must do.
        let info: RedisResult<String> =
            redis::cmd("INFO").arg("replication").query_async(&mut self.reader).await;
        let history = info.ok().and_then(|info| {
            info.lines().find_map(|line| line.strip_prefix("master_replid:")).map(|id| id.trim().to_owned())
        });
        Ok(Identity { epoch: epoch.unwrap_or_default(), history: history.unwrap_or_default() })
    }

    /// Reads everything. `restored`: what Redis lacks it has lost, so nothing is removed, and this node tells what it runs.
    async fn read_all(&mut self, restored: bool) -> RedisResult<()> {
        let mut seen = HashSet::new();
        let mut cursor = String::from("0");
        loop {
            let mut scan = redis::cmd("SCAN");
            scan.arg(&cursor).arg("MATCH").arg(stored::all_keys()).arg("COUNT").arg(BATCH);
            let (next, keys): (String, Vec<Vec<u8>>) = scan.query_async(&mut self.reader).await?;
            let apps: Vec<AppName> = keys.iter().filter_map(|key| stored::app_of(key)).collect();
            for batch in apps.chunks(BATCH) {
                for (app, theirs) in self.read(batch).await? {
                    self.compare(&app, theirs, restored);
                }
                seen.extend(batch.iter().cloned());
            }
            if next == "0" {
                break;
            }
            cursor = next;
        }
        self.mind_missing(&seen, restored).await
    }

    fn compare(&self, app: &AppName, theirs: Stored, restored: bool) {
        let mut state = self.shared.lock();
        if !restored {
            state.install(app, theirs);
        } else if self.may_tell() && state.knows_better(app, &theirs, self.shared.node()) {
            state.set_untold(app, None);
        } else {
            state.install_whatever(app, theirs);
        }
    }

    fn may_tell(&self) -> bool {
        self.shared.role != Role::Reader
    }

    async fn mind_missing(&mut self, seen: &HashSet<AppName>, restored: bool) -> RedisResult<()> {
        let missing = self.shared.lock().missing(seen);
        if missing.is_empty() {
            return Ok(());
        }
        if restored {
            tracing::error!(
                "the CMDB was emptied or restored: {} apps are missing; they are kept",
                missing.len()
            );
            let mut state = self.shared.lock();
            for app in missing.iter().filter(|_| self.may_tell()) {
                state.set_untold(app, None);
            }
            return Ok(());
        }
        // One that has just been put may have come after its part of the key space was read.
        self.forget_missing(&missing).await
    }

    async fn forget_missing(&mut self, missing: &[AppName]) -> RedisResult<()> {
        let mut gone = Vec::new();
        for batch in missing.chunks(BATCH) {
            let read = self.read(batch).await?;
            gone.extend(read.into_iter().filter(|(_, theirs)| theirs.srev.is_empty()).map(|(app, _)| app));
        }
        // Asked afterwards: a Redis that was emptied in between has lost them, and its new epoch will have all told anew.
        if gone.is_empty() || self.identify().await? != self.identity {
            return Ok(());
        }
        if self.shared.lock().is_mishap(&gone) {
            let confirmed = redis::cmd("EXISTS").arg(stored::REMOVALS_MEANT).to_owned();
            if !confirmed.query_async::<bool>(&mut self.reader).await? {
                tracing::error!(
                    "the CMDB has lost {} apps at once; they are kept until their removal is confirmed",
                    gone.len()
                );
                return Ok(());
            }
            tracing::warn!("{} apps are gone at once, as the operator has confirmed", gone.len());
        }
        let mut state = self.shared.lock();
        for app in gone {
            if !state.is_untold(&app) {
                state.forget(&app);
            }
        }
        Ok(())
    }

    /// What cannot be read is left as it was, and is that app's trouble only.
    async fn read(&mut self, apps: &[AppName]) -> RedisResult<Vec<(AppName, Stored)>> {
        let replies = match self.read_raw(apps).await {
            Err(error) if error.code() == Some("NOSCRIPT") => {
                READ.load_async(&mut self.reader).await?;
                self.read_raw(apps).await?
            }
            replies => replies?,
        };
        let mut read = Vec::with_capacity(apps.len());
        for (app, fields) in apps.iter().zip(replies) {
            match Stored::decode(app, &fields) {
                Ok(stored) => read.push((app.clone(), stored)),
                Err(reason) => {
                    tracing::error!(%app, reason, "an app of the CMDB cannot be read and is left as it was")
                }
            }
        }
        Ok(read)
    }

    async fn read_raw(&mut self, apps: &[AppName]) -> RedisResult<Vec<Vec<Vec<u8>>>> {
        let mut pipe = redis::pipe();
        for app in apps {
            let read = pipe.cmd("EVALSHA").arg(READ.get_hash()).arg(1).arg(stored::key(app));
            read.arg(stored::RECORD_MAX).arg(stored::SPEC_MAX);
        }
        pipe.query_async(&mut self.reader).await
    }

    /// What remains untold is tried again each second.
    async fn tell_untold(&self) {
        let untold = self.shared.lock().all_untold();
        for app in untold {
            let _turn = self.shared.turn(&app).await;
            if let Err(error) = self.shared.tell(&app).await {
                tracing::warn!(%app, %error, "the CMDB has not been told what runs here");
                if matches!(error, crate::store::StoreError::Unavailable(_)) {
                    return;
                }
            }
        }
    }
}

/// 128 random bits.
fn new_epoch() -> String {
    let hasher = ahash::RandomState::new();
    format!("{:016x}{:016x}", hasher.hash_one(1), hasher.hash_one(2))
}

/// 0 to 1.
fn jitter() -> f64 {
    f64::from(u16::try_from(ahash::RandomState::new().hash_one(0) >> 48).unwrap_or(0)) / 65_536.0
}
