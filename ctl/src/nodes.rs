//! `nodes`, `drain`, `uncordon`, `forget`: the hosts, and emptying one of them.

use std::time::{Duration, Instant};

use cmdb::{
    compute::{Node, find},
    units::{Bytes, Millicores},
};

use crate::{
    cli::{self, Global, api::Remote},
    failure::Failure,
    output::{Output, Style},
    table::{self, Align},
    target::Target,
    text,
};

/// How often a host that is being emptied is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// It is empty when it has told nothing else for longer than a heartbeat and its way.
const CERTAIN: Duration = Duration::from_millis(1_200);

/// `nodes`
pub(crate) async fn nodes(global: &Global, remote: &Remote, out: &mut Output) -> Result<(), Failure> {
    let nodes = Target::reach(global, remote).await?.nodes().await?;
    if out.is_json() {
        return out.json(&nodes);
    }
    if nodes.is_empty() {
        return out
            .line("only this host: its CMDB is the embedded one (see `fastcontainer up --help`, --cmdb)");
    }
    for (number, line) in lines(&nodes).into_iter().enumerate() {
        let style = match number.checked_sub(1).and_then(|row| nodes.get(row)) {
            None => Some(Style::Bold),
            Some(node) if !node.alive => Some(Style::Red),
            Some(node) if node.draining => Some(Style::Yellow),
            Some(_) => None,
        };
        match style {
            Some(style) => out.line(&out.paint(style, &line))?,
            None => out.line(&line)?,
        }
    }
    Ok(())
}

/// `drain`
pub(crate) async fn drain(global: &Global, options: &cli::Drain, out: &mut Output) -> Result<(), Failure> {
    let target = Target::reach(global, &options.remote).await?;
    target.drain(&options.node, true).await?;
    if !options.wait {
        return done(
            &options.node,
            "draining",
            "is being emptied; `fastcontainer nodes` shows how far it is",
            out,
        );
    }
    let mut empty_since = None;
    loop {
        let nodes = target.nodes().await?;
        match find(&nodes, &options.node) {
            Some(node) if !node.draining => {
                return Err(Failure::failed(format!("{} is not to be emptied any more", options.node)));
            }
            Some(node) if node.alive && (node.load.instances > 0 || runs(&target, node.name()).await?) => {
                empty_since = None;
            }
            // What a host tells of itself is up to a heartbeat old.
            Some(node) if node.alive && empty_since.get_or_insert_with(Instant::now).elapsed() < CERTAIN => {}
            // One that is not there runs nothing that is of use.
            _ => return done(&options.node, "empty", "is empty", out),
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// `uncordon`
pub(crate) async fn uncordon(
    global: &Global,
    options: &cli::Uncordon,
    out: &mut Output,
) -> Result<(), Failure> {
    let target = Target::reach(global, &options.remote).await?;
    target.drain(&options.node, false).await?;
    done(&options.node, "ready", "takes apps again", out)
}

/// `forget`
pub(crate) async fn forget(global: &Global, options: &cli::Forget, out: &mut Output) -> Result<(), Failure> {
    Target::reach(global, &options.remote).await?.forget(&options.node).await?;
    done(&options.node, "forgotten", "is forgotten", out)
}

/// Whether the CMDB has instances of that host.
async fn runs(target: &Target, node: &str) -> Result<bool, Failure> {
    Ok(target.statuses(None).await?.iter().any(|status| status.node == node))
}

fn done(node: &str, state: &str, words: &str, out: &mut Output) -> Result<(), Failure> {
    if out.is_json() {
        return out.json(&serde_json::json!({ "node": node, "state": state }));
    }
    out.line(&format!("{node} {words}"))
}

fn lines(nodes: &[Node]) -> Vec<String> {
    use Align::{Left, Right};
    let titles = [
        ("NODE", Left),
        ("STATE", Left),
        ("INSTANCES", Right),
        ("FREE CPU", Right),
        ("FREE MEMORY", Right),
        ("DISPATCH", Left),
        ("API", Left),
        ("LABELS", Left),
    ];
    let rows: Vec<Vec<String>> = nodes.iter().map(row).collect();
    table::lines(&titles, &rows)
}

fn row(node: &Node) -> Vec<String> {
    let or_dash = |text: &str| match text::clean(text) {
        text if text.is_empty() => "-".to_owned(),
        text => text.into_owned(),
    };
    let (compute, load) = (&node.compute, &node.load);
    let labels: Vec<String> = compute.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    vec![
        or_dash(node.name()),
        state(node).to_owned(),
        load.instances.to_string(),
        format!("{}/{}", Millicores(load.free_cpu), Millicores(compute.cpu)),
        // In whole MiB, for people.
        format!("{}/{}", Bytes(load.free_memory >> 20 << 20), Bytes(compute.memory >> 20 << 20)),
        or_dash(&compute.dispatch),
        or_dash(&compute.api),
        or_dash(&labels.join(",")),
    ]
}

fn state(node: &Node) -> &'static str {
    match (node.alive, node.draining) {
        (false, _) => "lost",
        (true, true) if node.load.instances == 0 => "empty",
        (true, true) => "draining",
        (true, false) => "ready",
    }
}

#[cfg(test)]
mod tests {
    use cmdb::compute::{Compute, Load};

    use super::*;

    #[test]
    fn an_operator_sees_who_is_there_and_what_is_left() {
        let compute = Compute {
            name: "web1".into(),
            dispatch: "10.0.0.1:7070".into(),
            labels: [("zone".to_owned(), "a".to_owned())].into(),
            cpu: 2_000,
            memory: 8 << 30,
            ..Compute::default()
        };
        let load = Load { free_cpu: 1_500, free_memory: 3 << 30, instances: 12 };
        let web1 = Node { compute: compute.clone(), load, alive: true, draining: false };
        let web2 = Node {
            compute: Compute { name: "web2".into(), ..Compute::default() },
            alive: false,
            draining: true,
            ..Node::default()
        };

        let lines = lines(&[web1.clone(), web2]);

        assert!(lines[1].starts_with("web1  ready"), "{}", lines[1]);
        assert!(lines[1].contains("3GiB/8GiB") && lines[1].ends_with("zone=a"), "{}", lines[1]);
        assert!(lines[2].starts_with("web2  lost"), "{}", lines[2]);
        assert_eq!(state(&Node { draining: true, ..web1 }), "draining");
    }
}
