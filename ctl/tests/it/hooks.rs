//! The operator's programs run where they are wanted, confined, and disturb nobody.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{host::Host, vhost::Vhost};

/// A probe with these `[[hook]]`s.
fn with_hooks(name: &str, hooks: &[String]) -> Vhost {
    Vhost::probe(name).with("[hook]", &hooks.join("\n[[hook]]\n"))
}

fn hook(when: &str, run: &str) -> String {
    format!("{when}\nrun = [{run}]")
}

/// A host whose hooks folder holds these shell scripts, each of which finds the folder of its notes in `$NOTES`.
struct Hooked {
    host: Host,
    notes: PathBuf,
}

impl Hooked {
    fn up(vhosts: &[&Vhost], scripts: &[(&str, &str)]) -> Self {
        let files: Vec<(String, Vec<u8>)> =
            vhosts.iter().map(|v| (format!("{}.toml", v.name()), v.text().into_bytes())).collect();
        let mut notes = PathBuf::new();
        let host = Host::up_after(&files, &[], |folder| {
            notes = folder.join("notes");
            fs::create_dir(&notes).expect("notes");
            // Hooks are nobody, and write there.
            fs::set_permissions(&notes, fs::Permissions::from_mode(0o1777)).expect("its mode");
            fs::create_dir_all(folder.join("s/hooks")).expect("the hooks folder");
            for (name, script) in scripts {
                write_script(&folder.join("s/hooks").join(name), &notes, script);
            }
        });
        Self { host, notes }
    }

    fn script(&self, name: &str, script: &str) {
        write_script(&self.host.state.join("hooks").join(name), &self.notes, script);
    }

    /// Lines of a note; none when it is not there.
    fn note(&self, name: &str) -> Vec<String> {
        let text = fs::read_to_string(self.notes.join(name)).unwrap_or_default();
        text.lines().map(ToOwned::to_owned).collect()
    }

    /// What events of that kind say about the app.
    fn said(&self, app: &str, kind: &str) -> Vec<String> {
        let events = self.host.events(app);
        let of_kind = events.iter().filter(|event| event["kind"] == kind);
        of_kind.map(|event| event["message"].as_str().expect("a message").to_owned()).collect()
    }
}

fn write_script(path: &Path, notes: &Path, script: &str) {
    let text = format!("#!/bin/sh\nNOTES={}\n{script}\n", notes.display());
    let new = path.with_extension("new");
    fs::write(&new, text).expect("a script");
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).expect("its mode");
    fs::rename(&new, path).expect("in its place");
}

const NOTE: (&str, &str) = ("note", "cat > \"$NOTES/$FC_HOOK.json\"; echo \"$FC_HOOK\" >> \"$NOTES/order\"");

#[test]
fn hooks_run_at_every_point_of_a_life_in_order_and_are_told_of_the_instance() {
    let points = [
        "before-create",
        "after-create",
        "before-start",
        "after-start",
        "before-ready",
        "after-ready",
        "before-stop",
        "after-stop",
        "before-exit",
        "after-exit",
    ];
    let hooks: Vec<String> = points.iter().map(|p| hook(&format!("on = \"{p}\""), "\"note\"")).collect();
    let blog = with_hooks("blog", &hooks);
    let here = Hooked::up(&[&blog], &[NOTE]);

    let generation = here.host.get(&blog, "/").expect_status(200).generation();
    let pid = here.host.ps("blog")[0]["pid"].clone();
    here.host.ctl_ok(&["stop", "blog"]);
    here.host.wait_for("all hooks", || here.note("order").len() >= points.len());

    let order = here.note("order");
    let place = |point: &str| order.iter().position(|line| line == point).expect(point);
    assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), points.len(), "each once: {order:?}");
    let waited: Vec<usize> = points.iter().filter(|p| p.starts_with("before-")).map(|p| place(p)).collect();
    assert!(waited.is_sorted(), "{order:?}");
    for what in ["create", "start", "ready", "stop", "exit"] {
        assert!(place(&format!("before-{what}")) < place(&format!("after-{what}")), "{order:?}");
    }
    let about = |point: &str| -> Value {
        let text = fs::read_to_string(here.notes.join(format!("{point}.json"))).expect(point);
        serde_json::from_str(&text).expect("JSON")
    };
    for point in points {
        assert_eq!(about(point)["app"], "blog");
        assert_eq!(about(point)["generation"], generation);
        assert_eq!(about(point)["server_names"][0], "blog.test");
    }
    assert_eq!(about("before-create")["pid"], Value::Null);
    assert_eq!(about("after-ready")["pid"], pid);
    assert_eq!(about("after-ready")["port"], 8080);
    assert!(about("after-exit")["end"].as_str().expect("its end").contains("exited with status 0"));
    here.host.end();
}

#[test]
fn a_hook_has_no_more_than_it_needs() {
    let blog = with_hooks("blog", &[hook("on = \"after-ready\"", "\"who\", \"an argument\"")]);
    let script = "cat > /dev/null\n\
        { id -u; id -G; grep -E '^(CapEff|CapBnd|CapPrm|NoNewPrivs)' /proc/self/status; echo \"arg=$1\"; echo \"pwd=$(pwd)\"; } > $NOTES/who\n\
        for fd in /proc/$$/fd/*; do [ -L $fd ] && echo ${fd##*/}; done > $NOTES/fds\n\
        env | cut -d= -f1 | sort > $NOTES/env\n\
        cat /proc/self/cgroup > $NOTES/cgroup\n\
        ps -o sid= -p $$ | tr -d ' ' > $NOTES/sid; echo $$ > $NOTES/pid\n\
        echo seen > $NOTES/done; echo to the log";
    let here = Hooked::up(&[&blog], &[("who", script)]);
    here.host.get(&blog, "/").expect_status(200);
    here.host.wait_for("the hook", || here.host.count("blog", "hook") == 1);

    let who = here.note("who");
    assert_eq!(who[0], "65534", "nobody");
    assert_eq!(who[1], "65534", "in no other group");
    for line in [
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "arg=an argument",
    ] {
        assert!(who.iter().any(|l| l == line), "{line} is not in {who:?}");
    }
    assert!(who.contains(&format!("pwd={}", here.host.state.join("hooks").display())), "{who:?}");
    let open: Vec<String> = here.note("fds");
    // The shell has its script open, and its old output, as 10 or higher. (The folder that it has just listed is closed again.)
    assert!(open.iter().all(|fd| ["0", "1", "2", "10", "11", "255"].contains(&fd.as_str())), "{open:?}");
    let env = here.note("env");
    let allowed = ["FC_APP", "FC_GENERATION", "FC_HOOK", "HOME", "PATH", "PWD", "_", "OLDPWD", "SHLVL"];
    assert!(env.iter().all(|name| allowed.contains(&name.as_str())), "{env:?}");
    assert!(here.note("cgroup").iter().any(|line| line.contains("blog~hook")), "{:?}", here.note("cgroup"));
    assert_eq!(here.note("sid"), here.note("pid"), "a session of its own");
    assert!(here.host.ctl_ok(&["logs", "blog"]).contains("to the log"));
    here.host.end();
}

#[test]
fn a_hook_that_refuses_keeps_the_app_from_starting_and_says_why() {
    let refusing = hook("on = \"before-start\"\non-failure = \"abort\"", "\"check\"");
    let blog = with_hooks("blog", &[refusing, hook("on = \"after-exit\"", "\"note\"")]);
    let here = Hooked::up(&[&blog], &[("check", "echo no licence >&2; exit 3"), NOTE]);

    assert_eq!(here.host.get(&blog, "/").status, 502);
    assert_eq!(here.host.states("blog"), ["backing-off"]);
    let failed = here.said("blog", "start-failed");
    assert!(failed[0].contains("hook \"check\" at before-start failed"), "{failed:?}");
    assert!(failed[0].contains("exit status: 3") && failed[0].contains("no licence"), "{failed:?}");
    here.host.wait_for("what comes after every end", || !here.note("after-exit.json").is_empty());

    here.script("check", "exit 0");
    here.host.wait_for("the back-off to be over", || here.host.get(&blog, "/").status == 200);
    here.host.end();
}

#[test]
fn a_gate_before_ready_holds_the_requests() {
    let gate = hook("on = \"before-ready\"\non-failure = \"abort\"", "\"gate\"");
    let blog = with_hooks("blog", &[gate]);
    let wait = "while ! [ -e $NOTES/open ]; do sleep 0.02; done; echo opened >> $NOTES/gate";
    let here = Hooked::up(&[&blog], &[("gate", wait)]);
    std::thread::scope(|scope| {
        let visitor = scope.spawn(|| here.host.get(&blog, "/").expect_status(200));
        here.host.wait_for("the app to be held at the gate", || {
            here.host.states("blog") == ["starting"] && !crate::host::processes_with("./gate").is_empty()
        });
        assert!(!visitor.is_finished());
        fs::write(here.notes.join("open"), "").expect("open the gate");
        visitor.join().expect("an answer");
    });
    assert_eq!(here.note("gate"), ["opened"]);
    here.host.end();
}

#[test]
fn a_hook_that_hangs_holds_up_nobody_and_is_killed_with_all_it_started() {
    let hangs = hook("on = \"after-ready\"\ntimeout = \"1s\"", "\"hang\"");
    let (blog, shop) =
        (with_hooks("blog", &[hangs]), with_hooks("shop", &[hook("on = \"after-ready\"", "\"note\"")]));
    let script = "setsid sleep 31337.5 & echo $! > $NOTES/child; echo $$ > $NOTES/self; exec sleep 31337";
    let here = Hooked::up(&[&blog, &shop], &[("hang", script), NOTE]);

    here.host.get(&blog, "/").expect_status(200);
    here.host.get(&shop, "/").expect_status(200);
    here.host.wait_for("the other's hook", || here.host.count("shop", "hook") == 1);
    here.host.wait_for("it to be given up", || here.host.count("blog", "hook-failed") == 1);

    let said = here.said("blog", "hook-failed");
    assert!(
        said[0].contains("\"hang\" (after-ready)") && said[0].contains("did not end within 1s"),
        "{said:?}"
    );
    for note in ["child", "self"] {
        let pid: i32 = here.note(note)[0].parse().expect("a pid");
        here.host.wait_for("it to be gone", || !Path::new(&format!("/proc/{pid}/stat")).exists());
    }
    assert_eq!(here.host.get(&blog, "/").status, 200, "the app has gone on");
    here.host.end();
}

#[test]
fn hooks_run_in_time_and_on_signals_and_what_they_use_is_on_the_apps_account() {
    let blog = with_hooks(
        "blog",
        &[
            hook("every = \"1s\"", "\"count\", \"every\""),
            hook("after = \"500ms\"", "\"count\", \"late\""),
            hook("on-signal = \"USR1\"", "\"count\", \"signal\""),
        ],
    );
    let here = Hooked::up(
        &[&blog],
        &[("count", "echo x >> $NOTES/$1; i=0; while [ $i -lt 3000 ]; do i=$((i+1)); done")],
    );
    let refused = here.host.ctl(&["signal", "blog", "USR1"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("no instance of blog is ready"), "{refused:?}");
    here.host.get(&blog, "/").expect_status(200);

    here.host.ctl_ok(&["signal", "blog", "USR1"]);
    here.host.wait_for("some seconds", || here.note("every").len() >= 3);
    assert_eq!(here.note("late").len(), 1);
    assert_eq!(here.note("signal").len(), 1);
    let refused = here.host.ctl(&["signal", "blog", "USR2"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("on-signal = \"USR2\""), "{refused:?}");
    crate::usage::assert_conserved(&here.host);

    here.host.ctl_ok(&["stop", "blog"]);
    let before = here.note("every").len();
    std::thread::sleep(std::time::Duration::from_millis(1_500));
    assert!(
        here.note("every").len() <= before + 1,
        "its clock stands still; one run may have been under way"
    );
    here.host.end();
}

#[test]
fn a_program_that_others_could_change_is_not_run() {
    let blog = with_hooks("blog", &[hook("on = \"after-ready\"", "\"theirs\"")]);
    let here = Hooked::up(&[&blog], &[("theirs", "touch $NOTES/ran")]);
    let path = here.host.state.join("hooks/theirs");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o757)).expect("its mode");

    here.host.get(&blog, "/").expect_status(200);
    here.host.wait_for("the refusal", || here.host.count("blog", "hook-failed") == 1);
    let said = here.said("blog", "hook-failed");
    assert!(said[0].contains("does not belong to root alone") && said[0].contains("chmod go-w"), "{said:?}");
    assert!(!here.notes.join("ran").exists());
    here.host.end();
}

#[test]
fn an_app_that_ran_out_of_memory_has_a_hook_of_its_own() {
    let blog =
        with_hooks("blog", &[hook("on = \"oom\"", "\"note\"")]).with("resources", "memory = \"32MiB\"");
    let here = Hooked::up(&[&blog], &[NOTE]);
    here.host.get(&blog, "/").expect_status(200);
    let _ = here.host.ask(&crate::http::get(&blog.host(), "/memhog?mib=64"));
    here.host.wait_for("the hook", || !here.note("oom.json").is_empty());
    assert!(here.note("oom.json")[0].contains("ran out of memory"), "{:?}", here.note("oom.json"));
    here.host.end();
}
