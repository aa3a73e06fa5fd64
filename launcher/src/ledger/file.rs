//! The ledger's file: hours, later folded into days, and the counters last taken down.

use std::{
    collections::BTreeMap,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use cmdb::AppName;
use launcher_client::usage::{Figures, HOUR_S, Span, Totals, Usage};
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition, WriteTransaction};

use super::book::{Account, Book, Sample, Seen};
use crate::sandbox::ContainerId;

/// Hours and apps (the empty name: the parent cgroup) → [`Figures::to_array`]. Hours since the Unix epoch.
const HOURS: TableDefinition<'_, (u64, &str), [u64; 9]> = TableDefinition::new("hours");
/// The same for days, of which the hours are not kept any more.
const DAYS: TableDefinition<'_, (u64, &str), [u64; 9]> = TableDefinition::new("days");
/// `app.generation` → CPU, memory, time frozen, whether frozen, when: see [`Seen`].
const SEEN: TableDefinition<'_, &str, [u64; 5]> = TableDefinition::new("containers");
/// Begin of a proxy and app → requests, bytes in, bytes out, held.
const TOTALS: TableDefinition<'_, (u64, &str), [u64; 4]> = TableDefinition::new("totals");
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
const TEXTS: TableDefinition<'_, &str, &str> = TableDefinition::new("texts");
const PARENT: &str = "parent-us";
const BOOT: &str = "boot-id";

const DAY_H: u64 = 24;
/// For so long usage is known by the hour.
const HOURS_KEPT: u64 = 40 * DAY_H;
/// For so long by the day. Both bound the file: nothing is written for an app that was not there in an hour.
const DAYS_KEPT: u64 = 400;

/// The open file.
#[derive(Debug)]
pub(super) struct File(Database);

/// Why the ledger cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    /// The file is there and is no ledger, or a damaged one.
    #[error("{0}")]
    Unreadable(String),
    /// In use, no permission, disk full.
    #[error("{0}")]
    Unavailable(String),
}

impl From<redb::Error> for FileError {
    fn from(error: redb::Error) -> Self {
        use std::io::ErrorKind::{InvalidData, UnexpectedEof};
        let damaged = match &error {
            redb::Error::Corrupted(_)
            | redb::Error::UpgradeRequired(_)
            | redb::Error::RepairAborted
            | redb::Error::TableTypeMismatch { .. }
            | redb::Error::TypeDefinitionChanged { .. } => true,
            redb::Error::Io(io) => matches!(io.kind(), InvalidData | UnexpectedEof),
            _ => false,
        };
        if damaged { Self::Unreadable(error.to_string()) } else { Self::Unavailable(error.to_string()) }
    }
}

impl File {
    /// Opens or makes the file; the book holds the counters last taken down.
    ///
    /// # Errors
    /// Whether the file is damaged or only cannot be reached now.
    pub(super) fn open(path: &Path) -> Result<(Self, Book), FileError> {
        sound(|| Self::open_or_panic(path))
    }

    fn open_or_panic(path: &Path) -> Result<(Self, Book), redb::Error> {
        let database = Database::create(path)?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let transaction = database.begin_write()?;
        {
            transaction.open_table(HOURS)?;
            transaction.open_table(DAYS)?;
            let mut seen = transaction.open_table(SEEN)?;
            transaction.open_table(TOTALS)?;
            let mut numbers = transaction.open_table(NUMBERS)?;
            let mut texts = transaction.open_table(TEXTS)?;
            let last = texts.get(BOOT)?.map(|text| text.value().to_owned());
            if last.as_deref() != Some(boot.trim()) {
                // Since the host's start every cgroup is a new one, and the monotonic clock began again.
                seen.retain(|_, _| false)?;
                numbers.remove(PARENT)?;
                texts.insert(BOOT, boot.trim())?;
            }
        }
        transaction.commit()?;
        let book = read_counters(&database)?;
        Ok((Self(database), book))
    }

    /// Writes what has changed in the book since its last commit, in one go.
    ///
    /// # Errors
    /// After one the file has to be opened anew.
    pub(super) fn commit(&self, book: &Book) -> Result<(), FileError> {
        sound(|| self.write(book))
    }

    fn write(&self, book: &Book) -> Result<(), redb::Error> {
        let mut transaction = self.0.begin_write()?;
        // redb's one-phase commit trusts a checksum after a crash; two phases need no such trust.
        transaction.set_two_phase_commit(true);
        {
            let mut hours = transaction.open_table(HOURS)?;
            for ((hour, account), figures) in &book.rows {
                let key = (*hour, name_of(account));
                let mut sum = hours.get(key)?.map_or(Figures::default(), |v| Figures::from_array(v.value()));
                sum += *figures;
                hours.insert(key, sum.to_array())?;
            }
            let mut seen = transaction.open_table(SEEN)?;
            for (id, present) in &book.turned {
                let key = format!("{}.{}", id.app, id.generation);
                match book.seen.get(id).filter(|_| *present) {
                    Some(Seen { sample, at }) => {
                        let frozen = u64::from(sample.frozen);
                        let values = [sample.cpu_us, sample.memory, sample.frozen_us, frozen, *at];
                        drop(seen.insert(key.as_str(), values)?);
                    }
                    None => drop(seen.remove(key.as_str())?),
                }
            }
            let mut totals = transaction.open_table(TOTALS)?;
            for (proxy, app) in &book.turned_totals {
                if let Some(t) = book.totals.get(&(*proxy, app.clone())) {
                    let values = [t.requests, t.bytes_in, t.bytes_out, t.held_us];
                    totals.insert((*proxy, app.as_str()), values)?;
                }
            }
            let mut numbers = transaction.open_table(NUMBERS)?;
            match book.parent_us {
                Some(us) => drop(numbers.insert(PARENT, us)?),
                None => drop(numbers.remove(PARENT)?),
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// Folds old hours into days, removes what is older than is kept, and the totals of proxies that are gone.
    ///
    /// # Errors
    /// After one the file has to be opened anew.
    pub(super) fn fold(&self, hour: u64, present: impl Fn(u64) -> bool) -> Result<(), FileError> {
        sound(|| self.shrink(hour, present))
    }

    fn shrink(&self, hour: u64, present: impl Fn(u64) -> bool) -> Result<(), redb::Error> {
        let mut transaction = self.0.begin_write()?;
        transaction.set_two_phase_commit(true);
        fold_hours(&transaction, hour.saturating_sub(HOURS_KEPT))?;
        let oldest = (hour / DAY_H).saturating_sub(DAYS_KEPT);
        transaction.open_table(DAYS)?.retain_in(..(oldest, ""), |_, _| false)?;
        transaction.open_table(TOTALS)?.retain(|(proxy, _), _| present(proxy))?;
        transaction.commit()?;
        Ok(())
    }

    /// What was used since `since_unix_s`, summed up as wished, in the order of time and names.
    ///
    /// # Errors
    /// After one the file has to be opened anew.
    pub(super) fn read(
        &self,
        since_unix_s: u64,
        by: Span,
        app: Option<&AppName>,
    ) -> Result<Vec<Usage>, FileError> {
        sound(|| self.sum_up(since_unix_s, by, app))
    }

    fn sum_up(&self, since_unix_s: u64, by: Span, app: Option<&AppName>) -> Result<Vec<Usage>, redb::Error> {
        let since_hour = since_unix_s / HOUR_S;
        let mut sums: BTreeMap<(u64, u64, String), Figures> = BTreeMap::new();
        let mut add = |from_hour: u64, hours: u64, name: &str, values: [u64; 9]| {
            if app.is_some_and(|app| app.as_str() != name) {
                return;
            }
            let (from, span) = match by {
                Span::All => (since_hour, 0),
                Span::Day => (from_hour / DAY_H * DAY_H, DAY_H),
                Span::Hour => (from_hour, hours),
            };
            *sums.entry((from, span, name.to_owned())).or_default() += Figures::from_array(values);
        };
        let transaction = self.0.begin_read()?;
        for row in transaction.open_table(DAYS)?.range((since_hour / DAY_H, "")..)? {
            let (key, values) = row?;
            let (day, name) = key.value();
            add(day * DAY_H, DAY_H, name, values.value());
        }
        for row in transaction.open_table(HOURS)?.range((since_hour, "")..)? {
            let (key, values) = row?;
            let (hour, name) = key.value();
            add(hour, 1, name, values.value());
        }
        Ok(sums
            .into_iter()
            .map(|((from, hours, name), figures)| Usage {
                from_unix_s: from * HOUR_S,
                span_s: hours * HOUR_S,
                app: name.parse().ok(),
                figures,
            })
            .collect())
    }
}

/// Some damage redb meets with a panic. What was being done is not done then, and the file is opened anew or set aside.
fn sound<T>(work: impl FnOnce() -> Result<T, redb::Error>) -> Result<T, FileError> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => Ok(done?),
        Err(_) => Err(FileError::Unreadable("its structure makes no sense".to_owned())),
    }
}

fn fold_hours(transaction: &WriteTransaction, before: u64) -> Result<(), redb::Error> {
    let mut hours = transaction.open_table(HOURS)?;
    let mut days = transaction.open_table(DAYS)?;
    for row in hours.extract_from_if(..(before, ""), |_, _| true)? {
        let (key, values) = row?;
        let (hour, name) = key.value();
        let key = (hour / DAY_H, name);
        let mut sum = days.get(key)?.map_or(Figures::default(), |v| Figures::from_array(v.value()));
        sum += Figures::from_array(values.value());
        days.insert(key, sum.to_array())?;
    }
    Ok(())
}

fn read_counters(database: &Database) -> Result<Book, redb::Error> {
    let transaction = database.begin_read()?;
    let mut book = Book::default();
    for row in transaction.open_table(SEEN)?.iter()? {
        let (key, values) = row?;
        let Some(id) = container(key.value()) else { continue };
        let [cpu_us, memory, frozen_us, frozen, at] = values.value();
        let sample = Sample { cpu_us, memory, frozen_us, frozen: frozen != 0 };
        book.seen.insert(id, Seen { sample, at });
    }
    for row in transaction.open_table(TOTALS)?.iter()? {
        let (key, values) = row?;
        let (proxy, name) = key.value();
        let Ok(app) = name.parse() else { continue };
        let [requests, bytes_in, bytes_out, held_us] = values.value();
        book.totals.insert((proxy, app), Totals { requests, bytes_in, bytes_out, held_us });
    }
    book.parent_us = transaction.open_table(NUMBERS)?.get(PARENT)?.map(|us| us.value());
    Ok(book)
}

/// The container that a group of that name belongs to.
pub(super) fn container(name: &str) -> Option<ContainerId> {
    let (app, generation) = name.rsplit_once('.')?;
    Some(ContainerId { app: app.to_owned(), generation: generation.parse().ok()? })
}

fn name_of(account: &Account) -> &str {
    match account {
        Account::Parent => "",
        Account::App(app) => app.as_str(),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::book::Moment, *};

    fn opened(folder: &Path) -> (File, Book) {
        File::open(&folder.join("ledger.redb")).unwrap()
    }

    fn used(book: &mut Book, hour: u64, cpu_us: u64) {
        let id = ContainerId { app: "blog".into(), generation: hour };
        let now = Moment { unix: hour * HOUR_S * 1_000_000 + 1_000_000, mono: 1_000_000 };
        book.settle(&id, &"blog".parse().unwrap(), now.unix, cpu_us, now);
    }

    #[test]
    fn what_was_committed_is_there_after_the_file_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let id = ContainerId { app: "blog".into(), generation: 7 };
        let app: AppName = "blog".parse().unwrap();
        let now = Moment { unix: 1_764_001_800_000_000, mono: 9_000_000 };
        let sample = Sample { cpu_us: 500, memory: 1 << 20, frozen_us: 3, frozen: true };
        {
            let (file, mut book) = opened(folder.path());
            book.sample(&id, &app, now.unix - 1_000_000, sample, now);
            book.traffic(1, app.clone(), Totals { requests: 4, ..Totals::default() }, now);
            book.parent(600, now);
            file.commit(&book).unwrap();
        }
        let (file, book) = opened(folder.path());
        assert_eq!(book.seen[&id], Seen { sample, at: now.mono });
        assert_eq!(book.totals[&(1, app.clone())].requests, 4);
        assert_eq!(book.parent_us, Some(600));
        let lines = file.read(0, Span::Hour, Some(&app)).unwrap();
        assert_eq!(lines.len(), 1);
        assert_eq!((lines[0].figures.cpu_us, lines[0].figures.requests), (500, 4));
        assert_eq!(lines[0].from_unix_s, 1_764_000_000 / HOUR_S * HOUR_S);
    }

    #[test]
    fn old_hours_become_days_and_old_days_go() {
        let folder = tempfile::tempdir().unwrap();
        let (file, mut book) = opened(folder.path());
        let now = 20_000 * DAY_H + 5;
        for (age_h, cpu) in
            [(0, 1), (HOURS_KEPT - 1, 2), (50 * DAY_H, 4), (50 * DAY_H + 1, 8), (401 * DAY_H, 16)]
        {
            used(&mut book, now - age_h, cpu);
        }
        file.commit(&book).unwrap();
        file.fold(now, |_| true).unwrap();

        let lines = file.read(0, Span::Hour, None).unwrap();
        let cpu: Vec<(u64, u64)> = lines.iter().map(|l| (l.span_s / HOUR_S, l.figures.cpu_us)).collect();
        assert_eq!(cpu, [(24, 12), (1, 2), (1, 1)]);
        let whole = file.read(0, Span::All, None).unwrap();
        assert_eq!(whole.len(), 1);
        assert_eq!(whole[0].figures.cpu_us, 15);
    }

    #[test]
    fn damage_while_it_is_open_is_told_and_no_panic() {
        let mut told = 0;
        for damage in 0..3 {
            let folder = tempfile::tempdir().unwrap();
            let (file, mut book) = opened(folder.path());
            for hour in 0..200 {
                used(&mut book, 20_000 * DAY_H + hour, hour);
            }
            file.commit(&book).unwrap();
            book.written();
            let path = folder.path().join("ledger.redb");
            let length = fs::metadata(&path).unwrap().len();
            match damage {
                0 => fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap(),
                1 => fs::write(&path, vec![0; usize::try_from(length).unwrap()]).unwrap(),
                _ => fs::write(&path, vec![0xa5; usize::try_from(length).unwrap()]).unwrap(),
            }
            for hour in 200..220 {
                used(&mut book, 20_000 * DAY_H + hour, 1);
                let results = [
                    file.commit(&book),
                    file.fold(20_000 * DAY_H + hour, |_| true),
                    file.read(0, Span::All, None).map(drop),
                ];
                told +=
                    results.iter().filter(|result| matches!(result, Err(FileError::Unreadable(_)))).count();
            }
            drop(file);
            told += usize::from(matches!(File::open(&path), Err(FileError::Unreadable(_))));
        }
        assert!(told > 0);
    }
}
