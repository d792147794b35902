// SPDX-License-Identifier: Apache-2.0
//! Classic histograms whose bounds grow by a power of two: counted in the kernel by index, labelled in user space by bound.

/// A histogram's shape. Its slots are the buckets, the last one without a bound, and then the sum in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The first bucket's inclusive upper bound, in nanoseconds.
    pub first: u64,
    /// Buckets that have a bound.
    pub bounds: usize,
    /// How much larger each bound is than the one before, as a power of two: 2 is four times.
    pub step: u32,
}

impl Shape {
    /// How many slots the histogram takes.
    pub const fn slots(self) -> usize {
        self.bounds + 2
    }

    /// The slot of the bucket that holds a time in nanoseconds.
    #[inline(always)]
    pub const fn bucket(self, nanoseconds: u64) -> usize {
        let units = nanoseconds.div_ceil(self.first);
        let bits = u64::BITS - units.saturating_sub(1).leading_zeros();
        let index = bits.div_ceil(self.step) as usize;
        if index < self.bounds {
            index
        } else {
            self.bounds
        }
    }

    /// The slot of the sum.
    pub const fn sum(self) -> usize {
        self.bounds + 1
    }

    /// The inclusive upper bound of a bucket in nanoseconds; `None` for the last one.
    pub const fn bound(self, bucket: usize) -> Option<u64> {
        if bucket < self.bounds {
            Some(self.first << (self.step as usize * bucket))
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        first: 16_000,
        bounds: 11,
        step: 2,
    };

    #[test]
    fn every_time_lies_in_the_first_bucket_that_bounds_it() {
        for shape in [SHAPE, Shape { step: 1, ..SHAPE }] {
            let edges = (0..shape.bounds).filter_map(|i| shape.bound(i));
            let around = edges.flat_map(|bound| [bound - 1, bound, bound + 1]);
            for time in around.chain([0, 1, 15_999, u64::MAX]) {
                let bucket = shape.bucket(time);
                let bound = |bucket| shape.bound(bucket);
                assert!(bound(bucket).is_none_or(|bound| time <= bound), "{time}");
                let above = bucket == 0 || bound(bucket - 1).is_some_and(|bound| time > bound);
                assert!(above, "{time}");
            }
        }
    }

    #[test]
    fn the_last_slots_are_the_unbounded_bucket_and_the_sum() {
        assert_eq!(SHAPE.bucket(u64::MAX), 11);
        assert_eq!(SHAPE.sum(), 12);
        assert_eq!(SHAPE.slots(), 13);
    }
}
