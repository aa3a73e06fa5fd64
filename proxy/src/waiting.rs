//! The page that a person sees while an app starts (`hold.page`): it says what happens, and asks again by itself. It needs no
//! script, no picture and nothing from elsewhere, so that it works in every browser and is small.

use std::time::Duration;

/// How far a start is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Progress {
    /// Since it began.
    pub since: Duration,
    /// How long the last one took, if one was seen.
    pub usual: Option<Duration>,
}

impl Progress {
    /// Seconds until the page asks again: when it should be ready, but soon enough that nobody thinks it has stopped.
    #[must_use]
    pub fn refresh(&self) -> u64 {
        let left = self.usual.unwrap_or_default().saturating_sub(self.since);
        u64::try_from(left.as_millis().div_ceil(1_000)).unwrap_or(5).clamp(1, 5)
    }
}

/// The page; `app` is escaped already.
pub(crate) fn page(app: &str, progress: &Progress) -> String {
    let since = progress.since.as_secs();
    let (expected, bar) = match progress.usual {
        Some(usual) => {
            let usual_ms = usual.as_millis().max(1);
            let done = progress.since.as_millis().min(usual_ms);
            (
                format!("It usually takes {} s", usual.as_millis().div_ceil(1_000).max(1)),
                format!("<progress aria-labelledby=\"what\" value=\"{done}\" max=\"{usual_ms}\"></progress>"),
            )
        }
        None => (
            "It usually takes some seconds".to_owned(),
            "<progress aria-labelledby=\"what\"></progress>".to_owned(),
        ),
    };
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<meta name=\"robots\" content=\"noindex\">\n\
         <meta http-equiv=\"refresh\" content=\"{refresh}\">\n<title>{app} is starting</title>\n\
         <style>body{{font:16px/1.5 system-ui,sans-serif;max-width:34em;margin:18vh auto;padding:0 1.5em;color:#223;background:#fafafc}}\
         h1{{font-size:1.4em}}progress{{width:100%}}a{{color:inherit}}\
         @media(prefers-color-scheme:dark){{body{{color:#dde;background:#15161c}}}}</style>\n</head>\n\
         <body>\n<main>\n<h1 id=\"what\">{app} is starting</h1>\n{bar}\n\
         <p role=\"status\">{expected}; {since} s have passed. This page opens it by itself when it is ready.</p>\n\
         <p><a href=\"\">Try now</a></p>\n</main>\n</body>\n</html>\n",
        refresh = progress.refresh(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(since: u64, usual: Option<u64>) -> Progress {
        Progress { since: Duration::from_secs(since), usual: usual.map(Duration::from_secs) }
    }

    #[test]
    fn it_asks_again_when_the_app_should_be_ready() {
        for (progress, refresh) in [
            (seconds(0, None), 1),
            (seconds(1, Some(4)), 3),
            (seconds(9, Some(4)), 1),
            (seconds(0, Some(60)), 5),
        ] {
            assert_eq!(progress.refresh(), refresh, "{progress:?}");
            assert!(
                page("blog", &progress).contains(&format!("http-equiv=\"refresh\" content=\"{refresh}\""))
            );
        }
    }

    #[test]
    fn it_is_small_whole_and_needs_nothing_else() {
        for progress in [seconds(2, None), seconds(2, Some(6))] {
            let page = page("blog", &progress);
            assert!(page.len() < 1_500, "{}", page.len());
            for needed in [
                "<html lang=\"en\">",
                "<title>blog is starting</title>",
                "<main>",
                "role=\"status\"",
                "2 s have passed",
            ] {
                assert!(page.contains(needed), "{needed}: {page}");
            }
            for outside in ["://", "src=", "<script", "<link", "url(", "@import"] {
                assert!(!page.contains(outside), "{outside}: {page}");
            }
            for element in ["html", "head", "body", "main", "h1", "p", "a", "title", "style", "progress"] {
                let opened = page.matches(&format!("<{element}>")).count()
                    + page.matches(&format!("<{element} ")).count();
                assert_eq!(opened, page.matches(&format!("</{element}>")).count(), "{element}: {page}");
            }
        }
    }

    #[test]
    fn its_bar_says_how_far_it_is_and_never_more_than_all() {
        assert!(page("blog", &seconds(2, Some(6))).contains("value=\"2000\" max=\"6000\""));
        assert!(page("blog", &seconds(9, Some(6))).contains("value=\"6000\" max=\"6000\""));
    }
}
