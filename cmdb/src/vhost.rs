//! The vhost file format: one TOML file of `conf.d/` is one app (DESIGN.md §9, `docs/vhost.md`).
//!
//! Every fault of every file is found in one go, and each names file, line, column, what stands there and the mend. A
//! file with a fault yields no app; it disturbs no other file.

mod fault;
mod hooks;
mod image;
mod json;
mod provision;
mod read;
mod reader;
mod schema;
mod write;

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::Read as _,
    path::{Path, PathBuf},
};

use crate::app::{App, AppName, HostPattern};
pub use fault::{Fault, render};
pub use json::{FieldFault, from_json};
pub use schema::{json_schema, reference};
pub use write::to_json;

/// Larger files are refused: a vhost file has some dozen lines, and an app with all its environment must fit into one
/// packet of the launcher's protocol.
const LARGEST: u64 = 48 * 1024;

/// What a folder of vhost files holds.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The apps of the files without a fault, by file name.
    pub apps: Vec<LoadedApp>,
    /// Every fault of every other file, by file name.
    pub faults: Vec<Fault>,
}

/// One app and the file that it comes from.
#[derive(Debug)]
pub struct LoadedApp {
    /// The app.
    pub app: App,
    /// Its file.
    pub path: PathBuf,
    /// Where its server-names stand.
    names: Vec<read::Named>,
}

impl LoadedApp {
    /// A fault of the whole file that only who applies it can find.
    #[must_use]
    pub fn fault(&self, message: String, mend: &str) -> Fault {
        Fault::of_file(&self.path, message, mend)
    }

    /// A fault of one of its server-names, that only who applies it can find.
    #[must_use]
    pub fn fault_of_name(&self, name: &HostPattern, message: String, mend: &str) -> Fault {
        match self.names.iter().find(|named| named.pattern == *name) {
            Some(named) => named.fault(message, mend),
            None => self.fault(message, mend),
        }
    }
}

/// Reads all vhost files of `dir`; relative paths of images start at the folder in which `dir` lies.
#[must_use]
pub fn load_dir(dir: &Path) -> Loaded {
    let whole = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    load_dir_from(dir, whole.parent().unwrap_or(Path::new("/")))
}

/// Reads all vhost files of `dir`; relative paths of images start at `base`.
#[must_use]
pub fn load_dir_from(dir: &Path, base: &Path) -> Loaded {
    let mut paths = match vhost_files(dir) {
        Ok(paths) => paths,
        Err(error) => {
            let mend = "name the folder that holds the vhost files, and let its user read it";
            let fault = Fault::of_file(dir, format!("the folder cannot be read: {error}"), mend);
            return Loaded { faults: vec![fault], ..Loaded::default() };
        }
    };
    paths.sort();
    load(paths.into_iter().map(|path| (read_file(&path), path)), base)
}

/// Reads vhost files that are at hand, by their names; relative paths of images start at `base`.
#[must_use]
pub fn load_files(files: &BTreeMap<String, String>, base: &Path) -> Loaded {
    let read = files.iter().map(|(name, text)| {
        let path = PathBuf::from(name);
        let is_plain = path.file_name().is_some_and(|plain| plain == name.as_str());
        let bytes = if is_plain && name.ends_with(".toml") && !name.starts_with('.') {
            Ok(text.clone().into_bytes())
        } else {
            let message = "this is no vhost file's name".to_owned();
            Err(vec![Fault::of_file(
                &path,
                message,
                "name it for its app, for example blog.toml, without a folder",
            )])
        };
        (bytes, path)
    });
    load(read, base)
}

fn load(files: impl Iterator<Item = (Result<Vec<u8>, Vec<Fault>>, PathBuf)>, base: &Path) -> Loaded {
    let mut loaded = Loaded::default();
    let mut owners: HashMap<HostPattern, (PathBuf, usize, usize)> = HashMap::new();
    for (bytes, path) in files {
        let parsed = bytes.and_then(|bytes| read::file(&path, &bytes, base));
        let (app, names) = match parsed {
            Ok(parsed) => parsed,
            Err(faults) => {
                loaded.faults.extend(faults);
                continue;
            }
        };
        let mut clashes = Vec::new();
        for named in &names {
            if let Some((owner, line, column)) = owners.get(&named.pattern) {
                let message = format!(
                    "the server-name \"{}\" belongs to {}:{line}:{column} already",
                    named.pattern,
                    owner.display()
                );
                clashes.push(named.fault(message, "take it out of one of the two files"));
            }
        }
        if !clashes.is_empty() {
            loaded.faults.extend(clashes);
            continue;
        }
        for named in &names {
            owners.insert(named.pattern.clone(), (path.clone(), named.line, named.column));
        }
        loaded.apps.push(LoadedApp { app, path, names });
    }
    loaded
}

/// Reads one vhost file from memory; `path` names it in faults and gives the app its name.
///
/// # Errors
/// Every fault of the file, never just the first.
pub fn parse_file(path: &Path, bytes: &[u8], base: &Path) -> Result<App, Vec<Fault>> {
    read::file(path, bytes, base).map(|(app, _)| app)
}

/// The files that count: `*.toml` without a leading dot.
fn vhost_files(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        if name.ends_with(b".toml") && !name.starts_with(b".") {
            paths.push(path);
        }
    }
    Ok(paths)
}

fn read_file(path: &Path) -> Result<Vec<u8>, Vec<Fault>> {
    let fault = |message: String, mend| vec![Fault::of_file(path, message, mend)];
    let unreadable = |e: std::io::Error| {
        fault(format!("it cannot be read: {e}"), "make it a file that everybody may read, or take it away")
    };
    let metadata = fs::metadata(path).map_err(unreadable)?;
    // Not opened before this is known: opening a pipe would wait for its other end.
    if !metadata.is_file() {
        return Err(fault("it is no file".into(), "only files may be called *.toml in here"));
    }
    if metadata.len() > LARGEST {
        return Err(vec![too_large(path, metadata.len())]);
    }
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(LARGEST + 1).read_to_end(&mut bytes))
        .map_err(unreadable)?;
    Ok(bytes)
}

fn too_large(path: &Path, bytes: u64) -> Fault {
    let message = format!("it has {bytes} bytes, and a vhost file may have {LARGEST}");
    Fault::of_file(path, message, "is this a vhost file? If not, take it out of the folder")
}

/// The app that a file is named for.
fn app_name(path: &Path, faults: &mut Vec<Fault>) -> Option<AppName> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name = stem.parse::<AppName>();
    if let Err(error) = &name {
        let mend = "rename the file: its name without .toml is the app's name";
        faults.push(Fault::of_file(path, error.to_string(), mend));
    }
    name.ok()
}
