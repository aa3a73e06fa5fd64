//! Who a peer is and what it may ask.

use std::fmt;

use launcher_client::wire::Request;

/// Which users play which part on this host.
#[derive(Clone, Copy, Debug)]
pub struct Identities {
    /// The CoreAPI's.
    pub coreapi: u32,
    /// The proxy's.
    pub proxy: u32,
}

/// The part that a peer plays.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// Root: the operator.
    Operator,
    /// Owns the configuration.
    CoreApi,
    /// Serves requests.
    Proxy,
    /// Nobody that is known.
    Stranger,
}

impl Identities {
    /// The part of the user `uid`.
    #[must_use]
    pub fn role(&self, uid: u32) -> Role {
        match uid {
            0 => Role::Operator,
            uid if uid == self.coreapi => Role::CoreApi,
            uid if uid == self.proxy => Role::Proxy,
            _ => Role::Stranger,
        }
    }
}

impl Role {
    /// Whether this part may ask that.
    #[must_use]
    pub fn may(self, request: &Request) -> bool {
        match self {
            Self::Operator => true,
            Self::Stranger => false,
            Self::CoreApi => matches!(
                request,
                Request::Watch { .. }
                    | Request::PutApp { .. }
                    | Request::RemoveApp { .. }
                    | Request::Note { .. }
                    | Request::Ps { .. }
                    | Request::Events { .. }
                    | Request::Nodes
                    // On behalf of those whose tokens it has checked; never with sockets.
                    | Request::Wake { sockets: 0, .. }
                    | Request::WakeTiming { .. }
                    | Request::Stop { .. }
                    | Request::Restart { .. }
                    | Request::Limit { .. }
                    | Request::Scale { .. }
                    | Request::Signal { .. }
                    | Request::Logs { .. }
                    | Request::Usage { .. }
                    | Request::Images
                    | Request::Drain { .. }
                    | Request::Forget { .. }
            ),
            Self::Proxy => matches!(
                request,
                Request::Watch { .. }
                    | Request::Wake { .. }
                    | Request::Sockets { .. }
                    | Request::FirstByte { .. }
                    | Request::Report { .. }
                    | Request::Traffic { .. }
                    | Request::Quiesced { .. }
                    | Request::Suspect { .. }
                    | Request::Unreachable { .. }
                    | Request::WakeTiming { .. }
                    | Request::Nodes
            ),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Operator => "it is the operator",
            Self::CoreApi => "it is the CoreAPI",
            Self::Proxy => "it is the proxy",
            Self::Stranger => "it is none of root, the CoreAPI and the proxy",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_may_do_its_own_work_only() {
        let identities = Identities { coreapi: 60_901, proxy: 60_902 };
        let app = || "blog".parse::<cmdb::AppName>().unwrap();
        let wake = Request::Wake { app: app(), sockets: 1 };
        let remove = Request::RemoveApp { app: app(), origin: None };
        let look = Request::Wake { app: app(), sockets: 0 };
        let stop = Request::Stop { app: app() };

        assert!(
            identities.role(0).may(&wake) && identities.role(0).may(&remove) && identities.role(0).may(&stop)
        );
        assert!(identities.role(60_902).may(&wake) && !identities.role(60_902).may(&remove));
        assert!(identities.role(60_901).may(&remove) && identities.role(60_901).may(&stop));
        assert!(identities.role(60_901).may(&look) && !identities.role(60_901).may(&wake), "no sockets");
        assert!(!identities.role(60_902).may(&stop));
        assert_eq!(identities.role(33), Role::Stranger);
        assert!(!Role::Stranger.may(&Request::Ps { app: None }));
    }
}
