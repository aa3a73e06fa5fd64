//! The launcher as this program sees it: one connection, and what the CMDB holds, kept fresh by a watch.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cmdb::{App, AppName, Change};
use launcher_client::{Client, ClientError, paths::StateDir};
use tokio::{sync::watch, time::sleep};

const RECONNECT_FIRST: Duration = Duration::from_millis(50);
const RECONNECT_MOST: Duration = Duration::from_secs(2);

/// See the module. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    /// `None` while the launcher is away, or has not told all yet.
    connected: watch::Receiver<Option<Connected>>,
}

/// A connection whose watch has told all that was there when it began.
#[derive(Clone, Debug)]
pub(crate) struct Connected {
    pub(crate) client: Client,
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    apps: BTreeMap<AppName, Arc<App>>,
}

impl Link {
    /// Begins to follow the launcher of a state folder. Must be called in a runtime.
    pub(crate) fn open(state: &StateDir) -> Self {
        let (sender, connected) = watch::channel(None);
        tokio::spawn(follow(state.clone(), sender));
        Self { connected }
    }

    /// The connection, if there is one now.
    pub(crate) fn now(&self) -> Option<Connected> {
        self.connected.borrow().clone()
    }

    /// Waits for a connection.
    pub(crate) async fn connected(&self) -> Connected {
        let mut connected = self.connected.clone();
        loop {
            match connected.wait_for(Option::is_some).await.map(|found| found.clone()) {
                Ok(Some(found)) => return found,
                // The task that follows never ends while the runtime lives.
                Ok(None) | Err(_) => sleep(RECONNECT_MOST).await,
            }
        }
    }
}

impl Connected {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn app(&self, name: &AppName) -> Option<Arc<App>> {
        self.lock().apps.get(name).cloned()
    }

    /// Every app, by name.
    pub(crate) fn apps(&self) -> BTreeMap<AppName, Arc<App>> {
        self.lock().apps.clone()
    }

    /// Puts an app in place; who asks next sees it, though the watch may not have told of it yet.
    pub(crate) async fn put(&self, app: App, take_over: bool) -> Result<(), ClientError> {
        let request = launcher_client::wire::Request::PutApp { app: Box::new(app.clone()), take_over };
        self.client.done(request).await?;
        let mut known = self.lock();
        // One of another origin that says the same was left as it is.
        if take_over || known.apps.get(&app.name).is_none_or(|old| !old.says_the_same(&app)) {
            known.apps.insert(app.name.clone(), Arc::new(app));
        }
        Ok(())
    }

    /// Removes an app; without an origin, whoever configured it.
    pub(crate) async fn remove(
        &self,
        name: &AppName,
        origin: Option<cmdb::Origin>,
    ) -> Result<(), ClientError> {
        self.client.done(launcher_client::wire::Request::RemoveApp { app: name.clone(), origin }).await?;
        self.lock().apps.remove(name);
        Ok(())
    }
}

async fn follow(state: StateDir, sender: watch::Sender<Option<Connected>>) {
    let mut pause = RECONNECT_FIRST;
    loop {
        match follow_one(&state, &sender).await {
            Ok(()) => pause = RECONNECT_FIRST,
            Err(error) => {
                tracing::debug!(%error, "the launcher cannot be reached");
                sleep(pause).await;
                pause = (pause * 2).min(RECONNECT_MOST);
            }
        }
        sender.send_replace(None);
    }
}

/// One connection, until it ends.
async fn follow_one(state: &StateDir, sender: &watch::Sender<Option<Connected>>) -> Result<(), ClientError> {
    let client = Client::connect(&state.launcher_socket()).await?;
    let mut changes = client.watch(false).await?;
    let connected = Connected { client, known: Arc::default() };
    while let Some(change) = changes.recv().await {
        match change {
            Change::Put { app, .. } => drop(connected.lock().apps.insert(app.name.clone(), app)),
            Change::Removed(name) => drop(connected.lock().apps.remove(&name)),
            Change::Nodes(_) => {}
            Change::Synced => drop(sender.send_replace(Some(connected.clone()))),
        }
    }
    if sender.borrow().is_some() { Ok(()) } else { Err(ClientError::Closed) }
}
