// SPDX-License-Identifier: Apache-2.0
//! The pods of a node, as told by an API server that lists, watches, lags, lies and falls over.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap, VecDeque},
    env, fs, io,
    net::SocketAddr,
    path::Path,
    process::Command,
    sync::{Arc, Mutex, MutexGuard, Once, PoisonError},
    time::Duration,
};

use chandra::pods::{
    Owner, Place, Pods, Resolution, Source,
    kube::{Patience, client, connect, watch_with},
};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::mpsc::{UnboundedSender, unbounded_channel},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep},
};

const NODE: &str = "node-7";

type Reply = Response<BoxBody<Bytes, io::Error>>;
type Wire = UnboundedSender<io::Result<Frame<Bytes>>>;

/// What the next request gets instead of an answer from the store.
#[derive(Clone)]
enum Script {
    /// This status, with a `Retry-After` if it is not 0, and this body.
    Answer(u16, u64, String),
    /// A list as usual, or a watch that ends as soon as it began.
    EndWatch,
    /// Half of a list, then the end of the connection.
    CutList,
    /// Nothing, on a connection that stays open.
    Never,
}

struct Seen {
    at: Instant,
    query: HashMap<String, String>,
}

impl Seen {
    fn is_watch(&self) -> bool {
        self.query.contains_key("watch")
    }
}

#[derive(Default)]
struct Store {
    pods: BTreeMap<String, Value>,
    version: u64,
    /// The lines of all events since version `oldest`.
    events: Vec<(u64, String)>,
    oldest: u64,
    seen: Vec<Seen>,
    next: VecDeque<Script>,
    always: Option<Script>,
    watches: Vec<Wire>,
    /// Watches are answered and then told nothing.
    silent: bool,
    /// The one bearer token that is accepted, if any is asked for.
    token: Option<&'static str>,
}

/// An API server that knows one resource.
struct Api {
    address: SocketAddr,
    store: Arc<Mutex<Store>>,
    task: Option<JoinHandle<()>>,
}

impl Api {
    async fn new() -> Self {
        let mut api = Self::down().await;
        api.start().await;
        api
    }

    /// An address at which nobody answers yet.
    async fn down() -> Self {
        Log::start();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let store = Store {
            version: 100,
            oldest: 100,
            ..Store::default()
        };
        Self {
            address,
            store: Arc::new(Mutex::new(store)),
            task: None,
        }
    }

    async fn start(&mut self) {
        let listener = TcpListener::bind(self.address)
            .await
            .expect("the port is still free");
        let store = Arc::clone(&self.store);
        self.task = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                // What waits to be acknowledged would wait in real time.
                stream.set_nodelay(true).ok();
                let store = Arc::clone(&store);
                connections.spawn(async move {
                    let service = service_fn(|request| serve(Arc::clone(&store), request));
                    http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await
                        .ok();
                });
            }
        }));
    }

    /// Closes the port and every connection.
    async fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            task.await.ok();
        }
        self.lock().watches.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, pod: Value) {
        let mut store = self.lock();
        let uid = pod["metadata"]["uid"].as_str().expect("a uid").to_owned();
        let kind = if store.pods.contains_key(&uid) {
            "MODIFIED"
        } else {
            "ADDED"
        };
        let pod = store.tell(kind, pod);
        store.pods.insert(uid, pod);
    }

    fn delete(&self, uid: &str) {
        let mut store = self.lock();
        let pod = store.pods.remove(uid).expect("a pod");
        store.tell("DELETED", pod);
    }

    fn bookmark(&self) {
        let store = self.lock();
        let object = json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": store.version.to_string()}});
        store.send(&line("BOOKMARK", &object));
    }

    fn send(&self, text: &str) {
        self.lock().send(text);
    }

    /// Breaks the connection of every watch.
    fn cut(&self) {
        for watch in self.lock().watches.drain(..) {
            watch.send(Err(io::Error::other("cut"))).ok();
        }
    }

    /// Ends every watch as the API server does when its time is over.
    fn end(&self) {
        self.lock().watches.clear();
    }

    /// Forgets the past, as a restart does: a watch from before is too old.
    fn forget(&self) {
        let mut store = self.lock();
        store.events.clear();
        store.version += 100;
        store.oldest = store.version;
    }

    fn lists(&self) -> usize {
        self.lock()
            .seen
            .iter()
            .filter(|seen| !seen.is_watch())
            .count()
    }

    fn watches(&self) -> usize {
        self.lock()
            .seen
            .iter()
            .filter(|seen| seen.is_watch())
            .count()
    }

    fn requests(&self) -> usize {
        self.lock().seen.len()
    }

    fn open(&self) -> usize {
        self.lock()
            .watches
            .iter()
            .filter(|watch| !watch.is_closed())
            .count()
    }

    fn client(&self) -> kube::Client {
        let url = format!("http://{}", self.address).parse().expect("a URL");
        connect(kube::Config::new(url)).expect("a client")
    }

    fn follow(&self) -> Arc<Pods> {
        self.follow_with(quick())
    }

    fn follow_with(&self, patience: Patience) -> Arc<Pods> {
        self.follow_by(self.client(), patience)
    }

    fn follow_by(&self, client: kube::Client, patience: Patience) -> Arc<Pods> {
        let pods = Arc::new(Pods::new(&Source::Kube, Duration::from_secs(300)));
        tokio::spawn(watch_with(
            Arc::clone(&pods),
            client,
            NODE.to_owned(),
            patience,
        ));
        pods
    }
}

impl Store {
    fn tell(&mut self, kind: &str, mut pod: Value) -> Value {
        self.version += 1;
        pod["metadata"]["resourceVersion"] = self.version.to_string().into();
        let line = line(kind, &pod);
        if !self.silent {
            self.send(&line);
        }
        self.events.push((self.version, line));
        pod
    }

    fn send(&self, text: &str) {
        for watch in &self.watches {
            watch
                .send(Ok(Frame::data(Bytes::copy_from_slice(text.as_bytes()))))
                .ok();
        }
    }
}

fn line(kind: &str, object: &Value) -> String {
    format!("{}\n", json!({"type": kind, "object": object}))
}

async fn serve(store: Arc<Mutex<Store>>, request: Request<Incoming>) -> Result<Reply, io::Error> {
    assert_eq!(request.uri().path(), "/api/v1/pods");
    let (script, query) = {
        let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
        let query = query(request.uri().query().unwrap_or_default());
        store.seen.push(Seen {
            at: Instant::now(),
            query: query.clone(),
        });
        let bearer = request.headers().get("Authorization");
        let wanted = store.token.map(|token| format!("Bearer {token}"));
        if wanted.is_some_and(|wanted| bearer.is_none_or(|bearer| *bearer != *wanted)) {
            let body = status(401, "Unauthorized", "Unauthorized");
            return Ok(Response::builder()
                .status(401)
                .body(whole(body))
                .expect("a response"));
        }
        (
            store.next.pop_front().or_else(|| store.always.clone()),
            query,
        )
    };
    let watch = query.contains_key("watch");
    match script {
        Some(Script::Answer(code, wait, body)) => {
            let mut response = Response::builder().status(code);
            if wait > 0 {
                response = response.header("Retry-After", wait);
            }
            return Ok(response.body(whole(body)).expect("a response"));
        }
        Some(Script::Never) => std::future::pending().await,
        Some(Script::EndWatch) if watch => return Ok(Response::new(whole(String::new()))),
        Some(Script::CutList) => {
            let (wire, body) = stream();
            wire.send(Ok(Frame::data(Bytes::from_static(b"{\"items\":[{\"meta"))))
                .ok();
            tokio::spawn(async move {
                sleep(Duration::from_millis(50)).await;
                wire.send(Err(io::Error::other("cut"))).ok();
            });
            return Ok(Response::new(body));
        }
        Some(Script::EndWatch) | None => {}
    }
    let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(if watch {
        watching(&mut store, &query)
    } else {
        list(&store, &query)
    })
}

fn list(store: &Store, query: &HashMap<String, String>) -> Reply {
    let node = query["fieldSelector"]
        .strip_prefix("spec.nodeName=")
        .expect("a selector");
    let mut pods: Vec<_> = store
        .pods
        .values()
        .filter(|pod| pod["spec"]["nodeName"] == node)
        .cloned()
        .collect();
    for pod in &mut pods {
        // The API server writes both once, for the list.
        let pod = pod.as_object_mut().expect("an object");
        pod.remove("kind");
        pod.remove("apiVersion");
    }
    let limit: usize = query["limit"].parse().expect("a limit");
    let from: usize = query
        .get("continue")
        .map_or(0, |token| token.parse().expect("a token"));
    let token = if from + limit < pods.len() {
        (from + limit).to_string()
    } else {
        String::new()
    };
    let page: Vec<_> = pods.into_iter().skip(from).take(limit).collect();
    let metadata = json!({"resourceVersion": store.version.to_string(), "continue": token});
    let list = json!({"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": page});
    Response::new(whole(list.to_string()))
}

fn watching(store: &mut Store, query: &HashMap<String, String>) -> Reply {
    let from: u64 = query["resourceVersion"].parse().expect("a version");
    if from < store.oldest {
        let text = status(410, "Expired", "too old resource version");
        return Response::builder()
            .status(StatusCode::GONE)
            .body(whole(text))
            .expect("a response");
    }
    let (wire, body) = stream();
    if !store.silent {
        for (_, line) in store.events.iter().filter(|(version, _)| *version > from) {
            wire.send(Ok(Frame::data(Bytes::copy_from_slice(line.as_bytes()))))
                .ok();
        }
    }
    store.watches.push(wire);
    Response::new(body)
}

fn whole(text: String) -> BoxBody<Bytes, io::Error> {
    Full::new(Bytes::from(text))
        .map_err(|never| match never {})
        .boxed()
}

fn stream() -> (Wire, BoxBody<Bytes, io::Error>) {
    let (wire, frames) = unbounded_channel();
    let frames = futures::stream::unfold(frames, |mut frames| async {
        let frame = frames.recv().await?;
        Some((frame, frames))
    });
    (wire, BodyExt::boxed(StreamBody::new(frames)))
}

fn status(code: u16, reason: &str, message: &str) -> String {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
        "reason": reason, "code": code})
    .to_string()
}

fn query(text: &str) -> HashMap<String, String> {
    let plain = |text: &str| text.replace("%3D", "=");
    text.split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (plain(key), plain(value)))
        .collect()
}

/// A timer of tokio's has whole milliseconds, and some work takes two.
const SLACK: Duration = Duration::from_millis(5);

/// Bounds that suit a test.
fn quick() -> Patience {
    Patience {
        answer: Duration::from_secs(2),
        silence: Duration::from_secs(60),
        watch: Duration::from_secs(290),
        first_pause: Duration::from_millis(40),
        longest_pause: Duration::from_millis(400),
    }
}

fn pod(name: &str, uid: &str, container: &str) -> Value {
    json!({
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {
            "name": name,
            "namespace": "ml",
            "uid": uid,
            "creationTimestamp": "2026-01-02T03:04:05Z",
            "managedFields": [{"manager": "kubelet", "operation": "Update", "fieldsV1": {"f:status": {}}}],
        },
        "spec": {"nodeName": NODE, "containers": [{"name": "main", "image": "trainer:1"}]},
        "status": {
            "phase": "Running",
            "containerStatuses": [{
                "name": "main",
                "image": "trainer:1",
                "imageID": "",
                "ready": true,
                "restartCount": 0,
                "containerID": format!("containerd://{container}"),
            }],
        },
    })
}

fn place(pods: &Pods, cgroup: u64, uid: &str, container: &str) {
    pods.cgroup_found(
        cgroup,
        Place::Container {
            uid: uid.into(),
            id: container.into(),
        },
    );
}

fn owner(pods: &Pods, cgroup: u64) -> Option<Owner> {
    match pods.view().resolve(cgroup) {
        Resolution::Owner(owner) => Some(owner),
        _ => None,
    }
}

/// Namespace, pod and container of a cgroup, or nothing.
fn labels(pods: &Pods, cgroup: u64) -> String {
    owner(pods, cgroup).map_or_else(String::new, |owner| {
        format!(
            "{}/{}/{}",
            owner.labels.namespace, owner.labels.pod, owner.labels.container
        )
    })
}

fn listed(pods: &Pods) -> Vec<String> {
    pods.view()
        .listed()
        .into_iter()
        .map(|(_, name, _)| name.to_string())
        .collect()
}

fn trouble(pods: &Pods) -> String {
    pods.view().trouble().unwrap_or_default().to_owned()
}

fn age(pods: &Pods) -> Duration {
    let now = Instant::now().into_std();
    pods.view().age(now).unwrap_or(Duration::MAX)
}

/// Waits until it is so. Time is the paused clock's, which goes on as soon as everything waits, for the network too: that gets a moment of
/// real time for each step.
async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "not so in time: {what}"
        );
        std::thread::sleep(Duration::from_micros(500));
        sleep(Duration::from_millis(10)).await;
    }
}

thread_local! {
    static LOGGED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What this thread, and so this test, logs at info and above.
struct Log;

struct Sink;

impl io::Write for Sink {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        LOGGED.with_borrow_mut(|logged| logged.extend_from_slice(text));
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// One subscriber for all threads, as in the exporter: what is silenced must be silent under it.
    fn start() {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            tracing_subscriber::fmt()
                .with_ansi(false)
                .with_writer(|| Sink)
                .init()
        });
    }

    fn lines() -> Vec<String> {
        LOGGED.with_borrow(|logged| {
            String::from_utf8_lossy(logged)
                .lines()
                .map(str::to_owned)
                .collect()
        })
    }
}

#[tokio::test(start_paused = true)]
async fn the_list_and_every_change_reach_the_directory() {
    let api = Api::new().await;
    api.put(pod("trainer-0", "uid-a", "c0"));
    let pods = api.follow();
    place(&pods, 1, "uid-a", "c0");
    place(&pods, 2, "uid-b", "c1");
    place(&pods, 3, "uid-a", "c2");
    until("the listed pod has a name", || {
        labels(&pods, 1) == "ml/trainer-0/main"
    })
    .await;
    assert_eq!(pods.view().resolve(2), Resolution::Pending(None));

    api.put(pod("trainer-1", "uid-b", "c1"));
    until("the added pod has a name", || {
        labels(&pods, 2) == "ml/trainer-1/main"
    })
    .await;

    assert_eq!(labels(&pods, 3), "", "the second container has not started");
    api.put(pod("trainer-0", "uid-a", "c2"));
    until("the restarted container has a name", || {
        labels(&pods, 3) == "ml/trainer-0/main"
    })
    .await;
    assert_eq!(
        labels(&pods, 1),
        "ml/trainer-0/main",
        "the earlier container keeps its name"
    );

    api.delete("uid-b");
    until("the deleted pod is gone", || listed(&pods) == ["trainer-0"]).await;
    assert_eq!(
        labels(&pods, 2),
        "ml/trainer-1/main",
        "a cgroup that outlives its pod keeps its name"
    );
    assert_eq!((api.lists(), api.watches()), (1, 1));
    assert_eq!(trouble(&pods), "");
}

#[tokio::test(start_paused = true)]
async fn only_the_pods_of_this_node_are_asked_for() {
    let api = Api::new().await;
    let mut elsewhere = pod("other", "uid-o", "c9");
    elsewhere["spec"]["nodeName"] = "node-8".into();
    api.put(elsewhere);
    api.put(pod("trainer-0", "uid-a", "c0"));
    let pods = api.follow();
    until("a watch", || api.watches() == 1).await;
    assert_eq!(listed(&pods), ["trainer-0"]);
    let store = api.lock();
    for seen in &store.seen {
        assert_eq!(seen.query["fieldSelector"], "spec.nodeName=node-7");
    }
    // From the cache of the API server, not from etcd.
    assert_eq!(store.seen[0].query["resourceVersion"], "0");
    assert_eq!(store.seen[0].query["limit"], "500");
    let watch = &store.seen[1].query;
    assert_eq!(watch["resourceVersion"], "102", "the version of the list");
    assert_eq!(watch["allowWatchBookmarks"], "true");
    let seconds: u64 = watch["timeoutSeconds"].parse().expect("a number");
    assert!((217..=290).contains(&seconds), "{seconds}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_down_at_the_start_is_waited_for() {
    let mut api = Api::down().await;
    let pods = api.follow();
    place(&pods, 1, "uid-a", "c0");
    until("trouble", || trouble(&pods).contains("Connection refused")).await;
    assert_eq!(
        pods.view().age(Instant::now().into_std()),
        None,
        "nobody has answered yet"
    );
    assert_eq!(pods.view().resolve(1), Resolution::Pending(None));
    api.put(pod("trainer-0", "uid-a", "c0"));
    api.start().await;
    until("attribution begins", || {
        labels(&pods, 1) == "ml/trainer-0/main"
    })
    .await;
    until("no trouble", || trouble(&pods).is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_keeps_the_names_and_a_list_ends_it() {
    let mut api = Api::new().await;
    api.put(pod("trainer-0", "uid-a", "c0"));
    let pods = api.follow();
    place(&pods, 1, "uid-a", "c0");
    until("a watch", || api.open() == 1).await;
    api.put(pod("trainer-1", "uid-b", "c1"));
    until("an event", || listed(&pods).len() == 2).await;

    api.stop().await;
    until("trouble", || {
        trouble(&pods).contains("cannot ask the API server")
    })
    .await;
    let before = age(&pods);
    sleep(Duration::from_millis(300)).await;
    assert!(
        age(&pods) >= before + Duration::from_millis(300),
        "the age grows while nobody answers"
    );
    assert_eq!(labels(&pods, 1), "ml/trainer-0/main");
    assert_eq!(listed(&pods), ["trainer-0", "trainer-1"]);

    api.delete("uid-b");
    api.put(pod("trainer-2", "uid-c", "c2"));
    api.forget();
    api.start().await;
    place(&pods, 3, "uid-c", "c2");
    until("the list is read again", || {
        listed(&pods) == ["trainer-0", "trainer-2"]
    })
    .await;
    assert_eq!(labels(&pods, 3), "ml/trainer-2/main");
    until("no trouble", || trouble(&pods).is_empty()).await;
    until("a low age", || {
        age(&pods) < before + Duration::from_millis(300)
    })
    .await;

    until("the end of the trouble is logged", || {
        api.bookmark();
        Log::lines().iter().any(|line| line.contains("again"))
    })
    .await;
    let warnings = Log::lines()
        .iter()
        .filter(|line| line.contains("WARN"))
        .count();
    assert_eq!(warnings, 1, "{:#?}", Log::lines());
}

#[tokio::test(start_paused = true)]
async fn a_short_outage_goes_on_from_the_last_event() {
    let mut api = Api::new().await;
    api.put(pod("trainer-0", "uid-a", "c0"));
    let pods = api.follow();
    until("a watch", || api.open() == 1).await;
    api.put(pod("trainer-1", "uid-b", "c1"));
    until("an event", || listed(&pods).len() == 2).await;
    api.stop().await;
    until("trouble", || !trouble(&pods).is_empty()).await;
    api.delete("uid-a");
    api.start().await;
    until("the deletion is told", || listed(&pods) == ["trainer-1"]).await;
    assert_eq!(api.lists(), 1, "the server remembers, so no list is needed");
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_too_old_reads_the_list_again() {
    let api = Api::new().await;
    api.put(pod("trainer-0", "uid-a", "c0"));
    let pods = api.follow();
    until("a watch", || api.open() == 1).await;

    // Said in the watch.
    api.lock().silent = true;
    api.delete("uid-a");
    api.put(pod("trainer-1", "uid-b", "c1"));
    let gone: Value =
        serde_json::from_str(&status(410, "Expired", "too old resource version")).expect("JSON");
    api.send(&line("ERROR", &gone));
    until("the list is read again", || listed(&pods) == ["trainer-1"]).await;

    // Said instead of a watch.
    api.lock().silent = false;
    until("a watch", || api.watches() == 2).await;
    api.put(pod("trainer-2", "uid-c", "c2"));
    until("an event", || listed(&pods) == ["trainer-1", "trainer-2"]).await;
    api.lock().silent = true;
    api.delete("uid-b");
    api.forget();
    api.end();
    until("the list is read again", || listed(&pods) == ["trainer-2"]).await;
    assert_eq!(trouble(&pods), "", "expiry is the course of things");
    assert_eq!(Log::lines(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn too_many_requests_wait_as_long_as_the_server_asks() {
    let api = Api::new().await;
    api.put(pod("trainer-0", "uid-a", "c0"));
    let refusal = Script::Answer(
        429,
        2,
        "Too many requests, please try again later.".to_owned(),
    );
    api.lock().next.extend([refusal.clone(), refusal]);
    let began = Instant::now();
    let pods = api.follow();
    until("trouble", || {
        trouble(&pods).contains("429 Too Many Requests: Too many requests")
    })
    .await;
    until("attribution begins", || listed(&pods) == ["trainer-0"]).await;
    assert!(
        began.elapsed() >= Duration::from_secs(4),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(api.lists(), 3);
}

#[tokio::test(start_paused = true)]
async fn server_errors_are_retried_ever_more_slowly_and_logged_once() {
    let api = Api::new().await;
    api.put(pod("trainer-0", "uid-a", "c0"));
    api.lock().always = Some(Script::Answer(
        500,
        0,
        status(500, "InternalError", "etcdserver: leader changed"),
    ));
    let pods = api.follow();
    until("six tries", || api.requests() >= 6).await;
    assert_eq!(
        trouble(&pods),
        "the API server answers 500 Internal Server Error: etcdserver: leader changed"
    );
    // Each pause is less up to a half, by chance.
    let times: Vec<_> = api.lock().seen.iter().map(|seen| seen.at).collect();
    for (times, full) in times.windows(2).zip([40, 80, 160, 320, 400]) {
        let full = Duration::from_millis(full);
        let pause = times[1] - times[0];
        assert!(
            (full / 2..=full + SLACK).contains(&pause),
            "{pause:?} of {full:?}"
        );
    }
    assert_eq!(Log::lines().len(), 1, "{:#?}", Log::lines());

    api.lock().always = Some(Script::Answer(503, 0, "apiserver not ready\n".to_owned()));
    until("the next trouble is told", || Log::lines().len() == 2).await;
    assert_eq!(
        trouble(&pods),
        "the API server answers 503 Service Unavailable: apiserver not ready"
    );
    api.lock().always = None;
    until("attribution begins", || listed(&pods) == ["trainer-0"]).await;
    assert_eq!(trouble(&pods), "");
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_lasts_makes_the_next_pause_a_short_one() {
    let api = Api::new().await;
    let failures = vec![Script::Answer(500, 0, String::new()); 6];
    api.lock().next.extend(failures);
    let pods = api.follow_with(Patience {
        first_pause: Duration::from_millis(10),
        longest_pause: Duration::from_millis(1600),
        ..quick()
    });
    until("a watch", || api.open() == 1).await;
    sleep(Duration::from_millis(1700)).await;
    api.end();
    let began = Instant::now();
    until("another watch", || api.watches() == 2).await;
    // Without it the pause would be 320 to 640 ms.
    assert!(
        began.elapsed() < Duration::from_millis(300),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(trouble(&pods), "");
}

#[tokio::test(start_paused = true)]
async fn missing_rights_are_named() {
    let api = Api::new().await;
    let message = "pods is forbidden: User \"system:serviceaccount:chandra:chandra\" cannot list resource \"pods\"";
    api.lock().always = Some(Script::Answer(403, 0, status(403, "Forbidden", message)));
    let pods = api.follow();
    until("trouble", || !trouble(&pods).is_empty()).await;
    assert_eq!(
        trouble(&pods),
        format!(
            "RBAC forbids it: the service account needs a ClusterRole with get, list and watch on pods: {message}"
        )
    );
    let unauthorized = status(401, "Unauthorized", "Unauthorized");
    api.lock().always = Some(Script::Answer(401, 0, unauthorized));
    until("trouble", || {
        trouble(&pods) == "the API server does not accept the credentials: Unauthorized"
    })
    .await;
}

/// The kubelet writes a new token into the same file, and the API server refuses the old one in time. Takes a minute, for which
/// kube keeps a token that it has read.
#[tokio::test]
async fn a_token_that_rotates_is_read_again() {
    let api = Api::new().await;
    api.put(pod("trainer-0", "uid-a", "c0"));
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("token");
    fs::write(&file, "first").expect("a writable folder");
    api.lock().token = Some("first");
    let url = format!("http://{}", api.address).parse().expect("a URL");
    let mut config = kube::Config::new(url);
    config.auth_info.token_file = Some(file.display().to_string());
    let pods = api.follow_by(connect(config).expect("a client"), quick());
    until("a watch", || api.open() == 1).await;
    assert_eq!(
        (listed(&pods), trouble(&pods)),
        (vec!["trainer-0".to_owned()], String::new())
    );

    fs::write(&file, "second").expect("a writable folder");
    api.lock().token = Some("second");
    api.cut();
    until("the old token is refused", || {
        trouble(&pods).contains("credentials")
    })
    .await;
    assert_eq!(listed(&pods), ["trainer-0"], "names stay");
    let refused = Instant::now();
    while trouble(&pods).contains("credentials") {
        assert!(
            refused.elapsed() < Duration::from_secs(180),
            "the new token is not read"
        );
        sleep(Duration::from_millis(200)).await;
    }
    until("a watch", || api.open() == 1).await;
    api.put(pod("trainer-1", "uid-b", "c1"));
    until("changes come again", || listed(&pods).len() == 2).await;
}

#[tokio::test(start_paused = true)]
async fn where_only_watching_is_forbidden_the_list_still_names_pods() {
    let api = Api::new().await;
    api.put(pod("trainer-0", "uid-a", "c0"));
    // The list is served, the watch is not, the list is served again.
    let forbidden = Script::Answer(403, 0, status(403, "Forbidden", "pods is forbidden"));
    api.lock().next.extend([Script::EndWatch, forbidden]);
    let pods = api.follow();
    until("trouble", || {
        trouble(&pods).contains("RBAC") || api.lists() > 1
    })
    .await;
    assert_eq!(listed(&pods), ["trainer-0"]);
    until("the list is read again", || {
        api.lists() == 2 && api.open() == 1
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_broken_line_reads_the_list_again() {
    let api = Api::new().await;
    let pods = api.follow();
    until("a watch", || api.open() == 1).await;
    api.lock().silent = true;
    api.put(pod("trainer-0", "uid-a", "c0"));
    api.send("{\"type\":\"ADDED\",\"object\":{\"metadata\":}}\n");
    until("the list is read again", || listed(&pods) == ["trainer-0"]).await;
    assert_eq!(Log::lines().len(), 1, "{:#?}", Log::lines());
    assert!(
        Log::lines()[0].contains("an event of the watch is not readable: "),
        "{:#?}",
        Log::lines()
    );
    until("no trouble", || trouble(&pods).is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_kind_of_event_that_is_not_known_reads_the_list_again() {
    let api = Api::new().await;
    let pods = api.follow();
    until("a watch", || api.open() == 1).await;
    api.send(&line("RENAMED", &pod("trainer-0", "uid-a", "c0")));
    until("the list is read again", || api.lists() == 2).await;
    until("no trouble", || trouble(&pods).is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_cut_inside_a_line_goes_on_from_the_last_event() {
    let api = Api::new().await;
    let pods = api.follow();
    until("a watch", || api.open() == 1).await;
    api.put(pod("trainer-0", "uid-a", "c0"));
    until("an event", || listed(&pods) == ["trainer-0"]).await;
    api.lock().silent = true;
    api.put(pod("trainer-1", "uid-b", "c1"));
    api.send("{\"type\":\"ADDED\",\"object\":{\"metadata\":{\"name\":\"trai");
    api.lock().silent = false;
    api.cut();
    until("the event comes whole", || {
        listed(&pods) == ["trainer-0", "trainer-1"]
    })
    .await;
    assert_eq!(api.lists(), 1);
    assert_eq!(trouble(&pods), "");
    assert_eq!(
        Log::lines(),
        [""; 0],
        "a cut is no trouble while the next watch is answered"
    );
}

#[tokio::test(start_paused = true)]
async fn events_in_pieces_and_events_in_one_piece_are_read() {
    let api = Api::new().await;
    let pods = api.follow();
    until("a watch", || api.open() == 1).await;
    api.lock().silent = true;
    api.put(pod("müller-0", "uid-a", "c0"));
    api.put(pod("müller-1", "uid-b", "c1"));
    api.put(pod("müller-2", "uid-c", "c2"));
    let lines: Vec<_> = api
        .lock()
        .events
        .iter()
        .map(|(_, line)| line.clone())
        .collect();
    for byte in lines[0].bytes() {
        api.lock().watches[0]
            .send(Ok(Frame::data(Bytes::copy_from_slice(&[byte]))))
            .expect("a watch");
    }
    api.send("\n");
    api.send(&format!("{}{}", lines[1], lines[2]));
    until("all pods", || {
        listed(&pods) == ["müller-0", "müller-1", "müller-2"]
    })
    .await;
    assert_eq!(api.requests(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_event_without_end_is_refused() {
    let api = Api::new().await;
    let pods = api.follow();
    until("a watch", || api.open() == 1).await;
    let piece = "x".repeat(1 << 20);
    for _ in 0..9 {
        api.send(&piece);
    }
    until("the list is read again", || api.lists() == 2).await;
    assert!(
        Log::lines()[0].contains("an event is larger than 8 MiB"),
        "{:#?}",
        Log::lines()
    );
    until("no trouble", || trouble(&pods).is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_stalls_is_given_up() {
    let api = Api::new().await;
    let pods = api.follow_with(Patience {
        silence: Duration::from_millis(700),
        ..quick()
    });
    until("a watch", || api.open() == 1).await;
    // The connection stays open and says nothing, not even what changes.
    api.lock().silent = true;
    api.put(pod("trainer-0", "uid-a", "c0"));
    sleep(Duration::from_millis(300)).await;
    assert_eq!(listed(&pods), [""; 0]);
    assert!(age(&pods) >= Duration::from_millis(250), "the age grows");
    api.lock().silent = false;
    until("the list is read again", || listed(&pods) == ["trainer-0"]).await;
    assert_eq!(trouble(&pods), "");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_accepts_but_never_answers_is_trouble() {
    let api = Api::new().await;
    api.put(pod("trainer-0", "uid-a", "c0"));
    let short = Duration::from_millis(500);
    let pods = api.follow_with(Patience {
        answer: short,
        silence: short,
        ..quick()
    });
    place(&pods, 1, "uid-a", "c0");
    until("a watch", || api.open() == 1).await;
    api.lock().silent = true;
    api.lock().always = Some(Script::Never);
    until("trouble", || {
        trouble(&pods) == "the API server does not answer within 500ms"
    })
    .await;
    assert!(age(&pods) >= short, "{:?}", age(&pods));
    assert_eq!(labels(&pods, 1), "ml/trainer-0/main");
    api.lock().silent = false;
    api.lock().always = None;
    until("no trouble", || trouble(&pods).is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn bookmarks_keep_the_age_low() {
    let api = Api::new().await;
    let pods = api.follow();
    until("a watch", || api.open() == 1).await;
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(1500) {
        api.bookmark();
        sleep(Duration::from_millis(50)).await;
    }
    api.bookmark();
    until("a low age", || age(&pods) < Duration::from_millis(500)).await;
    assert_eq!(
        (api.lists(), api.watches()),
        (1, 1),
        "the watch was quiet, and one"
    );
}

#[tokio::test(start_paused = true)]
async fn a_watch_goes_on_from_the_last_bookmark() {
    let api = Api::new().await;
    let pods = api.follow();
    until("a watch", || api.open() == 1).await;
    api.lock().version = 4000;
    api.bookmark();
    // Whoever came back with the version of the list would be told that it is too old.
    api.lock().oldest = 4000;
    sleep(Duration::from_millis(100)).await;
    api.end();
    until("another watch", || api.watches() == 2).await;
    assert_eq!(api.lock().seen[2].query["resourceVersion"], "4000");
    api.put(pod("trainer-0", "uid-a", "c0"));
    until("an event", || listed(&pods) == ["trainer-0"]).await;
    assert_eq!(api.lists(), 1);
}

#[tokio::test(start_paused = true)]
async fn without_bookmarks_lists_keep_the_age_low() {
    let api = Api::new().await;
    api.put(pod("trainer-0", "uid-a", "c0"));
    let pods = api.follow_with(Patience {
        silence: Duration::from_millis(300),
        ..quick()
    });
    until("a fourth list", || {
        assert_eq!(trouble(&pods), "", "a quiet node is no trouble");
        api.lists() == 4
    })
    .await;
    until("a low age", || age(&pods) < Duration::from_millis(500)).await;
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_always_ends_at_once_turns_into_slow_lists() {
    let api = Api::new().await;
    api.lock().always = Some(Script::EndWatch);
    let pods = api.follow();
    until("trouble", || {
        trouble(&pods) == "the API server ends the watch at once"
    })
    .await;
    api.put(pod("trainer-0", "uid-a", "c0"));
    until("a list tells the pod", || listed(&pods) == ["trainer-0"]).await;
    let before = api.lists();
    sleep(Duration::from_millis(1500)).await;
    let lists = api.lists() - before;
    assert!((1..=10).contains(&lists), "{lists} lists");
    assert_eq!(Log::lines().len(), 1, "{:#?}", Log::lines());
}

#[tokio::test(start_paused = true)]
async fn a_thousand_pods_come_in_pages() {
    let api = Api::new().await;
    for n in 0..1001 {
        api.put(pod(
            &format!("trainer-{n:04}"),
            &format!("uid-{n:04}"),
            &format!("c{n}"),
        ));
    }
    let pods = api.follow();
    place(&pods, 1, "uid-0000", "c0");
    place(&pods, 2, "uid-1000", "c1000");
    until("all pods", || listed(&pods).len() == 1001).await;
    assert_eq!(labels(&pods, 1), "ml/trainer-0000/main");
    assert_eq!(labels(&pods, 2), "ml/trainer-1000/main");
    assert_eq!(api.lists(), 3);
    let store = api.lock();
    for (seen, token) in store.seen[1..3].iter().zip(["500", "1000"]) {
        assert_eq!(seen.query["continue"], token);
        // The API server refuses both at once.
        assert!(!seen.query.contains_key("resourceVersion"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_page_token_that_expires_starts_the_list_again() {
    let api = Api::new().await;
    for n in 0..600 {
        api.put(pod(
            &format!("trainer-{n:04}"),
            &format!("uid-{n:04}"),
            &format!("c{n}"),
        ));
    }
    let expired = status(410, "Expired", "The provided continue parameter is too old");
    api.lock()
        .next
        .extend([Script::EndWatch, Script::Answer(410, 0, expired)]);
    let pods = api.follow();
    until("all pods", || listed(&pods).len() == 600).await;
    assert_eq!(api.lists(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_list_that_breaks_off_is_no_list() {
    let api = Api::new().await;
    api.put(pod("trainer-0", "uid-a", "c0"));
    let pods = api.follow();
    until("a watch", || api.open() == 1).await;
    let html = "<html>\n<body>  Please sign in\n".repeat(100);
    let nameless =
        json!({"metadata": {"resourceVersion": "7"}, "items": [{"metadata": {}}]}).to_string();
    let scripts = [
        (Script::CutList, "the API server's answer breaks off: "),
        (
            Script::Answer(200, 0, "{\"items\":[{\"meta".to_owned()),
            "EOF while parsing a string at line 1",
        ),
        (
            Script::Answer(200, 0, html.clone()),
            "the API server's list of pods is not readable: expected value",
        ),
        (
            Script::Answer(502, 0, html),
            "502 Bad Gateway: <html> <body> Please sign in <html>",
        ),
        (
            Script::Answer(200, 0, nameless),
            "items[0]: a pod without metadata.uid or metadata.name",
        ),
        (
            Script::Answer(200, 0, "{\"items\":[]}".to_owned()),
            "the list of pods has no resourceVersion",
        ),
    ];
    for (script, text) in scripts {
        api.lock().always = Some(script);
        api.forget();
        api.end();
        until(text, || trouble(&pods).contains(text)).await;
        let line = trouble(&pods);
        assert!(line.len() < 400 && !line.contains('\n'), "{line}");
        assert_eq!(listed(&pods), ["trainer-0"], "the names stay");
    }
    let none = json!({"metadata": {"resourceVersion": "1000000"}, "items": null}).to_string();
    api.lock().always = None;
    api.lock().next.push_back(Script::Answer(200, 0, none));
    until("null is no pods", || listed(&pods).is_empty()).await;
    assert_eq!(trouble(&pods), "");
}

#[tokio::test(start_paused = true)]
async fn a_static_pod_has_the_hash_of_its_manifest_for_a_uid() {
    let api = Api::new().await;
    let hash = "5b4b4c1c6b8e6f7e3c2f4d1a9b8c7d6e";
    let mut mirror = pod("etcd-node-7", "uid-of-the-mirror", "c0");
    mirror["metadata"]["annotations"] = json!({
        "kubernetes.io/config.hash": hash,
        "kubernetes.io/config.mirror": hash,
                "kubernetes.io/config.source": "file",
    });
    mirror["metadata"]["ownerReferences"] =
        json!([{"apiVersion": "v1", "kind": "Node", "name": "node-7", "uid": "n7"}]);
    api.put(mirror);
    let pods = api.follow();
    place(&pods, 1, hash, "c0");
    until("the static pod has a name", || {
        labels(&pods, 1) == "ml/etcd-node-7/main"
    })
    .await;
    api.delete("uid-of-the-mirror");
    until("the static pod is gone", || listed(&pods).is_empty()).await;
    assert_eq!(labels(&pods, 1), "ml/etcd-node-7/main");
}

#[tokio::test(start_paused = true)]
async fn long_and_foreign_text_is_read() {
    let api = Api::new().await;
    let pods = api.follow();
    until("a watch", || api.open() == 1).await;
    let mut foreign = pod("trainer-0", "uid-a", "c0");
    let long = "ünï\u{0}\"\\\n𝒻ørmátted ".repeat(12_000);
    foreign["metadata"]["annotations"] = json!({"note": long});
    foreign["metadata"]["labels"] = json!({"l": "чандра", "x".repeat(5000): "y".repeat(5000)});
    foreign["status"]["message"] = long.into();
    api.put(foreign);
    place(&pods, 1, "uid-a", "c0");
    until("the pod has a name", || {
        labels(&pods, 1) == "ml/trainer-0/main"
    })
    .await;
    assert_eq!(api.requests(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_name_belongs_to_the_younger_pod() {
    let api = Api::new().await;
    api.put(pod("trainer-0", "uid-a", "c0"));
    let pods = api.follow();
    place(&pods, 1, "uid-a", "c0");
    place(&pods, 2, "uid-b", "c1");
    until("a name", || labels(&pods, 1) == "ml/trainer-0/main").await;
    api.delete("uid-a");
    let mut younger = pod("trainer-0", "uid-b", "c1");
    younger["metadata"]["creationTimestamp"] = "2026-01-02T03:04:06Z".into();
    api.put(younger);
    until("the new pod has the name", || {
        labels(&pods, 2) == "ml/trainer-0/main"
    })
    .await;
    assert_eq!(owner(&pods, 2).expect("an owner").uid.as_ref(), "uid-b");
    assert_eq!(pods.view().resolve(1), Resolution::Unknown);
}

#[tokio::test(start_paused = true)]
async fn of_two_pods_of_one_second_the_later_one_has_the_name() {
    let api = Api::new().await;
    api.put(pod("trainer-0", "uid-a", "c0"));
    let pods = api.follow();
    place(&pods, 1, "uid-a", "c0");
    place(&pods, 2, "uid-b", "c1");
    until("a name", || labels(&pods, 1) == "ml/trainer-0/main").await;
    api.delete("uid-a");
    api.put(pod("trainer-0", "uid-b", "c1"));
    until("the new pod has the name", || {
        labels(&pods, 2) == "ml/trainer-0/main"
    })
    .await;
    assert_eq!(pods.view().resolve(1), Resolution::Unknown);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_ended_counts_until_it_is_deleted() {
    let api = Api::new().await;
    let mut ended = pod("job-x", "uid-a", "c0");
    ended["status"]["phase"] = "Succeeded".into();
    api.put(ended);
    let pods = api.follow();
    place(&pods, 1, "uid-a", "c0");
    until("a name", || labels(&pods, 1) == "ml/job-x/main").await;
    assert_eq!(listed(&pods), ["job-x"]);
}

#[tokio::test(start_paused = true)]
async fn a_client_for_https_needs_no_server() {
    let config = kube::Config::new("https://127.0.0.1:1".parse().expect("a URL"));
    connect(config).expect("a client");
}

/// Runs [`client`] in a process with this environment only, and returns its error.
fn error_of_client(home: &Path, vars: &[(&str, &str)]) -> String {
    let mut command = Command::new(env::current_exe().expect("this program"));
    command.args(["--exact", "the_client_says_what_is_missing", "--nocapture"]);
    command
        .env_clear()
        .env("HOME", home)
        .env("CHANDRA_TEST_CLIENT", "1")
        .envs(vars.iter().copied());
    let output = command.output().expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let error = text
        .split_once("error=[")
        .and_then(|(_, rest)| rest.split_once("]=error"));
    error
        .unwrap_or_else(|| panic!("no error in {text}"))
        .0
        .to_owned()
}

#[test]
fn the_client_says_what_is_missing() {
    if env::var_os("CHANDRA_TEST_CLIENT").is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let error = runtime
            .block_on(client())
            .err()
            .map_or("none".to_owned(), |error| format!("{error:#}"));
        println!("error=[{error}]=error");
        return;
    }
    let home = tempfile::tempdir().expect("a directory");
    let file = home.path().join("config");
    let path = file.to_str().expect("a path");
    let or = "or use --pods FILE or --pods none";

    let error = error_of_client(home.path(), &[]);
    assert_eq!(
        error,
        format!("not in a cluster and no kubeconfig: set KUBECONFIG, {or}")
    );

    let error = error_of_client(home.path(), &[("KUBECONFIG", path)]);
    assert!(
        error.starts_with("not in a cluster, and the kubeconfig is of no use: failed to read"),
        "{error}"
    );
    assert!(
        error.ends_with(or) && error.contains(path) && !error.contains('\n'),
        "{error}"
    );

    fs::write(&file, "clusters: [\n  - what").expect("written");
    let error = error_of_client(home.path(), &[("KUBECONFIG", path)]);
    assert!(
        error.starts_with("not in a cluster, and the kubeconfig is of no use: failed to parse"),
        "{error}"
    );
    assert!(error.ends_with(or) && !error.contains('\n'), "{error}");

    let inside = [
        ("KUBERNETES_SERVICE_HOST", "10.0.0.1"),
        ("KUBERNETES_SERVICE_PORT", "443"),
    ];
    let error = error_of_client(home.path(), &inside);
    assert!(
        error.starts_with("in a cluster but without a service account: "),
        "{error}"
    );
    assert!(error.ends_with(or) && !error.contains('\n'), "{error}");

    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": "https://127.0.0.1:1"}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "users": [{"name": "me", "user": {"token": "secret"}}],
    });
    fs::write(&file, config.to_string()).expect("written");
    assert_eq!(
        error_of_client(home.path(), &[("KUBECONFIG", path)]),
        "none",
        "nobody has to answer"
    );
}
