// SPDX-License-Identifier: Apache-2.0
//! The web server: `/metrics`, `/livez`, `/readyz` and the page for people.
//!
//! Everything a client can hold has a bound: connections, the time to send a header, to rest between
//! requests and to take a response ([`Limits`]), and scrapes, of which at most one runs and one waits.
//! Where all connections are taken, the oldest that has not finished its header makes room for a new one, or else the one that has rested
//! longest. Some are kept from other requests for `/livez` and `/readyz`.
//!
//! What [`Web`] asks for comes first: TLS, the rate limit and the password. `/livez` and `/readyz` are open to whoever
//! gets through TLS, for the kubelet has no password; where there is one, `/readyz` gives no reason.

mod clock;
mod exposition;
mod listen;

use std::{
    collections::HashMap,
    convert::Infallible,
    future::{Future, poll_fn},
    io,
    net::IpAddr,
    pin::{Pin, pin},
    sync::{Arc, Mutex},
    time::Duration,
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Bytes, Incoming},
    header::{self, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::AsyncWrite,
    net::{TcpListener, TcpStream},
    select,
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::{JoinSet, spawn_blocking},
    time::{Instant, sleep, timeout},
};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};

pub use self::listen::bind;
use self::{
    clock::{Clock, Clocked, Phase, Wire},
    exposition::{Outcome, Scrapes, accepts_gzip, one_line},
};
use crate::{
    lock::lock,
    web::{Settings, Verdict, Web},
};

/// What the server shows; implemented by the exporter, faked in tests.
pub trait Site: Send + Sync + 'static {
    /// One exposition in the text format. Called on a thread that may block, never twice at once.
    fn metrics(&self) -> anyhow::Result<Vec<u8>>;
    /// Ready, or the one-line reason why not. Called on an async thread: it must not block.
    fn ready(&self) -> Result<(), String>;
    /// The page for people: complete HTML. Called on a thread that may block.
    fn landing(&self) -> String;
}

/// What a client may hold, and for how long.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Open connections; for the next one another at rest is closed, or else it is answered 503.
    pub connections: usize,
    /// Those of them that no request takes but the kubelet's, for `/livez` and `/readyz`: of the others so many more are answered 503.
    pub kept: usize,
    /// From the accept, or from the first byte of a later request, to the end of its header.
    pub header: Duration,
    /// From a response to the first byte of the next request; the response must be taken by then.
    pub idle: Duration,
    /// Without one byte of the response taken.
    pub write: Duration,
    /// For requests in flight at shutdown.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // A node is read by two or three Prometheus servers, the kubelet and a few people.
            connections: 64,
            kept: 8,
            // Scrapers send the header in one packet; four retransmissions of it fit, the first after 0.2 s.
            header: Duration::from_secs(5),
            // Longer than the usual scrape intervals, of at most a minute, so that scrapers reuse connections.
            idle: Duration::from_secs(120),
            // The default `scrape_timeout` of Prometheus: nobody waits for the rest after that.
            write: Duration::from_secs(10),
            drain: Duration::from_secs(1),
        }
    }
}

/// hyper answers 414 to a URI over 65534 bytes, if the whole header fits here, and 431 to a header that does not.
const HEADER_BYTES: usize = 96 * 1024;

/// How long a closed connection is still read. Closing a socket with unread bytes resets the connection,
/// and a reset discards a response that the client has not read yet.
const LINGER: Duration = Duration::from_millis(500);

/// How long a refused connection may take to send its first byte and to read the refusal.
const REFUSAL: Duration = Duration::from_secs(1);

const REFUSED: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\n\
    Content-Type: text/plain; charset=utf-8\r\n\
    Content-Length: 20\r\n\
    Connection: close\r\n\
    \r\n\
    too many connections";

/// What Go answers to HTTP on a port of HTTPS: clients know it.
const NOT_TLS: &[u8] =
    b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n";

/// How long a connection that was told to make room may take to do so: its task has only to be polled.
const EVICTION: Duration = Duration::from_millis(100);

/// Out of file descriptors, `accept` fails at once and every time: the pause keeps that from taking a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The least time between two log lines of one kind that clients can provoke.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

const TEXT: &str = "text/plain; charset=utf-8";
const HTML: &str = "text/html; charset=utf-8";
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Serves `site` to whom `web` lets in until `shutdown` resolves and the requests in flight are answered, or `limits.drain` has passed.
///
/// A call of [`Site::metrics`] that still runs then is left behind on its thread: a runtime that must end in
/// time is ended with `Runtime::shutdown_timeout`, for dropping it waits for that thread.
pub async fn serve<S: Site>(
    listener: TcpListener,
    site: Arc<S>,
    web: Arc<Web>,
    limits: Limits,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let refusals = Arc::new(Semaphore::new(limits.connections));
    let (drain, draining) = watch::channel(false);
    let server = Arc::new(Server {
        scrapes: Scrapes::new(Arc::clone(&site)),
        site,
        web,
        slots: Arc::new(Semaphore::new(limits.connections)),
        work: Semaphore::new(limits.connections.saturating_sub(limits.kept).max(1)),
        clocks: Mutex::default(),
        handshake_log: Seldom::default(),
        limits,
    });
    let mut number = 0;
    let (accept_log, refusal_log) = (Seldom::default(), Seldom::default());
    let mut tasks = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let accepted = select! {
            biased;
            () = &mut shutdown => break,
            Some(_) = tasks.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let (stream, client) = match accepted {
            Ok((stream, client)) => (stream, client.ip().to_canonical()),
            // The client left before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => {
                if accept_log.due() {
                    tracing::warn!(%error, "accept a connection");
                }
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Some(slot) = server.slot().await {
            let (server, draining) = (Arc::clone(&server), draining.clone());
            let clock = Arc::new(Clock::new(&server.limits));
            number += 1;
            lock(&server.clocks).insert(number, Arc::clone(&clock));
            tasks.spawn(async move {
                server.connection(stream, client, &clock, draining).await;
                lock(&server.clocks).remove(&number);
                drop(slot);
            });
            continue;
        }
        if refusal_log.due() {
            let connections = server.limits.connections;
            tracing::warn!(connections, "refuse connections over the limit");
        }
        // Over this second limit the connection is dropped without an answer.
        if let Ok(slot) = Arc::clone(&refusals).try_acquire_owned() {
            tasks.spawn(async move {
                let _ = timeout(REFUSAL, refuse(stream, REFUSED)).await;
                drop(slot);
            });
        }
    }
    drop(listener);
    drain.send_replace(true);
    let drained = timeout(server.limits.drain, async {
        while tasks.join_next().await.is_some() {}
    });
    if drained.await.is_err() {
        tracing::warn!(connections = tasks.len(), "cut requests at shutdown");
        tasks.shutdown().await;
    }
    Ok(())
}

struct Server<S> {
    scrapes: Scrapes<S>,
    site: Arc<S>,
    web: Arc<Web>,
    limits: Limits,
    slots: Arc<Semaphore>,
    /// Requests other than the kubelet's that may be answered at once.
    work: Semaphore,
    /// Of the connections that have a slot. One whose task panicked stays; `make_room` takes it once.
    clocks: Mutex<HashMap<u64, Arc<Clock>>>,
    handshake_log: Seldom,
}

impl<S: Site> Server<S> {
    /// Takes a place for one more connection, another's where all are taken and one can be ended.
    async fn slot(&self) -> Option<OwnedSemaphorePermit> {
        match Arc::clone(&self.slots).try_acquire_owned() {
            Err(_) if self.make_room() => {
                let freed = timeout(EVICTION, Arc::clone(&self.slots).acquire_owned()).await;
                freed.ok().and_then(Result::ok)
            }
            slot => slot.ok(),
        }
    }

    /// Ends the oldest connection that has not finished its header, or else the one that has rested longest; false where all are being
    /// answered.
    fn make_room(&self) -> bool {
        let mut clocks = lock(&self.clocks);
        let resting = clocks
            .iter()
            .filter_map(|(number, clock)| Some((clock.resting()?, *number)))
            .min();
        let evicted = resting.and_then(|(_, number)| clocks.remove(&number));
        if let Some(clock) = &evicted {
            clock.evicted.notify_one();
        }
        evicted.is_some()
    }

    /// The stream under HTTP, once the handshake of TLS is done; `None` where it failed or the client has gone.
    async fn open(&self, stream: TcpStream, tls: Option<Arc<ServerConfig>>) -> Option<Wire> {
        let Some(config) = tls else {
            return Some(Wire::Plain(stream));
        };
        let mut first = [0];
        if stream.peek(&mut first).await.ok()? == 0 {
            return None;
        }
        if first[0].is_ascii_uppercase() {
            let _ = timeout(REFUSAL, refuse(stream, NOT_TLS)).await;
            return None;
        }
        match TlsAcceptor::from(config).accept(stream).await {
            Ok(stream) => Some(Wire::Tls(Box::new(stream))),
            Err(error) => {
                let left = error.kind() == io::ErrorKind::UnexpectedEof;
                if !left && self.handshake_log.due() {
                    tracing::warn!(%error, "refuse a TLS handshake");
                }
                None
            }
        }
    }

    /// Answers the requests of one connection until either side ends it.
    async fn connection(
        &self,
        stream: TcpStream,
        client: IpAddr,
        clock: &Clock,
        mut draining: watch::Receiver<bool>,
    ) {
        // Without it the last packet of a response may wait for the acknowledgement of the one before.
        let _ = stream.set_nodelay(true);
        let opened = async {
            let settings = self.web.settings().await;
            let tls = settings.tls.as_ref().map(|tls| Arc::clone(&tls.config));
            self.open(stream, tls).await
        };
        let wire = select! {
            biased;
            wire = opened => wire,
            () = clock.expired() => return,
            () = clock.evicted.notified() => return,
            _ = draining.wait_for(|drain| *drain) => return,
        };
        let Some(wire) = wire else { return };
        let mut io = TimeoutStream::new(Clocked { wire, clock });
        io.set_write_timeout(Some(self.limits.write));
        let mut io = TokioIo::new(Box::pin(io));
        let ended = {
            let service = service_fn(async |request: Request<Incoming>| {
                clock.enter(Phase::Busy);
                let response = self.respond(&request, client).await;
                clock.enter(Phase::Idle(Instant::now() + self.limits.idle));
                Ok::<_, Infallible>(response)
            });
            let mut connection = pin!(
                http1::Builder::new()
                    // The clock tells a header that does not end from a connection at rest; this would not.
                    .header_read_timeout(None)
                    .max_buf_size(HEADER_BYTES)
                    .serve_connection(&mut io, service)
            );
            let mut open = true;
            loop {
                select! {
                    biased;
                    ended = connection.as_mut() => break End::Of(ended),
                    () = clock.expired() => break End::Late,
                    () = clock.evicted.notified() => break End::Evicted,
                    _ = draining.wait_for(|drain| *drain), if open => {
                        open = false;
                        connection.as_mut().graceful_shutdown();
                    }
                }
            }
        };
        let stream = io.inner().get_ref().wire.tcp();
        match ended {
            End::Late => tracing::debug!("close a connection out of time"),
            End::Evicted => {
                tracing::debug!("close a connection to make room");
                let _ = stream.set_zero_linger();
            }
            End::Of(Err(error)) if !error.is_parse() => {
                tracing::debug!(%error, "cut a connection");
                // A close alone would leave the unread part of a response in kernel memory.
                let _ = stream.set_zero_linger();
            }
            End::Of(_) => {
                clock.enter(Phase::Idle(Instant::now() + LINGER));
                select! {
                    _ = discard(stream) => {}
                    () = clock.expired() => {}
                    () = clock.evicted.notified() => {}
                }
            }
        }
    }

    async fn respond(&self, request: &Request<Incoming>, client: IpAddr) -> Response<Full<Bytes>> {
        let settings = self.web.settings().await;
        let is_probe = PROBES.contains(&request.uri().path());
        let work = (!is_probe).then(|| self.work.try_acquire());
        let mut response = if let Some(Err(_)) = work {
            turned_away(StatusCode::SERVICE_UNAVAILABLE, "too many requests at once")
        } else {
            match self.admit(&settings, request, client).await {
                Ok(()) => self.answer(&settings, request).await,
                Err(refusal) => *refusal,
            }
        };
        let headers = response.headers_mut();
        headers.insert(
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        );
        for (name, value) in &settings.headers {
            headers.insert(name, value.clone());
        }
        // Only the first half of the connections may rest between requests, so that resting ones cannot keep
        // the others out.
        let crowded = self.slots.available_permits() < self.limits.connections.div_ceil(2);
        if crowded || !request.body().is_end_stream() {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    async fn admit(
        &self,
        settings: &Settings,
        request: &Request<Incoming>,
        client: IpAddr,
    ) -> Result<(), Box<Response<Full<Bytes>>>> {
        if PROBES.contains(&request.uri().path()) {
            return Ok(());
        }
        if settings.rate.is_some_and(|rate| !self.web.allows(rate)) {
            return Err(later("too many requests").into());
        }
        let authorization = request.headers().get(header::AUTHORIZATION);
        let gate = &self.web.gate;
        match gate.admit(settings, authorization, client).await {
            Verdict::Pass => Ok(()),
            Verdict::Later => Err(later("too many passwords to check").into()),
            Verdict::Refuse => {
                let mut response = text(
                    StatusCode::UNAUTHORIZED,
                    "a user and its password are needed",
                );
                response.headers_mut().insert(
                    header::WWW_AUTHENTICATE,
                    HeaderValue::from_static("Basic realm=\"chandra\", charset=\"UTF-8\""),
                );
                Err(response.into())
            }
        }
    }

    async fn answer(
        &self,
        settings: &Settings,
        request: &Request<Incoming>,
    ) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        if !["/", "/metrics", "/livez", "/readyz"].contains(&path) {
            return text(
                StatusCode::NOT_FOUND,
                "not found: the pages are /, /metrics, /livez and /readyz",
            );
        }
        if ![Method::GET, Method::HEAD].contains(request.method()) {
            let mut response = text(
                StatusCode::METHOD_NOT_ALLOWED,
                "only GET and HEAD are allowed",
            );
            let headers = response.headers_mut();
            headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match path {
            "/livez" => text(StatusCode::OK, "ok"),
            "/readyz" => match self.site.ready() {
                Ok(()) => text(StatusCode::OK, "ok"),
                Err(_) if !settings.users.is_empty() => {
                    text(StatusCode::SERVICE_UNAVAILABLE, "not ready")
                }
                Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, reason),
            },
            "/metrics" => shown(self.metrics(accepts_gzip(request.headers())).await),
            _ => shown(self.landing().await),
        }
    }

    async fn landing(&self) -> Outcome<Response<Full<Bytes>>> {
        let site = Arc::clone(&self.site);
        let html = spawn_blocking(move || site.landing())
            .await
            .map_err(|error| one_line(&error.into()))?;
        let mut response = page(StatusCode::OK, HTML, html);
        response.headers_mut().insert(
            header::CONTENT_SECURITY_POLICY,
            HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'"),
        );
        Ok(response)
    }

    async fn metrics(&self, gzip: bool) -> Outcome<Response<Full<Bytes>>> {
        let exposition = self.scrapes.join().await?;
        let mut response = if gzip {
            let mut response = page(StatusCode::OK, EXPOSITION, exposition.gzip.await?);
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            response
        } else {
            page(StatusCode::OK, EXPOSITION, exposition.plain)
        };
        let headers = response.headers_mut();
        headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
        Ok(response)
    }
}

/// What the kubelet asks for.
const PROBES: [&str; 2] = ["/livez", "/readyz"];

fn later(why: &'static str) -> Response<Full<Bytes>> {
    let mut response = turned_away(StatusCode::TOO_MANY_REQUESTS, why);
    let headers = response.headers_mut();
    headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

/// An answer after which the connection makes room.
fn turned_away(status: StatusCode, why: &'static str) -> Response<Full<Bytes>> {
    let mut response = text(status, why);
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// The response, or the error in its place.
fn shown(outcome: Outcome<Response<Full<Bytes>>>) -> Response<Full<Bytes>> {
    outcome.unwrap_or_else(|error| text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    page(status, TEXT, body)
}

fn page(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Answers a connection that gets no further. The answer waits for the first byte of the request: Go's client, and
/// so Prometheus, takes a response that comes earlier for a protocol error.
async fn refuse(mut stream: TcpStream, answer: &[u8]) -> io::Result<()> {
    if read(&stream).await? == 0 {
        return Ok(());
    }
    let mut rest = answer;
    while !rest.is_empty() {
        stream.writable().await?;
        match stream.try_write(rest) {
            Ok(written) => rest = &rest[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    poll_fn(|cx| Pin::new(&mut stream).poll_shutdown(cx)).await?;
    discard(&stream).await
}

/// Reads until the client closes.
async fn discard(stream: &TcpStream) -> io::Result<()> {
    while read(stream).await? > 0 {}
    Ok(())
}

/// Reads and drops some bytes; 0 when the client has closed.
async fn read(stream: &TcpStream) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        match stream.try_read(&mut [0; 4096]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
    }
}

/// How a connection came to its end.
enum End {
    Of(hyper::Result<()>),
    Late,
    Evicted,
}

/// Lets one log line pass per [`LOG_INTERVAL`].
#[derive(Default)]
struct Seldom(Mutex<Option<Instant>>);

impl Seldom {
    fn due(&self) -> bool {
        let mut last = lock(&self.0);
        let due = last.is_none_or(|last| last.elapsed() >= LOG_INTERVAL);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}
