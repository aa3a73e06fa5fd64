//! Whom the program runs as, from the image's own `/etc/passwd` and `/etc/group`.

use std::io::Read;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::root::Root;
use super::step::{About, Failure};
use super::userns::IDS;

/// More than any honest account file; containerd was stopped by an image with an endless one.
const FILE_LIMIT: u64 = 1024 * 1024;
/// As many supplementary groups as we give; the kernel's own limit is 65,536.
const GROUP_LIMIT: usize = 256;

/// Ids as the container sees them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Account {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Supplementary groups, without `gid`.
    pub(super) groups: Vec<u32>,
    pub(super) home: String,
}

impl Account {
    /// Whether this is the container's root, who keeps some capabilities.
    pub(super) fn is_root(&self) -> bool {
        self.uid == 0
    }
}

/// Looks up `user` or `user:group`, each a name or a number; an empty text is root.
pub(super) fn look_up(root: &Root, user: &str) -> Result<Account, Failure> {
    if user.is_empty() {
        return Ok(Account { uid: 0, gid: 0, groups: Vec::new(), home: "/root".to_owned() });
    }
    let passwd = read_account_file(root, "/etc/passwd")?;
    let group = read_account_file(root, "/etc/group")?;
    parse(user, &passwd, &group)
}

fn parse(user: &str, passwd: &str, group: &str) -> Result<Account, Failure> {
    let (user, wanted_group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (user, None),
    };
    let entry =
        passwd.lines().map(fields).find(|entry| entry.first() == Some(&user) || entry.get(2) == Some(&user));
    let uid = match (&entry, user.parse::<u32>()) {
        (Some(entry), _) => id(entry.get(2).copied().unwrap_or_default(), user)?,
        (None, Ok(uid)) if uid < IDS => uid,
        (None, Ok(_)) => return Err(Failure::new(libc::EINVAL, format!("user {user}: ids end at 65535"))),
        (None, Err(_)) => {
            return Err(Failure::new(libc::ENOENT, format!("user {user} is not in /etc/passwd")));
        }
    };
    let gid = match (wanted_group, &entry) {
        (Some(wanted), _) => group_id(wanted, group)?,
        (None, Some(entry)) => id(entry.get(3).copied().unwrap_or_default(), user)?,
        // As Docker does for a number that the image does not know.
        (None, None) => 0,
    };
    let name = entry.as_ref().and_then(|entry| entry.first()).copied();
    let mut groups = match (wanted_group, name) {
        (None, Some(name)) => memberships(name, group),
        _ => Vec::new(),
    };
    groups.retain(|other| *other != gid);
    groups.truncate(GROUP_LIMIT);
    let home = entry.as_ref().and_then(|entry| entry.get(5)).filter(|home| home.starts_with('/'));
    Ok(Account { uid, gid, groups, home: home.map_or_else(|| "/".to_owned(), |home| (*home).to_owned()) })
}

fn group_id(wanted: &str, group: &str) -> Result<u32, Failure> {
    let entry = group.lines().map(fields).find(|entry| entry.first() == Some(&wanted));
    match (entry, wanted.parse::<u32>()) {
        (Some(entry), _) => id(entry.get(2).copied().unwrap_or_default(), wanted),
        (None, Ok(gid)) if gid < IDS => Ok(gid),
        (None, Ok(_)) => Err(Failure::new(libc::EINVAL, format!("group {wanted}: ids end at 65535"))),
        (None, Err(_)) => Err(Failure::new(libc::ENOENT, format!("group {wanted} is not in /etc/group"))),
    }
}

fn memberships(name: &str, group: &str) -> Vec<u32> {
    let entries = group.lines().map(fields);
    let mine =
        entries.filter(|entry| entry.get(3).is_some_and(|members| members.split(',').any(|m| m == name)));
    mine.filter_map(|entry| entry.get(2).and_then(|gid| gid.parse().ok())).filter(|gid| *gid < IDS).collect()
}

fn fields(line: &str) -> Vec<&str> {
    line.trim_end().split(':').collect()
}

fn id(text: &str, of: &str) -> Result<u32, Failure> {
    match text.parse::<u32>() {
        Ok(id) if id < IDS => Ok(id),
        _ => Err(Failure::new(libc::EINVAL, format!("{of} has the id {text} in the image"))),
    }
}

/// Reads a file of the image; one that does not exist is empty. Never blocks: the image may hold a FIFO there.
fn read_account_file(root: &Root, path: &str) -> Result<String, Failure> {
    let file = match root.resolve(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY) {
        Err(Errno::NOENT) => return Ok(String::new()),
        other => std::fs::File::from(other.about(path)?),
    };
    if !file.metadata().about(path)?.is_file() {
        return Err(Failure::new(libc::EINVAL, format!("{path} is not a file")));
    }
    let mut bytes = Vec::new();
    file.take(FILE_LIMIT + 1).read_to_end(&mut bytes).about(path)?;
    if bytes.len() as u64 > FILE_LIMIT {
        return Err(Failure::new(libc::EFBIG, format!("{path} is over 1 MiB")));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\nbad:x:70000:1::/:\n";
    const GROUP: &str =
        "root:x:0:\nwww-data:x:33:\nssl:x:101:bob,www-data\nmail:x:8:www-data2\nhuge:x:99999:www-data\n";

    #[test]
    fn a_name_brings_its_group_its_memberships_and_its_home() {
        let account = parse("www-data", PASSWD, GROUP).unwrap();
        let expected = Account { uid: 33, gid: 33, groups: vec![101], home: "/var/www".to_owned() };
        assert_eq!(account, expected);
    }

    #[test]
    fn a_number_is_looked_up_too_and_may_be_unknown() {
        assert_eq!(parse("33", PASSWD, GROUP).unwrap().gid, 33);
        let stranger = parse("1234", PASSWD, GROUP).unwrap();
        assert_eq!((stranger.uid, stranger.gid, stranger.home.as_str()), (1234, 0, "/"));
    }

    #[test]
    fn a_given_group_replaces_all_others() {
        let account = parse("www-data:ssl", PASSWD, GROUP).unwrap();
        assert_eq!((account.gid, account.groups.len()), (101, 0));
        assert_eq!(parse("33:44", PASSWD, GROUP).unwrap().gid, 44);
    }

    #[test]
    fn unknown_names_and_ids_outside_the_namespace_are_refused() {
        assert_eq!(parse("nobody-here", PASSWD, GROUP).unwrap_err().errno(), libc::ENOENT);
        assert_eq!(parse("33:nogroup-here", PASSWD, GROUP).unwrap_err().errno(), libc::ENOENT);
        for user in ["bad", "65536", "33:65536", "4294967295"] {
            assert_eq!(parse(user, PASSWD, GROUP).unwrap_err().errno(), libc::EINVAL, "{user}");
        }
    }
}
