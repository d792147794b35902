// SPDX-License-Identifier: Apache-2.0
//! The life of the program: flags → kernel → pods → signals → serve → detach.

mod attach;
pub mod process;
pub mod terminal;

use std::{
    io::IsTerminal,
    path::Path,
    pin::pin,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing_subscriber::prelude::*;

use self::terminal::{USAGE, print, refuse};
use crate::{
    args::Serve,
    plugin::{self, Installed},
    pods::{self, Pods, Source},
    scrape::Front,
    server,
    web::Web,
};

/// How often it is looked whether the profiler plugin is where it was put.
const PLUGIN_EVERY: Duration = Duration::from_secs(60);

/// Serves until it is told to stop.
pub fn serve(args: &Serve) -> ExitCode {
    tracing_subscriber::registry()
        .with(
            tracing_subscriber::fmt::layer()
                .with_writer(std::io::stderr)
                .with_target(false)
                .with_ansi(std::io::stderr().is_terminal()),
        )
        .with(args.log.clone())
        .init();
    process::prepare(&args.disable, &args.flags());
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
            tokio::task::spawn_blocking(move || attach::attach(&args, pods, web, &front))
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
    Ok((listener, web, follow_pods(args).await?))
}

/// Attaches the signals for who reads them in this process, without serving them.
///
/// # Errors
/// The user's mistakes about the source of pod names.
pub async fn attach_here(args: &Serve) -> anyhow::Result<Arc<Front>> {
    let pods = follow_pods(args).await?;
    let front = Arc::new(Front::default());
    let (mut args, begun) = (args.clone(), Arc::clone(&front));
    // That is for who compares with a page on which an owner was not: what a reader here takes for 0.
    args.rdma_zero_for = Duration::ZERO;
    let attached = tokio::task::spawn_blocking(move || {
        attach::attach(&args, pods, Arc::new(Web::default()), &begun);
    });
    attached.await.context("attach the signals")?;
    Ok(front)
}

/// Starts the source of pod names. A source that cannot be used at all is the user's to mend; one that does not answer
/// is waited for.
async fn follow_pods(args: &Serve) -> anyhow::Result<Arc<Pods>> {
    let source = args.source();
    let pods = Arc::new(Pods::new(&source, args.retention));
    match &source {
        Source::None => {}
        Source::File(path) => {
            let records = pods::file::read(path).map_err(|error| {
                anyhow!("{error}; --pods takes a file with a PodList in JSON, kube or none")
            })?;
            pods.pods_listed(records, Instant::now());
            tokio::spawn(pods::file::watch(Arc::clone(&pods), path.clone()));
        }
        Source::Kube => {
            let node = args.node_name.clone().filter(|name| !name.is_empty());
            let node = node.context("--pods kube needs the node's name: set NODE_NAME from spec.nodeName, or --node-name")?;
            let client = pods::kube::client().await?;
            tokio::spawn(pods::kube::watch(Arc::clone(&pods), client, node));
        }
    }
    Ok(pods)
}

/// Installs the NCCL profiler plugin; with `keep` again and again until it is told to end.
///
/// # Errors
/// When it cannot be installed, or no longer.
pub fn install_plugin(from: &Path, folder: &Path, keep: bool) -> anyhow::Result<()> {
    let tell = |installed: &Installed| match installed {
        Installed::New(place) => print(&format!("{} is new\n", place.display())),
        Installed::Same(place) => print(&format!("{} is there\n", place.display())),
    };
    tell(&plugin::install(from, folder)?);
    if !keep {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        // A container's first process is ended by no signal that it does not ask for.
        let mut stop = pin!(told_to_stop()?);
        loop {
            tokio::select! {
                () = &mut stop => return Ok(()),
                () = tokio::time::sleep(PLUGIN_EVERY) => {}
            }
            let installed = plugin::install(from, folder)?;
            if let Installed::New(_) = installed {
                tell(&installed);
            }
        }
    })
}
