//! Reaching the launcher of a state folder.

use std::time::Duration;

use launcher_client::{
    Client, ClientError,
    paths::StateDir,
    wire::{Reply, Request, Status},
};

use crate::{cli::Global, failure::Failure};

/// How long one question that should be answered at once may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connects to the launcher.
pub(crate) async fn connect(global: &Global) -> Result<Client, Failure> {
    Ok(Client::connect(&StateDir::new(&global.state).launcher_socket()).await?)
}

/// Asks for a finite list; each reply goes through `pick`.
pub(crate) async fn list<T: Send>(
    client: &Client,
    request: Request,
    pick: impl Fn(Reply) -> Option<T> + Send + Sync,
) -> Result<Vec<T>, Failure> {
    let mut found = Vec::new();
    let asking = client.stream(request, |reply| {
        found.extend(pick(reply));
        true
    });
    let answered = tokio::time::timeout(PATIENCE, asking).await;
    answered.map_err(|_| slow())??;
    Ok(found)
}

/// All lines of `ps`.
pub(crate) async fn statuses(client: &Client, app: Option<cmdb::AppName>) -> Result<Vec<Status>, Failure> {
    list(client, Request::Ps { app }, |reply| match reply {
        Reply::Status(status) => Some(*status),
        _ => None,
    })
    .await
}

/// Asks for one thing that the launcher knows at once.
pub(crate) async fn ask(client: &Client, request: Request) -> Result<Reply, Failure> {
    let answered: Result<_, ClientError> =
        tokio::time::timeout(PATIENCE, client.ask(request)).await.map_err(|_| slow())?;
    Ok(answered?.0)
}

fn slow() -> Failure {
    Failure::NotRunning(format!("the launcher did not answer within {} s", PATIENCE.as_secs()))
}
