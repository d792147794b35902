// SPDX-License-Identifier: Apache-2.0
//! nccl: one rank of a job begins to come late to each collective. The alert names its pod and its rank, and everything else is
//! quiet: it is not the network. Before, the same job takes turns in being late.

use crate::frame::{Alert, Scenario, Stage, minutes};

pub(crate) const SCENARIO: Scenario = Scenario::new("straggler", play);

fn play(stage: &mut Stage) {
    let workers: Vec<_> = (0..4)
        .map(|rank| stage.pod("gpu-1", "training", &format!("worker-{rank}")))
        .collect();
    let workers: Vec<_> = workers.iter().collect();
    stage.open();

    // Steps of some 60 ms on two communicators; the third rank comes 40 ms late once it is told to.
    stage.job(
        &workers,
        "--communicators 2 --interval-us 40000 --random-us 20000 --straggler 2 --delay-us 40000 --on-signal",
    );
    stage.until(
        "all ranks call NCCL",
        "count(sum by (pod) (chandra_nccl_rank_collectives_total{namespace=\"training\"}) > 20) == 4",
    );
    stage.quiet(minutes(3));

    stage.fault("rank 2 comes 40 ms late to each collective");
    stage.signal(workers[2], "USR1");
    stage.expect(&[Alert {
        name: "NcclStraggler",
        labels: "namespace=training node=gpu-1 pod=worker-2 rank=2 severity=warning",
        says: "Pod training/worker-2 on node gpu-1: rank 2 is the last in ",
    }]);

    stage.mended("rank 2 is as fast as the others");
    stage.signal(workers[2], "USR2");
    stage.resolved();
}
