//! What the test and demonstration applications share: a small HTTP/1.1 reader and writer without any I/O of its own,
//! a listening socket with a deep queue, and the clock.
#![forbid(unsafe_code)]

pub mod clock;
pub mod http;
pub mod socket;
