//! Images and usage: what is only read.

use std::sync::Arc;

use axum::extract::State;
use launcher_client::{
    usage::{Span, Usage},
    wire::{ImageStatus, Reply, Request},
};
use serde::Deserialize;
use utoipa::IntoParams;

use super::{
    Api,
    extract::{Asked, Json, Reader},
    instances::{int64, named},
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
    #[param(pattern = "^[a-z0-9][a-z0-9._-]{0,62}$")]
    app: Option<String>,
}

impl Default for Which {
    fn default() -> Self {
        Self { since: 0, by: Span::All, app: None }
    }
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
    let request =
        Request::Usage { since_unix_s: int64("since", which.since)?, by: which.by, app: named(which.app)? };
    let lines = api.list(request, |reply| match reply {
        Reply::Usage(line) => Some(line),
        _ => None,
    });
    lines.await.map(Json)
}
