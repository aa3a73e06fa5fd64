//! `[[provision]]`: has the steps of an app's image done, each once for each content of the image, ahead of the first request.
//!
//! A start that finds its image provisioned pays a few look-ups. One that does not waits for the steps, which are run by
//! whoever comes first and go on when nobody waits any more.

mod run;

use std::sync::Arc;

use cmdb::App;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::{
    host::Host,
    image::{ImageError, Layers, Recipe},
};
use run::StepFailure;

/// Steps that run at a time on this host, whoever waits for them.
const AT_A_TIME: usize = 2;

/// What runs steps; one for the daemon.
#[derive(Debug)]
pub struct Provisioner {
    places: Semaphore,
}

impl Default for Provisioner {
    fn default() -> Self {
        Self { places: Semaphore::new(AT_A_TIME) }
    }
}

/// Why an app's image is not provisioned.
#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    /// The image itself cannot be had.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A step has failed.
    #[error("provisioning step {step} of {of}, {name:?}, failed: {failure}")]
    Step {
        /// Which, from 1.
        step: usize,
        /// Of how many.
        of: usize,
        /// What it is called.
        name: String,
        /// Why.
        failure: StepFailure,
    },
    /// It failed a while ago, and is not tried again yet.
    #[error("{why}; it is tried again in {wait_s} s")]
    Earlier {
        /// Why it failed.
        why: String,
        /// Seconds until it is tried again.
        wait_s: u64,
    },
    /// The task that did it has ended.
    #[error("provisioning was cut short: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// Between why a step failed and what it said.
const SAID: &str = "; it said last: ";

impl ProvisionError {
    /// With what the step said, which is for the operator.
    #[must_use]
    pub fn in_full(&self) -> String {
        match self {
            Self::Step { failure, .. } if !failure.words().is_empty() => {
                format!("{self}{SAID}{}", failure.words())
            }
            other => other.to_string(),
        }
    }
}

/// What [`ProvisionError::in_full`] says without what the step said, in which there may be the time of day.
#[must_use]
pub fn cause(in_full: &str) -> &str {
    in_full.split(SAID).next().unwrap_or_default()
}

/// The image of an app as its instances run it.
///
/// # Errors
/// See [`ProvisionError`].
pub async fn resolve(host: &Arc<Host>, app: &Arc<App>) -> Result<Layers, ProvisionError> {
    let container = &app.container;
    let image = host.images.resolve_over(container.base.as_deref(), &container.image).await?;
    let Some(recipe) = Recipe::of(app) else { return Ok(image) };
    let names = recipe.names(&image.id);
    if let Some(layers) = host.images.with_steps(&image, &names) {
        return Ok(layers);
    }
    // The image is another, or the steps failed since: what they made before serves until it is made anew.
    if let Some(layers) = host.images.newest_of(&recipe) {
        host.images.look_at(&recipe);
        return Ok(layers);
    }
    let failed = host.images.preparation(&recipe.key).filter(|state| state.failures > 0);
    if let Some(state) = failed
        && let Some(wait) = state.due.and_then(|due| due.checked_duration_since(Instant::now()))
    {
        let why = cause(&state.error).to_owned();
        return Err(ProvisionError::Earlier { why, wait_s: wait.as_secs() + 1 });
    }
    prepare(host, app).await
}

/// Has all steps done that are not done yet. Of any number of callers one does the work, which goes on when they leave.
///
/// # Errors
/// See [`ProvisionError`].
pub async fn prepare(host: &Arc<Host>, app: &Arc<App>) -> Result<Layers, ProvisionError> {
    let (host, app) = (Arc::clone(host), Arc::clone(app));
    tokio::spawn(async move {
        let Some(recipe) = Recipe::of(&app) else {
            let container = &app.container;
            return Ok(host.images.resolve_over(container.base.as_deref(), &container.image).await?);
        };
        let _turn = host.images.turn(&recipe.key).await;
        let outcome = follow(&host, &app, &recipe).await;
        if let Err(error) = &outcome {
            host.images.not_provisioned(&recipe, &error.in_full());
        }
        outcome
    })
    .await?
}

/// From the image to what all steps have made of it.
async fn follow(host: &Arc<Host>, app: &Arc<App>, recipe: &Recipe) -> Result<Layers, ProvisionError> {
    let image = host.images.at_hand(recipe).await?;
    let names = recipe.names(&image.id);
    // Held while the next step is made on it, so that nobody removes it from beneath.
    let mut made: Option<Layers> = None;
    for step in 0..names.len() {
        let _turn = host.images.turn(&names[step]).await;
        if let Some(layers) = host.images.with_steps(&image, &names[..=step]) {
            made = Some(layers);
            continue;
        }
        do_step(host, app, recipe, made.as_ref().unwrap_or(&image), step, &names[step]).await.map_err(
            |failure| ProvisionError::Step {
                step: step + 1,
                of: names.len(),
                name: recipe.steps[step].name.clone(),
                failure,
            },
        )?;
        made = Some(host.images.with_steps(&image, &names[..=step]).ok_or_else(gone)?);
    }
    let layers = made.ok_or_else(gone)?;
    host.images.provisioned(recipe, &layers, &names)?;
    Ok(layers)
}

async fn do_step(
    host: &Arc<Host>,
    app: &Arc<App>,
    recipe: &Recipe,
    below: &Layers,
    number: usize,
    place: &str,
) -> Result<(), StepFailure> {
    let step = &recipe.steps[number];
    let of = recipe.steps.len();
    let _place = host.provisioner.places.acquire().await.map_err(|_| StepFailure::Ending)?;
    host.images.provisions(recipe, number);
    let tell = |words: String| {
        let message = format!("provisioning step {} of {of}, {:?}, {words}", number + 1, step.name);
        host.events.emit("provision", Some(&app.name), None, message);
    };
    tell("runs".to_owned());
    let begun = Instant::now();
    let made = run::run(host, app, recipe, below, step, place).await?;
    tell(format!("is done after {:.1?} and has written {} KiB", begun.elapsed(), made.bytes.div_ceil(1024)));
    Ok(())
}

/// Somebody has removed from the store what was made a moment ago.
fn gone() -> ImageError {
    ImageError::Missing { path: "of provisioning steps".into() }
}
