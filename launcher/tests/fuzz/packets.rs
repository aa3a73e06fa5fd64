//! What the two sockets' packets are read into.

use std::os::fd::{AsFd as _, OwnedFd};

use launcher::spawner::wire;
use launcher_client::wire::{ClientPacket, ServerPacket};
use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::damage::{cases, corpus, damaged};

/// Examples that the protocol has left behind damage nothing, but when most are such, they are to be written anew.
#[test]
fn most_examples_are_understood() {
    let of_clients = corpus("packets");
    let bad = of_clients.iter().filter(|packet| serde_json::from_slice::<ClientPacket>(packet).is_err());
    assert!(bad.count() * 4 < of_clients.len());
    let of_spawners = corpus("spawner");
    let bad = of_spawners.iter().filter(|packet| {
        serde_json::from_slice::<wire::Request>(packet).is_err()
            && serde_json::from_slice::<wire::Event>(packet).is_err()
    });
    assert!(bad.count() * 4 < of_spawners.len());
}

proptest! {
    #![proptest_config(cases(2_000))]

    #[test]
    fn no_packet_of_a_client_makes_the_launcher_panic(bytes in damaged(corpus("packets"))) {
        // What is understood at all must survive being told on.
        if let Ok(packet) = serde_json::from_slice::<ClientPacket>(&bytes) {
            let told = serde_json::to_vec(&packet).unwrap();
            serde_json::from_slice::<ClientPacket>(&told).unwrap();
        }
        let _ = serde_json::from_slice::<ServerPacket>(&bytes);
    }

    #[test]
    fn no_packet_between_launcher_and_spawner_makes_either_panic(
        bytes in damaged(corpus("spawner")),
        fds in 0usize..8,
    ) {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let row: Vec<OwnedFd> = (0..fds).map(|_| ours.try_clone().unwrap()).collect();
        let borrowed: Vec<_> = row.iter().map(|fd| fd.as_fd()).collect();
        if !bytes.is_empty() && wire::send(ours.as_fd(), &bytes, &borrowed).is_ok()
            && let Ok(Some((request, received))) = wire::receive::<wire::Request>(theirs.as_fd())
        {
            prop_assert_eq!(received.len(), fds);
            if let wire::Request::Create { fds: counts, .. } = request {
                let _ = counts.unpack(received);
            }
        }
        let _ = serde_json::from_slice::<wire::Event>(&bytes);
    }
}
