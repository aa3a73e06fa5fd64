//! What each app has used, hour by hour: the ground of bills, and of knowing who eats the host.
//!
//! A thread of its own reads the cgroups' counters, takes in the proxies' totals and writes both to `ledger.redb` once a
//! second, in one commit. Nobody waits for it: instances send it a message when they are ready and when they have ended.

mod book;
mod file;

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use cmdb::AppName;
use launcher_client::usage::{Span, Traffic, Usage};
use tokio::sync::oneshot;

use crate::{
    cgroup::{Cgroups, Group},
    clock::unix_us,
    events::Events,
    keeper::monotonic_us,
    sandbox::ContainerId,
};
use book::{Book, Moment, Sample, hour_of};
use file::{File, FileError};

/// How often what has changed is written: what is younger is lost with the launcher, unless it still counts somewhere.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// An instance that does nothing is looked at ever more rarely, down to this. Its counters lose nothing by it.
const QUIET_EVERY_US: u64 = 8_000_000;
/// And one that is frozen.
const FROZEN_EVERY_US: u64 = 32_000_000;
/// Less CPU time than this since the last look is nothing, µs.
const QUIET_CPU_US: u64 = 2_000;
/// The totals of a proxy of which nothing was heard for so long are forgotten: it is gone.
const PROXY_GONE: Duration = Duration::from_secs(3 * 3600);

/// By then a daemon has taken over what its predecessor left.
const ADOPTED_WITHIN: Duration = Duration::from_secs(600);

/// Handle on the ledger's thread; cheap to clone.
#[derive(Clone, Debug)]
pub struct Ledger {
    jobs: mpsc::Sender<Job>,
}

enum Job {
    Watch {
        id: ContainerId,
        begun_us: u64,
        group: Arc<Group>,
    },
    Settle {
        id: ContainerId,
        begun_us: Option<u64>,
        cpu_us: u64,
    },
    Charge {
        app: AppName,
        cpu_us: u64,
    },
    Traffic {
        proxy: u64,
        apps: Vec<Traffic>,
    },
    Read {
        since_unix_s: u64,
        by: Span,
        app: Option<AppName>,
        reply: oneshot::Sender<Result<Vec<Usage>, String>>,
    },
    Close(oneshot::Sender<()>),
}

impl Ledger {
    /// Begins to count into the file at `path`.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn begin(path: &Path, cgroups: Cgroups, events: Arc<Events>) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let clerk = Clerk {
            path: path.to_owned(),
            cgroups,
            events,
            file: None,
            book: Book::default(),
            begun: false,
            since: Instant::now(),
            waiting: Vec::new(),
            watched: HashMap::new(),
            heard: HashMap::new(),
            folded: None,
            ailing: false,
        };
        std::thread::Builder::new().name("ledger".to_owned()).spawn(move || clerk.run(&queue))?;
        Ok(Self { jobs })
    }

    /// Counts what an instance uses that began at `begun_us` (µs since the Unix epoch), from now on until it is settled.
    pub fn watch(&self, id: ContainerId, begun_us: u64, group: Arc<Group>) {
        self.send(Job::Watch { id, begun_us, group });
    }

    /// The instance has ended; all in all it has used `cpu_us`.
    pub fn settle(&self, id: ContainerId, begun_us: u64, cpu_us: u64) {
        self.send(Job::Settle { id, begun_us: Some(begun_us), cpu_us });
    }

    /// Something outside of its containers has used `cpu_us` for an app: a hook.
    pub fn charge(&self, app: &AppName, cpu_us: u64) {
        self.send(Job::Charge { app: app.clone(), cpu_us });
    }

    /// Cgroups of an earlier daemon were removed that had used so much.
    pub fn settle_leftovers(&self, used: &[(String, u64)]) {
        for (name, cpu_us) in used {
            let Some(id) = file::container(name) else { continue };
            match id.app.split_once('~') {
                // A hook's (see `hooks`).
                Some((app, _)) => app.parse().iter().for_each(|app| self.charge(app, *cpu_us)),
                None => self.send(Job::Settle { id, begun_us: None, cpu_us: *cpu_us }),
            }
        }
    }

    /// Takes in totals of the proxy that began at `proxy`.
    pub fn traffic(&self, proxy: u64, apps: Vec<Traffic>) {
        self.send(Job::Traffic { proxy, apps });
    }

    /// What was used since then, up to this moment.
    ///
    /// # Errors
    /// In words, when the file cannot be read or written.
    pub async fn read(
        &self,
        since_unix_s: u64,
        by: Span,
        app: Option<AppName>,
    ) -> Result<Vec<Usage>, String> {
        let (reply, lines) = oneshot::channel();
        self.send(Job::Read { since_unix_s, by, app, reply });
        lines.await.unwrap_or_else(|_| Err("the ledger's thread has ended".to_owned()))
    }

    /// Writes everything; nothing is counted after it. Before the parent cgroup is removed.
    pub async fn close(&self) {
        let (reply, done) = oneshot::channel();
        self.send(Job::Close(reply));
        // A thread that is gone has nothing more to write.
        let _ = done.await;
    }

    fn send(&self, job: Job) {
        if self.jobs.send(job).is_err() {
            tracing::error!("the ledger's thread has ended; usage is not counted any more");
        }
    }
}

/// The thread's own.
struct Clerk {
    path: PathBuf,
    cgroups: Cgroups,
    events: Arc<Events>,
    file: Option<File>,
    book: Book,
    /// When the daemon began.
    since: Instant,
    /// Whether the file was ever open; before that nobody knows from where to count on.
    begun: bool,
    /// What came before.
    waiting: Vec<Job>,
    watched: HashMap<ContainerId, Watched>,
    /// When each proxy was last heard of.
    heard: HashMap<u64, Instant>,
    /// The hour in which old ones were last folded.
    folded: Option<u64>,
    /// Whether the last commit failed.
    ailing: bool,
}

struct Watched {
    app: AppName,
    begun_us: u64,
    group: Arc<Group>,
    /// When it is looked at again, monotonic µs.
    due: u64,
    pause: u64,
}

impl Clerk {
    fn run(mut self, queue: &mpsc::Receiver<Job>) {
        self.begin();
        let mut next = Instant::now() + COMMIT_EVERY;
        loop {
            match queue.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(Job::Close(reply)) => {
                    self.look(true);
                    // The group goes, and another one of the same name will count from nothing.
                    self.book.parent_us = None;
                    self.commit(true);
                    self.file = None;
                    let _ = reply.send(());
                    return;
                }
                Ok(job) if self.begun => self.take(job),
                Ok(job) => self.waiting.push(job),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            }
            if Instant::now() >= next {
                self.begin();
                self.look(false);
                self.commit(false);
                self.fold();
                next = Instant::now() + COMMIT_EVERY;
            }
        }
    }

    /// Opens the file for the first time: where its counters are, counting goes on.
    fn begin(&mut self) {
        if self.begun {
            return;
        }
        let opened = match File::open(&self.path) {
            Err(FileError::Unreadable(reason)) => self.begin_another(&reason),
            opened => opened,
        };
        match opened {
            Ok((file, book)) => {
                self.file = Some(file);
                self.heard.extend(book.totals.keys().map(|(proxy, _)| (*proxy, Instant::now())));
                self.book = book;
                self.begun = true;
                self.recover();
                for job in std::mem::take(&mut self.waiting) {
                    self.take(job);
                }
            }
            Err(error) => self.ail(&error),
        }
    }

    /// The damaged file is kept beside a new one.
    fn begin_another(&self, reason: &str) -> Result<(File, Book), FileError> {
        let path = self.path.display();
        let aside = set_aside(&self.path)
            .map_err(|error| FileError::Unavailable(format!("{reason}, and it cannot be moved: {error}")))?;
        self.tell(format!(
            "{path} cannot be read ({reason}); it was moved to {} and an empty ledger begun",
            aside.display()
        ));
        File::open(&self.path)
    }

    fn take(&mut self, job: Job) {
        match job {
            Job::Watch { id, begun_us, group } => {
                if let Ok(app) = id.app.parse() {
                    self.watched.insert(id, Watched { app, begun_us, group, due: 0, pause: 0 });
                }
            }
            Job::Settle { id, begun_us, cpu_us } => {
                self.watched.remove(&id);
                let now = now();
                // Of one that nobody saw begin, the time is not known.
                let begun_us = begun_us.unwrap_or(now.unix);
                if let Ok(app) = id.app.parse::<AppName>() {
                    self.book.settle(&id, &app, begun_us, cpu_us, now);
                }
            }
            Job::Charge { app, cpu_us } => self.book.charge(app, cpu_us, now()),
            Job::Traffic { proxy, apps } => {
                self.heard.insert(proxy, Instant::now());
                for Traffic { app, totals } in apps {
                    self.book.traffic(proxy, app, totals, now());
                }
            }
            Job::Read { since_unix_s, by, app, reply } => {
                self.look(true);
                self.commit(false);
                let lines = match &self.file {
                    Some(file) => match file.read(since_unix_s, by, app.as_ref()) {
                        Err(error) => {
                            let words = error.to_string();
                            self.lose(error);
                            Err(words)
                        }
                        lines => lines.map_err(|error| error.to_string()),
                    },
                    None => Err("the ledger cannot be written at the moment; see `events`".to_owned()),
                };
                let _ = reply.send(lines);
            }
            // Dealt with by `run`.
            Job::Close(_) => {}
        }
    }

    /// Reads the counters of the instances that are due, or of all.
    fn look(&mut self, all: bool) {
        if !self.begun {
            return;
        }
        for (id, watched) in &mut self.watched {
            let now = now();
            if !all && now.mono < watched.due {
                continue;
            }
            let (Ok(cpu_us), Ok(memory)) = (watched.group.usage_us(), watched.group.memory_current()) else {
                // Its end is on the way here, with its last counters.
                watched.due = now.mono + QUIET_EVERY_US;
                continue;
            };
            let (slept, frozen) = watched.group.slept();
            let frozen_us = u64::try_from(slept.as_micros()).unwrap_or(u64::MAX);
            let before = self.book.seen.get(id).map_or(0, |seen| seen.sample.cpu_us);
            let most = if frozen { FROZEN_EVERY_US } else { QUIET_EVERY_US };
            let quiet = cpu_us.saturating_sub(before) < QUIET_CPU_US;
            watched.pause = if quiet { (watched.pause * 2).clamp(1_000_000, most) } else { 0 };
            watched.due = now.mono + watched.pause;
            let sample = Sample { cpu_us, memory, frozen_us, frozen };
            self.book.sample(id, &watched.app, watched.begun_us, sample, now);
        }
        if let Some(cpu_us) = self.cgroups.usage_us() {
            self.book.parent(cpu_us, now());
        }
    }

    fn commit(&mut self, closing: bool) {
        if !self.begun || !(closing || self.book.is_dirty()) {
            return;
        }
        if self.file.is_none() {
            match File::open(&self.path) {
                Ok((file, _)) => self.file = Some(file),
                Err(error) => return self.lose(error),
            }
        }
        let Some(file) = &self.file else { return };
        match file.commit(&self.book) {
            Ok(()) => {
                self.book.written();
                self.recover();
            }
            Err(error) => self.lose(error),
        }
    }

    /// After an error redb refuses everything until the file is opened anew. One that is damaged is set aside; what it holds
    /// beyond repair is lost, what is in memory goes into another.
    fn lose(&mut self, error: FileError) {
        self.file = None;
        let error = match error {
            FileError::Unreadable(reason) => match self.begin_another(&reason) {
                Ok((file, _)) => {
                    self.file = Some(file);
                    self.book.move_house();
                    return;
                }
                Err(error) => error,
            },
            unavailable => unavailable,
        };
        self.ail(&error);
    }

    /// Once an hour: what is old takes less room.
    fn fold(&mut self) {
        let hour = hour_of(unix_us());
        if self.folded == Some(hour) {
            return;
        }
        self.forget_the_lost();
        let Some(file) = &self.file else { return };
        self.heard.retain(|_, at| at.elapsed() < PROXY_GONE);
        self.book.totals.retain(|(proxy, _), _| self.heard.contains_key(proxy));
        match file.fold(hour, |proxy| self.heard.contains_key(&proxy)) {
            Ok(()) => self.folded = Some(hour),
            Err(error) => self.lose(error),
        }
    }

    /// Containers whose end nobody told of: it fell into the last moment of a launcher that was killed.
    fn forget_the_lost(&mut self) {
        // Those that live are adopted within seconds.
        if self.since.elapsed() < ADOPTED_WITHIN {
            return;
        }
        let lost: Vec<_> =
            self.book.seen.keys().filter(|id| !self.watched.contains_key(*id)).cloned().collect();
        lost.iter().for_each(|id| self.book.forget(id));
    }

    fn recover(&mut self) {
        if std::mem::take(&mut self.ailing) {
            self.tell("usage is written down again; nothing was lost".to_owned());
        }
    }

    fn ail(&mut self, error: &FileError) {
        if !std::mem::replace(&mut self.ailing, true) {
            let path = self.path.display();
            self.tell(format!(
                "usage cannot be written to {path}: {error}; it is counted on in memory and written when that is mended"
            ));
        }
    }

    fn tell(&self, message: String) {
        self.events.emit("ledger", None, None, message);
    }
}

fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let names = (1..).map(|number| {
        let mut aside = path.as_os_str().to_owned();
        aside.push(format!(".unreadable-{number}"));
        PathBuf::from(aside)
    });
    let aside = names.into_iter().find(|aside| !aside.exists()).unwrap_or_default();
    std::fs::rename(path, &aside)?;
    Ok(aside)
}

fn now() -> Moment {
    Moment { unix: unix_us(), mono: monotonic_us() }
}
