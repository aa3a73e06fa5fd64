//! The launcher's socket: wire types and the client that the proxy, the CoreAPI and the operator's command share.
//!
//! `SOCK_SEQPACKET`, one bounded, versioned JSON message per packet; descriptors travel as ancillary data (DESIGN.md §6).
#![forbid(unsafe_code)]

pub mod admin;
mod client;
mod governor;
pub mod home;
pub mod packet;
pub mod paths;
pub mod usage;
pub mod wire;

pub use client::{Client, ClientError, Woken};
pub use governor::{GovernorMode, ModeError};
