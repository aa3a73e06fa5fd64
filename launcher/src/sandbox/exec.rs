//! The app's program: where it is, and its start.

use std::ffi::CString;

use nix::errno::Errno;
use rustix::fs::Mode;

use super::plan::Plan;
use super::step::{About, Failure};
use super::sys;
use super::user::Account;

/// Where programs are looked for if the environment has no `PATH`; Docker's default.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Everything that `execve` needs, in its form.
pub(super) struct Program {
    /// Candidates, in order of preference.
    paths: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
    name: String,
}

impl Program {
    /// Prepares the call; `HOME` comes from the account if the plan has none.
    pub(super) fn new(plan: &Plan, account: &Account) -> Result<Program, Failure> {
        let name = plan.argv.first().cloned().unwrap_or_default();
        let value = |key: &str| plan.env.iter().find_map(|entry| entry.strip_prefix(key)?.strip_prefix('='));
        let paths = if name.contains('/') {
            vec![c_string(&name)?]
        } else {
            let path = value("PATH").unwrap_or(DEFAULT_PATH);
            path.split(':')
                .map(|place| c_string(&format!("{}/{name}", if place.is_empty() { "." } else { place })))
                .collect::<Result<_, _>>()?
        };
        let argv = plan.argv.iter().map(|argument| c_string(argument)).collect::<Result<_, _>>()?;
        let mut env = plan.env.iter().map(|entry| c_string(entry)).collect::<Result<Vec<_>, _>>()?;
        if value("HOME").is_none() {
            env.push(c_string(&format!("HOME={}", account.home))?);
        }
        Ok(Program { paths, argv, env, name })
    }

    /// Marks every descriptor but the standard three close-on-exec and starts the program. Returns only a failure.
    pub(super) fn exec(&self) -> Failure {
        rustix::process::umask(Mode::from_raw_mode(0o022));
        // No descriptor of the host's may be alive inside, nor be the working directory (CVE-2024-21626).
        if let Err(error) = sys::close_on_exec_from(3) {
            return Failure::new(error.raw_os_error().unwrap_or(libc::EIO), "close_range");
        }
        let mut failure = Errno::ENOENT;
        for path in &self.paths {
            let Err(errno) = nix::unistd::execve(path, &self.argv, &self.env);
            match errno {
                Errno::ENOENT | Errno::ENOTDIR => {}
                // As execvp: a program that cannot be run is reported only if there is no other of its name.
                Errno::EACCES => failure = errno,
                other => return Failure::new(other as i32, &self.name),
            }
        }
        Failure::new(failure as i32, &self.name)
    }
}

/// Goes to the plan's working directory, as the app's user, and makes sure that it is inside.
pub(super) fn enter_workdir(plan: &Plan) -> Result<(), Failure> {
    let directory = if plan.workdir.is_empty() { "/" } else { &plan.workdir };
    rustix::process::chdir(directory).about(directory)?;
    let here = nix::unistd::getcwd().about(directory)?;
    if here.is_absolute() { Ok(()) } else { Err(Failure::new(libc::EXDEV, directory)) }
}

fn c_string(text: &str) -> Result<CString, Failure> {
    CString::new(text).map_err(|_| Failure::new(libc::EINVAL, format!("NUL in {text:?}")))
}
