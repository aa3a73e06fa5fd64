//! The answers to what peers ask.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use cmdb::{AppName, Change, Generation, Origin, StoreError};
use launcher_client::{
    usage::Span,
    wire::{Event, MAX_FDS, Refusal, RefusalCode, Reply, Request, Status},
};
use tokio::sync::{
    broadcast::{self, error::RecvError},
    oneshot,
};

use super::Peer;
use crate::supervisor::{Awake, Limits, Message};

/// Bytes of text in a packet; JSON may need two for one.
const TEXT_PIECE: usize = launcher_client::wire::MAX_PACKET / 4;
/// How often it is looked at whether other hosts have done their part.
const LOOK: Duration = Duration::from_millis(50);

impl Peer {
    /// Answers one request; replies go out as they come about.
    pub(super) async fn answer(&self, id: u64, request: Request) {
        let answer = match request {
            Request::Wake { app, sockets } => self.wake(&app, sockets).await,
            Request::Sockets { app, generation, count } => self.sockets(&app, generation, count).await,
            Request::Watch { serving } => return self.watch(id, serving).await,
            Request::PutApp { app, take_over } => self.put_app(*app, take_over).await.map(without_fds),
            Request::RemoveApp { app, origin } => {
                self.remove_app(&app, origin.as_ref()).await.map(without_fds)
            }
            Request::Apply { app, transition } => match self.host.store.apply(&app, transition).await {
                Ok((outcome, record)) => Ok(without_fds(Reply::Applied { outcome, record })),
                Err(error) => Err(store_refusal(&error)),
            },
            Request::Nodes => Ok(without_fds(Reply::Nodes { nodes: self.host.store.nodes() })),
            Request::Drain { node, draining } => match self.host.store.set_draining(&node, draining).await {
                Ok(()) => Ok(without_fds(Reply::Done)),
                Err(error) => Err(store_refusal(&error)),
            },
            Request::Forget { node } => match self.host.store.forget_node(&node).await {
                Ok(()) => Ok(without_fds(Reply::Done)),
                Err(error) => Err(store_refusal(&error)),
            },
            Request::Images => self.images(id).await.map(without_fds),
            Request::Ps { app } => self.ps(id, app).await.map(without_fds),
            Request::Events { since, follow } => return self.events(id, since, follow).await,
            Request::Logs { app, lines } => self.logs(id, &app, lines).await.map(without_fds),
            Request::Stop { app } => self.stop(&app).await.map(without_fds),
            Request::Restart { app } => self.restart(&app).map(without_fds),
            Request::Limit { app, cpu, memory, pids, reset } => {
                let order = |reply| Message::Limit(Limits { cpu, memory, pids, reset }, reply);
                self.order(&app, order).await.map(without_fds)
            }
            Request::Scale { app, order } => {
                self.order(&app, |reply| Message::Scale(order, reply)).await.map(without_fds)
            }
            Request::Metrics => self.metrics(id).await.map(without_fds),
            Request::WakeTiming { app, generation } => self.timing(&app, generation).await.map(without_fds),
            Request::Signal { app, signal } => self.signal(&app, signal).await.map(without_fds),
            Request::Usage { since_unix_s, by, app } => {
                self.usage(id, since_unix_s, by, app).await.map(without_fds)
            }
            // Dealt with by `take_note`.
            Request::FirstByte { .. }
            | Request::Traffic { .. }
            | Request::Report { .. }
            | Request::Quiesced { .. }
            | Request::Suspect { .. }
            | Request::Unreachable { .. }
            | Request::Note { .. } => return,
        };
        // A peer that has gone needs no answer.
        let _ = match answer {
            Ok((reply, fds)) => self.reply(id, reply, fds).await,
            Err(refusal) => self.reply(id, Reply::Error(refusal), Vec::new()).await,
        };
    }

    async fn wake(&self, app: &AppName, sockets: u32) -> Result<(Reply, Vec<OwnedFd>), Refusal> {
        let (reply, answer) = oneshot::channel();
        self.ask(app, Message::Wake(reply))?;
        let answer = answer.await.unwrap_or_else(|_| Err(gone(app)));
        self.host.metrics.woken(answer.as_ref().map(|awake| awake.timing.warm));
        let Awake { live, timing } = answer?;
        let sockets = live.sockets.take(count(sockets)).await.map_err(|e| no_sockets(&e))?;
        Ok((Reply::Woken { generation: live.id.generation, port: live.port, timing }, sockets))
    }

    async fn sockets(
        &self,
        app: &AppName,
        generation: Generation,
        wanted: u32,
    ) -> Result<(Reply, Vec<OwnedFd>), Refusal> {
        let Some(live) = self.host.live(app, generation) else {
            let message = format!("{app}.{generation} does not run");
            return Err(Refusal::new(RefusalCode::UnknownInstance, message));
        };
        let sockets = live.sockets.take(count(wanted)).await.map_err(|e| no_sockets(&e))?;
        Ok((Reply::Sockets { count: u32::try_from(sockets.len()).unwrap_or(0) }, sockets))
    }

    async fn watch(&self, id: u64, serving: bool) {
        // Counted before the watch begins: a drain that starts in between waits for this proxy, which then sees it.
        if serving {
            let watcher = *self.watcher.get_or_init(|| self.host.watchers.add());
            for supervisor in self.host.supervisors() {
                let _ = supervisor.send(Message::WatcherCame(watcher));
            }
        }
        let mut changes = match self.host.store.watch().await {
            Ok(changes) => changes,
            Err(error) => {
                let _ = self.reply(id, Reply::Error(store_refusal(&error)), Vec::new()).await;
                return;
            }
        };
        loop {
            let change = tokio::select! {
                change = changes.recv() => change,
                () = self.out.closed() => return,
            };
            let reply = match change {
                Some(Change::Put { app, record }) => Reply::Put { app, record },
                Some(Change::Removed(app)) => Reply::Removed { app },
                Some(Change::Nodes(nodes)) => Reply::Nodes { nodes },
                Some(Change::Synced) => Reply::Synced,
                None => Reply::Error(Refusal::new(
                    RefusalCode::Busy,
                    "the watch fell too far behind; begin again",
                )),
            };
            let last = matches!(reply, Reply::Error(_));
            if self.reply(id, reply, Vec::new()).await.is_err() || last {
                return;
            }
        }
    }

    /// What follows from it is done by whoever follows the CMDB, on this host and others.
    async fn put_app(&self, app: cmdb::App, take_over: bool) -> Result<Reply, Refusal> {
        if let Some((known, _)) = self.host.store.get(&app.name).filter(|_| !take_over)
            && !known.origin.yields_to(&app.origin)
        {
            // The same files on several hosts: all of them may say the same.
            return if known.says_the_same(&app) { Ok(Reply::Done) } else { Err(not_yours(&known)) };
        }
        self.host.store.put_app(app).await.map_err(|e| store_refusal(&e))?;
        Ok(Reply::Done)
    }

    async fn remove_app(&self, app: &AppName, origin: Option<&Origin>) -> Result<Reply, Refusal> {
        if let Some((known, _)) = self.host.store.get(app)
            && origin.is_some_and(|origin| !known.origin.yields_to(origin))
        {
            return Err(not_yours(&known));
        }
        // The supervisor drains through the store, so it must hear of it while the app is still there: proxies then
        // see the instances drain, and only then the app go.
        if let Some(supervisor) = self.host.running_supervisor(app) {
            let _ = supervisor.send(Message::Removed);
            let (reply, drained) = oneshot::channel();
            let _ = supervisor.send(Message::Status(reply));
            let _ = drained.await;
        }
        self.host.store.remove_app(app).await.map_err(|e| store_refusal(&e))?;
        Ok(Reply::Done)
    }

    async fn ps(&self, id: u64, only: Option<AppName>) -> Result<Reply, Refusal> {
        let apps = self.host.store.list();
        if let Some(app) = only.as_ref().filter(|app| !apps.iter().any(|(a, _)| a.name == **app)) {
            return Err(unknown(app));
        }
        for (app, record) in apps {
            if only.as_ref().is_some_and(|only| *only != app.name) {
                continue;
            }
            let lines = match self.host.running_supervisor(&app.name) {
                Some(supervisor) => {
                    let (reply, lines) = oneshot::channel();
                    let _ = supervisor.send(Message::Status(reply));
                    lines.await.unwrap_or_default()
                }
                None => vec![crate::supervisor::absent(&app, Some(&record))],
            };
            let lines = self.with_others(lines, &app, &record);
            let overrides = self.host.overrides.of(&app.name).words();
            for line in lines {
                let line = Status { overrides: overrides.clone(), ..line };
                self.send(id, Reply::Status(Box::new(line))).await?;
            }
        }
        Ok(Reply::End)
    }

    /// What runs on other hosts, as far as the CMDB knows it, takes the place of a line that says that nothing runs here.
    fn with_others(&self, mut lines: Vec<Status>, app: &cmdb::App, record: &cmdb::AppRecord) -> Vec<Status> {
        if !self.host.several {
            return lines;
        }
        for line in lines.iter_mut().filter(|line| line.generation.is_some()) {
            line.node.clone_from(&self.host.node);
        }
        let others = record.instances.values().filter(|instance| instance.node != self.host.node);
        let others: Vec<Status> = others
            .map(|instance| Status {
                node: instance.node.clone(),
                generation: Some(instance.generation),
                state: instance.state.as_str().to_owned(),
                reason: String::new(),
                age_ms: Some(crate::clock::unix_ms().saturating_sub(instance.since_ms)),
                ..crate::supervisor::absent(app, None)
            })
            .collect();
        if !others.is_empty() {
            lines.retain(|line| line.generation.is_some());
        }
        lines.extend(others);
        lines
    }

    async fn images(&self, id: u64) -> Result<Reply, Refusal> {
        let host = Arc::clone(&self.host);
        // Sizes may have to be counted, file by file.
        let images = tokio::task::spawn_blocking(move || crate::preparation::statuses(&host)).await;
        for image in images.unwrap_or_default() {
            self.send(id, Reply::Image(image)).await?;
        }
        Ok(Reply::End)
    }

    /// In pieces of whole lines that fit into packets.
    async fn metrics(&self, id: u64) -> Result<Reply, Refusal> {
        let text = crate::metrics::scrape(&self.host).await;
        let mut piece = String::new();
        for line in text.split_inclusive('\n') {
            if piece.len() + line.len() > TEXT_PIECE {
                self.send(id, Reply::Text(std::mem::take(&mut piece))).await?;
            }
            piece.push_str(line);
        }
        self.send(id, Reply::Text(piece)).await?;
        Ok(Reply::End)
    }

    async fn events(&self, id: u64, since: u64, follow: bool) {
        let (kept, live) = self.host.events.since(since);
        for event in kept {
            if self.reply(id, Reply::Event(event), Vec::new()).await.is_err() {
                return;
            }
        }
        if follow {
            self.follow_events(id, live).await;
        }
        let _ = self.reply(id, Reply::End, Vec::new()).await;
    }

    /// Until the peer goes. One that lags misses some: their numbers tell.
    async fn follow_events(&self, id: u64, mut live: broadcast::Receiver<Event>) {
        loop {
            let event = tokio::select! {
                event = live.recv() => event,
                () = self.out.closed() => return,
            };
            match event {
                Ok(event) => {
                    if self.reply(id, Reply::Event(event), Vec::new()).await.is_err() {
                        return;
                    }
                }
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            }
        }
    }

    async fn logs(&self, id: u64, app: &AppName, lines: u32) -> Result<Reply, Refusal> {
        let Some(supervisor) = self.host.running_supervisor(app) else {
            // Configured but never started: no output, and no error either.
            return if self.host.store.get(app).is_some() { Ok(Reply::End) } else { Err(unknown(app)) };
        };
        let (reply, kept) = oneshot::channel();
        let _ = supervisor.send(Message::Logs(count_lines(lines), reply));
        for line in kept.await.unwrap_or_default() {
            self.send(id, Reply::Log(line)).await?;
        }
        Ok(Reply::End)
    }

    async fn stop(&self, app: &AppName) -> Result<Reply, Refusal> {
        if self.host.store.get(app).is_none() {
            return Err(unknown(app));
        }
        if let Some(supervisor) = self.host.running_supervisor(app) {
            let (reply, done) = oneshot::channel();
            let _ = supervisor.send(Message::Stop(reply));
            // A supervisor that ended meanwhile has no instances left.
            let _ = done.await;
        }
        if self.host.several {
            self.stop_elsewhere(app).await?;
        }
        Ok(Reply::Done)
    }

    /// The launchers of other hosts see in the CMDB what has to go.
    async fn stop_elsewhere(&self, app: &AppName) -> Result<(), Refusal> {
        let others = || -> Vec<Generation> {
            let lost = self.host.lost();
            let record = self.host.store.get(app).map(|(_, record)| record).unwrap_or_default();
            let others = record.instances.values();
            let others = others.filter(|i| i.node != self.host.node && !lost.contains(&i.node));
            others.map(|instance| instance.generation).collect()
        };
        let told = others();
        for generation in &told {
            let transition = cmdb::Transition::Drain { generation: *generation };
            self.host.store.apply(app, transition).await.map_err(|error| store_refusal(&error))?;
        }
        while others().iter().any(|generation| told.contains(generation)) {
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    fn restart(&self, app: &AppName) -> Result<Reply, Refusal> {
        let Some((_, record)) = self.host.store.get(app) else { return Err(unknown(app)) };
        let mut nodes = record.instances.values().map(|instance| instance.node.as_str());
        if nodes.clone().all(|node| node != self.host.node)
            && let Some(node) = nodes.next()
        {
            let message = format!("{app} runs on {node}: give the command there");
            let elsewhere = Some(node.to_owned());
            return Err(Refusal { elsewhere, ..Refusal::new(RefusalCode::Elsewhere, message) });
        }
        if let Some(supervisor) = self.host.running_supervisor(app) {
            let _ = supervisor.send(Message::Restart);
        }
        Ok(Reply::Done)
    }

    async fn order(
        &self,
        app: &AppName,
        order: impl FnOnce(oneshot::Sender<Result<(), Refusal>>) -> Message,
    ) -> Result<Reply, Refusal> {
        let (reply, done) = oneshot::channel();
        self.ask(app, order(reply))?;
        done.await.unwrap_or_else(|_| Err(gone(app)))?;
        Ok(Reply::Done)
    }

    async fn timing(&self, app: &AppName, generation: Generation) -> Result<Reply, Refusal> {
        let not_known = || {
            Refusal::new(
                RefusalCode::UnknownInstance,
                format!("nothing is known of {app}.{generation} any more"),
            )
        };
        let supervisor = self.host.running_supervisor(app).ok_or_else(not_known)?;
        let (reply, timing) = oneshot::channel();
        let _ = supervisor.send(Message::Timing(generation, reply));
        timing.await.ok().flatten().map(Reply::WakeTiming).ok_or_else(not_known)
    }

    async fn signal(&self, app: &AppName, signal: String) -> Result<Reply, Refusal> {
        let (reply, begun) = oneshot::channel();
        self.ask(app, Message::Signal(signal, reply))?;
        match begun.await.unwrap_or_else(|_| Err(gone(app)))? {
            0 => {
                let message =
                    format!("no instance of {app} is ready, so there is nothing to run its hooks for");
                Err(Refusal::new(RefusalCode::UnknownInstance, message))
            }
            _ => Ok(Reply::Done),
        }
    }

    async fn usage(
        &self,
        id: u64,
        since_unix_s: u64,
        by: Span,
        app: Option<AppName>,
    ) -> Result<Reply, Refusal> {
        let lines = self.host.ledger.read(since_unix_s, by, app).await;
        for line in lines.map_err(|error| Refusal::new(RefusalCode::Internal, error))? {
            self.send(id, Reply::Usage(line)).await?;
        }
        Ok(Reply::End)
    }

    fn ask(&self, app: &AppName, message: Message) -> Result<(), Refusal> {
        self.host.supervisor(app)?.send(message).map_err(|_| gone(app))
    }

    async fn send(&self, id: u64, reply: Reply) -> Result<(), Refusal> {
        self.reply(id, reply, Vec::new())
            .await
            .map_err(|()| Refusal::new(RefusalCode::Busy, "the peer has gone"))
    }
}

fn without_fds(reply: Reply) -> (Reply, Vec<OwnedFd>) {
    (reply, Vec::new())
}

fn count(wanted: u32) -> usize {
    usize::try_from(wanted).unwrap_or(MAX_FDS).min(MAX_FDS)
}

fn count_lines(wanted: u32) -> usize {
    usize::try_from(wanted).unwrap_or(usize::MAX)
}

fn no_sockets(error: &std::io::Error) -> Refusal {
    Refusal::new(
        RefusalCode::Internal,
        format!("no sockets could be made in the instance's network: {error}"),
    )
}

fn unknown(app: &AppName) -> Refusal {
    Refusal::new(RefusalCode::UnknownApp, format!("no app is called \"{app}\""))
}

fn not_yours(app: &cmdb::App) -> Refusal {
    let message = format!(
        "the app \"{}\" is configured by {} already; change or remove it there, or give this one another name",
        app.name, app.origin
    );
    Refusal::new(RefusalCode::Conflict, message)
}

fn gone(app: &AppName) -> Refusal {
    Refusal::new(RefusalCode::Busy, format!("{app} is ending"))
}

fn store_refusal(error: &StoreError) -> Refusal {
    let code = match error {
        StoreError::UnknownApp(_) => RefusalCode::UnknownApp,
        StoreError::OneHost | StoreError::UnknownNode(_) | StoreError::NodeAlive(_) => {
            RefusalCode::BadRequest
        }
        StoreError::DuplicateName { .. } => RefusalCode::Conflict,
        StoreError::Unavailable(_) | StoreError::Corrupt { .. } | StoreError::NodeTwice(_) => {
            RefusalCode::Internal
        }
    };
    Refusal::new(code, error.to_string())
}
