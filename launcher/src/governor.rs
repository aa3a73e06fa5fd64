//! Admits starts: by the CPU and the memory that are free, fairly across apps.
//!
//! When a hundred apps are woken at once, as many starts are under way as the host can do at a time; the others wait in
//! a line, and the apps that serve keep their latency. A single start finds a free slot and is not delayed: one lock that
//! nobody holds for long, and one system call.

mod gauge;
mod line;
mod pace;

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use cmdb::{AppName, units::Bytes};
use launcher_client::GovernorMode;
use tokio::{sync::oneshot, time::Instant};

use crate::host::lock;
pub use gauge::{Gauge, HostGauge};
use line::{Ask, Line};
use pace::Pace;

/// How often the pace is adapted while starts wait.
const TICK: Duration = Duration::from_millis(50);
/// What an app is taken to need until one of its instances has shown it, at most.
const USUAL_NEED: u64 = 64 << 20;

/// See the module.
#[derive(Debug)]
pub struct Governor {
    inner: Mutex<Inner>,
    on: bool,
    keep_free: u64,
    gauge: Box<dyn Gauge>,
}

#[derive(Debug)]
struct Inner {
    pace: Pace,
    line: Line<oneshot::Sender<Slot>>,
    under_way: usize,
    /// Memory that the starts under way are likely to take, bytes.
    promised: u64,
    next_id: u64,
    ticking: bool,
    /// The most that an instance of each app ever used, bytes.
    peaks: HashMap<AppName, u64>,
}

/// A start that may go on. Dropped, it makes room for the next.
#[derive(Debug)]
pub struct Slot {
    governor: Arc<Governor>,
    memory: u64,
}

/// Why a start waits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Why {
    /// So many are under way, as many as may be; so many wait.
    Slots {
        /// Starts under way.
        under_way: usize,
        /// Starts that wait, this one among them.
        waiting: usize,
    },
    /// It is likely to need more memory than there is.
    Memory {
        /// What it is likely to need, bytes.
        needs: u64,
        /// What starts may take, bytes.
        free: u64,
        /// What is kept free, bytes.
        kept: u64,
    },
}

/// How the governor is, for metrics.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Figures {
    /// Starts under way.
    pub under_way: usize,
    /// Starts that wait.
    pub waiting: usize,
    /// Starts that may be under way.
    pub limit: usize,
}

impl Governor {
    /// One that leaves `keep_free` bytes of the host's memory to others.
    #[must_use]
    pub fn new(mode: GovernorMode, keep_free: u64, gauge: Box<dyn Gauge>) -> Arc<Self> {
        let most = match mode {
            GovernorMode::AtMost(most) => most.get(),
            GovernorMode::On | GovernorMode::Off => usize::MAX,
        };
        let inner = Inner {
            pace: Pace::new(gauge.cores(), most),
            line: Line::default(),
            under_way: 0,
            promised: 0,
            next_id: 0,
            ticking: false,
            peaks: HashMap::new(),
        };
        Arc::new(Self { inner: Mutex::new(inner), on: mode != GovernorMode::Off, keep_free, gauge })
    }

    /// Whether it governs at all.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Waits for a slot, until `deadline`. `first`: nothing of the app runs. `limit` is the app's memory limit in bytes.
    /// `waits` is called when it is not admitted at once.
    ///
    /// # Errors
    /// There was none in time; why.
    pub async fn admit(
        self: &Arc<Self>,
        app: &AppName,
        first: bool,
        limit: u64,
        deadline: Instant,
        waits: impl FnOnce(Why),
    ) -> Result<Slot, Why> {
        let (place, slot, why) = {
            let mut inner = lock(&self.inner);
            let memory = inner.need(app, limit);
            if inner.line.is_empty() && self.fits(&inner, memory) {
                return Ok(self.take(&mut inner, memory));
            }
            let (ticket, slot) = oneshot::channel();
            inner.next_id += 1;
            let id = inner.next_id;
            inner.line.push(Ask { id, app: app.clone(), first, memory, ticket });
            self.tick(&mut inner);
            (Place { governor: self, id, memory }, slot, self.why(&inner, memory))
        };
        waits(why);
        match tokio::time::timeout_at(deadline, slot).await {
            Ok(Ok(slot)) => Ok(slot),
            // The sender lives in the line, which only `place` and a grant take it from.
            Ok(Err(_)) | Err(_) => {
                let why = self.why(&lock(&self.inner), place.memory);
                Err(why)
            }
        }
    }

    /// An instance of `app` used so much memory at most, bytes.
    pub fn learn(&self, app: &AppName, peak: u64) {
        let mut inner = lock(&self.inner);
        let known = inner.peaks.entry(app.clone()).or_insert(peak);
        // Half forgotten each time, so that one bad day is not remembered for ever.
        *known = peak.max(known.midpoint(peak));
    }

    /// The app is gone.
    pub fn forget(&self, app: &AppName) {
        lock(&self.inner).peaks.remove(app);
    }

    /// Cores of the host.
    #[must_use]
    pub fn cores(&self) -> usize {
        self.gauge.cores()
    }

    /// Memory that starts may take, bytes.
    #[must_use]
    pub fn free_memory(&self) -> u64 {
        self.free(&lock(&self.inner))
    }

    /// Whether a start of that app would have to wait for memory now.
    #[must_use]
    pub fn lacks_memory(&self, app: &AppName, limit: u64) -> bool {
        let inner = lock(&self.inner);
        self.on && !self.gauge.has_free(self.taken(&inner, inner.need(app, limit)))
    }

    /// How it is.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let inner = lock(&self.inner);
        Figures { under_way: inner.under_way, waiting: inner.line.len(), limit: inner.pace.limit() }
    }

    fn fits(&self, inner: &Inner, memory: u64) -> bool {
        !self.on || (inner.under_way < inner.pace.limit() && self.gauge.has_free(self.taken(inner, memory)))
    }

    /// What must be free for a start that needs so much.
    fn taken(&self, inner: &Inner, memory: u64) -> u64 {
        self.keep_free.saturating_add(inner.promised).saturating_add(memory)
    }

    fn free(&self, inner: &Inner) -> u64 {
        self.gauge.free().saturating_sub(self.taken(inner, 0))
    }

    fn take(self: &Arc<Self>, inner: &mut Inner, memory: u64) -> Slot {
        inner.under_way += 1;
        inner.promised += memory;
        Slot { governor: Arc::clone(self), memory }
    }

    fn why(&self, inner: &Inner, needs: u64) -> Why {
        let free = self.free(inner);
        if needs > free {
            return Why::Memory { needs, free, kept: self.keep_free };
        }
        Why::Slots { under_way: inner.under_way, waiting: inner.line.len() }
    }

    /// Lets in whoever may come in now.
    fn admit_waiting(self: &Arc<Self>) {
        let mut granted = Vec::new();
        {
            let mut inner = lock(&self.inner);
            if inner.line.is_empty() {
                return;
            }
            let mut free = self.free(&inner);
            while inner.under_way < inner.pace.limit()
                && let Some(ask) = inner.line.pop(free)
            {
                free -= ask.memory;
                let slot = self.take(&mut inner, ask.memory);
                granted.push((ask.ticket, slot));
            }
        }
        // Not under the lock: whoever has left drops its slot at once.
        for (ticket, slot) in granted {
            let _ = ticket.send(slot);
        }
    }

    /// As long as somebody waits, the pace is adapted, and memory that has become free is noticed.
    fn tick(self: &Arc<Self>, inner: &mut Inner) {
        if std::mem::replace(&mut inner.ticking, true) {
            return;
        }
        self.gauge.begin();
        let governor = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(TICK).await;
                let busy = governor.gauge.busy();
                {
                    let mut inner = lock(&governor.inner);
                    if inner.line.is_empty() {
                        inner.pace.relax();
                        inner.ticking = false;
                        return;
                    }
                    inner.pace.observe(busy);
                }
                governor.admit_waiting();
            }
        });
    }
}

impl Inner {
    fn need(&self, app: &AppName, limit: u64) -> u64 {
        self.peaks.get(app).copied().unwrap_or(USUAL_NEED).min(limit)
    }
}

/// A place in the line, given up when dropped.
struct Place<'a> {
    governor: &'a Governor,
    id: u64,
    memory: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        lock(&self.governor.inner).line.remove(self.id);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        {
            let mut inner = lock(&self.governor.inner);
            inner.under_way -= 1;
            inner.promised -= self.memory;
        }
        self.governor.admit_waiting();
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slots { under_way, waiting } => {
                write!(
                    f,
                    "{under_way} start(s) are under way, as many as this host can do at a time, and {waiting} wait"
                )
            }
            Self::Memory { needs, free, kept } => write!(
                f,
                "it is likely to need {} of memory, and the host has {} for starts (it keeps {} free)",
                rounded(*needs),
                rounded(*free),
                rounded(*kept)
            ),
        }
    }
}

/// In whole MiB, for people.
fn rounded(bytes: u64) -> Bytes {
    Bytes(bytes >> 20 << 20)
}

#[cfg(test)]
mod tests;
