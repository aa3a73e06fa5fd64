//! The API: what an operator's programs do over HTTP, by the doors of a real host.

use std::fs;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    host::{Host, free_port, program},
    http::{Connection, Request, Response, request},
    vhost::{Vhost, images},
};

/// A host with an API, and its tokens.
struct Served {
    host: Host,
    port: u16,
}

const TOKENS: [(&str, &str, &str); 3] =
    [("read", "eve", "look-only"), ("operate", "olga", "hands-on"), ("admin", "anna", "all-of-it")];

fn line(role: &str, name: &str, token: &str) -> String {
    let digest: String = Sha256::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{role} {name} {digest}\n")
}

impl Served {
    fn up(vhosts: &[&Vhost]) -> Self {
        let files: Vec<(String, Vec<u8>)> =
            vhosts.iter().map(|v| (format!("{}.toml", v.name()), v.text().into_bytes())).collect();
        let port = free_port();
        let tokens = std::env::temp_dir().join(format!("fc-tokens-{}-{port}", std::process::id()));
        fs::write(&tokens, TOKENS.map(|(role, name, token)| line(role, name, token)).concat()).unwrap();
        let address = format!("127.0.0.1:{port}");
        let arguments = ["--api", &address, "--tokens", &tokens.to_string_lossy()];
        let host = Host::up_after(&files, &arguments, |_| {});
        let served = Self { host, port };
        served.host.wait_for("the API", || Connection::try_open(port).is_ok());
        served
    }

    fn tokens(&self) -> std::path::PathBuf {
        std::env::temp_dir().join(format!("fc-tokens-{}-{}", std::process::id(), self.port))
    }

    fn send(&self, request: &Request) -> Response {
        Connection::open(self.port)
            .exchange(request)
            .unwrap_or_else(|broken| panic!("{broken}\n{}", self.host.log_tail()))
    }

    fn ask(&self, token: &str, method: &str, path: &str, body: Option<&Value>) -> Response {
        self.send(&asked(token, method, path, body))
    }

    fn admin(&self, method: &str, path: &str, body: &Value) -> Response {
        self.ask("all-of-it", method, path, Some(body))
    }

    fn audit(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.host.state.join("coreapi/audit.log")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn end(self) {
        let tokens = self.tokens();
        self.host.end();
        let _ = fs::remove_file(tokens);
    }
}

fn asked(token: &str, method: &str, path: &str, body: Option<&Value>) -> Request {
    let mut asked = request(method, "api.test", path);
    if !token.is_empty() {
        asked = asked.header("Authorization", &format!("Bearer {token}"));
    }
    match body {
        Some(body) => asked.header("Content-Type", "application/json").body(body.to_string().as_bytes()),
        None => asked,
    }
}

/// What the vhost file of [`Vhost::probe`] says, as JSON.
fn probe(name: &str) -> Value {
    json!({
        "server-name": [format!("{name}.test")],
        "container": {
            "image": format!("dir:{}/probe", images().display()), "command": ["/probe"], "port": 8080,
            "env": { "EDITION": "1" },
        },
    })
}

/// The answer's JSON, whatever its status.
fn body(response: &Response) -> Value {
    serde_json::from_slice(&response.body).unwrap_or_else(|error| panic!("{error}: {}", response.text()))
}

fn problem(response: &Response, status: u16) -> Value {
    assert_eq!(response.status, status, "{}", response.text());
    assert_eq!(response.header("content-type"), Some("application/problem+json"));
    let problem = body(response);
    assert_eq!(problem["status"], status);
    problem
}

#[test]
fn an_app_is_made_visited_changed_and_taken_away() {
    let served = Served::up(&[]);
    let shop = Vhost::probe("shop");

    let made = served.admin("POST", "/v1/apps", &json!({ "name": "shop", "vhost": probe("shop") }));
    assert_eq!(made.status, 201, "{}", made.text());
    assert_eq!(body(&made), json!({ "dry_run": false, "changes": [{ "app": "shop", "action": "create" }] }));
    served.host.wait_for("its first visitor", || served.host.get(&shop, "/").status == 200);
    let again = served.admin("POST", "/v1/apps", &json!({ "name": "shop", "vhost": probe("shop") }));
    assert_eq!(problem(&again, 409)["code"], "conflict");

    let app = served.ask("all-of-it", "GET", "/v1/apps/shop", None).expect_status(200).json();
    assert_eq!((&app["origin"], &app["vhost"]["container"]["env"]["EDITION"]), (&"api".into(), &"1".into()));
    let put_back = served.admin("PUT", "/v1/apps/shop", &app["vhost"]).expect_status(200).json();
    assert_eq!(put_back["changes"], json!([]), "what was read says the same when it is written");

    let patch = json!({ "container": { "env": { "EDITION": "2" } }, "resources": { "memory": "64MiB" } });
    let dry = served.admin("PATCH", "/v1/apps/shop?dry-run=true", &patch).expect_status(200).json();
    assert_eq!(dry["dry_run"], true);
    let fields = dry["changes"][0]["fields"].as_array().unwrap();
    assert!(
        fields.contains(&json!({ "pointer": "/resources/memory", "before": "512MiB", "after": "64MiB" })),
        "{dry}"
    );
    let unchanged = served.ask("all-of-it", "GET", "/v1/apps/shop", None).json();
    assert_eq!(unchanged["vhost"]["container"]["env"]["EDITION"], "1", "a dry run does nothing");
    let done = served.admin("PATCH", "/v1/apps/shop", &patch).expect_status(200).json();
    assert_eq!(done["changes"], dry["changes"], "it does what it said");
    served.host.wait_for("the change", || served.host.get(&shop, "/env").json()["EDITION"] == "2");

    served.ask("all-of-it", "DELETE", "/v1/apps/shop?dry-run=true", None).expect_status(200);
    served.ask("all-of-it", "DELETE", "/v1/apps/shop", None).expect_status(200);
    served.host.wait_for("the app to be unknown", || served.host.get(&shop, "/").status == 404);
    let gone = served.ask("all-of-it", "DELETE", "/v1/apps/shop", None);
    assert_eq!(problem(&gone, 404)["code"], "unknown-app");
    served.end();
}

#[test]
fn every_fault_points_at_its_field() {
    let served = Served::up(&[]);
    let mut vhost = probe("shop");
    vhost["container"]["prot"] = 80.into();
    vhost["resources"] = json!({ "memory": "lots" });
    vhost["server-name"] = json!(["shop.test", "a..b"]);

    let refused = served.admin("POST", "/v1/apps", &json!({ "name": "shop", "vhost": vhost }));

    let told = problem(&refused, 422);
    let mut pointers: Vec<&str> =
        told["errors"].as_array().unwrap().iter().map(|error| error["pointer"].as_str().unwrap()).collect();
    pointers.sort_unstable();
    assert_eq!(
        pointers,
        ["/vhost/container/prot", "/vhost/resources/memory", "/vhost/server-name/1"],
        "{told}"
    );
    assert!(told.to_string().contains("did you mean \\\"port\\\"?"), "{told}");
    let put = problem(&served.admin("PUT", "/v1/apps/shop", &json!({})), 422);
    assert_eq!(put["errors"][0]["pointer"], "", "{put}");

    let broken = asked("all-of-it", "PUT", "/v1/apps/shop", None)
        .header("Content-Type", "application/json")
        .body(b"{\"server-name\":\n [}");
    let broken = problem(&served.send(&broken), 400);
    assert_eq!((&broken["errors"][0]["line"], &broken["errors"][0]["column"]), (&2.into(), &3.into()));
    let untyped = asked("all-of-it", "PUT", "/v1/apps/shop", None).body(b"{}");
    problem(&served.send(&untyped), 415);
    problem(&served.admin("POST", "/v1/apps/shop/limit", &json!({ "cpu": "much" })), 422);
    problem(&served.ask("all-of-it", "GET", "/v1/usage?since=yesterday", None), 400);
    problem(&served.ask("all-of-it", "GET", "/v1/nothing", None), 404);
    problem(&served.ask("all-of-it", "DELETE", "/v1/apps", None), 405);
    problem(&served.admin("PUT", "/v1/apps/..%2Fx", &probe("shop")), 400);
    served.end();
}

#[test]
fn a_token_opens_what_its_role_may_and_no_more() {
    let blog = Vhost::probe("blog").env("PASSWORD", "secret");
    let served = Served::up(&[&blog]);
    served.host.get(&blog, "/").expect_status(200);

    for token in ["", "wrong", "look-onl"] {
        let refused = served.ask(token, "GET", "/v1/apps", None);
        problem(&refused, 401);
        assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
    }
    let app = served.ask("look-only", "GET", "/v1/apps/blog", None).expect_status(200);
    assert!(!app.text().contains("secret") && app.text().contains("PASSWORD"), "{}", app.text());
    assert!(served.ask("hands-on", "GET", "/v1/apps/blog", None).text().contains("secret"));
    let running = served.ask("look-only", "GET", "/v1/instances?app=blog", None).expect_status(200).json();
    assert_eq!((&running[0]["state"], &running[0]["app"]), (&"ready".into(), &"blog".into()));
    for path in ["/v1/images", "/v1/usage", "/v1/events", "/v1/hosts", "/v1/apps"] {
        served.ask("look-only", "GET", path, None).expect_status(200);
    }
    problem(&served.ask("look-only", "POST", "/v1/apps/blog/stop", None), 403);
    problem(&served.ask("look-only", "GET", "/v1/apps/blog/logs", None), 403);
    let not_yours = problem(&served.ask("hands-on", "DELETE", "/v1/apps/blog", None), 403);
    assert!(not_yours["detail"].as_str().unwrap().contains("needs the role admin"), "{not_yours}");
    served.ask("hands-on", "POST", "/v1/apps/blog/stop", None).expect_status(200);
    assert_eq!(served.host.states("blog"), ["absent"]);
    let woken = served.ask("hands-on", "POST", "/v1/apps/blog/wake", None).expect_status(200).json();
    assert_eq!(woken["port"], 8080);
    served
        .ask("hands-on", "POST", "/v1/apps/blog/limit", Some(&json!({ "memory": "96MiB" })))
        .expect_status(200);
    served.host.wait_for("the limit", || served.host.ps("blog")[0]["memory_limit"] == 96 << 20);
    served.ask("hands-on", "POST", "/v1/apps/blog/scale", Some(&json!({ "auto": true }))).expect_status(200);

    fs::write(served.tokens(), line("admin", "anna", "all-of-it")).unwrap();
    problem(&served.ask("hands-on", "GET", "/v1/apps", None), 401);
    served.ask("all-of-it", "GET", "/v1/apps", None).expect_status(200);

    let audit = served.audit();
    let stop =
        audit.iter().find(|line| line["what"] == "POST /v1/apps/blog/stop" && line["status"] == 200).unwrap();
    assert_eq!((&stop["who"], &stop["role"]), (&"olga".into(), &"operate".into()));
    let refused = audit.iter().find(|line| line["what"] == "DELETE /v1/apps/blog").unwrap();
    assert_eq!((&refused["who"], &refused["status"]), (&"olga".into(), &403.into()));
    assert!(audit.iter().any(|line| line["who"] == "-" && line["status"] == 401));
    assert!(audit.iter().all(|line| line["request_id"].as_str().is_some_and(|id| !id.is_empty())));
    assert!(audit.iter().all(|line| line["what"] != "GET /v1/images"), "looking is not written down");
    served.end();
}

#[test]
fn without_tokens_who_is_on_this_host_may_look_and_nobody_elsewhere_is_let_in() {
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let blog = Vhost::probe("blog").env("PASSWORD", "secret");
    let files = [("blog.toml".to_owned(), blog.text().into_bytes())];
    let host = Host::up_after(&files, &["--api", &address], |_| {});
    host.wait_for("the API", || Connection::try_open(port).is_ok());
    let send = |asked: Request| Connection::open(port).exchange(&asked).unwrap();

    let app = send(request("GET", &address, "/v1/apps/blog")).expect_status(200);
    assert!(!app.text().contains("secret"));
    let refused = problem(&send(request("DELETE", &address, "/v1/apps/blog")), 403);
    assert!(refused["detail"].as_str().unwrap().contains("--tokens"), "{refused}");
    problem(&send(request("GET", "rebound.example", "/v1/apps")), 401);
    host.end();

    let refused = std::process::Command::new(program("fastcontainer-coreapi"))
        .args(["--api", "0.0.0.0:0", "--state", "/nonexistent"])
        .output()
        .unwrap();
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("--tokens FILE"), "{said}");
}

#[test]
fn a_request_that_is_sent_again_is_done_once() {
    let served = Served::up(&[]);
    let body = json!({ "name": "shop", "vhost": probe("shop") });
    let send = |key: &str, body: &Value| {
        served.send(
            &asked("all-of-it", "POST", "/v1/apps", None)
                .header("Idempotency-Key", key)
                .header("Content-Type", "application/json")
                .body(body.to_string().as_bytes()),
        )
    };

    let first = send("one", &body).expect_status(201);
    let second = send("one", &body).expect_status(201);

    assert_eq!(first.body, second.body);
    assert_eq!(
        (first.header("idempotent-replayed"), second.header("idempotent-replayed")),
        (None, Some("true"))
    );
    assert_eq!(served.host.count("shop", "config-applied"), 1);
    problem(&send("one", &json!({ "name": "other", "vhost": probe("other") })), 422);
    problem(&send("two", &body), 409);
    served.end();
}

#[test]
fn events_are_streamed_and_go_on_where_a_client_stopped() {
    let blog = Vhost::probe("blog");
    let served = Served::up(&[&blog]);
    let follow = |id: Option<&str>| {
        let mut asked = asked("look-only", "GET", "/v1/events/stream?app=blog", None);
        if let Some(id) = id {
            asked = asked.header("Last-Event-ID", id);
        }
        let mut connection = Connection::open(served.port);
        connection.send(&asked);
        let head = connection.receive_head().unwrap();
        assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream")));
        connection
    };
    let next = |connection: &mut Connection| loop {
        let chunk = String::from_utf8(connection.read_chunk().unwrap().unwrap()).unwrap();
        let field = |name: &str| chunk.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if let (Some(id), Some(data)) = (field("id:"), field("data:")) {
            return (id.to_owned(), serde_json::from_str::<Value>(data).unwrap());
        }
    };

    let mut stream = follow(None);
    let (applied, event) = next(&mut stream);
    assert_eq!(event["kind"], "config-applied");
    served.host.get(&blog, "/").expect_status(200);
    assert_eq!(next(&mut stream).1["kind"], "wake");
    stream.leave();

    let mut stream = follow(Some(&applied));
    assert_eq!(next(&mut stream).1["kind"], "wake", "the one after the last that it had");
    assert_eq!(next(&mut stream).1["kind"], "ready");
    stream.leave();

    let mut stream = follow(Some("1-1"));
    assert_eq!(next(&mut stream).1["kind"], "config-applied", "another life's number: everything");
    stream.leave();
    problem(&served.ask("look-only", "GET", "/v1/apps/none/instances", None), 404);
    served.end();
}

#[test]
fn a_folder_is_applied_whole_or_not_at_all() {
    let blog = Vhost::probe("blog");
    let served = Served::up(&[&blog]);
    let apply = |query: &str, files: &[(&str, &str)]| {
        let files: serde_json::Map<String, Value> =
            files.iter().map(|(name, text)| ((*name).to_owned(), (*text).into())).collect();
        served.admin("POST", &format!("/v1/apply{query}"), &json!({ "files": files }))
    };
    let (shop, wiki) = (Vhost::probe("shop"), Vhost::probe("wiki"));
    let actions = |response: Response| {
        let outcome = response.expect_status(200).json();
        let changes = outcome["changes"].as_array().unwrap().clone();
        changes.iter().map(|change| format!("{} {}", change["action"], change["app"])).collect::<Vec<_>>()
    };

    let bad = format!("{}[resources]\nmemory = \"lots\"\n", wiki.text());
    let refused = apply(
        "",
        &[("shop.toml", &shop.text()), ("wiki.toml", &bad), ("../x.toml", ""), ("blog.toml", &blog.text())],
    );
    let told = problem(&refused, 422);
    let errors = told["errors"].as_array().unwrap();
    let lots = errors.iter().find(|error| error["file"] == "wiki.toml").unwrap();
    assert_eq!((lots["line"].as_u64(), lots["column"].as_u64()), (Some(7), Some(10)), "{told}");
    assert!(errors.iter().any(|error| error["file"] == "../x.toml"), "{told}");
    let theirs = errors.iter().find(|error| error["file"] == "blog.toml").unwrap();
    assert!(theirs["detail"].as_str().unwrap().contains("configured by conf.d"), "{told}");
    assert_eq!(served.host.get(&shop, "/").status, 404, "nothing was done");

    let both = [("shop.toml", shop.text()), ("wiki.toml", wiki.text())];
    let both: Vec<(&str, &str)> = both.iter().map(|(name, text)| (*name, text.as_str())).collect();
    assert_eq!(actions(apply("?dry-run=true", &both)), ["\"create\" \"shop\"", "\"create\" \"wiki\""]);
    assert_eq!(actions(apply("", &both)).len(), 2);
    assert!(actions(apply("", &both)).is_empty(), "it is so already");
    for vhost in [&shop, &wiki] {
        served.host.wait_for("a visitor's answer", || served.host.get(vhost, "/").status == 200);
    }
    let changed = shop.clone().env("EDITION", "2").text();
    assert_eq!(
        actions(apply("", &[("shop.toml", &changed)])),
        ["\"remove\" \"wiki\"", "\"replace\" \"shop\""]
    );
    served.host.wait_for("the one to be gone", || served.host.get(&wiki, "/").status == 404);
    served.host.get(&blog, "/").expect_status(200);
    served.end();
}

#[test]
fn a_folder_and_the_api_do_not_undo_each_other() {
    let blog = Vhost::probe("blog");
    let served = Served::up(&[&blog]);
    served.admin("PUT", "/v1/apps/shop", &probe("shop")).expect_status(201);
    let origin =
        |app: &str| served.ask("all-of-it", "GET", &format!("/v1/apps/{app}"), None).json()["origin"].clone();

    // The API leaves the folder's app alone, unless it is told to take it over.
    let refused = problem(&served.admin("PUT", "/v1/apps/blog", &probe("blog")), 409);
    assert!(refused["detail"].as_str().unwrap().contains("configured by conf.d"), "{refused}");
    problem(&served.ask("all-of-it", "DELETE", "/v1/apps/blog", None), 409);
    let mut thief = probe("thief");
    thief["server-name"] = json!(["thief.test", "blog.test"]);
    let clash = problem(&served.admin("PUT", "/v1/apps/thief", &thief), 409);
    assert_eq!(clash["errors"][0]["pointer"], "/server-name/1", "{clash}");

    // The folder leaves the API's app alone, and says so.
    fs::write(served.host.conf.join("shop.toml"), Vhost::probe("shop").env("EDITION", "9").text()).unwrap();
    served.host.wait_for("the refusal", || served.host.count("shop", "config-error") > 0);
    let told = served.host.events("shop").iter().any(|event| {
        event["kind"] == "config-error"
            && event["message"].as_str().is_some_and(|m| m.contains("configured by api"))
    });
    assert!(told, "{:?}", served.host.events("shop"));
    fs::remove_file(served.host.conf.join("shop.toml")).unwrap();
    served.host.apply(&blog.clone().env("EDITION", "3"));
    assert_eq!((origin("shop"), origin("blog")), ("api".into(), "conf.d".into()));
    assert_eq!(served.host.get(&Vhost::probe("shop"), "/env").json()["EDITION"], "1");

    served.admin("PUT", "/v1/apps/blog?take-over=true", &probe("blog")).expect_status(200);
    assert_eq!(origin("blog"), "api");
    fs::remove_file(served.host.conf.join("blog.toml")).unwrap();
    served.host.apply(&Vhost::probe("wiki"));
    served.host.get(&blog, "/").expect_status(200);

    // Both outlive the programs.
    let coreapi = served.host.pid_of("fastcontainer-coreapi");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(coreapi), nix::sys::signal::SIGKILL).unwrap();
    served.host.wait_for("the API to be back", || {
        let again = served.host.find_pid_of("fastcontainer-coreapi").is_some_and(|pid| pid != coreapi);
        again && Connection::try_open(served.port).is_ok()
    });
    assert_eq!(
        (origin("shop"), origin("blog"), origin("wiki")),
        ("api".into(), "api".into(), "conf.d".into())
    );
    served.end();
}

#[test]
fn the_api_is_as_it_is_described_whatever_it_is_sent() {
    let schemathesis = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/schemathesis/bin/schemathesis");
    assert!(
        fs::exists(schemathesis).unwrap(),
        "{schemathesis} is not there: run scripts/install-missing test"
    );
    let served = Served::up(&[&Vhost::probe("blog")]);
    let work = tempfile::tempdir().unwrap();

    let output = std::process::Command::new(schemathesis)
        .args(["run", &format!("http://127.0.0.1:{}/openapi.json", served.port)])
        .args(["--header", "Authorization: Bearer all-of-it", "--max-time", "20", "--continue-on-failure"])
        // A stream has no end; what a vhost's values mean is more than a JSON schema can say.
        .args(["--exclude-path", "/v1/events/stream", "--exclude-checks", "positive_data_acceptance"])
        .current_dir(work.path())
        .output()
        .unwrap();

    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}\n{}\n{}",
        String::from_utf8_lossy(&output.stderr),
        served.host.log_tail()
    );
    served.ask("all-of-it", "GET", "/v1/apps", None).expect_status(200);
    assert!(!served.host.log().contains("panicked"), "{}", served.host.log_tail());
    served.end();
}

#[test]
fn the_operators_commands_are_the_same_from_afar() {
    let blog = Vhost::probe("blog");
    let served = Served::up(&[&blog]);
    let (host, folder) = (&served.host, tempfile::tempdir().unwrap());
    let token = folder.path().join("token");
    fs::write(&token, "all-of-it\n").unwrap();
    let url = format!("http://127.0.0.1:{}", served.port);
    let nowhere = folder.path().join("nowhere");
    let run = |token: Option<&std::path::Path>, arguments: &[&str]| {
        let mut command = std::process::Command::new(program("fastcontainer"));
        command.args(arguments).args(["--api", &url]).arg("--state").arg(&nowhere);
        if let Some(token) = token {
            command.arg("--token-file").arg(token);
        }
        command.output().unwrap()
    };
    let afar = |arguments: &[&str]| {
        let output = run(Some(&token), arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {said}\n{}", host.log_tail());
        String::from_utf8(output.stdout).unwrap()
    };

    assert!(afar(&["wake", "blog", "-v"]).contains("is ready on port 8080"));
    for verb in [&["images"][..], &["logs", "blog"], &["nodes"], &["events", "--app", "blog", "--json"]] {
        assert_eq!(afar(verb), host.ctl_ok(verb), "{verb:?}");
    }
    afar(&["limit", "blog", "--memory", "96MiB"]);
    let line: Vec<Value> = serde_json::from_str(&afar(&["ps", "blog", "--json"])).unwrap();
    assert_eq!((&line[0]["state"], &line[0]["memory_limit"]), (&"ready".into(), &(96 << 20).into()));
    afar(&["scale", "blog", "--auto"]);
    afar(&["usage"]);
    afar(&["restart", "blog"]);
    assert!(afar(&["stop", "blog"]).contains("is stopped"));
    assert_eq!(host.states("blog"), ["absent"]);

    let refused = |output: std::process::Output| {
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(refused(run(Some(&token), &["stop", "none"])).0, Some(4));
    let (code, said) = refused(run(None, &["ps"]));
    assert!(code == Some(2) && said.contains("send a token"), "{said}");
    let (code, said) = refused(run(Some(&token), &["drain", "web1"]));
    assert!(code == Some(4) && said.contains("no host is called"), "{code:?} {said}");

    // A folder, first looked at, then applied; with a fault nothing is done.
    let conf = folder.path().join("conf.d");
    fs::create_dir(&conf).unwrap();
    let shop = Vhost::probe("shop");
    fs::write(conf.join("shop.toml"), shop.text()).unwrap();
    let conf = conf.to_string_lossy();
    let diff = run(Some(&token), &["diff", &conf]);
    assert_eq!(
        (diff.status.code(), String::from_utf8_lossy(&diff.stdout).lines().next()),
        (Some(1), Some("+ shop"))
    );
    assert_eq!(afar(&["apply", &conf]).lines().last(), Some("1 new, 0 changed, 0 removed"));
    host.wait_for("the first visitor", || host.get(&shop, "/").status == 200);
    assert!(run(Some(&token), &["diff", &conf]).status.success());
    assert!(host.ctl_ok(&["apply", &conf]).contains("so already"), "root needs no token on the host itself");
    fs::write(format!("{conf}/wiki.toml"), "server-name = 3").unwrap();
    let (code, said) = refused(run(Some(&token), &["apply", &conf]));
    assert!(
        code == Some(1) && said.contains("nothing was done") && said.contains("wiki.toml:1:15"),
        "{said}"
    );
    let many = refused(run(Some(std::path::Path::new("/nonexistent")), &["ps"]));
    assert!(many.0 == Some(2) && many.1.contains("--token-file"), "{many:?}");

    // A token that is made is one that opens.
    let made = host.ctl_ok(&["token", "read", "pia", "--file", &served.tokens().to_string_lossy()]);
    served.ask(made.trim(), "GET", "/v1/apps", None).expect_status(200);
    problem(&served.ask(made.trim(), "POST", "/v1/apps/blog/stop", None), 403);
    served.end();
}
