//! What the operator has set in place of an app's vhost file: numbers of instances, limits, a pause of the scaler.
//!
//! Each holds until the operator takes it back, or the file says something else about the same key than it did when the
//! override was set: whoever writes the file afterwards has the last word. They are kept in one small file that is
//! replaced as a whole, so that they outlive the launcher, however it ends.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::Mutex,
};

use cmdb::{
    App, AppName,
    units::{Bytes, Millicores},
};
use serde::{Deserialize, Serialize};

use crate::host::lock;

/// The overrides of all apps.
#[derive(Debug)]
pub struct Overrides {
    path: PathBuf,
    all: Mutex<BTreeMap<AppName, Override>>,
    /// Held while the file is written, so that `all` need not be.
    writing: Mutex<()>,
}

/// The overrides of one app.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Override {
    /// `scale.min`
    pub min: Option<Set<u32>>,
    /// `scale.max`
    pub max: Option<Set<u32>>,
    /// Nothing is scaled by itself.
    pub paused: bool,
    /// `resources.cpu`
    pub cpu: Option<Set<Option<Millicores>>>,
    /// `resources.memory`
    pub memory: Option<Set<Bytes>>,
    /// `resources.pids`
    pub pids: Option<Set<u32>>,
}

/// One value.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Set<T> {
    /// What holds.
    pub value: T,
    /// What the file said when it was set.
    pub file: T,
}

impl Overrides {
    /// Those that `path` has; a file that makes no sense is moved aside, for configuration alone can be gone on with.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn open(path: &Path) -> io::Result<Self> {
        let at = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let all = match fs::read(path) {
            Ok(text) => serde_json::from_slice(&text).or_else(|error| {
                let aside = path.with_extension("broken");
                tracing::error!(path = %path.display(), %error, aside = %aside.display(), "the operator's overrides cannot be understood and are set aside");
                fs::rename(path, aside).map(|()| BTreeMap::new()).map_err(at)
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(at(error)),
        };
        Ok(Self { path: path.to_owned(), all: Mutex::new(all), writing: Mutex::default() })
    }

    /// Those of `app`.
    #[must_use]
    pub fn of(&self, app: &AppName) -> Override {
        lock(&self.all).get(app).cloned().unwrap_or_default()
    }

    /// Changes those of `app`; what they are then. On an error nothing has changed. Waits for the disk.
    ///
    /// # Errors
    /// The file could not be written; the message has its path.
    pub fn update(&self, app: &AppName, change: impl FnOnce(&mut Override)) -> io::Result<Override> {
        let _order = lock(&self.writing);
        let mut all = lock(&self.all).clone();
        let mut new = all.remove(app).unwrap_or_default();
        let before = new.clone();
        change(&mut new);
        if new == before {
            return Ok(new);
        }
        if new != Override::default() {
            all.insert(app.clone(), new.clone());
        }
        write(&self.path, &all).map_err(|error| {
            io::Error::new(error.kind(), format!("{} cannot be written: {error}", self.path.display()))
        })?;
        *lock(&self.all) = all;
        Ok(new)
    }

    /// The file of `app` has been read: what it says anew has the last word. What ends thereby, in words.
    pub fn settle(&self, app: &App) -> Vec<String> {
        let mut ended = Vec::new();
        if self.of(&app.name) == Override::default() {
            return ended;
        }
        if let Err(error) = self.update(&app.name, |known| ended = known.settle(app)) {
            tracing::error!(%error, app = %app.name, "overrides that the vhost file has ended come back with the next start");
        }
        ended
    }
}

/// As a whole or not at all, and durably.
fn write(path: &Path, all: &BTreeMap<AppName, Override>) -> io::Result<()> {
    let next = path.with_extension("next");
    let mut file = fs::File::create(&next)?;
    file.write_all(&serde_json::to_vec_pretty(all)?)?;
    file.sync_all()?;
    fs::rename(&next, path)?;
    path.parent().map_or(Ok(()), |folder| fs::File::open(folder)?.sync_all())
}

impl Override {
    /// The app as it is to be run.
    #[must_use]
    pub fn of_file(&self, file: &App) -> App {
        let mut app = file.clone();
        let (scale, resources) = (&mut app.scale, &mut app.resources);
        scale.min = self.min.map_or(scale.min, |set| set.value);
        scale.max = self.max.map_or(scale.max, |set| set.value);
        resources.cpu = self.cpu.map_or(resources.cpu, |set| set.value);
        resources.memory = self.memory.map_or(resources.memory, |set| set.value);
        resources.pids = self.pids.map_or(resources.pids, |set| set.value);
        app
    }

    /// What holds in place of the file, a phrase each.
    #[must_use]
    pub fn words(&self) -> Vec<String> {
        let cpu = |cpu: Option<Millicores>| cpu.map_or("unlimited".to_owned(), |cpu| cpu.to_string());
        let mut words: Vec<String> = [
            self.min.map(|set| phrase("scale.min", set.value, set.file)),
            self.max.map(|set| phrase("scale.max", set.value, set.file)),
            self.cpu.map(|set| phrase("cpu", cpu(set.value), cpu(set.file))),
            self.memory.map(|set| phrase("memory", set.value, set.file)),
            self.pids.map(|set| phrase("pids", set.value, set.file)),
        ]
        .into_iter()
        .flatten()
        .collect();
        if self.paused {
            words.push("automatic scaling paused".to_owned());
        }
        words
    }

    fn settle(&mut self, file: &App) -> Vec<String> {
        let mut ended = Vec::new();
        fn drop_if_changed<T: PartialEq + Copy>(
            set: &mut Option<Set<T>>,
            now: T,
            key: &str,
            ended: &mut Vec<String>,
        ) {
            if set.take_if(|set| set.file != now).is_some() {
                ended.push(key.to_owned());
            }
        }
        drop_if_changed(&mut self.min, file.scale.min, "scale.min", &mut ended);
        drop_if_changed(&mut self.max, file.scale.max, "scale.max", &mut ended);
        drop_if_changed(&mut self.cpu, file.resources.cpu, "cpu", &mut ended);
        drop_if_changed(&mut self.memory, file.resources.memory, "memory", &mut ended);
        drop_if_changed(&mut self.pids, file.resources.pids, "pids", &mut ended);
        // The two are a pair: what one of them says may make no sense with the other's value in the file.
        if self.of_file(file).scale.min > self.of_file(file).scale.max {
            (self.min, self.max) = (None, None);
            ended.push("scale.min and scale.max".to_owned());
        }
        ended
    }
}

fn phrase(key: &str, value: impl std::fmt::Display, file: impl std::fmt::Display) -> String {
    format!("{key} = {value} (vhost file: {file})")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app(min: u32, max: u32) -> App {
        let text = format!(
            "server-name = [\"blog.test\"]\n[container]\nimage = \"dir:/tmp\"\ncommand = [\"/x\"]\n[scale]\nmin = {min}\nmax = {max}\n"
        );
        cmdb::vhost::parse_file(Path::new("blog.toml"), text.as_bytes(), Path::new("/")).unwrap()
    }

    #[test]
    fn overrides_outlive_the_process_and_go_when_they_are_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("overrides.json");
        let name: AppName = "blog".parse().unwrap();
        let overrides = Overrides::open(&path).unwrap();
        overrides.update(&name, |o| o.min = Some(Set { value: 3, file: 0 })).unwrap();
        overrides.update(&name, |o| o.paused = true).unwrap();

        let known = Overrides::open(&path).unwrap().of(&name);
        assert_eq!(known.words(), ["scale.min = 3 (vhost file: 0)", "automatic scaling paused"]);

        overrides.update(&name, |o| *o = Override::default()).unwrap();
        assert_eq!(Overrides::open(&path).unwrap().of(&name), Override::default());
        assert_eq!(fs::read_to_string(&path).unwrap(), "{}");
    }

    #[test]
    fn a_file_that_makes_no_sense_is_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("overrides.json");
        fs::write(&path, "{\"blog\": 7").unwrap();
        Overrides::open(&path).unwrap();
        assert!(!path.exists() && folder.path().join("overrides.broken").exists());
    }

    #[test]
    fn the_vhost_file_has_the_last_word_about_what_it_changes_and_about_nothing_else() {
        let mut known = Override {
            max: Some(Set { value: 5, file: 2 }),
            pids: Some(Set { value: 9, file: app(0, 2).resources.pids }),
            ..Override::default()
        };
        assert!(known.settle(&app(1, 2)).is_empty(), "another key has changed");
        assert_eq!(known.of_file(&app(1, 2)).scale.max, 5);
        assert_eq!(known.settle(&app(1, 3)), ["scale.max"]);
        assert_eq!((known.of_file(&app(1, 3)).scale.max, known.of_file(&app(1, 3)).resources.pids), (3, 9));
    }

    #[test]
    fn a_number_that_the_file_makes_senseless_ends() {
        let mut known = Override { max: Some(Set { value: 2, file: 8 }), ..Override::default() };
        assert_eq!(known.settle(&app(4, 8)), ["scale.min and scale.max"]);
        assert_eq!(known, Override::default());
    }
}
