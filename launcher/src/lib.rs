//! The FastContainer launcher: a root daemon that creates, limits, watches and ends containers.
#![deny(unsafe_code)]

mod asyncfd;
pub mod cgroup;
pub mod image;
pub mod keeper;
pub mod network;
pub mod ready;
pub mod sandbox;
pub mod spawner;
