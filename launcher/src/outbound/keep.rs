//! Keeps the network as it must be: names that move, rules that somebody else has flushed, interfaces that come, refusals that
//! an operator wants to hear of.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use cmdb::{App, AppName};
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Outbound, Surroundings, host, names, nft, ruleset, state};
use crate::asyncfd::register;
use crate::host::Host;

/// How often it is looked whether everything is as it must be.
const EVERY: Duration = Duration::from_secs(5);
/// Names are looked up again with every n-th look.
const NAMES_EVERY: u32 = 2;
/// Refusals of one app that are told at a time.
const MOST_TOLD: usize = 5;

/// `NFNLGRP_NFTABLES`, as a bit mask.
const CHANGES_OF_RULES: u32 = 1 << 6;
/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELTABLE`.
const TABLE_DELETED: u16 = (10 << 8) | 2;

/// The daemon's task; never ends.
pub async fn keep(host: Arc<Host>) {
    let outbound = host.outbound.clone();
    let changes = listen().and_then(|socket| register(socket, Interest::READABLE));
    if let Err(error) = &changes {
        tracing::warn!(%error, "a flush of the packet filter will be noticed late");
    }
    let mut round = 0_u32;
    loop {
        let flushed = tokio::select! {
            () = tokio::time::sleep(EVERY) => false,
            () = deleted(changes.as_ref().ok()) => true,
        };
        let state = outbound.inner.state.lock().await;
        let idle = state.base.is_none() && state.saved.is_none();
        drop(state);
        if idle {
            continue;
        }
        outbound.restore().await;
        if flushed {
            continue;
        }
        round = round.wrapping_add(1);
        outbound.follow_uplinks().await;
        let app = |name: &AppName| host.store.get(name).map(|(app, _)| app);
        outbound.drop_removed(app).await;
        outbound.tell_refused().await;
        if round.is_multiple_of(NAMES_EVERY) {
            outbound.refresh_names().await;
        }
    }
}

impl Outbound {
    /// Puts the rules back if they are gone: `nft flush ruleset`, or a restart of the host's own firewall, takes everybody's.
    async fn restore(&self) {
        let failed = self.inner.state.lock().await.base.is_none();
        // Asked without the lock: starts wait for it.
        match nft::has_table(&self.inner.config.table).await {
            Ok(true) if !failed => return,
            Ok(_) => {}
            Err(error) => {
                return tracing::warn!(%error, "whether the network's rules are in force is not known");
            }
        }
        let mut state = self.inner.state.lock().await;
        if let Some(base) = state.base.take() {
            state.saved = Some(state::SavedBase { nets: Some(base.nets), opened: base.opened });
        }
        let message = match self.begin(&mut state).await {
            Ok(()) if failed => "the rules of the apps' network are in force now".to_owned(),
            Ok(()) => {
                "somebody has flushed the packet filter; the rules of the apps' network are in force again"
                    .to_owned()
            }
            // Told when it failed first.
            Err(error) if failed => {
                return tracing::warn!(%error, "the network's rules are still not in force");
            }
            Err(error) => {
                format!(
                    "somebody has flushed the packet filter, and its rules cannot be put back: {error}; it is tried again"
                )
            }
        };
        self.inner.events.emit("network-restored", None, None, message);
    }

    /// An interface that has come since the start must pass on answers, too.
    async fn follow_uplinks(&self) {
        let Ok(surroundings) = host(|rtnl| Surroundings::look(rtnl, &self.inner.links)) else { return };
        let mut state = self.inner.state.lock().await;
        let Some(base) = &mut state.base else { return };
        base.mtu = surroundings.mtu;
        match base.opened.open(&surroundings.uplinks, base.nets.v6.is_some()) {
            Ok(false) => {}
            Ok(true) => {
                let rules = ruleset::strangers(&self.inner.config.table, &base.opened);
                let message = base.opened.describe();
                let done = nft::apply(&rules).await.map_err(super::NetworkError::from);
                match done.and_then(|()| state.save(&self.inner.config.folder)) {
                    Ok(()) => self.inner.events.emit("network-ready", None, None, message),
                    Err(error) => self.inner.events.emit("network-failed", None, None, error.to_string()),
                }
            }
            Err(error) => tracing::warn!(%error, "an interface does not forward"),
        }
    }

    /// Apps that are no longer configured have no rules.
    async fn drop_removed(&self, app: impl Fn(&AppName) -> Option<Arc<App>>) {
        let known: Vec<AppName> = self.inner.state.lock().await.policies.keys().cloned().collect();
        for name in known {
            if app(&name).is_none_or(|app| app.network.is_closed()) {
                self.withdraw(&name).await;
            }
        }
    }

    async fn refresh_names(&self) {
        let mut names: Vec<String> = Vec::new();
        for policy in self.inner.state.lock().await.policies.values() {
            names.extend(policy.network.names().into_iter().map(ToOwned::to_owned));
        }
        names.sort_unstable();
        names.dedup();
        if names.is_empty() {
            return;
        }
        let found = names::look_up(&names).await;
        let resolvers = self.resolvers();
        let mut state = self.inner.state.lock().await;
        let mut changed = false;
        for (app, policy) in &mut state.policies {
            let wanted = policy.network.names();
            let own = found.iter().filter(|(name, _)| wanted.contains(&name.as_str())).cloned().collect();
            let mut new = policy.clone();
            for message in new.take_over(own) {
                self.inner.events.emit("network-name", Some(app), None, message);
            }
            if new.addresses != policy.addresses {
                let rules = ruleset::policy(&self.inner.config.table, new.group, &new.rules(&resolvers));
                let done = nft::apply(&rules).await.map_err(super::NetworkError::from);
                if let Err(error) = done.and_then(|()| self.hosts_file(app, &new).map(drop)) {
                    self.inner.events.emit("network-failed", Some(app), None, error.to_string());
                    continue;
                }
                changed = true;
            }
            *policy = new;
        }
        if changed && let Err(error) = state.save(&self.inner.config.folder) {
            tracing::warn!(%error, "names that moved are not saved");
        }
    }

    /// Tells what apps have tried to reach in vain, each destination once.
    async fn tell_refused(&self) {
        let Ok(sets) = nft::sets(&self.inner.config.table).await else { return };
        let mut state = self.inner.state.lock().await;
        for (app, policy) in &mut state.policies {
            let prefix = format!("r{}_", policy.group);
            let mut news: Vec<String> = refused(&sets, &prefix);
            news.retain(|destination| !policy.told.contains(destination));
            if news.is_empty() {
                continue;
            }
            policy.told.extend(news.iter().cloned());
            let more = news.len().saturating_sub(MOST_TOLD);
            news.truncate(MOST_TOLD);
            let mut list = news.join(", ");
            if more > 0 {
                list += &format!(" and {more} more");
            }
            let message = format!("{app} tried to reach {list}, which its network.outbound does not allow");
            self.inner.events.emit("network-refused", Some(app), None, message);
        }
    }
}

/// The elements of the sets that begin with `prefix`, as `10.0.0.9:3306`.
fn refused(sets: &serde_json::Value, prefix: &str) -> Vec<String> {
    let all = sets["nftables"].as_array().into_iter().flatten();
    let mine = all
        .map(|entry| &entry["set"])
        .filter(|set| set["name"].as_str().is_some_and(|name| name.starts_with(prefix)));
    let elements = mine.filter_map(|set| set["elem"].as_array()).flatten();
    elements
        .filter_map(|element| {
            // An element with a time-out is wrapped.
            let value = if element["elem"].is_object() { &element["elem"]["val"] } else { element };
            let parts = value["concat"].as_array()?;
            let address: IpAddr = parts.first()?.as_str()?.parse().ok()?;
            let text = |part: &serde_json::Value| part.as_str().map_or(part.to_string(), ToOwned::to_owned);
            let (protocol, port) = (text(parts.get(1)?), text(parts.get(2)?));
            Some(match protocol.as_str() {
                "6" | "tcp" => std::net::SocketAddr::new(address, port.parse().ok()?).to_string(),
                "17" | "udp" => format!("{}/udp", std::net::SocketAddr::new(address, port.parse().ok()?)),
                other => format!("{address} (protocol {other})"),
            })
        })
        .collect()
}

/// A socket that hears of every change of the packet filter's rules.
fn listen() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let protocol = Some(netlink::NETFILTER);
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, CHANGES_OF_RULES))?;
    Ok(socket)
}

/// Returns when somebody has deleted a table. Which one does not matter: it is looked then.
async fn deleted(changes: Option<&AsyncFd<OwnedFd>>) {
    let Some(changes) = changes else { return std::future::pending().await };
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let Ok(mut ready) = changes.readable().await else { return std::future::pending().await };
        let received = ready.try_io(|fd| {
            rustix::net::recv(fd.get_ref(), &mut buffer[..], RecvFlags::empty()).map_err(io::Error::from)
        });
        match received {
            Ok(Ok((length, _))) => {
                if mentions(buffer.get(..length).unwrap_or_default(), TABLE_DELETED) {
                    return;
                }
            }
            // More changes than the socket holds: some were missed.
            Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => return,
            Ok(Err(error)) => {
                tracing::debug!(%error, "changes of the packet filter");
                return;
            }
            Err(_would_block) => {}
        }
    }
}

/// Whether a packet of netlink messages has one of that type.
fn mentions(mut packet: &[u8], wanted: u16) -> bool {
    while let (Some(length), Some(kind)) = (packet.get(..4), packet.get(4..6)) {
        let (Ok(length), Ok(kind)) = (<[u8; 4]>::try_from(length), <[u8; 2]>::try_from(kind)) else { break };
        if u16::from_ne_bytes(kind) == wanted {
            return true;
        }
        let length = usize::try_from(u32::from_ne_bytes(length)).unwrap_or(0);
        let Some(rest) = packet.get((length.max(16) + 3) & !3..) else { break };
        packet = rest;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_refused_is_told_in_words() {
        let sets = serde_json::json!({ "nftables": [
            { "metainfo": {} },
            { "set": { "name": "r7_4", "elem": [
                { "elem": { "val": { "concat": ["10.0.0.9", 6, 3306] }, "timeout": 600 } },
                { "elem": { "val": { "concat": ["10.0.0.9", "udp", 53] } } } ] } },
            { "set": { "name": "r7_6", "elem": [{ "concat": ["2001:db8::1", "tcp", 80] }] } },
            { "set": { "name": "r8_4", "elem": [{ "concat": ["10.9.9.9", 6, 1] }] } } ] });
        assert_eq!(refused(&sets, "r7_"), ["10.0.0.9:3306", "10.0.0.9:53/udp", "[2001:db8::1]:80"]);
    }

    #[test]
    fn a_deleted_table_is_recognised_among_other_changes() {
        let message = |kind: u16| {
            let mut bytes = 20_u32.to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.resize(20, 0);
            bytes
        };
        let packet = [message(0x0a00), message(TABLE_DELETED)].concat();
        assert!(mentions(&packet, TABLE_DELETED));
        assert!(!mentions(&message(0x0a00), TABLE_DELETED));
        assert!(!mentions(&[1, 0, 0], TABLE_DELETED));
    }
}
