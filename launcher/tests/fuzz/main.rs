//! Whatever comes from outside is damaged in every way: packets of the two sockets, archives, vhost files.
//!
//! Each test takes good and hostile examples from `corpus/`, edits them at random, and looks that nothing panics, hangs,
//! grows or gets out. The runs are short; `FC_FUZZ=100` makes them a hundred times as long. What fails is shrunk to its
//! least form by proptest: put that into `corpus/`, where every run begins with it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking; its name says what it is about"
)]

mod archives;
mod damage;
mod packets;
mod socket;
mod vhosts;
