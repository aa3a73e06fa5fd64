//! An app that loses memory is found out, with evidence; one that fills a cache is not accused.

use crate::{host::Host, vhost::Vhost};

/// Requests of one lifetime, each of which makes the app bigger by a MiB while `grows` says so; the app is looked at for each.
fn live(host: &Host, app: &Vhost, grows: impl Fn(u64) -> bool) {
    for n in 0..16 {
        let path = if grows(n) { "/memhog?mib=1" } else { "/" };
        host.get(app, path).expect_status(200);
        std::thread::sleep(std::time::Duration::from_millis(650));
    }
    host.ctl_ok(&["stop", app.name()]);
}

#[test]
fn an_app_that_grows_with_its_requests_in_every_life_is_suspected_and_a_cache_is_not() {
    let (leaky, cache) = (Vhost::probe("leaky"), Vhost::probe("cache"));
    let host = Host::up(&[&leaky, &cache]);
    std::thread::scope(|scope| {
        let fills = scope.spawn(|| (0..3).for_each(|_| live(&host, &cache, |n| n < 8)));
        (0..2).for_each(|_| live(&host, &leaky, |_| true));
        assert_eq!(host.count("leaky", "leak-suspected"), 0, "two lifetimes are not several");
        live(&host, &leaky, |_| true);
        fills.join().expect("the other app");
    });

    let events = host.events("leaky");
    let said: Vec<&str> = events
        .iter()
        .filter(|event| event["kind"] == "leak-suspected")
        .filter_map(|event| event["message"].as_str())
        .collect();
    assert_eq!(said.len(), 1, "{events:?}");
    assert!(
        said[0].contains("in each of its last 3 lifetimes") && said[0].contains("without levelling off"),
        "{said:?}"
    );
    assert!(host.ctl_ok(&["ps"]).contains("leaky: suspected of a leak: "));
    assert_eq!(host.count("cache", "leak-suspected"), 0);
    let id = host.access_log(1).into_iter().find(|r| r["app"] == "leaky").expect("a request")["request_id"]
        .clone();
    assert!(host.ctl_ok(&["why", id.as_str().expect("an id")]).contains("leaky is suspected of a leak"));
    host.end();
}
