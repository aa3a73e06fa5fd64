//! Going on with a container that an earlier daemon started.

use std::{os::fd::OwnedFd, sync::Arc};

use cmdb::{App, fingerprint::fnv1a};
use nix::libc::SIGTERM;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{End, Launch, Made};
use crate::{image::Lease, outbound::LinkPlan, output::Capture, trace::Trace};

/// What a daemon writes on a container, to be read by the next one should it die.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Tag {
    /// First id of its user namespace's range.
    pub id_base: u32,
    /// What it runs, see [`crate::image::Layers::id`].
    pub image: String,
    /// When the daemon began to start it, µs since the Unix epoch.
    pub begun_us: u64,
    /// Fingerprint of what it was told to run, see [`fingerprint`].
    pub runs: u64,
    /// The signal that asks it to end.
    #[serde(default = "sigterm")]
    pub stop_signal: i32,
    /// Its network link, if it may connect out.
    #[serde(default)]
    pub link: Option<LinkPlan>,
}

fn sigterm() -> i32 {
    SIGTERM
}

/// A container that an earlier daemon started and that listens.
#[derive(Debug)]
pub struct Adoption {
    /// Its first process.
    pub pid: i32,
    /// The same.
    pub pidfd: OwnedFd,
    /// Where it listens.
    pub port: u16,
    /// The read ends of its standard output and error.
    pub outputs: Vec<OwnedFd>,
    /// What the earlier daemon wrote on it.
    pub tag: Tag,
    /// Dropped when it is supervised again, or is not to be.
    pub under_way: Option<oneshot::Sender<()>>,
    /// Keeps its image, from before anything looks for images that nobody uses.
    pub image: Option<Lease>,
}

/// Tells apart what apps are told to run: a fingerprint of the configuration of container, volumes and network.
#[must_use]
pub fn fingerprint(app: &App) -> u64 {
    // Plain data cannot fail to be written.
    let text = serde_json::to_vec(&(&app.container, &app.volumes, &app.network)).unwrap_or_default();
    fnv1a(&text)
}

impl Launch {
    /// Picks up everything of a container that runs already.
    pub(super) async fn take_over(
        &self,
        adoption: Adoption,
        captures: &mut Vec<Capture>,
    ) -> Result<Made, End> {
        let group = self.host.cgroups.open(&self.container()).map_err(|e| self.cannot(&e))?;
        // It may have been asleep when its daemon died; the next idle time freezes it again.
        group.thaw().map_err(|e| self.cannot(&e))?;
        // Its memory may have been on its way to swap when its daemon died; the worker has died with it.
        if let Err(error) = group.allow_swap(false) {
            tracing::warn!(container = group.name(), %error, "an adopted instance may go on using swap");
        }
        let sockets = self.host.netns.open(adoption.pidfd).await.map_err(|e| self.cannot(&e))?;
        for (stream, read) in ["stdout", "stderr"].into_iter().zip(adoption.outputs) {
            captures.push(self.output.resume(self.generation, stream, read).map_err(|e| self.cannot(&e))?);
        }
        Ok(Made {
            pid: adoption.pid,
            group: Arc::new(group),
            sockets,
            trace: Trace::of_earlier(adoption.tag.begun_us),
            _link: adoption.tag.link.map(|plan| self.host.outbound.adopt(plan)),
            _image: adoption.image.unwrap_or_else(|| self.host.images.lease(&adoption.tag.image)),
            port: Some(adoption.port),
            stop_signal: adoption.tag.stop_signal,
            listens: Some(adoption.port),
        })
    }
}
