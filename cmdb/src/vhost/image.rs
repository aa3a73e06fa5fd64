//! The name of an image.

use std::path::Path;

use super::reader::{At, Reader};

const KINDS: &str = "write \"dir:/path/of/a/folder\", \"tar:/path/of/an/archive\", \"oci:/path/of/a/layout\", \"docker://registry.example.com/name:tag\" or \"git+https://host/repository#branch\"";

/// Reads `container.image`; a relative path starts at `base`.
pub(super) fn read(reader: &mut Reader<'_>, image: At<String>, base: &Path) -> Option<String> {
    let fault = |reader: &mut Reader<'_>, message: &str, mend: &str| {
        reader.fault(image.span.clone(), message, mend);
        None
    };
    let text = &image.value;
    if let Some(reference) = text.strip_prefix("docker://") {
        return match reference_fault(reference) {
            None => Some(text.clone()),
            Some(why) => {
                fault(reader, why, "write for example \"docker://registry.example.com:5000/name:tag\"")
            }
        };
    }
    if let Some(url) = text.strip_prefix("git+https://").or_else(|| text.strip_prefix("git+file:///")) {
        return match url_fault(url) {
            None => Some(text.clone()),
            Some(why) => fault(
                reader,
                why,
                "write for example \"git+https://host/repository#branch:folder:/place/in/the/image\"",
            ),
        };
    }
    let Some((scheme, path)) =
        text.split_once(':').filter(|(scheme, _)| matches!(*scheme, "dir" | "tar" | "oci"))
    else {
        return fault(reader, "\"image\" does not say of which kind it is", KINDS);
    };
    if path.is_empty() {
        return fault(reader, "\"image\" has no path", KINDS);
    }
    Some(format!("{scheme}:{}", base.join(path).display()))
}

/// Whether an image of that name may bring a configuration of its own: what to run, as whom, where.
pub(super) fn is_oci(image: &str) -> bool {
    image.starts_with("oci:") || image.starts_with("docker://")
}

fn reference_fault(reference: &str) -> Option<&'static str> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-/:@[]".contains(c);
    if reference.is_empty() || reference.starts_with('/') || reference.ends_with('/') {
        return Some("\"image\" names nothing in a registry");
    }
    if !reference.chars().all(allowed) {
        return Some("\"image\" has a character that no image's name has");
    }
    reference
        .split_once('@')
        .filter(|(_, digest)| !digest.starts_with("sha256:"))
        .map(|_| "\"image\" has a digest that does not begin with sha256:, or a user's name")
}

fn url_fault(url: &str) -> Option<&'static str> {
    let (url, fragment) = url.split_once('#').unwrap_or((url, ""));
    let host = url.split('/').next().unwrap_or_default();
    if url.is_empty() || url.chars().chain(fragment.chars()).any(|c| c.is_whitespace() || c.is_control()) {
        return Some("\"image\" is no address of a repository");
    }
    if host.contains('@') {
        return Some("\"image\" has a user's name or a password in its address, which everybody would see");
    }
    if fragment.starts_with('-') {
        return Some("\"image\" has a revision that begins with \"-\"");
    }
    None
}
