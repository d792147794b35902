// SPDX-License-Identifier: Apache-2.0
//! A terminal that a test can look at and press keys in: tmux.

#![allow(dead_code, reason = "each test uses what it needs")]

use std::{
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

use super::common::{run, skip, succeeds};

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// A shell in a tmux server of its own.
pub(crate) struct Tmux {
    socket: String,
}

impl Tmux {
    /// A terminal of so many columns and lines; none where there is no tmux.
    pub(crate) fn start(columns: u32, lines: u32) -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        if !succeeds("command -v tmux") {
            skip("tmux is missing: apt-get install tmux");
            return None;
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let socket = format!("chandra-test-{}-{number}", std::process::id());
        let tmux = Self { socket };
        // A shell with jobs, and nothing of the user's.
        tmux.tmux(&format!(
            "-f /dev/null -u new-session -d -x {columns} -y {lines} 'env PS1=ready: bash --norc --noprofile'"
        ));
        tmux.until("the shell", |screen| screen.contains("ready:"));
        Some(tmux)
    }

    fn tmux(&self, arguments: &str) -> String {
        run(&format!("tmux -L {} {arguments}", self.socket))
    }

    /// Types a line.
    pub(crate) fn line(&self, line: &str) {
        self.tmux(&format!("send-keys -l '{line}'"));
        self.tmux("send-keys Enter");
    }

    /// Starts what the other calls are about; when it ends, its status and whether the terminal is as it was are shown.
    pub(crate) fn run(&self, command: &str) {
        self.line("before=$(stty -g)");
        self.line(&format!(
            "{command}; echo status $?; [ \"$before\" = \"$(stty -g)\" ] && echo as it was"
        ));
    }

    /// Presses keys, by tmux's names.
    pub(crate) fn keys(&self, keys: &[&str]) {
        for key in keys {
            self.tmux(&format!("send-keys '{key}'"));
        }
    }

    /// What is on the screen.
    pub(crate) fn screen(&self) -> String {
        let screen = self.tmux("capture-pane -p");
        format!("{}\n", screen.trim_end())
    }

    /// Waits until the screen shows something.
    pub(crate) fn until(&self, what: &str, holds: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            let screen = self.screen();
            if holds(&screen) {
                return screen;
            }
            assert!(Instant::now() < end, "waited in vain for {what}:\n{screen}");
            sleep(Duration::from_millis(100));
        }
    }

    /// Makes the terminal as large.
    pub(crate) fn resize(&self, columns: u32, lines: u32) {
        self.tmux(&format!("resize-window -x {columns} -y {lines}"));
    }

    /// Tells the program that its terminal has no column and no line.
    pub(crate) fn nothing(&self) {
        let tty = self.tmux("display-message -p '#{pane_tty}'");
        run(&format!("stty -F {} rows 0 cols 0", tty.trim()));
        // Until it has drawn that.
        sleep(Duration::from_secs(1));
    }

    /// The program's process.
    pub(crate) fn pid(&self) -> String {
        let shell = self.tmux("display-message -p '#{pane_pid}'");
        run(&format!("pgrep -P {}", shell.trim())).trim().to_owned()
    }

    /// Sends the program a signal.
    pub(crate) fn signal(&self, signal: &str) {
        run(&format!("kill -{signal} {}", self.pid()));
    }

    /// Holds that the program ends with a status and at most one line that begins so, and leaves the terminal as it was.
    pub(crate) fn ended(&self, status: i32, said: &str) {
        let screen = self.until("its end", |screen| {
            screen.contains("\nstatus ") && screen.ends_with("ready:\n")
        });
        let begin = |what: &str| screen.lines().filter(|line| line.starts_with(what)).count();
        // What was there before is there again, and behind it one line.
        assert!(screen.contains("before=$(stty -g)"), "{screen}");
        assert_eq!(begin("as it was"), 1, "{screen}");
        assert_eq!(begin(&format!("status {status}")), 1, "{screen}");
        assert_eq!(
            begin("chandra: "),
            usize::from(!said.is_empty()),
            "{screen}"
        );
        assert!(screen.contains(said), "{screen}");
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        let _ = Command::new("tmux")
            .args(["-L", &self.socket, "kill-server"])
            .output();
    }
}

/// Waits until a process is no more.
pub(crate) fn until_gone(pid: String) {
    let end = Instant::now() + LIMIT;
    while succeeds(&format!("kill -0 {pid} 2>/dev/null")) {
        assert!(Instant::now() < end, "{pid} is still there");
        sleep(Duration::from_millis(100));
    }
}
