// SPDX-License-Identifier: Apache-2.0
//! nccl: a rank of a new job comes 80 s after the others. The alert fires on those that waited for it, once they are there; a job
//! that started in time beside them is quiet.

use crate::frame::{Alert, Scenario, Stage, minutes};

pub(crate) const SCENARIO: Scenario = Scenario::new("slow-init", play);

const fn slow(labels: &'static str) -> Alert {
    Alert {
        name: "NcclInitSlow",
        labels,
        says: "Time in rendezvous is mostly the wait for the last rank to start.",
    }
}

fn play(stage: &mut Stage) {
    let mut pods = |name: &str| -> Vec<_> {
        let pod = |rank| stage.pod("gpu-1", "training", &format!("{name}-{rank}"));
        (0..3).map(pod).collect()
    };
    let (first, second) = (pods("first"), pods("second"));
    stage.open();

    let calls = "--interval-us 40000 --random-us 20000";
    stage.job(&first.iter().collect::<Vec<_>>(), calls);
    stage.until(
        "all ranks call NCCL",
        "count(sum by (pod) (chandra_nccl_rank_collectives_total{namespace=\"training\"}) > 20) == 3",
    );
    stage.quiet(minutes(3));

    stage.fault("a second job starts, and its rank 2 is not there for 80 s");
    stage.job(
        &second.iter().collect::<Vec<_>>(),
        &format!("{calls} --init-delay-rank 2 --init-delay-us 80000000"),
    );
    stage.expect(&[
        slow("namespace=training node=gpu-1 phase=total pod=second-0 severity=warning"),
        slow("namespace=training node=gpu-1 phase=total pod=second-1 severity=warning"),
    ]);

    stage.mended("nothing more: the second job has initialised");
    stage.resolved();
}
