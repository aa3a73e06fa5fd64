//! Images, usage, hosts: what is only read.

use std::{collections::BTreeMap, sync::Arc};

use axum::extract::State;
use launcher_client::{
    usage::{Span, Usage},
    wire::{ImageStatus, Reply, Request},
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    Api,
    extract::{Asked, Json, Reader},
    instances::named,
    problem::Problem,
};

/// What of the ledger.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Which {
    /// Since when, seconds since the Unix epoch; the hour (or day) around it is whole.
    since: u64,
    /// Into which spans it is summed up.
    #[param(inline)]
    by: Span,
    /// Only this app.
    app: Option<String>,
}

impl Default for Which {
    fn default() -> Self {
        Self { since: 0, by: Span::All, app: None }
    }
}

/// A host.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct HostView {
    /// Its name.
    name: String,
    /// Its heartbeat is there.
    alive: bool,
    /// It is being emptied, and takes nothing new.
    draining: bool,
    /// Where it takes requests of other hosts; empty: nowhere.
    dispatch: String,
    /// Where its API is; empty: nowhere.
    api: String,
    /// What its operator says of it.
    labels: BTreeMap<String, String>,
    /// CPU that it has, thousandths of a core.
    cpu: u32,
    /// Memory that it has, bytes.
    memory: u64,
    /// CPU that nobody uses, thousandths of a core.
    free_cpu: u32,
    /// Memory that is available, bytes.
    free_memory: u64,
    /// Instances that it runs.
    instances: u32,
}

/// The images of all apps.
#[utoipa::path(get, path = "/v1/images", tag = "reports", responses((status = 200, body = Vec<ImageStatus>)))]
pub(crate) async fn images(
    _: Reader,
    State(api): State<Arc<Api>>,
) -> Result<Json<Vec<ImageStatus>>, Problem> {
    let images = api.list(Request::Images, |reply| match reply {
        Reply::Image(image) => Some(image),
        _ => None,
    });
    images.await.map(Json)
}

/// What apps have used. A line without an app is the kernel's own count for all containers together.
#[utoipa::path(get, path = "/v1/usage", tag = "reports", params(Which), responses((status = 200, body = Vec<Usage>)))]
pub(crate) async fn usage(
    _: Reader,
    State(api): State<Arc<Api>>,
    Asked(which): Asked<Which>,
) -> Result<Json<Vec<Usage>>, Problem> {
    let request = Request::Usage { since_unix_s: which.since, by: which.by, app: named(which.app)? };
    let lines = api.list(request, |reply| match reply {
        Reply::Usage(line) => Some(line),
        _ => None,
    });
    lines.await.map(Json)
}

/// The hosts; none where there is only this one.
#[utoipa::path(get, path = "/v1/hosts", tag = "hosts", responses((status = 200, body = Vec<HostView>)))]
pub(crate) async fn hosts(_: Reader, State(api): State<Arc<Api>>) -> Result<Json<Vec<HostView>>, Problem> {
    let nodes = api.connected().await?.nodes();
    let view = |node: &cmdb::compute::Node| HostView {
        name: node.name().to_owned(),
        alive: node.alive,
        draining: node.draining,
        dispatch: node.compute.dispatch.clone(),
        api: node.compute.api.clone(),
        labels: node.compute.labels.clone(),
        cpu: node.compute.cpu,
        memory: node.compute.memory,
        free_cpu: node.load.free_cpu,
        free_memory: node.load.free_memory,
        instances: node.load.instances,
    };
    Ok(Json(nodes.iter().map(view).collect()))
}
