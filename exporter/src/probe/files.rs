// SPDX-License-Identifier: Apache-2.0
//! How many probes of files may there be, and whose are they?

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use aya::programs::uprobe::UProbeLink;

use crate::{hook::Reason, lock::lock};

/// Probes of files that may be attached at once, of all signals. The kernel takes an eighth of a second to take one out (6.12, 6.18: a
/// grace period under one lock, so threads do not help), and a process that ends waits for all of them: half a minute at most.
pub const FILE_PROBES: usize = 192;

/// Those of them that one pod may have, or one unit of a host without pods.
pub const FILE_PROBES_OF_POD: usize = FILE_PROBES / 2;

/// A place among [`FILE_PROBES`], for a pod.
#[derive(Debug)]
pub struct Room(Arc<str>);

static TAKEN: Mutex<BTreeMap<Arc<str>, usize>> = Mutex::new(BTreeMap::new());

fn taken() -> MutexGuard<'static, BTreeMap<Arc<str>, usize>> {
    lock(&TAKEN)
}

impl Room {
    /// Takes places for all probes of something, or none: a part of them would tell wrong times.
    ///
    /// # Errors
    /// What to tell of a probe that has no place.
    pub fn take(places: usize, pod: &Arc<str>) -> Result<Vec<Self>, (Reason, String)> {
        let mut taken = taken();
        let all: usize = taken.values().sum();
        let of_pod = taken.get(pod).copied().unwrap_or_default();
        let why = if all + places > FILE_PROBES {
            format!(
                "of {FILE_PROBES} probes of files that may be attached on this node, which is as many as are taken out in half a minute, \
                 {all} are"
            )
        } else if of_pod + places > FILE_PROBES_OF_POD {
            format!(
                "of {FILE_PROBES_OF_POD} probes of files that may be attached for one pod, {of_pod} are"
            )
        } else {
            if places > 0 {
                taken.insert(Arc::clone(pod), of_pod + places);
            }
            return Ok((0..places).map(|_| Self(Arc::clone(pod))).collect());
        };
        Err((Reason::NoRoom, why))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut taken = taken();
        if let Some(of_pod) = taken.get_mut(&self.0) {
            *of_pod -= 1;
            if *of_pod == 0 {
                taken.remove(&self.0);
            }
        }
    }
}

/// A probe of a file, attached until it is dropped.
pub struct FileLink {
    // Dropped first: its place is free when the kernel has taken it out.
    _link: UProbeLink,
    _room: Room,
}

impl FileLink {
    pub(super) fn new(link: UProbeLink, room: Room) -> Self {
        Self {
            _link: link,
            _room: room,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pod_cannot_take_all_places() {
        let (one, other): (Arc<str>, Arc<str>) = ("one".into(), "other".into());
        let all = Room::take(FILE_PROBES_OF_POD, &one).expect("half");
        let (reason, why) = Room::take(1, &one).expect_err("one more");
        assert_eq!(reason, Reason::NoRoom);
        assert!(why.contains("for one pod"), "{why}");
        let half = Room::take(FILE_PROBES_OF_POD, &other).expect("the other half");
        let (_, why) = Room::take(1, &"third".into()).expect_err("full");
        assert!(why.contains("on this node"), "{why}");
        drop(all);
        Room::take(FILE_PROBES_OF_POD, &one).expect("given back");
        drop(half);
        assert!(taken().is_empty());
    }
}
