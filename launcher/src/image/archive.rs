//! From the bytes of an archive to entries: compression by its first bytes, digests on the way.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _};
use std::os::fd::BorrowedFd;

use sha2::{Digest as _, Sha256};

use super::digest::Digest;
use super::unpack::{self, Bounds, Form, Refused, Report};

/// What was unpacked.
#[derive(Debug)]
pub(super) struct Unpacked {
    /// Of the very bytes that were read.
    pub(super) digest: Digest,
    /// Of what they are without their compression.
    pub(super) content: Digest,
    pub(super) report: Report,
}

/// Unpacks a file that holds an archive.
pub(super) fn unpack(
    mut file: File,
    root: BorrowedFd<'_>,
    bounds: &Bounds,
) -> Result<(Digest, Report), Refused> {
    file.rewind().map_err(Refused::Read)?;
    let unpacked = unpack_from(file, root, bounds, Form::Whole)?;
    Ok((unpacked.digest, unpacked.report))
}

/// Unpacks an archive, reading it to its end.
pub(super) fn unpack_from(
    reader: impl Read,
    root: BorrowedFd<'_>,
    bounds: &Bounds,
    form: Form,
) -> Result<Unpacked, Refused> {
    let mut raw = Hashing::new(BufReader::with_capacity(1 << 16, reader));
    let mut magic = Vec::new();
    Read::by_ref(&mut raw).take(6).read_to_end(&mut magic).map_err(Refused::Read)?;
    let whole = io::Cursor::new(magic.clone()).chain(&mut raw);
    let (content, report) = match magic.as_slice() {
        [] => return Err(Refused::Empty),
        [0x1f, 0x8b, ..] => plain(flate2::read::MultiGzDecoder::new(whole), root, bounds, form)?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut reader = zstd::stream::read::Decoder::new(whole).map_err(Refused::Read)?;
            // The memory that a frame may ask for: 128 MiB, as the command-line tool allows.
            reader.window_log_max(27).map_err(Refused::Read)?;
            plain(reader, root, bounds, form)?
        }
        [b'B', b'Z', b'h', ..] => return Err(Refused::Compression("bzip2")),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => return Err(Refused::Compression("xz")),
        _ => plain(whole, root, bounds, form)?,
    };
    // What follows the archive's end belongs to the file, if not to the image.
    io::copy(&mut raw, &mut io::sink()).map_err(Refused::Read)?;
    Ok(Unpacked { digest: raw.finish(), content, report })
}

fn plain(
    reader: impl Read,
    root: BorrowedFd<'_>,
    bounds: &Bounds,
    form: Form,
) -> Result<(Digest, Report), Refused> {
    let mut content = Hashing::new(reader);
    let report = unpack::unpack(&mut content, root, bounds, form)?;
    if form == Form::Whole {
        // Nobody told what its digest should be, and there are archives with rubbish after their compressed part.
        return Ok((content.finish(), report));
    }
    // Padding, which a digest covers too; not for ever, for it may have been compressed well.
    let padding = io::copy(&mut Read::by_ref(&mut content).take(MAX_PADDING + 1), &mut io::sink())
        .map_err(Refused::Read)?;
    if padding > MAX_PADDING {
        return Err(Refused::Bounds { what: "bytes after its end", most: MAX_PADDING });
    }
    Ok((content.finish(), report))
}

/// The digest of a whole file.
pub(crate) fn hash_file(file: impl Read) -> io::Result<Digest> {
    let mut hashing = Hashing::new(BufReader::with_capacity(1 << 16, file));
    io::copy(&mut hashing, &mut io::sink())?;
    Ok(hashing.finish())
}

/// Tools pad archives to whole tapes' blocks; nothing honest pads by more.
const MAX_PADDING: u64 = 16 << 20;

/// Takes the digest of what is read through it.
pub(super) struct Hashing<R> {
    reader: R,
    hash: Sha256,
}

impl<R: Read> Hashing<R> {
    pub(super) fn new(reader: R) -> Hashing<R> {
        Hashing { reader, hash: Sha256::new() }
    }

    pub(super) fn finish(self) -> Digest {
        Digest::of_hash(self.hash)
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.reader.read(buffer)?;
        self.hash.update(&buffer[..length]);
        Ok(length)
    }
}
