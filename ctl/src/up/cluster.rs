//! What `up` needs to know of other hosts, checked before anything starts.

use std::{
    ffi::OsString,
    fs,
    net::SocketAddr,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use launcher_client::home::{self, Home};

use crate::{
    cli::{self, Role},
    failure::Failure,
};

/// Fewest bytes of a cluster key.
const KEY_MIN: u64 = 32;

/// This host among others.
#[derive(Debug)]
pub(crate) struct Cluster {
    home: Home,
    key: Option<PathBuf>,
    tls: Option<PathBuf>,
    node: Option<String>,
}

impl Cluster {
    /// Reads and checks the options.
    pub(crate) fn of(options: &cli::Among) -> Result<Self, Failure> {
        let fault = |message: String| Err(Failure::usage(message));
        let home = Home::of_option(&options.cmdb).map_err(|error| Failure::usage(error.to_string()))?;
        let several = home != Home::Embedded;
        for (option, given) in [
            ("--dispatch", options.dispatch.is_some()),
            ("--node", options.node.is_some()),
            ("--label", !options.label.is_empty()),
            ("--role", options.role != Role::Both),
        ] {
            if given && !several {
                return fault(format!(
                    "{option} is for one of several hosts: give --cmdb redis://HOST:PORT, too"
                ));
            }
        }
        if options.role == Role::Dispatch && options.dispatch.is_none() {
            return fault(
                "--role dispatch needs --dispatch ADDRESS:PORT: where edges send their requests".to_owned(),
            );
        }
        if options.role == Role::Edge && options.dispatch.is_some() {
            return fault("an edge runs no apps and has no --dispatch".to_owned());
        }
        let needs_key = several && (options.dispatch.is_some() || options.role == Role::Edge);
        if needs_key && options.cluster_key.is_none() && options.cluster_tls.is_none() {
            return fault(
                "--cluster-key FILE is missing: by it hosts know each other; make one with: \
                 head -c 32 /dev/urandom > FILE; chmod 600 FILE (or give --cluster-tls DIR, see `fastcontainer ca`)"
                    .to_owned(),
            );
        }
        let node = match (&options.node, several) {
            (Some(node), _) => Some(node.clone()),
            (None, true) => Some(own_name()?),
            (None, false) => None,
        };
        let tls = options.cluster_tls.as_deref().map(folder).transpose()?;
        Ok(Self { home, key: options.cluster_key.as_deref().map(key).transpose()?, tls, node })
    }

    /// Whether there may be other hosts.
    pub(crate) fn has_others(&self) -> bool {
        self.home != Home::Embedded
    }

    /// What a program that opens the CMDB itself finds in its environment.
    pub(crate) fn environment(&self) -> Option<(&'static str, String)> {
        self.home.address().map(|address| (home::VARIABLE, address.to_owned()))
    }

    /// The launcher's arguments.
    pub(crate) fn for_launcher(
        &self,
        options: &cli::Among,
        api: Option<SocketAddr>,
        args: &mut Vec<OsString>,
    ) {
        self.name(args);
        if let Some(address) = api.filter(|_| self.has_others()) {
            args.extend(["--api".into(), address.to_string().into()]);
        }
        if let Some(address) = options.dispatch {
            args.extend(["--dispatch".into(), address.to_string().into()]);
        }
        for label in &options.label {
            args.extend(["--label".into(), label.into()]);
        }
    }

    /// The CoreAPI's arguments: by its name the apps of this host's folder are told from those of others.
    pub(crate) fn for_coreapi(&self, args: &mut Vec<OsString>) {
        self.name(args);
    }

    /// The proxy's arguments.
    pub(crate) fn for_proxy(&self, options: &cli::Among, args: &mut Vec<OsString>) {
        if options.role != Role::Edge {
            self.name(args);
        }
        if let Some(address) = options.dispatch {
            args.extend(["--dispatch".into(), address.to_string().into()]);
        }
        if let Some(key) = &self.key {
            args.extend(["--cluster-key".into(), key.into()]);
        }
        if let Some(tls) = &self.tls {
            args.extend(["--cluster-tls".into(), tls.into()]);
        }
    }

    fn name(&self, args: &mut Vec<OsString>) {
        if let Some(node) = &self.node {
            args.extend(["--node".into(), node.into()]);
        }
    }
}

fn own_name() -> Result<String, Failure> {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    cli::node_name(&name).map_err(|why| {
        Failure::usage(format!(
            "the host name \"{name}\" cannot be this host's name: {why}; choose one with --node"
        ))
    })
}

fn folder(path: &Path) -> Result<PathBuf, Failure> {
    fs::canonicalize(path)
        .map_err(|error| Failure::failed(format!("--cluster-tls {}: {error}", path.display())))
}

/// A key that others could read, or that is too short to be one, is refused. The proxy reads it while it is still root.
fn key(path: &Path) -> Result<PathBuf, Failure> {
    let shown = path.display();
    let fault = |error: std::io::Error| Failure::failed(format!("--cluster-key {shown}: {error}"));
    let path = fs::canonicalize(path).map_err(fault)?;
    let found = fs::metadata(&path).map_err(fault)?;
    if !found.is_file() {
        return Err(Failure::failed(format!("--cluster-key {shown} is no file")));
    }
    let mode = found.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 || found.uid() != 0 {
        return Err(Failure::failed(format!(
            "--cluster-key {shown} may be read by others (mode {mode:04o}, user {}): chown root {shown}; chmod 600 {shown}",
            found.uid()
        )));
    }
    if found.len() < KEY_MIN {
        return Err(Failure::failed(format!(
            "--cluster-key {shown} has {} bytes; at least {KEY_MIN} are needed: head -c 32 /dev/urandom > {shown}",
            found.len()
        )));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    fn options(arguments: &[&str]) -> cli::Among {
        let cli = Cli::parse_from(["fastcontainer", "up"].iter().chain(arguments));
        let Command::Up(up) = cli.command else { panic!("not up") };
        up.among
    }

    fn refusal(arguments: &[&str]) -> String {
        Cluster::of(&options(arguments)).unwrap_err().to_string()
    }

    #[test]
    fn what_makes_no_sense_together_is_refused_with_the_mend() {
        let cmdb = "redis://127.0.0.1:1";
        for (arguments, mend) in [
            (&["--dispatch", "127.0.0.1:1"][..], "--cmdb redis://"),
            (&["--node", "a"], "--cmdb redis://"),
            (&["--cmdb", "127.0.0.1:6379"], "redis://host:port"),
            (&["--cmdb", cmdb, "--role", "dispatch"], "--dispatch"),
            (&["--cmdb", cmdb, "--dispatch", "127.0.0.1:1"], "head -c 32"),
            (&["--cmdb", cmdb, "--role", "edge"], "head -c 32"),
        ] {
            let refused = refusal(arguments);
            assert!(refused.contains(mend), "{arguments:?}: {refused}");
        }
    }

    #[test]
    fn a_key_is_long_enough_and_roots_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let write = |bytes: usize, mode: u32| {
            fs::write(&path, vec![7; bytes]).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            key(&path).map_err(|failure| failure.to_string())
        };

        let (short, open, good) = (write(31, 0o600), write(32, 0o640), write(32, 0o600));

        assert!(short.unwrap_err().contains("at least 32"));
        assert!(open.unwrap_err().contains("chmod 600"));
        assert!(good.is_ok());
    }
}
