//! How starts are admitted, as the operator writes it.

use std::{fmt, num::NonZeroUsize, str::FromStr};

/// `on`, `off`, or the most starts at a time.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum GovernorMode {
    /// By what the host has free.
    #[default]
    On,
    /// Every start begins at once.
    Off,
    /// As `On`, and never more than so many at a time.
    AtMost(NonZeroUsize),
}

/// It is none of these.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0:?} is no way to admit starts; write on, off, or the most starts at a time, such as 8")]
pub struct ModeError(String);

impl FromStr for GovernorMode {
    type Err = ModeError;

    fn from_str(text: &str) -> Result<Self, ModeError> {
        match text {
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            number => number.parse().map(Self::AtMost).map_err(|_| ModeError(number.to_owned())),
        }
    }
}

impl fmt::Display for GovernorMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::On => f.write_str("on"),
            Self::Off => f.write_str("off"),
            Self::AtMost(most) => most.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_is_read_as_it_is_written() {
        for text in ["on", "off", "8"] {
            assert_eq!(text.parse::<GovernorMode>().unwrap().to_string(), text);
        }
        assert!("0".parse::<GovernorMode>().is_err() && "yes".parse::<GovernorMode>().is_err());
    }
}
