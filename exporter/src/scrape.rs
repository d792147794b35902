// SPDX-License-Identifier: Apache-2.0
//! One scrape: pods frozen, signals read and rendered, and the exporter's account of itself.

use std::{
    cell::Cell,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::system::uname;

use crate::{
    VERSION,
    args::Serve,
    families::{Desc, Families, Kind},
    hook::{Method, Reason},
    kernel::{Hierarchy, Host, Kernel},
    ledger::Attribution,
    libraries::Skip,
    lock::lock,
    page,
    pods::{
        Pods, Source,
        cgroups::{self, Bell},
    },
    server::Site,
    signals::{Scope, State, running::Running},
    web::Web,
};

/// The metrics of the exporter itself.
pub const DESCS: &[&Desc] = &[
    &SIGNAL_STATE,
    &HOOK_INFO,
    &LOST_EVENTS,
    &ATTRIBUTION,
    &PROGRAM_RUNS,
    &PROGRAM_RUN_SECONDS,
    &SCRAPE_SECONDS,
    &READING_AGE,
    &LIBRARIES_SKIPPED,
    &SERIES,
    &BUILD_INFO,
    &PODS_AGE,
    &WEB_CONFIG,
];

pub(crate) static SIGNAL_STATE: Desc = Desc {
    name: "chandra_signal_state",
    kind: Kind::Gauge,
    help: "1 for the state that the signal is in, 0 for the others.",
    per_pod: false,
    labels: &["signal", "state"],
    values: &[("state", &["up", "absent", "disabled", "failed"])],
    source: "what came of attaching it; absent: this host has no such thing",
};

static HOOK_INFO: Desc = Desc {
    name: "chandra_hook_info",
    kind: Kind::Gauge,
    help: "1 for each hook of a signal, and for the exporter's watch of cgroups, with how it is attached or why it is not.",
    per_pod: false,
    labels: &["signal", "hook", "method", "reason"],
    values: &[("method", &Method::LABELS), ("reason", &Reason::LABELS)],
    source: "what came of attaching it; the page / has the sentence",
};

pub(crate) static LOST_EVENTS: Desc = Desc {
    name: "chandra_lost_events_total",
    kind: Kind::Counter,
    help: "Events that a signal saw and could not count.",
    per_pod: false,
    labels: &["signal", "reason"],
    values: &[(
        "reason",
        &[
            "map_full",
            "unreadable",
            "missed_return",
            "untimed",
            "missed_switch",
            "recursion",
            "read_failed",
        ],
    )],
    source: "the map LOST of each object (missed_return: the kernel had no room to trace a return); recursion: recursion_misses of its programs; read_failed: scrapes whose map read failed",
};

pub(crate) static ATTRIBUTION: Desc = Desc {
    name: "chandra_attribution_total",
    kind: Kind::Counter,
    help: "Units that a signal counted, by how their owner was found.",
    per_pod: false,
    labels: &["signal", "result"],
    values: &[("result", &["pod", "host", "unknown"])],
    source: "the ledger; unknown units are in pod=\"unknown\"",
};

static PROGRAM_RUNS: Desc = Desc {
    name: "chandra_program_runs_total",
    kind: Kind::Counter,
    help: "Runs of an eBPF program.",
    per_pod: false,
    labels: &["signal", "program"],
    values: &[],
    source: "run_cnt of the program, only while the host keeps bpf statistics (kernel.bpf_stats_enabled=1)",
};

static PROGRAM_RUN_SECONDS: Desc = Desc {
    name: "chandra_program_run_seconds_total",
    kind: Kind::Counter,
    help: "Seconds that an eBPF program ran.",
    per_pod: false,
    labels: &["signal", "program"],
    values: &[],
    source: "run_time_ns of the program, only while the host keeps bpf statistics (kernel.bpf_stats_enabled=1)",
};

static SCRAPE_SECONDS: Desc = Desc {
    name: "chandra_scrape_seconds",
    kind: Kind::Gauge,
    help: "Seconds that reading and rendering a signal took in this scrape.",
    per_pod: false,
    labels: &["signal"],
    values: &[],
    source: "the exporter's clock",
};

static READING_AGE: Desc = Desc {
    name: "chandra_reading_age_seconds",
    kind: Kind::Gauge,
    help: "Seconds since what a signal shows was read.",
    per_pod: false,
    labels: &["signal"],
    values: &[],
    source: "0 unless the signal's maps were held by who attaches to what has come, or could not be read; absent before the first reading",
};

static LIBRARIES_SKIPPED: Desc = Desc {
    name: "chandra_libraries_skipped_total",
    kind: Kind::Counter,
    help: "Files of processes, or parts of them, that were not looked at.",
    per_pod: false,
    labels: &["signal", "reason"],
    values: &[("reason", &Skip::LABELS)],
    source: "the bounds on what a container's files may cost (docs/security.md); counted at each attempt; the page / names the files",
};

static SERIES: Desc = Desc {
    name: "chandra_series",
    kind: Kind::Gauge,
    help: "Series of a signal in this scrape.",
    per_pod: false,
    labels: &["signal"],
    values: &[],
    source: "counted while rendering",
};

pub(crate) static BUILD_INFO: Desc = Desc {
    name: "chandra_build_info",
    kind: Kind::Gauge,
    help: "1, with the version of this exporter.",
    per_pod: false,
    labels: &["version"],
    values: &[],
    source: "Cargo.toml",
};

static PODS_AGE: Desc = Desc {
    name: "chandra_pods_age_seconds",
    kind: Kind::Gauge,
    help: "Seconds since the source of pod names last answered, or since the start if it never did.",
    per_pod: false,
    labels: &[],
    values: &[],
    source: "--pods; absent with --pods none",
};

static WEB_CONFIG: Desc = Desc {
    name: "chandra_web_config_last_reload_successful",
    kind: Kind::Gauge,
    help: "1 if --web.config.file and its certificates could be used when they last changed; 0 if what was read before is in force.",
    per_pod: false,
    labels: &[],
    values: &[],
    source: "--web.config.file; absent without it",
};

/// Everything that is served.
pub struct Exporter {
    signals: Mutex<Vec<Running>>,
    pods: Arc<Pods>,
    web: Arc<Web>,
    bell: Option<Bell>,
    host: Host,
    hierarchy: Hierarchy,
    /// What was last found of pods that are not in the hierarchy, for how many, and when.
    misplaced: Mutex<Option<Misplaced>>,
    source: Source,
    retention: Duration,
    started: Instant,
    show_paths: bool,
    /// Whether the first reading is done.
    read: AtomicBool,
}

impl std::fmt::Debug for Exporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exporter")
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl Exporter {
    /// Puts the parts together.
    pub fn new(
        signals: Vec<Running>,
        pods: Arc<Pods>,
        web: Arc<Web>,
        bell: Option<Bell>,
        kernel: &Kernel,
        hierarchy: &Hierarchy,
        args: &Serve,
    ) -> Self {
        let by_address = signals
            .iter()
            .filter_map(|running| running.signal.as_ref()?.drain());
        for drain in by_address {
            pods.drain_by(&drain);
        }
        Self {
            signals: Mutex::new(signals),
            pods,
            web,
            bell,
            host: Host {
                // A container has another name than its node.
                name: match &args.node_name {
                    Some(name) if !name.is_empty() => name.clone(),
                    _ => uname().nodename().to_string_lossy().into_owned(),
                },
                release: kernel.release.clone(),
                cgroups: hierarchy.trouble(),
            },
            hierarchy: hierarchy.clone(),
            misplaced: Mutex::default(),
            source: args.source(),
            retention: args.retention,
            started: Instant::now(),
            show_paths: args.show_paths,
            read: AtomicBool::new(false),
        }
    }

    fn collect(&self) -> Families {
        let mut families = Families::default();
        families.add(&BUILD_INFO, &[VERSION], 1.0);
        if let Some(successful) = self.web.reloaded() {
            families.add(&WEB_CONFIG, &[], f64::from(u8::from(successful)));
        }
        let now = Instant::now();
        self.pods.expire(now);
        let view = self.pods.view();
        let reason = match &self.hierarchy {
            Hierarchy::V2 { whole: true, .. } if view.misplaced().is_some() => {
                Reason::ContainersElsewhere
            }
            Hierarchy::V2 { whole: true, .. } => Reason::Attached,
            Hierarchy::V2 { whole: false, .. } => Reason::PartOfHierarchy,
            _ => Reason::NoCgroupV2,
        };
        let method = Method::Inotify.label();
        families.add(
            &HOOK_INFO,
            &["exporter", "cgroups", method, reason.label()],
            1.0,
        );
        if self.source != Source::None {
            let age = view
                .age(now)
                .unwrap_or_else(|| now.saturating_duration_since(self.started));
            families.add(&PODS_AGE, &[], age.as_secs_f64());
        }
        let scope = Scope {
            pods: &view,
            now,
            retention: self.retention,
            strangers: Cell::new(false),
        };
        for running in lock(&self.signals).iter_mut() {
            scrape(running, &scope, &mut families);
        }
        if let Some(bell) = self.bell.as_ref().filter(|_| scope.strangers.get()) {
            bell.ring();
        }
        families
    }

    /// What it means that so many pods are not in the hierarchy.
    fn misplaced(&self, pods: usize) -> Option<String> {
        let mut last = lock(&self.misplaced);
        match &*last {
            Some((of, at, told)) if *of == pods && at.elapsed() < MISPLACED_EVERY => told.clone(),
            _ => {
                let told = cgroups::misplaced(&self.hierarchy, pods);
                *last = Some((pods, Instant::now(), told.clone()));
                told
            }
        }
    }
}

/// Of how many pods it was told that they are not in the hierarchy, when, and what.
type Misplaced = (usize, Instant, Option<String>);

/// How old that may be: to find the pods takes a walk.
const MISPLACED_EVERY: Duration = Duration::from_secs(60);

/// Reads a signal and renders what it shows.
fn scrape(running: &mut Running, scope: &Scope<'_>, families: &mut Families) {
    let name = running.entry.name;
    let (begin, before) = (Instant::now(), families.series());
    running.read(scope);
    if let Some(signal) = &running.signal {
        signal.render(families);
        let Attribution { pod, host, unknown } = signal.attribution();
        for (result, units) in [("pod", pod), ("host", host), ("unknown", unknown)] {
            families.add(&ATTRIBUTION, &[name, result], units as f64);
        }
        if let Some(at) = running.read_at {
            let age = scope.now.saturating_duration_since(at);
            families.add(&READING_AGE, &[name], age.as_secs_f64());
        }
        let skipped = running.status.skipped.into_iter().flatten();
        for (reason, count) in Skip::LABELS.iter().zip(skipped) {
            families.add(&LIBRARIES_SKIPPED, &[name, reason], count as f64);
        }
        families.add(&SERIES, &[name], (families.series() - before) as f64);
        families.add(&SCRAPE_SECONDS, &[name], begin.elapsed().as_secs_f64());
    }
    render_health(running, families);
}

/// Renders what has become of a signal, its hooks and its programs.
fn render_health(running: &Running, families: &mut Families) {
    let name = running.entry.name;
    let state = running.state();
    for (each, label) in State::LABELS {
        let is_in = f64::from(u8::from(each == state));
        families.add(&SIGNAL_STATE, &[name, label], is_in);
    }
    for hook in &running.status.hooks {
        let labels = [name, hook.name, hook.method.label(), hook.reason.label()];
        families.add(&HOOK_INFO, &labels, 1.0);
    }
    for (reason, events) in running.lost() {
        families.add(&LOST_EVENTS, &[name, reason], events as f64);
    }
    for (program, runs) in running.health.runs.iter().filter(|(_, runs)| runs.runs > 0) {
        let seconds = runs.nanoseconds as f64 / 1e9;
        families.add(&PROGRAM_RUNS, &[name, program], runs.runs as f64);
        families.add(&PROGRAM_RUN_SECONDS, &[name, program], seconds);
    }
}

impl Site for Exporter {
    fn metrics(&self) -> anyhow::Result<Vec<u8>> {
        let mut page = Vec::new();
        self.collect().encode(&mut page)?;
        self.read.store(true, Ordering::Relaxed);
        Ok(page)
    }

    fn ready(&self) -> Result<(), String> {
        match self.read.load(Ordering::Relaxed) {
            true => Ok(()),
            false => Err("the signals have not been read yet".to_owned()),
        }
    }

    fn landing(&self) -> String {
        let mut host = self.host.clone();
        if host.cgroups.is_none() {
            // To find them takes a walk, for which nobody waits.
            let misplaced = self.pods.view().misplaced();
            host.cgroups = misplaced.and_then(|pods| self.misplaced(pods));
        }
        // In the order of a scrape, or the two would wait for each other.
        let view = self.pods.view();
        let mut signals = lock(&self.signals);
        signals.iter_mut().for_each(Running::follow);
        page::landing(&signals, &view, &host, &self.source, self.show_paths)
    }
}

/// What is served from the first moment: the exporter, as soon as there is one.
#[derive(Debug, Default)]
pub struct Front {
    exporter: OnceLock<Arc<Exporter>>,
}

impl Front {
    /// From here on everything is served.
    pub fn begin(&self, exporter: Arc<Exporter>) {
        // It is called once.
        let _ = self.exporter.set(exporter);
    }
}

impl Site for Front {
    /// Waits for the exporter: a scrape of the first seconds is late, not lost.
    fn metrics(&self) -> anyhow::Result<Vec<u8>> {
        self.exporter.wait().metrics()
    }

    fn ready(&self) -> Result<(), String> {
        match self.exporter.get() {
            Some(exporter) => exporter.ready(),
            None => Err("the signals are being attached".to_owned()),
        }
    }

    fn landing(&self) -> String {
        self.exporter.wait().landing()
    }
}
