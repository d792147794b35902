// SPDX-License-Identifier: Apache-2.0
//! The web server over real sockets, with a client that can also misbehave.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    process::Command,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use chandra::{
    server::{Limits, Site, bind, serve},
    web::Web,
};
use tokio::{runtime::Runtime, sync::oneshot};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Far longer than anything here takes on a busy machine, so that a hang is a failure.
const HANG: Duration = Duration::from_secs(60);

/// A time-out that never ends a test.
const NEVER: Duration = Duration::from_secs(3600);

const MEGABYTE: usize = 1 << 20;

#[derive(Default)]
struct Fake {
    started: AtomicUsize,
    running: AtomicUsize,
    most_at_once: AtomicUsize,
    /// While true, scrapes that have started do not end.
    held: Mutex<bool>,
    released: Condvar,
    fate: Mutex<Fate>,
    padding: usize,
    landing_waits: bool,
    unready: Mutex<Option<String>>,
}

#[derive(Clone, Copy, Default)]
enum Fate {
    #[default]
    Succeed,
    Fail,
    Panic,
}

impl Fake {
    fn started(&self) -> usize {
        self.started.load(SeqCst)
    }

    fn hold(&self) {
        *self.held.lock().unwrap() = true;
    }

    fn wait(&self) {
        let held = self.held.lock().unwrap();
        drop(self.released.wait_while(held, |held| *held).unwrap());
    }

    fn release(&self) {
        *self.held.lock().unwrap() = false;
        self.released.notify_all();
    }

    fn meet(&self, fate: Fate) {
        *self.fate.lock().unwrap() = fate;
    }
}

impl Site for Fake {
    /// The first line is the number of the scrape, counted from 1.
    fn metrics(&self) -> anyhow::Result<Vec<u8>> {
        let number = self.started.fetch_add(1, SeqCst) + 1;
        let running = self.running.fetch_add(1, SeqCst) + 1;
        self.most_at_once.fetch_max(running, SeqCst);
        self.wait();
        self.running.fetch_sub(1, SeqCst);
        let fate = *self.fate.lock().unwrap();
        match fate {
            Fate::Succeed => {
                let mut page = format!("{number}\n").into_bytes();
                page.resize(page.len() + self.padding, b'#');
                Ok(page)
            }
            Fate::Fail => Err(anyhow!("no such map\nrdma_sent")).context("read the maps"),
            Fate::Panic => panic!("a scrape that panics"),
        }
    }

    fn ready(&self) -> Result<(), String> {
        match &*self.unready.lock().unwrap() {
            Some(reason) => Err(reason.clone()),
            None => Ok(()),
        }
    }

    fn landing(&self) -> String {
        if self.landing_waits {
            self.wait();
        }
        "<!doctype html><title>chandra</title>".into()
    }
}

struct Server {
    address: SocketAddr,
    site: Arc<Fake>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Server {
    fn new() -> Self {
        Self::with(Fake::default(), Limits::default())
    }

    fn limited(limits: Limits) -> Self {
        Self::with(Fake::default(), limits)
    }

    fn with(site: Fake, limits: Limits) -> Self {
        Self::on("127.0.0.1:0", site, limits)
    }

    fn on(address: &'static str, site: Fake, limits: Limits) -> Self {
        let site = Arc::new(site);
        let (stop, stopped) = oneshot::channel();
        let (bound, address_of) = mpsc::channel();
        let shown = Arc::clone(&site);
        let thread = thread::spawn(move || {
            let runtime = Runtime::new().unwrap();
            let served = runtime.block_on(async {
                let listener = bind(address).await.unwrap();
                bound.send(listener.local_addr().unwrap()).unwrap();
                serve(listener, shown, Arc::new(Web::default()), limits, async {
                    let _ = stopped.await;
                })
                .await
            });
            // A held scrape would keep the drop waiting.
            runtime.shutdown_background();
            served
        });
        Self {
            address: address_of.recv().unwrap(),
            site,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn connect(&self) -> Client {
        Client::to(self.address)
    }

    fn get(&self, path: &str) -> Reply {
        self.connect().get(path)
    }

    /// Asks until the answer is 200: a slot comes free when the server notices that its client has gone.
    fn get_when_free(&self, path: &str) -> Reply {
        let start = Instant::now();
        loop {
            let mut client = self.connect();
            client.send(&request("GET", path));
            match client.try_reply() {
                Ok(reply) if reply.status == 200 => return reply,
                other => assert!(start.elapsed() < HANG, "no slot came free: {other:?}"),
            }
            thread::sleep(ms(20));
        }
    }

    fn tell_to_stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    fn wait_for_end(&mut self) {
        let thread = self.thread.take().unwrap();
        until("the server ends", || thread.is_finished());
        thread.join().unwrap().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.site.release();
    }
}

#[derive(Debug)]
struct Reply {
    status: u16,
    headers: HashMap<String, String>,
    body: Vec<u8>,
}

impl Reply {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    fn text(&self) -> &str {
        str::from_utf8(&self.body).unwrap()
    }

    /// The number of the scrape that made this page.
    fn number(&self) -> usize {
        assert_eq!(self.status, 200, "{}", self.text());
        self.text().lines().next().unwrap().parse().unwrap()
    }
}

struct Client(BufReader<TcpStream>);

impl Client {
    fn to(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(HANG)).unwrap();
        stream.set_write_timeout(Some(HANG)).unwrap();
        Self(BufReader::new(stream))
    }

    fn send(&mut self, text: &str) {
        self.try_send(text).unwrap();
    }

    fn try_send(&mut self, text: &str) -> io::Result<()> {
        self.0.get_mut().write_all(text.as_bytes())
    }

    fn get(&mut self, path: &str) -> Reply {
        self.send(&request("GET", path));
        self.reply()
    }

    fn reply(&mut self) -> Reply {
        self.try_reply().unwrap()
    }

    fn try_reply(&mut self) -> io::Result<Reply> {
        let mut reply = self.head()?;
        let length = reply.header("content-length").parse().unwrap();
        reply.body.resize(length, 0);
        self.0.read_exact(&mut reply.body)?;
        Ok(reply)
    }

    /// A reply up to the empty line.
    fn head(&mut self) -> io::Result<Reply> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            match line.trim_end() {
                "" => break,
                line => lines.push(line.to_owned()),
            }
        }
        let status = lines[0].split(' ').nth(1).unwrap().parse().unwrap();
        let headers = lines[1..].iter().map(|line| {
            let (name, value) = line.split_once(": ").unwrap();
            (name.to_ascii_lowercase(), value.to_owned())
        });
        Ok(Reply {
            status,
            headers: headers.collect(),
            body: Vec::new(),
        })
    }

    /// Reads up to the close and returns the number of bytes that came before it.
    fn drain(&mut self) -> usize {
        let mut buffer = vec![0; MEGABYTE];
        let mut total = 0;
        loop {
            match self.0.read(&mut buffer) {
                Ok(0) => return total,
                Ok(n) => total += n,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return total,
                Err(error) => panic!("the connection is still open: {error}"),
            }
        }
    }

    /// Waits for the close, before which nothing comes.
    fn closed(&mut self) {
        assert_eq!(self.drain(), 0);
    }

    /// Like `closed`, for a close that is not a reset.
    fn closed_in_order(&mut self) {
        assert_eq!(self.0.read(&mut [0]).unwrap(), 0);
    }
}

fn request(method: &str, path: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: node\r\n\r\n")
}

/// A socket of the server's: its state, as the kernel numbers it, and how many bytes of it nobody has read.
struct Socket {
    state: u32,
    unread: u32,
}

const ESTABLISHED: u32 = 1;
const TIME_WAIT: u32 = 6;
const LISTEN: u32 = 10;

impl Server {
    /// The server's ends of its connections (`/proc/net/tcp`).
    fn sockets(&self) -> Vec<Socket> {
        let text = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let local = format!(":{:04X}", self.address.port());
        let sockets = text.lines().skip(1).filter_map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            let hex = |text: &str| u32::from_str_radix(text, 16).unwrap();
            words[1].ends_with(&local).then(|| Socket {
                state: hex(words[3]),
                unread: hex(words[4].split(':').nth(1).unwrap()),
            })
        });
        sockets
            .filter(|socket| ![LISTEN, TIME_WAIT].contains(&socket.state))
            .collect()
    }

    /// Waits until the server has read all that was sent on so many connections.
    fn has_read(&self, connections: usize) {
        until("the server reads", || {
            let sockets = self.sockets();
            sockets.len() >= connections && sockets.iter().all(|socket| socket.unread == 0)
        });
    }

    /// Waits until the server has closed what clients have closed.
    fn has_so_many(&self, connections: usize) {
        until("the server closes", || self.sockets().len() <= connections);
    }
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < HANG, "waited for: {what}");
        thread::sleep(ms(5));
    }
}

fn gunzip(bytes: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    flate2::read::GzDecoder::new(bytes)
        .read_to_end(&mut text)
        .unwrap();
    text
}

fn metrics_with(client: &mut Client, accept_encoding: &str) -> Reply {
    client.send(&format!(
        "GET /metrics HTTP/1.1\r\nHost: node\r\nAccept-Encoding: {accept_encoding}\r\n\r\n"
    ));
    client.reply()
}

// Pages.

#[test]
fn metrics_are_served_in_the_text_format() {
    let reply = Server::new().get("/metrics");
    assert_eq!(reply.status, 200);
    assert_eq!(
        reply.header("content-type"),
        "text/plain; version=0.0.4; charset=utf-8"
    );
    assert_eq!(reply.header("vary"), "Accept-Encoding");
    assert_eq!(reply.header("content-encoding"), "");
    assert_eq!(reply.text(), "1\n");
}

#[test]
fn a_live_server_says_ok() {
    let reply = Server::new().get("/livez");
    assert_eq!((reply.status, reply.text()), (200, "ok"));
    assert_eq!(reply.header("content-type"), "text/plain; charset=utf-8");
}

#[test]
fn readiness_gives_the_reason_while_there_is_one() {
    let server = Server::new();
    *server.site.unready.lock().unwrap() = Some("attaching rdma".into());
    let reply = server.get("/readyz");
    assert_eq!((reply.status, reply.text()), (503, "attaching rdma"));
    *server.site.unready.lock().unwrap() = None;
    let reply = server.get("/readyz");
    assert_eq!((reply.status, reply.text()), (200, "ok"));
}

#[test]
fn the_page_for_people_is_html_that_loads_nothing() {
    let reply = Server::new().get("/");
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), "text/html; charset=utf-8");
    assert_eq!(
        reply.header("content-security-policy"),
        "default-src 'none'; style-src 'unsafe-inline'"
    );
    assert_eq!(reply.header("x-content-type-options"), "nosniff");
    assert_eq!(reply.text(), "<!doctype html><title>chandra</title>");
}

#[test]
fn query_strings_are_ignored() {
    let server = Server::new();
    for path in [
        "/metrics?collect[]=rdma",
        "/livez?verbose",
        "/readyz?",
        "/?",
    ] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
}

#[test]
fn a_full_url_as_the_target_is_understood() {
    assert_eq!(Server::new().get("http://node:9970/livez").status, 200);
}

#[test]
fn head_has_the_headers_of_get_and_no_body() {
    let server = Server::new();
    *server.site.unready.lock().unwrap() = Some("attaching rdma".into());
    for path in ["/", "/metrics", "/livez", "/readyz", "/elsewhere"] {
        let get = server.get(path);
        let mut client = server.connect();
        client.send(&request("HEAD", path));
        let head = client.head().unwrap();
        assert_eq!(head.status, get.status, "{path}");
        for name in ["content-length", "content-type", "vary"] {
            assert_eq!(head.header(name), get.header(name), "{path} {name}");
        }
        // The next byte belongs to the next reply.
        assert_eq!(client.get("/livez").text(), "ok", "{path}");
    }
}

#[test]
fn other_methods_are_refused_with_those_allowed() {
    let server = Server::new();
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"] {
        for path in ["/", "/metrics", "/livez", "/readyz"] {
            let mut client = server.connect();
            client.send(&request(method, path));
            let reply = client.reply();
            assert_eq!(reply.status, 405, "{method} {path}");
            assert_eq!(reply.header("allow"), "GET, HEAD");
        }
    }
    assert_eq!(server.site.started(), 0);
}

#[test]
fn other_paths_are_not_found_whatever_the_method() {
    let server = Server::new();
    for (method, path) in [
        ("GET", "/metrics/"),
        ("GET", "//metrics"),
        ("GET", "/%6detrics"),
        ("GET", "/favicon.ico"),
        ("POST", "/api"),
        ("OPTIONS", "*"),
        ("CONNECT", "node:443"),
    ] {
        let mut client = server.connect();
        client.send(&request(method, path));
        let reply = client.reply();
        assert_eq!(reply.status, 404, "{method} {path}");
        assert_eq!(
            reply.text(),
            "not found: the pages are /, /metrics, /livez and /readyz"
        );
    }
}

// Requests that are wrong or odd.

#[test]
fn a_malformed_request_is_answered_400_and_the_connection_closed() {
    let server = Server::new();
    for malformed in [
        "nonsense\r\n\r\n",
        "GET /metrics HTTP/3.7\r\n\r\n",
        "GET /met rics HTTP/1.1\r\n\r\n",
        "GET /metrics HTTP/1.1\r\nno colon\r\n\r\n",
        "GET /metrics HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        "GET /metrics HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "\u{16}\u{3}\u{1}\u{2} a TLS hello\r\n\r\n",
    ] {
        let mut client = server.connect();
        client.send(malformed);
        let reply = client.head().unwrap();
        assert_eq!(reply.status, 400, "{malformed:?}");
        client.closed();
    }
    assert_eq!(server.site.started(), 0);
    assert_eq!(server.get("/livez").status, 200);
}

#[test]
fn an_over_long_header_is_answered_431() {
    let server = Server::new();
    let long = format!(
        "GET /metrics HTTP/1.1\r\nCookie: {}\r\n\r\n",
        "x".repeat(MEGABYTE)
    );
    let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(200));
    for header in [long, many] {
        let mut client = server.connect();
        // The server stops reading somewhere in the middle.
        let _ = client.try_send(&header);
        assert_eq!(client.head().unwrap().status, 431);
        client.closed();
    }
    assert_eq!(server.site.started(), 0);
}

#[test]
fn an_over_long_uri_is_answered_414() {
    let server = Server::new();
    let mut client = server.connect();
    client.send(&request("GET", &format!("/{}", "x".repeat(70_000))));
    assert_eq!(client.head().unwrap().status, 414);
    client.closed();
}

#[test]
fn a_get_with_a_body_is_answered_at_once_and_closed() {
    let server = Server::new();
    for body in [
        "Content-Length: 1000000",
        "Transfer-Encoding: chunked",
        "Content-Length: 1000000\r\nExpect: 100-continue",
    ] {
        let mut client = server.connect();
        client.send(&format!("GET /metrics HTTP/1.1\r\n{body}\r\n\r\n"));
        let reply = client.reply();
        assert_eq!(reply.status, 200);
        assert_eq!(reply.header("connection"), "close");
        client.closed_in_order();
    }
    // Also when the whole body is there already.
    let mut client = server.connect();
    client.send("GET /livez HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody");
    assert_eq!(client.reply().header("connection"), "close");
    client.closed_in_order();
}

#[test]
fn a_reply_survives_a_body_that_is_still_on_its_way() {
    let server = Server::new();
    let mut client = server.connect();
    client.send("POST /metrics HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n");
    for _ in 0..10 {
        client.send(&"x".repeat(10_000));
        thread::sleep(ms(5));
    }
    assert_eq!(client.reply().status, 405);
    client.closed_in_order();
}

#[test]
fn one_connection_carries_many_requests() {
    let server = Server::new();
    let mut client = server.connect();
    for number in 1..=20 {
        assert_eq!(client.get("/metrics").number(), number);
    }
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let server = Server::new();
    let mut client = server.connect();
    let requests: String = ["/livez", "/metrics", "/elsewhere", "/metrics"]
        .iter()
        .map(|path| request("GET", path))
        .collect();
    client.send(&requests);
    assert_eq!(client.reply().text(), "ok");
    assert_eq!(client.reply().number(), 1);
    assert_eq!(client.reply().status, 404);
    assert_eq!(client.reply().number(), 2);
}

#[test]
fn a_connection_closes_when_the_client_wants_that() {
    let server = Server::new();
    for asking in [
        "GET /livez HTTP/1.0\r\n\r\n",
        "GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n",
    ] {
        let mut client = server.connect();
        client.send(asking);
        assert_eq!(client.reply().text(), "ok");
        client.closed_in_order();
    }
}

// Compression.

#[test]
fn gzip_decodes_to_the_same_bytes() {
    let padding = 3 * MEGABYTE;
    let server = Server::with(
        Fake {
            padding,
            ..Fake::default()
        },
        Limits::default(),
    );
    let reply = metrics_with(&mut server.connect(), "gzip");
    assert_eq!(reply.header("content-encoding"), "gzip");
    assert_eq!(reply.header("vary"), "Accept-Encoding");
    assert_eq!(
        reply.header("content-type"),
        "text/plain; version=0.0.4; charset=utf-8"
    );
    assert!(reply.body.len() < padding / 10);
    let mut expected = b"1\n".to_vec();
    expected.resize(2 + padding, b'#');
    assert!(gunzip(&reply.body) == expected);
}

#[test]
fn gzip_is_used_where_the_client_allows_it() {
    let server = Server::new();
    let mut client = server.connect();
    for (accept, gzip) in [
        ("gzip", true),
        ("GZIP", true),
        ("x-gzip", true),
        ("gzip, deflate, br", true),
        ("deflate,gzip;q=0.5", true),
        ("br;q=1.0 , gzip ; q=0.001", true),
        ("*", true),
        ("*;q=0.1", true),
        ("identity;q=0.5, gzip", true),
        ("identity;q=0, *", true),
        ("", false),
        ("identity", false),
        ("deflate, br", false),
        ("gzip;q=0", false),
        ("gzip;q=0.000", false),
        ("gzip;q=0, *", false),
        ("*, gzip;q=0", false),
        ("*;q=0", false),
        ("gzip;q=0.5, identity", false),
        ("gzip;q=2", false),
        ("gzip;q=NaN", false),
        ("gzip;q=", false),
        ("gzip;level=9", false),
        ("gzipped", false),
        (",;,=", false),
    ] {
        let reply = metrics_with(&mut client, accept);
        assert_eq!(
            reply.header("content-encoding") == "gzip",
            gzip,
            "{accept:?}"
        );
        assert_eq!(reply.header("vary"), "Accept-Encoding", "{accept:?}");
    }
}

#[test]
fn an_accept_encoding_of_several_lines_is_one_list() {
    let server = Server::new();
    let mut client = server.connect();
    client.send("GET /metrics HTTP/1.1\r\nAccept-Encoding: br\r\nAccept-Encoding: gzip\r\n\r\n");
    assert_eq!(client.reply().header("content-encoding"), "gzip");
}

#[test]
fn sharers_of_a_scrape_may_differ_in_encoding() {
    let server = Server::new();
    server.site.hold();
    let mut first = server.connect();
    first.send(&request("GET", "/metrics"));
    until("the first scrape", || server.site.started() == 1);
    let mut plain = server.connect();
    let mut packed = server.connect();
    plain.send(&request("GET", "/metrics"));
    packed.send("GET /metrics HTTP/1.1\r\nAccept-Encoding: gzip\r\n\r\n");
    server.has_read(3);
    server.site.release();
    let (plain, packed) = (plain.reply(), packed.reply());
    assert_eq!(packed.header("content-encoding"), "gzip");
    assert_eq!(plain.body, gunzip(&packed.body));
    assert_eq!(server.site.started(), 2);
}

// Scrapes.

#[test]
fn a_hundred_requests_at_once_share_a_handful_of_scrapes() {
    let server = Server::limited(Limits {
        connections: 200,
        ..Limits::default()
    });
    server.site.hold();
    let mut early = server.connect();
    early.send(&request("GET", "/metrics"));
    until("the first scrape", || server.site.started() == 1);
    let mut late: Vec<Client> = (0..100).map(|_| server.connect()).collect();
    for client in &mut late {
        client.send(&request("GET", "/metrics"));
    }
    // While the first scrape still runs.
    server.has_read(101);
    assert_eq!(server.site.started(), 1);
    server.site.release();
    assert_eq!(early.reply().number(), 1);
    for client in &mut late {
        assert!(client.reply().number() > 1, "the first scrape is stale");
    }
    assert!(server.site.started() <= 5, "{}", server.site.started());
    assert_eq!(server.site.most_at_once.load(SeqCst), 1);
}

#[test]
fn no_request_gets_a_scrape_that_started_before_it() {
    let server = Server::new();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut client = server.connect();
                for _ in 0..100 {
                    let before = server.site.started();
                    assert!(client.get("/metrics").number() > before);
                }
            });
        }
    });
    assert_eq!(server.site.most_at_once.load(SeqCst), 1);
}

#[test]
fn scrapes_run_one_at_a_time_though_every_client_leaves() {
    let server = Server::new();
    server.site.hold();
    let mut leaving: Vec<Client> = (0..10).map(|_| server.connect()).collect();
    for client in &mut leaving {
        client.send(&request("GET", "/metrics"));
    }
    until("a scrape", || server.site.started() > 0);
    drop(leaving);
    server.has_so_many(0);
    let mut patient = server.connect();
    patient.send(&request("GET", "/metrics"));
    server.has_read(1);
    assert_eq!(server.site.started(), 1);
    server.site.release();
    assert!(patient.reply().number() > 1);
    assert_eq!(server.site.most_at_once.load(SeqCst), 1);
}

#[test]
fn other_pages_are_served_while_a_scrape_hangs() {
    let server = Server::new();
    server.site.hold();
    let mut stuck = server.connect();
    stuck.send(&request("GET", "/metrics"));
    until("the scrape", || server.site.started() == 1);
    for path in ["/", "/livez", "/readyz"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
}

#[test]
fn pages_for_people_that_wait_for_the_scrape_hold_up_nobody() {
    let server = Server::with(
        Fake {
            landing_waits: true,
            ..Fake::default()
        },
        Limits::default(),
    );
    server.site.hold();
    let mut people: Vec<Client> = (0..20).map(|_| server.connect()).collect();
    for client in &mut people {
        client.send(&request("GET", "/"));
    }
    server.has_read(20);
    assert_eq!(server.get("/livez").status, 200);
    server.site.release();
    for client in &mut people {
        assert_eq!(client.reply().status, 200);
    }
}

#[test]
fn a_client_that_leaves_a_hung_scrape_gives_its_slot_back() {
    let server = Server::limited(Limits {
        connections: 2,
        ..Limits::default()
    });
    server.site.hold();
    let mut leaving: Vec<Client> = (0..2).map(|_| server.connect()).collect();
    for client in &mut leaving {
        client.send(&request("GET", "/metrics"));
    }
    until("the scrape", || server.site.started() == 1);
    drop(leaving);
    assert_eq!(server.get_when_free("/livez").text(), "ok");
}

#[test]
fn a_failed_scrape_is_told_in_one_line_to_all_sharers() {
    let server = Server::new();
    server.site.meet(Fate::Fail);
    server.site.hold();
    let mut clients: Vec<Client> = (0..10).map(|_| server.connect()).collect();
    for client in &mut clients {
        client.send(&request("GET", "/metrics"));
    }
    until("the scrape", || server.site.started() == 1);
    server.site.release();
    for client in &mut clients {
        let reply = client.reply();
        assert_eq!(reply.status, 500);
        assert_eq!(reply.text(), "read the maps: no such map rdma_sent");
        assert_eq!(reply.header("content-type"), "text/plain; charset=utf-8");
    }
    server.site.meet(Fate::Succeed);
    assert_eq!(clients[0].get("/metrics").status, 200);
}

#[test]
fn a_scrape_that_panics_is_answered_500_and_the_next_one_works() {
    let server = Server::new();
    server.site.meet(Fate::Panic);
    let mut client = server.connect();
    let reply = client.get("/metrics");
    assert_eq!(reply.status, 500);
    assert_eq!(reply.text().lines().count(), 1);
    server.site.meet(Fate::Succeed);
    assert_eq!(client.get("/metrics").number(), 2);
}

// Time-outs.

#[test]
fn a_header_that_never_ends_is_cut_while_others_are_served() {
    let server = Server::limited(Limits {
        header: ms(500),
        ..Limits::default()
    });
    let start = Instant::now();
    let mut slow = server.connect();
    slow.send("GET /metrics HTTP/1.1\r\n");
    assert_eq!(server.get("/metrics").status, 200);
    // A byte now and then does not help.
    while slow.try_send("A: b\r\n").is_ok() {
        assert!(start.elapsed() < HANG, "the header may go on for ever");
        assert_eq!(server.get("/livez").status, 200);
        thread::sleep(ms(50));
    }
    assert!(start.elapsed() >= ms(400), "{:?}", start.elapsed());
}

#[test]
fn a_silent_connection_is_closed_at_the_header_time_out() {
    let server = Server::limited(Limits {
        header: ms(400),
        idle: NEVER,
        ..Limits::default()
    });
    let start = Instant::now();
    server.connect().closed();
    assert!(start.elapsed() >= ms(400), "{:?}", start.elapsed());
}

#[test]
fn a_connection_at_rest_outlives_the_header_time_out_but_not_its_own() {
    // A header that is not there in time would be the end of a connection; its first has to be.
    let server = Server::limited(Limits {
        header: ms(1000),
        idle: NEVER,
        ..Limits::default()
    });
    let mut client = server.connect();
    assert_eq!(client.get("/livez").status, 200);
    thread::sleep(ms(1500));
    assert_eq!(client.get("/livez").status, 200);

    let server = Server::limited(Limits {
        header: NEVER,
        idle: ms(500),
        ..Limits::default()
    });
    let mut client = server.connect();
    let start = Instant::now();
    assert_eq!(client.get("/livez").status, 200);
    client.closed();
    assert!(start.elapsed() >= ms(500), "{:?}", start.elapsed());
}

#[test]
fn the_header_time_out_holds_for_later_requests() {
    let server = Server::limited(Limits {
        header: ms(1000),
        idle: NEVER,
        ..Limits::default()
    });
    let mut client = server.connect();
    assert_eq!(client.get("/livez").status, 200);
    thread::sleep(ms(1500));
    let start = Instant::now();
    client.send("GET /livez HT");
    client.closed();
    assert!(start.elapsed() >= ms(1000), "{:?}", start.elapsed());
}

#[test]
fn a_slow_scrape_is_no_fault_of_the_client() {
    let server = Server::limited(Limits {
        header: ms(1000),
        idle: ms(1000),
        write: ms(1000),
        ..Limits::default()
    });
    server.site.hold();
    let mut client = server.connect();
    client.send(&request("GET", "/metrics"));
    thread::sleep(ms(2500));
    server.site.release();
    assert_eq!(client.reply().number(), 1);
}

#[test]
fn a_client_that_never_reads_a_large_response_is_cut() {
    let server = Server::with(
        Fake {
            padding: 20 * MEGABYTE,
            ..Fake::default()
        },
        Limits {
            write: ms(500),
            ..Limits::default()
        },
    );
    let mut deaf = server.connect();
    deaf.send(&request("GET", "/metrics"));
    until("the scrape", || server.site.started() == 1);
    // What is closed with bytes that nobody has read waits for them in another state.
    until("the server closes", || {
        let open = |socket: &Socket| socket.state == ESTABLISHED;
        !server.sockets().iter().any(open)
    });
    assert!(deaf.drain() < 20 * MEGABYTE);
}

#[test]
fn a_client_that_reads_slowly_but_steadily_gets_all_of_it() {
    let padding = 20 * MEGABYTE;
    let server = Server::with(
        Fake {
            padding,
            ..Fake::default()
        },
        Limits {
            // Less than all of it takes, and more than any part.
            write: ms(2500),
            ..Limits::default()
        },
    );
    let mut client = server.connect();
    client.send("GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n");
    client.head().unwrap();
    let (mut buffer, mut total) = (vec![0; MEGABYTE], 0);
    while total < 2 + padding {
        thread::sleep(ms(200));
        let wanted = buffer.len().min(2 + padding - total);
        client.0.read_exact(&mut buffer[..wanted]).unwrap();
        total += wanted;
    }
    client.closed_in_order();
}

// Connections.

/// Takes every slot with a request for the scrape, which is held.
fn all_busy(server: &Server, connections: usize) -> Vec<Client> {
    server.site.hold();
    let asking = |_| {
        let mut client = server.connect();
        client.send(&request("GET", "/metrics"));
        client
    };
    let mut busy: Vec<Client> = (0..connections - 1).map(asking).collect();
    busy.push(asking(0));
    until("a scrape starts", || server.site.started() == 1);
    server.has_read(connections);
    busy
}

#[test]
fn connections_over_the_limit_are_answered_503_while_all_others_are_answered() {
    let server = Server::limited(Limits {
        connections: 4,
        kept: 0,
        ..Limits::default()
    });
    let mut busy = all_busy(&server, 4);
    let mut over = server.connect();
    let reply = over.get("/metrics");
    assert_eq!((reply.status, reply.text()), (503, "too many connections"));
    over.closed_in_order();
    // The answer has not waited for a slot.
    server.site.release();
    for client in &mut busy {
        assert_eq!(client.reply().status, 200);
    }
    drop(busy);
    assert_eq!(server.get_when_free("/livez").text(), "ok");
}

/// However many wait for a scrape, the kubelet is answered.
#[test]
fn requests_for_scrapes_leave_slots_for_probes() {
    let server = Server::limited(Limits {
        connections: 10,
        kept: 3,
        ..Limits::default()
    });
    let mut busy = all_busy(&server, 7);
    for _ in 0..20 {
        let mut more = server.connect();
        let reply = more.get("/metrics");
        assert_eq!(
            (reply.status, reply.text()),
            (503, "too many requests at once")
        );
        more.closed_in_order();
        for probe in ["/livez", "/readyz"] {
            assert_eq!(server.get(probe).status, 200);
        }
    }
    server.site.release();
    for client in &mut busy {
        assert_eq!(client.reply().status, 200);
    }
}

/// A client at rest has been useful, one that does not finish its header has not.
#[test]
fn the_oldest_unfinished_header_makes_room_before_a_client_at_rest() {
    let server = Server::limited(Limits {
        connections: 4,
        kept: 0,
        header: NEVER,
        idle: NEVER,
        ..Limits::default()
    });
    let mut scraper = server.connect();
    assert_eq!(scraper.get("/metrics").status, 200);
    let mut slow: Vec<Client> = Vec::new();
    for _ in 0..3 {
        let mut client = server.connect();
        client.send("GET /metrics HTTP/1.1\r\n");
        slow.push(client);
    }
    server.has_read(4);
    // As long as a client of this network may take to send a header.
    thread::sleep(ms(600));
    let mut new = server.connect();
    assert_eq!(new.get("/livez").status, 200);
    slow.remove(0).closed();
    assert_eq!(scraper.get("/metrics").status, 200, "it was left alone");
}

#[test]
fn the_connection_that_has_rested_longest_makes_room() {
    let server = Server::limited(Limits {
        connections: 3,
        kept: 0,
        header: NEVER,
        idle: NEVER,
        ..Limits::default()
    });
    // They are accepted in the order in which they came.
    let mut silent = server.connect();
    let mut trickling = server.connect();
    trickling.send("GET /livez HTTP/1.1\r\n");
    server.has_read(2);
    let mut served = server.connect();
    assert_eq!(served.get("/livez").status, 200);
    let mut new = server.connect();
    assert_eq!(new.get("/livez").status, 200);
    silent.closed();
    trickling.send("Host: node\r\n\r\n");
    assert_eq!(trickling.reply().status, 200, "it was not the oldest");
}

#[test]
fn a_scrape_that_runs_is_not_given_up_for_new_connections() {
    let server = Server::limited(Limits {
        connections: 2,
        kept: 0,
        header: NEVER,
        ..Limits::default()
    });
    server.site.hold();
    let mut scraping = server.connect();
    scraping.send(&request("GET", "/metrics"));
    until("the scrape starts", || server.site.started() == 1);
    let flood: Vec<Client> = (0..50).map(|_| server.connect()).collect();
    assert_eq!(server.get("/livez").status, 200);
    server.site.release();
    assert_eq!(scraping.reply().number(), 1);
    drop(flood);
}

#[test]
fn a_refusal_survives_a_request_that_is_still_on_its_way() {
    let server = Server::limited(Limits {
        connections: 1,
        kept: 0,
        ..Limits::default()
    });
    let _busy = all_busy(&server, 1);
    let mut over = server.connect();
    over.send("GET /metrics HTTP/1.1\r\n");
    thread::sleep(ms(100));
    over.send("Host: node\r\n");
    thread::sleep(ms(100));
    over.send("\r\n");
    assert_eq!(over.reply().status, 503);
    over.closed_in_order();
}

#[test]
fn a_refused_connection_that_says_nothing_is_closed() {
    let server = Server::limited(Limits {
        connections: 1,
        kept: 0,
        ..Limits::default()
    });
    let _busy = all_busy(&server, 1);
    server.connect().closed();
}

#[test]
fn refused_connections_have_a_limit_too() {
    let server = Server::limited(Limits {
        connections: 8,
        kept: 0,
        ..Limits::default()
    });
    let _busy = all_busy(&server, 8);
    let mut waiting: Vec<Client> = (0..8).map(|_| server.connect()).collect();
    let mut over = server.connect();
    // The connection may be closed before these bytes arrive.
    let _ = over.try_send(&request("GET", "/livez"));
    over.closed();
    assert_eq!(waiting[0].get("/livez").status, 503);
}

#[test]
fn connections_at_rest_take_at_most_half_of_the_slots() {
    let server = Server::limited(Limits {
        // So many that those of the end never fill the rest, for which one at rest would give way.
        connections: 40,
        ..Limits::default()
    });
    let mut resting: Vec<Client> = Vec::new();
    for _ in 0..20 {
        let mut client = server.connect();
        assert_eq!(client.get("/livez").header("connection"), "");
        resting.push(client);
    }
    for _ in 0..10 {
        let reply = server.get_when_free("/livez");
        assert_eq!(reply.header("connection"), "close");
    }
}

#[test]
fn a_client_that_leaves_gives_its_slot_back() {
    let server = Server::limited(Limits {
        connections: 1,
        header: NEVER,
        idle: NEVER,
        ..Limits::default()
    });
    for _ in 0..20 {
        assert_eq!(server.get_when_free("/livez").text(), "ok");
    }
}

/// Set for the child that runs with few file descriptors.
const FEW_FILES: &str = "CHANDRA_TEST_FEW_FILES";

#[test]
fn a_server_out_of_file_descriptors_logs_seldom_and_recovers() {
    if std::env::var_os(FEW_FILES).is_some() {
        return serve_without_file_descriptors();
    }
    let output = Command::new("sh")
        .args(["-c", "ulimit -n 64 && exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_server_out_of_file_descriptors_logs_seldom_and_recovers",
            "--nocapture",
        ])
        .env(FEW_FILES, "1")
        .output()
        .unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{log}");
    assert_eq!(log.matches("accept a connection").count(), 1, "{log}");
    assert!(log.contains("Too many open files"), "{log}");
}

fn serve_without_file_descriptors() {
    /// How often the server has said something.
    static SAID: AtomicUsize = AtomicUsize::new(0);
    let log = || {
        SAID.fetch_add(1, SeqCst);
        io::stderr()
    };
    tracing_subscriber::fmt()
        .with_writer(log)
        .with_ansi(false)
        .init();
    let server = Server::new();
    assert_eq!(server.get("/livez").status, 200);
    let mut files: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    // One for the client; the server finds none left.
    files.pop();
    let mut client = server.connect();
    client.send(&request("GET", "/livez"));
    until("the server says it", || SAID.load(SeqCst) > 0);
    // It tries again now and then, and does not say so each time.
    thread::sleep(ms(1000));
    drop(files);
    assert_eq!(client.reply().text(), "ok");
}

// Shutdown.

#[test]
fn shutdown_answers_the_request_in_flight_and_closes_connections_at_rest() {
    let mut server = Server::limited(Limits {
        drain: NEVER,
        ..Limits::default()
    });
    let mut resting = server.connect();
    assert_eq!(resting.get("/livez").status, 200);
    let mut silent = server.connect();
    server.site.hold();
    let mut in_flight = server.connect();
    in_flight.send(&request("GET", "/metrics"));
    until("the scrape", || server.site.started() == 1);

    server.tell_to_stop();
    resting.closed();
    silent.closed();
    assert!(TcpStream::connect(server.address).is_err());
    server.site.release();
    let reply = in_flight.reply();
    assert_eq!(reply.number(), 1);
    assert_eq!(reply.header("connection"), "close");
    in_flight.closed_in_order();
    drop(in_flight);
    server.wait_for_end();
}

#[test]
fn shutdown_cuts_what_is_not_done_in_time() {
    let mut server = Server::limited(Limits {
        drain: ms(500),
        ..Limits::default()
    });
    server.site.hold();
    let mut stuck = server.connect();
    stuck.send(&request("GET", "/metrics"));
    until("the scrape", || server.site.started() == 1);
    let start = Instant::now();
    server.tell_to_stop();
    server.wait_for_end();
    assert!(start.elapsed() >= ms(500), "{:?}", start.elapsed());
    stuck.closed();
}

#[test]
fn shutdown_of_an_idle_server_is_immediate() {
    let mut server = Server::limited(Limits {
        drain: NEVER,
        ..Limits::default()
    });
    server.tell_to_stop();
    server.wait_for_end();
}

// Addresses.

fn try_bind(address: &str) -> anyhow::Result<SocketAddr> {
    Runtime::new()
        .unwrap()
        .block_on(async { Ok(bind(address).await?.local_addr()?) })
}

fn has_ipv6() -> bool {
    std::net::TcpListener::bind("[::1]:0").is_ok()
}

#[test]
fn an_address_is_a_host_and_a_port() {
    assert!(
        try_bind("127.0.0.1:0")
            .unwrap()
            .to_string()
            .starts_with("127.0.0.1:")
    );
    assert!(
        try_bind("localhost:0")
            .unwrap()
            .to_string()
            .starts_with("127.0.0.1:")
    );
    if has_ipv6() {
        assert!(
            try_bind("[::1]:0")
                .unwrap()
                .to_string()
                .starts_with("[::1]:")
        );
    }
}

#[test]
fn a_port_alone_is_every_interface_of_both_families() {
    let server = Server::on(":0", Fake::default(), Limits::default());
    let port = server.address.port();
    let mut client = Client::to(SocketAddr::from(([127, 0, 0, 1], port)));
    assert_eq!(client.get("/livez").text(), "ok");
    if has_ipv6() {
        let mut client = Client::to(format!("[::1]:{port}").parse().unwrap());
        assert_eq!(client.get("/livez").text(), "ok");
    }
}

#[test]
fn a_port_in_use_is_named_with_what_to_do() {
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = holder.local_addr().unwrap().port();
    for address in [format!("127.0.0.1:{port}"), format!(":{port}")] {
        let error = try_bind(&address).unwrap_err();
        assert_eq!(
            format!("{error:#}"),
            format!(
                "{address} is already in use: stop the program that listens there, or choose another address with \
                 --web.listen-address"
            )
        );
    }
}

#[test]
fn an_address_of_another_host_is_named_with_what_to_do() {
    // Reserved for documentation (RFC 5737).
    assert_eq!(
        format!("{:#}", try_bind("192.0.2.1:9970").unwrap_err()),
        "192.0.2.1:9970 is not an address of this host: choose another with --web.listen-address"
    );
}

#[test]
fn an_address_that_cannot_be_read_is_shown_with_the_forms_that_can() {
    for address in [
        "",
        ":",
        "9970",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:http",
        "127.0.0.1:65536",
        "::1:9970",
        "[::1]",
        "[::1:9970",
        "::1]:9970",
        "[]:9970",
        "[localhost]:9970",
        "http://localhost:9970",
    ] {
        assert_eq!(
            format!("{:#}", try_bind(address).unwrap_err()),
            format!(
                "cannot read {address:?} as an address to listen on: --web.listen-address takes HOST:PORT or :PORT, \
                 such as 127.0.0.1:9970, [::1]:9970 or :9970"
            )
        );
    }
}

#[test]
fn a_host_that_cannot_be_found_is_one_line_that_says_what_to_do() {
    let error = format!("{:#}", try_bind("no host:9970").unwrap_err());
    assert!(
        error.starts_with("cannot find the host of \"no host:9970\" ("),
        "{error}"
    );
    assert!(
        error.ends_with("): give --web.listen-address an address of this host"),
        "{error}"
    );
    assert_eq!(error.lines().count(), 1, "{error}");
}
