//! Names and name servers: what a container's `/etc/hosts` and `/etc/resolv.conf` say.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

/// A look-up that takes longer has failed; it is tried again.
const LOOKUP: Duration = Duration::from_secs(3);
/// Where name servers are written. systemd's own is on a loopback address; the second file has those that it asks itself.
const RESOLV_CONF: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
/// As many as the C library reads.
const MOST_RESOLVERS: usize = 3;

/// The addresses of each name; a name without an address is there with none.
pub(super) type Addresses = BTreeMap<String, Vec<IpAddr>>;

/// Looks names up, all at once. A name that cannot be looked up has its error.
pub(super) async fn look_up(names: &[String]) -> Vec<(String, Result<Vec<IpAddr>, String>)> {
    let tasks: Vec<_> = names
        .iter()
        .map(|name| {
            let name = name.clone();
            tokio::spawn(async move {
                let found = look_up_one(&name).await;
                (name, found)
            })
        })
        .collect();
    let mut all = Vec::new();
    for task in tasks {
        if let Ok(found) = task.await {
            all.push(found);
        }
    }
    all
}

async fn look_up_one(name: &str) -> Result<Vec<IpAddr>, String> {
    match tokio::time::timeout(LOOKUP, tokio::net::lookup_host((name, 0))).await {
        Ok(Ok(addresses)) => Ok(clean(addresses)),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", LOOKUP.as_secs())),
    }
}

fn clean(addresses: impl Iterator<Item = SocketAddr>) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = addresses.map(|address| address.ip()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// The name servers of this host that a container can reach.
pub(super) fn resolvers_of_host() -> Vec<IpAddr> {
    for path in RESOLV_CONF {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let found = resolvers(&text);
        if !found.is_empty() {
            return found;
        }
    }
    Vec::new()
}

fn resolvers(text: &str) -> Vec<IpAddr> {
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    let servers = servers.filter_map(|server| server.trim().parse::<IpAddr>().ok());
    servers.filter(|server| cmdb::network::forbidden(*server).is_none()).take(MOST_RESOLVERS).collect()
}

/// The text of `/etc/resolv.conf`.
pub(super) fn resolv_conf(resolvers: &[IpAddr]) -> String {
    if resolvers.is_empty() {
        return "# no name server is reachable from here; /etc/hosts has the names of network.outbound\n"
            .to_owned();
    }
    resolvers.iter().fold(String::new(), |mut text, resolver| {
        let _ = writeln!(text, "nameserver {resolver}");
        text
    })
}

/// The text of `/etc/hosts`.
pub(super) fn hosts(own: &str, addresses: &Addresses) -> String {
    let mut text = format!("127.0.0.1\tlocalhost {own}\n::1\tlocalhost ip6-localhost ip6-loopback {own}\n");
    for (name, addresses) in addresses {
        for address in addresses {
            let _ = writeln!(text, "{address}\t{name}");
        }
    }
    text
}

/// Writes a hosts file *into* the one that running containers have mounted. In one write that is never shorter than what was
/// there, so that whoever reads meanwhile sees one or the other.
pub(super) fn write_hosts(path: &Path, text: &str) -> io::Result<File> {
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o644).open(path)?;
    let mut padded = text.to_owned();
    let before = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
    padded.extend(std::iter::repeat_n('\n', before.saturating_sub(padded.len())));
    file.write_all_at(padded.as_bytes(), 0)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_on_loopback_are_nobodys_in_a_container() {
        let text = "# made by somebody\nnameserver 127.0.0.53\nnameserver 192.0.2.1\n  nameserver\t2001:db8::1\noptions edns0\n";
        assert_eq!(resolvers(text), ["192.0.2.1".parse::<IpAddr>().unwrap(), "2001:db8::1".parse().unwrap()]);
    }

    #[test]
    fn a_hosts_file_is_rewritten_in_place() {
        use std::os::unix::fs::MetadataExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("blog");
        let long: Addresses =
            [("db.internal".to_owned(), vec!["10.0.0.5".parse().unwrap(), "10.0.0.6".parse().unwrap()])]
                .into();
        let before = write_hosts(&path, &hosts("blog", &long)).unwrap().metadata().unwrap().ino();

        let short: Addresses = [("db.internal".to_owned(), vec!["10.0.0.7".parse().unwrap()])].into();
        let after = write_hosts(&path, &hosts("blog", &short)).unwrap().metadata().unwrap().ino();

        assert_eq!(before, after);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("10.0.0.7\tdb.internal") && !text.contains("10.0.0.6"), "{text:?}");
    }
}
