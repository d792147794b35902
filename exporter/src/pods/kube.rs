// SPDX-License-Identifier: Apache-2.0
//! Which pods run on this node?
//!
//! Lists the node's pods, then follows them by a watch with bookmarks. What counts as an answer is a list, the start of
//! a watch, an event, and a bookmark, which the API server sends each minute (`defaultBookmarkFrequency`,
//! storage/cacher/cacher.go). A watch that is silent for longer is given up and the list is read again: that bounds
//! `chandra_pods_age_seconds` while the server is well, and catches a connection that only looks open.
//! `kube::runtime::watcher` hides bookmarks and reconnects, so it cannot tell a quiet node from a dead connection.

use std::{
    error::Error,
    hash::{BuildHasher, RandomState},
    io,
    sync::Arc,
    time::Duration,
};

use anyhow::anyhow;
use http_body_util::BodyExt;
use hyper::{Request, StatusCode, header::RETRY_AFTER};
use kube::{
    Client, Config,
    api::{ListParams, WatchParams},
    client::Body,
    config::{InClusterError, KubeconfigError},
    core::{Request as Query, Status, WatchEvent},
};
use tokio::time::{Instant, sleep, timeout};
use tracing::{Dispatch, instrument::WithSubscriber};

use super::{
    Pods,
    file::{Item, List},
};

const PODS: &str = "/api/v1/pods";

/// Pods in a page. The API server ignores it for lists from its cache (`resourceVersion=0`), which are one page.
const PAGE: u32 = 500;

/// Longest list, all pages together: 1000 pods of 64 KiB. Kubernetes is made for 110 pods a node.
const LONGEST_LIST: usize = 64 << 20;

/// Longest event. etcd holds objects of up to 1.5 MiB; JSON is larger than the protobuf that it holds.
const LONGEST_EVENT: usize = 8 << 20;

/// Longest explanation of an error that is read.
const LONGEST_STATUS: usize = 64 << 10;

/// Most characters of an explanation that are repeated: a proxy's error page may be long.
const LONGEST_LINE: usize = 300;

/// Longest wait that a `Retry-After` is granted.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// A watch that ends sooner without an event did not watch: the same bound as in client-go's reflector.
const SHORTEST_WATCH: Duration = Duration::from_secs(1);

/// How long things may take.
#[derive(Clone, Debug)]
pub struct Patience {
    /// Until a request is answered, and between two pieces of a list.
    pub answer: Duration,
    /// Between two events of a watch, bookmarks included.
    pub silence: Duration,
    /// Until the API server ends a watch, whole seconds. Up to a quarter less is asked for, so that the nodes of a
    /// cluster do not return at once.
    pub watch: Duration,
    /// The first pause before another try; each further one is twice as long, less up to a half by chance.
    pub first_pause: Duration,
    /// The longest pause. A watch that lasted longer than this makes the next pause the first one again.
    pub longest_pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            // The API server queues a request for up to 15 s (--request-timeout / 4) before it refuses it.
            answer: Duration::from_secs(30),
            // One bookmark and a half.
            silence: Duration::from_secs(90),
            // What kube's own watcher asks for.
            watch: Duration::from_secs(290),
            first_pause: Duration::from_secs(1),
            longest_pause: Duration::from_secs(30),
        }
    }
}

/// Makes a client for the cluster of this pod or, outside of one, of the kubeconfig. Sends nothing.
///
/// # Errors
///
/// One line that says what is missing and what to do.
pub async fn client() -> anyhow::Result<Client> {
    let inside = match Config::incluster() {
        Ok(config) => return connect(config),
        Err(error) => error,
    };
    let outside = match Config::from_kubeconfig(&Default::default()).await {
        Ok(config) => return connect(config),
        Err(error) => error,
    };
    const ELSE: &str = "or use --pods FILE or --pods none";
    let no_file = std::env::var_os("KUBECONFIG").is_none()
        && match &outside {
            KubeconfigError::FindPath => true,
            KubeconfigError::ReadConfig(error, _) => error.kind() == io::ErrorKind::NotFound,
            _ => false,
        };
    Err(match (inside, no_file) {
        (InClusterError::ReadEnvironmentVariable(_), true) => {
            anyhow!("not in a cluster and no kubeconfig: set KUBECONFIG, {ELSE}")
        }
        (InClusterError::ReadEnvironmentVariable(_), false) => {
            anyhow!(
                "not in a cluster, and the kubeconfig is of no use: {}; mend it, {ELSE}",
                line(&chain(&outside))
            )
        }
        (inside, _) => anyhow!(
            "in a cluster but without a service account: {}; set automountServiceAccountToken: true, {ELSE}",
            line(&chain(&inside))
        ),
    })
}

/// Makes a client that fails in time and does not retry on its own.
///
/// kube-client reads the service account's token and CA from their files again at least once a minute (`TokenFile`,
/// client/auth/mod.rs; `root_cert_file`, config/mod.rs), so it outlives their rotation.
///
/// # Errors
///
/// One line, if the configuration's credentials or certificates cannot be used.
pub fn connect(mut config: Config) -> anyhow::Result<Client> {
    config.connect_timeout = Some(Duration::from_secs(10));
    config.write_timeout = Some(Duration::from_secs(30));
    // Only a net below Patience, which is shorter.
    config.read_timeout = Some(Duration::from_secs(120));
    config.reset_reader_on_write = true;
    // kube would retry 429, 503 and 504 up to 15 times from 5 ms on, and tell nobody.
    config.default_retry = false;
    let address = config.cluster_url.clone();
    Client::try_from(config)
        .map_err(|error| anyhow!("cannot make a client for {address}: {}", reason(&error)))
}

/// Follows the pods of a node, for ever.
///
/// A list comes from the cache of one API server, which may lag behind that of another; the watch after it mends that.
/// A pod that starts and is deleted between two lists is never known. A pod that succeeded or failed counts until it is
/// deleted, as its cgroups may live on.
pub async fn watch(pods: Arc<Pods>, client: Client, node: String) {
    watch_with(pods, client, node, Patience::default()).await;
}

/// Follows the pods of a node, for ever, within other bounds than the default ones.
pub async fn watch_with(pods: Arc<Pods>, client: Client, node: String, patience: Patience) {
    let selector = format!("spec.nodeName={node}");
    let mut source = Source {
        pods,
        client,
        selector,
        patience,
        version: None,
        up: None,
        failures: 0,
        said: None,
    };
    loop {
        let outcome = source.turn().await;
        source.settle();
        let wait = outcome.map_or_else(|trouble| source.complain(trouble), |()| Duration::ZERO);
        sleep(wait.max(source.pause())).await;
    }
}

struct Source {
    pods: Arc<Pods>,
    client: Client,
    selector: String,
    patience: Patience,
    /// What a watch starts from; `None` if the list has to be read first.
    version: Option<String>,
    /// When the watch of this turn was answered.
    up: Option<Instant>,
    /// Turns since the last one that lasted.
    failures: u32,
    /// The trouble that was logged last.
    said: Option<String>,
}

/// Why a turn failed.
#[derive(Debug)]
struct Trouble {
    line: String,
    /// The API server's answer, if it gave one.
    code: Option<StatusCode>,
    /// What the API server asked for.
    wait: Duration,
}

impl Trouble {
    fn new(line: impl Into<String>) -> Self {
        Self {
            line: line.into(),
            code: None,
            wait: Duration::ZERO,
        }
    }

    fn answered(code: StatusCode, message: &str, wait: Duration) -> Self {
        let what = match code {
            StatusCode::UNAUTHORIZED => "the API server does not accept the credentials".to_owned(),
            StatusCode::FORBIDDEN => {
                "RBAC forbids it: the service account needs a ClusterRole with get, list and watch on pods".to_owned()
            }
            code => format!("the API server answers {code}"),
        };
        let line = if message.is_empty() {
            what
        } else {
            format!("{what}: {}", line(message))
        };
        Self {
            line,
            code: Some(code),
            wait,
        }
    }
}

impl From<Status> for Trouble {
    fn from(status: Status) -> Self {
        let code = StatusCode::from_u16(status.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self::answered(code, &status.message, Duration::ZERO)
    }
}

impl Source {
    /// Reads the list if need be, and follows the watch to its end.
    async fn turn(&mut self) -> Result<(), Trouble> {
        self.up = None;
        if self.version.is_none() {
            self.version = Some(self.list().await?);
        }
        match self.follow().await {
            Err(trouble) if trouble.code == Some(StatusCode::GONE) => {
                // The server remembers a few minutes of changes; who comes back later has to read the list.
                tracing::debug!("the watch is too old: {}", trouble.line);
                self.version = None;
                Ok(())
            }
            Err(trouble) => {
                // No answer, or one that only asks to wait, says nothing about the version. Any other may.
                if trouble
                    .code
                    .is_some_and(|code| code != StatusCode::TOO_MANY_REQUESTS)
                {
                    self.version = None;
                }
                Err(trouble)
            }
            Ok(()) => Ok(()),
        }
    }

    /// Reads the whole list and returns its version.
    async fn list(&self) -> Result<String, Trouble> {
        let mut params = ListParams::default().fields(&self.selector).limit(PAGE);
        let mut records = Vec::new();
        let mut left = LONGEST_LIST;
        loop {
            let mut query = Query::new(PODS)
                .list(&params)
                .map_err(|error| Trouble::new(error.to_string()))?;
            if params.continue_token.is_none() {
                // From the cache, which has an index of spec.nodeName. Without it etcd reads the pods of all nodes.
                // `ListParams::at("0")` is dropped where there is a limit.
                let uri = format!("{}&resourceVersion=0", query.uri());
                *query.uri_mut() = uri
                    .try_into()
                    .map_err(|error| Trouble::new(format!("the node's name: {error}")))?;
            }
            let mut body = self.ask(query).await?;
            let text = self.read(&mut body, left).await?;
            left -= text.len();
            let list: List = serde_json::from_slice(&text).map_err(|error| {
                Trouble::new(format!(
                    "the API server's list of pods is not readable: {error}"
                ))
            })?;
            records.extend(list.items.into_iter().map(|item| item.record));
            match list.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params.continue_token = Some(token),
                None => {
                    let version = list
                        .metadata
                        .resource_version
                        .filter(|version| !version.is_empty());
                    let version = version
                        .ok_or_else(|| Trouble::new("the list of pods has no resourceVersion"))?;
                    tracing::debug!(pods = records.len(), version, "listed");
                    self.pods.pods_listed(records, Instant::now().into_std());
                    return Ok(version);
                }
            }
        }
    }

    /// Follows one watch to its end. An end in time is no trouble: the next watch goes on from the last event.
    async fn follow(&mut self) -> Result<(), Trouble> {
        let seconds = self.patience.watch.mul_f64(1.0 - chance() / 4.0).as_secs();
        let seconds = u32::try_from(seconds).unwrap_or(u32::MAX).max(1);
        let params = WatchParams::default()
            .fields(&self.selector)
            .timeout(seconds);
        let version = self.version.as_deref().unwrap_or_default();
        let query = Query::new(PODS)
            .watch(&params, version)
            .map_err(|error| Trouble::new(error.to_string()))?;
        let mut body = self.ask(query).await?;
        let began = Instant::now();
        self.up = Some(began);
        self.pods.pods_unchanged(began.into_std());
        let mut heard = None;
        let mut line = Vec::new();
        loop {
            let rest = self
                .patience
                .silence
                .saturating_sub(heard.unwrap_or(began).elapsed());
            let frame = match timeout(rest, quietly(body.frame())).await {
                Ok(Some(Ok(frame))) => frame,
                // A connection that breaks loses nothing: what was not read whole comes again.
                Ok(Some(Err(_)) | None) => break,
                Err(_) => {
                    tracing::debug!("the watch is silent");
                    self.version = None;
                    return Ok(());
                }
            };
            let Ok(data) = frame.into_data() else {
                continue;
            };
            for piece in data.split_inclusive(|byte| *byte == b'\n') {
                if line.len() + piece.len() > LONGEST_EVENT {
                    self.version = None;
                    return Err(Trouble::new(format!(
                        "an event is larger than {} MiB",
                        LONGEST_EVENT >> 20
                    )));
                }
                line.extend_from_slice(piece);
                if !piece.ends_with(b"\n") || line.trim_ascii().is_empty() {
                    continue;
                }
                self.event(&line)?;
                heard = Some(Instant::now());
                line.clear();
                line.shrink_to(64 << 10);
            }
        }
        if heard.is_none() && began.elapsed() < SHORTEST_WATCH {
            // Whatever ends it may also swallow what it should have told.
            self.version = None;
            return Err(Trouble::new("the API server ends the watch at once"));
        }
        Ok(())
    }

    /// Takes in one line of a watch.
    fn event(&mut self, line: &[u8]) -> Result<(), Trouble> {
        let now = Instant::now().into_std();
        let event = serde_json::from_slice::<WatchEvent<Item>>(line).map_err(|error| {
            self.version = None;
            Trouble::new(format!("an event of the watch is not readable: {error}"))
        })?;
        let version = match event {
            WatchEvent::Added(Item { record, version })
            | WatchEvent::Modified(Item { record, version }) => {
                self.pods.pod_found(record, now);
                version
            }
            WatchEvent::Deleted(Item { record, version }) => {
                self.pods.pod_gone(&record.object, now);
                version
            }
            WatchEvent::Bookmark(mark) => {
                self.pods.pods_unchanged(now);
                Some(mark.metadata.resource_version)
            }
            WatchEvent::Error(status) => return Err((*status).into()),
        };
        // Without a version the next watch starts from an earlier one and tells again what is known.
        if let Some(version) = version.filter(|version| !version.is_empty()) {
            self.version = Some(version);
        }
        self.settle();
        Ok(())
    }

    /// Sends a request and returns the body of a good answer.
    async fn ask(&self, query: Request<Vec<u8>>) -> Result<Body, Trouble> {
        let response = match timeout(
            self.patience.answer,
            quietly(self.client.send(query.map(Body::from))),
        )
        .await
        {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => {
                return Err(Trouble::new(format!(
                    "cannot ask the API server: {}",
                    reason(&error)
                )));
            }
            Err(_) => {
                return Err(Trouble::new(format!(
                    "the API server does not answer within {:?}",
                    self.patience.answer
                )));
            }
        };
        let code = response.status();
        if code.is_success() {
            return Ok(response.into_body());
        }
        let header = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok());
        let wait = header
            .and_then(|text| text.trim().parse().ok())
            .map_or(Duration::ZERO, Duration::from_secs);
        let text = self
            .read(&mut response.into_body(), LONGEST_STATUS)
            .await
            .unwrap_or_default();
        let message = match serde_json::from_slice::<Status>(&text) {
            Ok(status) => status.message,
            // What comes before the API server's handlers, or stands before it, answers in plain text.
            Err(_) => String::from_utf8_lossy(&text).into_owned(),
        };
        Err(Trouble::answered(code, &message, wait.min(LONGEST_WAIT)))
    }

    /// Reads a body that ends.
    async fn read(&self, body: &mut Body, longest: usize) -> Result<Vec<u8>, Trouble> {
        let mut text = Vec::new();
        loop {
            match timeout(self.patience.answer, quietly(body.frame())).await {
                Ok(None) => return Ok(text),
                Ok(Some(Ok(frame))) => {
                    text.extend_from_slice(frame.data_ref().map_or(&[], |data| data))
                }
                Ok(Some(Err(error))) => {
                    return Err(Trouble::new(format!(
                        "the API server's answer breaks off: {}",
                        reason(&error)
                    )));
                }
                Err(_) => {
                    let answer = self.patience.answer;
                    return Err(Trouble::new(format!(
                        "the API server's answer stops for {answer:?}"
                    )));
                }
            }
            if text.len() > longest {
                return Err(Trouble::new(format!(
                    "the API server's answer is larger than {} MiB",
                    LONGEST_LIST >> 20
                )));
            }
        }
    }

    /// Forgets past failures once a watch lasts.
    fn settle(&mut self) {
        if self
            .up
            .is_some_and(|up| up.elapsed() >= self.patience.longest_pause)
        {
            self.failures = 0;
            if self.said.take().is_some() {
                tracing::info!("the API server tells the pods of this node again");
            }
        }
    }

    /// Tells of a trouble and returns how long the API server asked to wait. Logs it once: not each retry, and not each
    /// time that a watch fails again before it has lasted.
    fn complain(&mut self, trouble: Trouble) -> Duration {
        if self.said.as_ref() != Some(&trouble.line) {
            tracing::warn!("{}; pods keep their names", trouble.line);
            self.said = Some(trouble.line.clone());
        }
        self.pods.pods_failed(trouble.line);
        trouble.wait
    }

    /// How long to pause before the next turn.
    fn pause(&mut self) -> Duration {
        let factor = 1 << self.failures.min(16);
        self.failures = self.failures.saturating_add(1);
        let full = self
            .patience
            .first_pause
            .saturating_mul(factor)
            .min(self.patience.longest_pause);
        full.mul_f64(1.0 - chance() / 2.0)
    }
}

/// Runs a part of kube without its log: it logs each failed request as an error; [`Source::complain`] tells it once.
async fn quietly<F: Future>(part: F) -> F::Output {
    part.with_subscriber(Dispatch::none()).await
}

/// A number from 0 to 1: the standard library keys each hasher by chance.
fn chance() -> f64 {
    RandomState::new().hash_one(()) as f64 / u64::MAX as f64
}

/// What kube says, in one line; without the name of the layer that it failed in.
fn reason(error: &kube::Error) -> String {
    line(&match error {
        kube::Error::Service(inner) => chain(inner.as_ref()),
        other => chain(other),
    })
}

/// An error and what caused it.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        cause = error.source();
    }
    text
}

/// Makes one line of a text, and not a long one.
fn line(text: &str) -> String {
    let words = text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty());
    let line = words.collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(LONGEST_LINE) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}
