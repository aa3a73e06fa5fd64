//! Forwarding: the kernel passes packets on only where it is told to. Switched on for each interface alone, never for the
//! whole host.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Interfaces on which this launcher switched forwarding on; kept over a restart, so that the end can undo it.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Opened {
    pub(super) v4: BTreeSet<String>,
    pub(super) v6: BTreeSet<String>,
}

/// Whether this host can forward IPv6 without changing what it is: since Linux 6.17 an interface can be told alone. To
/// switch it on for all makes the host a router, which forgets the default route that it has learned.
pub(super) fn can_forward_v6() -> bool {
    forwards_all("ipv6") || Path::new(&setting("ipv6", "lo", "force_forwarding")).exists()
}

/// Whether the operator, or another program, has switched forwarding on for the whole host.
pub(super) fn forwards_all(family: &str) -> bool {
    is_on(&setting(family, "all", "forwarding"))
}

/// Lets the host pass on what comes from a link.
pub(super) fn of_link(name: &str, v6: bool) -> io::Result<()> {
    switch(&setting("ipv4", name, "forwarding"), true)?;
    if v6 && !forwards_all("ipv6") {
        switch(&setting("ipv6", name, "force_forwarding"), true)?;
    }
    Ok(())
}

impl Opened {
    /// Lets the host pass on the answers that come in through these interfaces. Whether anything was changed.
    pub(super) fn open(&mut self, uplinks: &BTreeSet<String>, v6: bool) -> io::Result<bool> {
        let mut changed = false;
        for name in uplinks {
            let path = setting("ipv4", name, "forwarding");
            if !is_on(&path) {
                switch(&path, true)?;
                changed |= self.v4.insert(name.clone());
            }
            let path = setting("ipv6", name, "force_forwarding");
            if v6 && !forwards_all("ipv6") && !is_on(&path) {
                switch(&path, true)?;
                changed |= self.v6.insert(name.clone());
            }
        }
        Ok(changed)
    }

    /// Undoes what [`Opened::open`] did. An interface that is gone needs nothing.
    pub(super) fn close(&mut self) {
        for (family, name, key) in self
            .v4
            .iter()
            .map(|name| ("ipv4", name, "forwarding"))
            .chain(self.v6.iter().map(|name| ("ipv6", name, "force_forwarding")))
        {
            // Somebody who switched it on for all since then wants it on.
            if forwards_all(family) {
                continue;
            }
            if let Err(error) = switch(&setting(family, name, key), false)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, name, "forwarding cannot be switched off again");
            }
        }
        *self = Opened::default();
    }

    /// In words, for events.
    pub(super) fn describe(&self) -> String {
        let list = |names: &BTreeSet<String>| names.iter().cloned().collect::<Vec<_>>().join(", ");
        match (self.v4.is_empty(), self.v6.is_empty()) {
            (true, true) => "this host forwards already".to_owned(),
            (_, true) => format!("forwarding of IPv4 is switched on at {}", list(&self.v4)),
            _ => format!(
                "forwarding is switched on at {} (IPv4) and {} (IPv6)",
                list(&self.v4),
                list(&self.v6)
            ),
        }
    }
}

fn setting(family: &str, interface: &str, key: &str) -> String {
    format!("/proc/sys/net/{family}/conf/{interface}/{key}")
}

fn is_on(path: &str) -> bool {
    std::fs::read_to_string(path).is_ok_and(|text| text.trim() != "0")
}

fn switch(path: &str, on: bool) -> io::Result<()> {
    std::fs::write(path, if on { "1" } else { "0" })
        .map_err(|error| io::Error::new(error.kind(), format!("{path} cannot be written: {error}")))
}
