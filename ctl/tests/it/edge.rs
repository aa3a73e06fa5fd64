//! What HTTP clients see at the edge.

use std::time::Duration;

use crate::{
    host::Host,
    http::{Broken, Connection, get, post, request},
    vhost::Vhost,
};

#[test]
fn hosts_are_found_whatever_their_case_and_others_are_not() {
    let blog = Vhost::probe("blog");
    let wild = (
        "wild.toml".to_owned(),
        Vhost::probe("wild").text().replace("[\"wild.test\"]", "[\"*.wild.test\"]").into_bytes(),
    );
    let host = Host::up_with(&[("blog.toml".into(), blog.text().into_bytes()), wild]);
    for name in ["blog.test", "BLOG.Test", "blog.test.", "blog.test:8080"] {
        assert_eq!(host.ask(&get(name, "/")).unwrap().json()["app"], "blog", "{name}");
    }
    assert_eq!(host.ask(&get("a.b.wild.test", "/")).unwrap().json()["app"], "wild");
    for name in ["wild.test", "nobody.test"] {
        host.ask(&get(name, "/")).unwrap().expect_status(404);
    }
    for name in ["a b", "a, b", "a/b", "user@blog.test", "blog.test:99999", ""] {
        host.ask(&get(name, "/")).unwrap().expect_status(400);
    }
    host.end();
}

#[test]
fn an_error_page_suits_who_reads_it() {
    let host = Host::up(&[]);
    let plain = host.ask(&get("nobody.test", "/")).unwrap();
    assert!(plain.header("content-type").unwrap().starts_with("text/plain"));
    let html = host.ask(&get("nobody.test", "/").header("Accept", "text/html,*/*")).unwrap();
    assert!(html.header("content-type").unwrap().starts_with("text/html"));
    assert!(html.text().contains("<html") || html.text().contains("<!doctype"), "{}", html.text());
    assert!(html.text().len() < 4096);
    host.end();
}

#[test]
fn nobody_can_pretend_to_be_the_proxy() {
    let blog = Vhost::probe("blog");
    let host = Host::up(&[&blog]);
    let request = get(&blog.host(), "/headers")
        .header("X-FastContainer-App", "shop")
        .header("X-Forwarded-For", "6.6.6.6")
        .header("X-Forwarded-Proto", "https")
        .header("X-Real-IP", "6.6.6.6");
    let seen = host.ask(&request).unwrap().json().to_string().to_ascii_lowercase();
    assert!(
        !seen.contains("x-fastcontainer-app") && !seen.contains("6.6.6.6") && !seen.contains("https"),
        "{seen}"
    );
    assert!(
        seen.contains("[\"x-forwarded-for\",\"127.0.0.1\"]") && seen.contains("[\"host\",\"blog.test\"]"),
        "{seen}"
    );
    host.end();
}

#[test]
fn a_client_that_leaves_gives_its_place_to_the_next() {
    let blog = Vhost::probe("blog").env("LISTEN_AFTER_MS", 6000).with("hold", "queue = 1");
    let host = Host::up(&[&blog]);
    let mut first = Connection::open(host.port);
    first.send(&get(&blog.host(), "/"));
    host.wait_for("the start", || host.states("blog") == ["starting"]);
    host.get(&blog, "/").expect_status(503);

    first.leave();

    let mut second = Connection::open(host.port);
    host.wait_for("the place", || {
        second = Connection::open(host.port);
        second.send(&get(&blog.host(), "/"));
        second.is_silent_for(Duration::from_millis(300))
    });
    assert_eq!(host.states("blog"), ["starting"], "it is held, not served");
    second.receive().unwrap().expect_status(200);
    host.end();
}

#[test]
fn a_post_that_the_app_drops_is_not_sent_twice() {
    let blog = Vhost::probe("blog");
    let host = Host::up(&[&blog]);
    let requests = || host.get(&blog, "/").json()["requests"].as_u64().unwrap();
    let before = requests();
    host.ask(&post(&blog.host(), "/close", "body")).unwrap().expect_status(502);
    assert_eq!(requests(), before + 2, "the POST and this GET");
    host.end();
}

#[test]
fn an_answer_that_breaks_off_is_seen_to_break_off() {
    let blog = Vhost::probe("blog");
    let host = Host::up(&[&blog]);
    let broken = host.ask(&get(&blog.host(), "/half"));
    assert!(matches!(broken, Err(Broken::Truncated(_))), "{broken:?}");
    assert_eq!(host.access_log(1)[0]["error"], "broken-off");
    host.end();
}

#[test]
fn a_websocket_wakes_an_app_and_talks_to_it() {
    let blog = Vhost::probe("blog").env("LISTEN_AFTER_MS", 300);
    let host = Host::up(&[&blog]);
    let upgrade = get(&blog.host(), "/ws")
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==");
    let mut connection = Connection::open(host.port);
    connection.send(&upgrade);
    let answer = connection.receive().unwrap();
    assert_eq!(answer.status, 101);
    assert_eq!(
        answer.header("sec-websocket-accept"),
        Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        "RFC 6455's own example"
    );

    // A masked text frame "hi" comes back unmasked.
    connection.send_bytes(&[0x81, 0x82, 1, 2, 3, 4, b'h' ^ 1, b'i' ^ 2]);
    assert_eq!(connection.read_exactly(4).unwrap(), [0x81, 2, b'h', b'i']);
    connection.leave();
    host.end();
}

#[test]
fn events_come_one_by_one_as_the_app_sends_them() {
    let blog = Vhost::probe("blog");
    let host = Host::up(&[&blog]);
    host.get(&blog, "/").expect_status(200);
    let mut connection = Connection::open(host.port);
    connection.send(&get(&blog.host(), "/sse?events=3&ms=400"));
    connection.receive_head().unwrap().expect_status(200);
    connection.read_chunk().unwrap().expect("the first event");
    assert!(connection.is_silent_for(Duration::from_millis(100)), "the next one has not been sent yet");
    host.end();
}

#[test]
fn a_request_can_be_explained_to_the_microsecond() {
    let blog = Vhost::probe("blog").env("LISTEN_AFTER_MS", 200);
    let host = Host::up(&[&blog]);
    let timed = get(&blog.host(), "/")
        .header("X-FastContainer-Timing", "1")
        .header("X-Request-Id", "my-first-request");
    let answer = host.ask(&timed).unwrap().expect_status(200);
    let timing = answer.header("server-timing").unwrap_or_else(|| panic!("{:?}", answer.headers));
    assert!(timing.contains("hold;dur=") && timing.contains("app;dur="), "{timing}");
    assert_eq!(answer.header("x-request-id"), Some("my-first-request"));

    let record = host.access_log(1).remove(0);
    assert_eq!(
        (&record["status"], &record["app"], &record["wake"]),
        (&200.into(), &"blog".into(), &"cold".into())
    );
    let parts = ["own_us", "hold_us", "connect_us", "send_us", "first_byte_us", "body_us"];
    let sum: u64 = parts.iter().map(|part| record[*part].as_u64().unwrap()).sum();
    assert_eq!(Some(sum), record["total_us"].as_u64(), "{record}");
    assert!(record["hold_us"].as_u64().unwrap() >= 200_000, "{record}");

    let why = host.ctl_ok(&["why", "my-first-request"]);
    assert!(why.contains("blog") && why.contains("listen"), "{why}");
    let last = host.ctl_ok(&["why"]);
    assert!(last.contains("my-first-request") && last.contains("blog.test/"), "{last}");
    host.end();
}

#[test]
fn a_request_without_a_host_is_refused() {
    let host = Host::up(&[]);
    let mut connection = Connection::open(host.port);
    connection.send_bytes(b"GET / HTTP/1.1\r\n\r\n");
    connection.receive().unwrap().expect_status(400);
    let mut connection = Connection::open(host.port);
    connection.send_bytes(b"GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n");
    connection.receive().unwrap().expect_status(400);
    let smuggled = request("POST", "blog.test", "/")
        .header("Content-Length", "3")
        .header("Transfer-Encoding", "chunked");
    host.ask(&smuggled).unwrap().expect_status(400);
    host.end();
}
