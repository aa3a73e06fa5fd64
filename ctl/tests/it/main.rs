//! Black-box stories: the real `fastcontainer up` with real containers, seen from outside. They need root and the images
//! (`make images`); without them they fail, they are never skipped.
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    dead_code,
    reason = "a test fails by panicking; the harness serves more stories than any one file tells"
)]

mod cluster;
mod host;
mod http;
mod lan;
mod vhost;

mod api;
mod chaos;
mod commands;
mod config;
mod crash;
mod edge;
mod failing;
mod git;
mod hogs;
mod hooks;
mod hosts;
mod images;
mod isolation;
mod leak;
mod lifecycle;
mod many;
mod metrics;
mod network;
mod oci;
mod orders;
mod provision;
mod registry;
mod scaling;
mod sleep;
mod starved;
mod storm;

mod tiers;
mod token_registry;
mod usage;
mod volumes;
mod wake;
