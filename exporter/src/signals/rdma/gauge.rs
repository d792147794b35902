// SPDX-License-Identifier: Apache-2.0
//! How many queue pairs are there now, of which type and in which state?

use std::collections::BTreeMap;

use exporter_common::rdma::STATES;

use super::{
    devices::Devices,
    enumeration::{PairOwner, Report},
    metrics::{STRANGE, TYPES, render_gauge},
};
use crate::{
    families::Families,
    ledger::Shown,
    pods::{Labels, Resolution},
    signals::Scope,
};

/// A row: labels, device, type and state.
type Row = (Labels, String, &'static str, &'static str);

/// The queue pairs that were last enumerated.
#[derive(Debug, Default)]
pub(super) struct Gauge {
    rows: BTreeMap<Row, u64>,
    /// Seconds since the enumeration began, and whether it was a part, by device.
    ages: Vec<(String, f64, bool)>,
}

impl Gauge {
    /// Counts what was reported, for `max_owners` owners at most.
    pub(super) fn count(
        &mut self,
        reports: Vec<Report>,
        devices: &mut Devices,
        max_owners: usize,
        scope: &Scope<'_>,
    ) {
        self.rows.clear();
        let mut owners = Shown::new(max_owners);
        let mut ages: BTreeMap<String, (f64, bool)> = BTreeMap::new();
        for Report {
            device,
            age,
            counts,
            is_partial,
        } in reports
        {
            let device = devices.meet(device, scope.now);
            for ((owner, kind, state), pairs) in counts.iter().flat_map(|counts| counts.iter()) {
                let labels = owners.of(resolution(*owner, scope));
                let kind = TYPES
                    .iter()
                    .find(|(code, _)| code == kind)
                    .map_or(STRANGE, |(_, name)| name);
                let state = STATES.get(usize::from(*state)).unwrap_or(&STRANGE);
                let row = (labels, device.clone(), kind, *state);
                *self.rows.entry(row).or_default() += pairs;
            }
            let (oldest, is_any_partial) = ages.entry(device).or_default();
            *oldest = oldest.max(age.as_secs_f64());
            *is_any_partial |= is_partial;
        }
        let ages = ages.into_iter();
        self.ages = ages
            .map(|(device, (age, part))| (device, age, part))
            .collect();
        devices.expire(scope.retention, scope.now);
    }

    pub(super) fn render(&self, families: &mut Families) {
        let rows = self.rows.iter();
        let rows = rows.map(|((labels, device, kind, state), pairs)| {
            (labels, &**device, *kind, *state, *pairs)
        });
        render_gauge(rows, &self.ages, families);
    }
}

/// Whose a queue pair is.
fn resolution(owner: PairOwner, scope: &Scope<'_>) -> Resolution {
    match owner {
        PairOwner::Kernel => Resolution::Host,
        PairOwner::Unknown => Resolution::Unknown,
        PairOwner::Cgroup(cgroup) => scope.resolve(cgroup),
    }
}
