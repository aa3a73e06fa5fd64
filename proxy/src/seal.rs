//! What one proxy asks of another carries a seal: a code over all that the other believes, which only who has the cluster's
//! key can make. A body is not sealed, and whoever reads the network may repeat a request for some minutes; where that is to
//! be feared, mutual TLS keeps both away (see [`crate::tls`]).

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{HeaderMap, HeaderName, header};
use sha2::Sha256;

/// Fewest bytes of a key.
const KEY_MIN: usize = 32;
/// Most of them.
const KEY_MAX: u64 = 4096;
/// How far two hosts' clocks may differ, seconds.
const TOLERANCE: u64 = 300;

/// The host that is meant.
pub const NODE: HeaderName = HeaderName::from_static("x-fastcontainer-node");
/// What is asked: see [`Kind`].
pub const KIND: HeaderName = HeaderName::from_static("x-fastcontainer-kind");
/// The app.
pub const APP: HeaderName = HeaderName::from_static("x-fastcontainer-app");
/// The generation of the instance that was picked.
pub const GENERATION: HeaderName = HeaderName::from_static("x-fastcontainer-generation");
/// The client's address.
pub const CLIENT: HeaderName = HeaderName::from_static("x-fastcontainer-client");
/// `http` or `https`: how the client came.
pub const SCHEME: HeaderName = HeaderName::from_static("x-fastcontainer-scheme");
/// Of a wake: hosts that the asker could not reach a moment ago, between commas.
pub const UNREACHABLE: HeaderName = HeaderName::from_static("x-fastcontainer-unreachable");
/// The time and the code.
pub const SEAL: HeaderName = HeaderName::from_static("x-fastcontainer-seal");

/// All that the other side believes because of the seal.
const SEALED: [HeaderName; 14] = [
    NODE,
    KIND,
    APP,
    GENERATION,
    CLIENT,
    SCHEME,
    UNREACHABLE,
    HeaderName::from_static("x-request-id"),
    header::HOST,
    header::FORWARDED,
    HeaderName::from_static("x-forwarded-for"),
    HeaderName::from_static("x-forwarded-proto"),
    HeaderName::from_static("x-forwarded-host"),
    HeaderName::from_static("x-real-ip"),
];

/// The secret that all proxies of a cluster share.
#[derive(Clone)]
pub struct ClusterKey(Hmac<Sha256>);

/// Why a file gives no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file system refused.
    #[error("the cluster's key cannot be read from {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It holds too little or too much.
    #[error(
        "{path} holds {length} bytes, which is no key: it takes {KEY_MIN} to {KEY_MAX}, the same on every host; make one with `openssl rand -hex 32`"
    )]
    Length {
        /// Which file.
        path: PathBuf,
        /// How many bytes there are.
        length: usize,
    },
}

/// Why a request is not believed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SealFault {
    /// It has no seal, or one that cannot be read.
    #[error("it has no seal")]
    Missing,
    /// It was sealed too long ago, or in the future.
    #[error("its seal is from another time; do the hosts' clocks differ?")]
    Time,
    /// The code is not the one of this key.
    #[error("its seal is wrong; do all hosts have the same key?")]
    Wrong,
}

impl ClusterKey {
    /// Reads it from a file.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let fail = |source| KeyError::Read { path: path.to_owned(), source };
        let length = fs::metadata(path).map_err(fail)?.len();
        if length > KEY_MAX {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            return Err(KeyError::Length { path: path.to_owned(), length });
        }
        let bytes = fs::read(path).map_err(fail)?;
        Self::new(&bytes).ok_or_else(|| KeyError::Length { path: path.to_owned(), length: bytes.len() })
    }

    /// The key that these bytes are, if they are enough. Of a text the white space at both ends does not count, which
    /// editors like to add; of random bytes each does.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let text = bytes.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace());
        let bytes = if text { bytes.trim_ascii() } else { bytes };
        if bytes.len() < KEY_MIN {
            return None;
        }
        Hmac::new_from_slice(bytes).ok().map(Self)
    }

    /// The seal of a request at this time.
    #[must_use]
    pub fn seal(&self, method: &str, target: &[u8], headers: &HeaderMap) -> String {
        let now = now();
        let code = self.code(now, method, target, headers).finalize().into_bytes();
        format!("{now}.{}", hex(&code))
    }

    /// Whether a request is as it was sealed.
    ///
    /// # Errors
    /// [`SealFault`].
    pub fn check(&self, method: &str, target: &[u8], headers: &HeaderMap) -> Result<(), SealFault> {
        let mut seals = headers.get_all(SEAL).iter();
        let (Some(seal), None) = (seals.next(), seals.next()) else { return Err(SealFault::Missing) };
        let (time, code) =
            seal.to_str().ok().and_then(|seal| seal.split_once('.')).ok_or(SealFault::Missing)?;
        let time: u64 = time.parse().map_err(|_| SealFault::Missing)?;
        let code = unhex(code).ok_or(SealFault::Missing)?;
        // Whether it is genuine comes first: a forger learns nothing of our clock.
        self.code(time, method, target, headers).verify_slice(&code).map_err(|_| SealFault::Wrong)?;
        if now().abs_diff(time) > TOLERANCE { Err(SealFault::Time) } else { Ok(()) }
    }

    fn code(&self, time: u64, method: &str, target: &[u8], headers: &HeaderMap) -> Hmac<Sha256> {
        let mut mac = self.0.clone();
        // With its length before it no piece can be taken for a part of another.
        let mut add = |piece: &[u8]| {
            mac.update(&(piece.len() as u64).to_be_bytes());
            mac.update(piece);
        };
        add(b"fastcontainer-1");
        add(&time.to_be_bytes());
        add(method.as_bytes());
        add(target);
        for name in &SEALED {
            let values = headers.get_all(name);
            add(&(values.iter().count() as u64).to_be_bytes());
            values.iter().for_each(|value| add(value.as_bytes()));
        }
        mac
    }
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterKey(…)")
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 15)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let nibble = |digit: u8| char::from(digit).to_digit(16).and_then(|nibble| u8::try_from(nibble).ok());
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    pairs.iter().map(|[high, low]| Some(nibble(*high)? << 4 | nibble(*low)?)).collect()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn key(fill: u8) -> ClusterKey {
        ClusterKey::new(&[fill; 32]).unwrap()
    }

    fn headers() -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in
            [(NODE, "b"), (APP, "blog"), (CLIENT, "192.0.2.1"), (header::HOST, "blog.example")]
        {
            headers.insert(name, HeaderValue::from_static(value));
        }
        headers
    }

    fn sealed() -> HeaderMap {
        let mut headers = headers();
        headers.insert(SEAL, key(b'k').seal("GET", b"/x", &headers).parse().unwrap());
        headers
    }

    #[test]
    fn a_sealed_request_is_believed_as_it_was_and_in_no_other_way() {
        let fine = sealed();
        assert_eq!(key(b'k').check("GET", b"/x", &fine), Ok(()));
        assert_eq!(key(b'k').check("POST", b"/x", &fine), Err(SealFault::Wrong));
        assert_eq!(key(b'k').check("GET", b"/y", &fine), Err(SealFault::Wrong));
        assert_eq!(key(b'l').check("GET", b"/x", &fine), Err(SealFault::Wrong));
        for name in &SEALED {
            let mut changed = sealed();
            changed.append(name, HeaderValue::from_static("other"));
            assert_eq!(key(b'k').check("GET", b"/x", &changed), Err(SealFault::Wrong), "{name}");
        }
        let mut unsealed = sealed();
        unsealed.insert("x-harmless", HeaderValue::from_static("1"));
        assert_eq!(key(b'k').check("GET", b"/x", &unsealed), Ok(()), "an app's own headers are not sealed");
    }

    #[test]
    fn what_is_no_seal_is_refused() {
        for bad in ["", "x", "1.", "1.zz", ".00", "99999999999999999999.00", "1.0"] {
            let mut headers = sealed();
            headers.insert(SEAL, bad.parse().unwrap());
            assert!(key(b'k').check("GET", b"/x", &headers).is_err(), "{bad}");
        }
        let mut twice = sealed();
        twice.append(SEAL, twice[SEAL].clone());
        assert_eq!(key(b'k').check("GET", b"/x", &twice), Err(SealFault::Missing));
        assert_eq!(key(b'k').check("GET", b"/x", &headers()), Err(SealFault::Missing));
    }

    #[test]
    fn a_seal_is_good_for_five_minutes() {
        let old = |age: u64| {
            let (key, mut headers, time) = (key(b'k'), headers(), now() - age);
            let code = key.code(time, "GET", b"/x", &headers).finalize().into_bytes();
            headers.insert(SEAL, format!("{time}.{}", hex(&code)).parse().unwrap());
            key.check("GET", b"/x", &headers)
        };
        assert_eq!(old(TOLERANCE - 10), Ok(()));
        assert_eq!(old(TOLERANCE + 10), Err(SealFault::Time));
    }

    #[test]
    fn a_key_is_long_enough_and_never_shown() {
        assert!(ClusterKey::new(b"short\n").is_none());
        assert!(ClusterKey::new(&[b' '; 64]).is_none());
        assert!(ClusterKey::new(&[b'x'; 31]).is_none());
        let mut random = [0xf3; 32];
        (random[0], random[31]) = (b' ', b'\n');
        assert!(ClusterKey::new(&random).is_some(), "a random byte may look like white space");
        let edited = ClusterKey::new(b"kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk\n").unwrap();
        assert_eq!(edited.check("GET", b"/x", &sealed()), Ok(()), "an editor's last line end");
        assert!(!format!("{:?}", key(b'k')).contains("kk"));
    }
}
