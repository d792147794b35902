// SPDX-License-Identifier: Apache-2.0
//! The terminal: keys and pages in, the screen out, and everything as it was at the end.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use crossterm::event::{Event, EventStream, KeyEventKind};
use futures::StreamExt;
use ratatui::DefaultTerminal;
use rustix::process::{Signal, getpid, kill_process};
use tokio::{
    select,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::sleep,
};

use super::{
    screen,
    source::Source,
    state::{Screen, Wish},
};

/// How it ended.
enum End {
    /// By a key.
    Key,
    /// By a signal of this number and name.
    Signal(u8, &'static str),
}

/// Shows the node until a key, a signal or a fault ends it. The terminal is then as it was before.
///
/// # Errors
/// When the terminal or the exporter is gone.
pub(super) async fn run(source: Source, interval: Duration) -> anyhow::Result<ExitCode> {
    let terminal = ratatui::try_init().context("take the terminal")?;
    let ended = watch(terminal, source, interval).await;
    // Of a terminal that has gone nothing can be restored.
    let _ = ratatui::try_restore();
    match ended? {
        End::Key => Ok(ExitCode::SUCCESS),
        End::Signal(number, name) => Ok(crate::app::terminal::refuse(
            128 + number,
            &format!("top was ended by {name}"),
        )),
    }
}

async fn watch(
    mut terminal: DefaultTerminal,
    source: Source,
    interval: Duration,
) -> anyhow::Result<End> {
    let mut screen = Screen::new(source.to_string());
    let mut pages = pages(source, interval);
    let mut keys = EventStream::new();
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    loop {
        terminal
            .draw(|frame| screen::draw(frame, &mut screen))
            .context("draw on the terminal")?;
        let wish = select! {
            _ = hang_up.recv() => return Ok(End::Signal(1, "SIGHUP: the terminal is gone")),
            _ = terminate.recv() => return Ok(End::Signal(15, "SIGTERM")),
            _ = interrupt.recv() => return Ok(End::Signal(2, "SIGINT")),
            Some((at, page)) = pages.recv() => {
                screen.take(page, at)?;
                Wish::Draw
            }
            event = keys.next() => match event {
                Some(Ok(Event::Key(key))) if key.kind != KeyEventKind::Release => screen.key(key),
                Some(Ok(_)) => Wish::Draw,
                Some(Err(error)) => return Err(error).context("read keys from the terminal"),
                None => bail!("the terminal is gone"),
            },
        };
        match wish {
            Wish::Draw => {}
            Wish::Quit => return Ok(End::Key),
            Wish::Suspend => {
                ratatui::try_restore().context("give the terminal back")?;
                kill_process(getpid(), Signal::TSTP).context("stop for the shell")?;
                terminal = ratatui::try_init().context("take the terminal again")?;
            }
        }
    }
}

/// Asks for a page again and again; the next not before the last has come.
fn pages(source: Source, interval: Duration) -> mpsc::Receiver<(Instant, anyhow::Result<String>)> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let at = Instant::now();
            let page = source.page().await;
            if sender.send((at, page)).await.is_err() {
                return;
            }
            sleep(interval.saturating_sub(at.elapsed())).await;
        }
    });
    receiver
}
