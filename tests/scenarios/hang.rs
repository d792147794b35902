// SPDX-License-Identifier: Apache-2.0
//! nccl: a rank stops in the middle of a job, alive. The alert fires on the pods that wait for it.

use crate::frame::{Alert, Scenario, Stage, minutes};

pub(crate) const SCENARIO: Scenario = Scenario::new("hang", play);

const SAYS: &str = "Missing: training/worker-1 rank 1 (stopped).";

const fn stuck(labels: &'static str) -> Alert {
    Alert {
        name: "NcclCollectiveStuck",
        labels,
        says: SAYS,
    }
}

fn play(stage: &mut Stage) {
    let workers: Vec<_> = (0..3)
        .map(|rank| stage.pod("gpu-1", "training", &format!("worker-{rank}")))
        .collect();
    let workers: Vec<_> = workers.iter().collect();
    stage.open();

    stage.job(
        &workers,
        "--communicators 2 --interval-us 40000 --random-us 20000",
    );
    stage.until(
        "all ranks call NCCL",
        "count(sum by (pod) (chandra_nccl_rank_collectives_total{namespace=\"training\"}) > 20) == 3",
    );
    stage.quiet(minutes(3));

    stage.fault("rank 1 is stopped");
    stage.signal(workers[1], "STOP");
    stage.expect(&[
        stuck("namespace=training node=gpu-1 pod=worker-0 severity=critical"),
        stuck("namespace=training node=gpu-1 pod=worker-2 severity=critical"),
    ]);

    stage.mended("rank 1 goes on");
    stage.signal(workers[1], "CONT");
    stage.resolved();
}
