//! `fastcontainer-launcher`: for now only its spawner.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    launcher::spawner::run()
}
