//! FastContainer's CMDB: the model, its one state machine, the stores, the cache and the vhost file format.
//!
//! Nothing here does network I/O on behalf of a request: proxies read a [`cache`] that a watch keeps fresh.
#![forbid(unsafe_code)]

pub mod app;
pub mod cache;
pub mod compute;
pub mod embedded;
pub mod fingerprint;
pub mod hook;
pub mod instance;
mod mirror;
pub mod network;
pub mod origin;
pub mod placement;
pub mod provision;
pub mod redis;
pub mod store;
pub mod transition;
pub mod units;
pub mod vhost;

pub use app::{App, AppName, HostPattern};
pub use instance::{Generation, Instance, InstanceId, State};
pub use origin::Origin;
pub use store::{Change, Store, StoreError};
pub use transition::{AppRecord, Outcome, Transition};
