//! Real containers, looked at from inside and outside. Needs root.
//!
//! There is no test harness because containers must be cloned from a single-threaded process, as the spawner is.
//! `cargo test --test sandbox NAME` runs the tests whose names contain NAME.

mod lab;
mod notify;

use lab::{Container, Image};

type Test = (&'static str, fn());

const TESTS: &[Test] = &[("smoke", smoke)];

fn smoke() {
    let image = Image::new();
    let o = Container::shell(&image, "id; hostname; cat /proc/self/status /proc/self/mountinfo; ls -la / /dev /proc /sys; busybox ip a; cat /etc/hosts; ls -la /proc/self/fd").run();
    println!("{}\n{}\n{:#?} {:?} {} {:?}", o.stdout, o.stderr, o.error, o.timings, o.code, o.to_exec);
}

fn main() {
    assert!(rustix::process::geteuid().is_root(), "these tests make containers: run them as root");
    let wanted = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    for (name, test) in
        TESTS.iter().filter(|(name, _)| wanted.as_ref().is_none_or(|part| name.contains(part)))
    {
        test();
        println!("test {name} ... ok");
    }
}
