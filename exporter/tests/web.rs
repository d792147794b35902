// SPDX-License-Identifier: Apache-2.0
//! `--web.config.file` over real sockets: TLS, client certificates, passwords, headers, and what becomes of a bad file;
//! then the whole program under clients that mean harm.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../../mixin/tests/common/mod.rs"]
mod packages;

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, LazyLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use chandra::{
    server::{Limits, Site, bind, serve},
    web::Web,
};
use packages::{PROMTOOLS, program};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tempfile::TempDir;
use tokio::{runtime::Runtime, sync::oneshot};

/// Far longer than anything here takes on a busy machine, so that a hang is a failure.
const HANG: Duration = Duration::from_secs(60);

/// The files are looked at no more often than this.
const LOOK: Duration = Duration::from_millis(150);

/// Of `secret`, at the lowest cost.
static HASH: LazyLock<String> = LazyLock::new(|| bcrypt::hash("secret", 4).unwrap());

struct Fake;

impl Site for Fake {
    fn metrics(&self) -> anyhow::Result<Vec<u8>> {
        Ok(b"up 1\n".to_vec())
    }
    fn ready(&self) -> Result<(), String> {
        Err("attaching rdma".to_owned())
    }
    fn landing(&self) -> String {
        "<!doctype html><title>chandra</title>".to_owned()
    }
}

struct Server {
    address: SocketAddr,
    web: Arc<Web>,
    _stop: oneshot::Sender<()>,
}

impl Server {
    fn new(config: &Path) -> Self {
        let web = Arc::new(Web::load(config).unwrap_or_else(|error| panic!("{error:#}")));
        let (stop, stopped) = oneshot::channel();
        let (bound, address) = mpsc::channel();
        let shown = Arc::clone(&web);
        thread::spawn(move || {
            let runtime = Runtime::new().unwrap();
            runtime.block_on(async {
                let listener = bind("127.0.0.1:0").await.unwrap();
                bound.send(listener.local_addr().unwrap()).unwrap();
                let stopped = async {
                    let _ = stopped.await;
                };
                serve(listener, Arc::new(Fake), shown, Limits::default(), stopped).await
            })
        });
        Self {
            address: address.recv().unwrap(),
            web,
            _stop: stop,
        }
    }

    fn plain(&self) -> TcpStream {
        connect(self.address)
    }

    fn tls(&self, config: ClientConfig) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
        let name = ServerName::from(std::net::IpAddr::from(Ipv4Addr::LOCALHOST));
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut stream = self.plain();
        while client.is_handshaking() {
            client.complete_io(&mut stream)?;
        }
        Ok(StreamOwned::new(client, stream))
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(HANG)).unwrap();
    stream.set_write_timeout(Some(HANG)).unwrap();
    stream
}

/// Status, header in lower case, body.
type Reply = (u16, String, String);

fn ask(mut stream: impl Read + Write, path: &str, headers: &str) -> io::Result<Reply> {
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: node\r\n{headers}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    stream.flush()?;
    let mut reply = Vec::new();
    if let Err(error) = stream.read_to_end(&mut reply)
        && reply.is_empty()
    {
        return Err(error);
    }
    let reply = String::from_utf8(reply).unwrap();
    let (head, body) = reply
        .split_once("\r\n\r\n")
        .ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Ok((status, head.to_ascii_lowercase(), body.to_owned()))
}

fn basic(user: &str, password: &str) -> String {
    let encoded = BASE64_STANDARD.encode(format!("{user}:{password}"));
    format!("Authorization: Basic {encoded}\r\n")
}

/// A folder with an authority `ca`, a stranger's authority `other`, a server's certificate and clients' certificates.
struct Pki {
    folder: TempDir,
    ca: Issuer<'static, KeyPair>,
}

impl Pki {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let authority = |name: &str| {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params
                .distinguished_name
                .push(rcgen::DnType::CommonName, name);
            let key = KeyPair::generate().unwrap();
            let certificate = params.self_signed(&key).unwrap();
            fs::write(folder.path().join(format!("{name}.pem")), certificate.pem()).unwrap();
            Issuer::new(params, key)
        };
        let (ca, other) = (authority("ca"), authority("other"));
        let made = Self { folder, ca };
        made.issue(
            "server",
            &made.ca,
            vec![SanType::IpAddress(Ipv4Addr::LOCALHOST.into())],
        );
        let names = vec![
            SanType::DnsName("prometheus.example".try_into().unwrap()),
            SanType::Rfc822Name("oncall@example".try_into().unwrap()),
            SanType::URI("spiffe://cluster/prometheus".try_into().unwrap()),
            SanType::IpAddress("2001:db8::1".parse().unwrap()),
        ];
        made.issue("client", &made.ca, names.clone());
        made.issue("nameless", &made.ca, vec![]);
        made.issue("stranger", &other, names);
        made
    }

    fn issue(&self, name: &str, by: &Issuer<'static, KeyPair>, names: Vec<SanType>) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, by).unwrap();
        self.write(&format!("{name}.pem"), &certificate.pem());
        self.write(&format!("{name}.key"), &key.serialize_pem());
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// By a rename, as who changes such files does.
    fn write(&self, name: &str, text: &str) -> PathBuf {
        fs::write(self.path("new"), text).unwrap();
        fs::rename(self.path("new"), self.path(name)).unwrap();
        self.path(name)
    }

    fn config(&self, text: &str) -> PathBuf {
        self.write("web.yml", text)
    }

    /// TLS with the server's certificate, and more lines of `tls_server_config`.
    fn tls(&self, more: &str) -> PathBuf {
        self.config(&format!(
            "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n{more}"
        ))
    }

    fn certificate(&self, name: &str) -> CertificateDer<'static> {
        CertificateDer::from_pem_file(self.path(&format!("{name}.pem"))).unwrap()
    }

    /// A client that knows the authority, and shows the certificate of that name.
    fn client(&self, name: Option<&str>) -> ClientConfig {
        self.client_of(
            name,
            rustls::ALL_VERSIONS,
            rustls::crypto::ring::default_provider(),
        )
    }

    fn client_of(
        &self,
        name: Option<&str>,
        versions: &[&'static rustls::SupportedProtocolVersion],
        provider: rustls::crypto::CryptoProvider,
    ) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate("ca")).unwrap();
        let builder = ClientConfig::builder_with_provider(provider.into())
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots);
        match name {
            None => builder.with_no_client_auth(),
            Some(name) => {
                let key = PrivateKeyDer::from_pem_file(self.path(&format!("{name}.key"))).unwrap();
                builder
                    .with_client_auth_cert(vec![self.certificate(name)], key)
                    .unwrap()
            }
        }
    }
}

/// The status, or `None` where the handshake or the connection failed.
fn status(server: &Server, client: ClientConfig) -> Option<u16> {
    let stream = server.tls(client).ok()?;
    ask(stream, "/metrics", "").ok().map(|reply| reply.0)
}

fn refusal(config: &Path) -> String {
    let error = Web::load(config).expect_err("refused");
    let line = format!("{error:#}");
    assert!(!line.contains('\n'), "{line}");
    assert!(line.contains(&config.display().to_string()), "{line}");
    line
}

#[test]
fn a_file_that_cannot_be_used_is_told_in_one_line() {
    let pki = Pki::new();
    let tls = "tls_server_config: {cert_file: server.pem, key_file: server.key";
    let cases = [
        (
            "tls_server_config: {key_file: server.key}",
            "missing one of cert or cert_file",
        ),
        (
            "tls_server_config: {cert_file: server.pem}",
            "missing one of key or key_file",
        ),
        (
            "tls_server_config: {min_version: TLS13}",
            "missing one of cert",
        ),
        (
            "tls_server_config: {cert_file: none.pem, key_file: server.key}",
            "none.pem",
        ),
        (
            "tls_server_config: {cert_file: ., key_file: server.key}",
            "directory",
        ),
        (
            "tls_server_config: {cert: junk, key_file: server.key}",
            "cert: no certificate in PEM",
        ),
        (
            "tls_server_config: {cert_file: server.key, key_file: server.key}",
            "cert: no certificate",
        ),
        (
            "tls_server_config: {cert_file: server.pem, key_file: server.pem}",
            "key: no unencrypted private key",
        ),
        (
            "tls_server_config: {cert_file: server.pem, key_file: client.key}",
            "do not go together",
        ),
        (
            &format!("{tls}, min_version: TLS10}}"),
            "TLS10 is not offered",
        ),
        (
            &format!("{tls}, max_version: TLS11}}"),
            "TLS11 is not offered",
        ),
        (
            &format!("{tls}, min_version: SSL3}}"),
            "\"SSL3\" is no version",
        ),
        (
            &format!("{tls}, min_version: TLS13, max_version: TLS12}}"),
            "min_version is above max_version",
        ),
        (
            &format!("{tls}, cipher_suites: [TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA]}}"),
            "CBC",
        ),
        (
            &format!("{tls}, max_version: TLS12, cipher_suites: [TLS_AES_128_GCM_SHA256]}}"),
            "nothing to offer",
        ),
        (
            &format!("{tls}, curve_preferences: [CurveP521]}}"),
            "\"CurveP521\" is not offered",
        ),
        (
            &format!("{tls}, client_auth_type: Always}}"),
            "\"Always\" is none of NoClientCert",
        ),
        (
            &format!("{tls}, client_ca_file: ca.pem}}"),
            "no effect without client_auth_type",
        ),
        (
            &format!("{tls}, client_allowed_sans: [a]}}"),
            "no effect without client_auth_type",
        ),
        (
            &format!("{tls}, client_auth_type: RequireAndVerifyClientCert}}"),
            "needs client_ca",
        ),
        (
            &format!("{tls}, client_auth_type: VerifyClientCertIfGiven}}"),
            "needs client_ca",
        ),
        (
            &format!("{tls}, client_auth_type: VerifyClientCertIfGiven, client_ca: x}}"),
            "client_ca: no certificate",
        ),
        (&format!("{tls}, colour: blue}}"), "colour"),
        ("tls_servers: {}", "tls_servers"),
        (
            "http_server_config: {headers: {Server: me}}",
            "\"Server\" cannot be set",
        ),
        (
            "http_server_config: {headers: {X-Frame-Options: maybe}}",
            "deny or sameorigin",
        ),
        (
            "http_server_config: {headers: {X-XSS-Protection: \"a\\nb\"}}",
            "character",
        ),
        (
            "basic_auth_users: {ann: secret}",
            "\"ann\" has no bcrypt hash",
        ),
        ("basic_auth_users: {\"a:b\": secret}", "colon"),
        ("basic_auth_users: [ann]", "line 1"),
        (
            &format!(
                "basic_auth_users: {{ann: {}}}",
                HASH.replacen("$04$", "$20$", 1)
            ),
            "cost 20",
        ),
        ("rate_limit: {interval: 1s}", "burst of at least 1"),
        (
            "rate_limit: {interval: 1s, burst: 0}",
            "burst of at least 1",
        ),
        ("rate_limit: {interval: 1 day, burst: 1}", "no duration"),
        ("rate_limit: {burst: -1}", "line 1"),
        ("a: {", "line 1"),
        (
            "basic_auth_users: {}\nbasic_auth_users: {}",
            "basic_auth_users",
        ),
    ];
    for (text, words) in cases {
        let line = refusal(&pki.config(text));
        assert!(line.contains(words), "{text}: {line}");
        assert!(!line.contains("secret"), "{line}");
        assert!(!line.contains(HASH.as_str()), "{line}");
    }
    assert!(refusal(&pki.path("absent.yml")).contains("No such file"));
    assert!(refusal(Path::new("/dev/zero")).contains("longer than 1 MiB"));
}

#[test]
fn a_file_that_says_nothing_changes_nothing() {
    let pki = Pki::new();
    for text in [
        "",
        "# nothing\n",
        "{}",
        "tls_server_config:\nhttp_server_config:\nbasic_auth_users:\n",
        "---\n",
    ] {
        let server = Server::new(&pki.config(text));
        assert!(!server.web.https());
        let (status, _, body) = ask(server.plain(), "/metrics", "").unwrap();
        assert_eq!((status, body.as_str()), (200, "up 1\n"), "{text:?}");
        assert_eq!(
            ask(server.plain(), "/readyz", "").unwrap().2,
            "attaching rdma"
        );
    }
}

#[test]
fn the_program_refuses_a_bad_file_and_takes_its_name_from_the_environment() {
    let pki = Pki::new();
    let bad = pki.config("basic_auth_users: {ann: secret}");
    let flags = [Some(bad.as_path()), None];
    for flag in flags {
        let mut command = Command::new(env!("CARGO_BIN_EXE_chandra"));
        match flag {
            Some(file) => command.arg("--web.config.file").arg(file),
            None => command.env("CHANDRA_WEB_CONFIG_FILE", &bad),
        };
        let output = command.output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains("\"ann\" has no bcrypt hash"), "{error}");
    }
}

#[test]
fn promtool_takes_what_is_taken_here() {
    let pki = Pki::new();
    let users = format!("basic_auth_users: {{ann: '{}'}}", *HASH);
    let full = format!(
        "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n  client_ca_file: ca.pem\n  \
         client_auth_type: RequireAndVerifyClientCert\n  client_allowed_sans: [prometheus.example]\n  \
         min_version: TLS12\n  max_version: TLS13\n  prefer_server_cipher_suites: false\n  \
         cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, TLS_AES_128_GCM_SHA256]\n  \
         curve_preferences: [X25519, CurveP256]\nhttp_server_config:\n  http2: true\n  headers:\n    \
         Strict-Transport-Security: max-age=1\n    X-Frame-Options: deny\n    X-XSS-Protection: ''\n{users}\n\
         rate_limit: {{interval: 100ms, burst: 5}}\n"
    );
    let config = pki.config(&full);
    Web::load(&config).unwrap_or_else(|error| panic!("{error:#}"));
    // That of Debian 12 is older than client_allowed_sans and rate_limit.
    let Some(promtool) = program(PROMTOOLS[1]) else {
        return;
    };
    let output = Command::new(promtool)
        .args(["check", "web-config"])
        .arg(&config)
        .output()
        .expect("promtool runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn tls_is_served_in_both_versions_and_plain_http_is_told_so() {
    let pki = Pki::new();
    let server = Server::new(&pki.tls(""));
    assert!(server.web.https());
    let provider = rustls::crypto::ring::default_provider;
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let mut stream = server
            .tls(pki.client_of(None, &[version], provider()))
            .unwrap();
        assert_eq!(stream.conn.protocol_version(), Some(version.version));
        let (status, _, body) = ask(&mut stream, "/metrics", "").unwrap();
        assert_eq!((status, body.as_str()), (200, "up 1\n"));
    }
    let (code, _, body) = ask(server.plain(), "/metrics", "").unwrap();
    assert_eq!(code, 400);
    assert_eq!(body, "Client sent an HTTP request to an HTTPS server.\n");
    // Neither HTTP nor TLS: an alert or a close, and no page.
    let mut junk = server.plain();
    junk.write_all(&[0x16, 3, 1, 0, 2, 0, 0]).unwrap();
    let mut answer = Vec::new();
    let _ = junk.read_to_end(&mut answer);
    assert!(answer.len() < 32, "{answer:?}");
    // A client of another authority trusts nobody here.
    let mut roots = RootCertStore::empty();
    roots.add(pki.certificate("other")).unwrap();
    let suspicious = ClientConfig::builder_with_provider(provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    assert_eq!(status(&server, suspicious), None);
}

#[test]
fn versions_suites_and_curves_are_those_of_the_file() {
    let pki = Pki::new();
    let provider = rustls::crypto::ring::default_provider;
    let server = Server::new(&pki.tls("  min_version: TLS13\n"));
    assert_eq!(
        status(
            &server,
            pki.client_of(None, &[&rustls::version::TLS12], provider())
        ),
        None
    );
    assert_eq!(status(&server, pki.client(None)), Some(200));

    let server = Server::new(&pki.tls(
        "  max_version: TLS12\n  cipher_suites: [TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256]\n  curve_preferences: [CurveP384]\n",
    ));
    let stream = server.tls(pki.client(None)).unwrap();
    let suite = stream.conn.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(
        suite,
        rustls::CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
    );
    let group = stream.conn.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, rustls::NamedGroup::secp384r1);
    let mut other = provider();
    other.kx_groups = vec![rustls::crypto::ring::kx_group::X25519];
    assert_eq!(
        status(&server, pki.client_of(None, rustls::ALL_VERSIONS, other)),
        None
    );
}

#[test]
fn each_policy_on_client_certificates_lets_in_whom_it_says() {
    let pki = Pki::new();
    let (yes, no) = (Some(200), None);
    // Of: no certificate, the authority's, a stranger's.
    let policies = [
        ("NoClientCert", [yes, yes, yes]),
        ("RequestClientCert", [yes, yes, yes]),
        ("RequireClientCert", [no, yes, yes]),
        ("RequireAnyClientCert", [no, yes, yes]),
        ("VerifyClientCertIfGiven", [yes, yes, no]),
        ("RequireAndVerifyClientCert", [no, yes, no]),
    ];
    for (policy, expected) in policies {
        let ca = if policy == "NoClientCert" {
            ""
        } else {
            "  client_ca_file: ca.pem\n"
        };
        let server = Server::new(&pki.tls(&format!("  client_auth_type: {policy}\n{ca}")));
        let seen =
            [None, Some("client"), Some("stranger")].map(|name| status(&server, pki.client(name)));
        assert_eq!(seen, expected, "{policy}");
    }
}

#[test]
fn a_client_certificate_needs_one_of_the_allowed_names() {
    let pki = Pki::new();
    for allowed in [
        "prometheus.example",
        "oncall@example",
        "'spiffe://cluster/prometheus'",
        "'2001:db8::1'",
    ] {
        let server = Server::new(&pki.tls(&format!(
            "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.pem\n  client_allowed_sans: [nobody, {allowed}]\n"
        )));
        assert_eq!(
            status(&server, pki.client(Some("client"))),
            Some(200),
            "{allowed}"
        );
        assert_eq!(
            status(&server, pki.client(Some("nameless"))),
            None,
            "{allowed}"
        );
    }
    let server = Server::new(&pki.tls(
        "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.pem\n  client_allowed_sans: [metheus.example, example]\n",
    ));
    assert_eq!(
        status(&server, pki.client(Some("client"))),
        None,
        "part of a name is no name"
    );
}

#[test]
fn passwords_are_asked_for_except_by_probes() {
    let pki = Pki::new();
    let server = Server::new(&pki.config(&format!("basic_auth_users:\n  ann: '{}'\n", *HASH)));
    for path in ["/metrics", "/", "/nowhere"] {
        let (status, head, _) = ask(server.plain(), path, "").unwrap();
        assert_eq!(status, 401, "{path}");
        assert!(
            head.contains("www-authenticate: basic realm=\"chandra\""),
            "{head}"
        );
    }
    let long = "x".repeat(2000);
    for wrong in [
        basic("ann", "wrong"),
        basic("ann", ""),
        basic("bob", "secret"),
        basic("", ""),
        basic("ann", "secret\0"),
        basic("ann", &long),
        "Authorization: Basic !!!\r\n".to_owned(),
        "Authorization: Basic\r\n".to_owned(),
        "Authorization: Bearer c2VjcmV0\r\n".to_owned(),
        format!("Authorization: Basic {}\r\n", BASE64_STANDARD.encode("ann")),
    ] {
        // Twice: from the hash, and from memory.
        for _ in 0..2 {
            assert_eq!(
                ask(server.plain(), "/metrics", &wrong).unwrap().0,
                401,
                "{wrong}"
            );
        }
    }
    for _ in 0..2 {
        assert_eq!(
            ask(server.plain(), "/metrics", &basic("ann", "secret"))
                .unwrap()
                .0,
            200
        );
    }
    assert_eq!(
        ask(server.plain(), "/nowhere", &basic("ann", "secret"))
            .unwrap()
            .0,
        404
    );
    assert_eq!(ask(server.plain(), "/livez", "").unwrap().0, 200);
    let (status, _, body) = ask(server.plain(), "/readyz", "").unwrap();
    assert_eq!(
        (status, body.as_str()),
        (503, "not ready"),
        "the reason is not for strangers"
    );
}

#[test]
fn a_scraper_that_was_let_in_is_not_held_up_by_guesses() {
    let pki = Pki::new();
    // At this cost a guess takes a tenth of a second and more.
    let hash = bcrypt::hash("secret", 11).unwrap();
    let server = Server::new(&pki.config(&format!("basic_auth_users:\n  ann: '{hash}'\n")));
    let right = basic("ann", "secret");
    assert_eq!(ask(server.plain(), "/metrics", &right).unwrap().0, 200);
    let address = server.address;
    let guesses: Vec<_> = (0..48)
        .map(|thread| {
            thread::spawn(move || {
                let mut told = [0, 0];
                for guess in 0..5 {
                    let wrong = basic("ann", &format!("guess {thread} {guess}"));
                    match ask(connect(address), "/metrics", &wrong) {
                        Ok((401, ..)) => told[0] += 1,
                        Ok((429, head, _)) => {
                            assert!(head.contains("retry-after: 1"), "{head}");
                            told[1] += 1;
                        }
                        // Over the limit of connections.
                        Ok((503, ..)) | Err(_) => {}
                        other => panic!("{other:?}"),
                    }
                }
                told
            })
        })
        .collect();
    let mut slowest = Duration::ZERO;
    for _ in 0..10 {
        let start = Instant::now();
        let mut reply = ask(server.plain(), "/metrics", &right);
        // A connection may be closed for a newer one before its request has come.
        if reply.is_err() {
            reply = ask(server.plain(), "/metrics", &right);
        }
        assert_eq!(reply.unwrap().0, 200);
        slowest = slowest.max(start.elapsed());
    }
    let told: Vec<[u32; 2]> = guesses
        .into_iter()
        .map(|guess| guess.join().unwrap())
        .collect();
    let refused: u32 = told.iter().map(|told| told[0]).sum();
    let later: u32 = told.iter().map(|told| told[1]).sum();
    println!("{refused} guesses refused, {later} put off; the slowest scrape took {slowest:?}");
    assert!(later > refused, "guesses were computed without bound");
    assert!(slowest < HANG, "{slowest:?}");
    // Nothing is left behind: a new password is computed at once.
    assert_eq!(
        ask(server.plain(), "/metrics", &basic("ann", "last"))
            .unwrap()
            .0,
        401
    );
}

#[test]
fn headers_and_the_rate_limit_hold_for_every_page() {
    let pki = Pki::new();
    let server = Server::new(&pki.config(
        "http_server_config:\n  headers:\n    X-Frame-Options: deny\n    Strict-Transport-Security: max-age=31536000\n\
         rate_limit: {interval: 1h, burst: 2}\n",
    ));
    for status in [200, 404, 429, 429] {
        let path = if status == 404 {
            "/nowhere"
        } else {
            "/metrics"
        };
        let (seen, head, _) = ask(server.plain(), path, "").unwrap();
        assert_eq!(seen, status);
        assert!(head.contains("x-frame-options: deny"), "{head}");
        assert!(
            head.contains("strict-transport-security: max-age=31536000"),
            "{head}"
        );
    }
    assert_eq!(
        ask(server.plain(), "/livez", "").unwrap().0,
        200,
        "probes are not limited"
    );
}

#[test]
fn changed_files_are_taken_up_and_spoilt_ones_are_not() {
    let pki = Pki::new();
    let users = format!("basic_auth_users:\n  ann: '{}'\n", *HASH);
    let server = Server::new(&pki.tls(&users));
    let shown = || {
        thread::sleep(LOOK);
        let stream = server.tls(pki.client(None)).unwrap();
        stream.conn.peer_certificates().unwrap()[0].clone()
    };
    let ask_as = |password: &str| {
        thread::sleep(LOOK);
        let stream = server.tls(pki.client(None)).unwrap();
        ask(stream, "/metrics", &basic("ann", password)).unwrap().0
    };
    let first = shown();
    assert_eq!(first, pki.certificate("server"));
    assert_eq!(server.web.reloaded(), Some(true));

    // The key comes before the certificate: in between they do not go together, and the old pair stays.
    pki.issue(
        "next",
        &pki.ca,
        vec![SanType::IpAddress(Ipv4Addr::LOCALHOST.into())],
    );
    fs::rename(pki.path("next.key"), pki.path("server.key")).unwrap();
    assert_eq!(shown(), first);
    assert_eq!(server.web.reloaded(), Some(false));
    fs::rename(pki.path("next.pem"), pki.path("server.pem")).unwrap();
    assert_eq!(shown(), pki.certificate("server"));
    assert_ne!(shown(), first);
    assert_eq!(server.web.reloaded(), Some(true));

    // A new password, and the old one is forgotten.
    assert_eq!(ask_as("secret"), 200);
    let hash = bcrypt::hash("changed", 4).unwrap();
    pki.tls(&format!("basic_auth_users:\n  ann: '{hash}'\n"));
    assert_eq!((ask_as("secret"), ask_as("changed")), (401, 200));

    // Neither a cut file nor none opens the server.
    for cut in [
        "",
        "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n",
        &users,
        "a: {",
    ] {
        pki.config(cut);
        assert_eq!((ask_as("wrong"), ask_as("changed")), (401, 200), "{cut}");
        assert_eq!(server.web.reloaded(), Some(false), "{cut}");
    }
    fs::remove_file(pki.path("web.yml")).unwrap();
    assert_eq!(ask_as("changed"), 200);
    assert_eq!(server.web.reloaded(), Some(false));
    pki.tls(&users);
    assert_eq!(ask_as("secret"), 200);
    assert_eq!(server.web.reloaded(), Some(true));
}

/// The program itself, without signals.
struct Program {
    child: Child,
    address: SocketAddr,
}

impl Program {
    fn new(flags: &[&std::ffi::OsStr]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_chandra"));
        command.args(["--web.listen-address", "127.0.0.1:0", "--pods", "none"]);
        for entry in chandra::signals::SIGNALS {
            command.args(["--disable", entry.name]);
        }
        let mut child = command.args(flags).stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = log
            .by_ref()
            .map(Result::unwrap)
            .find_map(|line| Some(line.split_once("://")?.1.trim().parse().unwrap()))
            .expect("the address in the log");
        // A full pipe would stop the program.
        thread::spawn(move || log.count());
        Self { child, address }
    }

    /// Kilobytes of memory that are the program's own.
    fn memory(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(path).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"))
            .unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    fn open_files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .unwrap()
            .count()
    }

    /// How long the next scrape takes.
    fn scrape(&self, what: &str) {
        let start = Instant::now();
        let (status, _, body) = ask(connect(self.address), "/metrics", "").unwrap();
        let took = start.elapsed();
        println!(
            "{what}: the next scrape took {took:?}; {} kB, {} files",
            self.memory(),
            self.open_files()
        );
        assert_eq!(status, 200, "{what}: {body}");
        assert!(body.contains("chandra_build_info"), "{what}");
        assert!(took < HANG, "{what}: {took:?}");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn clients_that_mean_harm_leave_the_next_scrape_and_the_memory_alone() {
    let program = Program::new(&[]);
    let address = program.address;
    for _ in 0..50 {
        ask(connect(address), "/metrics", "").unwrap();
    }
    program.scrape("before");
    let (memory, files) = (program.memory(), program.open_files());

    // 10 000 malformed requests, eight at a time.
    let threads: Vec<_> = (0..8u32)
        .map(|thread| {
            thread::spawn(move || {
                for number in 0..1250u32 {
                    let mut stream = connect(address);
                    let seed = number.wrapping_mul(2_654_435_761).wrapping_add(thread);
                    let junk: Vec<u8> = match number % 10 {
                        0 => b"\0\0\0\0\r\n\r\n".to_vec(),
                        1 => b"GET /metrics\r\n\r\n".to_vec(),
                        2 => b"GET /metrics HTTP/9.9\r\n\r\n".to_vec(),
                        3 => b"GET /metrics HTTP/1.1\r\nHost node\r\n\r\n".to_vec(),
                        4 => [b"GET /".as_slice(), &[b'a'; 70_000], b" HTTP/1.1\r\n\r\n"].concat(),
                        5 => [
                            b"GET / HTTP/1.1\r\nA: ".as_slice(),
                            &[b'b'; 120_000],
                            b"\r\n\r\n",
                        ]
                        .concat(),
                        6 => b"POST /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n"
                            .to_vec(),
                        7 => {
                            b"GET /metrics HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n"
                                .to_vec()
                        }
                        8 => vec![0x16, 3, 1, 0xff, 0xff, 1],
                        _ => (0..512u32)
                            .map(|at| (seed >> (at % 24)) as u8 ^ at as u8)
                            .collect(),
                    };
                    let _ = stream.write_all(&junk);
                    if number % 3 == 0 {
                        let _ = stream.shutdown(std::net::Shutdown::Write);
                        let _ = stream.read(&mut [0; 256]);
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    program.scrape("after 10 000 malformed requests");

    // 1000 connections at once, which say nothing, half a header, or a request whose answer they do not read.
    let held: Vec<_> = (0..1000)
        .map(|number| {
            let mut stream = connect(address);
            let _ = match number % 3 {
                0 => Ok(()),
                1 => stream.write_all(b"GET /metrics HTTP/1.1\r\nHo"),
                _ => stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n"),
            };
            stream
        })
        .collect();
    program.scrape("with 1000 connections");
    drop(held);

    // Writers of one byte at a time and readers of one byte at a time, more than there are slots.
    let mut slow: Vec<_> = (0..100).map(|_| connect(address)).collect();
    let end = Instant::now() + Duration::from_secs(3);
    let mut sent = 0;
    let request = b"GET /metrics HTTP/1.1\r\nHost: node\r\nX-Slow: 0123456789012345678901234567890123456789\r\n\r\n";
    while Instant::now() < end {
        for (number, stream) in slow.iter_mut().enumerate() {
            if number % 2 == 0 {
                let _ = stream.write_all(&request[sent % request.len()..][..1]);
            } else if sent == 0 {
                let _ = stream.write_all(request);
            } else {
                stream.set_nonblocking(true).unwrap();
                let _ = stream.read(&mut [0]);
            }
        }
        sent += 1;
        if sent % 20 == 0 {
            program.scrape("with 100 slow clients");
        }
        thread::sleep(Duration::from_millis(10));
    }
    drop(slow);

    // What was held comes back.
    let start = Instant::now();
    while program.open_files() > files + 2 || program.memory() > memory + 8 * 1024 {
        assert!(
            start.elapsed() < HANG,
            "{} kB, {} files",
            program.memory(),
            program.open_files()
        );
        let _ = ask(connect(address), "/livez", "");
        thread::sleep(Duration::from_millis(100));
    }
    program.scrape("at the end");
}

#[test]
fn wrong_passwords_over_tls_in_parallel_leave_the_next_scrape_alone() {
    let pki = Pki::new();
    let hash = bcrypt::hash("secret", 10).unwrap();
    let config = pki.tls(&format!("basic_auth_users:\n  ann: '{hash}'\n"));
    let program = Program::new(&["--web.config.file".as_ref(), config.as_os_str()]);
    let address = program.address;
    let client = Arc::new(pki.client(None));
    let reply = move |client: &Arc<ClientConfig>, headers: &str| {
        let name = ServerName::from(std::net::IpAddr::from(Ipv4Addr::LOCALHOST));
        let tls = ClientConnection::new(Arc::clone(client), name).unwrap();
        ask(StreamOwned::new(tls, connect(address)), "/metrics", headers)
    };
    let threads: Vec<_> = (0..32)
        .map(|thread| {
            let client = Arc::clone(&client);
            thread::spawn(move || {
                for guess in 0..10 {
                    let _ = reply(&client, &basic("ann", &format!("{thread} {guess}")));
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    let start = Instant::now();
    let (status, _, body) = reply(&client, &basic("ann", "secret")).unwrap();
    println!(
        "after 320 wrong passwords the next scrape took {:?}",
        start.elapsed()
    );
    assert_eq!(status, 200);
    assert!(start.elapsed() < HANG);
    assert!(
        body.contains("chandra_web_config_last_reload_successful 1"),
        "{body}"
    );
}
