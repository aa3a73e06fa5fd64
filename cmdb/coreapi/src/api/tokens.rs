//! Who may ask what: a file with a line `ROLE NAME SHA256` for each token, read again when it changes.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

/// Larger files are refused.
const LARGEST: u64 = 1 << 20;
/// No token is longer.
const LONGEST_TOKEN: usize = 512;

/// What a token allows; each role includes those before it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Role {
    /// See what is there, without environments and output of apps.
    Read,
    /// Wake, stop, restart, scale, limit; read what apps write.
    Operate,
    /// Configure apps and hosts.
    Admin,
}

/// Someone whose token is right.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Holder {
    pub(crate) name: Arc<str>,
    pub(crate) role: Role,
}

/// The file, as it was when it was last read.
#[derive(Debug)]
pub(crate) struct Tokens {
    path: PathBuf,
    read: Mutex<Read>,
}

#[derive(Debug, Default)]
struct Read {
    stamp: Stamp,
    entries: Vec<(Holder, [u8; 32])>,
    /// What is wrong with the file, to be told of once.
    faults: Vec<String>,
}

/// Tells one version of the file from another.
type Stamp = Option<(u64, u64, i64, i64, i64, i64)>;

impl Tokens {
    /// Reads the file.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let tokens = Self { path: path.to_owned(), read: Mutex::new(load(path)?) };
        Ok(tokens)
    }

    /// Whose token that is. Every entry is compared, each in constant time.
    pub(crate) fn holder(&self, token: &str) -> Option<Holder> {
        if token.len() > LONGEST_TOKEN {
            return None;
        }
        let digest: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        self.refresh(&mut read);
        let mut found = None;
        for (holder, known) in &read.entries {
            if bool::from(known.ct_eq(&digest)) {
                found = Some(holder.clone());
            }
        }
        found
    }

    /// What is wrong with the file, each fault once.
    pub(crate) fn take_faults(&self) -> Vec<String> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        self.refresh(&mut read);
        std::mem::take(&mut read.faults)
    }

    /// A file that is gone or cannot be read lets nobody in: it was taken away to lock somebody out.
    fn refresh(&self, read: &mut Read) {
        let now = fs::metadata(&self.path).ok().and_then(|metadata| stamp(&metadata));
        if now == read.stamp && now.is_some() {
            return;
        }
        match load(&self.path) {
            Ok(loaded) => *read = loaded,
            Err(error) => {
                // Told once: what cannot be read has no stamp.
                if read.stamp.is_some() {
                    let fault = format!("{}: {error}; nobody is let in", self.path.display());
                    *read = Read { faults: vec![fault], ..Read::default() };
                }
            }
        }
    }
}

fn stamp(file: &fs::Metadata) -> Stamp {
    Some((file.ino(), file.size(), file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()))
}

fn load(path: &Path) -> io::Result<Read> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() || metadata.len() > LARGEST {
        return Err(io::Error::other("it is no file of tokens"));
    }
    let text = fs::read_to_string(path)?;
    let mut read = Read { stamp: stamp(&metadata), ..Read::default() };
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        match entry(line) {
            // The audit tells people apart by their names.
            Ok((holder, _)) if read.entries.iter().any(|(other, _)| other.name == holder.name) => {
                read.faults.push(format!(
                    "{}:{}: the name {:?} is another token's",
                    path.display(),
                    number + 1,
                    holder.name
                ));
            }
            Ok(entry) => read.entries.push(entry),
            Err(fault) => read.faults.push(format!("{}:{}: {fault}", path.display(), number + 1)),
        }
    }
    Ok(read)
}

fn entry(line: &str) -> Result<(Holder, [u8; 32]), &'static str> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [role, name, hash] = words.as_slice() else {
        return Err("write ROLE NAME SHA256, as `fastcontainer token ROLE NAME` prints it");
    };
    let role = match *role {
        "read" => Role::Read,
        "operate" => Role::Operate,
        "admin" => Role::Admin,
        _ => return Err("the role is one of read, operate and admin"),
    };
    let hash = digest(hash).ok_or("the third word is the SHA-256 of the token, 64 hexadecimal digits")?;
    if ["root", "-"].contains(name) {
        return Err("the name is one that the audit log uses itself");
    }
    if name.len() > 64 {
        return Err("the name is longer than 64 bytes");
    }
    Ok((Holder { name: Arc::from(*name), role }, hash))
}

fn digest(hex: &str) -> Option<[u8; 32]> {
    if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut digest = [0; 32];
    for (index, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(hex.get(2 * index..2 * index + 2)?, 16).ok()?;
    }
    Some(digest)
}

impl Role {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Operate => "operate",
            Self::Admin => "admin",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(role: &str, name: &str, token: &str) -> String {
        let hex: String = Sha256::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{role} {name} {hex}\n")
    }

    #[test]
    fn a_token_is_known_until_its_line_goes() {
        let folder = std::env::temp_dir().join(format!("fastcontainer-tokens-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("tokens");
        fs::write(&path, format!("# ours\n\n{}{}", line("read", "eve", "one"), line("admin", "bob", "two")))
            .unwrap();
        let tokens = Tokens::open(&path).unwrap();

        assert_eq!(
            tokens.holder("two").map(|holder| (holder.name.to_string(), holder.role)),
            Some(("bob".into(), Role::Admin))
        );
        assert!(tokens.holder("three").is_none() && tokens.holder("").is_none());

        fs::write(&path, format!("{}admin carl nonsense\n", line("operate", "eve", "one"))).unwrap();
        assert!(tokens.holder("two").is_none(), "revoked");
        assert_eq!(tokens.holder("one").map(|holder| holder.role), Some(Role::Operate));
        let faults = tokens.take_faults();
        assert!(faults.len() == 1 && faults[0].contains("tokens:2: the third word"), "{faults:?}");

        fs::remove_file(&path).unwrap();
        assert!(tokens.holder("one").is_none(), "a file that is gone lets nobody in");
        assert_eq!(tokens.take_faults().len(), 1);
        assert!(tokens.take_faults().is_empty(), "told once");
        fs::write(&path, line("read", "eve", "one")).unwrap();
        assert!(tokens.holder("one").is_some());
        fs::remove_dir_all(&folder).unwrap();
    }
}
