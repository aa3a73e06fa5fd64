//! An image layout: a folder, or a plain archive of one, from which blobs are read by their digest.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use oci_spec::image::{Descriptor, ImageIndex};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use serde::de::DeserializeOwned;

use super::super::digest::Digest;
use super::{LayerBlob, MAX_JSON, OciError, blob_path, digest_of, io_error};

/// Blobs in an archive; a layout has a few more than layers.
const MAX_ENTRIES: usize = 100_000;
const INDEX: &str = "index.json";

/// See the module.
#[derive(Debug)]
pub(crate) enum Layout {
    /// A folder.
    Folder(OwnedFd),
    /// An archive, with the place of each file in it: first byte and length.
    Archive(File, HashMap<PathBuf, (u64, u64)>),
}

impl Layout {
    /// A layout in a folder.
    pub(crate) fn of_folder(path: &Path) -> io::Result<Layout> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Layout::Folder(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// Reads where things are in an archive; its contents stay where they are.
    pub(in crate::image) fn of_archive(mut file: File) -> Result<Layout, OciError> {
        let mut places = HashMap::new();
        file.rewind().map_err(|e| io_error("read", e))?;
        let mut archive = tar::Archive::new(&file);
        let entries = archive.entries_with_seek().map_err(OciError::Archive)?.raw(true);
        for (count, entry) in entries.enumerate() {
            if count >= MAX_ENTRIES {
                return Err(OciError::Entries(MAX_ENTRIES));
            }
            let entry = entry.map_err(OciError::Archive)?;
            let header = entry.header();
            if !header.entry_type().is_file() {
                continue;
            }
            let (Ok(path), Ok(size)) = (header.path(), header.entry_size()) else { continue };
            let path = path.components().filter(|part| *part != Component::CurDir).collect();
            places.insert(path, (entry.raw_file_position(), size));
        }
        Ok(Layout::Archive(file, places))
    }

    /// The file that changes when the layout's images do.
    pub(in crate::image) fn index_file(&self) -> Result<File, OciError> {
        match self {
            Layout::Folder(folder) => match open(folder, Path::new(INDEX)) {
                Err(Errno::NOENT) => Err(OciError::NoIndex),
                other => other.map_err(|e| io_error("open index.json", e)),
            },
            Layout::Archive(file, _) => file.try_clone().map_err(|e| io_error("duplicate", e)),
        }
    }

    /// The list of its images.
    pub(super) fn index(&self) -> Result<ImageIndex, OciError> {
        let (reader, size) = self.open(Path::new(INDEX))?.ok_or(OciError::NoIndex)?;
        parse("index", &read_json("index", reader, size)?)
    }

    /// A document, verified to be the one that is meant; its digest.
    pub(super) fn json<T: DeserializeOwned>(
        &self,
        what: &'static str,
        descriptor: &Descriptor,
    ) -> Result<(Digest, T), OciError> {
        let told = digest_of(descriptor)?;
        let bytes = read_json(what, self.blob(what, &told, descriptor.size())?, descriptor.size())?;
        let found = Digest::of(&bytes);
        if found != told {
            return Err(OciError::Digest { what, told, found });
        }
        Ok((told, parse(what, &bytes)?))
    }

    /// The bytes of a layer; whoever reads them has to verify their digest.
    pub(in crate::image) fn layer(&self, layer: &LayerBlob) -> Result<impl Read, OciError> {
        self.blob("layer", &layer.digest, layer.size)
    }

    fn blob(&self, what: &'static str, digest: &Digest, told: u64) -> Result<io::Take<File>, OciError> {
        let missing = || OciError::Missing { what, digest: digest.clone() };
        let (reader, found) = self.open(&blob_path(digest))?.ok_or_else(missing)?;
        if found != told {
            return Err(OciError::Size { what, digest: digest.clone(), told, found });
        }
        Ok(reader)
    }

    /// A file of the layout, and its length.
    fn open(&self, path: &Path) -> Result<Option<(io::Take<File>, u64)>, OciError> {
        match self {
            Layout::Folder(folder) => {
                let file = match open(folder, path) {
                    Ok(file) => file,
                    Err(Errno::NOENT) => return Ok(None),
                    Err(errno) => return Err(io_error("open a blob", errno)),
                };
                let meta = file.metadata().map_err(|e| io_error("read a blob", e))?;
                if !meta.is_file() {
                    return Ok(None);
                }
                Ok(Some((file.take(meta.len()), meta.len())))
            }
            Layout::Archive(file, places) => {
                let Some((start, length)) = places.get(path) else { return Ok(None) };
                // A duplicate shares its position with the original: only one blob is read at a time.
                let mut file = file.try_clone().map_err(|e| io_error("duplicate", e))?;
                file.seek(SeekFrom::Start(*start)).map_err(|e| io_error("read a blob", e))?;
                Ok(Some((file.take(*length), *length)))
            }
        }
    }
}

/// Beneath the layout; never blocks, should there be a FIFO in its place.
fn open(folder: &OwnedFd, path: &Path) -> Result<File, Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(folder, path, flags, Mode::empty(), resolve).map(File::from)
}

fn read_json(what: &'static str, reader: impl Read, size: u64) -> Result<Vec<u8>, OciError> {
    if size > MAX_JSON {
        return Err(OciError::Json { what, why: format!("it has {size} bytes; {MAX_JSON} are allowed") });
    }
    let mut bytes = Vec::new();
    reader.take(size).read_to_end(&mut bytes).map_err(|e| io_error("read", e))?;
    Ok(bytes)
}

fn parse<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, OciError> {
    serde_json::from_slice(bytes).map_err(|error| OciError::Json { what, why: error.to_string() })
}
