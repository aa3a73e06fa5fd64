//! From the bytes of an archive's file to entries: compression by its first bytes, digest on the way.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _};
use std::os::fd::BorrowedFd;

use sha2::{Digest as _, Sha256};

use super::unpack::{self, Bounds, Refused, Report};

/// Unpacks a file that holds an archive, and tells the SHA-256 of the very bytes that were unpacked, in hexadecimal.
pub(super) fn unpack(
    mut file: File,
    root: BorrowedFd<'_>,
    bounds: &Bounds,
) -> Result<(String, Report), Refused> {
    let mut magic = Vec::new();
    Read::by_ref(&mut file).take(6).read_to_end(&mut magic).map_err(Refused::Read)?;
    file.rewind().map_err(Refused::Read)?;

    let mut hashing = Hashing { file: BufReader::with_capacity(1 << 16, file), hash: Sha256::new() };
    let report = match magic.as_slice() {
        [] => return Err(Refused::Empty),
        [0x1f, 0x8b, ..] => unpack::unpack(flate2::read::MultiGzDecoder::new(&mut hashing), root, bounds)?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut reader = zstd::stream::read::Decoder::new(&mut hashing).map_err(Refused::Read)?;
            // The memory that a frame may ask for: 128 MiB, as the command-line tool allows.
            reader.window_log_max(27).map_err(Refused::Read)?;
            unpack::unpack(reader, root, bounds)?
        }
        [b'B', b'Z', b'h', ..] => return Err(Refused::Compression("bzip2")),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => return Err(Refused::Compression("xz")),
        _ => unpack::unpack(&mut hashing, root, bounds)?,
    };
    // What follows the archive's end belongs to the file, if not to the image.
    io::copy(&mut hashing, &mut io::sink()).map_err(Refused::Read)?;
    let digest = hashing.hash.finalize();
    Ok((digest.iter().map(|byte| format!("{byte:02x}")).collect(), report))
}

struct Hashing {
    file: BufReader<File>,
    hash: Sha256,
}

impl Read for Hashing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.file.read(buffer)?;
        self.hash.update(&buffer[..length]);
        Ok(length)
    }
}
