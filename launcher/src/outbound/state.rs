//! What is known of the network, in memory and, for the daemon that comes after this one, in a file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cmdb::AppName;
use cmdb::network::Network;
use serde::{Deserialize, Serialize};

use super::NetworkError;
use super::forwarding::Opened;
use super::names::Addresses;
use super::pool::Nets;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The host's part; `None` while no app needs it.
    pub(super) base: Option<Base>,
    /// The rules of each app that has some.
    pub(super) policies: BTreeMap<AppName, Policy>,
    /// What an earlier daemon had, until it is gone on with.
    pub(super) saved: Option<SavedBase>,
    last_group: u32,
}

/// What the host was told.
#[derive(Debug)]
pub(super) struct Base {
    pub(super) nets: Nets,
    pub(super) opened: Opened,
    /// Largest packet of the containers' links.
    pub(super) mtu: u32,
}

/// One app's rules.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Policy {
    /// The device group of its links.
    pub(super) group: u32,
    pub(super) network: Network,
    /// The addresses of its names, as last looked up.
    pub(super) addresses: Addresses,
    /// Names whose last look-up failed.
    #[serde(skip)]
    pub(super) failing: BTreeSet<String>,
    /// Refused destinations that were told.
    #[serde(skip)]
    pub(super) told: BTreeSet<String>,
}

/// The host's part, as saved.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(super) struct SavedBase {
    pub(super) nets: Option<Nets>,
    pub(super) opened: Opened,
}

/// The file's content.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Saved {
    base: SavedBase,
    policies: BTreeMap<AppName, Policy>,
    last_group: u32,
}

impl Policy {
    pub(super) fn new(group: u32, network: Network) -> Policy {
        let (addresses, failing, told) = Default::default();
        Policy { group, network, addresses, failing, told }
    }
}

impl State {
    /// A number for an app's rules; never one that was another's, whose links may still be there.
    pub(super) fn new_group(&mut self) -> u32 {
        // 0 is the kernel's default group, in which all other interfaces are.
        self.last_group = self.last_group.wrapping_add(1).max(1);
        self.last_group
    }

    pub(super) fn resume(&mut self, saved: Saved) {
        self.saved = Some(saved.base);
        self.policies = saved.policies;
        self.last_group = saved.last_group;
    }

    pub(super) fn save(&self, folder: &Path) -> Result<(), NetworkError> {
        let Some(base) = &self.base else { return Ok(()) };
        let saved = Saved {
            base: SavedBase { nets: Some(base.nets), opened: base.opened.clone() },
            policies: self.policies.clone(),
            last_group: self.last_group,
        };
        let path = file(folder);
        let written = fs::create_dir_all(folder.join("hosts")).and_then(|()| {
            let new = path.with_extension("new");
            fs::write(&new, serde_json::to_vec(&saved)?)?;
            fs::rename(&new, &path)
        });
        written.map_err(|error| NetworkError::State { path, error })
    }
}

/// What an earlier daemon saved; `None` if it had no network, or ended in order.
pub(super) fn load(folder: &Path) -> io::Result<Option<Saved>> {
    match fs::read(file(folder)) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Nothing is left to go on with.
pub(super) fn remove(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, folder = %folder.display(), "cannot be removed");
    }
}

/// The hosts file of an app, as its containers see it.
pub(super) fn hosts_path(folder: &Path, app: &AppName) -> PathBuf {
    folder.join("hosts").join(app.as_str())
}

fn file(folder: &Path) -> PathBuf {
    folder.join("network.json")
}
