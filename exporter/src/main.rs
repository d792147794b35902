// SPDX-License-Identifier: Apache-2.0
//! `chandra`: flags → kernel → pods → signals → serve → detach.
#![forbid(unsafe_code)]

use std::{
    env,
    io::{IsTerminal, Write},
    os::unix::process::CommandExt,
    path::Path,
    pin::pin,
    process::{self, ExitCode},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, anyhow};
use chandra::{
    args::{Args, Command, Serve},
    capabilities::{self, CUDA_CALLS, GPU_DEVICE},
    check,
    kernel::{Hierarchy, Kernel},
    libraries::{self, Gate},
    plugin::{self, Installed},
    pods::{self, Pods, Source, cgroups},
    reference, scrape,
    scrape::{Exporter, Front},
    server::{self, Site},
    signals::{Options, SIGNALS, State, encryption, gpu, nccl, rdma},
    web::Web,
};
use clap::Parser;
use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing_subscriber::prelude::*;

/// How often it is looked whether the profiler plugin is where it was put.
const PLUGIN_EVERY: Duration = Duration::from_secs(60);

/// The user's mistake: a flag, a file or an address.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return refuse_flags(&error),
    };
    match args.command {
        Some(Command::Metrics) => print(&reference::markdown()),
        Some(Command::Check {
            json,
            cgroupfs,
            nccl_salt,
        }) => check(json, cgroupfs.as_deref(), nccl_salt.is_some()),
        Some(Command::InstallNcclProfiler { folder, from, keep }) => install(&from, &folder, keep)
            .unwrap_or_else(|error| refuse(USAGE, &format!("{error:#}"))),
        Some(Command::Look) => match libraries::look() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => refuse(USAGE, &format!("{error:#}")),
        },
        None => {
            spare_memory();
            serve(&args.serve)
        }
    }
}

/// Starts this program again, as the same process, with settings of glibc's allocator that it reads only at the start.
///
/// By default glibc keeps an arena of freed memory for each thread that ever parsed a list or rendered a page, twice as
/// much at 1000 pods. A user's own setting is left alone; where the start fails, the exporter runs with more memory.
fn spare_memory() {
    const ARENAS: &str = "MALLOC_ARENA_MAX";
    if env::var_os(ARENAS).is_none()
        && let Ok(program) = env::current_exe()
    {
        let _ = process::Command::new(program)
            .args(env::args_os().skip(1))
            .env(ARENAS, "1")
            .env("MALLOC_TRIM_THRESHOLD_", "131072")
            .env("MALLOC_MMAP_THRESHOLD_", "65536")
            .exec();
    }
}

/// Installs the NCCL profiler plugin; with `keep` again and again until it is told to end.
fn install(from: &Path, folder: &Path, keep: bool) -> anyhow::Result<ExitCode> {
    let tell = |installed: &Installed| match installed {
        Installed::New(place) => print(&format!("{} is new\n", place.display())),
        Installed::Same(place) => print(&format!("{} is there\n", place.display())),
    };
    let code = tell(&plugin::install(from, folder)?);
    if !keep {
        return Ok(code);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        // A container's first process is ended by no signal that it does not ask for.
        let mut stop = pin!(told_to_stop()?);
        loop {
            tokio::select! {
                () = &mut stop => return Ok(code),
                () = tokio::time::sleep(PLUGIN_EVERY) => {}
            }
            let installed = plugin::install(from, folder)?;
            if let Installed::New(_) = installed {
                tell(&installed);
            }
        }
    })
}

/// Prints to standard output; a reader that has gone (`| head`) is no error.
fn print(text: &str) -> ExitCode {
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

fn refuse(code: u8, why: &dyn std::fmt::Display) -> ExitCode {
    // One line, whatever line breaks the name of a file has.
    let why = why.to_string().replace(['\n', '\r'], " ");
    let _ = writeln!(std::io::stderr(), "chandra: {why}");
    ExitCode::from(code)
}

fn refuse_flags(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        return print(&error.render().to_string());
    }
    let text = error.render().to_string();
    // The error and clap's tip, without the usage below them.
    let words = text
        .trim_start_matches("error: ")
        .lines()
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .flat_map(str::split_whitespace);
    let line = words.collect::<Vec<_>>().join(" ");
    refuse(USAGE, &format!("{line} (chandra --help lists the flags)"))
}

fn check(json: bool, cgroupfs: Option<&Path>, is_salted: bool) -> ExitCode {
    allow_locked_memory();
    give_up_privileges(&[], &[CUDA_CALLS, GPU_DEVICE]);
    let report = match check::run(cgroupfs, is_salted) {
        Ok(report) => report,
        Err(error) => return refuse(1, &format!("{error:#}")),
    };
    if json {
        print(&format!(
            "{}\n",
            serde_json::to_string_pretty(&report).expect("a report is plain data")
        ));
    } else {
        print(&check::table(&report));
    }
    ExitCode::from(u8::from(!report.ok))
}

fn serve(args: &Serve) -> ExitCode {
    tracing_subscriber::registry()
        .with(
            tracing_subscriber::fmt::layer()
                .with_writer(std::io::stderr)
                .with_target(false)
                .with_ansi(std::io::stderr().is_terminal()),
        )
        .with(args.log.clone())
        .init();
    allow_locked_memory();
    let flags = [
        (CUDA_CALLS, args.cuda_calls),
        (GPU_DEVICE, !args.gpu_devices.is_empty()),
    ];
    let flags: Vec<_> = flags
        .iter()
        .filter(|flag| flag.1)
        .map(|flag| flag.0)
        .collect();
    give_up_privileges(&args.disable, &flags);
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return refuse(1, &format!("cannot start the runtime: {error}")),
    };
    let code = match runtime.block_on(run(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(error)) => refuse(USAGE, &format!("{error:#}")),
        Err(Failure::Run(error)) => refuse(1, &format!("{error:#}")),
    };
    // A scrape that hangs in the kernel must not hold up the exit; the kernel detaches with the process.
    runtime.shutdown_timeout(Duration::from_millis(200));
    code
}

/// Why the exporter did not run, by who has to mend it.
enum Failure {
    Usage(anyhow::Error),
    Run(anyhow::Error),
}

/// Watches for SIGTERM and SIGINT from this call on; what it returns ends with the first.
fn told_to_stop() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

async fn run(args: &Serve) -> Result<(), Failure> {
    let stop = told_to_stop().map_err(Failure::Run)?;
    let (end, mut ended) = watch::channel(false);
    tokio::spawn(async move {
        stop.await;
        tracing::info!("stopping");
        end.send_replace(true);
    });
    let mut stopped = ended.clone();
    let begun = async {
        let front = Arc::new(Front::default());
        let (listener, web, pods) = begin(args).await.map_err(Failure::Usage)?;
        let serving = format!(
            "{}://{}",
            if web.https() { "https" } else { "http" },
            listener
                .local_addr()
                .map_or(args.listen.clone(), |at| at.to_string())
        );
        let attached = {
            let (args, pods, web) = (args.clone(), Arc::clone(&pods), Arc::clone(&web));
            let front = Arc::clone(&front);
            tokio::task::spawn_blocking(move || prepare(&args, pods, web, &front))
        };
        let attached = async {
            attached.await.context("attach the signals")?;
            tracing::info!("serving on {serving}");
            anyhow::Ok(())
        };
        let stopped = async {
            // The sender lives as long as the process.
            let _ = ended.wait_for(|end| *end).await;
        };
        let limits = server::Limits::default();
        let served = server::serve(listener, front, web, limits, stopped);
        let mut served = pin!(served);
        tokio::select! {
            served = &mut served => return served.map_err(Failure::Run),
            attached = attached => attached.map_err(Failure::Run)?,
        }
        served.await.map_err(Failure::Run)
    };
    let begun = pin!(begun);
    // What waits for others on the way (the API server, a name's addresses) does not keep it from ending; a server ends by itself.
    let patience = async {
        let _ = stopped.wait_for(|end| *end).await;
        tokio::time::sleep(PATIENCE).await;
    };
    tokio::select! {
        ended = begun => ended,
        () = patience => Ok(()),
    }
}

/// How long the server may take to end: longer than it takes by itself.
const PATIENCE: Duration = Duration::from_secs(2);

/// Takes the address and starts the source of pod names. The user's mistakes are found here, before anything is attached.
async fn begin(args: &Serve) -> anyhow::Result<(TcpListener, Arc<Web>, Arc<Pods>)> {
    // An empty name is as good as none: so is `--web.config.file=` to the toolkit.
    let file = args
        .web_config
        .as_deref()
        .filter(|file| !file.as_os_str().is_empty());
    let web = Arc::new(match file {
        Some(file) => Web::load(file)?,
        None => Web::default(),
    });
    let listener = server::bind(&args.listen).await?;
    let source = args.source();
    let pods = Arc::new(Pods::new(&source, args.retention));
    follow_pods(args, &source, &pods).await?;
    Ok((listener, web, pods))
}

/// Starts the source of pod names. A source that cannot be used at all is the user's to mend; one that does not answer
/// is waited for.
async fn follow_pods(args: &Serve, source: &Source, pods: &Arc<Pods>) -> anyhow::Result<()> {
    match source {
        Source::None => {}
        Source::File(path) => {
            let records = pods::file::read(path).map_err(|error| {
                anyhow!("{error}; --pods takes a file with a PodList in JSON, kube or none")
            })?;
            pods.pods_listed(records, std::time::Instant::now());
            tokio::spawn(pods::file::watch(Arc::clone(pods), path.clone()));
        }
        Source::Kube => {
            let node = args.node_name.clone().filter(|name| !name.is_empty());
            let node = node.context("--pods kube needs the node's name: set NODE_NAME from spec.nodeName, or --node-name")?;
            let client = pods::kube::client().await?;
            tokio::spawn(pods::kube::watch(Arc::clone(pods), client, node));
        }
    }
    Ok(())
}

/// Walks the cgroups, attaches the signals and reads them once; from then on everything is served, and processes are looked into.
fn prepare(args: &Serve, pods: Arc<Pods>, web: Arc<Web>, front: &Front) {
    let gate = Arc::new(Gate::default());
    let mut kernel = Kernel::read();
    let mut hierarchy = Hierarchy::of_host(args.cgroupfs.as_deref());
    if let Some(trouble) = hierarchy.trouble() {
        tracing::warn!("{trouble}");
    }
    let bell = follow_cgroups(&mut hierarchy, &pods);
    let signals = scrape::attach(
        &kernel,
        &args.disable,
        Options {
            max_owners: args.max_owners,
            cgroups: match &hierarchy {
                Hierarchy::V2 { root, .. } => Some(root.clone()),
                _ => None,
            },
            rdma: rdma::Settings {
                // What a short job counts is shown before it is forgotten.
                zero_for: args.rdma_zero_for.min(args.retention / 2),
            },
            encryption: encryption::Settings {
                timed_every: args.timed_every,
                vxlan_port: args.vxlan_port,
                geneve_port: args.geneve_port,
            },
            gpu: gpu::Settings {
                devices: args.gpu_devices.clone(),
                calls: args.cuda_calls.then_some(args.cuda_budget),
            },
            nccl: nccl::Settings {
                salt: args.nccl_salt.clone(),
            },
            gate: Arc::clone(&gate),
            show_paths: args.show_paths,
        },
    );
    for running in &signals {
        let (name, state) = (running.entry.name, running.attempt.state);
        tracing::info!("signal {name}: {}", state.label());
        let mut details: Vec<_> = running
            .attempt
            .hooks
            .iter()
            .map(|hook| &hook.detail)
            .collect();
        // What fails the whole object is the detail of every hook.
        details.dedup();
        for detail in details.into_iter().filter(|detail| !detail.is_empty()) {
            if state == State::Failed {
                tracing::error!("signal {name}: {detail}");
            } else {
                tracing::warn!("signal {name}: {detail}");
            }
        }
        for note in &running.attempt.notes {
            tracing::warn!("signal {name} works with less: {note}");
        }
    }
    kernel.forget_types();
    let exporter = Arc::new(Exporter::new(
        signals, pods, web, bell, &kernel, &hierarchy, args,
    ));
    if let Err(error) = exporter.metrics() {
        tracing::error!("the first reading: {error:#}");
    }
    front.begin(exporter);
    gate.open();
}

fn follow_cgroups(hierarchy: &mut Hierarchy, pods: &Arc<Pods>) -> Option<cgroups::Bell> {
    if let Hierarchy::V2 { root, .. } = hierarchy {
        match cgroups::Watcher::new(root.clone(), Arc::clone(pods)) {
            Ok(watcher) => {
                let bell = watcher.bell();
                let thread = thread::Builder::new()
                    .name("cgroups".to_owned())
                    .stack_size(512 << 10);
                match thread.spawn(move || watcher.run()) {
                    Ok(_) => return Some(bell),
                    Err(error) => {
                        tracing::error!("cannot start the thread that follows cgroups: {error}")
                    }
                }
            }
            Err(error) => {
                tracing::error!("{error:#}");
                *hierarchy = Hierarchy::Absent;
            }
        }
    }
    pods.without_cgroups();
    None
}

/// Gives up what no enabled signal needs. Runs while this is the only thread.
fn give_up_privileges(disabled: &[String], flags: &[&str]) {
    let enabled = SIGNALS
        .iter()
        .filter(|entry| !disabled.iter().any(|name| name == entry.name));
    let needs = enabled.flat_map(|entry| entry.needs);
    let kept = capabilities::of(needs.filter(|need| need.applies(flags)));
    if let Err(error) = capabilities::keep_only(kept) {
        tracing::warn!("cannot give up the capabilities that are not needed: {error}");
    }
}

/// Kernels before 5.11 charge maps to RLIMIT_MEMLOCK. Only this process is touched; where it may not, loading says so.
fn allow_locked_memory() {
    let _ = setrlimit(
        Resource::Memlock,
        Rlimit {
            current: None,
            maximum: None,
        },
    );
}
