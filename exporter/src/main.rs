// SPDX-License-Identifier: Apache-2.0
//! `chandra`: the command line.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use chandra::{
    app::{
        self,
        process::{self, prepare},
        terminal::{USAGE, print, refuse, refuse_flags},
    },
    args::{Args, Command},
    capabilities::{CUDA_CALLS, GPU_DEVICE},
    check, libraries, pods, reference, top,
};
use clap::Parser;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return refuse_flags(&error),
    };
    let done = match args.command {
        Some(Command::Metrics) => return print(&reference::markdown()),
        Some(Command::Check {
            json,
            cgroupfs,
            nccl_salt,
            pods,
        }) => {
            let pods = match pods.as_deref().map(pods::file::read).transpose() {
                Ok(pods) => pods,
                Err(error) => return refuse(USAGE, &format!("{error:#}")),
            };
            let look = check::Look {
                cgroupfs,
                is_salted: nccl_salt.is_some(),
                pods,
            };
            return check(json, look);
        }
        Some(Command::InstallNcclProfiler { folder, from, keep }) => {
            app::install_plugin(&from, &folder, keep)
        }
        Some(Command::Top(args)) => return top::run(&args),
        Some(Command::Look) => libraries::look(),
        None => {
            process::spare_memory();
            return app::serve(&args.serve);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => refuse(USAGE, &format!("{error:#}")),
    }
}

fn check(json: bool, look: check::Look) -> ExitCode {
    prepare(&[], &[CUDA_CALLS, GPU_DEVICE]);
    let report = match check::run(look) {
        Ok(report) => report,
        Err(error) => return refuse(1, &format!("{error:#}")),
    };
    match json {
        true => {
            let text = serde_json::to_string_pretty(&report);
            print(&format!("{}\n", text.expect("a report is plain data")))
        }
        false => print(&check::table(&report)),
    };
    ExitCode::from(u8::from(!report.ok))
}
