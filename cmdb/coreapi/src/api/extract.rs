//! What handlers take: bodies, queries, names of apps; and the role that they ask for. Each fault is a [`Problem`].

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{HeaderMap, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use cmdb::AppName;
use serde::{Serialize, de::DeserializeOwned};
use utoipa::IntoParams;

use super::{
    gate::Caller,
    problem::{FieldError, Problem},
    tokens::Role,
};

/// A JSON answer.
pub(crate) struct Json<T>(pub(crate) T);

/// A JSON body.
pub(crate) struct Body<T>(pub(crate) T);

/// The query.
pub(crate) struct Asked<T>(pub(crate) T);

/// How the path names an app, for the description.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[allow(dead_code, reason = "it only describes")]
pub(crate) struct AppPath {
    /// The app's name.
    #[param(pattern = "^[a-z0-9][a-z0-9._-]{0,62}$", example = "blog")]
    app: String,
}

/// What the path names.
pub(crate) struct Segment(pub(crate) String);

/// The app that the path names.
pub(crate) struct Named(pub(crate) AppName);

/// Whoever asks may see.
pub(crate) struct Reader(pub(crate) Caller);

/// Whoever asks may operate.
pub(crate) struct Operator;

/// Whoever asks may configure.
pub(crate) struct Admin;

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
            Err(error) => {
                Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string()).into_response()
            }
        }
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        if !is_json(request.headers()) {
            let detail = "the body must be JSON: send content-type: application/json";
            return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported", detail));
        }
        let bytes = Bytes::from_request(request, state)
            .await
            .map_err(|rejection| Problem::new(rejection.status(), "body", rejection.body_text()))?;
        let mut reader = serde_json::Deserializer::from_slice(&bytes);
        let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
            let pointer = pointer(error.path());
            let error = error.into_inner();
            if error.is_data() {
                let fault =
                    FieldError { pointer: Some(pointer), detail: error.to_string(), ..FieldError::default() };
                Problem::invalid("the body has another shape than is asked for", vec![fault])
            } else {
                not_json(&error)
            }
        })?;
        reader.end().map_err(|error| not_json(&error))?;
        Ok(Self(value))
    }
}

fn not_json(error: &serde_json::Error) -> Problem {
    let fault = FieldError {
        line: Some(error.line()),
        column: Some(error.column()),
        detail: error.to_string(),
        ..FieldError::default()
    };
    Problem::malformed("the body is no JSON").with(vec![fault])
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind == "application/json" || kind == "application/merge-patch+json"
}

fn pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    path.iter()
        .map(|segment| match segment {
            Segment::Seq { index } => format!("/{index}"),
            Segment::Map { key } => format!("/{}", key.replace('~', "~0").replace('/', "~1")),
            Segment::Enum { variant } => format!("/{variant}"),
            Segment::Unknown => String::new(),
        })
        .collect()
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Asked<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let query = Query::<T>::from_request_parts(parts, state).await;
        query.map(|Query(query)| Self(query)).map_err(|rejection| Problem::malformed(rejection.body_text()))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let named = Path::<String>::from_request_parts(parts, state).await;
        named.map(|Path(name)| Self(name)).map_err(|rejection| Problem::malformed(rejection.body_text()))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Segment(name) = Segment::from_request_parts(parts, state).await?;
        name.parse().map(Self).map_err(|error: cmdb::app::NameError| Problem::malformed(error.to_string()))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Reader {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        allow(parts, Role::Read).map(Self)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Operator {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        allow(parts, Role::Operate).map(|_| Self)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Admin {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        allow(parts, Role::Admin).map(|_| Self)
    }
}

fn allow(parts: &Parts, least: Role) -> Result<Caller, Problem> {
    match parts.extensions.get::<Caller>() {
        Some(caller) if caller.role >= least => Ok(caller.clone()),
        Some(caller) => {
            let detail = format!(
                "this needs the role {}, and {} has {}; {}",
                least.as_str(),
                caller.name,
                caller.role.as_str(),
                if caller.is_anonymous() {
                    "start the CoreAPI with --tokens FILE and send a token"
                } else {
                    "ask for another token"
                }
            );
            Err(Problem::new(StatusCode::FORBIDDEN, "forbidden", detail))
        }
        None => Err(Problem::new(StatusCode::UNAUTHORIZED, "unauthorized", "send a token")),
    }
}
