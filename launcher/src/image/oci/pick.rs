//! Which of the images in a layout is meant.

use oci_spec::image::{Arch, Descriptor, ImageIndex, MediaType, Os, Platform};

use super::{Layout, OciError, digest_of};

/// An index may hold indexes, one for each tag; more than that nobody writes.
const MAX_DEPTH: usize = 4;
/// The name of an image within a layout.
const NAME: &str = "org.opencontainers.image.ref.name";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// The descriptor of the manifest that is wanted.
pub(super) fn manifest(layout: &Layout, wanted: Option<&str>) -> Result<Descriptor, OciError> {
    let index = layout.index()?;
    let mut candidates = named(index.manifests(), wanted)?;
    for _ in 0..MAX_DEPTH {
        let chosen = for_this_machine(candidates)?;
        match chosen.media_type() {
            MediaType::ImageManifest => return Ok(chosen),
            MediaType::Other(other) if other == DOCKER_MANIFEST => return Ok(chosen),
            MediaType::ImageIndex => {}
            MediaType::Other(other) if other == DOCKER_INDEX => {}
            other => return Err(OciError::Kind { what: "manifest", media_type: other.to_string() }),
        }
        let (_, inner) = layout.json::<ImageIndex>("index", &chosen)?;
        candidates = inner.manifests().clone();
    }
    Err(OciError::Deep)
}

/// Those of the tag or digest that is wanted; all, if none is.
fn named(held: &[Descriptor], wanted: Option<&str>) -> Result<Vec<Descriptor>, OciError> {
    let Some(wanted) = wanted else { return Ok(held.to_vec()) };
    let is_wanted = |descriptor: &&Descriptor| {
        digest_of(descriptor).is_ok_and(|digest| digest.to_string() == wanted)
            || name(descriptor).is_some_and(|name| name == wanted)
    };
    let found: Vec<Descriptor> = held.iter().filter(is_wanted).cloned().collect();
    if found.is_empty() {
        return Err(OciError::NoSuchImage { wanted: wanted.to_owned(), held: names(held) });
    }
    Ok(found)
}

fn for_this_machine(mut candidates: Vec<Descriptor>) -> Result<Descriptor, OciError> {
    if candidates.len() > 1 {
        let all = candidates.clone();
        // What says nothing of its platform is for any; signatures and the like say "unknown".
        candidates.retain(|descriptor| descriptor.platform().as_ref().is_none_or(is_ours));
        if candidates.is_empty() {
            let held = all.iter().filter_map(|descriptor| descriptor.platform().as_ref()).map(text).collect();
            return Err(OciError::Platform { wanted: ours(), held });
        }
        candidates.dedup_by(|a, b| a.digest() == b.digest());
    }
    let held = names(&candidates);
    let mut candidates = candidates.into_iter();
    match (candidates.next(), candidates.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err(OciError::NoSuchImage { wanted: String::new(), held }),
        (Some(first), Some(_)) if first.platform().is_some() => {
            // Variants of one processor (arm/v7, arm/v8): the first is the plainest, as other tools take it.
            Ok(first)
        }
        _ => Err(OciError::Several { held }),
    }
}

/// The configuration has the last word on what an image runs on.
pub(super) fn check_platform(arch: &Arch, os: &Os) -> Result<(), OciError> {
    if *arch == our_arch() && *os == Os::Linux {
        return Ok(());
    }
    Err(OciError::Platform { wanted: ours(), held: vec![format!("{os}/{arch}")] })
}

fn is_ours(platform: &Platform) -> bool {
    *platform.os() == Os::Linux && *platform.architecture() == our_arch()
}

fn our_arch() -> Arch {
    if cfg!(target_arch = "aarch64") { Arch::ARM64 } else { Arch::Amd64 }
}

fn ours() -> String {
    format!("{}/{}", Os::Linux, our_arch())
}

fn text(platform: &Platform) -> String {
    format!("{}/{}", platform.os(), platform.architecture())
}

fn names(held: &[Descriptor]) -> Vec<String> {
    held.iter()
        .map(|descriptor| name(descriptor).unwrap_or_else(|| descriptor.digest().to_string()))
        .collect()
}

fn name(descriptor: &Descriptor) -> Option<String> {
    descriptor.annotations().as_ref()?.get(NAME).cloned()
}
