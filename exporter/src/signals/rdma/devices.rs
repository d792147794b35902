// SPDX-License-Identifier: Apache-2.0
//! What has each device had, and under which name is it shown?

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

use exporter_common::rdma::MAX_DEVICES;

use super::host::{DeviceTotals, Owners};
use crate::ledger::{Growth, Names, OTHER};

/// Devices that are shown by name. A node has some ten; whoever may administer its network can make and rename others.
const SHOWN_DEVICES: usize = 64;

/// Pairs that were created and destroyed, by device.
pub(super) struct Devices {
    totals: BTreeMap<String, [u64; 2]>,
    /// Which of them have names of their own.
    names: Names<String>,
    /// What the kernel's totals grew by, by the device's address.
    growth: Growth<u64, 2>,
    /// The names under which they were booked.
    booked: HashMap<u64, String>,
}

impl Devices {
    pub(super) fn new() -> Self {
        Self {
            totals: BTreeMap::new(),
            names: Names::new(SHOWN_DEVICES),
            growth: Growth::default(),
            booked: HashMap::new(),
        }
    }

    /// Created and destroyed, by the name that is shown.
    pub(super) fn totals(&self) -> &BTreeMap<String, [u64; 2]> {
        &self.totals
    }

    /// Meets a device, and returns the name under which it is shown.
    pub(super) fn meet(&mut self, device: String, now: Instant) -> String {
        let shown = match self.names.meet(&device, now) {
            true => device,
            false => OTHER.to_owned(),
        };
        self.totals.entry(shown.clone()).or_default();
        shown
    }

    /// Books what devices grew by to their names. A device whose name is not known yet is booked later.
    pub(super) fn book(&mut self, devices: Vec<DeviceTotals>, now: Instant) {
        for device in devices {
            let address = device.address;
            self.growth.note(address, device.totals, now);
            let Some(name) = device.name else {
                continue;
            };
            self.booked.insert(address, name.clone());
            // One that has gone counts no more.
            if !self.growth.holds(&address) {
                continue;
            }
            let by = self.growth.take(&address);
            let shown = self.meet(name, now);
            let account = self.totals.entry(shown).or_default();
            for (account, by) in account.iter_mut().zip(by) {
                *account += by;
            }
        }
    }

    /// The object is another, and knows none of them.
    pub(super) fn restart(&mut self) {
        self.growth.retain(|_| false);
        self.booked.clear();
    }

    /// Makes room for devices to come, once half of the map is taken: forgets those that have gone and are booked.
    pub(super) fn make_room(&mut self, owners: &Owners, listed: &BTreeSet<String>) {
        if self.booked.len() < MAX_DEVICES as usize / 2 {
            return;
        }
        let gone = |name: &String| !listed.is_empty() && !listed.contains(name);
        for (address, _) in self.booked.extract_if(|_, name| gone(name)) {
            owners.forget(address);
            self.growth.forget(&address);
        }
    }

    /// Forgets names that have not been met for a time.
    pub(super) fn expire(&mut self, retention: Duration, now: Instant) {
        for gone in self.names.expire(retention, now) {
            self.totals.remove(&gone);
        }
    }
}
