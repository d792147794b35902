// SPDX-License-Identifier: Apache-2.0
//! `chandra-mixin`: what an operator imports, rendered from jsonnet.
#![forbid(unsafe_code)]

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use chandra_mixin::{Failure, render, write};
use clap::{Parser, Subcommand};

/// The user's mistake: a flag, a file or a place to write to.
const USAGE: u8 = 2;

/// Renders Chandra's dashboards, Prometheus rules and Helm values
#[derive(Parser)]
#[command(version, about)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write alerts/, dashboards/, helm-values/ and manifests/, and remove what is not rendered any more
    Render {
        /// Jsonnet that is added to the mixin: `{ _config+:: { window: '1m' } }`
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// The folder to write into
        #[arg(long, value_name = "DIR", default_value = ".")]
        out: PathBuf,
        /// Write nothing; exit with 1 if a file is not what would be written
        #[arg(long)]
        check: bool,
    },
}

fn main() -> ExitCode {
    let Command::Render { config, out, check } = Args::parse().command;
    let done = render::files(config.as_deref()).and_then(|files| match check {
        true => write::differences(&out, &files),
        false => write::write(&out, &files).map(|()| Vec::new()),
    });
    match done {
        Ok(different) if different.is_empty() => ExitCode::SUCCESS,
        Ok(different) => {
            for path in different {
                complain(&format!("{path} is not what the mixin renders"));
            }
            ExitCode::FAILURE
        }
        Err(failure) => {
            complain(&failure.to_string());
            match failure {
                Failure::Io { .. } | Failure::Jsonnet(_) | Failure::Config(_) => {
                    ExitCode::from(USAGE)
                }
                Failure::Yaml(_) => ExitCode::FAILURE,
            }
        }
    }
}

fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "chandra-mixin: {message}");
}
