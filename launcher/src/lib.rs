//! The FastContainer launcher: a root daemon that creates, limits, watches and ends containers.
#![deny(unsafe_code)]

pub mod api;
mod asyncfd;
pub mod cgroup;
mod clock;
pub mod daemon;
pub mod events;
pub mod faults;
pub mod governor;
pub mod host;
pub mod image;
pub mod instance;
pub mod keeper;
pub mod ledger;
pub mod listenqueue;
pub mod metrics;
pub mod monitor;
pub mod network;
pub mod outbound;
pub mod output;
pub mod overrides;
pub mod ready;
pub mod sandbox;
pub mod scaler;
pub mod spawner;
pub mod supervisor;
mod trace;
