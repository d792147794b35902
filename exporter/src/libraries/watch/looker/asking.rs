// SPDX-License-Identifier: Apache-2.0
//! What does the helper answer, and what if it does not?

use std::{fs::File, sync::Arc, time::Instant};

use super::{AGAIN_AT_MOST, Looker};
use crate::libraries::{
    elf,
    helper::{Answer, Ask, Helper, Silence, Stuck},
};

/// Helpers that wait in the kernel for good: because of one pod, and of the node. With as many nobody is looked at who has some, and with four
/// times as many nobody.
const STUCK: usize = 8;

const STUCK_OF_POD: usize = 2;

/// Why there is no answer.
pub(super) enum Failed {
    /// It did not come in time, or the helper ended of it. What is left of the helper.
    Late(Option<Stuck>),
    /// None can be asked.
    NoHelper(String),
}

impl Looker {
    /// Asks the helper, which is started where there is none.
    pub(super) fn ask(&mut self, ask: &Ask, pod: &Arc<str>) -> Result<(), Failed> {
        let (all, of_pod) = self.count_stuck(pod);
        if of_pod >= STUCK_OF_POD || (of_pod > 0 && all >= STUCK) || all >= 4 * STUCK {
            let why = format!(
                "no file of its pod is looked at: {of_pod} that do not answer are still waited for ({all} on this node)"
            );
            return Err(Failed::NoHelper(why));
        }
        self.asked = Instant::now();
        let helper = match self.helper.take() {
            Some(helper) => helper,
            None => Helper::start().map_err(|error| Failed::NoHelper(format!("{error:#}")))?,
        };
        let helper = self.helper.insert(helper);
        helper.ask(ask).map_err(|silence| self.give_up(&silence))
    }

    pub(super) fn answer(&mut self, pod: &Arc<str>) -> Result<(Answer, Option<File>), Failed> {
        let helper = self.helper.as_mut().expect("it was asked");
        let answer = helper.answer();
        let took = self.asked.elapsed();
        self.asked = Instant::now();
        self.charge(pod, took);
        answer.map_err(|silence| self.give_up(&silence))
    }

    pub(super) fn give_up(&mut self, silence: &Silence) -> Failed {
        if let Silence::Ended(why) = silence
            && self
                .complained
                .is_none_or(|at| at.elapsed() >= AGAIN_AT_MOST)
        {
            self.complained = Some(Instant::now());
            tracing::warn!("looking into files: {why}");
        }
        Failed::Late(self.helper.take().and_then(Helper::give_up))
    }

    pub(super) fn keep_stuck(&mut self, failed: Failed, pod: &Arc<str>) {
        if let Failed::Late(Some(stuck)) = failed {
            self.stuck.push((Arc::clone(pod), stuck));
        }
    }

    fn count_stuck(&self, pod: &Arc<str>) -> (usize, usize) {
        let slow = self.slow.values().filter(|slow| slow.stuck.is_some());
        let pods = slow
            .map(|slow| &slow.pod)
            .chain(self.stuck.iter().map(|(pod, _)| pod));
        pods.fold((0, 0), |(all, of_pod), other| {
            (all + 1, of_pod + usize::from(other == pod))
        })
    }
}

/// What is told of what does not come.
pub(super) fn late() -> String {
    format!(
        "no answer in {} s; tried again later",
        elf::PATIENCE.as_secs()
    )
}
