//! Whom a command speaks with: the launcher of this host, or the API of any.

use cmdb::{AppName, Generation, compute::Nodes};
use launcher_client::{
    Client,
    wire::{Event, Reply, Request, Status, WakeTiming},
};
use reqwest::Method;
use serde::Deserialize;

use crate::{
    cli::{Global, api::Remote},
    failure::Failure,
    launcher,
    remote::Api,
};

/// See the module.
#[derive(Debug)]
pub(crate) enum Target {
    /// The launcher of the state folder.
    Launcher(Client),
    /// An API.
    Api(Box<Api>),
}

/// An instance that is ready.
#[derive(Debug, Deserialize)]
pub(crate) struct Woken {
    pub(crate) generation: Generation,
    pub(crate) port: u16,
    pub(crate) timing: WakeTiming,
}

impl Target {
    /// The one that the command line asks for.
    pub(crate) async fn reach(global: &Global, remote: &Remote) -> Result<Self, Failure> {
        Ok(match Api::asked_for(remote)? {
            Some(api) => Self::Api(Box::new(api)),
            None => Self::Launcher(launcher::connect(global).await?),
        })
    }

    /// Asks for a finite list; each reply goes through `pick`.
    pub(crate) async fn list<T: Send>(
        &self,
        request: Request,
        pick: impl Fn(Reply) -> Option<T> + Send + Sync,
    ) -> Result<Vec<T>, Failure> {
        match self {
            Self::Launcher(client) => launcher::list(client, request, pick).await,
            Self::Api(api) => Ok(api.list(request).await?.into_iter().filter_map(pick).collect()),
        }
    }

    /// All lines of `ps`.
    pub(crate) async fn statuses(&self, app: Option<AppName>) -> Result<Vec<Status>, Failure> {
        self.list(Request::Ps { app }, |reply| match reply {
            Reply::Status(status) => Some(*status),
            _ => None,
        })
        .await
    }

    /// Has something done.
    pub(crate) async fn done(&self, request: Request) -> Result<(), Failure> {
        match self {
            Self::Launcher(client) => Ok(client.done(request).await?),
            Self::Api(api) => api.done(request).await,
        }
    }

    /// Has an instance of the app ready.
    pub(crate) async fn wake(&self, app: &AppName) -> Result<Woken, Failure> {
        match self {
            Self::Launcher(client) => {
                let woken = client.wake(app, 0).await?;
                Ok(Woken { generation: woken.generation, port: woken.port, timing: woken.timing })
            }
            Self::Api(api) => api.json(Method::POST, &format!("/v1/apps/{app}/wake"), &[], None).await,
        }
    }

    /// The hosts.
    pub(crate) async fn nodes(&self) -> Result<Nodes, Failure> {
        match self {
            Self::Launcher(client) => match launcher::ask(client, Request::Nodes).await? {
                Reply::Nodes { nodes } => Ok(nodes),
                other => Err(Failure::failed(format!("the launcher gave an unexpected answer: {other:?}"))),
            },
            Self::Api(api) => api.json(Method::GET, "/v1/hosts", &[], None).await,
        }
    }

    /// Has a host emptied, or not any more.
    pub(crate) async fn drain(&self, node: &str, draining: bool) -> Result<(), Failure> {
        match self {
            Self::Launcher(client) => {
                Ok(client.done(Request::Drain { node: node.to_owned(), draining }).await?)
            }
            Self::Api(api) => {
                let path = format!("/v1/hosts/{node}/{}", if draining { "drain" } else { "uncordon" });
                api.json(Method::POST, &path, &[], None).await.map(|_: serde_json::Value| ())
            }
        }
    }

    /// Has a host that is gone for good forgotten.
    pub(crate) async fn forget(&self, node: &str) -> Result<(), Failure> {
        match self {
            Self::Launcher(client) => Ok(client.done(Request::Forget { node: node.to_owned() }).await?),
            Self::Api(api) => {
                let path = format!("/v1/hosts/{node}");
                api.json(Method::DELETE, &path, &[], None).await.map(|_: serde_json::Value| ())
            }
        }
    }

    /// The events after `since`, and with `follow` those that come, until `each` says `false`.
    pub(crate) async fn events(
        &self,
        since: u64,
        follow: bool,
        mut each: impl FnMut(Event) -> bool + Send,
    ) -> Result<(), Failure> {
        let request = Request::Events { since, follow };
        match self {
            Self::Launcher(client) => {
                let asked = client.stream(request, |reply| match reply {
                    Reply::Event(event) => each(event),
                    _ => true,
                });
                Ok(asked.await?)
            }
            Self::Api(api) if follow => api.follow(since, each).await,
            Self::Api(api) => {
                let events = api.list(request).await?.into_iter();
                let _ = events
                    .take_while(|reply| match reply {
                        Reply::Event(event) => each(event.clone()),
                        _ => true,
                    })
                    .count();
                Ok(())
            }
        }
    }
}
