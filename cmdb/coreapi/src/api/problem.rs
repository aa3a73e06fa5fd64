//! What goes wrong, told as `application/problem+json` (RFC 9457).

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use cmdb::vhost::{Fault, FieldFault};
use launcher_client::{
    ClientError,
    wire::{Refusal, RefusalCode},
};
use serde::Serialize;
use utoipa::ToSchema;

/// Why a request was not done.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct Problem {
    /// Always `about:blank`: `code` tells problems apart.
    #[serde(rename = "type")]
    kind: &'static str,
    /// The status in words.
    title: &'static str,
    /// The HTTP status.
    status: u16,
    /// For programs: `invalid`, `unknown-app`, `conflict`, `unauthorized`, …; those of the launcher among them.
    code: &'static str,
    /// For people: what is wrong.
    detail: String,
    /// Each fault of what was sent, all at once.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<FieldError>,
    /// The host that has what was asked for: ask its API.
    #[serde(skip_serializing_if = "Option::is_none")]
    elsewhere: Option<String>,
    /// Seconds after which it makes sense to try again.
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after: Option<u64>,
}

/// One fault, with its place: a JSON pointer into the body, or a line of a file.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub(crate) struct FieldError {
    /// JSON pointer (RFC 6901) into the request's body.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pointer: Option<String>,
    /// The vhost file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<String>,
    /// Line, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) line: Option<usize>,
    /// Column in characters, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) column: Option<usize>,
    /// What is wrong.
    pub(crate) detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) mend: String,
}

/// The detail of a [`Problem`], left at the response for the audit log.
#[derive(Clone, Debug)]
pub(crate) struct Told(pub(crate) String);

impl Problem {
    pub(crate) fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            kind: "about:blank",
            title: status.canonical_reason().unwrap_or("Problem"),
            status: status.as_u16(),
            code,
            detail: detail.into(),
            errors: Vec::new(),
            elsewhere: None,
            retry_after: None,
        }
    }

    /// Something in the body is wrong.
    pub(crate) fn invalid(detail: impl Into<String>, errors: Vec<FieldError>) -> Self {
        Self { errors, ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", detail) }
    }

    /// The request cannot be understood.
    pub(crate) fn malformed(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", detail)
    }

    pub(crate) fn unknown_app(name: &cmdb::AppName) -> Self {
        Self::new(StatusCode::NOT_FOUND, "unknown-app", format!("no app is called \"{name}\""))
    }

    pub(crate) fn conflict(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict", detail)
    }

    pub(crate) fn with(mut self, errors: Vec<FieldError>) -> Self {
        self.errors = errors;
        self
    }

    /// Whether this is told as a fault of ours.
    pub(crate) fn is_internal(&self) -> bool {
        self.status == StatusCode::INTERNAL_SERVER_ERROR.as_u16()
    }

    /// The same, told as a conflict with how things are.
    pub(crate) fn as_conflict(&self) -> Self {
        Self::conflict(self.detail.clone())
    }

    /// The launcher is away for a moment, or this program is busy.
    pub(crate) fn away(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "away", detail).again_after(1)
    }

    pub(crate) fn again_after(self, seconds: u64) -> Self {
        Self { retry_after: Some(seconds), ..self }
    }
}

impl FieldError {
    /// A fault of the body's field `pointer`, beneath `parent`.
    pub(crate) fn field(parent: &str, fault: FieldFault) -> Self {
        let pointer = Some(format!("{parent}{}", fault.pointer));
        Self { pointer, detail: fault.message, mend: fault.mend, ..Self::default() }
    }

    /// A fault of a file.
    pub(crate) fn file(fault: &Fault) -> Self {
        Self {
            file: Some(fault.file.to_string_lossy().into_owned()),
            line: (fault.line > 0).then_some(fault.line),
            column: (fault.column > 0).then_some(fault.column),
            detail: fault.message.clone(),
            mend: fault.mend.clone(),
            ..Self::default()
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        // What is in here can always be written.
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(Told(self.detail));
        response
    }
}

impl From<ClientError> for Problem {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(refusal) => refusal.into(),
            ClientError::Connect { .. } | ClientError::Closed | ClientError::Packet(_) => {
                Self::away(format!("the launcher is away: {error}"))
            }
            ClientError::Unexpected(_) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string())
            }
        }
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let status = match refusal.code {
            RefusalCode::UnknownApp | RefusalCode::UnknownInstance => StatusCode::NOT_FOUND,
            // The app's own fault, or what it is doing: no fault of this server.
            RefusalCode::StartFailed
            | RefusalCode::StartTimeout
            | RefusalCode::Backoff
            | RefusalCode::Elsewhere
            | RefusalCode::Conflict => StatusCode::CONFLICT,
            RefusalCode::BadRequest => StatusCode::UNPROCESSABLE_ENTITY,
            RefusalCode::Busy => StatusCode::SERVICE_UNAVAILABLE,
            RefusalCode::Forbidden | RefusalCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let retry_after = refusal.retry_after_ms.map(|ms| ms.div_ceil(1000).max(1));
        Self {
            retry_after,
            elsewhere: refusal.elsewhere,
            ..Self::new(status, refusal.code.as_str(), refusal.message)
        }
    }
}
