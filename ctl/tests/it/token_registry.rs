//! A registry as the big ones are: with TLS, whose certificate is of an authority of its own, and with tokens. The registry is
//! Debian's `docker-registry`; the token server is a part of this test, for there is none to be installed.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    time::{SystemTime, UNIX_EPOCH},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use serde_json::json;

use crate::{
    host::Host,
    oci::{file, fixture::Pack, probe_layer},
    registry::{Registry, SECRET, greeting, layout, state},
};

const NAME: &str = "registry.test";

fn openssl(folder: &Path, arguments: &str) {
    let output = Command::new("openssl").args(arguments.split(' ')).current_dir(folder).output();
    let output = output.expect("openssl is installed (scripts/install-missing test)");
    assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An authority with a certificate for [`NAME`], and a key for tokens.
fn certificates(folder: &Path) {
    openssl(
        folder,
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=authority",
    );
    openssl(
        folder,
        "req -x509 -newkey rsa:2048 -nodes -keyout token.key -out token.pem -days 2 -subj /CN=tokens",
    );
    openssl(
        folder,
        &format!(
            "req -newkey rsa:2048 -nodes -keyout tls.key -out tls.csr -subj /CN={NAME} -addext subjectAltName=DNS:{NAME}"
        ),
    );
    openssl(
        folder,
        "x509 -req -in tls.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out tls.pem -days 2 -copy_extensions copyall",
    );
}

/// Gives whoever knows the password a token for what is asked, as the distribution's specification of token servers says.
struct TokenServer {
    port: u16,
    /// What was asked for, and as whom.
    asked: Arc<Mutex<Vec<String>>>,
}

impl TokenServer {
    fn up(folder: PathBuf) -> TokenServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                answer(stream, &folder, &log);
            }
        });
        TokenServer { port, asked }
    }
}

fn answer(mut stream: TcpStream, folder: &Path, log: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let target = lines.next().unwrap_or_default();
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let known = headers.iter().any(|line| {
        line.split_once(": ").is_some_and(|(name, value)| {
            name.eq_ignore_ascii_case("authorization") && value == format!("Basic {SECRET}")
        })
    });
    log.lock().unwrap().push(target.clone());
    let scope =
        target.split(['?', '&', ' ']).find_map(|part| part.strip_prefix("scope=")).unwrap_or_default();
    let scope = scope.replace("%3A", ":").replace("%2F", "/").replace("%2C", ",");
    let (status, body) = match known {
        true => ("200 OK", json!({ "token": token(folder, &scope), "expires_in": 300 })),
        false => ("401 Unauthorized", json!({ "details": "who are you?" })),
    };
    let body = body.to_string();
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
}

/// A JSON Web Token (RFC 7519) for `repository:NAME:ACTIONS`.
fn token(folder: &Path, scope: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let certificate: String = fs::read_to_string(folder.join("token.pem"))
        .unwrap()
        .lines()
        .filter(|line| !line.starts_with("-----"))
        .collect();
    let mut parts = scope.split(':');
    let (kind, name, actions) = (parts.next(), parts.next(), parts.next().unwrap_or_default());
    let access = json!([{ "type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>() }]);
    let header = json!({ "typ": "JWT", "alg": "RS256", "x5c": [certificate] });
    let claims = json!({
        "iss": "tokens", "sub": "user", "aud": NAME, "exp": now + 300, "nbf": now - 10, "iat": now,
        "jti": now.to_string(), "access": access,
    });
    let signed =
        format!("{}.{}", base64url(header.to_string().as_bytes()), base64url(claims.to_string().as_bytes()));
    fs::write(folder.join("to-sign"), &signed).unwrap();
    openssl(folder, "dgst -sha256 -sign token.key -out signature to-sign");
    format!("{signed}.{}", base64url(&fs::read(folder.join("signature")).unwrap()))
}

/// RFC 4648, section 5, without padding.
fn base64url(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let number =
            chunk.iter().fold(0_u32, |sum, byte| sum << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..=chunk.len() {
            text.push(char::from(DIGITS[(number >> (18 - 6 * digit) & 63) as usize]));
        }
    }
    text
}

/// Tells a story on a thread for which [`NAME`] is this machine.
fn where_the_name_is_known(folder: &Path, story: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let told = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).expect("run the tests as root");
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
            let hosts = folder.join("hosts");
            fs::write(&hosts, format!("127.0.0.1 localhost {NAME}\n")).unwrap();
            let place = fs::canonicalize("/etc/hosts").unwrap();
            mount(Some(&hosts), &place, none, MsFlags::MS_BIND, none).unwrap();
            story();
        });
        if let Err(panic) = told.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

#[test]
fn a_registry_with_tokens_and_a_certificate_of_an_authority_of_its_own_gives_its_images() {
    let folder = tempfile::Builder::new().prefix("fctok").tempdir_in("/tmp").unwrap();
    certificates(folder.path());
    let tokens = TokenServer::up(folder.path().to_owned());
    // Filled while it is open to all; then it asks.
    let mut registry = Registry::up(false);
    let layout = layout(registry.folder.path());
    let base = probe_layer(&layout, Pack::Gzip);
    registry.push("secret/blog", "latest", &layout, &[base]);
    let at = folder.path().display();
    registry.restart_with(
        &format!("  tls:\n    certificate: {at}/tls.pem\n    key: {at}/tls.key\n"),
        &format!(
            "auth:\n  token:\n    realm: http://127.0.0.1:{}/token\n    service: {NAME}\n    issuer: tokens\n    rootcertbundle: {at}/token.pem\n",
            tokens.port
        ),
    );
    let image = format!("docker://{NAME}:{}/secret/blog", registry.port);
    let auth = folder.path().join("auth.json");
    let entry =
        |secret: &str| json!({ "auths": { format!("{NAME}:{}", registry.port): { "auth": secret } } });
    // user:wrong
    fs::write(&auth, entry("dXNlcjp3cm9uZw==").to_string()).unwrap();
    let authorities = folder.path().join("authorities.pem");
    // An authority that has nothing to do with it.
    fs::copy(folder.path().join("token.pem"), &authorities).unwrap();

    where_the_name_is_known(folder.path(), || {
        let arguments =
            ["--registry-auth", &*auth.to_string_lossy(), "--registry-ca", &*authorities.to_string_lossy()];
        let host = Host::up_after(&[file("blog", &image, "")], &arguments, |_| {});
        let error = || state(&host, &image)["error"].as_str().unwrap_or_default().to_owned();
        host.wait_for("the certificate to be refused", || error().contains("certificate"));
        assert!(tokens.asked.lock().unwrap().is_empty(), "nobody was told a password");

        let both = fs::read_to_string(&authorities).unwrap()
            + &fs::read_to_string(folder.path().join("ca.pem")).unwrap();
        fs::write(&authorities, both).unwrap();
        host.wait_for("the password to be refused", || error().contains("--registry-auth"));

        fs::write(&auth, entry(SECRET).to_string()).unwrap();
        assert_eq!(greeting(&host, "blog"), "image");
        let asked: Vec<String> = tokens.asked.lock().unwrap().clone();
        assert!(asked.iter().all(|target| target.contains("secret") && target.contains("pull")), "{asked:?}");
        let said = host.log() + &host.ctl_ok(&["events", "--json"]) + &host.ctl_ok(&["images", "--json"]);
        assert!(!said.contains("s3cret") && !said.contains(SECRET), "the password is in a log");
        host.end();
    });
}
