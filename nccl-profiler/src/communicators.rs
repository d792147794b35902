// SPDX-License-Identifier: Apache-2.0
//! The communicators of this process.

use core::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

use exporter_common::nccl_profiler::Told;

use crate::{collectives, nccl_profiler_closed, nccl_profiler_opened};

/// Communicators that can be open at once. A rank of a large job has some dozens; one more works, but is not seen.
pub(crate) const COMMUNICATORS: usize = 1024;

/// A communicator, as one of the ranks in this process sees it.
pub(crate) struct Communicator {
    /// Nobody's, being written, or open: [`FREE`] to [`OPEN`].
    state: AtomicU32,
    rank: AtomicU32,
    ranks: AtomicU32,
    number: AtomicU64,
}

const FREE: u32 = 0;
const TAKEN: u32 = 1;
const OPEN: u32 = 2;

static ALL: [Communicator; COMMUNICATORS] = [const {
    Communicator {
        state: AtomicU32::new(FREE),
        rank: AtomicU32::new(0),
        ranks: AtomicU32::new(0),
        number: AtomicU64::new(0),
    }
}; COMMUNICATORS];

impl Communicator {
    /// What is told of it.
    pub(crate) fn told(&self) -> Told {
        Told {
            communicator: self.number.load(Relaxed),
            rank: self.rank.load(Relaxed),
            ranks: self.ranks.load(Relaxed),
            ..Told::default()
        }
    }
}

/// Returns an open communicator.
pub(crate) fn get(index: Option<usize>) -> Option<&'static Communicator> {
    ALL.get(index?)
        .filter(|communicator| communicator.state.load(Acquire) == OPEN)
}

/// Finds a place for a communicator and tells of it. Returns its index, or none if there is no place.
pub(crate) fn open(number: u64, rank: u32, ranks: u32) -> Option<usize> {
    let take = |communicator: &Communicator| {
        communicator.state.load(Relaxed) == FREE
            && communicator
                .state
                .compare_exchange(FREE, TAKEN, Acquire, Relaxed)
                .is_ok()
    };
    let (index, communicator) = ALL
        .iter()
        .enumerate()
        .find(|(_, communicator)| take(communicator))?;
    communicator.number.store(number, Relaxed);
    communicator.rank.store(rank, Relaxed);
    communicator.ranks.store(ranks, Relaxed);
    communicator.state.store(OPEN, Release);
    nccl_profiler_opened(&communicator.told());
    Some(index)
}

/// Forgets a communicator's open collectives, tells of its end, and frees its place.
pub(crate) fn close(index: usize) {
    let Some(communicator) = ALL.get(index) else {
        return;
    };
    if communicator
        .state
        .compare_exchange(OPEN, TAKEN, AcqRel, Relaxed)
        .is_err()
    {
        return;
    }
    collectives::forget(communicator);
    nccl_profiler_closed(&communicator.told());
    communicator.state.store(FREE, Release);
}
