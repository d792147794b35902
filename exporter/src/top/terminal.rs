// SPDX-License-Identifier: Apache-2.0
//! The terminal: keys and pages in, the screen out, and everything as it was at the end.

use std::{
    io,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use ratatui::{
    DefaultTerminal,
    crossterm::{
        event::{self, Event, KeyEventKind},
        execute,
        terminal::{Clear, ClearType},
    },
};
use rustix::process::{Signal, kill_current_process_group};
use tokio::{
    select,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{interval, sleep},
};

use super::{
    reading::Reading,
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
pub(super) async fn run(source: Source, every: Duration) -> anyhow::Result<ExitCode> {
    let ended = match take() {
        Ok(terminal) => watch(terminal, source, every).await,
        Err(error) => Err(error),
    };
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

/// Takes the terminal; where it has no second screen, what stood there is cleared.
fn take() -> anyhow::Result<DefaultTerminal> {
    let terminal = ratatui::try_init().context("take the terminal")?;
    // Terminal::clear asks the terminal where its cursor is, and the answer would be taken for keys.
    execute!(io::stdout(), Clear(ClearType::All)).context("clear the terminal")?;
    Ok(terminal)
}

/// Gives the terminal back with its cursor.
fn give_back(mut terminal: DefaultTerminal) -> anyhow::Result<()> {
    terminal.show_cursor().context("show the cursor")?;
    ratatui::try_restore().context("give the terminal back")
}

async fn watch(
    mut terminal: DefaultTerminal,
    source: Source,
    every: Duration,
) -> anyhow::Result<End> {
    let mut screen = Screen::new(source.to_string(), every);
    let mut readings = readings(source, every);
    let mut events = events()?;
    let mut seconds = interval(Duration::from_secs(1));
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    loop {
        terminal
            .draw(|frame| screen::draw(frame, &mut screen))
            .context("draw on the terminal")?;
        let wish = loop {
            break select! {
                _ = hang_up.recv() => return Ok(End::Signal(1, "SIGHUP: the terminal is gone")),
                _ = terminate.recv() => return Ok(End::Signal(15, "SIGTERM")),
                _ = interrupt.recv() => return Ok(End::Signal(2, "SIGINT")),
                Some(reading) = readings.recv() => {
                    screen.take(reading)?;
                    Wish::Draw
                }
                event = events.recv() => match event {
                    Some(Ok(Event::Key(key))) if key.kind != KeyEventKind::Release => screen.key(key),
                    Some(Ok(_)) => Wish::Draw,
                    Some(Err(error)) => return Err(error).context("read keys from the terminal"),
                    None => bail!("the terminal is gone"),
                },
                // How old everything is goes on without a reading.
                _ = seconds.tick() => match screen.stale() {
                    Some(_) => Wish::Draw,
                    None => continue,
                },
            };
        };
        match wish {
            Wish::Draw => {}
            Wish::Quit => return Ok(End::Key),
            Wish::Suspend => {
                give_back(terminal)?;
                // As the terminal itself would: a script around this stops as well.
                kill_current_process_group(Signal::TSTP).context("stop for the shell")?;
                terminal = take()?;
            }
        }
    }
}

/// Keys, read by a thread of their own: to read from a terminal that has gone may never end.
fn events() -> anyhow::Result<mpsc::Receiver<io::Result<Event>>> {
    let (sender, receiver) = mpsc::channel(16);
    let read = move || {
        loop {
            let event = event::read();
            let is_last = event.is_err();
            if sender.blocking_send(event).is_err() || is_last {
                return;
            }
        }
    };
    let thread = thread::Builder::new().name("keys".to_owned()).spawn(read);
    thread.context("start the thread that reads keys")?;
    Ok(receiver)
}

/// Asks for a page again and again; the next not before the last has come.
fn readings(source: Source, every: Duration) -> mpsc::Receiver<anyhow::Result<Reading>> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let at = Instant::now();
            let reading = source.reading().await;
            if sender.send(reading).await.is_err() {
                return;
            }
            sleep(every.saturating_sub(at.elapsed())).await;
        }
    });
    receiver
}
