//! What happens to a request, in this order, a file each: resolve, admit, hold, pick, forward, measure, log.
//!
//! `FastContainer` in the crate's root hangs them into Pingora's callbacks.

use std::{net::IpAddr, sync::Arc};

use pingora::{protocols::l4::socket::SocketAddr, proxy::Session};

use crate::{
    dispatch::Hop, lease::Lease, measure::Stopwatch, nodes::Remote, pages::Fault, telemetry::RequestId,
    tenant::AppRuntime,
};

pub mod admit;
pub mod forward;
pub mod hold;
pub mod log;
pub mod measure;
pub mod pick;
pub mod resolve;

/// What is known of one request on its way.
#[derive(Debug)]
pub struct Ctx {
    /// Where its time goes.
    pub watch: Stopwatch,
    /// Who asks: the address at the other end, or what a proxy that is believed says of it.
    pub client: Option<IpAddr>,
    /// Whether the client came by TLS.
    pub https: bool,
    /// What another host's proxy says of it; `None`: it came from a client.
    pub hop: Option<Hop>,
    /// Whether it is none of a visitor: a proxy has asked for a wake.
    pub errand: bool,
    /// Whether the dispatcher that it was sent to has not taken it.
    pub misdirected: bool,
    /// How often that was so.
    pub moves: u32,
    /// The other host that serves it, and counts it.
    pub away: Option<Arc<Remote>>,
    /// Its id; `x-request-id`.
    pub request_id: RequestId,
    /// Its app, once resolved.
    pub app: Option<Arc<AppRuntime>>,
    /// Its place on an instance, while it has one.
    pub lease: Option<Lease>,
    /// Why it is not answered by the app, when it is not.
    pub fault: Option<Fault>,
    /// Connection attempts that failed (nothing was sent in them).
    pub unconnected: u32,
    /// Attempts that failed after bytes were sent, and were made again.
    pub resent: u32,
    /// Whether it waited in the waiting room.
    pub held: bool,
    /// Whether an instance was started while it waited.
    pub cold: bool,
    /// Whether the client asked for `Server-Timing`.
    pub timing_wanted: bool,
    /// Whether the response's header has come.
    pub answered: bool,
    /// How long the app took to the first byte, µs; `None` before.
    pub first_byte_us: Option<u64>,
    /// The instance that served it, kept for the log when the lease is gone.
    pub generation: Option<cmdb::Generation>,
}

impl Ctx {
    /// For a request that has just come.
    #[must_use]
    pub fn new() -> Self {
        Self {
            watch: Stopwatch::begin(),
            client: None,
            https: false,
            hop: None,
            errand: false,
            misdirected: false,
            moves: 0,
            away: None,
            request_id: RequestId::random(),
            app: None,
            lease: None,
            fault: None,
            unconnected: 0,
            resent: 0,
            held: false,
            cold: false,
            timing_wanted: false,
            answered: false,
            first_byte_us: None,
            generation: None,
        }
    }

    /// Notes why the app does not answer, and gives what Pingora carries.
    #[must_use]
    pub fn fail(&mut self, fault: Fault) -> Box<pingora::Error> {
        let error = fault.clone().into_error();
        self.fault = Some(fault);
        error
    }
}

impl Default for Ctx {
    fn default() -> Self {
        Self::new()
    }
}

/// The client's address.
#[must_use]
pub fn client_ip(session: &Session) -> Option<IpAddr> {
    session.client_addr().and_then(SocketAddr::as_inet).map(|address| address.ip().to_canonical())
}
