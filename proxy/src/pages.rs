//! What a client is told when there is no response of the app: a status, a short page, and when to come again.

use std::fmt::Write as _;

use bytes::Bytes;
use http::{HeaderName, StatusCode, header};
use launcher_client::wire::{Refusal, RefusalCode};
use pingora::{
    Error, ErrorType,
    http::{RequestHeader, ResponseHeader},
    proxy::Session,
};

use crate::{
    dispatch,
    waiting::{self, Progress},
};

/// Why a request is not answered by the app.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Fault {
    /// The request breaks HTTP, or could be understood in two ways.
    BadRequest(&'static str),
    /// No app has this host name.
    UnknownHost,
    /// The app ended before it listened; the words are fit for its visitors.
    StartFailed(String),
    /// The app did not listen in time.
    StartTimeout,
    /// Its starts failed lately.
    Backoff {
        /// Seconds until the next start.
        retry_after: u64,
    },
    /// The host has no room.
    Busy {
        /// Seconds until it may have.
        retry_after: u64,
    },
    /// Too many wait for this app already.
    QueueFull {
        /// Seconds until those may have been served.
        retry_after: u64,
    },
    /// Too many wait in all apps together, and most of them for this one.
    Shed {
        /// Seconds until those may have been served.
        retry_after: u64,
    },
    /// It is starting; who asks is shown a page that asks again.
    Starting(Progress),
    /// It waited as long as the app allows.
    HoldTimeout,
    /// The launcher cannot be reached.
    LauncherGone,
    /// The proxy is ending.
    Stopping,
    /// The app broke off before it answered.
    NoAnswer,
    /// The app was silent for too long.
    TooSlow,
    /// A fault of the proxy or the launcher.
    Internal,
    /// Another host's proxy sent it here, where it cannot be served; on which host there is an instance, if that is known.
    Misdirected(Option<String>),
    /// It came to the dispatcher, but from no proxy of the cluster.
    Forged(&'static str),
}

impl Fault {
    /// All that [`Self::code`] gives, and what else the access log calls an error.
    pub const CODES: [&str; 19] = [
        "bad-request",
        "unknown-host",
        "start-failed",
        "start-timeout",
        "backoff",
        "busy",
        "queue-full",
        "shed",
        "waiting-page",
        "hold-timeout",
        "launcher-unreachable",
        "stopping",
        "no-answer",
        "too-slow",
        "internal",
        "broken-off",
        "client-gone",
        "misdirected",
        "forged",
    ];
    /// Those that say that too many wait.
    pub const SHED: [&str; 2] = ["queue-full", "shed"];

    /// What a refused wake means for those who wait.
    #[must_use]
    pub fn of_refusal(refusal: &Refusal) -> Self {
        let retry_after = refusal.retry_after_ms.unwrap_or(1_000).div_ceil(1_000).max(1);
        match refusal.code {
            RefusalCode::StartFailed => Self::StartFailed(for_visitors(&refusal.message)),
            RefusalCode::StartTimeout => Self::StartTimeout,
            RefusalCode::Backoff => Self::Backoff { retry_after },
            RefusalCode::Busy => Self::Busy { retry_after },
            RefusalCode::UnknownApp => Self::UnknownHost,
            RefusalCode::Elsewhere => Self::Misdirected(refusal.elsewhere.clone()),
            RefusalCode::UnknownInstance
            | RefusalCode::Conflict
            | RefusalCode::Forbidden
            | RefusalCode::BadRequest
            | RefusalCode::Internal => Self::Internal,
        }
    }

    /// The status of the response.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::UnknownHost => StatusCode::NOT_FOUND,
            Self::StartFailed(_) | Self::NoAnswer => StatusCode::BAD_GATEWAY,
            Self::StartTimeout | Self::HoldTimeout | Self::TooSlow => StatusCode::GATEWAY_TIMEOUT,
            Self::Backoff { .. }
            | Self::Busy { .. }
            | Self::QueueFull { .. }
            | Self::Shed { .. }
            | Self::Starting(_)
            | Self::LauncherGone
            | Self::Stopping => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Misdirected(_) => StatusCode::MISDIRECTED_REQUEST,
            Self::Forged(_) => StatusCode::FORBIDDEN,
        }
    }

    /// As written in the access log.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::BadRequest(_) => "bad-request",
            Self::UnknownHost => "unknown-host",
            Self::StartFailed(_) => "start-failed",
            Self::StartTimeout => "start-timeout",
            Self::Backoff { .. } => "backoff",
            Self::Busy { .. } => "busy",
            Self::QueueFull { .. } => "queue-full",
            Self::Shed { .. } => "shed",
            Self::Starting(_) => "waiting-page",
            Self::HoldTimeout => "hold-timeout",
            Self::LauncherGone => "launcher-unreachable",
            Self::Stopping => "stopping",
            Self::NoAnswer => "no-answer",
            Self::TooSlow => "too-slow",
            Self::Internal => "internal",
            Self::Misdirected(_) => "misdirected",
            Self::Forged(_) => "forged",
        }
    }

    /// Seconds after which it makes sense to try again.
    #[must_use]
    pub fn retry_after(&self) -> Option<u64> {
        match self {
            Self::Backoff { retry_after }
            | Self::Busy { retry_after }
            | Self::QueueFull { retry_after }
            | Self::Shed { retry_after } => Some(*retry_after),
            Self::Starting(progress) => Some(progress.refresh()),
            Self::LauncherGone | Self::Stopping => Some(1),
            _ => None,
        }
    }

    /// As Pingora carries it from a phase to the page.
    #[must_use]
    pub fn into_error(self) -> Box<Error> {
        Error::explain(ErrorType::HTTPStatus(self.status().as_u16()), self.code())
    }

    fn words(&self, app: Option<&str>) -> String {
        let app = app.map_or_else(|| "The app".to_owned(), |name| format!("The app \u{201c}{name}\u{201d}"));
        match self {
            Self::BadRequest(why) => format!("The request cannot be served: {why}."),
            Self::UnknownHost => "No app answers to this host name here.".to_owned(),
            Self::StartFailed(what) => format!("{app} could not be started: {what}."),
            Self::StartTimeout => format!("{app} was started, but did not begin to listen in time."),
            Self::Backoff { retry_after } => {
                format!("{app} failed to start several times; the next attempt is in {retry_after} s.")
            }
            Self::Busy { retry_after } => {
                format!("This host is busy; please try again in {retry_after} s.")
            }
            Self::QueueFull { retry_after } => {
                format!("{app} has too many waiting visitors; please try again in {retry_after} s.")
            }
            Self::Shed { retry_after } => format!(
                "This server has too many waiting visitors, most of them for this app; please try again in {retry_after} s."
            ),
            Self::Starting(_) => format!("{app} is starting."),
            Self::HoldTimeout => format!("{app} had no free instance in time."),
            Self::LauncherGone => format!("{app} cannot be started just now; please try again in a moment."),
            Self::Stopping => "This server is being restarted; please try again in a moment.".to_owned(),
            Self::NoAnswer => format!("{app} broke off without an answer."),
            Self::TooSlow => format!("{app} took too long to answer."),
            Self::Internal => "Something went wrong on our side.".to_owned(),
            Self::Misdirected(_) => format!("{app} has no instance on this host."),
            Self::Forged(why) => format!("Only the proxies of this cluster are served here: {why}."),
        }
    }
}

/// Writes the page for `fault`. `app` and `request_id` are shown on it.
///
/// # Errors
/// The client's connection.
pub async fn write(
    session: &mut Session,
    fault: &Fault,
    app: Option<&str>,
    request_id: &str,
) -> pingora::Result<()> {
    let (header, body) = render(session.req_header(), fault, app, request_id)?;
    let with_body = session.req_header().method != http::Method::HEAD;
    session.write_error_response(header, if with_body { body } else { Bytes::new() }).await?;
    if !session.is_body_empty() {
        // Closing with unread data would reset the connection before the client has read the page.
        session.set_total_drain_timeout(Some(std::time::Duration::from_secs(1)));
        let _ = session.drain_request_body().await;
    }
    Ok(())
}

fn render(
    request: &RequestHeader,
    fault: &Fault,
    app: Option<&str>,
    request_id: &str,
) -> pingora::Result<(ResponseHeader, Bytes)> {
    let status = fault.status();
    let title = status.canonical_reason().unwrap_or("Error");
    let words = fault.words(app);
    let html = accepts_html(request);
    let body = if let (true, Fault::Starting(progress)) = (html, fault) {
        waiting::page(&escaped(app.unwrap_or("The app")), progress)
    } else if html {
        format!(
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
             <title>{code} {title}</title><style>body{{font:16px/1.5 system-ui,sans-serif;max-width:34em;margin:18vh auto;padding:0 1.5em;\
             color:#223;background:#fafafc}}h1{{font-size:1.4em}}small{{color:#889}}@media(prefers-color-scheme:dark){{body{{color:#dde;background:#15161c}}}}</style>\
             <h1>{code} {title}</h1><p>{words}</p><small>{id}</small></html>\n",
            code = status.as_u16(),
            words = escaped(&words),
            id = escaped(request_id),
        )
    } else {
        format!("{} {title}\n{words}\n{request_id}\n", status.as_u16())
    };
    let mut header = ResponseHeader::build(status, Some(7))?;
    header.insert_header(
        header::CONTENT_TYPE,
        if html { "text/html; charset=utf-8" } else { "text/plain; charset=utf-8" },
    )?;
    header.insert_header(header::CONTENT_LENGTH, body.len())?;
    header.insert_header(header::CACHE_CONTROL, "no-store")?;
    if html {
        // No page of ours loads or runs anything.
        header.insert_header(
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'unsafe-inline'",
        )?;
    }
    header.insert_header(HeaderName::from_static("x-request-id"), request_id)?;
    dispatch::mark(fault, &mut header)?;
    if let Some(seconds) = fault.retry_after() {
        header.insert_header(header::RETRY_AFTER, seconds)?;
    }
    Ok((header, body.into()))
}

/// Whether a person's browser is about to show what it gets as a page, not to use it as part of one.
#[must_use]
pub fn is_navigation(request: &RequestHeader) -> bool {
    request.method == http::Method::GET
        && request.headers.get("sec-fetch-mode").is_some_and(|mode| mode.as_bytes() == b"navigate")
        && accepts_html(request)
}

fn accepts_html(request: &RequestHeader) -> bool {
    request
        .headers
        .get_all(header::ACCEPT)
        .iter()
        .any(|value| value.to_str().is_ok_and(|value| value.to_ascii_lowercase().contains("text/html")))
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other if other.is_control() => {
                let _ = write!(out, "&#xfffd;");
            }
            other => out.push(other),
        }
    }
    out
}

/// What of the launcher's words ("APP exited with status 3 before it listened") may be shown to visitors: how the process ended,
/// and nothing of paths or output.
fn for_visitors(message: &str) -> String {
    const ENDS: [&str; 4] = ["exited with ", "was ended by ", "was killed", "ran out of memory"];
    let clause = message.split(';').next().unwrap_or_default().trim().trim_end_matches('.');
    let without_name = clause.split_once(' ').map_or("", |(_, rest)| rest);
    let plain = |text: &str| {
        text.len() <= 120
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, ' ' | '(' | ')' | '-' | ',' | '.'))
    };
    [clause, without_name]
        .into_iter()
        .find(|text| ENDS.iter().any(|end| text.starts_with(end)) && plain(text))
        .map_or_else(|| "its program could not be run".to_owned(), |text| format!("it {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(accept: &str) -> RequestHeader {
        let mut request = RequestHeader::build("GET", b"/", None).unwrap();
        request.insert_header("accept", accept).unwrap();
        request
    }

    #[test]
    fn browsers_get_html_and_others_text() {
        let (header, body) =
            render(&request("text/html,*/*"), &Fault::QueueFull { retry_after: 3 }, Some("blog"), "id1")
                .unwrap();
        assert_eq!(header.status, 503);
        assert_eq!(header.headers["retry-after"], "3");
        assert_eq!(header.headers["cache-control"], "no-store");
        assert!(header.headers["content-type"].to_str().unwrap().starts_with("text/html"));
        assert!(std::str::from_utf8(&body).unwrap().contains("blog"));
        let (header, body) = render(&request("*/*"), &Fault::UnknownHost, None, "id1").unwrap();
        assert_eq!(header.status, 404);
        assert!(!header.headers.contains_key("retry-after"));
        assert!(std::str::from_utf8(&body).unwrap().starts_with("404 Not Found\n"));
    }

    #[test]
    fn nothing_hostile_reaches_a_page() {
        let fault = Fault::StartFailed("<script>&'\"\n".into());
        let (_, body) = render(&request("text/html"), &fault, Some("a<b"), "x<y").unwrap();
        let body = std::str::from_utf8(&body).unwrap();
        assert!(!body.contains("<script>") && !body.contains("a<b") && !body.contains("x<y"), "{body}");
    }

    #[test]
    fn visitors_learn_how_the_app_ended_and_nothing_else() {
        for (message, shown) in [
            (
                "blog exited with status 3 before it listened; its last line: pw=x",
                "it exited with status 3 before it listened",
            ),
            ("exited with status 3", "it exited with status 3"),
            ("blog was ended by SIGKILL", "it was ended by SIGKILL"),
            (
                "blog ran out of memory (limit 64MiB) and was killed",
                "it ran out of memory (limit 64MiB) and was killed",
            ),
            ("blog could not be started: exec (/srv/secret): ENOENT", "its program could not be run"),
            ("blog exited with /srv/secret", "its program could not be run"),
            ("", "its program could not be run"),
        ] {
            assert_eq!(for_visitors(message), shown, "{message}");
        }
    }
}
