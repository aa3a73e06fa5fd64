//! One daemon that `up` keeps running.

use std::{
    ffi::OsString,
    io::{self, IsTerminal as _},
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A child that lived this long has recovered: the pause begins anew.
const SOUND: Duration = Duration::from_secs(10);

/// What runs.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    /// For the log: the program's name.
    pub(crate) name: &'static str,
    /// The executable.
    pub(crate) program: PathBuf,
    /// Its arguments.
    pub(crate) args: Vec<OsString>,
    /// Where it finds the CMDB, for those that open it themselves; the address may hold a password.
    pub(crate) cmdb: Option<(&'static str, String)>,
    /// How long it may take to end after SIGTERM.
    pub(crate) grace: Duration,
}

/// A service that is being kept running.
#[derive(Debug)]
pub(crate) struct Kept {
    name: &'static str,
    orders: mpsc::UnboundedSender<Order>,
    first_end: watch::Receiver<Option<String>>,
    task: JoinHandle<bool>,
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Hangup,
    Stop,
    Kill,
    /// It hangs: killed, and started again.
    Hung,
}

impl Service {
    /// Starts it and starts it again whenever it ends. Must be called on the main thread of a current-thread runtime:
    /// the children die with the thread that made them.
    pub(crate) fn keep(self) -> Kept {
        let (orders, receiver) = mpsc::unbounded_channel();
        let (ended, first_end) = watch::channel(None);
        let name = self.name;
        Kept { name, orders, first_end, task: tokio::spawn(self.supervise(receiver, ended)) }
    }

    fn spawn(&self) -> io::Result<Child> {
        let mut command = Command::new(&self.program);
        if !io::stderr().is_terminal() {
            // A log file is for reading and searching: the daemons must not colour it.
            command.env("NO_COLOR", "1");
        }
        match &self.cmdb {
            Some((name, address)) => command.env(name, address),
            None => command.env_remove(launcher_client::home::VARIABLE),
        };
        command
            .args(&self.args)
            .stdin(Stdio::null())
            // Stdout is `up`'s own: scripts read its `ready` lines.
            .stdout(Stdio::from(io::stderr()))
            // Its own process group: the terminal's Ctrl-C reaches `up` alone, which ends the others in order.
            .process_group(0)
            .spawn()
    }

    /// Returns whether it had to be killed.
    async fn supervise(
        self,
        mut orders: mpsc::UnboundedReceiver<Order>,
        ended: watch::Sender<Option<String>>,
    ) -> bool {
        let mut pause = FIRST_PAUSE;
        loop {
            let begun = Instant::now();
            let (pid, how) = match self.spawn() {
                Ok(mut child) => {
                    let pid = child.id().unwrap_or_default();
                    tracing::debug!("{} runs as pid {pid}", self.name);
                    match self.attend(&mut child, &mut orders).await {
                        Life::Ended(status) => (pid, status),
                        Life::Stopped { killed } => return killed,
                    }
                }
                Err(error) => (0, format!("cannot be started: {error}")),
            };
            if begun.elapsed() >= SOUND {
                pause = FIRST_PAUSE;
            }
            tracing::error!(
                "{} (pid {pid}) {how}; it is started again in {:.1} s",
                self.name,
                pause.as_secs_f64()
            );
            ended.send_if_modified(|first| first.is_none() && first.replace(how.clone()).is_none());
            let until = Instant::now() + pause;
            loop {
                tokio::select! {
                    () = sleep_until(until) => break,
                    order = orders.recv() => match order {
                        Some(Order::Hangup | Order::Hung) => {}
                        Some(Order::Stop | Order::Kill) | None => return false,
                    },
                }
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn attend(&self, child: &mut Child, orders: &mut mpsc::UnboundedReceiver<Order>) -> Life {
        let mut killed = false;
        let mut stopping = false;
        let forever = Duration::from_secs(86_400 * 365);
        let deadline = sleep(forever);
        tokio::pin!(deadline);
        loop {
            tokio::select! {
                status = child.wait() => {
                    return if stopping {
                        Life::Stopped { killed }
                    } else {
                        Life::Ended(describe(status))
                    };
                }
                order = orders.recv() => match order {
                    Some(Order::Hangup) => signal(child, Signal::SIGHUP),
                    Some(Order::Hung) => signal(child, Signal::SIGKILL),
                    Some(Order::Stop) => {
                        stopping = true;
                        signal(child, Signal::SIGTERM);
                        deadline.as_mut().reset(Instant::now() + self.grace);
                    }
                    Some(Order::Kill) | None => {
                        stopping = true;
                        killed = true;
                        signal(child, Signal::SIGKILL);
                    }
                },
                () = &mut deadline => {
                    tracing::warn!("{} did not end within {} s: it is killed", self.name, self.grace.as_secs());
                    killed = true;
                    signal(child, Signal::SIGKILL);
                    deadline.as_mut().reset(Instant::now() + forever);
                }
            }
        }
    }
}

enum Life {
    /// By itself; how.
    Ended(String),
    /// Because we said so.
    Stopped { killed: bool },
}

impl Kept {
    /// The program's name.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Has it read its configuration again.
    pub(crate) fn hangup(&self) {
        let _ = self.orders.send(Order::Hangup);
    }

    /// Kills it, for it hangs; it is started again.
    pub(crate) fn kill_hung(&self) {
        let _ = self.orders.send(Order::Hung);
    }

    /// Resolves when the service ends by itself for the first time; how it ended.
    pub(crate) async fn ends_too_soon(&self) -> String {
        let mut first_end = self.first_end.clone();
        let how = match first_end.wait_for(Option::is_some).await {
            Ok(how) => how.clone(),
            Err(_) => None,
        };
        format!("{} {}", self.name, how.unwrap_or_default())
    }

    /// Ends it: SIGTERM, then SIGKILL when its time is over or `hurry` resolves. Returns whether it was killed.
    pub(crate) async fn stop(mut self, hurry: impl Future<Output = ()>) -> bool {
        tracing::debug!("{} is asked to end", self.name);
        let _ = self.orders.send(Order::Stop);
        tokio::select! {
            killed = &mut self.task => return killed.unwrap_or(true),
            () = hurry => {}
        }
        let _ = self.orders.send(Order::Kill);
        self.task.await.unwrap_or(true)
    }
}

/// Signals a child that has not been waited for, so that its pid cannot be anybody else's.
fn signal(child: &Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

fn describe(status: io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => format!("ended ({status})"),
        Err(error) => format!("was lost: {error}"),
    }
}
