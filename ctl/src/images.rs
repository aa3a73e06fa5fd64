//! `images`: the images of all apps.

use cmdb::units::Bytes;
use launcher_client::wire::{ImageStatus, Reply, Request};

use crate::{
    cli::{Global, api::Remote},
    failure::Failure,
    output::{Output, Style},
    table::{self, Align},
    target::Target,
    text,
};

/// Runs the command.
pub(crate) async fn run(global: &Global, remote: &Remote, out: &mut Output) -> Result<(), Failure> {
    let target = Target::reach(global, remote).await?;
    let images = target
        .list(Request::Images, |reply| match reply {
            Reply::Image(image) => Some(image),
            _ => None,
        })
        .await?;
    if out.is_json() {
        return out.json(&images);
    }
    if images.is_empty() {
        return out.line("no images; put a vhost file into conf.d/");
    }
    for (number, line) in lines(&images).into_iter().enumerate() {
        match number.checked_sub(1).and_then(|row| images.get(row)).map(|image| image.state.as_str()) {
            None => out.line(&out.paint(Style::Bold, &line))?,
            Some("failed") => out.line(&out.paint(Style::Red, &line))?,
            Some("waiting" | "fetching" | "unpacking" | "provisioning") => {
                out.line(&out.paint(Style::Yellow, &line))?
            }
            Some(_) => out.line(&line)?,
        }
    }
    Ok(())
}

fn lines(images: &[ImageStatus]) -> Vec<String> {
    use Align::{Left, Right};
    let titles = [
        ("IMAGE", Left),
        ("STATE", Left),
        ("VERSION", Left),
        ("SIZE", Right),
        ("APPS", Left),
        ("LAST ERROR", Left),
    ];
    let rows: Vec<Vec<String>> = images.iter().map(row).collect();
    table::lines(&titles, &rows)
}

fn row(image: &ImageStatus) -> Vec<String> {
    let step = image.step.as_ref().map_or(String::new(), |step| format!(" {}", text::clean(step)));
    let state = match (image.fetched, image.to_fetch) {
        (Some(fetched), Some(all)) if all > 0 => {
            format!("{} {}%", image.state, fetched.saturating_mul(100) / all)
        }
        _ => format!("{}{step}", image.state),
    };
    // A digest's beginning tells versions apart; --json has the whole.
    let id: String = image.id.chars().take(18).collect();
    let apps: Vec<&str> = image.apps.iter().take(3).map(cmdb::AppName::as_str).collect();
    let more = if image.apps.len() > 3 { format!(" +{}", image.apps.len() - 3) } else { String::new() };
    vec![
        text::clean(&image.image).into_owned(),
        state,
        if id.is_empty() { "-".to_owned() } else { id },
        image.bytes.map_or("-".to_owned(), |bytes| Bytes(bytes >> 20 << 20).to_string()),
        format!("{}{more}", apps.join(" ")),
        text::clean(&image.error).into_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_comes_shows_how_far_it_is_and_one_that_failed_why() {
        let coming = ImageStatus {
            image: "docker://registry.example/blog:1".into(),
            state: "fetching".into(),
            id: String::new(),
            bytes: None,
            fetched: Some(30),
            to_fetch: Some(120),
            step: None,
            apps: ["a", "b", "c", "d"].iter().map(|name| name.parse().unwrap()).collect(),
            error: String::new(),
            next_look_ms: None,
        };
        let failed = ImageStatus {
            state: "failed".into(),
            fetched: None,
            to_fetch: None,
            error: "no such \u{1b}image".into(),
            ..coming.clone()
        };

        let lines = lines(&[coming, failed]);

        assert!(lines[1].contains("fetching 25%") && lines[1].contains("a b c +1"), "{lines:?}");
        assert!(lines[2].contains("failed") && lines[2].ends_with("no such \\x1bimage"), "{lines:?}");
    }
}
