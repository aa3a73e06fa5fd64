//! The redb file behind the embedded store, written by a thread of its own.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
};

use redb::{Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use tokio::sync::oneshot;

use crate::store::StoreError;

const APPS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("apps");
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
const CEILING: &str = "generation-ceiling";

/// What a journal held when it was opened.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Name and stored form of each app.
    pub(super) apps: Vec<(String, Vec<u8>)>,
    /// The generation ceiling; 0 in a new journal.
    pub(super) ceiling: u64,
}

/// Handle on the writing thread; dropping it waits until all is written and the file is closed.
#[derive(Debug)]
pub(super) struct Journal {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// The ceiling that is durable.
    ceiling: Arc<AtomicU64>,
    asked: AtomicU64,
}

/// A change that is on its way to the disk.
#[must_use]
pub(super) struct Durable(oneshot::Receiver<Result<(), StoreError>>);

impl Durable {
    pub(super) async fn wait(self) -> Result<(), StoreError> {
        self.0.await.unwrap_or_else(|_| Err(ended()))
    }
}

/// Most changes that are written in one go.
const BATCH: usize = 512;

enum Job {
    Put(String, Vec<u8>, oneshot::Sender<Result<(), StoreError>>),
    Remove(String, oneshot::Sender<Result<(), StoreError>>),
    Ceiling(u64, Option<mpsc::Sender<Result<(), StoreError>>>),
}

impl Journal {
    pub(super) fn open(path: &Path) -> Result<(Self, Found), StoreError> {
        let (database, found) = match open_and_read(path) {
            Ok(opened) => opened,
            Err(Trouble::Unreadable(reason)) => {
                let aside = set_aside(path)?;
                tracing::error!(
                    "{} cannot be read ({reason}); it was moved to {} and an empty journal begun: the configuration comes back from conf.d",
                    path.display(),
                    aside.display()
                );
                open_and_read(path).map_err(|trouble| match trouble {
                    Trouble::Unreadable(reason) | Trouble::Unavailable(reason) => {
                        StoreError::Unavailable(reason)
                    }
                })?
            }
            Err(Trouble::Unavailable(reason)) => return Err(StoreError::Unavailable(reason)),
        };
        let ceiling = Arc::new(AtomicU64::new(found.ceiling));
        let (jobs, queue) = mpsc::channel();
        let durable = Arc::clone(&ceiling);
        let thread = std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || write(&database, &queue, &durable))
            .map_err(|e| StoreError::Unavailable(format!("the journal's thread cannot be started: {e}")))?;
        let journal =
            Self { jobs: Some(jobs), thread: Some(thread), ceiling, asked: AtomicU64::new(found.ceiling) };
        Ok((journal, found))
    }

    /// Puts an app into the queue; it is durable when what is returned says so.
    pub(super) fn put(&self, name: String, stored: Vec<u8>) -> Result<Durable, StoreError> {
        let (reply, done) = oneshot::channel();
        self.send(Job::Put(name, stored, reply))?;
        Ok(Durable(done))
    }

    /// The same for a removal.
    pub(super) fn remove(&self, name: String) -> Result<Durable, StoreError> {
        let (reply, done) = oneshot::channel();
        self.send(Job::Remove(name, reply))?;
        Ok(Durable(done))
    }

    /// The ceiling that is durable.
    pub(super) fn ceiling(&self) -> u64 {
        self.ceiling.load(Ordering::Acquire)
    }

    /// Raises it without waiting; asked twice for the same, it is written once.
    pub(super) fn raise_ceiling_soon(&self, ceiling: u64) {
        let asked = self.asked.load(Ordering::Relaxed);
        if asked <= self.ceiling() && ceiling > asked {
            self.asked.store(ceiling, Ordering::Relaxed);
            // A thread that has ended is told of by the next call that waits.
            let _ = self.send(Job::Ceiling(ceiling, None));
        }
    }

    /// Raises it and waits until it is durable (a fraction of a millisecond, and rare).
    pub(super) fn raise_ceiling_now(&self, ceiling: u64) -> Result<(), StoreError> {
        let (reply, done) = mpsc::channel();
        self.send(Job::Ceiling(ceiling, Some(reply)))?;
        done.recv().unwrap_or_else(|_| Err(ended()))
    }
}

impl Journal {
    fn send(&self, job: Job) -> Result<(), StoreError> {
        self.jobs.as_ref().and_then(|jobs| jobs.send(job).ok()).ok_or_else(ended)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // It panicked: then there is nothing left to wait for.
            let _ = thread.join();
        }
    }
}

enum Trouble {
    /// The file is there and is no journal, or a damaged one.
    Unreadable(String),
    /// In use, no permission, disk full.
    Unavailable(String),
}

impl Trouble {
    fn of(path: &Path, error: &redb::Error) -> Self {
        let reason = format!("{}: {error}", path.display());
        match error {
            redb::Error::Corrupted(_) | redb::Error::UpgradeRequired(_) | redb::Error::RepairAborted => {
                Self::Unreadable(reason)
            }
            redb::Error::Io(io) if io.kind() == std::io::ErrorKind::InvalidData => Self::Unreadable(reason),
            redb::Error::TableTypeMismatch { .. } | redb::Error::TypeDefinitionChanged { .. } => {
                Self::Unreadable(reason)
            }
            _ => Self::Unavailable(reason),
        }
    }
}

fn open_and_read(path: &Path) -> Result<(Database, Found), Trouble> {
    let database = Database::create(path).map_err(|e: DatabaseError| Trouble::of(path, &e.into()))?;
    let found = read(&database).map_err(|e| Trouble::of(path, &e))?;
    Ok((database, found))
}

fn read(database: &Database) -> Result<Found, redb::Error> {
    // Both tables are there from the first open on, so that readers need no special case.
    let transaction = database.begin_write()?;
    transaction.open_table(APPS)?;
    transaction.open_table(NUMBERS)?;
    transaction.commit()?;

    let transaction = database.begin_read()?;
    let mut found = Found::default();
    for item in transaction.open_table(APPS)?.iter()? {
        let (name, stored) = item?;
        found.apps.push((name.value().to_owned(), stored.value().to_owned()));
    }
    found.ceiling = transaction.open_table(NUMBERS)?.get(CEILING)?.map_or(0, |n| n.value());
    Ok(found)
}

fn set_aside(path: &Path) -> Result<PathBuf, StoreError> {
    let mut number = 1;
    loop {
        let mut aside = path.as_os_str().to_owned();
        aside.push(format!(".unreadable-{number}"));
        let aside = PathBuf::from(aside);
        if !aside.exists() {
            std::fs::rename(path, &aside).map_err(|e| {
                StoreError::Unavailable(format!(
                    "{} cannot be read and cannot be moved aside: {e}",
                    path.display()
                ))
            })?;
            return Ok(aside);
        }
        number += 1;
    }
}

/// Writes what is in the queue, as much of it as there is in one go: hundreds of changes cost about as much as one.
fn write(database: &Database, queue: &mpsc::Receiver<Job>, durable: &AtomicU64) {
    while let Ok(first) = queue.recv() {
        let mut batch = vec![first];
        batch.extend(queue.try_iter().take(BATCH - 1));
        let mut highest = durable.load(Ordering::Relaxed);
        let done = commit(database, |transaction| {
            let mut apps = transaction.open_table(APPS)?;
            let mut numbers = transaction.open_table(NUMBERS)?;
            for job in &batch {
                match job {
                    Job::Put(name, stored, _) => drop(apps.insert(name.as_str(), stored.as_slice())?),
                    Job::Remove(name, _) => drop(apps.remove(name.as_str())?),
                    Job::Ceiling(ceiling, _) => {
                        highest = highest.max(*ceiling);
                        numbers.insert(CEILING, highest)?;
                    }
                }
            }
            Ok(())
        });
        match &done {
            Ok(()) => durable.store(highest, Ordering::Release),
            Err(error) => tracing::error!(%error, "the journal could not be written"),
        }
        for job in batch {
            let done = done.as_ref().map_err(|e| StoreError::Unavailable(e.to_string())).copied();
            match job {
                Job::Put(_, _, reply) | Job::Remove(_, reply) => drop(reply.send(done)),
                Job::Ceiling(_, Some(reply)) => drop(reply.send(done)),
                Job::Ceiling(_, None) => {}
            }
        }
    }
}

fn commit(
    database: &Database,
    change: impl FnOnce(&redb::WriteTransaction) -> Result<(), redb::Error>,
) -> Result<(), StoreError> {
    let run = || -> Result<(), redb::Error> {
        let mut transaction = database.begin_write()?;
        // redb's one-phase commit trusts a checksum that is no defence against crafted data after a crash.
        transaction.set_two_phase_commit(true);
        change(&transaction)?;
        transaction.commit()?;
        Ok(())
    };
    run().map_err(|error| match error {
        redb::Error::Io(io) => StoreError::Unavailable(format!("the journal cannot be written: {io}")),
        other => StoreError::Unavailable(format!("the journal cannot be written: {other}")),
    })
}

fn ended() -> StoreError {
    StoreError::Unavailable("the journal's thread has ended".to_owned())
}
