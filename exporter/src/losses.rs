// SPDX-License-Identifier: Apache-2.0
//! How many events were seen and could not be counted, and why?

use std::ops::{Add, AddAssign, Index, IndexMut};

use exporter_common::Loss;

/// Lost events, by [`Loss`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses([u64; Loss::LABELS.len()]);

impl Losses {
    /// The events of every reason, by its label.
    pub fn by_label(self) -> impl Iterator<Item = (&'static str, u64)> {
        Loss::LABELS
            .into_iter()
            .map(move |(loss, label)| (label, self[loss]))
    }
}

impl Index<Loss> for Losses {
    type Output = u64;

    fn index(&self, loss: Loss) -> &u64 {
        &self.0[loss as usize]
    }
}

impl IndexMut<Loss> for Losses {
    fn index_mut(&mut self, loss: Loss) -> &mut u64 {
        &mut self.0[loss as usize]
    }
}

impl Add for Losses {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self += other;
        self
    }
}

impl AddAssign for Losses {
    fn add_assign(&mut self, other: Self) {
        for (events, by) in self.0.iter_mut().zip(other.0) {
            *events += by;
        }
    }
}
