//! What visitors of a sleeping app see.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at what it did not expect"
)]

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use cmdb::cache::LastKnownGood;
use common::*;
use launcher_client::wire::{Refusal, RefusalCode, Request};
use tokio::{io::AsyncWriteExt, net::TcpStream, sync::Notify, time::sleep};

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_first_requests_wake_one_instance_and_are_all_answered() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    launcher.put(app("blog"), web.port);
    launcher.script("blog", |script| script.delay = Duration::from_millis(300));
    let proxy = Proxy::start(&launcher).await;
    let requests: Vec<_> = (0..500).map(|_| tokio::spawn(get(proxy.address, "blog.test", "/"))).collect();
    for request in requests {
        let response = request.await.unwrap();
        assert_eq!((response.status, response.body.as_str()), (200, "hello"));
    }
    assert_eq!(launcher.wakes("blog"), 1);
    assert_eq!(web.count(), 500);
    assert_eq!(proxy.held(), 0);
    // Thousands of quiet apps share the descriptors of one process.
    let stock = Arc::clone(proxy.house.apps()[0].upstreams()[0].stock().unwrap());
    eventually(|| stock.len() <= 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_client_leaves_and_the_others_are_answered_by_the_same_wake() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    launcher.put(app("blog"), web.port);
    launcher.script("blog", |script| script.delay = Duration::from_millis(400));
    let proxy = Proxy::start(&launcher).await;
    let mut first = TcpStream::connect(proxy.address).await.unwrap();
    first.write_all(b"GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n").await.unwrap();
    eventually(|| proxy.held() == 1).await;
    let others: Vec<_> = (0..20).map(|_| tokio::spawn(get(proxy.address, "blog.test", "/"))).collect();
    eventually(|| proxy.held() == 21).await;
    drop(first);
    eventually(|| proxy.held() == 20).await;
    for other in others {
        assert_eq!(other.await.unwrap().status, 200);
    }
    assert_eq!((launcher.wakes("blog"), web.count()), (1, 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_upload_arrives_once_and_whole() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("got it").await);
    launcher.put(app("blog"), web.port);
    launcher.script("blog", |script| script.delay = Duration::from_millis(500));
    let proxy = Proxy::start(&launcher).await;
    let body: Vec<u8> = (0..150_000u32).map(|i| (i % 251) as u8).collect();
    let head = format!(
        "POST / HTTP/1.1\r\nHost: blog.test\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let response = raw(proxy.address, &[head.as_bytes(), &body].concat()).await;
    assert_eq!(response.status, 200);
    let seen = web.seen.lock().unwrap();
    assert_eq!(seen.len(), 1);
    assert!(seen[0].body == body);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_chunked_upload_arrives_once_and_whole() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("got it").await);
    launcher.put(app("blog"), web.port);
    launcher.script("blog", |script| script.delay = Duration::from_millis(300));
    let proxy = Proxy::start(&launcher).await;
    let body: Vec<u8> = (0..2_000_000u32).map(|i| (i % 251) as u8).collect();
    let mut request =
        b"POST / HTTP/1.1\r\nHost: blog.test\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
            .to_vec();
    for piece in body.chunks(10_000) {
        request.extend(format!("{:x}\r\n", piece.len()).bytes());
        request.extend(piece);
        request.extend(b"\r\n");
    }
    request.extend(b"0\r\n\r\n");
    assert_eq!(raw(proxy.address, &request).await.status, 200);
    let seen = web.seen.lock().unwrap();
    assert_eq!(seen.len(), 1);
    assert!(seen[0].body == body);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_waiting_room_refuses_at_once_and_the_rest_is_answered() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    let mut small = app("blog");
    small.hold.queue = 5;
    launcher.put(small, web.port);
    launcher.script("blog", |script| script.delay = Duration::from_secs(2));
    let proxy = Proxy::start(&launcher).await;
    let held: Vec<_> = (0..5).map(|_| tokio::spawn(get(proxy.address, "blog.test", "/"))).collect();
    eventually(|| proxy.held() == 5).await;
    let refused = get(proxy.address, "blog.test", "/").await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    assert_eq!(proxy.held(), 5, "the refusal came while the others still waited");
    for request in held {
        assert_eq!(request.await.unwrap().status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_too_long_is_told() {
    let launcher = FakeLauncher::start();
    let mut short = app("blog");
    short.hold.timeout = Duration::from_millis(300);
    launcher.put(short, 1);
    launcher.script("blog", |script| script.delay = Duration::from_secs(60));
    let proxy = Proxy::start(&launcher).await;
    assert_eq!(get(proxy.address, "blog.test", "/").await.status, 504);
    assert_eq!(proxy.held(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_is_told_to_everybody_at_once() {
    let launcher = FakeLauncher::start();
    launcher.put(app("blog"), 1);
    launcher.script("blog", |script| {
        script.delay = Duration::from_millis(300);
        script.refusal = Some(Refusal::new(
            RefusalCode::StartFailed,
            "exited with status 3 before it listened; last line: password=secret",
        ));
    });
    let proxy = Proxy::start(&launcher).await;
    let requests: Vec<_> = (0..50).map(|_| tokio::spawn(get(proxy.address, "blog.test", "/"))).collect();
    for request in requests {
        let response = request.await.unwrap();
        assert_eq!(response.status, 502);
        assert!(response.body.contains("exited with status 3"), "{}", response.body);
        assert!(!response.body.contains("secret"), "{}", response.body);
    }
    assert_eq!(launcher.wakes("blog"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_refusals_have_their_own_status() {
    let launcher = FakeLauncher::start();
    launcher.put(app("blog"), 1);
    let proxy = Proxy::start(&launcher).await;
    for (code, retry_ms, status, retry_after) in [
        (RefusalCode::StartTimeout, None, 504, None),
        (RefusalCode::Backoff, Some(3_500), 503, Some("4")),
        (RefusalCode::Busy, None, 503, Some("1")),
    ] {
        let refusal = Refusal { code, message: String::new(), retry_after_ms: retry_ms, elsewhere: None };
        launcher.script("blog", |script| script.refusal = Some(refusal));
        let response = get(proxy.address, "blog.test", "/").await;
        assert_eq!((response.status, response.header("retry-after")), (status, retry_after), "{code}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_beyond_the_concurrency_limit_wait_in_their_order() {
    let launcher = FakeLauncher::start();
    let (one, turn) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (one_, turn_) = (Arc::clone(&one), Arc::clone(&turn));
    let web = Web::start(move |_| {
        let (one, turn) = (Arc::clone(&one_), Arc::clone(&turn_));
        async move {
            one.notify_one();
            turn.notified().await;
            ok("done")
        }
    })
    .await;
    let mut narrow = app("blog");
    narrow.scale.concurrency = Some(1);
    launcher.put(narrow, web.port);
    let proxy = Proxy::start(&launcher).await;
    let first = tokio::spawn(get(proxy.address, "blog.test", "/0"));
    one.notified().await;
    let mut rest = vec![first];
    for number in 1..6 {
        let path = format!("/{number}");
        let address = proxy.address;
        rest.push(tokio::spawn(async move { get(address, "blog.test", &path).await }));
        eventually(|| proxy.held() == number).await;
    }
    for request in rest {
        turn.notify_one();
        assert_eq!(request.await.unwrap().status, 200);
    }
    let seen = web.seen.lock().unwrap();
    for (number, seen) in seen.iter().enumerate() {
        assert!(seen.head.starts_with(&format!("GET /{number} ")), "{} came as number {number}", seen.head);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_that_waited_comes_in_bursts_that_an_accept_queue_can_take() {
    let launcher = FakeLauncher::start();
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (now_, most_) = (Arc::clone(&now), Arc::clone(&most));
    let web = Web::start(move |_| {
        let (now, most) = (Arc::clone(&now_), Arc::clone(&most_));
        async move {
            most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
            sleep(Duration::from_millis(20)).await;
            now.fetch_sub(1, SeqCst);
            ok("hello")
        }
    })
    .await;
    launcher.put(app("blog"), web.port);
    launcher.script("blog", |script| script.delay = Duration::from_millis(800));
    let proxy = Proxy::start(&launcher).await;
    let requests: Vec<_> = (0..1000).map(|_| tokio::spawn(get(proxy.address, "blog.test", "/"))).collect();
    for request in requests {
        assert_eq!(request.await.unwrap().status, 200);
    }
    // On a busy machine a burst without an answer for a quarter of a second lets the next one follow.
    assert!(most.load(SeqCst) <= 410, "{} at once", most.load(SeqCst));
    assert_eq!(launcher.wakes("blog"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_leave_free_their_places() {
    let launcher = FakeLauncher::start();
    launcher.put(app("blog"), 1);
    launcher.script("blog", |script| script.delay = Duration::from_secs(60));
    let proxy = Proxy::start(&launcher).await;
    let mut get = TcpStream::connect(proxy.address).await.unwrap();
    get.write_all(b"GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n").await.unwrap();
    let mut post = TcpStream::connect(proxy.address).await.unwrap();
    post.write_all(b"POST / HTTP/1.1\r\nHost: blog.test\r\nContent-Length: 100\r\n\r\nabc").await.unwrap();
    eventually(|| proxy.held() == 2).await;
    drop(get);
    eventually(|| proxy.held() == 1).await;
    drop(post);
    eventually(|| proxy.held() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_instance_finishes_what_it_has_and_gets_nothing_new() {
    let launcher = FakeLauncher::start();
    let (turn, old) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (turn_, old_) = (Arc::clone(&turn), Arc::clone(&old));
    let old_web = Web::start(move |_| {
        let (turn, old) = (Arc::clone(&turn_), Arc::clone(&old_));
        async move {
            old.notify_one();
            turn.notified().await;
            ok("old")
        }
    })
    .await;
    let new_web = Web::saying("new").await;
    launcher.put(app("blog"), old_web.port);
    let proxy = Proxy::start(&launcher).await;
    let slow = tokio::spawn(get(proxy.address, "blog.test", "/"));
    old.notified().await;
    let generation = launcher.generation("blog");
    launcher.change("blog", |record| {
        record.instances.get_mut(&generation).unwrap().state = cmdb::State::Draining;
        record.generation = cmdb::Generation(generation.0 + 1);
        record.instances.insert(record.generation, instance(record.generation, new_web.port));
    });
    eventually(|| proxy.house.apps()[0].upstreams().iter().any(|one| one.generation.0 == generation.0 + 1))
        .await;
    for _ in 0..10 {
        assert_eq!(get(proxy.address, "blog.test", "/").await.body, "new");
    }
    assert_eq!(launcher.heard(|request| matches!(request, Request::Quiesced { .. })), 0);
    turn.notify_one();
    assert_eq!(slow.await.unwrap().body, "old");
    eventually(|| {
        launcher.heard(
            |request| matches!(request, Request::Quiesced { generation: which, .. } if *which == generation),
        ) == 1
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_launcher_hears_of_the_first_byte_and_of_activity() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    launcher.put(app("blog"), web.port);
    let proxy = Proxy::start(&launcher).await;
    for _ in 0..3 {
        assert_eq!(get(proxy.address, "blog.test", "/").await.status, 200);
    }
    eventually(|| launcher.heard(|request| matches!(request, Request::Report { activity } if activity.iter().any(|one| one.requests > 0 && one.window.mean_us > 0))) > 0).await;
    assert_eq!(launcher.heard(|request| matches!(request, Request::FirstByte { .. })), 1);
    // And that there is none any more: otherwise the app would never count as idle.
    eventually(|| launcher.heard(|request| matches!(request, Request::Report { activity } if activity.iter().any(|one| one.requests == 0 && one.in_flight == 0))) > 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn warm_apps_are_served_while_the_launcher_is_away_and_cold_ones_when_it_is_back() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    launcher.put(app("blog"), web.port);
    launcher.put(app("shop"), web.port);
    let proxy = Proxy::start(&launcher).await;
    assert_eq!(get(proxy.address, "blog.test", "/").await.status, 200);
    launcher.disconnect();
    for _ in 0..10 {
        assert_eq!(get(proxy.address, "blog.test", "/").await.status, 200);
    }
    let cold = tokio::spawn(get(proxy.address, "shop.test", "/"));
    eventually(|| proxy.held() == 1).await;
    launcher.reconnect();
    assert_eq!(cold.await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_whose_end_died_with_the_launcher_is_served_on_by_the_next() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    launcher.put(app("blog"), web.port);
    let proxy = Proxy::start(&launcher).await;
    assert_eq!(get(proxy.address, "blog.test", "/").await.status, 200);
    let generation = launcher.generation("blog");
    let become_ = |state| {
        launcher.change("blog", |record| record.instances.get_mut(&generation).unwrap().state = state);
    };
    become_(cmdb::State::Draining);
    let quiesced = |request: &Request| matches!(request, Request::Quiesced { .. });
    eventually(|| launcher.heard(quiesced) == 1).await;

    launcher.disconnect();
    become_(cmdb::State::Ready);
    launcher.reconnect();

    let answer = tokio::time::timeout(Duration::from_secs(10), get(proxy.address, "blog.test", "/")).await;
    assert_eq!(answer.expect("in time").body, "hello");
    assert_eq!(launcher.generation("blog"), generation, "by the same instance");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_starts_before_the_launcher_holds_what_it_knew_last() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    launcher.put(app("blog"), web.port);
    launcher.disconnect();
    LastKnownGood::new(launcher.state.proxy().join("apps.last-known-good"))
        .write(&[Arc::new(app("blog"))])
        .unwrap();
    let proxy = Proxy::start(&launcher).await;
    assert_eq!(get(proxy.address, "shop.test", "/").await.status, 404);
    let held = tokio::spawn(get(proxy.address, "blog.test", "/"));
    eventually(|| proxy.held() == 1).await;
    launcher.reconnect();
    assert_eq!(held.await.unwrap().body, "hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_was_removed_while_the_launcher_was_away_is_unknown_afterwards() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    let mut short = app("blog");
    short.hold.timeout = Duration::from_millis(300);
    launcher.put(short, web.port);
    launcher.put(app("shop"), web.port);
    let proxy = Proxy::start(&launcher).await;
    launcher.disconnect();
    launcher.remove("shop");
    assert_eq!(get(proxy.address, "blog.test", "/").await.status, 503, "no launcher, nothing warm");
    launcher.reconnect();
    eventually(|| proxy.house.apps().len() == 1).await;
    assert_eq!(get(proxy.address, "shop.test", "/").await.status, 404);
    assert_eq!(get(proxy.address, "blog.test", "/").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_launcher_a_cold_app_is_unavailable_at_its_deadline() {
    let launcher = FakeLauncher::start();
    let mut short = app("blog");
    short.hold.timeout = Duration::from_millis(400);
    launcher.put(short, 1);
    let proxy = Proxy::start(&launcher).await;
    launcher.disconnect();
    eventually(|| !proxy.house.linked.load(SeqCst)).await;
    let response = get(proxy.address, "blog.test", "/").await;
    assert_eq!((response.status, response.header("retry-after")), (503, Some("1")));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_is_removed_is_unknown_even_to_those_who_wait() {
    let launcher = FakeLauncher::start();
    launcher.put(app("blog"), 1);
    launcher.script("blog", |script| script.delay = Duration::from_secs(60));
    let proxy = Proxy::start(&launcher).await;
    let held = tokio::spawn(get(proxy.address, "blog.test", "/"));
    eventually(|| proxy.held() == 1).await;
    launcher.remove("blog");
    assert_eq!(held.await.unwrap().status, 404);
    assert_eq!(get(proxy.address, "blog.test", "/").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_still_waits_when_the_proxy_ends_is_told() {
    let launcher = FakeLauncher::start();
    launcher.put(app("blog"), 1);
    launcher.script("blog", |script| script.delay = Duration::from_secs(60));
    let proxy = Proxy::start_with(&launcher, |config| config.grace = Duration::from_secs(2)).await;
    let held = tokio::spawn(get(proxy.address, "blog.test", "/"));
    eventually(|| proxy.held() == 1).await;
    proxy.terminate();
    let response = held.await.unwrap();
    assert_eq!((response.status, response.header("retry-after")), (503, Some("1")));
    sleep(Duration::ZERO).await;
}

/// A second instance of `app`, which is ready at `port` from now on.
async fn add_instance(launcher: &FakeLauncher, proxy: &Proxy, app: &str, port: u16) {
    let generation = cmdb::Generation(launcher.generation(app).0 + 1);
    launcher.change(app, |record| {
        record.generation = generation;
        record.instances.insert(generation, instance(generation, port));
    });
    eventually(|| proxy.house.apps()[0].upstreams().len() == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_is_added_begins_with_few_requests() {
    let added = of_300_after_an_instance_is_added(Some(Duration::from_secs(3600))).await;
    assert!((5..80).contains(&added), "{added}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_slow_start_an_instance_that_is_added_has_its_half() {
    let added = of_300_after_an_instance_is_added(None).await;
    assert!((100..200).contains(&added), "{added}");
}

async fn of_300_after_an_instance_is_added(slow_start: Option<Duration>) -> usize {
    let launcher = FakeLauncher::start();
    let (first, added) = (Web::saying("first").await, Web::saying("added").await);
    let mut blog = app("blog");
    blog.scale.slow_start = slow_start;
    launcher.put(blog, first.port);
    let proxy = Proxy::start(&launcher).await;
    for _ in 0..20 {
        assert_eq!(get(proxy.address, "blog.test", "/").await.body, "first", "the very first has all");
    }
    add_instance(&launcher, &proxy, "blog", added.port).await;
    for _ in 0..300 {
        assert_eq!(get(proxy.address, "blog.test", "/").await.status, 200);
    }
    assert_eq!(first.count() + added.count(), 320);
    added.count()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_would_wait_goes_to_an_instance_that_was_just_added() {
    let launcher = FakeLauncher::start();
    let busy = Web::start(|_| std::future::pending()).await;
    let added = Web::saying("added").await;
    let mut blog = app("blog");
    (blog.scale.slow_start, blog.scale.concurrency) = (Some(Duration::from_secs(3600)), Some(1));
    launcher.put(blog, busy.port);
    let proxy = Proxy::start(&launcher).await;
    let address = proxy.address;
    let stuck = tokio::spawn(async move { get(address, "blog.test", "/").await });
    eventually(|| busy.count() == 1).await;
    let waiting = tokio::spawn(async move { get(address, "blog.test", "/").await });
    eventually(|| proxy.held() == 1).await;
    add_instance(&launcher, &proxy, "blog", added.port).await;
    assert_eq!(waiting.await.unwrap().body, "added");
    stuck.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_proxy_is_full_the_app_with_the_crowd_makes_room_for_others() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    for (name, delay) in [("crowd", 60), ("quiet", 0)] {
        launcher.put(app(name), web.port);
        launcher.script(name, |script| script.delay = Duration::from_secs(delay));
    }
    let proxy = Proxy::start_with(&launcher, |config| config.hold_limit = 10).await;
    let address = proxy.address;
    let mut crowd = tokio::task::JoinSet::new();
    (0..10).for_each(|_| _ = crowd.spawn(get(address, "crowd.test", "/")));
    eventually(|| proxy.held() == 10).await;

    assert_eq!(get(address, "quiet.test", "/").await.body, "hello");

    let refused = crowd.join_next().await.unwrap().unwrap();
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    eventually(|| proxy.held() == 9).await;
    crowd.spawn(get(address, "crowd.test", "/"));
    eventually(|| proxy.held() == 10).await;
    assert_eq!(
        get(address, "crowd.test", "/").await.status,
        503,
        "the crowd's next one has no claim on others"
    );
    assert_eq!(proxy.held(), 10);
    let figures = launcher_client::admin::metrics(&launcher.state.proxy_socket()).await.unwrap();
    assert!(figures.contains("fastcontainer_proxy_unanswered_total{reason=\"shed\"} 2"), "{figures}");
    assert!(figures.contains("fastcontainer_proxy_held{app=\"crowd\"} 10"), "{figures}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_sees_a_waiting_page_and_then_the_app_while_everything_else_is_held() {
    let (launcher, web) = (FakeLauncher::start(), Web::saying("hello").await);
    let mut blog = app("blog");
    (blog.hold.page, blog.hold.page_after) = (true, Duration::from_millis(50));
    launcher.put(blog, web.port);
    launcher.script("blog", |script| script.delay = Duration::from_secs(2));
    let proxy = Proxy::start(&launcher).await;
    let address = proxy.address;
    let browse = async |method: &str, mode: &str| {
        let request = format!(
            "{method} / HTTP/1.1\r\nHost: blog.test\r\nAccept: text/html,*/*\r\nSec-Fetch-Mode: {mode}\r\nConnection: close\r\n\r\n"
        );
        raw(address, request.as_bytes()).await
    };

    let page = browse("GET", "navigate").await;

    assert_eq!((page.status, page.header("cache-control")), (503, Some("no-store")));
    assert!(page.header("retry-after").is_some() && page.header("content-security-policy").is_some());
    assert!(
        page.body.contains("blog is starting") && page.body.contains("http-equiv=\"refresh\""),
        "{}",
        page.body
    );
    assert_eq!(proxy.held(), 0);

    let (program, script, form) =
        tokio::join!(get(address, "blog.test", "/"), browse("GET", "cors"), browse("POST", "navigate"));
    for held in [program, script, form] {
        assert_eq!((held.status, held.body.as_str()), (200, "hello"));
    }
    assert_eq!(browse("GET", "navigate").await.body, "hello");
    assert_eq!(launcher.wakes("blog"), 1, "the start went on though nobody waited for a moment");
}
