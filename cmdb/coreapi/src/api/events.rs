//! `/v1/events`: what happened, and what happens.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::HeaderMap,
    response::{
        IntoResponse as _, Response, Sse,
        sse::{self, KeepAlive},
    },
};
use cmdb::AppName;
use launcher_client::{
    Client, ClientError,
    wire::{Event, Reply, Request},
};
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream};
use utoipa::IntoParams;

use super::{
    Api,
    extract::{Asked, Json, Reader},
    instances::{int64, named},
    problem::Problem,
};
use crate::link::Link;

/// Events that wait for a slow reader; then it is cut, and comes again with the id of the last that it had.
const LAG: usize = 1024;
/// How long a stream that was cut rests before the launcher is asked again.
const PAUSE: Duration = Duration::from_millis(200);

/// Which events.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Which {
    /// Only events after this number.
    since: u64,
    /// Only events about this app.
    #[param(pattern = "^[a-z0-9][a-z0-9._-]{0,62}$")]
    app: Option<String>,
}

/// The events that the launcher has kept, oldest first.
#[utoipa::path(get, path = "/v1/events", tag = "events", params(Which), responses((status = 200, body = Vec<Event>)))]
pub(crate) async fn list(
    _: Reader,
    State(api): State<Arc<Api>>,
    Asked(which): Asked<Which>,
) -> Result<Json<Vec<Event>>, Problem> {
    let app = named(which.app)?;
    let since = int64("since", which.since)?;
    let events = api.list(Request::Events { since, follow: false }, |reply| match reply {
        Reply::Event(event) if app.is_none() || event.app == app => Some(event),
        _ => None,
    });
    events.await.map(Json)
}

/// The same as they happen: server-sent events, each with an id. A client that sends the last one as `Last-Event-ID` goes on
/// after it; if the launcher has begun anew since, with everything.
#[utoipa::path(
    get, path = "/v1/events/stream", tag = "events", params(Which, ("last-event-id" = Option<String>, Header)),
    responses((status = 200, body = String, content_type = "text/event-stream"))
)]
pub(crate) async fn stream(
    _: Reader,
    State(api): State<Arc<Api>>,
    Asked(which): Asked<Which>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let app = named(which.app)?;
    let Ok(place) = Arc::clone(&api.followers).try_acquire_owned() else {
        return Err(Problem::away("too many follow the events already"));
    };
    let last = match headers.get("last-event-id").map(|id| id.to_str().ok().and_then(Mark::read)) {
        Some(Some(mark)) => Position::After(mark),
        Some(None) => return Err(Problem::malformed("this Last-Event-ID is none of ours")),
        None => Position::Since(which.since),
    };
    let (sender, events) = mpsc::channel(LAG);
    tokio::spawn(follow(api.link.clone(), last, app, sender, place));
    let keep_alive = KeepAlive::new().interval(Duration::from_secs(15));
    Ok(Sse::new(told(ReceiverStream::new(events))).keep_alive(keep_alive).into_response())
}

fn told(events: ReceiverStream<Event>) -> impl Stream<Item = Result<sse::Event, Infallible>> {
    events.map(|event| {
        let id = Mark::of(&event).to_string();
        let data = serde_json::to_string(&event).unwrap_or_default();
        Ok(sse::Event::default().id(id).event("event").data(data))
    })
}

/// An event, told apart from those of other lives of the launcher.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Mark {
    seq: u64,
    at_unix_ms: u64,
}

/// Where to go on.
#[derive(Clone, Copy, Debug)]
enum Position {
    Since(u64),
    After(Mark),
}

impl Mark {
    fn of(event: &Event) -> Self {
        Self { seq: event.seq, at_unix_ms: event.at_unix_ms }
    }

    fn read(text: &str) -> Option<Self> {
        let (seq, at) = text.split_once('-')?;
        Some(Self { seq: seq.parse().ok()?, at_unix_ms: at.parse().ok()? })
    }
}

impl std::fmt::Display for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.seq, self.at_unix_ms)
    }
}

/// Until the reader goes or falls too far behind. A launcher that goes is waited for.
async fn follow(
    link: Link,
    mut position: Position,
    app: Option<AppName>,
    sender: mpsc::Sender<Event>,
    _place: OwnedSemaphorePermit,
) {
    loop {
        let connected = tokio::select! {
            connected = link.connected() => connected,
            () = sender.closed() => return,
        };
        let since = match position {
            Position::Since(seq) => Ok(seq),
            Position::After(mark) => resume(&connected.client, mark).await,
        };
        let Ok(since) = since else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let mut is_cut = false;
        let asked = connected.client.stream(Request::Events { since, follow: true }, |reply| {
            let Reply::Event(event) = reply else { return true };
            position = Position::After(Mark::of(&event));
            if app.is_none() || event.app == app {
                is_cut = sender.try_send(event).is_err();
            }
            !is_cut
        });
        tokio::select! {
            _ = asked => {}
            () = sender.closed() => return,
        }
        if is_cut {
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The number after which to go on: that of the last event, unless the launcher has begun to count anew since.
async fn resume(client: &Client, mark: Mark) -> Result<u64, ClientError> {
    let mut first = None;
    let request = Request::Events { since: mark.seq.saturating_sub(1), follow: false };
    let asked = client.stream(request, |reply| {
        if let Reply::Event(event) = reply {
            first = Some(Mark::of(&event));
        }
        first.is_none()
    });
    asked.await?;
    let is_same = first
        .is_some_and(|first| first == mark || (first.seq > mark.seq && first.at_unix_ms >= mark.at_unix_ms));
    Ok(if is_same { mark.seq } else { 0 })
}
