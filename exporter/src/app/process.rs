// SPDX-License-Identifier: Apache-2.0
//! What does the process take on as it starts, and what does it give up?

use std::{env, os::unix::process::CommandExt, process};

use rustix::process::{Resource, Rlimit, setrlimit};

use crate::{capabilities, signals::SIGNALS};

/// Starts this program again, as the same process, with settings of glibc's allocator that it reads only at the start.
///
/// By default glibc keeps an arena of freed memory for each thread that ever parsed a list or rendered a page, twice as
/// much at 1000 pods. A user's own setting is left alone; where the start fails, the exporter runs with more memory.
pub fn spare_memory() {
    const ARENAS: &str = "MALLOC_ARENA_MAX";
    if env::var_os(ARENAS).is_none()
        && let Ok(program) = env::current_exe()
    {
        let _ = process::Command::new(program)
            .args(env::args_os().skip(1))
            .env(ARENAS, "1")
            .env("MALLOC_TRIM_THRESHOLD_", "131072")
            .env("MALLOC_MMAP_THRESHOLD_", "65536")
            .exec();
    }
}

/// Allows for maps, and gives up what no enabled signal needs. Runs while this is the only thread.
pub fn prepare(disabled: &[String], flags: &[&str]) {
    allow_locked_memory();
    give_up_privileges(disabled, flags);
}

fn give_up_privileges(disabled: &[String], flags: &[&str]) {
    let enabled = SIGNALS
        .iter()
        .filter(|entry| !disabled.iter().any(|name| name == entry.name));
    let needs = enabled.flat_map(|entry| entry.needs);
    let kept = capabilities::of(needs.filter(|need| need.applies(flags)));
    if let Err(error) = capabilities::keep_only(kept) {
        tracing::warn!("cannot give up the capabilities that are not needed: {error}");
    }
}

/// Kernels before 5.11 charge maps to RLIMIT_MEMLOCK. Only this process is touched; where it may not, loading says so.
fn allow_locked_memory() {
    let _ = setrlimit(
        Resource::Memlock,
        Rlimit {
            current: None,
            maximum: None,
        },
    );
}
