//! What the two sockets' packets are read into.

use std::os::fd::{AsFd as _, OwnedFd};

use launcher::spawner::wire;
use launcher_client::wire::{ClientPacket, ServerPacket};
use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::damage::{cases, corpus, damaged};

#[test]
fn the_examples_are_understood() {
    for packet in corpus("packets") {
        let text = String::from_utf8_lossy(&packet).into_owned();
        serde_json::from_slice::<ClientPacket>(&packet).unwrap_or_else(|error| panic!("{error}: {text}"));
    }
    for packet in corpus("spawner") {
        let text = String::from_utf8_lossy(&packet).into_owned();
        let request = serde_json::from_slice::<wire::Request>(&packet).map(drop);
        let event = serde_json::from_slice::<wire::Event>(&packet).map(drop);
        request.or(event).unwrap_or_else(|error| panic!("{error}: {text}"));
    }
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
