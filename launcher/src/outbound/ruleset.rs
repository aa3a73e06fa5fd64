//! The packet filter's rules as text for `nft -f`: one table of this launcher's own, which touches no other.
//!
//! What a container sends is recognised by the interface that it comes in by, whose name begins like all of this launcher's and
//! whose device group says which app's rules hold. So a container that starts or ends changes no rule, and a change of an
//! app's rules holds for everything that runs already.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use cmdb::network::{METADATA, Protocol};
use ipnet::IpNet;

use super::forwarding::Opened;
use super::pool::Nets;

/// Nobody's destination, whatever is listed: this host, this link, multicast. Metadata addresses are added to these.
const NEVER_V4: &str = "0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/4, 240.0.0.0/4";
const NEVER_V6: &str = "::/127, ::ffff:0:0/96, fe80::/10, ff00::/8";
/// Not the internet: private, shared, for documentation and for tests (IANA's special-purpose registries). Of IPv6 only
/// 2000::/3 is the internet, without what wraps IPv4 addresses.
const INSIDE_V4: &str = "10.0.0.0/8, 100.64.0.0/10, 172.16.0.0/12, 192.0.0.0/24, 192.0.2.0/24, 192.168.0.0/16, \
                         198.18.0.0/15, 198.51.100.0/24, 203.0.113.0/24";
const INSIDE_V6: &str = "2001::/23, 2001:db8::/32, 2002::/16";

/// What one app may reach, looked up.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Rules {
    pub(super) internet: bool,
    /// Name servers that it may ask.
    pub(super) resolvers: Vec<IpAddr>,
    pub(super) listed: BTreeSet<Listed>,
}

/// One destination.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Listed {
    pub(super) net: IpNet,
    pub(super) port: u16,
    pub(super) udp: bool,
}

impl Listed {
    pub(super) fn new(net: IpNet, port: u16, protocol: Protocol) -> Listed {
        Listed { net, port, udp: protocol == Protocol::Udp }
    }
}

/// The whole table, in the place of an earlier one, in one transaction.
pub(super) fn table(name: &str, links: &str, nets: &Nets, opened: &Opened) -> String {
    let metadata = |v4: bool| {
        METADATA.iter().filter(|a| a.is_ipv4() == v4).fold(String::new(), |mut text, address| {
            let _ = write!(text, ", {address}");
            text
        })
    };
    let (metadata_v4, metadata_v6) = (metadata(true), metadata(false));
    let masquerade_v6 = nets
        .v6
        .map_or(String::new(), |net| format!("    ip6 saddr {net} oifname != \"{links}*\" masquerade\n"));
    let v4 = nets.v4;
    let text = format!(
        r#"add table inet {name}
delete table inet {name}
table inet {name} {{
  set never4 {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {NEVER_V4}{metadata_v4} }}; }}
  set never6 {{ type ipv6_addr; flags interval; auto-merge; elements = {{ {NEVER_V6}{metadata_v6} }}; }}
  set inside4 {{ type ipv4_addr; flags interval; elements = {{ {INSIDE_V4} }}; }}
  set inside6 {{ type ipv6_addr; flags interval; elements = {{ {INSIDE_V6} }}; }}
  set opened4 {{ type ifname; }}
  set opened6 {{ type ifname; }}
  map policies {{ type devgroup : verdict; }}
  map policies_here {{ type devgroup : verdict; }}

  # Nobody sends under another's address: the route back must lead to where it came from.
  chain arriving {{
    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} ip6 hoplimit 255 accept
    fib saddr . iif oif missing drop
  }}
  chain prerouting {{
    type filter hook prerouting priority raw; policy accept;
    iifname "{links}*" jump arriving
  }}
  chain refuse {{
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
  # To this host itself.
  chain input {{
    type filter hook input priority filter - 5; policy accept;
    iifname != "{links}*" accept
    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
    ip daddr @never4 goto refuse
    ip6 daddr @never6 goto refuse
    iifgroup vmap @policies_here
    goto refuse
  }}
  # Through this host. Nothing begins a connection to a container, not even another container.
  chain forward {{
    type filter hook forward priority filter - 5; policy accept;
    oifname "{links}*" ct state established,related accept
    iifname "{links}*" oifname "{links}*" goto refuse
    oifname "{links}*" drop
    iifname != "{links}*" goto strangers
    ct state invalid drop
    ip daddr @never4 goto refuse
    ip6 daddr @never6 goto refuse
    iifgroup vmap @policies
    goto refuse
  }}
  # Forwarding was switched on for the containers' sake only.
  chain strangers {{
    meta nfproto ipv4 iifname @opened4 drop
    meta nfproto ipv6 iifname @opened6 drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {v4} oifname != "{links}*" masquerade
{masquerade_v6}  }}
}}
"#
    );
    text + &strangers(name, opened)
}

/// The interfaces between which nothing but the containers' packets is forwarded.
pub(super) fn strangers(table: &str, opened: &Opened) -> String {
    let mut text = String::new();
    for (set, family, names) in [("opened4", "ipv4", &opened.v4), ("opened6", "ipv6", &opened.v6)] {
        let _ = writeln!(text, "flush set inet {table} {set}");
        // Who has switched forwarding on for the whole host since then wants it for others, too.
        if !names.is_empty() && !super::forwarding::forwards_all(family) {
            let names: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
            let _ = writeln!(text, "add element inet {table} {set} {{ {} }}", names.join(", "));
        }
    }
    text
}

/// The rules of one app, in the place of earlier ones, in one transaction.
pub(super) fn policy(table: &str, group: u32, rules: &Rules) -> String {
    let mut text = format!(
        "add set inet {table} r{group}_4 {{ type ipv4_addr . inet_proto . inet_service; flags dynamic,timeout; size 32; timeout 10m; }}\n\
         add set inet {table} r{group}_6 {{ type ipv6_addr . inet_proto . inet_service; flags dynamic,timeout; size 32; timeout 10m; }}\n\
         add chain inet {table} p{group}\nadd chain inet {table} h{group}\n\
         flush chain inet {table} p{group}\nflush chain inet {table} h{group}\n"
    );
    let mut rule = |chain: &str, rule: String| {
        let _ = writeln!(text, "add rule inet {table} {chain}{group} {rule}");
    };
    for listed in &rules.listed {
        let (family, protocol) = (family(listed.net.addr()), if listed.udp { "udp" } else { "tcp" });
        let accept = format!("{family} daddr {} {protocol} dport {} accept", listed.net, listed.port);
        // A wider net means others: this host only when it is listed by its own address.
        if listed.net.prefix_len() == listed.net.max_prefix_len() {
            rule("h", accept.clone());
        }
        rule("p", accept);
    }
    for resolver in &rules.resolvers {
        for chain in ["h", "p"] {
            let family = family(*resolver);
            rule(chain, format!("{family} daddr {resolver} meta l4proto {{ tcp, udp }} th dport 53 accept"));
        }
    }
    if rules.internet {
        rule("p", "ip daddr != @inside4 accept".to_owned());
        rule("p", "ip6 daddr 2000::/3 ip6 daddr != @inside6 accept".to_owned());
    }
    // What is refused is remembered, to be told.
    for chain in ["h", "p"] {
        rule(chain, format!("update @r{group}_4 {{ ip daddr . meta l4proto . th dport }}"));
        rule(chain, format!("update @r{group}_6 {{ ip6 daddr . meta l4proto . th dport }}"));
    }
    let _ = writeln!(text, "add element inet {table} policies {{ {group} : jump p{group} }}");
    let _ = writeln!(text, "add element inet {table} policies_here {{ {group} : jump h{group} }}");
    text
}

/// Takes an app's rules away: what still runs reaches nothing.
pub(super) fn no_policy(table: &str, group: u32) -> String {
    format!(
        "delete element inet {table} policies {{ {group} }}\ndelete element inet {table} policies_here {{ {group} }}\n\
         delete chain inet {table} p{group}\ndelete chain inet {table} h{group}\n\
         delete set inet {table} r{group}_4\ndelete set inet {table} r{group}_6\n"
    )
}

fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ip" } else { "ip6" }
}
