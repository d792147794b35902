// SPDX-License-Identifier: Apache-2.0
//! Incidents replayed on a real kernel, from their cause to the on-call's webhook: `make scenario NAME=loss`.
//!
//! A scenario is one file: topology, healthy phase, fault, the alerts that it has to raise. Any other alert fails it.
//! `tools/scenario` runs each in a VM of its own.

#[path = "../../exporter/tests/common/mod.rs"]
mod common;
mod frame;
#[path = "../../mixin/tests/common/http.rs"]
mod http;

mod cpu_contention;
mod encryption_hog;
mod hang;
mod healthy;
mod ipsec_rotation;
mod job_start;
mod loss;
mod qp_churn;
mod qp_errors;
mod rekey_storm;
mod slow_init;
mod straggler;

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
};

use frame::Scenario;

const SCENARIOS: [Scenario; 12] = [
    healthy::SCENARIO,
    loss::SCENARIO,
    qp_churn::SCENARIO,
    qp_errors::SCENARIO,
    job_start::SCENARIO,
    rekey_storm::SCENARIO,
    encryption_hog::SCENARIO,
    ipsec_rotation::SCENARIO,
    cpu_contention::SCENARIO,
    straggler::SCENARIO,
    hang::SCENARIO,
    slow_init::SCENARIO,
];

/// usage: `scenarios --names`, or with `CHANDRA_SCENARIOS` (where to keep what is worth a look) set by `tools/scenario`:
/// `scenarios --render NAME` on the host, which is faster than a VM, then `scenarios NAME` in a VM.
fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    if let ["--names"] = arguments[..] {
        println!("{}", SCENARIOS.map(|scenario| scenario.name).join("\n"));
        return ExitCode::SUCCESS;
    }
    let Some(folder) = env::var_os("CHANDRA_SCENARIOS").map(PathBuf::from) else {
        println!("SKIPPED: scenarios need a VM; make scenario runs them in one");
        return ExitCode::SUCCESS;
    };
    let (act, name): (fn(&Scenario, &Path), _) = match arguments[..] {
        ["--render", name] => (Scenario::render, name),
        [name] => (Scenario::play, name),
        _ => (Scenario::play, ""),
    };
    let Some(scenario) = SCENARIOS.iter().find(|scenario| scenario.name == name) else {
        println!("no such scenario: {arguments:?}");
        return ExitCode::FAILURE;
    };
    act(scenario, &folder);
    ExitCode::SUCCESS
}
