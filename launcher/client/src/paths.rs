//! Where things are beneath a state folder, and who runs as whom; one place for all programs.

use std::path::{Path, PathBuf};

/// Default state folder.
pub const DEFAULT_STATE: &str = "/var/lib/fastcontainer";
/// Group that may reach the sockets.
pub const GROUP_ID: u32 = 60_900;
/// User of the CoreAPI.
pub const COREAPI_UID: u32 = 60_901;
/// User of the proxy.
pub const PROXY_UID: u32 = 60_902;
/// User of the processes that fetch images.
pub const FETCH_UID: u32 = 60_908;

/// A state folder; everything that FastContainer keeps on a host is beneath it.
#[derive(Clone, Debug)]
pub struct StateDir(PathBuf);

impl StateDir {
    /// `root` need not exist yet.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self(root.into())
    }

    /// The folder itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// The launcher's own: journal, images, staging; 0700 root.
    #[must_use]
    pub fn launcher(&self) -> PathBuf {
        self.0.join("launcher")
    }

    /// Where images are fetched, each in a folder of its own; 0711.
    #[must_use]
    pub fn fetch(&self) -> PathBuf {
        self.0.join("fetch")
    }

    /// Sockets; 0711.
    #[must_use]
    pub fn run(&self) -> PathBuf {
        self.0.join("run")
    }

    /// The launcher's socket.
    #[must_use]
    pub fn launcher_socket(&self) -> PathBuf {
        self.run().join("launcher.sock")
    }

    /// The proxy's admin socket.
    #[must_use]
    pub fn proxy_socket(&self) -> PathBuf {
        self.run().join("proxy").join("proxy.sock")
    }

    /// The CoreAPI's socket, for root.
    #[must_use]
    pub fn api_socket(&self) -> PathBuf {
        self.run().join("api").join("api.sock")
    }

    /// The CoreAPI's own: its audit log; owned by its user.
    #[must_use]
    pub fn coreapi(&self) -> PathBuf {
        self.0.join("coreapi")
    }

    /// The proxy's own: last-known-good file, access log; owned by the proxy's user.
    #[must_use]
    pub fn proxy(&self) -> PathBuf {
        self.0.join("proxy")
    }
}
