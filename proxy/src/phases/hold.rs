//! Waiting for an instance: bounded, fair, and left at once when the client leaves. The body stays unread in the socket.

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use pingora::{Error, ErrorType, proxy::Session};
use tokio::time::{Instant, sleep, sleep_until};

use super::Ctx;
use crate::{
    hold::Full,
    lease::Lease,
    measure::Part,
    pages::{self, Fault},
    tenant::{Answer, AppRuntime},
};

/// How often a client whose body must not be touched is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// `TCP_ESTABLISHED`: neither side has closed.
const ESTABLISHED: u8 = 1;

/// Waits for a place on an instance.
///
/// # Errors
/// The fault that is noted in `ctx`, or that the client has left.
pub async fn hold(session: &mut Session, ctx: &mut Ctx, app: &Arc<AppRuntime>) -> pingora::Result<Lease> {
    ctx.watch.enter(Part::Hold);
    let held_since = std::time::Instant::now();
    let hold = app.spec.load().hold.clone();
    let deadline = Instant::from_std(ctx.watch.begun() + hold.timeout);
    let shed = || Answer::Shed;
    let mut place = match app.room_for(ctx.hop.is_some()).enter(hold.queue as usize, &app.house().seats, shed)
    {
        Ok(place) => place,
        Err(Full::Room) => return Err(ctx.fail(Fault::QueueFull { retry_after: app.retry_after() })),
        Err(Full::All) => return Err(ctx.fail(Fault::Shed { retry_after: app.retry_after() })),
    };
    ctx.held = true;
    app.knock();
    // A person is told after a moment; who is no person could do nothing with a page.
    let page_at = Instant::now() + hold.page_after;
    let mut page = hold.page && page_at < deadline && pages::is_navigation(session.req_header());
    let answer = loop {
        tokio::select! {
            biased;
            answer = place.answer() => break answer,
            error = client_left(session) => return Err(error),
            () = sleep_until(if page { page_at } else { deadline }) => {}
        }
        if !std::mem::take(&mut page) {
            let linked = app.house().linked.load(SeqCst);
            return Err(ctx.fail(if linked { Fault::HoldTimeout } else { Fault::LauncherGone }));
        }
        // Who waits for a place on what runs already would only lose their turn.
        if !app.is_warm() {
            return Err(ctx.fail(Fault::Starting(app.progress())));
        }
    };
    match answer {
        Some(Answer::Lease(lease)) => {
            // The watch may tell of the instance before the wake itself is answered, so that says nothing.
            ctx.cold = lease.upstream.known >= held_since;
            Ok(lease)
        }
        Some(Answer::Refused(fault)) => Err(ctx.fail(fault)),
        Some(Answer::Shed) => Err(ctx.fail(Fault::Shed { retry_after: app.retry_after() })),
        None => Err(ctx.fail(Fault::Internal)),
    }
}

/// A pause before the next attempt to connect, which grows with each; ends early when the client leaves.
///
/// # Errors
/// The app's hold timeout has passed, or the client has left.
pub async fn pause(session: &mut Session, ctx: &mut Ctx, app: &AppRuntime) -> pingora::Result<()> {
    ctx.watch.enter(Part::Hold);
    let pause = Duration::from_millis(5 << ctx.unconnected.saturating_sub(1).min(7));
    let deadline = ctx.watch.begun() + app.spec.load().hold.timeout;
    if deadline <= std::time::Instant::now() + pause {
        return Err(ctx.fail(Fault::HoldTimeout));
    }
    tokio::select! {
        () = sleep(pause) => Ok(()),
        error = client_left(session) => Err(error),
    }
}

/// Resolves when the client has left.
async fn client_left(session: &mut Session) -> Box<Error> {
    let readable = session.is_http2() || session.is_body_empty();
    if readable {
        // Nothing is to be expected from the client, so that reading takes nothing away.
        return match session.read_body_or_idle(true).await {
            Err(error) => error.into_down(),
            Ok(_) => gone(),
        };
    }
    // Reading would take a piece of the body away; the kernel knows whether the client has closed. (It does not while a
    // body larger than the socket's buffers is under way; then the place is kept until the deadline.)
    loop {
        sleep(LOOK_EVERY).await;
        let digest = session.digest().and_then(|digest| digest.socket_digest.as_ref());
        let state = digest.and_then(|digest| digest.tcp_info()).map(|info| info.tcpi_state);
        if state.is_some_and(|state| state != ESTABLISHED) {
            return gone();
        }
    }
}

fn gone() -> Box<Error> {
    Error::explain(ErrorType::ConnectionClosed, "the client left while it waited").into_down()
}
