//! The name of an image.

use std::path::Path;

use super::reader::{At, Reader};

const KINDS: &str =
    "write \"dir:/path/of/a/folder\", \"tar:/path/of/an/archive\" or \"oci:/path/of/a/layout\"";

/// Reads `container.image`; a relative path starts at `base`.
pub(super) fn read(reader: &mut Reader<'_>, image: At<String>, base: &Path) -> Option<String> {
    let Some((scheme, path)) =
        image.value.split_once(':').filter(|(scheme, _)| matches!(*scheme, "dir" | "tar" | "oci"))
    else {
        reader.fault(image.span, "\"image\" does not say of which kind it is", KINDS);
        return None;
    };
    if path.is_empty() {
        reader.fault(image.span, "\"image\" has no path", KINDS);
        return None;
    }
    Some(format!("{scheme}:{}", base.join(path).display()))
}

/// Whether an image of that name brings a configuration of its own: what to run, as whom, where.
pub(super) fn is_oci(image: &str) -> bool {
    image.starts_with("oci:")
}
