//! Where the CMDB lives: what `--cmdb` and `FASTCONTAINER_CMDB` say.

use std::{
    fmt, fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

/// The variable by which `up` tells its programs, whose command lines everybody on the host may read.
pub const VARIABLE: &str = "FASTCONTAINER_CMDB";
/// The launcher's own.
pub const EMBEDDED: &str = "embedded";

const FILE: &str = "file:";

/// Where the CMDB lives.
#[derive(Clone, Eq, PartialEq)]
pub enum Home {
    /// In the launcher; there is one host.
    Embedded,
    /// In Redis, at this address, which may hold a password.
    Redis(String),
}

/// Why a home cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// The file that holds the address cannot be read.
    #[error("the file with the CMDB's address, {path}, cannot be read: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Others may read the file.
    #[error("{path} holds the CMDB's address and may be read by others (mode {mode:04o}): chmod 600 {path}")]
    Open {
        /// Which file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It is no address.
    #[error(
        "{0} is no home of a CMDB; write `embedded`, redis://host:port, rediss://host:port, \
         redis-sentinel://host,host/service, or file:PATH of a file that holds such an address"
    )]
    Unknown(String),
    /// A password on a command line.
    #[error(
        "everybody on this host can read the password on the command line: put the address into a file \
         (mode 0600) and give --cmdb file:PATH, or set FASTCONTAINER_CMDB"
    )]
    Password,
}

impl Home {
    /// What `text` says; a file is read.
    ///
    /// # Errors
    /// See [`HomeError`]; no message holds a password.
    pub fn find(text: &str) -> Result<Self, HomeError> {
        if text == EMBEDDED || text.is_empty() {
            return Ok(Self::Embedded);
        }
        if let Some(path) = text.strip_prefix(FILE) {
            // What a file leaves out must not make a host of a cluster one on its own.
            return match Self::find(&read(Path::new(path))?)? {
                Self::Embedded => Err(HomeError::Unknown(format!("what {path} holds"))),
                redis => Ok(redis),
            };
        }
        let scheme = text.split_once("://").map(|(scheme, _)| scheme);
        if scheme.is_some_and(|scheme| scheme.starts_with("redis")) {
            return Ok(Self::Redis(text.to_owned()));
        }
        let shown = if text.contains('@') { "what was given" } else { text };
        Err(HomeError::Unknown(format!("\"{shown}\"")))
    }

    /// As [`Home::find`], for a text that may have come from this process's command line.
    ///
    /// # Errors
    /// Also when it has, and holds a password.
    pub fn of_option(text: &str) -> Result<Self, HomeError> {
        let has_password = text.split_once("://").is_some_and(|(_, rest)| {
            let login = rest.rsplit_once('@').map_or("", |(login, _)| login);
            login.split_once(':').is_some_and(|(_, password)| !password.is_empty())
        });
        if has_password && std::env::args_os().any(|argument| argument.to_string_lossy().contains(text)) {
            return Err(HomeError::Password);
        }
        Self::find(text)
    }

    /// The address of Redis, where there is one.
    #[must_use]
    pub fn address(&self) -> Option<&str> {
        match self {
            Self::Embedded => None,
            Self::Redis(address) => Some(address),
        }
    }
}

impl fmt::Debug for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The address may hold a password.
        f.write_str(match self {
            Self::Embedded => "Home::Embedded",
            Self::Redis(_) => "Home::Redis",
        })
    }
}

fn read(path: &Path) -> Result<String, HomeError> {
    let fault = |source| HomeError::Read { path: path.to_owned(), source };
    let mode = fs::metadata(path).map_err(fault)?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(HomeError::Open { path: path.to_owned(), mode });
    }
    let text = fs::read_to_string(path).map_err(fault)?.trim().to_owned();
    if text.starts_with(FILE) {
        return Err(HomeError::Unknown("a file that names another file".to_owned()));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_given_as_such_or_in_a_file_of_ones_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cmdb");
        fs::write(&path, "rediss://fc:secret@cmdb.internal:6380\n").unwrap();
        let named = format!("file:{}", path.display());

        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let refused = Home::find(&named).unwrap_err().to_string();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let found = Home::find(&named).unwrap();

        assert!(refused.contains("chmod 600"), "{refused}");
        assert_eq!(found.address(), Some("rediss://fc:secret@cmdb.internal:6380"));
        assert_eq!(Home::find("embedded").unwrap(), Home::Embedded);
        assert_eq!(Home::find("redis://127.0.0.1:6379").unwrap().address(), Some("redis://127.0.0.1:6379"));
    }

    #[test]
    fn what_is_no_home_is_refused_without_its_password() {
        for bad in ["fc:secret@cmdb.internal", "http://fc:secret@cmdb.internal", "127.0.0.1:6379"] {
            let message = Home::find(bad).unwrap_err().to_string();
            assert!(message.contains("redis://") && !message.contains("secret"), "{message}");
        }
        assert!(!format!("{:?}", Home::Redis("redis://:secret@h".into())).contains("secret"));
    }
}
