// SPDX-License-Identifier: Apache-2.0
//! How much time may be spent on something?

use std::time::{Duration, Instant};

/// Time that may be spent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    /// Of a burst, and what comes back in each second, in milliseconds.
    burst: u64,
    each_second: u64,
}

impl Budget {
    pub(super) const fn new(burst: u64, each_second: u64) -> Self {
        Self { burst, each_second }
    }
}

/// What has been spent of a [`Budget`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Spent {
    pub(super) spent: Duration,
    at: Instant,
}

impl Spent {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            spent: Duration::ZERO,
            at: now,
        }
    }

    /// What is spent, after what has come back.
    fn now(&mut self, budget: Budget, now: Instant) -> Duration {
        let since = now.saturating_duration_since(self.at);
        let back = since.mul_f64(budget.each_second as f64 / 1000.0);
        self.spent = self.spent.saturating_sub(back);
        self.at = now;
        self.spent
    }

    /// Spends some. What is owed has a bound, so that one long wait is paid back in minutes.
    pub(super) fn add(&mut self, took: Duration, budget: Budget) {
        let most = Duration::from_millis(budget.burst + budget.each_second * 60);
        self.spent = most.min(self.spent + took);
    }

    pub(super) fn is_left(&mut self, budget: Budget, now: Instant) -> bool {
        self.now(budget, now) < Duration::from_millis(budget.burst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spent_comes_back_and_what_is_owed_has_a_bound() {
        let begin = Instant::now();
        let budget = Budget::new(1000, 100);
        let mut spent = Spent::new(begin);
        spent.add(Duration::from_millis(900), budget);
        assert!(spent.is_left(budget, begin));
        spent.add(Duration::from_secs(3600), budget);
        assert_eq!(spent.spent, Duration::from_secs(7));
        let after = |seconds| begin + Duration::from_secs(seconds);
        assert!(!spent.is_left(budget, after(59)));
        assert!(spent.is_left(budget, after(61)));
        assert_eq!(spent.now(budget, after(600)), Duration::ZERO);
        // A clock that was read earlier gives nothing back.
        spent.add(Duration::from_millis(1), budget);
        assert_eq!(spent.now(budget, after(500)), Duration::from_millis(1));
    }
}
