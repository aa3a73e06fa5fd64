//! The FastContainer launcher: a root daemon that creates, limits, watches and ends containers.
#![deny(unsafe_code)]

pub mod sandbox;
