//! `wake`, `stop`, `restart`, `limit`, `scale`: what an operator does to one app.

use cmdb::{AppName, Generation};
use launcher_client::wire::{Request, ScaleOrder, WakeTiming};
use serde::Serialize;

use crate::{
    cli::{self, Global},
    failure::Failure,
    output::{Output, Style},
    target::Target,
    text,
};

/// `wake`: has an instance ready and tells how long that took.
pub(crate) async fn wake(global: &Global, options: cli::Wake, out: &mut Output) -> Result<(), Failure> {
    let woken = Target::reach(global, &options.remote).await?.wake(&options.app).await?;
    if out.is_json() {
        return out.json(&WokenJson {
            instance: format!("{}.{}", options.app, woken.generation),
            app: &options.app,
            generation: woken.generation,
            port: woken.port,
            timing: &woken.timing,
        });
    }
    let headline = if woken.timing.warm {
        format!("{}.{} was ready already, on port {}", options.app, woken.generation, woken.port)
    } else {
        let took = text::duration_us(woken.timing.total_us);
        format!("{}.{} is ready on port {}, after {took}", options.app, woken.generation, woken.port)
    };
    out.line(&out.paint(Style::Bold, &headline))?;
    if global.verbose {
        for line in steps(&woken.timing) {
            out.line(&line)?;
        }
    }
    Ok(())
}

/// `stop`: ends all instances of an app.
pub(crate) async fn stop(global: &Global, options: cli::Stop, out: &mut Output) -> Result<(), Failure> {
    let target = Target::reach(global, &options.remote).await?;
    target.done(Request::Stop { app: options.app.clone() }).await?;
    done(&options.app, "stopped", "is stopped; the next request wakes it", out)
}

/// `restart`: replaces all instances of an app.
pub(crate) async fn restart(global: &Global, options: cli::Restart, out: &mut Output) -> Result<(), Failure> {
    let target = Target::reach(global, &options.remote).await?;
    target.done(Request::Restart { app: options.app.clone() }).await?;
    done(&options.app, "restarting", "is being replaced, the new instance first", out)
}

/// `signal`: runs an app's hooks.
pub(crate) async fn signal(global: &Global, options: cli::Signal, out: &mut Output) -> Result<(), Failure> {
    let target = Target::reach(global, &options.remote).await?;
    let signal = options.signal.trim_start_matches("SIG").to_owned();
    target.done(Request::Signal { app: options.app.clone(), signal }).await?;
    done(&options.app, "signalled", "has its hooks under way; see `events`", out)
}

/// `limit`: other limits for the processes that run.
pub(crate) async fn limit(global: &Global, options: cli::Limit, out: &mut Output) -> Result<(), Failure> {
    if options.cpu.is_none() && options.memory.is_none() && options.pids.is_none() && !options.reset {
        return Err(Failure::usage("say what to change: --cpu, --memory, --pids or --reset"));
    }
    let target = Target::reach(global, &options.remote).await?;
    let request = Request::Limit {
        app: options.app.clone(),
        cpu: options.cpu.map(|cpu| cpu.0),
        memory: options.memory.map(|memory| memory.0),
        pids: options.pids,
        reset: options.reset,
    };
    target.done(request).await?;
    done(&options.app, "limited", "has other limits from now on; `ps` shows what is set", out)
}

/// `scale`: another number of instances, or a pause of the scaler.
pub(crate) async fn scale(global: &Global, options: cli::Scale, out: &mut Output) -> Result<(), Failure> {
    let target = Target::reach(global, &options.remote).await?;
    let order = ScaleOrder {
        auto: options.auto,
        instances: options.instances,
        min: options.min,
        max: options.max,
        paused: options.pause.then_some(true).or(options.resume.then_some(false)),
    };
    target.done(Request::Scale { app: options.app.clone(), order }).await?;
    let says = match (options.instances, options.auto) {
        (Some(instances), _) => {
            format!("is brought to {instances} instance(s); `events --app {}` shows how", options.app)
        }
        (None, true) => "is scaled as its vhost file says".to_owned(),
        (None, false) => "is scaled otherwise from now on; `ps` shows what is set".to_owned(),
    };
    done(&options.app, "scaled", &says, out)
}

/// The steps of a start, each with its time; together they are the whole.
pub(crate) fn steps(timing: &WakeTiming) -> Vec<String> {
    let named: u64 = timing.steps.iter().map(|step| step.us).sum();
    // What no step claims is shown too, so that the reader never wonders where it went.
    let rest = timing.total_us.saturating_sub(named);
    let unnamed = (rest > 0 && !timing.warm).then(|| ("(between the steps)".to_owned(), rest));
    timing
        .steps
        .iter()
        .map(|step| (text::clean(&step.name).into_owned(), step.us))
        .chain(unnamed)
        .map(|(name, us)| format!("  {name:<28} {:>12}", text::exact_ms(us)))
        .collect()
}

fn done(app: &AppName, did: &str, says: &str, out: &mut Output) -> Result<(), Failure> {
    if out.is_json() {
        return out.json(&serde_json::json!({ "app": app, "done": did }));
    }
    out.line(&format!("{app} {says}"))
}

#[derive(Serialize)]
struct WokenJson<'a> {
    instance: String,
    app: &'a AppName,
    generation: Generation,
    port: u16,
    timing: &'a WakeTiming,
}

#[cfg(test)]
mod tests {
    use launcher_client::wire::Step;

    use super::*;

    #[test]
    fn the_steps_of_a_wake_sum_to_the_whole() {
        let step = |name: &str, us| Step { name: name.into(), us };
        let timing = WakeTiming {
            begun_us: 0,
            total_us: 2_500,
            steps: vec![step("clone", 400), step("app", 2_000)],
            warm: false,
        };

        assert_eq!(
            steps(&timing),
            [
                "  clone                            0.400 ms",
                "  app                              2.000 ms",
                "  (between the steps)              0.100 ms",
            ]
        );
    }
}
