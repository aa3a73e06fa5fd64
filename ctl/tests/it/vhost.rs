//! Vhost files for the probe.

use std::path::PathBuf;

/// Where the images are.
pub(crate) fn images() -> PathBuf {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../images");
    let folder = PathBuf::from(std::env::var_os("FC_IMAGES").unwrap_or_else(|| default.into()));
    assert!(folder.join("probe").is_dir(), "{} has no probe image: run `make images`", folder.display());
    folder.canonicalize().expect("the images' folder")
}

/// A vhost of the probe, which can be told to misbehave.
#[derive(Clone, Debug)]
pub(crate) struct Vhost {
    name: String,
    env: Vec<(String, String)>,
    container: Vec<String>,
    sections: Vec<(&'static str, Vec<String>)>,
}

impl Vhost {
    /// The probe as `NAME.test`.
    pub(crate) fn probe(name: &str) -> Self {
        Self { name: name.to_owned(), env: Vec::new(), container: Vec::new(), sections: Vec::new() }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The host name that leads to it.
    pub(crate) fn host(&self) -> String {
        format!("{}.test", self.name)
    }

    /// A variable of the probe's environment.
    pub(crate) fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.env.retain(|(n, _)| n != name);
        self.env.push((name.to_owned(), value.to_string()));
        self
    }

    /// A line of TOML in a section, for example `("lifecycle", "lifetime = \"2s\"")`.
    pub(crate) fn with(mut self, section: &'static str, line: &str) -> Self {
        match self.sections.iter_mut().find(|(name, _)| *name == section) {
            Some((_, lines)) => lines.push(line.to_owned()),
            None => self.sections.push((section, vec![line.to_owned()])),
        }
        self
    }

    /// A line of TOML in `[container]`.
    pub(crate) fn container(mut self, line: &str) -> Self {
        self.container.push(line.to_owned());
        self
    }

    /// The file's text.
    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "server-name = [\"{}\"]\n[container]\nimage = \"dir:{}/probe\"\ncommand = [\"/probe\"]\nport = 8080\n",
            self.host(),
            images().display()
        );
        for line in &self.container {
            text.push_str(&format!("{line}\n"));
        }
        let env: Vec<String> = self.env.iter().map(|(name, value)| format!("{name} = {value:?}")).collect();
        if !env.is_empty() {
            text.push_str(&format!("env = {{ {} }}\n", env.join(", ")));
        }
        for (section, lines) in &self.sections {
            assert!(*section != "container", "the container's own lines come first: use `container`");
            text.push_str(&format!("[{section}]\n{}\n", lines.join("\n")));
        }
        text
    }
}
