//! How a command ends when it does not end well: what stderr says and which exit code scripts see.

use std::{io, process::ExitCode};

use launcher_client::{
    ClientError,
    wire::{Refusal, RefusalCode},
};

use crate::text;

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// It was tried and did not work: exit 1.
    #[error("{0}")]
    Failed(String),
    /// The command told all there is to tell on stdout already (`check` and its faults): exit 1.
    #[error("")]
    Told,
    /// Wrong usage, or this user may not: exit 2.
    #[error("{0}")]
    Usage(String),
    /// Nothing answers: exit 3.
    #[error("{0}")]
    NotRunning(String),
    /// No such app or request: exit 4.
    #[error("{0}")]
    NotFound(String),
    /// Whoever read stdout has read enough (`fastcontainer ps | head -1`): exit 0, quietly.
    #[error("")]
    ReaderLeft,
}

impl Failure {
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::Failed(message.into())
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::Usage(message.into())
    }

    /// The exit code; documented in `--help`.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::ReaderLeft => 0,
            Self::Failed(_) | Self::Told => 1,
            Self::Usage(_) => 2,
            Self::NotRunning(_) => 3,
            Self::NotFound(_) => 4,
        }
    }

    /// Says it on stderr, if there is something to say.
    pub(crate) fn report(&self) -> ExitCode {
        let message = self.to_string();
        if !message.is_empty() {
            use io::Write as _;
            // A stderr that is gone must not turn into a panic.
            let _ = writeln!(io::stderr(), "fastcontainer: {}", text::clean_lines(&message));
        }
        ExitCode::from(self.code())
    }

    /// A socket at `path` could not be reached.
    pub(crate) fn unreachable(path: &std::path::Path, what: &str, error: &io::Error) -> Self {
        let path = path.display();
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Self::NotRunning(format!(
                "no {what} answers at {path}; is `fastcontainer up` running, with this --state?"
            )),
            io::ErrorKind::PermissionDenied => Self::Usage(format!(
                "this user may not reach the {what} at {path}; run the command as root, or as a member of group {}",
                launcher_client::paths::GROUP_ID
            )),
            _ => Self::NotRunning(format!("the {what} at {path} cannot be reached: {error}")),
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Connect { path, source } => Self::unreachable(&path, "launcher", &source),
            ClientError::Closed => Self::NotRunning(
                "the launcher went away before it answered; `fastcontainer ps` tells whether it is back"
                    .into(),
            ),
            ClientError::Refused(refusal) => refusal.into(),
            other @ (ClientError::Unexpected(_) | ClientError::Packet(_)) => Self::Failed(other.to_string()),
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let message = match refusal.retry_after_ms {
            Some(ms) => format!("{} (try again in {})", refusal.message, text::duration_ms(ms)),
            None => refusal.message,
        };
        match refusal.code {
            RefusalCode::UnknownApp | RefusalCode::UnknownInstance => Self::NotFound(message),
            RefusalCode::Forbidden => Self::Usage(message),
            RefusalCode::StartFailed
            | RefusalCode::StartTimeout
            | RefusalCode::Backoff
            | RefusalCode::Busy
            | RefusalCode::Elsewhere
            | RefusalCode::Conflict
            | RefusalCode::BadRequest
            | RefusalCode::Internal => Self::Failed(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: RefusalCode, retry_after_ms: Option<u64>) -> Failure {
        ClientError::Refused(Refusal { code, message: "no".into(), retry_after_ms, elsewhere: None }).into()
    }

    #[test]
    fn scripts_can_tell_failures_apart() {
        assert_eq!(refused(RefusalCode::StartFailed, None).code(), 1);
        assert_eq!(refused(RefusalCode::Forbidden, None).code(), 2);
        assert_eq!(refused(RefusalCode::UnknownApp, None).code(), 4);
        let gone = ClientError::Connect { path: "/x".into(), source: io::ErrorKind::NotFound.into() };
        assert_eq!(Failure::from(gone).code(), 3);
        let closed_door =
            ClientError::Connect { path: "/x".into(), source: io::ErrorKind::PermissionDenied.into() };
        assert_eq!(Failure::from(closed_door).code(), 2);
        assert_eq!(Failure::ReaderLeft.code(), 0);
    }

    #[test]
    fn a_back_off_says_when_to_try_again() {
        assert_eq!(refused(RefusalCode::Backoff, Some(2_500)).to_string(), "no (try again in 2.5s)");
    }
}
