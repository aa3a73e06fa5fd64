//! Vhost files.

use std::path::Path;

use cmdb::vhost::{parse_file, render};
use proptest::prelude::*;

use crate::damage::{cases, corpus, damaged};

#[test]
fn the_examples_are_understood() {
    for file in corpus("vhosts") {
        parse_file(Path::new("blog.toml"), &file, Path::new("/")).expect("a good example");
    }
}

proptest! {
    #![proptest_config(cases(500))]

    #[test]
    fn no_vhost_file_makes_its_reader_panic_and_every_fault_can_be_shown(bytes in damaged(corpus("vhosts"))) {
        match parse_file(Path::new("blog.toml"), &bytes, Path::new("/")) {
            Ok(app) => {
                // What is in force goes over the launcher's socket.
                let told = serde_json::to_vec(&app).unwrap();
                prop_assert_eq!(serde_json::from_slice::<cmdb::App>(&told).unwrap(), app);
            }
            Err(faults) => {
                prop_assert!(!faults.is_empty(), "an error without a fault");
                for fault in faults {
                    prop_assert!(!render(&fault, std::str::from_utf8(&bytes).ok(), true).is_empty());
                }
            }
        }
    }
}
