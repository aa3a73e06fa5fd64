//! `token`: makes a token for the API.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
};

use sha2::{Digest as _, Sha256};

use crate::{cli::api, failure::Failure, output::Output};

/// Runs the command.
pub(crate) fn run(options: &api::Token, out: &mut Output) -> Result<(), Failure> {
    let name = &options.name;
    if name.is_empty() || name.len() > 64 || name.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(Failure::usage("a token's name has 1 to 64 characters without spaces"));
    }
    if ["root", "-"].contains(&name.as_str()) {
        return Err(Failure::usage("that name is one that the audit log uses itself"));
    }
    let mut random = [0_u8; 32];
    File::open("/dev/urandom")
        .and_then(|mut urandom| urandom.read_exact(&mut random))
        .map_err(|error| Failure::failed(format!("/dev/urandom: {error}")))?;
    let token = format!("fct_{}", hex(&random));
    let line = format!("{} {name} {}", options.role.as_str(), hex(&Sha256::digest(token.as_bytes())));
    if let Some(path) = &options.file {
        let mut file = std::fs::OpenOptions::new();
        // It holds hashes of random numbers, and the CoreAPI's user must read it.
        let appended = file.create(true).append(true).mode(0o644).open(path);
        // A file whose last line has no end would swallow this one.
        let open_end = std::fs::read(path).is_ok_and(|text| text.last().is_some_and(|byte| *byte != b'\n'));
        let start = if open_end { "\n" } else { "" };
        let appended = appended.and_then(|mut file| writeln!(file, "{start}{line}"));
        appended.map_err(|error| Failure::failed(format!("{}: {error}", path.display())))?;
    }
    if out.is_json() {
        return out.json(&serde_json::json!({ "token": token, "line": line }));
    }
    if options.file.is_some() {
        return out.line(&token);
    }
    out.line(&format!("token, for whoever uses it:  {token}"))?;
    out.line(&format!("line, for the tokens' file:  {line}"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
