//! What runs, and what an operator does to it.

use std::sync::Arc;

use axum::extract::State;
use cmdb::{
    AppName,
    units::{Bytes, Millicores},
};
use launcher_client::wire::{LogLine, Reply, Request, ScaleOrder, Status, WakeTiming};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    Api,
    extract::{AppPath, Asked, Body, Json, Named, Operator, Reader},
    problem::{FieldError, Problem},
};

/// More of an app's output than is kept.
const MOST_LINES: u32 = 100_000;
/// As in a vhost file.
const PIDS: std::ops::RangeInclusive<u32> = 1..=4_000_000;
const MEMORY: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 50;

/// Only one app, or all.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Which {
    /// Only this app.
    #[param(pattern = "^[a-z0-9][a-z0-9._-]{0,62}$")]
    app: Option<String>,
}

/// How much of an app's output.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct HowMuch {
    /// Most lines, counted from the end.
    #[param(minimum = 0, maximum = 100_000, default = 100)]
    lines: u32,
}

impl Default for HowMuch {
    fn default() -> Self {
        Self { lines: 100 }
    }
}

/// An instance that is ready.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Awake {
    /// Which app.
    app: String,
    /// Its generation.
    generation: u64,
    /// On which port it listens, on its own loopback.
    port: u16,
    /// How it came to be ready.
    timing: WakeTiming,
}

/// Something that was done, or has begun.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Done {
    /// To which app.
    app: String,
    /// What: `stopped`, `restarting`, `limited`, `scaled`, `signalled`.
    done: &'static str,
}

/// Other limits. What is absent stays.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct NewLimits {
    /// CPU quota, as in a vhost file.
    #[schema(example = "60%")]
    cpu: Option<String>,
    /// Memory, as in a vhost file.
    #[schema(example = "512MiB")]
    memory: Option<String>,
    /// Processes and threads.
    #[schema(minimum = 1, maximum = 4_000_000)]
    pids: Option<u32>,
    /// Before that: back to what the configuration says.
    reset: bool,
}

/// A signal for hooks.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Signal {
    /// Its name, without `SIG`.
    #[schema(example = "USR1")]
    signal: String,
}

/// Instances, and apps without one.
#[utoipa::path(get, path = "/v1/instances", tag = "instances", params(Which), responses((status = 200, body = Vec<Status>)))]
pub(crate) async fn list(
    _: Reader,
    State(api): State<Arc<Api>>,
    Asked(which): Asked<Which>,
) -> Result<Json<Vec<Status>>, Problem> {
    let app = named(which.app)?;
    statuses(&api, app).await
}

/// The app's instances.
#[utoipa::path(get, path = "/v1/apps/{app}/instances", tag = "instances", params(AppPath), responses((status = 200, body = Vec<Status>)))]
pub(crate) async fn of_app(
    _: Reader,
    State(api): State<Arc<Api>>,
    Named(app): Named,
) -> Result<Json<Vec<Status>>, Problem> {
    statuses(&api, Some(app)).await
}

async fn statuses(api: &Api, app: Option<AppName>) -> Result<Json<Vec<Status>>, Problem> {
    let found = api.list(Request::Ps { app }, |reply| match reply {
        Reply::Status(status) => Some(*status),
        _ => None,
    });
    let mut found = found.await?;
    found.sort_by(|a, b| (&a.app, a.generation).cmp(&(&b.app, b.generation)));
    Ok(Json(found))
}

/// Has an instance ready, as a request would. Role: operate.
#[utoipa::path(post, path = "/v1/apps/{app}/wake", tag = "instances", params(AppPath), responses((status = 200, body = Awake)))]
pub(crate) async fn wake(
    _: Operator,
    State(api): State<Arc<Api>>,
    Named(app): Named,
) -> Result<Json<Awake>, Problem> {
    let woken = api.connected().await?.client.wake(&app, 0).await?;
    let generation = woken.generation.0;
    Ok(Json(Awake { app: app.to_string(), generation, port: woken.port, timing: woken.timing }))
}

/// Ends all instances of the app; answers when they are gone. The next request wakes it. Role: operate.
#[utoipa::path(post, path = "/v1/apps/{app}/stop", tag = "instances", params(AppPath), responses((status = 200, body = Done)))]
pub(crate) async fn stop(
    _: Operator,
    State(api): State<Arc<Api>>,
    Named(app): Named,
) -> Result<Json<Done>, Problem> {
    let request = Request::Stop { app: app.clone() };
    done(&api, app, request, "stopped").await
}

/// Replaces all instances of the app, the new one first; answers when that has begun. Role: operate.
#[utoipa::path(post, path = "/v1/apps/{app}/restart", tag = "instances", params(AppPath), responses((status = 200, body = Done)))]
pub(crate) async fn restart(
    _: Operator,
    State(api): State<Arc<Api>>,
    Named(app): Named,
) -> Result<Json<Done>, Problem> {
    let request = Request::Restart { app: app.clone() };
    done(&api, app, request, "restarting").await
}

/// Other limits for what runs and what starts, until the configuration changes them. Role: operate.
#[utoipa::path(post, path = "/v1/apps/{app}/limit", tag = "instances", params(AppPath), request_body = NewLimits, responses((status = 200, body = Done)))]
pub(crate) async fn limit(
    _: Operator,
    State(api): State<Arc<Api>>,
    Named(app): Named,
    Body(limits): Body<NewLimits>,
) -> Result<Json<Done>, Problem> {
    let mut faults = Vec::new();
    let cpu = quantity::<Millicores>("/cpu", limits.cpu.as_deref(), &mut faults).map(|cpu| cpu.0);
    let memory = quantity::<Bytes>("/memory", limits.memory.as_deref(), &mut faults).map(|memory| memory.0);
    let fault = |pointer: &str, detail: &str| FieldError {
        pointer: Some(pointer.to_owned()),
        detail: detail.to_owned(),
        ..FieldError::default()
    };
    if memory.is_some_and(|memory| !MEMORY.contains(&memory)) {
        faults.push(fault("/memory", "\"memory\" is out of range: 1MiB to 1024TiB"));
    }
    if limits.pids.is_some_and(|pids| !PIDS.contains(&pids)) {
        faults.push(fault("/pids", "\"pids\" is out of range: 1 to 4000000"));
    }
    if !faults.is_empty() {
        return Err(Problem::invalid("these are no limits", faults));
    }
    if cpu.is_none() && memory.is_none() && limits.pids.is_none() && !limits.reset {
        return Err(Problem::invalid("nothing is to change: give cpu, memory, pids or reset", Vec::new()));
    }
    let request = Request::Limit { app: app.clone(), cpu, memory, pids: limits.pids, reset: limits.reset };
    match done(&api, app, request, "limited").await {
        // The kernel's word (less memory than is in use, say): no fault of this server.
        Err(problem) if problem.is_internal() => Err(problem.as_conflict()),
        done => done,
    }
}

/// How many instances of the app run, until the configuration changes that. Role: operate.
#[utoipa::path(post, path = "/v1/apps/{app}/scale", tag = "instances", params(AppPath), request_body = ScaleOrder, responses((status = 200, body = Done)))]
pub(crate) async fn scale(
    _: Operator,
    State(api): State<Arc<Api>>,
    Named(app): Named,
    Body(order): Body<ScaleOrder>,
) -> Result<Json<Done>, Problem> {
    let request = Request::Scale { app: app.clone(), order };
    done(&api, app, request, "scaled").await
}

/// Runs the app's hooks for a signal; answers when they have begun. Role: operate.
#[utoipa::path(post, path = "/v1/apps/{app}/signal", tag = "instances", params(AppPath), request_body = Signal, responses((status = 200, body = Done)))]
pub(crate) async fn signal(
    _: Operator,
    State(api): State<Arc<Api>>,
    Named(app): Named,
    Body(Signal { signal }): Body<Signal>,
) -> Result<Json<Done>, Problem> {
    let request = Request::Signal { app: app.clone(), signal };
    done(&api, app, request, "signalled").await
}

/// The last that the app wrote to stdout and stderr. Role: operate, for it may hold secrets.
#[utoipa::path(get, path = "/v1/apps/{app}/logs", tag = "instances", params(AppPath, HowMuch), responses((status = 200, body = Vec<LogLine>)))]
pub(crate) async fn logs(
    _: Operator,
    State(api): State<Arc<Api>>,
    Named(app): Named,
    Asked(how_much): Asked<HowMuch>,
) -> Result<Json<Vec<LogLine>>, Problem> {
    if how_much.lines > MOST_LINES {
        return Err(Problem::malformed(format!("lines: at most {MOST_LINES}")));
    }
    let request = Request::Logs { app, lines: how_much.lines };
    let lines = api.list(request, |reply| match reply {
        Reply::Log(line) => Some(line),
        _ => None,
    });
    lines.await.map(Json)
}

async fn done(api: &Api, app: AppName, request: Request, done: &'static str) -> Result<Json<Done>, Problem> {
    api.connected().await?.client.done(request).await?;
    Ok(Json(Done { app: app.to_string(), done }))
}

/// An app's name in a query.
pub(super) fn named(app: Option<String>) -> Result<Option<AppName>, Problem> {
    let parse = |name: String| {
        name.parse().map_err(|error: cmdb::app::NameError| Problem::malformed(format!("app: {error}")))
    };
    app.map(parse).transpose()
}

/// A number in a query, which the description says is an int64.
pub(super) fn int64(name: &str, number: u64) -> Result<u64, Problem> {
    match i64::try_from(number) {
        Ok(_) => Ok(number),
        Err(_) => Err(Problem::malformed(format!("{name}: the number is too large"))),
    }
}

fn quantity<T: std::str::FromStr<Err: std::fmt::Display>>(
    pointer: &str,
    text: Option<&str>,
    faults: &mut Vec<FieldError>,
) -> Option<T> {
    match text?.parse() {
        Ok(value) => Some(value),
        Err(error) => {
            let error = error.to_string();
            let (detail, mend) = error.split_once("; ").unwrap_or((&error, ""));
            faults.push(FieldError {
                pointer: Some(pointer.to_owned()),
                detail: detail.to_owned(),
                mend: mend.to_owned(),
                ..FieldError::default()
            });
            None
        }
    }
}
