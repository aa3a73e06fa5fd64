//! The program `nft`, which turns rules into what the kernel understands. It runs when an app's rules change, never when a
//! container starts.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

/// No change of rules takes so long.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why rules are not in force.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// It is not installed.
    #[error("the program `nft` cannot be run ({0}); install the package nftables")]
    Missing(io::Error),
    /// It would not.
    #[error("nft refuses: {0}")]
    Refused(String),
    /// It hangs.
    #[error("nft does not end")]
    Hangs,
}

/// Puts rules into force: all of them or none.
pub(super) async fn apply(rules: &str) -> Result<(), NftError> {
    run(&["-f", "-"], rules).await.map(drop)
}

/// Whether the table is there.
pub(super) async fn has_table(name: &str) -> Result<bool, NftError> {
    let tables = run(&["list", "tables", "inet"], "").await?;
    Ok(tables.lines().any(|line| line.split_whitespace().last() == Some(name)))
}

/// The table's sets with their elements, as JSON.
pub(super) async fn sets(table: &str) -> Result<serde_json::Value, NftError> {
    // `list sets` shows no elements of dynamic sets.
    let text = run(&["-j", "-n", "list", "table", "inet", table], "").await?;
    serde_json::from_str(&text).map_err(|error| NftError::Refused(error.to_string()))
}

async fn run(arguments: &[&str], input: &str) -> Result<String, NftError> {
    let mut child = Command::new("nft")
        .args(arguments)
        .env("PATH", crate::hooks::PATH)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(NftError::Missing)?;
    let stdin = child.stdin.take();
    let ended = async {
        if let Some(mut stdin) = stdin {
            // If it ends without reading, its status says why.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(PATIENCE, ended)
        .await
        .map_err(|_| NftError::Hangs)?
        .map_err(NftError::Missing)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let first: Vec<&str> = complaint.lines().take(2).collect();
    Err(NftError::Refused(first.join(" ")))
}
