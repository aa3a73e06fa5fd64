//! The network of containers that may connect out (`[network] outbound`): a link of virtual Ethernet each, NAT, and rules
//! of one table of the packet filter that is this launcher's own.
//!
//! Nothing of it exists until an app asks for it. Requests come in without any of it (see [`crate::network`]). Links are
//! made while the container is being made, and go with its network namespace; nobody waits for their end.

mod forwarding;
mod keep;
mod link;
mod names;
mod nft;
mod pool;
mod rtnl;
mod ruleset;
mod state;

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use cmdb::network::{DestinationHost, Network};
use cmdb::{App, AppName, fingerprint::fnv1a};
use ipnet::{IpNet, Ipv4Net};
use tokio::sync::oneshot;

use crate::events::Events;
use crate::network::{NetSockets, rtnl_socket};
pub use keep::keep;
pub use link::{LinkError, LinkPlan};
use names::Addresses;
pub use nft::NftError;
pub use pool::PoolError;
use pool::{Nets, Numbers};
use rtnl::{Interface, Rtnl};
use ruleset::{Listed, Rules};
use state::{Policy, State};

/// How outbound networking is to be done.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the packet filter's table; each launcher on a host needs its own.
    pub table: String,
    /// Where what must survive the daemon is kept.
    pub folder: PathBuf,
    /// The private addresses to use; `None`: a free net is looked for.
    pub pool: Option<Ipv4Net>,
    /// Name servers of containers with the internet; empty: this host's own.
    pub resolvers: Vec<IpAddr>,
}

/// Makes links and keeps their rules; cheap to clone.
#[derive(Clone, Debug)]
pub struct Outbound {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    /// How the names of all links of this launcher begin.
    links: String,
    events: Arc<Events>,
    state: tokio::sync::Mutex<State>,
    numbers: Mutex<Option<Numbers>>,
    maker: Mutex<Option<mpsc::Sender<Job>>>,
}

/// Work for the thread that makes links.
type Job = Box<dyn FnOnce(&mut Rtnl) + Send>;

/// A container's link, made or about to be; the addresses are its own until this is dropped.
#[derive(Debug)]
pub struct Link {
    plan: LinkPlan,
    /// The text of the container's `/etc/resolv.conf`.
    pub resolv_conf: String,
    /// The container's `/etc/hosts`, which the launcher rewrites when names move.
    pub hosts: Option<OwnedFd>,
    outbound: Outbound,
}

/// Why a container has no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The packet filter.
    #[error("the network's rules cannot be put into force: {0}")]
    Nft(#[from] NftError),
    /// Addresses.
    #[error("no private addresses for the network: {0}")]
    Pool(#[from] PoolError),
    /// All are taken.
    #[error("every address of {0} is taken; choose a wider net with --network-pool")]
    Full(Ipv4Net),
    /// The host does not forward.
    #[error("this host cannot be told to forward packets: {0}")]
    Forwarding(io::Error),
    /// The kernel's answers about interfaces and routes.
    #[error("the network cannot be set up: {what}: {error}")]
    Netlink {
        /// What was asked.
        what: &'static str,
        /// The system's error.
        error: io::Error,
    },
    /// The link.
    #[error("the network link cannot be made: {0}")]
    Link(#[from] LinkError),
    /// Files.
    #[error("{path} cannot be written: {error}")]
    State {
        /// Which file.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
}

impl Outbound {
    /// Nothing is set up before the first app asks for it.
    #[must_use]
    pub fn new(config: Config, events: Arc<Events>) -> Outbound {
        let links = format!("fc{:05x}-", fnv1a(config.table.as_bytes()) & 0xf_ffff);
        let inner = Inner {
            config,
            links,
            events,
            state: tokio::sync::Mutex::default(),
            numbers: Mutex::default(),
            maker: Mutex::default(),
        };
        Outbound { inner: Arc::new(inner) }
    }

    /// Puts the app's rules into force and sets a link aside; `None` for an app that may reach nothing.
    ///
    /// # Errors
    /// See [`NetworkError`]; nothing is half in force.
    pub async fn prepare(&self, app: &App) -> Result<Option<Link>, NetworkError> {
        // What such an app had before is withdrawn where its configuration changes: its start waits for nobody's rules.
        if app.network.is_closed() {
            return Ok(None);
        }
        self.install(&app.name, &app.network).await?;
        let state = self.inner.state.lock().await;
        let (Some(base), Some(policy)) = (&state.base, state.policies.get(&app.name)) else {
            return Ok(None);
        };
        let nets = base.nets;
        let number = self.numbers(&nets, Numbers::take).ok_or(NetworkError::Full(nets.v4))?;
        let (v4, v6) = nets.addresses(number);
        let plan = LinkPlan {
            number,
            name: format!("{}{number:x}", self.inner.links),
            group: policy.group,
            v4,
            v6,
            gateway: nets.gateway(),
            mtu: base.mtu,
        };
        let hosts = (!policy.network.names().is_empty()).then(|| self.hosts_file(&app.name, policy));
        let resolv_conf = names::resolv_conf(&policy.rules(&self.resolvers()).resolvers);
        // From here on the link gives its number back when something fails.
        let mut link = Link { plan, resolv_conf, hosts: None, outbound: self.clone() };
        link.hosts = hosts.transpose()?.map(OwnedFd::from);
        Ok(Some(link))
    }

    /// The app's configuration is another: what runs already may reach what it says now.
    pub async fn configured(&self, app: &App) {
        let known = self.inner.state.lock().await.policies.contains_key(&app.name);
        let done = match app.network.is_closed() {
            _ if !known => return,
            true => {
                self.withdraw(&app.name).await;
                return;
            }
            false => self.install(&app.name, &app.network).await,
        };
        if let Err(error) = done {
            self.inner.events.emit("network-failed", Some(&app.name), None, error.to_string());
        }
    }

    /// Goes on with what an earlier daemon set up: its nets, its rules, and these links. Links of nobody are removed.
    pub async fn resume(&self, links: &[LinkPlan]) {
        let mut state = self.inner.state.lock().await;
        match state::load(&self.inner.config.folder) {
            Ok(Some(saved)) => state.resume(saved),
            Ok(None) => return,
            Err(error) => tracing::warn!(%error, "what an earlier launcher knew of its network is lost"),
        }
        // Whatever comes of the rules: the numbers of links that live are nobody else's.
        let Some(nets) = state.saved.as_ref().and_then(|saved| saved.nets) else { return };
        for link in links {
            if !self.numbers(&nets, |numbers| numbers.claim(link.number)) {
                tracing::warn!(name = link.name, "a link of an earlier launcher is none of ours");
            }
        }
        if let Err(error) = self.begin(&mut state).await {
            self.inner.events.emit("network-failed", None, None, format!("{error}; it is tried again"));
        }
        let kept: BTreeSet<String> = links.iter().map(|link| link.name.clone()).collect();
        let prefix = self.inner.links.clone();
        let swept =
            std::thread::Builder::new().name("old links".to_owned()).spawn(move || sweep(&prefix, &kept));
        if let Err(error) = swept {
            tracing::warn!(%error, "links of an earlier launcher are not removed");
        }
    }

    /// The link of a container that an earlier daemon started.
    #[must_use]
    pub fn adopt(&self, plan: LinkPlan) -> Link {
        Link { plan, resolv_conf: String::new(), hosts: None, outbound: self.clone() }
    }

    /// Takes everything back that was changed on this host.
    pub async fn end(&self) {
        let mut state = self.inner.state.lock().await;
        let base = state.base.take().map(|base| (base.nets, base.opened));
        let saved = state.saved.take().and_then(|saved| Some((saved.nets?, saved.opened)));
        let Some((nets, mut opened)) = base.or(saved) else { return };
        let rules = format!("delete table inet {}\n", self.inner.config.table);
        if let Err(error) = nft::apply(&rules).await {
            tracing::warn!(%error, "the network's rules are left");
        }
        opened.close();
        let removed = host(|rtnl| {
            rtnl.remove_unreachable(IpNet::V4(nets.v4))?;
            nets.v6.map_or(Ok(()), |net| rtnl.remove_unreachable(IpNet::V6(net)))
        });
        if let Err(error) = removed {
            tracing::warn!(%error, "the route that marks the network's addresses is left");
        }
        state::remove(&self.inner.config.folder);
    }

    /// Puts rules into force unless they are already.
    async fn install(&self, app: &AppName, network: &Network) -> Result<(), NetworkError> {
        if self.inner.state.lock().await.policies.get(app).is_some_and(|policy| policy.network == *network) {
            return Ok(());
        }
        let names: Vec<String> = network.names().into_iter().map(ToOwned::to_owned).collect();
        let found = names::look_up(&names).await;
        let mut state = self.inner.state.lock().await;
        self.begin(&mut state).await?;
        let old = state.policies.get(app).cloned();
        let mut policy = match &old {
            Some(old) => Policy { network: network.clone(), ..old.clone() },
            None => Policy::new(state.new_group(), network.clone()),
        };
        let told = policy.take_over(found);
        let text = ruleset::policy(&self.inner.config.table, policy.group, &policy.rules(&self.resolvers()));
        nft::apply(&text).await?;
        if !policy.network.names().is_empty() {
            self.hosts_file(app, &policy)?;
        }
        if policy.network.internet && self.resolvers().is_empty() {
            let message = "this host has no name server that a container can reach: its own are on loopback addresses; \
                           give one with --network-dns";
            self.inner.events.emit("network-no-dns", Some(app), None, message.to_owned());
        }
        for message in told {
            self.inner.events.emit("network-name", Some(app), None, message);
        }
        state.policies.insert(app.clone(), policy);
        state.save(&self.inner.config.folder)
    }

    /// The app may reach nothing any more.
    async fn withdraw(&self, app: &AppName) {
        let mut state = self.inner.state.lock().await;
        let Some(group) = state.policies.get(app).map(|policy| policy.group) else { return };
        // Only what is no longer in force is forgotten; the next round tries again.
        if let Err(error) = nft::apply(&ruleset::no_policy(&self.inner.config.table, group)).await {
            return self.inner.events.emit("network-failed", Some(app), None, error.to_string());
        }
        state.policies.remove(app);
        if let Err(error) = state.save(&self.inner.config.folder) {
            self.inner.events.emit("network-failed", Some(app), None, error.to_string());
        }
        let _ = std::fs::remove_file(state::hosts_path(&self.inner.config.folder, app));
    }

    /// The host's part: addresses, forwarding, the table with the rules of every app that has some. Once.
    async fn begin(&self, state: &mut State) -> Result<(), NetworkError> {
        if state.base.is_some() {
            return Ok(());
        }
        let config = &self.inner.config;
        let netlink = |what| move |error| NetworkError::Netlink { what, error };
        let surroundings = host(|rtnl| Surroundings::look(rtnl, &self.inner.links))
            .map_err(netlink("looking at this host's interfaces and routes"))?;
        let saved = state.saved.clone().unwrap_or_default();
        let mut opened = saved.opened;
        let with_v6 = surroundings.has_v6 && forwarding::can_forward_v6();
        let seed = fnv1a(format!("{} {}", config.table, config.folder.display()).as_bytes());
        let nets = match saved.nets.filter(|nets| config.pool.is_none_or(|pool| pool == nets.v4)) {
            Some(nets) => nets,
            None => Nets {
                v4: pool::choose(config.pool, seed, &surroundings.taken)?,
                v6: with_v6.then(|| pool::unique_local(seed)),
            },
        };
        // Should something fail from here on, it is tried again with these.
        state.saved = Some(state::SavedBase { nets: Some(nets), opened: opened.clone() });
        let marked = host(|rtnl| {
            rtnl.add_unreachable(IpNet::V4(nets.v4))?;
            nets.v6.map_or(Ok(()), |net| rtnl.add_unreachable(IpNet::V6(net)))
        });
        marked.map_err(netlink("marking the addresses as taken"))?;
        let mut text = ruleset::table(&config.table, &self.inner.links, &nets, &opened);
        for policy in state.policies.values() {
            text += &ruleset::policy(&config.table, policy.group, &policy.rules(&self.resolvers()));
        }
        // The rules first: not a packet passes without them.
        nft::apply(&text).await?;
        let changed = opened.open(&surroundings.uplinks, nets.v6.is_some()).map_err(NetworkError::Forwarding);
        let message = format!(
            "apps that may connect out get addresses of {}{}; {}; the rules are in the packet filter's table inet {}",
            nets.v4,
            nets.v6.map_or(String::new(), |net| format!(" and {net}")),
            opened.describe(),
            config.table
        );
        state.base = Some(state::Base { nets, opened, mtu: surroundings.mtu });
        state.saved = None;
        state.save(&config.folder)?;
        if changed? {
            let base = state.base.as_ref();
            nft::apply(&base.map_or(String::new(), |base| ruleset::strangers(&config.table, &base.opened)))
                .await?;
        }
        self.inner.events.emit("network-ready", None, None, message);
        if nets.v6.is_none() {
            let message = "containers reach IPv4 only: this kernel cannot forward IPv6 for single interfaces \
                           (Linux 6.17 can); for IPv6 set net.ipv6.conf.all.forwarding=1, and accept_ra=2 where the \
                           host learns its route";
            self.inner.events.emit("network-ipv4-only", None, None, message.to_owned());
        }
        Ok(())
    }

    /// Writes the app's hosts file and opens it.
    fn hosts_file(&self, app: &AppName, policy: &Policy) -> Result<std::fs::File, NetworkError> {
        let path = state::hosts_path(&self.inner.config.folder, app);
        let text = names::hosts(app.as_str(), &policy.addresses);
        names::write_hosts(&path, &text).map_err(|error| NetworkError::State { path, error })
    }

    fn resolvers(&self) -> Vec<IpAddr> {
        let configured = &self.inner.config.resolvers;
        if configured.is_empty() { names::resolvers_of_host() } else { configured.clone() }
    }

    fn numbers<T>(&self, nets: &Nets, work: impl FnOnce(&mut Numbers) -> T) -> T {
        let mut numbers = self.inner.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        work(numbers.get_or_insert_with(|| Numbers::new(nets)))
    }

    /// Puts work to the thread that makes links.
    fn ask_maker(&self, job: Job) -> io::Result<()> {
        let mut maker = self.inner.maker.lock().unwrap_or_else(PoisonError::into_inner);
        if maker.is_none() {
            let (sender, jobs) = mpsc::channel::<Job>();
            let mut rtnl = Rtnl::new(rtnl_socket()?);
            std::thread::Builder::new().name("links".to_owned()).spawn(move || {
                for job in jobs {
                    job(&mut rtnl);
                }
            })?;
            *maker = Some(sender);
        }
        let sent = maker.as_ref().map(|maker| maker.send(job));
        sent.and_then(Result::ok).ok_or_else(|| io::Error::other("the thread that makes links has ended"))
    }
}

impl Link {
    /// What to write on the container, for a daemon that adopts it.
    #[must_use]
    pub fn plan(&self) -> &LinkPlan {
        &self.plan
    }

    /// Gives the container its link; returns when packets pass.
    ///
    /// # Errors
    /// See [`NetworkError`]; nothing of the link is left.
    pub async fn attach(&self, sockets: &NetSockets) -> Result<(), NetworkError> {
        let netlink = |what| move |error| NetworkError::Netlink { what, error };
        let inside = sockets.rtnl().await.map_err(netlink("a socket inside the container"))?;
        let netns = sockets.clone();
        let plan = self.plan.clone();
        let (reply, made) = oneshot::channel();
        let job = move |host: &mut Rtnl| {
            let made = link::make(&plan, host, &mut Rtnl::new(inside), netns.netns());
            // Whoever asked may have left: then the link goes with the container.
            let _ = reply.send(made);
        };
        self.outbound.ask_maker(Box::new(job)).map_err(netlink("the thread that makes links"))?;
        made.await
            .map_err(|_| netlink("the thread that makes links")(io::ErrorKind::BrokenPipe.into()))??;
        Ok(())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let mut numbers = self.outbound.inner.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(numbers) = numbers.as_mut() {
            numbers.give_back(self.plan.number);
        }
    }
}

impl Policy {
    /// What the packet filter is told: addresses instead of names.
    fn rules(&self, resolvers: &[IpAddr]) -> Rules {
        let mut rules = Rules {
            internet: self.network.internet,
            resolvers: if self.network.internet { resolvers.to_vec() } else { Vec::new() },
            listed: BTreeSet::new(),
        };
        for destination in &self.network.destinations {
            let nets: Vec<IpNet> = match &destination.host {
                DestinationHost::Net(net) => vec![*net],
                DestinationHost::Name(name) => {
                    self.addresses.get(&**name).into_iter().flatten().copied().map(IpNet::from).collect()
                }
            };
            rules
                .listed
                .extend(nets.into_iter().map(|net| Listed::new(net, destination.port, destination.protocol)));
        }
        rules
    }

    /// Takes over what was found out about names; what there is to tell about it. A name that cannot be looked up keeps the
    /// addresses that it had.
    fn take_over(&mut self, found: Vec<(String, Result<Vec<IpAddr>, String>)>) -> Vec<String> {
        let mut told = Vec::new();
        let wanted: BTreeSet<&str> = self.network.names().into_iter().collect();
        let mut addresses: Addresses = std::mem::take(&mut self.addresses);
        addresses.retain(|name, _| wanted.contains(name.as_str()));
        for (name, result) in found {
            let result = result.and_then(|found| {
                let (bad, good): (Vec<IpAddr>, Vec<IpAddr>) =
                    found.into_iter().partition(|address| cmdb::network::forbidden(*address).is_some());
                match (good.is_empty(), bad.first()) {
                    (true, Some(bad)) => {
                        let why = cmdb::network::forbidden(*bad).unwrap_or_default();
                        Err(format!("it leads to {bad}, and {why}"))
                    }
                    _ => Ok(good),
                }
            });
            match result {
                Ok(found) => {
                    let old = addresses.insert(name.clone(), found.clone());
                    let recovered = self.failing.remove(&name);
                    if old.as_ref().is_some_and(|old| *old != found && !old.is_empty()) || recovered {
                        let list: Vec<String> = found.iter().map(ToString::to_string).collect();
                        told.push(format!("{name} is at {} now", list.join(", ")));
                    }
                }
                Err(why) => {
                    let old = addresses.entry(name.clone()).or_default();
                    let keeps =
                        if old.is_empty() { "it is not reachable" } else { "its last addresses are kept" };
                    if self.failing.insert(name.clone()) {
                        told.push(format!("{name} of network.outbound cannot be looked up: {why}; {keeps}"));
                    }
                }
            }
        }
        self.addresses = addresses;
        told
    }
}

/// What the host's own network looks like.
struct Surroundings {
    taken: Vec<IpNet>,
    /// Interfaces through which routes lead, without links of launchers.
    uplinks: BTreeSet<String>,
    has_v6: bool,
    mtu: u32,
}

impl Surroundings {
    fn look(rtnl: &mut Rtnl, links: &str) -> io::Result<Surroundings> {
        let interfaces = rtnl.interfaces()?;
        let routes = rtnl.routes()?;
        let mut taken: Vec<IpNet> = routes.iter().filter_map(|route| route.to).collect();
        taken.extend(rtnl.addresses()?.into_iter().map(IpNet::from));
        let through = |index: u32| interfaces.iter().find(|interface| interface.index == index);
        let is_uplink = |interface: &&Interface| {
            interface.name != "lo"
                && !interface.name.starts_with(links)
                && !is_link_of_a_launcher(&interface.name)
        };
        let uplinks: Vec<&Interface> =
            routes.iter().filter_map(|route| through(route.through?)).filter(is_uplink).collect();
        Ok(Surroundings {
            taken,
            has_v6: std::path::Path::new("/proc/sys/net/ipv6").exists(),
            mtu: uplinks
                .iter()
                .map(|interface| interface.mtu)
                .filter(|mtu| *mtu >= 1280)
                .min()
                .unwrap_or(1500)
                .min(1500),
            uplinks: uplinks.into_iter().map(|interface| interface.name.clone()).collect(),
        })
    }
}

/// Links are named `fc`, five hexadecimal digits that say of which launcher, `-`, and the number.
fn is_link_of_a_launcher(name: &str) -> bool {
    name.strip_prefix("fc")
        .and_then(|rest| rest.split_once('-'))
        .is_some_and(|(launcher, _)| launcher.len() == 5 && launcher.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Removes the links that begin with `prefix`, save the `kept`. Slow: see [`Rtnl::remove_link`].
fn sweep(prefix: &str, kept: &BTreeSet<String>) {
    let swept = host(|rtnl| {
        for interface in rtnl.interfaces()? {
            if interface.name.starts_with(prefix) && !kept.contains(&interface.name) {
                link::remove(&interface.name, rtnl);
            }
        }
        Ok(())
    });
    if let Err(error) = swept {
        tracing::warn!(%error, "links of an earlier launcher cannot be removed");
    }
}

/// Asks the host's routing socket something quick.
fn host<T>(work: impl FnOnce(&mut Rtnl) -> io::Result<T>) -> io::Result<T> {
    work(&mut Rtnl::new(rtnl_socket()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_cannot_be_looked_up_keeps_its_addresses_and_is_told_once() {
        let network = Network { internet: false, destinations: vec!["db.internal:5432".parse().unwrap()] };
        let mut policy = Policy::new(1, network);
        let found = |result: Result<Vec<&str>, &str>| {
            let result = result.map(|all| all.iter().map(|a| a.parse().unwrap()).collect());
            vec![("db.internal".to_owned(), result.map_err(str::to_owned))]
        };
        assert!(policy.take_over(found(Ok(vec!["10.0.0.5"]))).is_empty());
        assert_eq!(policy.take_over(found(Err("no answer"))).len(), 1);
        assert!(policy.take_over(found(Err("no answer"))).is_empty());
        assert_eq!(policy.rules(&[]).listed.len(), 1);
        assert_eq!(policy.take_over(found(Ok(vec!["10.0.0.6"]))), ["db.internal is at 10.0.0.6 now"]);

        let told = policy.take_over(found(Ok(vec!["127.0.1.1"])));
        assert!(told[0].contains("127.0.1.1") && told[0].contains("the container itself"), "{told:?}");
    }

    #[test]
    fn links_of_all_launchers_are_told_by_their_names() {
        assert!(is_link_of_a_launcher("fc3fa9c-2"));
        assert!(!is_link_of_a_launcher("eth0") && !is_link_of_a_launcher("fcoe0-1"));
    }
}
