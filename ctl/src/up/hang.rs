//! Whether the launcher still answers. One that hangs without dying would hold up every cold app until somebody looks: it is
//! killed, and started again as after any other end; running apps go on.

use std::{path::Path, time::Duration};

use launcher_client::{Client, wire::Request};
use tokio::time::{sleep, timeout};

use super::service::Kept;

const EVERY: Duration = Duration::from_secs(5);
/// Ten times what the busiest launcher has ever taken for so small a question.
const PATIENCE: Duration = Duration::from_secs(10);
/// Once more, and shortly: perhaps all of us were stopped, and this process was the first to go on.
const AGAIN: Duration = Duration::from_secs(3);

/// Looks after it for ever.
pub(super) async fn watch(socket: &Path, launcher: &Kept) {
    loop {
        sleep(EVERY).await;
        if hangs(socket, PATIENCE).await && hangs(socket, AGAIN).await {
            tracing::error!(
                "{} has not answered for {} s: it is killed",
                launcher.name(),
                PATIENCE.as_secs()
            );
            launcher.kill_hung();
        }
    }
}

/// Whether it takes a question and does not answer it. One that is not there, or ends meanwhile, does not hang.
async fn hangs(socket: &Path, patience: Duration) -> bool {
    let asked = async {
        if let Ok(client) = Client::connect(socket).await {
            drop(client.ask(Request::Nodes).await);
        }
    };
    timeout(patience, asked).await.is_err()
}
