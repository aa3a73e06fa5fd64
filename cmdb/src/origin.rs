//! Who configured an app, and so who may change it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::compute;

/// Where an app's configuration comes from. Whoever applies configuration replaces and removes only what is its own, so
/// that a folder of vhost files and the API never undo each other's work. Written `conf.d`, `conf.d@NODE` or `api`.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub enum Origin {
    /// The `conf.d` of a host; without a name that of the only host there is (or was, when this was written down).
    ConfD(Option<Box<str>>),
    /// The CoreAPI.
    Api,
}

/// It is none of these.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0:?} is no origin of an app's configuration")]
pub struct OriginError(String);

impl Origin {
    /// The `conf.d` of a host; an empty name is that of the only host.
    #[must_use]
    pub fn conf_d(node: &str) -> Self {
        Self::ConfD((!node.is_empty()).then(|| node.into()))
    }

    /// Whether `other` may replace or remove what is of this origin. A `conf.d` without a host's name was written by a
    /// host that had none then: any `conf.d` may go on with it.
    #[must_use]
    pub fn yields_to(&self, other: &Self) -> bool {
        self == other || (*self == Self::default() && matches!(other, Self::ConfD(_)))
    }

    /// For records that are kept: the usual one need not be written down.
    #[must_use]
    pub(crate) fn is_usual(&self) -> bool {
        *self == Self::default()
    }
}

/// The one of apps that were configured before origins were written down.
impl Default for Origin {
    fn default() -> Self {
        Self::ConfD(None)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ConfD(None) => f.write_str("conf.d"),
            Self::ConfD(Some(node)) => write!(f, "conf.d@{node}"),
            Self::Api => f.write_str("api"),
        }
    }
}

impl TryFrom<String> for Origin {
    type Error = OriginError;

    fn try_from(text: String) -> Result<Self, OriginError> {
        match text.as_str() {
            "api" => Ok(Self::Api),
            "conf.d" => Ok(Self::ConfD(None)),
            other => match other.strip_prefix("conf.d@").filter(|node| compute::is_name(node)) {
                Some(node) => Ok(Self::ConfD(Some(node.into()))),
                None => Err(OriginError(text)),
            },
        }
    }
}

impl From<Origin> for String {
    fn from(origin: Origin) -> Self {
        origin.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_origin_is_read_as_it_is_written() {
        for origin in [Origin::Api, Origin::default(), Origin::conf_d("web1")] {
            assert_eq!(Origin::try_from(origin.to_string()), Ok(origin));
        }
        assert!(Origin::try_from("conf.d@../x".to_owned()).is_err());
    }

    #[test]
    fn only_its_own_or_what_is_nobodys_yields() {
        let (old, one, other) = (Origin::default(), Origin::conf_d("web1"), Origin::conf_d("web2"));
        assert!(one.yields_to(&one) && old.yields_to(&one));
        assert!(!one.yields_to(&other) && !one.yields_to(&Origin::Api) && !Origin::Api.yields_to(&one));
        assert!(!old.yields_to(&Origin::Api), "a file's app is not the API's");
    }
}
