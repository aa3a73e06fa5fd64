//! `[[provision]]`: a step that is done to an app's image once, in a container of its own; what it has written is a layer of
//! the image from then on.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

/// One step.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ProvisionStep {
    /// What people call it; no two steps of an app have the same.
    pub name: String,
    /// Program and arguments; not empty.
    pub run: Vec<String>,
    /// Whom it runs as, as in the image's passwd file; empty: the container's root.
    pub user: String,
    /// Environment, besides the image's.
    pub env: BTreeMap<String, String>,
    /// After so long it has failed.
    pub timeout: Duration,
}
