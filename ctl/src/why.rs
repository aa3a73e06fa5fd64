//! `why`: where the time of one request went.

use std::time::Duration;

use cmdb::Generation;
use launcher_client::{
    admin::{self, Answer, Question, RequestRecord},
    packet::PacketError,
    paths::StateDir,
    wire::{Event, Reply, Request, WakeTiming},
};
use serde::Serialize;

use crate::{
    cli::{self, Global},
    control,
    failure::Failure,
    launcher,
    output::{Output, Style},
    ps,
    table::{self, Align},
    text,
};

/// Requests that are listed.
const SHOWN: usize = 20;
const PATIENCE: Duration = Duration::from_secs(10);
/// Decisions are of interest from so long before the request came, ms, …
const BEFORE_MS: u64 = 5_000;
/// … until so long after it had ended, ms: a verdict falls two seconds after its step.
const AFTER_MS: u64 = 3_000;
/// Events that tell of an app's size: see `launcher_client::wire::Decision`, and the starts that had to wait.
const DECISIONS: [&str; 10] = [
    "scale-up",
    "scale-down",
    "scale-out",
    "scale-in",
    "scale-none",
    "verdict",
    "override",
    "start-waits",
    "start-admitted",
    "no-room",
];

/// Runs the command.
pub(crate) async fn run(global: &Global, options: &cli::Why, out: &mut Output) -> Result<(), Failure> {
    let Some(id) = &options.id else { return recent(global, out).await };
    let request = record(global, id).await?;
    // Only a request that waited for a start has one to explain.
    let start =
        if request.hold_us > 0 && request.wake == "cold" { start(global, &request).await } else { None };
    let leak = suspicion(global, &request).await;
    let decisions = decisions(global, &request).await;
    if out.is_json() {
        return out.json(&Explained {
            request: &request,
            start: start.as_ref(),
            decisions: &decisions,
            leak,
        });
    }
    let mut lines = lines(&request, start.as_ref()).into_iter().chain(told(&decisions));
    if let Some(headline) = lines.next() {
        out.line(&out.paint(Style::Bold, &headline))?;
    }
    lines.try_for_each(|line| out.line(&line))?;
    match leak {
        Some(leak) => out.line(&format!("{} is suspected of a leak: {}", request.app, text::clean(&leak))),
        None => Ok(()),
    }
}

#[derive(Serialize)]
struct Explained<'a> {
    #[serde(flatten)]
    request: &'a RequestRecord,
    start: Option<&'a WakeTiming>,
    leak: Option<String>,
    decisions: &'a [Event],
}

/// The last requests, a line each.
async fn recent(global: &Global, out: &mut Output) -> Result<(), Failure> {
    let Answer::Recent(requests) = ask(global, &Question::Recent(SHOWN)).await? else {
        return Err(Failure::failed("the proxy answered something else"));
    };
    if out.is_json() {
        return out.json(&requests);
    }
    let titles = [
        ("CAME AT", Align::Left),
        ("STATUS", Align::Right),
        ("TOTAL", Align::Right),
        ("HELD", Align::Right),
        ("REQUEST", Align::Left),
        ("ID", Align::Left),
    ];
    let rows: Vec<Vec<String>> = requests.iter().map(row).collect();
    table::lines(&titles, &rows).iter().try_for_each(|line| out.line(line))
}

fn row(request: &RequestRecord) -> Vec<String> {
    let what = format!("{} {}{}", request.method, request.host, request.path);
    vec![
        text::local_time(request.at_unix_ms),
        request.status.to_string(),
        text::duration_us(request.total_us),
        text::duration_us(request.hold_us),
        text::clean(&what).chars().take(60).collect(),
        text::clean(&request.request_id).into_owned(),
    ]
}

async fn record(global: &Global, id: &str) -> Result<RequestRecord, Failure> {
    match ask(global, &Question::Why(id.to_owned())).await? {
        Answer::Request(Some(request)) => Ok(*request),
        Answer::Request(None) => Err(Failure::NotFound(format!(
            "no request {id:?} is known; the proxy keeps the last 4096 requests, the access log all of them"
        ))),
        _ => Err(Failure::failed("the proxy answered something else")),
    }
}

async fn ask(global: &Global, question: &Question) -> Result<Answer, Failure> {
    let socket = StateDir::new(&global.state).proxy_socket();
    let answer = tokio::time::timeout(PATIENCE, admin::ask(&socket, question))
        .await
        .map_err(|_| Failure::NotRunning("the proxy did not answer".into()))?;
    match answer {
        Ok(Answer::Error(message)) => Err(Failure::failed(format!("the proxy refused: {message}"))),
        Ok(answer) => Ok(answer),
        Err(PacketError::Io(error)) => Err(Failure::unreachable(&socket, "proxy", &error)),
        Err(PacketError::Closed) => Err(Failure::usage(
            "the proxy closed the connection; only root and the proxy's own user may ask it",
        )),
        Err(error) => Err(Failure::failed(error.to_string())),
    }
}

/// Why the app is suspected to lose memory, if it is: then it may have been slow for want of it.
async fn suspicion(global: &Global, request: &RequestRecord) -> Option<String> {
    let client = launcher::connect(global).await.ok()?;
    let app = request.app.parse().ok()?;
    launcher::statuses(&client, Some(app)).await.ok()?.into_iter().find_map(|status| status.leak)
}

/// How the instance that answered was started; `None` when the launcher does not know (any more).
async fn start(global: &Global, request: &RequestRecord) -> Option<WakeTiming> {
    let client = launcher::connect(global).await.ok()?;
    let app = request.app.parse().ok()?;
    let generation = Generation(request.generation);
    match launcher::ask(&client, Request::WakeTiming { app, generation }).await {
        Ok(Reply::WakeTiming(timing)) => Some(timing),
        _ => None,
    }
}

/// What was decided about the app's size around the request's time; nothing when the launcher does not know (any more).
async fn decisions(global: &Global, request: &RequestRecord) -> Vec<Event> {
    let Ok(client) = launcher::connect(global).await else { return Vec::new() };
    let (from, to) = around(request);
    let events = launcher::list(&client, Request::Events { since: 0, follow: false }, |reply| match reply {
        Reply::Event(event) => Some(event),
        _ => None,
    });
    let mut events = events.await.unwrap_or_default();
    events.retain(|event| {
        event.app.as_ref().is_some_and(|app| app.as_str() == request.app)
            && DECISIONS.contains(&event.kind.as_str())
            && (from..=to).contains(&event.at_unix_ms)
    });
    events
}

/// ms since the Unix epoch: what was decided a little before it came, while it was under way, and upon it.
fn around(request: &RequestRecord) -> (u64, u64) {
    let end = request.at_unix_ms + request.total_us / 1_000;
    (request.at_unix_ms.saturating_sub(BEFORE_MS), end + AFTER_MS)
}

fn told(decisions: &[Event]) -> Vec<String> {
    if decisions.is_empty() {
        return Vec::new();
    }
    let mut lines = vec![String::new(), "  decided about the app around that time:".to_owned()];
    lines.extend(decisions.iter().map(|event| {
        format!(
            "    {}  {:<14}  {}",
            text::local_time(event.at_unix_ms),
            text::clean(&event.kind),
            text::clean(&event.message)
        )
    }));
    lines
}

fn lines(request: &RequestRecord, start: Option<&WakeTiming>) -> Vec<String> {
    let clean = |text: &str| text::clean(text).into_owned();
    let status = match request.status {
        0 => "no answer: the client had gone".to_owned(),
        status => status.to_string(),
    };
    let mut lines = vec![
        format!("{} {}{} → {status}", clean(&request.method), clean(&request.host), clean(&request.path)),
        format!("  request   {}", clean(&request.request_id)),
        format!("  came at   {}, from {}", text::local_time(request.at_unix_ms), clean(&request.client)),
        format!("  answer    {} bytes", request.bytes),
        format!("  instance  {}", instance(request)),
    ];
    if request.retries > 0 {
        lines.push(format!("  retries   {}", request.retries));
    }
    if !request.error.is_empty() {
        lines.push(format!("  error     {}", clean(&request.error)));
    }
    lines.push(String::new());
    lines.extend(parts(request, start));
    lines
}

fn instance(request: &RequestRecord) -> String {
    match (request.app.as_str(), request.generation) {
        ("", _) => "none: no app has this host name".to_owned(),
        (app, 0) => format!("none of {}", text::clean(app)),
        (app, generation) => format!(
            "{}.{}{} ({})",
            text::clean(app),
            ps::short(Generation(generation)),
            if request.node.is_empty() {
                String::new()
            } else {
                format!(" on {}", text::clean(&request.node))
            },
            if request.wake == "cold" {
                "cold: it was started for this request, or for one just before"
            } else {
                "warm"
            }
        ),
    }
}

fn parts(request: &RequestRecord, start: Option<&WakeTiming>) -> Vec<String> {
    let part = |us: u64, what: &str| format!("  {:>14}  {what}", text::exact_ms(us));
    let mut lines = vec![part(request.own_us, "the proxy's own work: finding the app, picking, copying")];
    lines.push(part(request.hold_us, "hold: waiting for an instance"));
    if let Some(start) = start {
        lines.push(format!("                    its start took {}:", text::exact_ms(start.total_us)));
        lines.extend(control::steps(start).into_iter().map(|step| format!("                  {step}")));
        match request.hold_us.checked_sub(start.total_us) {
            Some(around) => lines.push(format!(
                "                    around its start {}: asking for it, hearing of it, taking turns",
                text::exact_ms(around)
            )),
            // It came when the start was under way: it waited for the rest of it.
            None => lines.push("                    (it was under way when the request came)".to_owned()),
        }
    }
    lines.extend([
        part(request.connect_us, "connect"),
        part(request.send_us, "sending the request"),
        part(request.first_byte_us, "the app, until its first byte"),
        part(request.body_us, "the rest of the answer"),
    ]);
    let named = request.own_us
        + request.hold_us
        + request.connect_us
        + request.send_us
        + request.first_byte_us
        + request.body_us;
    // The proxy promises that its parts sum to the whole; where they do not, the reader must see it.
    match request.total_us.saturating_sub(named) {
        0 => {}
        rest => lines.push(part(rest, "not accounted for")),
    }
    lines.push(part(request.total_us, "in all"));
    lines
}

#[cfg(test)]
mod tests {
    use launcher_client::wire::Step;

    use super::*;

    fn cold() -> RequestRecord {
        RequestRecord {
            request_id: "abc".into(),
            method: "GET".into(),
            host: "hello.localhost".into(),
            path: "/\x1b[2J".into(),
            status: 200,
            app: "hello".into(),
            generation: 1_763_972_712_345,
            own_us: 100,
            hold_us: 2_600,
            connect_us: 70,
            send_us: 10,
            first_byte_us: 300,
            body_us: 20,
            total_us: 3_100,
            wake: "cold".into(),
            ..RequestRecord::default()
        }
    }

    #[test]
    fn the_parts_of_a_cold_request_sum_to_the_whole() {
        let step = |name: &str, us| Step { name: name.into(), us };
        let start = WakeTiming {
            begun_us: 0,
            total_us: 2_500,
            steps: vec![step("clone", 500), step("app", 2_000)],
            warm: false,
        };

        let lines = parts(&cold(), Some(&start));

        assert_eq!(
            lines,
            [
                "        0.100 ms  the proxy's own work: finding the app, picking, copying",
                "        2.600 ms  hold: waiting for an instance",
                "                    its start took 2.500 ms:",
                "                    clone                            0.500 ms",
                "                    app                              2.000 ms",
                "                    around its start 0.100 ms: asking for it, hearing of it, taking turns",
                "        0.070 ms  connect",
                "        0.010 ms  sending the request",
                "        0.300 ms  the app, until its first byte",
                "        0.020 ms  the rest of the answer",
                "        3.100 ms  in all",
            ]
        );
    }

    #[test]
    fn a_request_that_came_during_a_start_is_not_charged_for_all_of_it() {
        let start = WakeTiming { total_us: 9_000, ..WakeTiming::default() };

        let lines = parts(&cold(), Some(&start));

        assert!(
            lines.contains(&"                    (it was under way when the request came)".to_owned()),
            "{lines:?}"
        );
    }

    #[test]
    fn what_was_decided_meanwhile_is_told_beneath() {
        let event = Event {
            seq: 1,
            at_unix_ms: 7_000,
            kind: "scale-up".into(),
            app: Some("hello".parse().unwrap()),
            generation: None,
            message: "the quota is raised".into(),
        };
        let request = RequestRecord { at_unix_ms: 10_000, total_us: 2_000_000, ..cold() };

        assert_eq!(around(&request), (5_000, 15_000));
        let told = told(&[event]);
        assert!(told[2].ends_with("scale-up        the quota is raised"), "{told:?}");
    }

    #[test]
    fn time_that_nobody_claims_is_shown() {
        let request = RequestRecord { total_us: 3_200, ..cold() };

        assert!(parts(&request, None).contains(&"        0.100 ms  not accounted for".to_owned()));
    }

    #[test]
    fn a_hostile_path_cannot_steer_the_terminal() {
        assert_eq!(lines(&cold(), None)[0], "GET hello.localhost/\\x1b[2J → 200");
    }
}
