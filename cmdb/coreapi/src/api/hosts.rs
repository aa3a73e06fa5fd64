//! `/v1/hosts`: the hosts, and emptying one of them.

use std::sync::Arc;

use axum::{extract::State, http::StatusCode};
use cmdb::compute::{Node, Nodes, find};
use launcher_client::wire::{Reply, Request};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use super::{
    Api,
    extract::{Admin, Json, Reader, Segment},
    problem::Problem,
};
use crate::link::Connected;

/// How the path names a host, for the description.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[allow(dead_code, reason = "it only describes")]
pub(crate) struct HostPath {
    /// The host's name.
    #[param(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", example = "web1")]
    host: String,
}

/// A host that is to be emptied, or not any more.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct HostDone {
    /// Its name.
    host: String,
    /// What holds from now on: `draining`, `uncordoned` or `forgotten`.
    done: &'static str,
}

/// The hosts; none where there is only this one.
#[utoipa::path(get, path = "/v1/hosts", tag = "hosts", responses((status = 200, body = Vec<Node>)))]
pub(crate) async fn list(_: Reader, State(api): State<Arc<Api>>) -> Result<Json<Nodes>, Problem> {
    nodes(&api.connected().await?).await.map(Json)
}

/// Empties a host: what runs there moves to others, and nothing new is placed there. Answers when that is on record. Role:
/// admin.
#[utoipa::path(post, path = "/v1/hosts/{host}/drain", tag = "hosts", params(HostPath), responses((status = 200, body = HostDone)))]
pub(crate) async fn drain(
    _: Admin,
    State(api): State<Arc<Api>>,
    Segment(host): Segment,
) -> Result<Json<HostDone>, Problem> {
    set(&api, host, true).await
}

/// Lets a host take apps again. Role: admin.
#[utoipa::path(post, path = "/v1/hosts/{host}/uncordon", tag = "hosts", params(HostPath), responses((status = 200, body = HostDone)))]
pub(crate) async fn uncordon(
    _: Admin,
    State(api): State<Arc<Api>>,
    Segment(host): Segment,
) -> Result<Json<HostDone>, Problem> {
    set(&api, host, false).await
}

/// Forgets a host that is gone for good. Role: admin.
#[utoipa::path(delete, path = "/v1/hosts/{host}", tag = "hosts", params(HostPath), responses((status = 200, body = HostDone)))]
pub(crate) async fn forget(
    _: Admin,
    State(api): State<Arc<Api>>,
    Segment(host): Segment,
) -> Result<Json<HostDone>, Problem> {
    let connected = api.connected().await?;
    check(&connected, &host).await?;
    connected.client.done(Request::Forget { node: host.clone() }).await?;
    Ok(Json(HostDone { host, done: "forgotten" }))
}

async fn set(api: &Api, host: String, draining: bool) -> Result<Json<HostDone>, Problem> {
    let connected = api.connected().await?;
    check(&connected, &host).await?;
    connected.client.done(Request::Drain { node: host.clone(), draining }).await?;
    Ok(Json(HostDone { host, done: if draining { "draining" } else { "uncordoned" } }))
}

async fn check(connected: &Connected, host: &str) -> Result<(), Problem> {
    if find(&nodes(connected).await?, host).is_none() {
        let detail = format!("no host is called \"{}\"", host.escape_debug());
        return Err(Problem::new(StatusCode::NOT_FOUND, "unknown-host", detail));
    }
    Ok(())
}

async fn nodes(connected: &Connected) -> Result<Nodes, Problem> {
    match connected.client.ask(Request::Nodes).await? {
        (Reply::Nodes { nodes }, _) => Ok(nodes),
        _ => Err(Problem::away("the launcher did not tell the hosts")),
    }
}
