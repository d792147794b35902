// SPDX-License-Identifier: Apache-2.0
//! What has become of each signal since it was attached?

use std::time::Instant;

use super::{Attempt, Entry, Options, Read, SIGNALS, Scope, Signal, State, Status};
use crate::{kernel::Kernel, probe::Health};

/// A signal and what came of it.
pub struct Running {
    /// What it is.
    pub entry: &'static Entry,
    /// What has become of it.
    pub status: Status,
    /// Itself, where it works or may come to.
    pub signal: Option<Box<dyn Signal>>,
    /// Why the last read failed, if it did.
    pub trouble: Option<String>,
    /// When what it shows was read.
    pub read_at: Option<Instant>,
    /// What its kernel half last told of itself.
    pub health: Health,
    failed_reads: u64,
}

/// Attaches every signal that is not switched off.
pub fn attach(kernel: &Kernel, disabled: &[String], options: &Options) -> Vec<Running> {
    let attach = |entry: &'static Entry| {
        let attempt = if disabled.iter().any(|name| name == entry.name) {
            Attempt::without(State::Disabled)
        } else {
            (entry.attach)(kernel, options)
        };
        Running {
            entry,
            status: attempt.status,
            signal: attempt.signal,
            trouble: None,
            read_at: None,
            health: Health::default(),
            failed_reads: 0,
        }
    };
    SIGNALS.iter().map(attach).collect()
}

impl Running {
    /// The state, the last read included.
    pub fn state(&self) -> State {
        if self.status.state == State::Up && self.trouble.is_some() {
            State::Failed
        } else {
            self.status.state
        }
    }

    /// Events lost so far, by reason; every reason is present.
    pub fn lost(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let missed = self.health.runs.values().map(|runs| runs.missed).sum();
        let besides = [("recursion", missed), ("read_failed", self.failed_reads)];
        self.health.losses.by_label().chain(besides)
    }

    /// Reads the signal. While it cannot tell something, what it last told stands.
    pub(crate) fn read(&mut self, scope: &Scope<'_>) {
        let Some(signal) = &mut self.signal else {
            return;
        };
        match signal.read(scope) {
            Ok(read) => {
                self.trouble = None;
                if read == Read::Now {
                    self.read_at = Some(scope.now);
                }
            }
            Err(error) => {
                let why = format!("{error:#}");
                if self.trouble.as_ref() != Some(&why) {
                    tracing::error!("signal {}: {why}", self.entry.name);
                }
                self.trouble = Some(why);
                self.failed_reads += 1;
            }
        }
        self.follow();
    }

    /// Takes over what a signal tells of itself now.
    pub(crate) fn follow(&mut self) {
        let Some(signal) = &self.signal else {
            return;
        };
        if let Ok(health) = signal.health() {
            self.health = health;
        }
        if let Some(status) = signal.status() {
            self.status = status;
        }
    }
}
