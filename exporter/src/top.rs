// SPDX-License-Identifier: Apache-2.0
//! `chandra top`: which pods of this node hurt, and by what? For whoever has a terminal and no dashboard.
//!
//! page → [`exposition`] → [`reading`] → [`history`] → [`node`] and [`words`] → a screen, a table or JSON.

mod columns;
mod detail;
pub mod exposition;
mod format;
mod growth;
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

use anyhow::{Context, bail};
use tokio::{
    runtime::{self, Runtime},
    time::sleep,
};

use self::{
    history::History,
    node::Node,
    reading::Reading,
    source::{FIRST, Remote, Source, is_nobody},
};
use crate::{
    app::{
        self, process,
        terminal::{USAGE, print, refuse},
    },
    args::Top,
    kernel::Kernel,
};

/// Between two looks of `--once`, which finds what comes again and again by them.
const LOOKS: Duration = Duration::from_secs(10);

/// Shows the node until it is told to end, or once.
pub fn run(args: &Top) -> ExitCode {
    let remote = match Remote::new(&args.url(), &args.login()) {
        Ok(remote) => remote,
        Err(error) => return refuse(USAGE, &format!("{error:#}")),
    };
    show(args, remote).unwrap_or_else(|error| refuse(1, &format!("{error:#}")))
}

fn runtime() -> anyhow::Result<Runtime> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("start the runtime")
}

fn show(args: &Top, remote: Remote) -> anyhow::Result<ExitCode> {
    // Its threads end with it: what the process then gives up holds for all of it.
    let answers = runtime()?.block_on(answers(args, &remote))?;
    if !answers {
        process::prepare(&args.serve.disable, &args.serve.flags());
    }
    let runtime = runtime()?;
    let shown = runtime.block_on(async {
        let source = match answers {
            true => Source::Remote(remote),
            false => match app::attach_here(&args.serve).await {
                Ok(front) => Source::Here(front),
                // The file with the pods, or the API server's address.
                Err(error) => return Ok(refuse(USAGE, &format!("{error:#}"))),
            },
        };
        show_from(args, source).await
    });
    // A reading that hangs in the kernel does not hold up the exit.
    runtime.shutdown_timeout(Duration::from_millis(200));
    shown
}

async fn show_from(args: &Top, source: Source) -> anyhow::Result<ExitCode> {
    if args.is_once() {
        return once(args, &source).await;
    }
    terminal::run(source, args.interval).await
}

/// Whether an exporter answers. Where none runs the signals can be attached here, unless a certain exporter was asked for.
async fn answers(args: &Top, remote: &Remote) -> anyhow::Result<bool> {
    let error = match remote.page(FIRST).await {
        Ok(page) => {
            Reading::of(&page, Instant::now()).with_context(|| remote.to_string())?;
            return Ok(true);
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
    Ok(false)
}

/// Looks for so long, and tells what happened.
async fn once(args: &Top, source: &Source) -> anyhow::Result<ExitCode> {
    let mut history = History::over(args.interval);
    let begun = Instant::now();
    let node = loop {
        let reading = source.reading().await;
        history.push(reading.with_context(|| format!("{source} does not tell its metrics"))?);
        let left = args.interval.saturating_sub(begun.elapsed());
        match Node::of(&history).filter(|_| left.is_zero()) {
            Some(node) => break node,
            // The first look may have taken all of the time.
            None if left.is_zero() => sleep(args.interval.min(LOOKS)).await,
            None => sleep(left.min(LOOKS)).await,
        }
    };
    let text = match args.json {
        true => json(&node)? + "\n",
        false => table::table(&node, &source.to_string()),
    };
    Ok(print(&text))
}

/// The node as JSON, in which no character is left that a terminal acts on.
///
/// # Errors
/// None that is known: it is plain data.
pub fn json(node: &Node) -> serde_json::Result<String> {
    let mut text = String::new();
    for c in serde_json::to_string_pretty(node)?.chars() {
        match c {
            // JSON escapes what is below these.
            '\x7f'..='\u{9f}' => text += &format!("\\u{:04x}", u32::from(c)),
            c => text.push(c),
        }
    }
    Ok(text)
}

/// Whether somebody looks at a screen and can press keys.
pub(crate) fn has_terminal() -> bool {
    let is_dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal() && !is_dumb
}
