//! How an image wants to be run.

use nix::libc::SIGTERM;
use nix::sys::signal::Signal;
use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use super::OciError;

/// What an image says of how it is to be run; a vhost file overrides each part. Empty for images that say nothing.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct ImageConfig {
    /// `Entrypoint` and `Cmd`: program and arguments.
    pub command: Vec<String>,
    /// `Env`: names and values.
    pub env: Vec<(String, String)>,
    /// `User`.
    pub user: String,
    /// `WorkingDir`.
    pub workdir: String,
    /// The one TCP port of `ExposedPorts`; `None` when there are none or several.
    pub port: Option<u16>,
    /// `StopSignal`, as a number; `None`: SIGTERM.
    pub stop_signal: Option<i32>,
}

impl ImageConfig {
    pub(super) fn of(image: &ImageConfiguration) -> Result<ImageConfig, OciError> {
        let Some(config) = image.config() else { return Ok(ImageConfig::default()) };
        let mut command = config.entrypoint().clone().unwrap_or_default();
        command.extend(config.cmd().clone().unwrap_or_default());
        let env = config.env().iter().flatten();
        let env: Vec<(String, String)> = env
            .filter_map(|entry| entry.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let workdir = config.working_dir().clone().unwrap_or_default();
        if !workdir.is_empty() && !workdir.starts_with('/') {
            return Err(OciError::Config(format!("WorkingDir {workdir:?} is no absolute path")));
        }
        let texts =
            command.iter().chain(env.iter().flat_map(|(name, value)| [name, value])).chain([&workdir]);
        if texts.clone().any(|text| text.contains('\0')) {
            return Err(OciError::Config("a text holds a zero byte".to_owned()));
        }
        // It travels to the spawner in one packet.
        if texts.map(String::len).sum::<usize>() > MAX_TEXT {
            return Err(OciError::Config(format!(
                "command and environment are longer than {MAX_TEXT} bytes"
            )));
        }
        Ok(ImageConfig {
            command,
            env,
            user: config.user().clone().unwrap_or_default(),
            workdir,
            port: port(config.exposed_ports().as_deref().unwrap_or_default()),
            stop_signal: config.stop_signal().as_deref().map(stop_signal).transpose()?,
        })
    }

    /// The signal that asks the app to end.
    #[must_use]
    pub fn stop_signal(&self) -> i32 {
        self.stop_signal.unwrap_or(SIGTERM)
    }
}

const MAX_TEXT: usize = 24 << 10;

/// `80/tcp` or `80`; anything else is not for us.
fn port(exposed: &[String]) -> Option<u16> {
    let mut ports = exposed.iter().filter_map(|port| {
        let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
        number.parse::<u16>().ok().filter(|number| protocol == "tcp" && *number > 0)
    });
    let first = ports.next()?;
    ports.next().is_none().then_some(first)
}

/// `SIGQUIT`, `QUIT` or `3`.
fn stop_signal(text: &str) -> Result<i32, OciError> {
    let unknown = || OciError::Config(format!("StopSignal {text:?} is no signal that is known"));
    if let Ok(number) = text.parse::<i32>() {
        return Signal::try_from(number).map(|signal| signal as i32).map_err(|_| unknown());
    }
    let name = if text.starts_with("SIG") { text.to_owned() } else { format!("SIG{text}") };
    name.parse::<Signal>().map(|signal| signal as i32).map_err(|_| unknown())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exposed(ports: &[&str]) -> Option<u16> {
        port(&ports.iter().map(|port| (*port).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn one_exposed_tcp_port_is_the_apps() {
        assert_eq!(exposed(&["80/tcp"]), Some(80));
        assert_eq!(exposed(&["8080", "53/udp"]), Some(8080));
        assert_eq!(exposed(&["80/tcp", "443/tcp"]), None);
        assert_eq!(exposed(&["0/tcp", "x", "80-90/tcp"]), None);
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["SIGQUIT", "QUIT", "3"] {
            assert_eq!(stop_signal(text).unwrap(), 3, "{text}");
        }
        assert!(stop_signal("SIGNIFICANT").is_err());
        assert!(stop_signal("-1").is_err());
    }
}
