//! Where the CMDB's Redis is, and connections to it.

use std::time::Duration;

use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, IntoConnectionInfo as _, ProtocolVersion, RedisResult,
    TlsMode,
    aio::{AsyncPushSender, MultiplexedConnection},
    sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType},
};
use tokio::{sync::Mutex, time::timeout};

/// The port of a Sentinel where none is given.
const SENTINEL_PORT: u16 = 26_379;
/// The longest that making a connection may take.
const CONNECT: Duration = Duration::from_millis(500);

/// Why a `--cmdb` address cannot be used; the text says what can.
#[derive(Debug, thiserror::Error)]
#[error("the CMDB's address {address:?} cannot be used: {reason}")]
pub struct AddressError {
    address: String,
    reason: String,
}

/// See the module.
pub(super) enum Address {
    Single(Client),
    /// Asks the Sentinels for the primary with every new connection.
    Sentinel(Mutex<SentinelClient>),
}

impl Address {
    /// Reads `redis://[user[:password]@]host[:port][/db]`, `rediss://…`, `redis+unix:///path`, or
    /// `redis-sentinel://[user[:password]@]host[:port][,host[:port]…]/service` (`rediss-sentinel` for TLS).
    pub(super) fn parse(address: &str) -> Result<Self, AddressError> {
        let refuse = |reason: String| AddressError { address: without_password(address), reason };
        if let Some((tls, rest)) = sentinel(address) {
            return sentinels(tls, rest).map(|client| Self::Sentinel(Mutex::new(client))).map_err(refuse);
        }
        let info = address.into_connection_info().map_err(|error| {
            refuse(format!("{error}; write redis://host:port, rediss://user:password@host:port or redis-sentinel://host:port,host:port/service"))
        })?;
        let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
        let client = Client::open(info.set_redis_settings(settings)).map_err(|e| refuse(e.to_string()))?;
        Ok(Self::Single(client))
    }

    /// Whom the Sentinels call primary now; `None` where nobody is asked, or nobody answers.
    pub(super) async fn primary(&self) -> Option<String> {
        match self {
            Self::Single(_) => None,
            Self::Sentinel(client) => {
                let client = timeout(CONNECT, async { client.lock().await.async_get_client().await });
                Some(client.await.ok()?.ok()?.get_connection_info().addr().to_string())
            }
        }
    }

    /// A connection on which no answer takes longer than `response`; pushes go to `pushes`.
    pub(super) async fn connect(
        &self,
        response: Duration,
        pushes: Option<impl AsyncPushSender>,
    ) -> RedisResult<MultiplexedConnection> {
        let mut config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT))
            .set_response_timeout(Some(response));
        if let Some(pushes) = pushes {
            config = config.set_push_sender(pushes);
        }
        match self {
            Self::Single(client) => client.get_multiplexed_async_connection_with_config(&config).await,
            Self::Sentinel(client) => client.lock().await.get_async_connection_with_config(&config).await,
        }
    }
}

impl std::fmt::Debug for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The client's own form holds the password.
        f.write_str(match self {
            Self::Single(_) => "Address::Single",
            Self::Sentinel(_) => "Address::Sentinel",
        })
    }
}

fn sentinel(address: &str) -> Option<(bool, &str)> {
    let plain = address.strip_prefix("redis-sentinel://").map(|rest| (false, rest));
    plain.or_else(|| address.strip_prefix("rediss-sentinel://").map(|rest| (true, rest)))
}

fn sentinels(tls: bool, rest: &str) -> Result<SentinelClient, String> {
    let (login, rest) = rest.rsplit_once('@').map_or((None, rest), |(login, rest)| (Some(login), rest));
    let (hosts, service) =
        rest.split_once('/').ok_or("the name of the service is missing: …host:port/service")?;
    if service.is_empty() || service.contains('/') {
        return Err("the name of the service is missing: …host:port/service".to_owned());
    }
    let hosts = hosts.split(',').map(|host| host_and_port(host, tls)).collect::<Result<Vec<_>, _>>()?;
    let mut builder = SentinelClientBuilder::new(hosts, service, SentinelServerType::Master)
        .map_err(|e| e.to_string())?
        .set_client_to_redis_protocol(ProtocolVersion::RESP3);
    if tls {
        builder = builder.set_client_to_redis_tls_mode(TlsMode::Secure);
    }
    if let Some(login) = login {
        let (user, password) = login.split_once(':').unwrap_or((login, ""));
        if !user.is_empty() {
            builder = builder.set_client_to_redis_username(user);
        }
        if !password.is_empty() {
            builder = builder.set_client_to_redis_password(password);
        }
    }
    builder.build().map_err(|e| e.to_string())
}

fn host_and_port(text: &str, tls: bool) -> Result<ConnectionAddr, String> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => {
            (host, port.parse().map_err(|_| format!("{port:?} is no port; write 1 to 65535"))?)
        }
        None => (text, SENTINEL_PORT),
    };
    if host.is_empty() {
        return Err("a Sentinel's host name is missing".to_owned());
    }
    let host = host.to_owned();
    Ok(if tls {
        ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None }
    } else {
        ConnectionAddr::Tcp(host, port)
    })
}

/// The address as it may be shown.
fn without_password(address: &str) -> String {
    match (address.find("://"), address.rfind('@')) {
        (Some(scheme), Some(at)) if scheme + 3 <= at => {
            format!("{}…{}", &address[..scheme + 3], &address[at..])
        }
        _ => address.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_every_kind_are_read() {
        for good in [
            "redis://127.0.0.1:6379",
            "rediss://fc:secret@cmdb.internal:6380/2",
            "redis+unix:///run/redis.sock",
            "redis-sentinel://10.0.0.1,10.0.0.2:26380/cmdb",
            "rediss-sentinel://fc:secret@10.0.0.1/cmdb",
        ] {
            assert!(Address::parse(good).is_ok(), "{good}: {:?}", Address::parse(good).err());
        }
    }

    #[test]
    fn a_bad_address_is_refused_with_the_mend_and_without_the_password() {
        for bad in [
            "http://fc:secret@host",
            "redis-sentinel://fc:secret@10.0.0.1",
            "redis-sentinel://fc:secret@10.0.0.1:x/cmdb",
            "redis-sentinel://fc:secret@/cmdb",
        ] {
            let message = Address::parse(bad).unwrap_err().to_string();
            assert!(!message.contains("secret"), "{message}");
        }
    }
}
