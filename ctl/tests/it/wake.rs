//! The first requests to an app that does not run.

use std::sync::{Arc, Barrier};

use crate::{
    host::Host,
    http::{Connection, get},
    vhost::Vhost,
};

#[test]
fn five_hundred_first_requests_make_one_start_and_are_all_answered() {
    let blog = Vhost::probe("blog");
    let host = Arc::new(Host::up(&[&blog]));
    assert_eq!(host.states("blog"), ["absent"], "nothing runs before the first request");

    let barrier = Arc::new(Barrier::new(500));
    let clients: Vec<_> = (0..500)
        .map(|_| {
            let (host, barrier, blog) = (Arc::clone(&host), Arc::clone(&barrier), blog.clone());
            std::thread::spawn(move || {
                let mut connection = Connection::open(host.port);
                barrier.wait();
                connection.exchange(&get(&blog.host(), "/")).map(|response| response.generation())
            })
        })
        .collect();
    let generations: Vec<u64> = clients.into_iter().map(|client| client.join().unwrap().unwrap()).collect();

    assert!(generations.iter().all(|generation| *generation == generations[0]), "one instance answered all");
    assert_eq!(host.count("blog", "wake"), 1);
    Arc::into_inner(host).unwrap().end();
}
