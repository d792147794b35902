// SPDX-License-Identifier: Apache-2.0
//! What has the object counted, and what is left of calls that were not seen to return?

use std::time::{Duration, Instant};

use aya::maps::{self, MapData};
use exporter_common::rdma::{Call, CallKey, Resolving, ResolvingKey, Usage};

use super::{
    SLOTS,
    host::{DeviceTotals, Owners},
};
use crate::{
    hook::Program,
    probe::Attached,
    signals::{entries, monotonic},
};

/// Totals of the kernel half at one time.
#[derive(Debug, Default)]
pub(super) struct Reading {
    pub(super) usage: Vec<(u64, [u64; SLOTS])>,
    pub(super) devices: Vec<DeviceTotals>,
}

/// The object at work.
pub(super) struct Live {
    pub(super) attached: Attached,
    pub(super) programs: Vec<Program>,
    pub(super) usage: maps::HashMap<MapData, u64, Usage>,
    calls: maps::HashMap<MapData, CallKey, Call>,
    resolving: maps::HashMap<MapData, ResolvingKey, Resolving>,
    swept: Instant,
}

impl Live {
    pub(super) fn new(mut attached: Attached, programs: Vec<Program>) -> anyhow::Result<Self> {
        Ok(Self {
            usage: attached.map("USAGE")?,
            calls: attached.map("CALLS")?,
            resolving: attached.map("RESOLVING")?,
            attached,
            programs,
            swept: Instant::now(),
        })
    }

    pub(super) fn reading(&self, owners: &Owners) -> anyhow::Result<Reading> {
        let usage = entries(&self.usage)?.into_iter();
        Ok(Reading {
            usage: usage.map(|(cgroup, usage)| (cgroup, usage.slots)).collect(),
            devices: owners.devices()?,
        })
    }

    /// Removes calls whose return was not seen and ids that were never answered, now and then. Returns how many.
    pub(super) fn sweep(&mut self) -> u64 {
        if self.swept.elapsed() < SWEEP_EVERY {
            return 0;
        }
        self.swept = Instant::now();
        let now = monotonic();
        let old = |since: u64| now.saturating_sub(since) > SWEEP_AFTER.as_nanos() as u64;
        let calls = self.calls.iter().filter_map(Result::ok);
        let calls: Vec<_> = calls.filter(|(_, call)| old(call.entered)).collect();
        let mut swept = 0;
        for (key, _) in calls {
            swept += u64::from(self.calls.remove(&key).is_ok());
        }
        let resolving = self.resolving.iter().filter_map(Result::ok);
        let resolving: Vec<_> = resolving
            .filter(|(_, resolving)| old(resolving.started))
            .collect();
        for (key, _) in resolving {
            swept += u64::from(self.resolving.remove(&key).is_ok());
        }
        swept
    }
}

/// A resolution's longest time-out is some seconds, and so is the longest call.
const SWEEP_AFTER: Duration = Duration::from_secs(600);

/// How often the leftovers are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(60);
