//! The messages. Every packet is one [`ClientPacket`] or [`ServerPacket`].

use std::{fmt, sync::Arc};

use cmdb::{App, AppName, AppRecord, Generation, Origin, Outcome, Transition, compute::Nodes};
use serde::{Deserialize, Serialize};

use crate::usage::{Span, Traffic, Usage};

/// Version of this protocol; a peer with another one is refused with a clear error.
pub const VERSION: u32 = 1;
/// Largest packet in bytes.
pub const MAX_PACKET: usize = 128 * 1024;
/// Most descriptors in one packet (the kernel's own limit is 253).
pub const MAX_FDS: usize = 64;

/// From client to launcher.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ClientPacket {
    /// [`VERSION`].
    pub v: u32,
    /// Chosen by the client, repeated in every reply; 0: no reply wanted.
    pub id: u64,
    /// What is asked.
    pub body: Request,
}

/// From launcher to client.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ServerPacket {
    /// [`VERSION`].
    pub v: u32,
    /// The request that this answers.
    pub id: u64,
    /// The answer, or one of several of a stream that [`Reply::End`] or an error closes.
    pub body: Reply,
}

/// What a client may ask. Who may ask what: see each; peers are known by `SO_PEERCRED`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Proxy, operator: have an instance ready. Idempotent. → [`Reply::Woken`] with sockets.
    Wake {
        /// Which app.
        app: AppName,
        /// How many sockets to send along (0 to [`MAX_FDS`]).
        sockets: u32,
    },
    /// Proxy: more unconnected sockets, born in the instance's network namespace. → [`Reply::Sockets`].
    Sockets {
        /// Which app.
        app: AppName,
        /// Which instance.
        generation: Generation,
        /// How many (1 to [`MAX_FDS`]).
        count: u32,
    },
    /// Proxy: the instance sent its first response byte (its CPU quota begins). No reply.
    FirstByte {
        /// Which app.
        app: AppName,
        /// Which instance.
        generation: Generation,
    },
    /// Proxy: what instances did since the last report. No reply.
    Report {
        /// One for each instance with activity or requests under way.
        activity: Vec<Activity>,
    },
    /// Proxy: what apps' visitors did, for the ledger. No reply.
    Traffic {
        /// When this proxy began, µs since the Unix epoch: tells its totals from another proxy's.
        since_us: u64,
        /// Apps whose totals have changed.
        apps: Vec<Traffic>,
    },
    /// Proxy: no request of this proxy is or will be on that draining instance. No reply.
    Quiesced {
        /// Which app.
        app: AppName,
        /// Which instance.
        generation: Generation,
    },
    /// Proxy: connecting to the instance failed though it should be ready. No reply.
    Suspect {
        /// Which app.
        app: AppName,
        /// Which instance.
        generation: Generation,
        /// The error in words.
        reason: String,
    },
    /// Proxy: these hosts could not be reached a moment ago. A wake that finds an app on one of them is of no use. No reply.
    Unreachable {
        /// Their names.
        nodes: Vec<String>,
    },
    /// Everybody: all apps and records, then changes. → stream of [`Reply::Put`], [`Reply::Removed`], [`Reply::Synced`].
    Watch {
        /// A proxy that serves traffic: its `Quiesced` is waited for.
        serving: bool,
    },
    /// CoreAPI, root: put an app in place. Refused ([`RefusalCode::Conflict`]) while one of another origin is there that says
    /// something else. → [`Reply::Done`].
    PutApp {
        /// The app.
        app: Box<App>,
        /// Whatever the origin of the one that is there.
        #[serde(default)]
        take_over: bool,
    },
    /// CoreAPI, root: remove an app and end its instances. → [`Reply::Done`].
    RemoveApp {
        /// Which.
        app: AppName,
        /// Only if it is of this origin.
        #[serde(default)]
        origin: Option<Origin>,
    },
    /// CoreAPI, root: put a line among the events. No reply.
    Note {
        /// For example `config-error`.
        kind: String,
        /// About which app, if any.
        app: Option<AppName>,
        /// In words.
        message: String,
    },
    /// Root: a transition of the CMDB's state machine. → [`Reply::Applied`].
    Apply {
        /// Which app.
        app: AppName,
        /// Which transition.
        transition: Transition,
    },
    /// Everybody: what is there. → stream of [`Reply::Status`], then [`Reply::End`].
    Ps {
        /// Only this app.
        app: Option<AppName>,
    },
    /// Everybody: events after `since` (0: all that are kept). → stream of [`Reply::Event`], then [`Reply::End`] unless `follow`.
    Events {
        /// Sequence number after which to begin.
        since: u64,
        /// Go on with new ones.
        follow: bool,
    },
    /// Operator: the last output of an app. → stream of [`Reply::Log`], then [`Reply::End`].
    Logs {
        /// Which app.
        app: AppName,
        /// Most lines.
        lines: u32,
    },
    /// Operator: end all instances of an app (they wake again on the next request). → [`Reply::Done`] when they are gone.
    Stop {
        /// Which app.
        app: AppName,
    },
    /// Operator: replace all instances, the new one first. → [`Reply::Done`] when begun.
    Restart {
        /// Which app.
        app: AppName,
    },
    /// Operator: other limits for an app, at once and in the running processes, until its vhost file changes them. What is
    /// `None` stays. → [`Reply::Done`].
    Limit {
        /// Which app.
        app: AppName,
        /// CPU quota in thousandths of a core.
        cpu: Option<u32>,
        /// Memory, bytes.
        memory: Option<u64>,
        /// Processes and threads.
        pids: Option<u32>,
        /// Before that: back to the limits of the file.
        #[serde(default)]
        reset: bool,
    },
    /// Operator: how many instances of an app run, until its vhost file changes that. → [`Reply::Done`] when begun.
    Scale {
        /// Which app.
        app: AppName,
        /// What is ordered.
        order: ScaleOrder,
    },
    /// Operator: run the app's hooks for a signal. → [`Reply::Done`] when they have begun.
    Signal {
        /// Which app.
        app: AppName,
        /// The signal's name, without `SIG`.
        signal: String,
    },
    /// Operator: what was used. → stream of [`Reply::Usage`], then [`Reply::End`].
    Usage {
        /// Since when, seconds since the Unix epoch; the hour (or day, when hours are not kept any more) around it is whole.
        since_unix_s: u64,
        /// How it is summed up.
        by: Span,
        /// Only this app.
        app: Option<AppName>,
    },
    /// Everybody: the hosts. → [`Reply::Nodes`].
    Nodes,
    /// Operator: have a host emptied, or not any more. → [`Reply::Done`] when that is on record.
    Drain {
        /// Which host.
        node: String,
        /// Whether it is to be emptied.
        draining: bool,
    },
    /// Operator: delete what is known of a host that will not come back, and give up its instances. → [`Reply::Done`].
    Forget {
        /// Which host.
        node: String,
    },
    /// Operator: the images of all apps. → stream of [`Reply::Image`], then [`Reply::End`].
    Images,
    /// Operator: the launcher's figures in Prometheus' text format. → stream of [`Reply::Text`], then [`Reply::End`].
    Metrics,
    /// Everybody: how the start of an instance went. → [`Reply::WakeTiming`].
    WakeTiming {
        /// Which app.
        app: AppName,
        /// Which instance.
        generation: Generation,
    },
}

/// How the operator wants an app to be scaled. What is `None` stays as it is.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ScaleOrder {
    /// Before all else: back to what the vhost file says, and no pause.
    pub auto: bool,
    /// So many instances, no fewer and no more.
    pub instances: Option<u32>,
    /// Fewest instances.
    pub min: Option<u32>,
    /// Most instances.
    pub max: Option<u32>,
    /// Whether nothing is scaled by itself, neither the quota nor the number.
    pub paused: Option<bool>,
}

/// What the launcher answers.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// An instance is ready; its sockets come along.
    Woken {
        /// Which instance.
        generation: Generation,
        /// On which port it listens.
        port: u16,
        /// How it came to be ready.
        timing: WakeTiming,
    },
    /// Sockets come along.
    Sockets {
        /// How many.
        count: u32,
    },
    /// One image.
    Image(ImageStatus),
    /// Done.
    Done,
    /// An app and its record, now or changed.
    Put {
        /// The app.
        app: Arc<App>,
        /// Its record.
        record: Arc<AppRecord>,
    },
    /// The app is gone.
    Removed {
        /// Which.
        app: AppName,
    },
    /// The hosts are these from now on.
    Nodes {
        /// All of them, by name.
        nodes: Nodes,
    },
    /// All that was there has been sent.
    Synced,
    /// A transition's outcome.
    Applied {
        /// What came of it.
        outcome: Outcome,
        /// The record after it.
        record: AppRecord,
    },
    /// One app's or instance's line of `ps`.
    Status(Box<Status>),
    /// One event.
    Event(Event),
    /// One line of output.
    Log(LogLine),
    /// A piece of a longer text.
    Text(String),
    /// How a start went.
    WakeTiming(WakeTiming),
    /// One line of the ledger.
    Usage(Usage),
    /// The stream is complete.
    End,
    /// It could not be done.
    Error(Refusal),
}

/// Why the launcher did not do what was asked.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// What kind.
    pub code: RefusalCode,
    /// In words, fit for an operator; no secrets.
    pub message: String,
    /// When it makes sense to try again, ms from now.
    pub retry_after_ms: Option<u64>,
    /// Which host has what was asked for ([`RefusalCode::Elsewhere`]).
    #[serde(default)]
    pub elsewhere: Option<String>,
}

/// Kinds of [`Refusal`].
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalCode {
    /// No such app.
    UnknownApp,
    /// No such instance (any more).
    UnknownInstance,
    /// The app exited, or could not be made or executed, before it listened.
    StartFailed,
    /// It did not listen within `start-timeout`.
    StartTimeout,
    /// Its starts failed lately: not before `retry_after_ms`.
    Backoff,
    /// The host has no room, or the launcher is ending.
    Busy,
    /// Another host has an instance, or is starting one: [`Refusal::elsewhere`].
    Elsewhere,
    /// This peer may not ask that.
    Forbidden,
    /// Somebody else configured it, or has its name.
    Conflict,
    /// The packet makes no sense, or speaks another version.
    BadRequest,
    /// A fault of the launcher or its host; the message says which.
    Internal,
}

/// What one instance did, as one proxy saw it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Activity {
    /// Which app.
    pub app: AppName,
    /// Which instance.
    pub generation: Generation,
    /// Requests under way now.
    pub in_flight: u32,
    /// Requests begun since the last report.
    pub requests: u32,
    /// The first-byte times of the last second.
    #[serde(default)]
    pub window: Window,
    /// Requests of the app that this proxy holds, because every instance is at `scale.concurrency` or none is ready.
    #[serde(default)]
    pub held: u32,
}

/// First-byte times of the last second.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Window {
    /// Responses.
    pub count: u32,
    /// Their mean, µs.
    #[serde(default)]
    pub mean_us: u64,
    /// Half of them began within this time, µs.
    pub p50_us: u64,
    /// Nine of ten did.
    pub p90_us: u64,
    /// Ninety-nine of a hundred did.
    #[serde(default)]
    pub p99_us: u64,
}

/// How an instance came to be ready.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WakeTiming {
    /// When the launcher began, µs since the Unix epoch.
    pub begun_us: u64,
    /// From then until it listened, µs.
    pub total_us: u64,
    /// The parts in order, which sum to the whole: `start-slot` (waiting for one, if it had to), `image`, `cgroup`, `spawner` (handing over), the sandbox's steps, `app`
    /// (exec until listen), `notice` (until the launcher knew).
    pub steps: Vec<Step>,
    /// Whether the app ran already when the request came (nothing was started).
    pub warm: bool,
}

/// One step of a start.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Step {
    /// Its name.
    pub name: String,
    /// µs.
    pub us: u64,
}

/// One line of `ps`: an instance, or an app without one.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Status {
    /// Its app.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub app: AppName,
    /// Its server-names.
    pub server_names: Vec<String>,
    /// The host that runs it; empty where there is only one, and for an app without an instance.
    #[serde(default)]
    pub node: String,
    /// Its generation; `None` when the app is stopped.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<u64>))]
    pub generation: Option<Generation>,
    /// `absent`, `starting`, `ready`, `frozen`, `draining`, `backing-off`.
    pub state: String,
    /// Why it is in that state, where there is something to say (the last failure, the reason of a drain).
    pub reason: String,
    /// Pid of its first process, as the host sees it.
    pub pid: Option<i32>,
    /// Port.
    pub port: Option<u16>,
    /// ms since it began.
    pub age_ms: Option<u64>,
    /// ms since its last request.
    pub idle_ms: Option<u64>,
    /// Requests under way.
    pub in_flight: u32,
    /// Requests so far.
    pub requests: u64,
    /// First-byte times of the last second, from the proxy that has most of them; `None`: no requests.
    #[serde(default)]
    pub window: Option<Window>,
    /// CPU used, µs.
    pub cpu_us: Option<u64>,
    /// Quota in thousandths of a core that is in force now; `None`: unlimited.
    pub cpu_limit: Option<u32>,
    /// Periods in which its quota stopped it, since the quota began, per mille of those in which it ran.
    #[serde(default)]
    pub throttled: Option<u32>,
    /// Memory charged, bytes.
    pub memory_bytes: Option<u64>,
    /// Memory limit, bytes.
    pub memory_limit: Option<u64>,
    /// Memory of it that is in swap, bytes.
    #[serde(default)]
    pub swap_bytes: Option<u64>,
    /// It is frozen, and its memory has been taken back as far as possible.
    #[serde(default)]
    pub reclaimed: bool,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Which image it runs (digest, or folder and time).
    pub image: String,
    /// Whether the next start uses a newer one.
    #[serde(default)]
    pub image_is_old: bool,
    /// What the operator has set in place of the app's vhost file, a phrase each.
    #[serde(default)]
    pub overrides: Vec<String>,
    /// What the scaler last decided for the app.
    #[serde(default)]
    pub decision: Option<Decision>,
    /// Why the app is suspected to lose memory, in words; `None`: it is not.
    #[serde(default)]
    pub leak: Option<String>,
}

/// Something that the scaler did, or found that it could do nothing about.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Decision {
    /// ms since the Unix epoch.
    pub at_unix_ms: u64,
    /// The event's kind: `scale-up`, `scale-down`, `scale-out`, `scale-in`, `scale-none` or `verdict`.
    pub kind: String,
    /// Evidence, cause and cure, in words.
    pub words: String,
}

/// One image that an app has.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ImageStatus {
    /// As the vhost file names it, followed by ` + ` and the name of each of its provisioning steps when it is about these.
    pub image: String,
    /// `waiting`, `fetching`, `unpacking`, `provisioning`, `ready`, `failed`; `folder` for one that is used where it lies.
    pub state: String,
    /// What the next start uses (a digest, or folder and time); empty while there is nothing.
    pub id: String,
    /// Bytes that it takes unpacked, with the layers that it shares with others.
    pub bytes: Option<u64>,
    /// Bytes that have come of those being fetched.
    pub fetched: Option<u64>,
    /// Bytes being fetched; 0 while that is not known.
    pub to_fetch: Option<u64>,
    /// The provisioning step that runs: `1/2 php`.
    #[serde(default)]
    pub step: Option<String>,
    /// The apps that have it.
    #[cfg_attr(feature = "openapi", schema(value_type = Vec<String>))]
    pub apps: Vec<AppName>,
    /// Why the last preparation failed; empty when it did not.
    pub error: String,
    /// ms until it is looked at again.
    pub next_look_ms: Option<u64>,
}

/// One event.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Event {
    /// Rises by one.
    pub seq: u64,
    /// ms since the Unix epoch.
    pub at_unix_ms: u64,
    /// `wake`, `ready`, `first-byte`, `draining`, `stopped`, `exited`, `start-failed`, `back-off`, `oom`, `start-waits`,
    /// `start-admitted`, `no-room`, `config-applied`,
    /// `config-removed`, `config-error`, `suspect`, `launcher-started`, …
    pub kind: String,
    /// About which app.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub app: Option<AppName>,
    /// About which instance.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<u64>))]
    pub generation: Option<Generation>,
    /// In words.
    pub message: String,
}

/// One line of an app's output.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct LogLine {
    /// Which instance.
    #[cfg_attr(feature = "openapi", schema(value_type = u64))]
    pub generation: Generation,
    /// ms since the Unix epoch.
    pub at_unix_ms: u64,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// The line without its end; bytes that are not UTF-8 are replaced, long lines cut.
    pub line: String,
}

impl Refusal {
    /// A refusal without a time to try again.
    #[must_use]
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after_ms: None, elsewhere: None }
    }
}

impl RefusalCode {
    /// As it is written on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UnknownApp => "unknown-app",
            Self::UnknownInstance => "unknown-instance",
            Self::StartFailed => "start-failed",
            Self::StartTimeout => "start-timeout",
            Self::Backoff => "backoff",
            Self::Busy => "busy",
            Self::Elsewhere => "elsewhere",
            Self::Forbidden => "forbidden",
            Self::Conflict => "conflict",
            Self::BadRequest => "bad-request",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for RefusalCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Status {
    /// The state of an app without an instance.
    pub const ABSENT: &'static str = "absent";
    /// The state of an app whose starts failed lately.
    pub const BACKING_OFF: &'static str = "backing-off";
}
