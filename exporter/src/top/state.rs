// SPDX-License-Identifier: Apache-2.0
//! What is on the screen, and what do keys change?

use std::time::{Duration, Instant};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::{
    columns::Column,
    detail::Detail,
    history::History,
    node::{Node, Row},
    reading::{Owner, Reading},
};

/// How long an exporter may be silent: one that is started again is back by then.
const SILENCE: Duration = Duration::from_secs(10);

/// How old the newest reading may be without a word, besides the interval.
const FRESH: Duration = Duration::from_secs(3);

/// The longest filter.
const FILTER: usize = 64;

/// What a key asks of the terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    Draw,
    Quit,
    Suspend,
}

/// Everything on the screen.
#[derive(Debug)]
pub(super) struct Screen {
    pub(super) source: String,
    interval: Duration,
    history: History,
    pub(super) node: Option<Node>,
    /// Why the last page could not be had, and since when none could.
    pub(super) silence: Option<(String, Instant)>,
    pub(super) sort: Column,
    pub(super) filter: String,
    pub(super) is_filtering: bool,
    pub(super) is_paused: bool,
    pub(super) help: bool,
    pub(super) detail: Option<Detail>,
    pub(super) selected: Option<Owner>,
    /// The first row, or the first line of a detail, that is shown.
    pub(super) offset: usize,
    /// Rows that the screen had room for.
    pub(super) room: usize,
}

impl Screen {
    pub(super) fn new(source: String, interval: Duration) -> Self {
        Self {
            source,
            interval,
            history: History::default(),
            node: None,
            silence: None,
            sort: Column::Pod,
            filter: String::new(),
            is_filtering: false,
            is_paused: false,
            help: false,
            detail: None,
            selected: None,
            offset: 0,
            room: 1,
        }
    }

    /// How old the newest reading is, where it is older than it should be.
    pub(super) fn stale(&self) -> Option<Duration> {
        let age = self.history.newest()?.elapsed();
        (age > self.interval + FRESH).then_some(age)
    }

    /// Takes a reading, or why there is none.
    ///
    /// # Errors
    /// When there has been none for too long, unless the screen is held still.
    pub(super) fn take(&mut self, reading: anyhow::Result<Reading>) -> anyhow::Result<()> {
        match reading {
            Ok(reading) => {
                self.silence = None;
                self.history.push(reading);
                if !self.is_paused {
                    self.node = Node::of(&self.history).or_else(|| self.node.take());
                }
            }
            Err(error) => {
                let first = self.silence.as_ref();
                let since = first.map_or_else(Instant::now, |(_, since)| *since);
                let silent = since.elapsed();
                if silent >= SILENCE && !self.is_paused {
                    return Err(error.context(format!(
                        "{} has not answered for {} s",
                        self.source,
                        silent.as_secs()
                    )));
                }
                self.silence = Some((format!("{error:#}"), since));
            }
        }
        Ok(())
    }

    /// The rows that the filter leaves, sorted.
    pub(super) fn rows(&self) -> Vec<&Row> {
        let rows = self.node.iter().flat_map(|node| &node.pods);
        let filter = self.filter.to_lowercase();
        let mut rows: Vec<_> = rows
            .filter(|row| filter.is_empty() || row.owner.name().to_lowercase().contains(&filter))
            .collect();
        // They are sorted by what hurts; that stays so among equals.
        if self.sort != Column::Pod {
            let value = |row: &Row| self.sort.value(row).unwrap_or(-1.0);
            rows.sort_by(|a, b| value(b).total_cmp(&value(a)));
        }
        rows
    }

    /// Where the selected row is among these; the first, if it is gone.
    pub(super) fn position(&self, rows: &[&Row]) -> usize {
        let selected = self.selected.as_ref();
        let found = rows.iter().position(|row| Some(&row.owner) == selected);
        found.unwrap_or(0)
    }

    /// Does what a key stands for.
    pub(super) fn key(&mut self, key: KeyEvent) -> Wish {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return match key.code {
                KeyCode::Char('c') => Wish::Quit,
                KeyCode::Char('z') => Wish::Suspend,
                _ => Wish::Draw,
            };
        }
        if self.is_filtering {
            self.edit(key.code);
            return Wish::Draw;
        }
        match key.code {
            KeyCode::Char('q') => return Wish::Quit,
            KeyCode::Esc | KeyCode::Backspace if self.help || self.detail.is_some() => self.back(),
            KeyCode::Esc if !self.filter.is_empty() => self.filter.clear(),
            KeyCode::Char('?' | 'h') => {
                self.help = !self.help;
                self.offset = 0;
            }
            KeyCode::Char('/') => {
                self.back();
                self.is_filtering = true;
            }
            KeyCode::Char(' ' | 'p') => self.is_paused = !self.is_paused,
            KeyCode::Char('<') | KeyCode::Left => self.sort_by(-1),
            KeyCode::Char('>') | KeyCode::Right => self.sort_by(1),
            KeyCode::Up | KeyCode::Char('k') => self.go(-1),
            KeyCode::Down | KeyCode::Char('j') => self.go(1),
            KeyCode::PageUp => self.go(-(self.room.min(1 << 20) as isize)),
            KeyCode::PageDown => self.go(self.room.min(1 << 20) as isize),
            KeyCode::Home => self.go(-(1 << 30)),
            KeyCode::End => self.go(1 << 30),
            KeyCode::Enter if self.detail.is_none() => self.open(self.worst()),
            KeyCode::Char(c) => {
                let found = Detail::KEYS.iter().find(|(key, ..)| *key == c);
                if let Some((.., detail)) = found {
                    match self.detail == Some(*detail) {
                        true => self.back(),
                        false => self.open(*detail),
                    }
                }
            }
            _ => {}
        }
        Wish::Draw
    }

    fn edit(&mut self, code: KeyCode) {
        match code {
            KeyCode::Enter => self.is_filtering = false,
            KeyCode::Esc => {
                self.is_filtering = false;
                self.filter.clear();
            }
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Char(c) if self.filter.len() < FILTER => self.filter.push(c),
            _ => {}
        }
    }

    fn back(&mut self) {
        self.help = false;
        self.detail = None;
        self.offset = 0;
    }

    fn open(&mut self, detail: Detail) {
        let rows = self.rows();
        let owner = rows.get(self.position(&rows)).map(|row| row.owner.clone());
        self.selected = owner;
        self.help = false;
        self.detail = Some(detail);
        self.offset = 0;
    }

    /// The signal by which the selected pod hurts most.
    fn worst(&self) -> Detail {
        let rows = self.rows();
        let owner = rows.get(self.position(&rows)).map(|row| &row.owner);
        let complaints = self.node.iter().flat_map(|node| &node.complaints);
        let of_pod = complaints.filter(|one| one.owner.as_ref() == owner);
        let worst = of_pod.max_by(|a, b| a.ratio.total_cmp(&b.ratio));
        let signal = worst.map_or("tcp", |one| &*one.signal);
        let found = Detail::KEYS.iter().find(|(_, name, _)| *name == signal);
        found.map_or(Detail::Tcp, |(.., detail)| *detail)
    }

    fn sort_by(&mut self, step: isize) {
        let columns = Column::ALL;
        let at = columns.iter().position(|column| *column == self.sort);
        let at = at.unwrap_or(0).saturating_add_signed(step);
        self.sort = columns[at.min(columns.len() - 1)];
    }

    fn go(&mut self, by: isize) {
        if self.help || self.detail.is_some() {
            self.offset = self.offset.saturating_add_signed(by);
            return;
        }
        let rows = self.rows();
        let at = self.position(&rows).saturating_add_signed(by);
        let owner = rows.get(at.min(rows.len().saturating_sub(1)));
        self.selected = owner.map(|row| row.owner.clone());
    }
}
