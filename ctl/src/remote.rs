//! The API of a host, here or elsewhere, as a client sees it (docs/api.md).

use std::{path::Path, time::Duration};

use cmdb::units::{Bytes, Millicores};
use launcher_client::{
    paths::StateDir,
    usage::{Span, Usage},
    wire::{Event, ImageStatus, LogLine, Refusal, RefusalCode, Reply, Request, Status},
};
use reqwest::{Method, Response, Url};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{cli::api::Remote, failure::Failure};

/// How long it may take until the other end listens.
const CONNECT: Duration = Duration::from_secs(5);
/// How long an answer that is there at once may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long what waits for apps may take; the server gives up a little earlier.
const LONG: Duration = Duration::from_secs(200);
/// No token is longer.
const LONGEST_TOKEN: u64 = 1024;

/// One API.
#[derive(Debug)]
pub(crate) struct Api {
    http: reqwest::Client,
    base: Url,
    token: Option<String>,
    /// As an operator knows it.
    name: String,
}

/// `application/problem+json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Problem {
    code: String,
    detail: String,
    errors: Vec<FieldError>,
    retry_after: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct FieldError {
    pointer: Option<String>,
    file: Option<String>,
    line: Option<u64>,
    column: Option<u64>,
    detail: String,
    mend: String,
}

impl Api {
    /// The one that was asked for; `None`: none was, so the launcher of this host is meant.
    pub(crate) fn asked_for(remote: &Remote) -> Result<Option<Self>, Failure> {
        let Some(url) = &remote.api else { return Ok(None) };
        let base: Url = url.parse().map_err(|error| Failure::usage(format!("--api {url}: {error}")))?;
        if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
            return Err(Failure::usage(format!("--api {url}: write http://HOST:PORT or https://HOST")));
        }
        let token = match (&remote.token_file, &remote.token) {
            (Some(file), _) => Some(read_token(file)?),
            (None, Some(token)) => Some(token.trim().to_owned()),
            (None, None) => None,
        };
        // Fails only when there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().connect_timeout(CONNECT);
        // A token is for the one that it was given for, and for nobody that it sends us to.
        let http =
            http.redirect(reqwest::redirect::Policy::none()).build().map_err(|error| unusable(&error))?;
        let name = format!("API at {}", base.as_str().trim_end_matches('/'));
        Ok(Some(Self { http, base, token, name }))
    }

    /// The one of this host, for root.
    pub(crate) fn of_state(state: &Path) -> Result<Self, Failure> {
        let socket = StateDir::new(state).api_socket();
        let name = format!("API at {}", socket.display());
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http =
            reqwest::Client::builder().unix_socket(socket).build().map_err(|error| unusable(&error))?;
        let base = "http://localhost".parse().map_err(|error| Failure::failed(format!("{error}")))?;
        Ok(Self { http, base, token: None, name })
    }

    /// Asks; what is not done is told as the launcher would.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, String)],
        body: Option<&Value>,
        patience: Duration,
    ) -> Result<Response, Failure> {
        let mut url = self.base.clone();
        url.set_path(&format!("{}{path}", self.base.path().trim_end_matches('/')));
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let mut request = self.http.request(method, url);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let response = match tokio::time::timeout(patience, request.send()).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(self.unreachable(&error)),
            Err(_) => {
                let waited = patience.as_secs();
                return Err(Failure::NotRunning(format!(
                    "the {} did not answer within {waited} s",
                    self.name
                )));
            }
        };
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let text = response.text().await.unwrap_or_default();
        match serde_json::from_str::<Problem>(&text) {
            Ok(problem) if !problem.code.is_empty() => Err(problem.into()),
            _ => Err(Failure::failed(format!(
                "the {} answered {status}, which is none of its answers",
                self.name
            ))),
        }
    }

    /// Asks for JSON.
    pub(crate) async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, String)],
        body: Option<&Value>,
    ) -> Result<T, Failure> {
        let patience = if method == Method::GET { PATIENCE } else { LONG };
        let response = self.ask(method, path, query, body, patience).await?;
        let text = response.text().await.map_err(|error| self.unreachable(&error))?;
        serde_json::from_str(&text).map_err(|error| {
            Failure::failed(format!("the answer of the {} is not understood: {error}", self.name))
        })
    }

    /// What the launcher would list.
    pub(crate) async fn list(&self, request: Request) -> Result<Vec<Reply>, Failure> {
        let get = Method::GET;
        Ok(match request {
            Request::Ps { app } => {
                let lines: Vec<Status> = self.json(get, "/v1/instances", &app_query(app), None).await?;
                lines.into_iter().map(|line| Reply::Status(Box::new(line))).collect()
            }
            Request::Events { since, .. } => {
                let query = [("since", since.to_string())];
                let events: Vec<Event> = self.json(get, "/v1/events", &query, None).await?;
                events.into_iter().map(Reply::Event).collect()
            }
            Request::Logs { app, lines } => {
                let path = format!("/v1/apps/{app}/logs");
                let lines: Vec<LogLine> =
                    self.json(get, &path, &[("lines", lines.to_string())], None).await?;
                lines.into_iter().map(Reply::Log).collect()
            }
            Request::Usage { since_unix_s, by, app } => {
                let by = match by {
                    Span::All => "all",
                    Span::Day => "day",
                    Span::Hour => "hour",
                };
                let mut query = app_query(app);
                query.extend([("since", since_unix_s.to_string()), ("by", by.to_owned())]);
                let lines: Vec<Usage> = self.json(get, "/v1/usage", &query, None).await?;
                lines.into_iter().map(Reply::Usage).collect()
            }
            Request::Images => {
                let images: Vec<ImageStatus> = self.json(get, "/v1/images", &[], None).await?;
                images.into_iter().map(Reply::Image).collect()
            }
            other => return Err(Failure::usage(format!("the API has nothing for {other:?}"))),
        })
    }

    /// Has something done.
    pub(crate) async fn done(&self, request: Request) -> Result<(), Failure> {
        let (app, verb, body) = match request {
            Request::Stop { app } => (app, "stop", None),
            Request::Restart { app } => (app, "restart", None),
            Request::Limit { app, cpu, memory, pids, reset } => {
                let cpu = cpu.map(|cpu| Millicores(cpu).to_string());
                let memory = memory.map(|memory| format!("{}B", Bytes(memory).0));
                (app, "limit", Some(json!({ "cpu": cpu, "memory": memory, "pids": pids, "reset": reset })))
            }
            Request::Scale { app, order } => (app, "scale", Some(json!(order))),
            Request::Signal { app, signal } => (app, "signal", Some(json!({ "signal": signal }))),
            other => return Err(Failure::usage(format!("the API has nothing for {other:?}"))),
        };
        let path = format!("/v1/apps/{app}/{verb}");
        self.ask(Method::POST, &path, &[], body.as_ref(), LONG).await.map(drop)
    }

    /// The events as they happen, until `each` says `false`.
    pub(crate) async fn follow(
        &self,
        since: u64,
        mut each: impl FnMut(Event) -> bool,
    ) -> Result<(), Failure> {
        let query = [("since", since.to_string())];
        let mut response = self.ask(Method::GET, "/v1/events/stream", &query, None, PATIENCE).await?;
        let mut text = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.unreachable(&error))? {
            text.extend_from_slice(&chunk);
            while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                let data = line
                    .strip_prefix(b"data:")
                    .map(|data| serde_json::from_slice::<Event>(data.trim_ascii()));
                if let Some(Ok(event)) = data
                    && !each(event)
                {
                    return Ok(());
                }
            }
        }
        Err(Failure::NotRunning(format!("the {} ended the stream; it may be starting anew", self.name)))
    }

    fn unreachable(&self, error: &reqwest::Error) -> Failure {
        let mut cause: &dyn std::error::Error = error;
        while let Some(inner) = cause.source() {
            cause = inner;
        }
        Failure::NotRunning(format!("the {} cannot be reached: {cause}", self.name))
    }
}

fn app_query(app: Option<cmdb::AppName>) -> Vec<(&'static str, String)> {
    app.into_iter().map(|app| ("app", app.to_string())).collect()
}

fn unusable(error: &reqwest::Error) -> Failure {
    Failure::failed(format!("no HTTP client can be made: {error}"))
}

fn read_token(file: &Path) -> Result<String, Failure> {
    use std::io::Read as _;
    let mut text = String::new();
    let read = std::fs::File::open(file).and_then(|file| file.take(LONGEST_TOKEN).read_to_string(&mut text));
    read.map_err(|error| Failure::usage(format!("--token-file {}: {error}", file.display())))?;
    Ok(text.trim().to_owned())
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        // What the launcher has refused is told as the launcher itself tells it.
        if let Ok(code) = serde_json::from_value::<RefusalCode>(problem.code.as_str().into())
            && problem.errors.is_empty()
        {
            let retry_after_ms = problem.retry_after.map(|seconds| seconds.saturating_mul(1000));
            return Refusal { retry_after_ms, ..Refusal::new(code, problem.detail) }.into();
        }
        let mut message = problem.detail;
        for error in &problem.errors {
            message.push('\n');
            message.push_str(&error.to_string());
        }
        match problem.code.as_str() {
            "unauthorized" | "forbidden" => Self::Usage(message),
            "unknown-app" | "unknown-host" | "unknown-resource" => Self::NotFound(message),
            "away" => Self::NotRunning(message),
            _ => Self::Failed(message),
        }
    }
}

impl std::fmt::Display for FieldError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = self.file.as_deref().or(self.pointer.as_deref()).unwrap_or_default();
        write!(f, "{place}")?;
        if let (Some(line), Some(column)) = (self.line, self.column) {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}", self.detail)?;
        if !self.mend.is_empty() {
            write!(f, "; {}", self.mend)?;
        }
        Ok(())
    }
}
