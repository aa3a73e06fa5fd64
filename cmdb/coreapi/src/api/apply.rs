//! `/v1/apply`: a whole folder of vhost files at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use axum::{extract::State, http::StatusCode};
use cmdb::{
    App, AppName, Origin,
    vhost::{self, Loaded},
};
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};

use super::{
    Api,
    apps::clashes,
    extract::{Admin, Asked, Body, Json},
    plan::{Change, Outcome},
    problem::{FieldError, Problem},
};
use crate::put_all::{put_all, remove_all};

/// A loss of more than half of more than this many apps is more likely a mishap than somebody's wish.
const MASS_REMOVAL: usize = 20;

/// A folder of vhost files.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Folder {
    /// Each file's text (TOML) by its name, such as `blog.toml`.
    files: BTreeMap<String, String>,
}

/// How the folder is applied.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct How {
    /// Only say what would change.
    dry_run: bool,
    /// Also if more than half of the apps would go.
    force: bool,
}

/// The API's apps are those of these files from now on, and no others; apps that a `conf.d` has configured stay as they are.
/// With a fault in any file nothing is done, and all faults are told. Role: admin.
#[utoipa::path(
    post, path = "/v1/apply", tag = "apps", params(How), request_body = Folder,
    responses((status = 200, body = Outcome))
)]
pub(crate) async fn apply(
    _: Admin,
    State(api): State<Arc<Api>>,
    Asked(how): Asked<How>,
    Body(folder): Body<Folder>,
) -> Result<Json<Outcome>, Problem> {
    // Thousands of files take a moment.
    let mut loaded = tokio::task::block_in_place(|| vhost::load_files(&folder.files, &api.base));
    for loaded in &mut loaded.apps {
        loaded.app.origin = Origin::Api;
    }
    let _turn = api.configuring.lock().await;
    let connected = api.connected().await?;
    let held = connected.apps();
    check(&mut loaded, &held)?;

    let wanted: BTreeSet<&AppName> = loaded.apps.iter().map(|loaded| &loaded.app.name).collect();
    let own: Vec<&Arc<App>> = held.values().filter(|app| app.origin == Origin::Api).collect();
    let gone: Vec<AppName> =
        own.iter().filter(|app| !wanted.contains(&app.name)).map(|app| app.name.clone()).collect();
    if own.len() > MASS_REMOVAL && gone.len() * 2 > own.len() && !how.force {
        let detail = format!(
            "{} of {} apps would go, which looks like a mishap; ask with force=true if it is meant",
            gone.len(),
            own.len()
        );
        return Err(Problem::new(StatusCode::CONFLICT, "mass-removal", detail));
    }
    let removals = gone.iter().filter_map(|name| Change::between(held.get(name).map(|app| &**app), None));
    let puts = loaded.apps.iter().filter_map(|loaded| {
        Change::between(held.get(&loaded.app.name).map(|app| &**app), Some(&loaded.app))
    });
    let changes = removals.chain(puts).collect();
    if !how.dry_run {
        loaded.apps.retain(|loaded| held.get(&loaded.app.name).is_none_or(|app| **app != loaded.app));
        let kept = remove_all(&connected, gone, &Origin::Api).await?;
        let put = put_all(&connected, loaded.apps).await?;
        let fault =
            |file: String, detail: String| FieldError { file: Some(file), detail, ..FieldError::default() };
        let kept = kept.into_iter().map(|(name, refusal)| fault(format!("{name}.toml"), refusal.to_string()));
        let put = put.refused.into_iter();
        let put = put.map(|(loaded, refusal)| fault(loaded.path.display().to_string(), refusal.to_string()));
        let faults: Vec<FieldError> = kept.chain(put).collect();
        if !faults.is_empty() {
            let detail = "not all could be applied; what is not named is in force";
            return Err(Problem::conflict(detail).with(faults));
        }
    }
    Ok(Json(Outcome { dry_run: how.dry_run, changes }))
}

/// All faults of all files, those among them that only show beside the apps that others have configured.
fn check(loaded: &mut Loaded, held: &BTreeMap<AppName, Arc<App>>) -> Result<(), Problem> {
    let others: BTreeMap<AppName, Arc<App>> = held
        .iter()
        .filter(|(_, app)| app.origin != Origin::Api)
        .map(|(name, app)| (name.clone(), Arc::clone(app)))
        .collect();
    let mut faults = std::mem::take(&mut loaded.faults);
    for file in &loaded.apps {
        if let Some(other) = others.get(&file.app.name) {
            let message = format!("the app \"{}\" is configured by {} already", other.name, other.origin);
            faults.push(file.fault(message, "take the file out of one of the two folders"));
        }
        for (_, name, owner) in clashes(&others, &file.app) {
            let message = format!("the server-name \"{name}\" belongs to the app \"{owner}\" already");
            faults.push(file.fault_of_name(name, message, "take it out of one of the two"));
        }
    }
    if faults.is_empty() {
        return Ok(());
    }
    let detail = format!("nothing was done: there are {} fault(s)", faults.len());
    Err(Problem::invalid(detail, faults.iter().map(FieldError::file).collect()))
}
