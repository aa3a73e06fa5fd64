//! Having an app woken: by the launcher of this host, or by that of another one by way of its dispatcher; whichever the
//! placement names first, and the next one when it does not answer. Tasks of their own, never a request's (law 5).

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cmdb::{AppName, Generation, placement};
use http::StatusCode;
use launcher_client::{
    Client, ClientError,
    wire::{Refusal, RefusalCode, Request, WakeTiming},
};
use pingora::{connectors::http::Connector, http::RequestHeader};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use crate::{
    dispatch::{ERRAND_PATIENCE, Kind, REFUSED, WAKE_PATH},
    house::House,
    link::{Backoff, Line, connection},
    nodes::Remote,
    pages::Fault,
    remote, seal,
    tenant::AppRuntime,
};

/// Sockets that come along with a wake: one for each who waits, within these bounds.
const WAKE_SOCKETS: std::ops::RangeInclusive<u32> = 2..=32;
/// A back-off that ends this soon is waited for.
const SHORT_BACKOFF_MS: u64 = 250;
/// How long a refusal that may be a race is not believed.
const RACE: Duration = Duration::from_secs(2);
/// Within this time a dispatcher has answered, if only that the app is starting; a host that was cut off has not.
const ANSWER_WITHIN: Duration = Duration::from_millis(1_300);
/// Largest answer of a dispatcher.
const ANSWER_MAX: usize = 64 << 10;

/// What a dispatcher answers to a wake.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// An instance is ready.
    Woken {
        /// Where.
        node: String,
        /// Which.
        generation: Generation,
        /// How it came to be so.
        timing: WakeTiming,
    },
    /// It takes longer; to be asked again.
    Starting,
    /// There is none, for this reason.
    Refused(Refusal),
}

/// Wakes that other hosts have asked for: one at a time for each app, whoever asks.
#[derive(Debug, Default)]
pub struct Errands(Mutex<HashMap<AppName, watch::Receiver<Option<Verdict>>>>);

impl Errands {
    /// Where the verdict on `app` will appear, and where it is to be sent when nobody is at it yet.
    #[must_use]
    pub fn join(
        &self,
        app: &AppName,
    ) -> (watch::Receiver<Option<Verdict>>, Option<watch::Sender<Option<Verdict>>>) {
        let mut under_way = self.lock();
        if let Some(verdict) = under_way.get(app).filter(|verdict| verdict.has_changed().is_ok()) {
            return (verdict.clone(), None);
        }
        let (sender, verdict) = watch::channel(None);
        under_way.insert(app.clone(), verdict.clone());
        (verdict, Some(sender))
    }

    fn end(&self, app: &AppName) {
        self.lock().remove(app);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<AppName, watch::Receiver<Option<Verdict>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who may be asked.
enum Place {
    /// The launcher of this host.
    Here,
    /// The dispatcher of another one.
    There(Arc<Remote>),
}

/// What came of asking.
enum Answer {
    Woken,
    /// It takes longer, or what it told is over already: ask again.
    Again,
    /// It does not answer.
    Silent,
    Refused(Refusal),
}

/// Who wakes an app for those who wait. Single: `AppRuntime::knock` starts no second one before this has ended.
pub(crate) struct Waker {
    /// The app.
    pub(crate) app: Arc<AppRuntime>,
    /// For the requests that other hosts' proxies sent here, which only an instance of this host can serve.
    pub(crate) guests: bool,
    /// The launcher of this host.
    pub(crate) line: Line,
    /// Calls other hosts.
    pub(crate) caller: Arc<Connector>,
}

/// Wakes an app here because another host's proxy asks for it, whoever waits there.
pub(crate) async fn for_another(
    house: Arc<House>,
    name: AppName,
    mut line: Line,
    verdict: watch::Sender<Option<Verdict>>,
) {
    let said = match connection(&mut line).await {
        None => Verdict::Refused(Refusal::new(RefusalCode::Internal, "the launcher cannot be reached")),
        // What whoever asks could not reach, the launcher does not send it to.
        Some(client) if tell_unreachable(&house, &client).await.is_err() => {
            Verdict::Refused(Refusal::new(RefusalCode::Internal, "the launcher cannot be reached"))
        }
        Some(client) => match client.wake(&name, *WAKE_SOCKETS.start()).await {
            Ok(woken) => {
                let (generation, timing) = (woken.generation, woken.timing.clone());
                if let Some(app) = house.app(&name) {
                    app.woken(woken);
                }
                Verdict::Woken { node: own_name(&house), generation, timing }
            }
            Err(ClientError::Refused(refusal)) => Verdict::Refused(refusal),
            Err(error) => Verdict::Refused(Refusal::new(RefusalCode::Internal, error.to_string())),
        },
    };
    house.errands.end(&name);
    verdict.send_replace(Some(said));
}

impl Waker {
    /// Asks until it is answered, refused, or nobody waits any more.
    pub(crate) async fn run(mut self) {
        let (app, guests) = (Arc::clone(&self.app), self.guests);
        let mut hint = None;
        let mut pause = Backoff::new(Duration::from_millis(10), Duration::from_millis(500));
        let begun = Instant::now();
        // Nobody waits any more: nobody needs the next attempt.
        while !app.room_for(guests).is_empty() {
            let answer = if guests {
                here(&app, &mut self.line, true).await
            } else {
                ask_around(&app, &mut self.line, &self.caller, &mut hint).await
            };
            match answer {
                Answer::Woken => break,
                Answer::Again | Answer::Silent => {}
                Answer::Refused(refusal) => {
                    // The launcher may learn of a new app a moment after this proxy did, or have begun to end an instance,
                    // or itself.
                    // A time to come again is no race: the host has no room.
                    let race = matches!(
                        refusal.code,
                        RefusalCode::UnknownApp | RefusalCode::UnknownInstance | RefusalCode::Busy
                    ) && refusal.retry_after_ms.is_none();
                    // Nobody is sent away for a moment that is over before they could come back.
                    let moment = refusal.retry_after_ms.filter(|ms| *ms <= SHORT_BACKOFF_MS);
                    if let (RefusalCode::Backoff, Some(ms)) = (refusal.code, moment) {
                        sleep(Duration::from_millis(ms)).await;
                    } else if !race || begun.elapsed() > RACE {
                        tracing::info!(app = %app.name, code = %refusal.code, reason = %refusal.message, "not woken");
                        app.refuse_in(guests, &Fault::of_refusal(&refusal));
                        break;
                    }
                }
            }
            sleep(pause.next()).await;
        }
        app.wake_ended(guests);
    }
}

/// Asks one host after the other. `hint`: which one has it, as another one said.
async fn ask_around(
    app: &Arc<AppRuntime>,
    line: &mut Line,
    caller: &Connector,
    hint: &mut Option<String>,
) -> Answer {
    let places = places(app, hint.take());
    let alone = places.len() == 1;
    let mut full = None;
    for place in places {
        let answer = match &place {
            Place::Here => here(app, line, alone).await,
            Place::There(remote) => there(app, remote, caller).await,
        };
        match answer {
            Answer::Refused(refusal) if refusal.code == RefusalCode::Elsewhere => {
                // One that cannot be reached from here is dead, or will be thought so by all in a moment.
                let hosts = &app.house().hosts;
                let is_reached = |name: &String| hosts.is_own(name) || hosts.remote(name).is_fit();
                *hint = refusal.elsewhere.filter(is_reached);
                return Answer::Again;
            }
            // Others may have room, or know it.
            Answer::Refused(refusal)
                if matches!(
                    refusal.code,
                    RefusalCode::Busy
                        | RefusalCode::UnknownApp
                        | RefusalCode::UnknownInstance
                        | RefusalCode::Internal
                ) && !alone =>
            {
                full.get_or_insert(refusal);
            }
            Answer::Silent => {}
            decided => return decided,
        }
    }
    full.map_or(Answer::Silent, Answer::Refused)
}

/// Whom to ask, in which order.
fn places(app: &AppRuntime, hint: Option<String>) -> Vec<Place> {
    let hosts = &app.house().hosts;
    let nodes = hosts.list();
    let order = placement::for_wake(&app.spec.load(), &app.record(), &nodes);
    let mut names: Vec<&str> = order.iter().map(|node| node.name()).collect();
    if let Some(named) = &hint {
        names.retain(|name| name != named);
        names.insert(0, named);
    }
    let place = |name: &str| if hosts.is_own(name) { Place::Here } else { Place::There(hosts.remote(name)) };
    let mut places: Vec<Place> = names.into_iter().map(place).collect();
    // Who could not be reached a moment ago comes last, unless it is known to have the app.
    if hint.is_none() {
        places.sort_by_key(|place| matches!(place, Place::There(remote) if remote.is_suspect()));
    }
    let has_launcher = app.house().config.cluster.as_ref().is_none_or(|cluster| cluster.node.is_some());
    // When nobody takes it, the launcher says why.
    if has_launcher && places.is_empty() {
        places.push(Place::Here);
    }
    places
}

/// Asks the launcher of this host; `patiently`: waits for a moment when it is not there.
async fn here(app: &Arc<AppRuntime>, line: &mut Line, patiently: bool) -> Answer {
    if !patiently && line.borrow().is_none() {
        return Answer::Silent;
    }
    let Some(client) = connection(line).await else { return Answer::Again };
    if tell_unreachable(app.house(), &client).await.is_err() {
        return Answer::Silent;
    }
    match client.wake(&app.name, sockets_for(app)).await {
        Ok(woken) => {
            if app.woken(woken) {
                Answer::Woken
            } else {
                Answer::Again
            }
        }
        Err(ClientError::Refused(refusal)) => Answer::Refused(refusal),
        Err(error) => {
            tracing::debug!(app = %app.name, %error, "the wake got no answer; trying again");
            Answer::Silent
        }
    }
}

/// Which hosts this proxy cannot reach, for the launcher to know before it decides.
async fn tell_unreachable(house: &House, client: &Client) -> Result<(), ClientError> {
    match house.hosts.suspects() {
        nodes if nodes.is_empty() => Ok(()),
        nodes => client.tell(Request::Unreachable { nodes }).await,
    }
}

/// Asks the dispatcher of another host.
async fn there(app: &Arc<AppRuntime>, remote: &Remote, caller: &Connector) -> Answer {
    let verdict = match timeout(ANSWER_WITHIN, call(app, remote, caller)).await {
        Ok(Ok(verdict)) => verdict,
        Ok(Err(reason)) => {
            remote.suspect(&reason);
            return Answer::Silent;
        }
        Err(_) => {
            remote.suspect("its dispatcher does not answer");
            return Answer::Silent;
        }
    };
    remote.forgive();
    match verdict {
        Verdict::Woken { node, generation, timing } => {
            if app.woken_elsewhere(&node, generation, timing) {
                Answer::Woken
            } else {
                Answer::Again
            }
        }
        Verdict::Starting => Answer::Again,
        Verdict::Refused(refusal) => Answer::Refused(refusal),
    }
}

/// One call over a connection of its own: a start takes far longer than a handshake.
async fn call(app: &AppRuntime, remote: &Remote, caller: &Connector) -> Result<Verdict, String> {
    let words = |error: Box<pingora::Error>| error.to_string();
    let peer = remote.peer(false).ok_or("nobody knows where its dispatcher is")?;
    let (mut session, _) = caller.get_http_session(&*peer).await.map_err(words)?;
    let request = request(app, remote).map_err(words)?;
    session.write_request_header(Box::new(request)).await.map_err(words)?;
    session.finish_request_body().await.map_err(words)?;
    session.read_response_header().await.map_err(words)?;
    let mut body = Vec::new();
    while let Some(piece) = session.read_response_body().await.map_err(words)? {
        body.extend_from_slice(&piece);
        if body.len() > ANSWER_MAX {
            return Err("its dispatcher's answer is too long".to_owned());
        }
    }
    let response = session.response_header().ok_or("its dispatcher gave no answer")?;
    if let Some(code) = response.headers.get(REFUSED) {
        let code = code.to_str().unwrap_or_default();
        return Err(match response.status {
            StatusCode::FORBIDDEN => {
                "its dispatcher does not believe this proxy; do all hosts have the same key?".to_owned()
            }
            _ => format!("its dispatcher refuses: {code}"),
        });
    }
    serde_json::from_slice(&body).map_err(|error| format!("its dispatcher's answer makes no sense: {error}"))
}

fn request(app: &AppRuntime, remote: &Remote) -> pingora::Result<RequestHeader> {
    let path = format!("{WAKE_PATH}{}", app.name);
    let mut request = RequestHeader::build("POST", path.as_bytes(), Some(8))?;
    request.insert_header(http::header::HOST, remote.name.as_str())?;
    request.insert_header(http::header::CONTENT_LENGTH, "0")?;
    request.insert_header(seal::NODE, remote.name.as_str())?;
    request.insert_header(seal::KIND, Kind::Wake.as_str())?;
    request.insert_header(seal::APP, app.name.as_str())?;
    let unreached = app.house().hosts.unreached();
    if !unreached.is_empty() {
        request.insert_header(seal::UNREACHABLE, unreached.join(","))?;
    }
    remote::close(app.house(), &mut request)?;
    Ok(request)
}

fn sockets_for(app: &AppRuntime) -> u32 {
    let waiting = u32::try_from(app.waiting()).unwrap_or(u32::MAX);
    waiting.clamp(*WAKE_SOCKETS.start(), *WAKE_SOCKETS.end())
}

/// The name of this host among the others.
pub(crate) fn own_name(house: &House) -> String {
    house.config.cluster.as_ref().and_then(|cluster| cluster.node.clone()).unwrap_or_default()
}

const _: () = assert!(ERRAND_PATIENCE.as_millis() < ANSWER_WITHIN.as_millis());
