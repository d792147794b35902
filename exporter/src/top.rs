// SPDX-License-Identifier: Apache-2.0
//! `chandra top`: which pods of this node hurt, and by what? For whoever has a terminal and no dashboard.
//!
//! page → [`exposition`] → [`reading`] → [`history`] → [`node`] and [`words`] → a screen, a table or JSON.

mod columns;
mod detail;
pub mod exposition;
mod format;
pub mod history;
pub mod node;
pub mod reading;
mod screen;
pub mod source;
mod state;
pub mod table;
mod terminal;
pub mod words;

use std::{
    io::IsTerminal,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use tokio::time::sleep;

use self::{
    history::History,
    node::Node,
    reading::Reading,
    source::{Remote, Source, is_nobody},
};
use crate::{
    app::{
        self, process,
        terminal::{USAGE, print, refuse},
    },
    args::Top,
    kernel::Kernel,
};

/// Shows the node until it is told to end, or once.
pub fn run(args: &Top) -> ExitCode {
    let remote = match Remote::new(&args.url(), &args.login()) {
        Ok(remote) => remote,
        Err(error) => return refuse(USAGE, &format!("{error:#}")),
    };
    // One thread: what the process gives up before it attaches holds for all of it.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return refuse(1, &format!("cannot start the runtime: {error}")),
    };
    let shown = runtime.block_on(show(args, remote));
    // A reading that hangs in the kernel does not hold up the exit.
    runtime.shutdown_timeout(Duration::from_millis(200));
    shown.unwrap_or_else(|error| refuse(1, &format!("{error:#}")))
}

async fn show(args: &Top, remote: Remote) -> anyhow::Result<ExitCode> {
    let source = source(args, remote).await?;
    if args.is_once() {
        return once(args, &source).await;
    }
    terminal::run(source, args.interval).await
}

/// The exporter that answers, or else the signals attached here, unless a certain exporter was asked for.
async fn source(args: &Top, remote: Remote) -> anyhow::Result<Source> {
    let error = match remote.page().await {
        Ok(page) => {
            Reading::of(&page, Instant::now()).with_context(|| remote.to_string())?;
            return Ok(Source::Remote(remote));
        }
        Err(error) => error,
    };
    if args.url.is_some() || !is_nobody(&error) {
        return Err(error.context(format!("{remote} does not tell its metrics")));
    }
    if !Kernel::read().may_trace() {
        bail!(
            "no exporter answers on {remote}, and to attach here takes CAP_BPF and CAP_PERFMON (before 5.8: CAP_SYS_ADMIN): run as root, or name \
             an exporter with --url"
        );
    }
    process::prepare(&args.serve.disable, &args.serve.flags());
    Ok(Source::Here(app::attach_here(&args.serve).await?))
}

/// Two pages, and what was between them.
async fn once(args: &Top, source: &Source) -> anyhow::Result<ExitCode> {
    let mut history = History::default();
    for is_second in [false, true] {
        if is_second {
            sleep(args.interval).await;
        }
        let at = Instant::now();
        let page = source.page().await;
        let page = page.with_context(|| format!("{source} does not tell its metrics"))?;
        history.push(Reading::of(&page, at)?);
    }
    let node = Node::of(&history).ok_or_else(|| anyhow!("no time went by between two pages"))?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&node)? + "\n",
        false => table::table(&node, &source.to_string()),
    };
    Ok(print(&text))
}

/// Whether somebody looks at a screen and can press keys.
pub(crate) fn has_terminal() -> bool {
    let is_dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal() && !is_dumb
}
