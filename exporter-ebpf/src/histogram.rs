// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! How long? Histograms among the counters of a map value.

use exporter_common::histogram::Shape;

use crate::counters::Counters;

impl<const SLOTS: usize> Counters<SLOTS> {
    /// Counts a time in nanoseconds in the histogram that begins at a slot.
    #[inline(always)]
    pub fn observe(self, first: u64, shape: Shape, nanoseconds: u64) {
        self.add(first + shape.bucket(nanoseconds) as u64, 1);
        self.add(first + shape.sum() as u64, nanoseconds);
    }
}
