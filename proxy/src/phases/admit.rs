//! May this request be served at all, now? For the moment the only rule is that a proxy about to end begins no new wait.

use std::sync::atomic::Ordering::Relaxed;

use super::Ctx;
use crate::{house::House, pages::Fault};

/// Says why not, if not.
///
/// # Errors
/// [`Fault::Stopping`] when nothing warm could serve it and the proxy ends before a wake would.
pub fn admit(house: &House, ctx: &Ctx) -> Result<(), Fault> {
    let warm = || ctx.app.as_ref().is_some_and(|app| app.is_warm());
    if house.stopping.load(Relaxed) && !warm() { Err(Fault::Stopping) } else { Ok(()) }
}
