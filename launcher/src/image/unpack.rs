//! From entries of an archive to a tree. The `tar` crate finds the blocks; every header is read here, with bounds,
//! and every object is made by [`Tree`], which cannot leave its root.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use tar::{EntryType, PaxExtensions};

use super::tree::{Owner, Tree, TreeError};

/// Headers that only describe the next entry are held in memory: names of so many bytes, and so much of PAX.
const MAX_NAME: u64 = 4096;
const MAX_PAX: u64 = 1 << 20;
/// The ids of a container's user namespace.
const IDS: u64 = 65_536;

/// What an archive may hold at most.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Bounds {
    /// Entries, descriptive headers included.
    pub entries: u64,
    /// Bytes of all files together.
    pub bytes: u64,
    /// Directories within one another.
    pub depth: usize,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds { entries: 1_000_000, bytes: 32 << 30, depth: 128 }
    }
}

/// What an archive is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Form {
    /// The whole of a file system.
    Whole,
    /// A layer over others (OCI image specification, "Image Layer Filesystem Changeset"): names that begin with `.wh.`
    /// take away what is beneath.
    Layer,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Report {
    /// Entries made.
    pub(super) entries: u64,
    /// Bytes of all files together.
    pub(super) bytes: u64,
    /// Device nodes and fifos, which a container gets from nobody but the launcher.
    pub(super) skipped: u64,
}

/// Why an archive is not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// No bytes, or no entries.
    #[error("it is empty")]
    Empty,
    /// A compression that is not understood.
    #[error("it is compressed with {0}: only plain, gzip and zstd archives are understood")]
    Compression(&'static str),
    /// Reading failed: damaged, cut off, or no archive at all.
    #[error("it cannot be read as a tar archive: {0}")]
    Read(io::Error),
    /// More than the bounds allow.
    #[error("it holds more than {most} {what}")]
    Bounds {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        most: u64,
    },
    /// One entry is not acceptable.
    #[error("entry {path:?}: {why}")]
    Entry {
        /// The entry's name, shortened.
        path: String,
        /// Why not.
        why: String,
    },
}

/// What descriptive headers said of the next entry.
#[derive(Default)]
struct Described {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<i64>,
}

/// One entry, understood.
struct Member {
    name: Vec<u8>,
    link: Vec<u8>,
    kind: EntryType,
    size: u64,
    owner: Owner,
}

/// Unpacks an archive into an empty directory.
pub(super) fn unpack(
    reader: impl Read,
    root: BorrowedFd<'_>,
    bounds: &Bounds,
    form: Form,
) -> Result<Report, Refused> {
    let mut archive = tar::Archive::new(reader);
    let mut tree = Tree::new(root);
    let mut report = Report::default();
    let mut described = Described::default();
    let mut headers = 0;
    for entry in archive.entries().map_err(Refused::Read)?.raw(true) {
        let mut entry = entry.map_err(Refused::Read)?;
        headers += 1;
        if headers > bounds.entries {
            return Err(Refused::Bounds { what: "entries", most: bounds.entries });
        }
        if describe(&mut described, &mut entry)? {
            continue;
        }
        let member = understand(std::mem::take(&mut described), &entry)?;
        report.bytes = report.bytes.saturating_add(member.size);
        if report.bytes > bounds.bytes {
            return Err(Refused::Bounds { what: "bytes", most: bounds.bytes });
        }
        let refuse = |error: &TreeError| refuse(&member.name, &error.to_string());
        let path = safe_path(&member.name, bounds.depth).map_err(|why| self::refuse(&member.name, why))?;
        if form == Form::Layer
            && let Some(mark) = mark_of(&path).map_err(|why| self::refuse(&member.name, why))?
        {
            match mark {
                Mark::Whiteout(path) => tree.whiteout(&path),
                Mark::Opaque(path) => tree.opaque(&path),
                Mark::Other => Ok(()),
            }
            .map_err(|error| refuse(&error))?;
            report.entries += 1;
            continue;
        }
        match member.kind {
            EntryType::Block | EntryType::Char | EntryType::Fifo => {
                report.skipped += 1;
                continue;
            }
            EntryType::Directory => tree.directory(&path, &member.owner),
            EntryType::Regular | EntryType::Continuous if member.name.ends_with(b"/") => {
                tree.directory(&path, &member.owner)
            }
            EntryType::Regular | EntryType::Continuous => {
                tree.file(&path, &member.owner, &mut entry, member.size)
            }
            EntryType::Symlink => tree.symlink(&path, OsStr::from_bytes(&member.link), &member.owner),
            EntryType::Link => {
                let target =
                    safe_path(&member.link, bounds.depth).map_err(|why| self::refuse(&member.name, why))?;
                tree.hard_link(&path, &target)
            }
            other => {
                let why = format!("entries of type {:?} are not understood", char::from(other.as_byte()));
                return Err(self::refuse(&member.name, &why));
            }
        }
        .map_err(|error| refuse(&error))?;
        report.entries += 1;
    }
    // A layer without entries changes nothing, and image builders do write such layers.
    if report.entries == 0 && form == Form::Whole {
        return Err(Refused::Empty);
    }
    tree.finish();
    Ok(report)
}

/// Takes in a header that only describes the next one; `false` when this is an entry itself.
fn describe(described: &mut Described, entry: &mut tar::Entry<'_, impl Read>) -> Result<bool, Refused> {
    match entry.header().entry_type() {
        EntryType::GNULongName => described.name = Some(name_of(entry)?),
        EntryType::GNULongLink => described.link = Some(name_of(entry)?),
        EntryType::XHeader => {
            let text = contents(entry, MAX_PAX)?;
            for pair in PaxExtensions::new(&text) {
                let pair = pair.map_err(Refused::Read)?;
                let value = pair.value_bytes();
                match pair.key_bytes() {
                    b"path" => described.name = Some(value.to_owned()),
                    b"linkpath" => described.link = Some(value.to_owned()),
                    b"size" => described.size = Some(number(value)?),
                    b"uid" => described.uid = Some(number(value)?),
                    b"gid" => described.gid = Some(number(value)?),
                    b"mtime" => described.mtime = seconds(value),
                    key if key.starts_with(b"GNU.sparse.") => {
                        return Err(refuse(&entry.path_bytes(), "sparse files are not understood"));
                    }
                    _ => {}
                }
            }
        }
        EntryType::XGlobalHeader => drop(contents(entry, MAX_PAX)?),
        _ => return Ok(false),
    }
    Ok(true)
}

fn understand(described: Described, entry: &tar::Entry<'_, impl Read>) -> Result<Member, Refused> {
    let header = entry.header();
    let name = described.name.unwrap_or_else(|| header.path_bytes().into_owned());
    let link =
        described.link.or_else(|| header.link_name_bytes().map(|link| link.into_owned())).unwrap_or_default();
    let size = header.entry_size().map_err(Refused::Read)?;
    if described.size.is_some_and(|said| said != size) {
        // Two readers would see two different archives.
        return Err(refuse(&name, "its header and its PAX extension give different sizes"));
    }
    let id = |said: Option<u64>, read: io::Result<u64>| match said.map_or(read, Ok) {
        Ok(id) if id < IDS => Ok(u32::try_from(id).unwrap_or(0)),
        Ok(id) => {
            Err(refuse(&name, &format!("user or group id {id}: only 0 to {} exist in a container", IDS - 1)))
        }
        Err(error) => Err(Refused::Read(error)),
    };
    let owner = Owner {
        uid: id(described.uid, header.uid())?,
        gid: id(described.gid, header.gid())?,
        mode: header.mode().map_err(Refused::Read)? & 0o7777,
        mtime: described.mtime.unwrap_or_else(|| {
            header.mtime().ok().and_then(|seconds| i64::try_from(seconds).ok()).unwrap_or(0)
        }),
    };
    Ok(Member { name, link, kind: header.entry_type(), size, owner })
}

/// A relative path of ordinary names. Nothing is cleaned up: an honest archive has nothing that needs it.
fn safe_path(bytes: &[u8], depth: usize) -> Result<PathBuf, &'static str> {
    if bytes.len() > usize::try_from(MAX_NAME).unwrap_or(usize::MAX) {
        return Err("its name is too long");
    }
    if bytes.contains(&0) {
        return Err("its name contains a zero byte");
    }
    let mut path = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(bytes)).components() {
        match component {
            Component::CurDir => {}
            Component::Normal(name) if name.len() <= 255 => path.push(name),
            Component::Normal(_) => return Err("its name is too long"),
            Component::ParentDir => return Err("its name contains \"..\""),
            Component::RootDir | Component::Prefix(_) => return Err("its name is absolute"),
        }
    }
    if path.components().count() > depth { Err("it lies too deep") } else { Ok(path) }
}

/// An entry of a layer that speaks of lower layers.
enum Mark {
    /// That path is gone.
    Whiteout(PathBuf),
    /// All that lower layers have in that directory is gone.
    Opaque(PathBuf),
    /// Something of a former union file system's own (AUFS), which says nothing.
    Other,
}

fn mark_of(path: &Path) -> Result<Option<Mark>, &'static str> {
    const PREFIX: &[u8] = b".wh.";
    let marked = |name: &OsStr| name.as_bytes().starts_with(PREFIX);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(None) };
    if parent.components().any(|part| marked(part.as_os_str())) {
        return Err("it lies in a whiteout");
    }
    let Some(hidden) = name.as_bytes().strip_prefix(PREFIX) else { return Ok(None) };
    Ok(Some(match hidden {
        b"" | b"." | b".." => return Err("it is a whiteout of no name"),
        b".wh..opq" => Mark::Opaque(parent.to_owned()),
        other if other.starts_with(PREFIX) => Mark::Other,
        other => Mark::Whiteout(parent.join(OsStr::from_bytes(other))),
    }))
}

fn name_of(entry: &mut tar::Entry<'_, impl Read>) -> Result<Vec<u8>, Refused> {
    let mut name = contents(entry, MAX_NAME + 1)?;
    if name.last() == Some(&0) {
        name.pop();
    }
    Ok(name)
}

fn contents(entry: &mut tar::Entry<'_, impl Read>, most: u64) -> Result<Vec<u8>, Refused> {
    if entry.size() > most {
        return Err(refuse(&entry.path_bytes(), &format!("a descriptive header of {} bytes", entry.size())));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(Refused::Read)?;
    Ok(bytes)
}

fn number(text: &[u8]) -> Result<u64, Refused> {
    let parsed = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    parsed
        .ok_or_else(|| Refused::Read(io::Error::new(io::ErrorKind::InvalidData, "a PAX number that is none")))
}

/// Whole seconds of a time with a fraction.
fn seconds(text: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?;
    text.split_once('.').map_or(text, |(whole, _)| whole).parse().ok()
}

fn refuse(name: &[u8], why: &str) -> Refused {
    let path: String = String::from_utf8_lossy(name).chars().take(200).collect();
    Refused::Entry { path, why: why.to_owned() }
}
