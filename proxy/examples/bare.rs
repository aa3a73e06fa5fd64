//! A bare Pingora proxy, with nothing of ours: what `make bench` compares FastContainer with.
//!
//! ```text
//! bare LISTEN UPSTREAM, for example: bare 127.0.0.1:8092 127.0.0.1:8090
//! ```
#![forbid(unsafe_code)]

use std::net::SocketAddr;

use async_trait::async_trait;
use pingora::{
    proxy::{ProxyHttp, Session, http_proxy_service},
    server::{Server, configuration::ServerConf},
    upstreams::peer::HttpPeer,
};

struct Bare(SocketAddr);

#[async_trait]
impl ProxyHttp for Bare {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, _: &mut Session, (): &mut ()) -> pingora::Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(self.0, false, String::new())))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(listen), Some(upstream)) = (arguments.next(), arguments.next()) else {
        return Err("usage: bare LISTEN UPSTREAM".into());
    };
    let threads = std::thread::available_parallelism()?.get();
    let folder = std::env::temp_dir();
    let file = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let conf = ServerConf {
        threads,
        work_stealing: false,
        upstream_keepalive_pool_size: 1024,
        pid_file: file("bare.pid"),
        upgrade_sock: file("bare.sock"),
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    let mut service = http_proxy_service(&server.configuration, Bare(upstream.parse()?));
    service.add_tcp(&listen);
    server.add_service(service);
    server.run_forever();
}
