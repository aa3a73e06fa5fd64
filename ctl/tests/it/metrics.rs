//! Figures for Prometheus.

use std::net::TcpListener;

use crate::{
    host::Host,
    http::{Connection, get},
    vhost::Vhost,
};

#[test]
fn one_page_has_the_figures_of_launcher_and_proxy() {
    let blog = Vhost::probe("blog").with("resources", "cpu = \"30%\"");
    let files = [("blog.toml".to_owned(), blog.text().into_bytes())];
    let port =
        TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
    let host = Host::up_after(&files, &["--metrics", &format!("127.0.0.1:{port}")], |_| {});
    host.get(&blog, "/").expect_status(200);
    host.wait_for("its quota", || host.ps("blog")[0]["cpu_limit"] == 300);

    let page = Connection::open(port).exchange(&get("localhost", "/metrics")).expect("an answer");

    assert_eq!(page.status, 200);
    let text = page.text().to_string();
    for line in [
        "fastcontainer_up{daemon=\"launcher\"} 1",
        "fastcontainer_up{daemon=\"proxy\"} 1",
        "fastcontainer_launcher_wakes_total{outcome=\"cold\"} 1",
        "fastcontainer_launcher_starts_total{outcome=\"ready\"} 1",
        "fastcontainer_launcher_start_step_seconds_count{step=\"app\"} 1",
        "fastcontainer_launcher_instances{state=\"ready\"} 1",
        "fastcontainer_launcher_app_cpu_quota_cores{app=\"blog\"} 0.3",
        "fastcontainer_launcher_starts_waiting 0",
        "fastcontainer_proxy_requests_total{app=\"blog\",class=\"2xx\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    let names = |text: &str| {
        text.lines().filter(|line| line.starts_with("# HELP")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(names(&host.ctl_ok(&["metrics"])), names(&text), "the command tells the same");
    assert_eq!(Connection::open(port).exchange(&get("localhost", "/")).expect("an answer").status, 404);
    host.end();
}
