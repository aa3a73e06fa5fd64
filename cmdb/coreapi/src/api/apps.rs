//! `/v1/apps`: the apps, as their vhost files would say them.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use cmdb::{App, AppName, HostPattern, Origin, vhost};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use super::{
    Api, Vhost,
    extract::{Admin, AppPath, Asked, Body, Json, Named, Reader},
    plan::{Change, Outcome, merge},
    problem::{FieldError, Problem},
    tokens::Role,
};
use crate::link::Connected;

/// Environments hold passwords: who may only see what runs is not shown them.
const HIDDEN: &str = "(hidden)";

/// One app.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AppView {
    /// Its name.
    name: String,
    /// Who configured it: `conf.d`, `conf.d@HOST` or `api`.
    origin: String,
    /// What its vhost file says, complete with what holds where it says nothing.
    vhost: Vhost,
}

/// An app in the list.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AppLine {
    /// Its name.
    name: String,
    /// Who configured it: `conf.d`, `conf.d@HOST` or `api`.
    origin: String,
    /// Its host names.
    server_names: Vec<String>,
    /// Its image.
    image: String,
}

/// A new app.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewApp {
    /// Its name, as a file would have it without `.toml`.
    #[schema(pattern = "^[a-z0-9][a-z0-9._-]{0,62}$", example = "blog")]
    name: String,
    /// What its vhost file would say.
    vhost: Vhost,
}

/// How a change is to be made.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct How {
    /// Only say what would change.
    dry_run: bool,
    /// Also if somebody else (a host's `conf.d`) has configured the app.
    take_over: bool,
}

/// All apps.
#[utoipa::path(get, path = "/v1/apps", tag = "apps", responses((status = 200, body = Vec<AppLine>)))]
pub(crate) async fn list(_: Reader, State(api): State<Arc<Api>>) -> Result<Json<Vec<AppLine>>, Problem> {
    let apps = api.connected().await?.apps();
    let line = |app: &Arc<App>| AppLine {
        name: app.name.to_string(),
        origin: app.origin.to_string(),
        server_names: app.server_names.iter().map(ToString::to_string).collect(),
        image: app.container.image.clone(),
    };
    Ok(Json(apps.values().map(line).collect()))
}

/// One app.
#[utoipa::path(get, path = "/v1/apps/{app}", tag = "apps", params(AppPath), responses((status = 200, body = AppView)))]
pub(crate) async fn get(
    Reader(caller): Reader,
    State(api): State<Arc<Api>>,
    Named(name): Named,
) -> Result<Json<AppView>, Problem> {
    let app = api.connected().await?.app(&name).ok_or_else(|| Problem::unknown_app(&name))?;
    let mut vhost = vhost::to_json(&app);
    if caller.role < Role::Operate {
        hide(&mut vhost);
    }
    let origin = app.origin.to_string();
    Ok(Json(AppView { name: name.to_string(), origin, vhost: Vhost(vhost) }))
}

fn hide(vhost: &mut Value) {
    match vhost {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::Object(env) if key == "env" => {
                        env.values_mut().for_each(|value| *value = HIDDEN.into());
                    }
                    other => hide(other),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(hide),
        _ => {}
    }
}

/// A new app. Role: admin.
#[utoipa::path(
    post, path = "/v1/apps", tag = "apps", params(How), request_body = NewApp,
    responses((status = 201, body = Outcome, description = "made"), (status = 200, body = Outcome, description = "dry-run"))
)]
pub(crate) async fn create(
    _: Admin,
    State(api): State<Arc<Api>>,
    Asked(how): Asked<How>,
    Body(new): Body<NewApp>,
) -> Result<Response, Problem> {
    let name: AppName = new.name.parse().map_err(|error: cmdb::app::NameError| {
        let (pointer, detail) = (Some("/name".to_owned()), error.to_string());
        Problem::invalid(
            "the app cannot be called so",
            vec![FieldError { pointer, detail, ..FieldError::default() }],
        )
    })?;
    let app = read(&api, &name, &new.vhost.0, "/vhost")?;
    let _turn = api.configuring.lock().await;
    let connected = api.connected().await?;
    if let Some(old) = connected.app(&name) {
        let detail =
            format!("there is an app \"{name}\" already, configured by {}; PUT replaces it", old.origin);
        return Err(Problem::conflict(detail));
    }
    put(&connected, app, &how, "/vhost").await
}

/// The app is so from now on, new or not. Role: admin.
#[utoipa::path(
    put, path = "/v1/apps/{app}", tag = "apps", params(AppPath, How), request_body = Vhost,
    responses((status = 200, body = Outcome, description = "replaced, the same already, or dry-run"), (status = 201, body = Outcome, description = "made"))
)]
pub(crate) async fn replace(
    _: Admin,
    State(api): State<Arc<Api>>,
    Named(name): Named,
    Asked(how): Asked<How>,
    Body(vhost): Body<Vhost>,
) -> Result<Response, Problem> {
    let app = read(&api, &name, &vhost.0, "")?;
    let _turn = api.configuring.lock().await;
    let connected = api.connected().await?;
    put(&connected, app, &how, "").await
}

/// Some keys of the app are so from now on: a JSON merge patch (RFC 7396) of its vhost, in which null takes a key out.
/// Role: admin.
#[utoipa::path(
    patch, path = "/v1/apps/{app}", tag = "apps", params(AppPath, How),
    request_body(content = super::VhostPatch, content_type = "application/merge-patch+json"),
    responses((status = 200, body = Outcome))
)]
pub(crate) async fn patch(
    _: Admin,
    State(api): State<Arc<Api>>,
    Named(name): Named,
    Asked(how): Asked<How>,
    Body(patch): Body<Value>,
) -> Result<Response, Problem> {
    let _turn = api.configuring.lock().await;
    let connected = api.connected().await?;
    let old = connected.app(&name).ok_or_else(|| Problem::unknown_app(&name))?;
    let mut vhost = vhost::to_json(&old);
    merge(&mut vhost, patch);
    let app = read(&api, &name, &vhost, "")?;
    put(&connected, app, &how, "").await
}

/// The app goes, and its instances end. Role: admin.
#[utoipa::path(
    delete, path = "/v1/apps/{app}", tag = "apps", params(AppPath, How),
    responses((status = 200, body = Outcome))
)]
pub(crate) async fn remove(
    _: Admin,
    State(api): State<Arc<Api>>,
    Named(name): Named,
    Asked(how): Asked<How>,
) -> Result<Json<Outcome>, Problem> {
    let _turn = api.configuring.lock().await;
    let connected = api.connected().await?;
    let old = connected.app(&name).ok_or_else(|| Problem::unknown_app(&name))?;
    check_origin(&old, &how)?;
    if !how.dry_run {
        connected.remove(&name, (!how.take_over).then_some(Origin::Api)).await?;
    }
    let changes = Change::between(Some(&old), None).into_iter().collect();
    Ok(Json(Outcome { dry_run: how.dry_run, changes }))
}

fn read(api: &Api, name: &AppName, vhost: &Value, parent: &str) -> Result<App, Problem> {
    match vhost::from_json(name, vhost, &api.base) {
        Ok(app) => Ok(App { origin: Origin::Api, ..app }),
        Err(faults) => {
            let detail = format!("the vhost has {} fault(s)", faults.len());
            let errors = faults.into_iter().map(|fault| FieldError::field(parent, fault)).collect();
            Err(Problem::invalid(detail, errors))
        }
    }
}

async fn put(connected: &Connected, app: App, how: &How, parent: &str) -> Result<Response, Problem> {
    let apps = connected.apps();
    let old = apps.get(&app.name);
    if let Some(old) = old {
        check_origin(old, how)?;
    }
    let clashes: Vec<FieldError> = clashes(&apps, &app)
        .map(|(index, pattern, owner)| FieldError {
            pointer: Some(format!("{parent}/server-name/{index}")),
            detail: format!("the server-name \"{pattern}\" belongs to the app \"{owner}\" already"),
            mend: "take it out of one of the two".into(),
            ..FieldError::default()
        })
        .collect();
    if !clashes.is_empty() {
        return Err(Problem::conflict("a server-name belongs to another app").with(clashes));
    }
    let change = Change::between(old.map(|old| &**old), Some(&app));
    let is_new = old.is_none();
    if change.is_some() && !how.dry_run {
        connected.put(app, how.take_over).await?;
    }
    let status = if is_new && !how.dry_run { StatusCode::CREATED } else { StatusCode::OK };
    let outcome = Outcome { dry_run: how.dry_run, changes: change.into_iter().collect() };
    Ok((status, Json(outcome)).into_response())
}

fn check_origin(old: &App, how: &How) -> Result<(), Problem> {
    if how.take_over || old.origin.yields_to(&Origin::Api) {
        return Ok(());
    }
    Err(Problem::conflict(format!(
        "the app \"{}\" is configured by {}: change it there, or ask with take-over=true (a file that is still there will be refused)",
        old.name, old.origin
    )))
}

/// Its server-names that other apps have.
pub(super) fn clashes<'a>(
    apps: &'a BTreeMap<AppName, Arc<App>>,
    app: &'a App,
) -> impl Iterator<Item = (usize, &'a HostPattern, &'a AppName)> {
    let others = apps.values().filter(|other| other.name != app.name);
    others.flat_map(|other| {
        let shared =
            app.server_names.iter().enumerate().filter(|(_, name)| other.server_names.contains(name));
        shared.map(|(index, name)| (index, name, &other.name))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn environments_are_hidden_from_those_who_may_only_look() {
        let mut vhost = json!({
            "container": { "image": "x", "env": { "PASSWORD": "secret" } },
            "provision": [{ "env": { "TOKEN": "secret" } }],
        });
        hide(&mut vhost);
        assert!(!vhost.to_string().contains("secret"), "{vhost}");
        assert_eq!(vhost["container"]["image"], "x");
    }
}
