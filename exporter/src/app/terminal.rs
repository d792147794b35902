// SPDX-License-Identifier: Apache-2.0
//! What does the command line tell, and with which exit status?

use std::{io::Write, process::ExitCode};

/// The user's mistake: a flag, a file or an address.
pub const USAGE: u8 = 2;

/// Prints to standard output; a reader that has gone (`| head`) is no error.
pub fn print(text: &str) -> ExitCode {
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

/// Ends with a status, and one line that says why.
pub fn refuse(code: u8, why: &dyn std::fmt::Display) -> ExitCode {
    // One line that no terminal acts on, whatever a file is called or a server answers.
    let why = why.to_string().replace(char::is_control, " ");
    let _ = writeln!(std::io::stderr(), "chandra: {why}");
    ExitCode::from(code)
}

/// Tells what is wrong with the flags, or what was asked of them.
pub fn refuse_flags(error: &clap::Error) -> ExitCode {
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
