// SPDX-License-Identifier: Apache-2.0
//! What does the kernel tell of programs at work, and what have they lost?

use std::{
    collections::BTreeMap,
    ops::AddAssign,
    os::fd::{AsRawFd, OwnedFd},
};

use aya::maps::{Array, MapData};
use exporter_common::Loss;

use crate::losses::Losses;

/// What the kernel tells of an object: its losses and runs. Reading them needs nothing of who attaches and detaches.
pub struct Counters {
    lost: Array<MapData, u64>,
    programs: Vec<(String, OwnedFd)>,
}

/// What the kernel says of one loaded program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Runs {
    /// How often it ran, where the host keeps bpf statistics (`kernel.bpf_stats_enabled`).
    pub runs: u64,
    /// Nanoseconds that it ran, likewise.
    pub nanoseconds: u64,
    /// Events that the kernel did not hand to it because it, or for kprobes any other, was running already (5.12+; for
    /// kprobes from about 6.7).
    pub missed: u64,
}

/// The runs of programs, by name.
pub type ProgramRuns = BTreeMap<String, Runs>;

impl AddAssign for Runs {
    fn add_assign(&mut self, other: Self) {
        self.runs += other.runs;
        self.nanoseconds += other.nanoseconds;
        self.missed += other.missed;
    }
}

/// What a kernel half tells of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Events that it could not count.
    pub losses: Losses,
    /// The kernel's own account of its programs.
    pub runs: ProgramRuns,
}

/// Of another object, or of another load of the same.
impl AddAssign for Health {
    fn add_assign(&mut self, other: Self) {
        self.losses += other.losses;
        for (program, runs) in other.runs {
            *self.runs.entry(program).or_default() += runs;
        }
    }
}

impl Counters {
    pub(super) fn new(lost: Array<MapData, u64>) -> Self {
        Self {
            lost,
            programs: Vec::new(),
        }
    }

    /// Knows the programs that are loaded.
    pub(super) fn keep(&mut self, programs: Vec<(String, OwnedFd)>) {
        self.programs = programs;
    }

    /// What the object tells of itself.
    ///
    /// # Errors
    /// When the map of losses cannot be read.
    pub fn health(&self) -> anyhow::Result<Health> {
        let mut losses = Losses::default();
        for (loss, _) in Loss::LABELS {
            losses[loss] = self.lost.get(&(loss as u32), 0)?;
        }
        let runs = self.runs();
        Ok(Health { losses, runs })
    }

    /// The kernel's own account of each loaded program, from its fdinfo.
    fn runs(&self) -> ProgramRuns {
        let runs = |fd: &OwnedFd| {
            let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
            Some(parse_fdinfo(&std::fs::read_to_string(path).ok()?))
        };
        let programs = self.programs.iter();
        programs
            .filter_map(|(name, fd)| Some((name.clone(), runs(fd)?)))
            .collect()
    }
}

fn parse_fdinfo(text: &str) -> Runs {
    let value = |key: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.and_then(|value| value.trim().parse().ok())
            .unwrap_or_default()
    };
    Runs {
        runs: value("run_cnt"),
        nanoseconds: value("run_time_ns"),
        missed: value("recursion_misses"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_of_old_and_new_kernels_is_read() {
        let old = "pos:\t0\nprog_type:\t26\nrun_time_ns:\t1200\nrun_cnt:\t10\n";
        assert_eq!(
            parse_fdinfo(old),
            Runs {
                runs: 10,
                nanoseconds: 1200,
                missed: 0
            }
        );
        let new = "run_time_ns:\t1\nrun_cnt:\t2\nrecursion_misses:\t3\nverified_insns:\t99\n";
        assert_eq!(
            parse_fdinfo(new),
            Runs {
                runs: 2,
                nanoseconds: 1,
                missed: 3
            }
        );
    }
}
