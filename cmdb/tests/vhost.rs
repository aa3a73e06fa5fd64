//! Vhost files, as operators write them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking; its name says what it is about"
)]

use std::{fs, path::Path, time::Duration};

use cmdb::{
    App,
    units::{Bytes, Millicores},
    vhost::{Fault, load_dir, parse_file, reference, render},
};
use proptest::prelude::*;

fn parse(text: &str) -> Result<App, Vec<Fault>> {
    parse_file(Path::new("/etc/fc/conf.d/blog.toml"), text.as_bytes(), Path::new("/etc/fc"))
}

/// `line:column message` of each fault.
fn faults(text: &str) -> Vec<String> {
    parse(text).unwrap_err().iter().map(|f| format!("{}:{} {}", f.line, f.column, f.message)).collect()
}

const LEAST: &str =
    "server-name = [\"blog.example.com\"]\n[container]\nimage = \"dir:/srv/blog\"\ncommand = [\"/app\"]\n";

#[test]
fn the_example_of_the_design_is_understood() {
    let app = parse(
        r#"
server-name = ["blog.example.com", "*.blog.example.com"]

[container]
image   = "dir:images/wordpress"
command = ["apache2ctl", "-D", "FOREGROUND"]
port    = 80
user    = "www-data"
env     = { WORDPRESS_DB_HOST = "10.0.0.5" }

[[volume]]
source = "blog/wp-content"        # beneath the DataPool
target = "/var/www/html/wp-content"

[network]
outbound = ["10.0.0.5:3306", "db.internal:5432", "internet"]

[resources]
cpu     = "30%"                   # of one core
cpu-max = "60%"
memory  = "256MiB"
pids    = 128

[lifecycle]
start-timeout = "20s"
freeze-after  = "30s"
idle-timeout  = "10m"
lifetime      = "1h"
drain-timeout = "30s"

[scale]
min = 0
max = 4
response-time = "500ms"
concurrency   = 64

[hold]
queue   = 1000
timeout = "30s"
page    = false
"#,
    )
    .unwrap();

    assert_eq!(app.name.as_str(), "blog");
    assert_eq!(app.container.image, "dir:/etc/fc/images/wordpress", "relative to the folder of conf.d");
    assert_eq!(app.container.port, Some(80));
    assert_eq!(app.resources.cpu, Some(Millicores(300)));
    assert_eq!(app.resources.memory, Bytes(256 << 20));
    assert_eq!(app.lifecycle.lifetime, Some(Duration::from_secs(3600)));
    assert_eq!(app.scale.concurrency, Some(64));
    assert_eq!(app.volumes.len(), 1);
    assert!(app.network.internet);
    assert_eq!(app.network.names(), ["db.internal"]);
}

#[test]
fn little_is_needed() {
    let app = parse(LEAST).unwrap();
    assert_eq!(app.resources.cpu, None);
    assert_eq!(app.lifecycle.idle_timeout, Some(Duration::from_secs(600)));
    assert_eq!(app.scale.max, 1);
}

#[test]
fn nothing_may_be_reached_unless_it_is_named() {
    let network =
        |outbound: &str| parse(&format!("{LEAST}[network]\noutbound = {outbound}\n")).map(|app| app.network);
    assert!(parse(LEAST).unwrap().network.is_closed());
    assert!(network("\"none\"").unwrap().is_closed());
    assert!(network("\"internet\"").unwrap().internet);
    assert!(!network("\"10.0.0.5:3306\"").unwrap().is_closed());
    for bad in ["\"interent\"", "[\"none\", \"internet\"]", "[\"169.254.169.254:80\"]", "true", "[1]"] {
        let faults = network(bad).unwrap_err();
        assert!(faults.iter().all(|f| f.line == 6 && !f.mend.is_empty()), "{bad}: {faults:?}");
    }
}

#[test]
fn never_is_a_duration_where_it_makes_sense() {
    let app = parse(&format!("{LEAST}[lifecycle]\nidle-timeout = \"never\"\n")).unwrap();
    assert_eq!(app.lifecycle.idle_timeout, None);
    assert!(parse(&format!("{LEAST}[lifecycle]\nstart-timeout = \"never\"\n")).is_err());
}

#[test]
fn every_fault_is_told_at_once_with_its_place() {
    let found = faults(
        "server-name = [\"blog.example.com\", \"bad host\", \"blog.example.com\"]\n\
         [container]\n\
         imgae = \"dir:/srv\"\n\
         command = []\n\
         port = 99999\n\
         [resources]\n\
         cpu = \"60%\"\n\
         cpu-max = \"30%\"\n\
         memory = \"lots\"\n\
         pids = \"many\"\n\
         [lifecycle]\n\
         lifetime = \"1 fortnight\"\n\
         start-timeout = \"0s\"\n\
         [scale]\n\
         min = 5\n\
         max = 2\n\
         [holds]\n\
         [[volume]]\n\
         source = \"../other-tenant\"\n\
         target = \"relative\"\n",
    );

    let expected = [
        "1:36 \"bad host\" cannot be a server-name",
        "1:48 \"blog.example.com\" stands here twice",
        "2:2 [container] has no \"image\"",
        "3:1 [container] has no key \"imgae\"",
        "4:11 \"command\" names no program",
        "5:8 \"port\" is out of range",
        "8:11 \"cpu-max\" is less than \"cpu\"",
        "9:10 \"lots\" is not a size",
        "10:8 \"pids\" takes a number, and this is a text",
        "12:12 \"1 fortnight\" is not a duration",
        "13:17 \"start-timeout\" is zero",
        "15:7 \"min\" is 5 and \"max\" is 2",
        "17:2 the top of the file has no key \"holds\"",
        "19:10 \"source\" must lie beneath the DataPool",
        "20:10 \"target\" cannot be there",
    ];
    for fault in expected {
        assert!(found.iter().any(|f| f.starts_with(fault)), "{fault:?} is not among\n{}", found.join("\n"));
    }
    assert_eq!(found.len(), expected.len(), "{}", found.join("\n"));
}

#[test]
fn an_exclusive_volume_is_for_one_instance() {
    let volume = "[[volume]]\nsource = \"blog\"\ntarget = \"/data\"\nexclusive = true\n";
    assert!(parse(&format!("{LEAST}{volume}")).unwrap().volumes[0].exclusive);
    let faults = parse(&format!("{LEAST}{volume}[scale]\nmax = 2\n")).unwrap_err();
    assert!(faults[0].message.contains("exclusive volume is for one instance"), "{faults:?}");
}

#[test]
fn a_fault_comes_with_its_mend() {
    let mend = |text: &str| parse(text).unwrap_err()[0].mend.clone();
    assert_eq!(mend(&format!("{LEAST}[holds]\n")), "did you mean [hold]?");
    assert_eq!(mend(&format!("{LEAST}prot = 80\n")), "did you mean \"port\"?");
    assert_eq!(mend(&format!("{LEAST}memory = \"1GiB\"\n")), "\"memory\" belongs into [resources]");
    assert!(mend(&LEAST.replace("dir:/srv/blog", "wordpress")).contains("\"dir:/path/of/a/folder\""));
    assert!(mend("[container]\nimage = \"dir:/x\"\ncommand = [\"/x\"]\n").contains("server-name ="));
}

#[test]
fn a_fault_is_shown_as_a_compiler_shows_it() {
    let text = format!("{LEAST}prot = 80\n");
    let shown = render(&parse(&text).unwrap_err()[0], Some(&text), false);
    assert!(shown.contains("blog.toml:5:1"), "{shown}");
    assert!(
        shown.contains("prot = 80") && shown.contains("^^^^") && shown.contains("did you mean"),
        "{shown}"
    );
}

#[test]
fn text_that_is_no_toml_is_told_with_its_place() {
    let found = faults("server-name = [\"a.example\"\n[container\nimage = \n");
    assert!(found.iter().any(|f| f.starts_with("2:") || f.starts_with("1:")), "{found:?}");
    assert!(
        !found.iter().any(|f| f.contains("[container]")),
        "what could not be read is not missing: {found:?}"
    );
}

#[test]
fn what_is_no_toml_is_never_run() {
    for (good, bad) in [
        ("[\"/app\"]", "[\"/app\" \"-v\"]"),
        ("[\"/app\"]", "[\"/app\"]\nenv = { A \"b\" }"),
        ("[\"/app\"]", "[\"/app\"]\nenv = { A = \"b\" B = \"c\" }"),
        ("[\"/app\"]", "[\"/app\"]\nport"),
        ("[\"/app\"]", "[\"/app\"]\nport ="),
    ] {
        let text = LEAST.replace(good, bad);
        let told = parse(&text).unwrap_err();
        assert_eq!(told.len(), 1, "{text}: {told:#?}");
        assert!(told[0].line >= 4, "{told:#?}");
    }
}

#[test]
fn no_limit_is_lifted_by_asking_for_nothing() {
    for limit in ["disk = \"0\"", "disk = \"0.1B\"", "memory = \"0\"", "pids = 0", "cpu = \"0%\""] {
        let told = faults(&format!("{LEAST}[resources]\n{limit}\n"));
        assert_eq!(told.len(), 1, "{limit}: {told:?}");
    }
}

#[test]
fn a_message_stays_on_its_line_and_steers_no_terminal() {
    let text = format!("{LEAST}[resources]\nmemory = \"\\u001b[2J\\nx.toml:1:1: forged\"\n");
    let shown = parse(&text).unwrap_err()[0].to_string();
    assert!(!shown.contains(char::is_control), "{shown:?}");
    assert!(shown.contains("\\u{1b}[2J\\nx.toml"), "{shown}");
}

#[test]
fn names_of_variables_are_names() {
    for name in ["", "A B", "A=B", "A\\n", "\\u0000"] {
        let told = faults(&format!("{LEAST}env = {{ \"{name}\" = \"x\" }}\n"));
        assert!(told.len() == 1 && told[0].contains("name of a variable"), "{name:?}: {told:?}");
    }
    assert!(parse(&format!("{LEAST}env = {{ \"discovery.type\" = \"x\" }}\n")).is_ok());
}

#[test]
fn a_file_from_an_editor_that_marks_utf8_is_shown_in_the_right_place() {
    let text = format!("\u{feff}{LEAST}prot = 80\n");
    let shown = render(&parse(&text).unwrap_err()[0], Some(&text), false);
    assert!(shown.contains("blog.toml:5:1") && shown.contains("5 | prot = 80"), "{shown}");
}

#[test]
fn a_file_of_thousands_of_faults_tells_the_first_and_counts_the_rest() {
    for text in ["=\n".repeat(20_000), (0..4000).map(|n| format!("a{n} = 1\n")).collect()] {
        let told = parse(&text).unwrap_err();
        assert!(told.len() <= 101, "{}", told.len());
        let last = told.last().unwrap();
        assert!(last.message.contains("more faults"), "{last}");
    }
}

#[test]
fn one_bad_file_disturbs_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let conf = folder.path().join("conf.d");
    fs::create_dir(&conf).unwrap();
    let put = |name: &str, bytes: &[u8]| fs::write(conf.join(name), bytes).unwrap();
    put("good.toml", LEAST.replace("blog.", "good.").as_bytes());
    put("empty.toml", b"\n");
    put("binary.toml", b"\x00\xff\xfe\x80 = \x01");
    put("huge.toml", &vec![b'#'; 11 << 20]);
    put("Bad Name.toml", LEAST.as_bytes());
    put(".hidden.toml", b"nonsense");
    put("readme.txt", b"nonsense");
    fs::create_dir(conf.join("folder.toml")).unwrap();
    std::os::unix::fs::symlink("/nonexistent", conf.join("dangling.toml")).unwrap();

    let loaded = load_dir(&conf);

    assert_eq!(loaded.apps.iter().map(|l| l.app.name.as_str()).collect::<Vec<_>>(), ["good"]);
    let mut files: Vec<_> = loaded.faults.iter().filter_map(|f| f.file.file_name()?.to_str()).collect();
    files.dedup();
    assert_eq!(
        files,
        ["Bad Name.toml", "binary.toml", "dangling.toml", "empty.toml", "folder.toml", "huge.toml"],
        "{:#?}",
        loaded.faults
    );
}

#[test]
fn a_name_in_two_files_is_told_with_both() {
    let folder = tempfile::tempdir().unwrap();
    let conf = folder.path().join("conf.d");
    fs::create_dir(&conf).unwrap();
    fs::write(conf.join("a.toml"), LEAST).unwrap();
    fs::write(conf.join("b.toml"), LEAST.replace("[\"", "[\"other.example.com\", \"")).unwrap();

    let loaded = load_dir(&conf);

    assert_eq!(loaded.apps.len(), 1);
    assert_eq!(loaded.apps[0].app.name.as_str(), "a");
    let told = loaded.faults[0].to_string();
    assert!(told.contains("b.toml:1:37") && told.contains("a.toml:1:16"), "{told}");
}

#[test]
fn a_folder_that_is_not_there_is_one_fault() {
    let loaded = load_dir(Path::new("/nonexistent/conf.d"));
    assert!(loaded.apps.is_empty());
    assert!(loaded.faults[0].to_string().contains("cannot be read"));
}

#[test]
fn the_shipped_files_have_no_fault() {
    let loaded = load_dir(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../conf.d"));
    assert!(loaded.faults.is_empty(), "{:#?}", loaded.faults);
    assert!(loaded.apps.len() >= 2);
}

#[test]
fn the_reference_in_docs_is_the_parsers_own() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/vhost.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, reference()).unwrap();
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), reference(), "UPDATE_DOCS=1 makes it anew");
}

proptest! {
    #[test]
    fn nothing_that_is_written_makes_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = parse_file(Path::new("x.toml"), &bytes, Path::new("/"));
    }

    #[test]
    fn no_damage_to_a_good_file_makes_it_panic(at in 0usize..200, byte in any::<u8>(), cut in 0usize..200) {
        let mut bytes = format!("{LEAST}[resources]\ncpu = \"30%\"\n[[volume]]\nsource = \"ä\"\n").into_bytes();
        let length = bytes.len();
        bytes[at % length] = byte;
        bytes.truncate(length - cut % length);
        let read = parse_file(Path::new("x.toml"), &bytes, Path::new("/"));
        let is_toml = std::str::from_utf8(&bytes).is_ok_and(|text| toml::de::DeTable::parse(text).is_ok());
        prop_assert!(is_toml || read.is_err());
        prop_assert!(!read.as_ref().is_err_and(Vec::is_empty), "an error without a fault");
        for fault in read.err().unwrap_or_default() {
            let _ = render(&fault, std::str::from_utf8(&bytes).ok(), true);
        }
    }
}

#[test]
fn hooks_are_read_in_their_order() {
    let text = format!(
        "{LEAST}[[hook]]\non = \"before-start\"\nrun = [\"check\", \"--all\"]\ntimeout = \"2s\"\non-failure = \"abort\"\n\
         [[hook]]\nevery = \"10s\"\nrun = [\"sub/count\"]\n[[hook]]\non-signal = \"SIGUSR1\"\nrun = [\"dump\"]\n\
         [[hook]]\nafter = \"30s\"\nrun = [\"late\"]\n"
    );
    let hooks = parse(&text).unwrap().hooks;
    let when: Vec<String> = hooks.iter().map(|hook| hook.when.to_string()).collect();
    assert_eq!(when, ["before-start", "every 10s", "SIGUSR1", "after 30s"]);
    assert_eq!(hooks[0].run, ["check", "--all"]);
    assert_eq!((hooks[0].timeout, hooks[1].timeout), (Duration::from_secs(2), Duration::from_secs(5)));
}

#[test]
fn a_hook_that_could_do_harm_or_nothing_is_refused() {
    let said = |lines: &str| faults(&format!("{LEAST}[[hook]]\n{lines}\n")).join("\n");
    for (lines, fault) in [
        ("on = \"after-ready\"\nrun = [\"/bin/sh\"]", "must lie in the hooks folder"),
        ("on = \"after-ready\"\nrun = [\"../sh\"]", "must lie in the hooks folder"),
        ("on = \"after-ready\"\nrun = []", "names no program"),
        ("on = \"after-ready\"", "has no \"run\""),
        ("run = [\"x\"]", "does not say when it runs"),
        ("on = \"after-ready\"\nevery = \"10s\"\nrun = [\"x\"]", "has \"on\" and \"every\""),
        ("on = \"sometimes\"\nrun = [\"x\"]", "is no point of an instance's life"),
        ("on-signal = \"KILL\"\nrun = [\"x\"]", "is no signal for a hook"),
        ("every = \"10ms\"\nrun = [\"x\"]", "too often"),
        ("on = \"after-ready\"\nrun = [\"x\"]\ntimeout = \"1h\"", "too long"),
        ("on = \"after-ready\"\nrun = [\"x\"]\non-failure = \"abort\"", "nothing can be aborted there"),
        ("on = \"after-ready\"\nrun = [\"x\"]\nuser = \"root\"", "has no key \"user\""),
    ] {
        assert!(said(lines).contains(fault), "{lines}: {}", said(lines));
    }
    let many = "[[hook]]\nevery = \"10s\"\nrun = [\"x\"]\n".repeat(33);
    assert!(faults(&format!("{LEAST}{many}")).join("\n").contains("more than 32 hooks"));
}

#[test]
fn provisioning_steps_are_read_in_their_order() {
    let text = format!(
        "{LEAST}[[provision]]\nname = \"php\"\nrun = [\"/bin/sh\", \"-c\", \"apt-get -y install php\"]\n\
         env = {{ DEBIAN_FRONTEND = \"noninteractive\" }}\n\
         [[provision]]\nname = \"site\"\nrun = [\"make\"]\nuser = \"www-data\"\ntimeout = \"2m\"\n"
    );
    let steps = parse(&text).unwrap().container.provision;
    assert_eq!(steps.iter().map(|step| step.name.as_str()).collect::<Vec<_>>(), ["php", "site"]);
    assert_eq!(steps[0].env["DEBIAN_FRONTEND"], "noninteractive");
    assert_eq!((steps[0].user.as_str(), steps[1].user.as_str()), ("", "www-data"));
    assert_eq!((steps[0].timeout, steps[1].timeout), (Duration::from_secs(600), Duration::from_secs(120)));
}

#[test]
fn a_provisioning_step_that_makes_no_sense_is_refused() {
    let said = |lines: &str| faults(&format!("{LEAST}[[provision]]\n{lines}\n")).join("\n");
    for (lines, fault) in [
        ("name = \"a\"", "has no \"run\""),
        ("run = [\"x\"]", "has no \"name\""),
        ("name = \"a\"\nrun = []", "names no program"),
        ("name = \"a\"\nrun = \"x\"", "run"),
        ("name = \" \"\nrun = [\"x\"]", "is no name for a step"),
        ("name = \"a\\nb\"\nrun = [\"x\"]", "is no name for a step"),
        ("name = \"a\"\nrun = [\"x\"]\ntimeout = \"2h\"", "too long"),
        ("name = \"a\"\nrun = [\"x\"]\n[[provision]]\nname = \"a\"\nrun = [\"y\"]", "two steps are called"),
        ("name = \"a\"\nrun = [\"x\"]\non-failure = \"warn\"", "has no key \"on-failure\""),
    ] {
        assert!(said(lines).contains(fault), "{lines}: {}", said(lines));
    }
}

#[test]
fn a_share_of_the_memory_is_a_share() {
    let with = |share: &str| parse(&format!("{LEAST}[lifecycle]\nrecycle-at = \"{share}\"\n"));
    assert_eq!(with("80%").unwrap().lifecycle.recycle_at, Some(80));
    for bad in ["80", "100%", "5%", "x%", "-5%"] {
        assert!(with(bad).is_err(), "{bad}");
    }
}
