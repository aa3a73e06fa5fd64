//! An app like those that tests need.
#![allow(dead_code, reason = "each test uses its own part")]

pub(crate) mod redis;
pub(crate) mod servers;

use std::{collections::BTreeMap, time::Duration};

use cmdb::{
    App,
    app::{Container, Hold, Lifecycle, Resources, Scale},
    units::Bytes,
};

pub(crate) fn app(name: &str, host: &str) -> App {
    App {
        name: name.parse().unwrap(),
        origin: cmdb::Origin::default(),
        server_names: vec![host.parse().unwrap()],
        container: Container {
            image: "dir:/srv/images/hello".into(),
            base: None,
            command: vec!["/hello".into()],
            port: Some(8080),
            user: String::new(),
            workdir: "/".into(),
            env: BTreeMap::new(),
            provision: Vec::new(),
        },
        volumes: Vec::new(),
        network: cmdb::network::Network::default(),
        resources: Resources {
            cpu: None,
            cpu_max: None,
            memory: Bytes(1 << 28),
            pids: 64,
            disk: Bytes(1 << 28),
        },
        lifecycle: Lifecycle {
            start_timeout: Duration::from_secs(20),
            freeze_after: None,
            reclaim_after: None,
            idle_timeout: None,
            lifetime: None,
            drain_timeout: Duration::from_secs(30),
            stop_timeout: Duration::from_secs(10),
            recycle_at: None,
        },
        scale: Scale {
            min: 0,
            max: 2,
            response_time: None,
            cool_down: Scale::usual_cool_down(),
            concurrency: None,
            pick: cmdb::app::Pick::Random,
            slow_start: None,
        },
        hold: Hold {
            queue: 10,
            timeout: Duration::from_secs(30),
            page: false,
            page_after: Hold::usual_page_after(),
        },
        hooks: Vec::new(),
    }
}
