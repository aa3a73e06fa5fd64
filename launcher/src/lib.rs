//! The FastContainer launcher: a root daemon that creates, limits, watches and ends containers.
#![deny(unsafe_code)]

pub mod api;
mod asyncfd;
pub mod backlog;
pub mod cgroup;
mod clock;
mod cluster;
pub mod daemon;
mod descent;
pub mod events;
pub mod faults;
pub mod fetch;
pub mod governor;
pub mod hooks;
pub mod host;
pub mod image;
pub mod instance;
pub mod keeper;
pub mod leak;
pub mod ledger;
pub mod metrics;
pub mod monitor;
pub mod network;
pub mod outbound;
pub mod output;
pub mod overrides;
pub mod preparation;
pub mod provision;
pub mod ready;
pub mod reclaim;
pub mod sandbox;
pub mod scaler;
pub mod spawner;
pub mod supervisor;
pub mod tiers;
mod trace;
