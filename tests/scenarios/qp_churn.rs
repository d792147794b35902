// SPDX-License-Identifier: Apache-2.0
//! rdma: one worker dies and is restarted, again and again. The alerts are about it; its neighbours are silent.

use crate::frame::{Alert, Scenario, Stage, minutes};

pub(crate) const SCENARIO: Scenario = Scenario::new("qp-churn", play);

fn play(stage: &mut Stage) {
    let culprit = stage.rdma_pod("gpu-1", "training", "worker-0");
    let steady = [
        stage.rdma_pod("gpu-1", "training", "worker-1"),
        stage.rdma_pod("gpu-2", "training", "worker-2"),
        stage.rdma_pod("gpu-2", "training", "worker-3"),
    ];
    stage.open();

    for worker in steady.iter().chain([&culprit]) {
        stage.work(worker, "verbs $UVERBS hold 8");
    }
    stage.queue_pairs(32);
    stage.healthy(minutes(2));

    stage.fault("worker-0 dies a few seconds after each start");
    stage.end(&culprit);
    stage.work(
        &culprit,
        "while :; do
           verbs $UVERBS hold 8 >/tmp/ready &
           until grep -q ready /tmp/ready; do sleep 0.2; done
           sleep 3; kill -9 $!; wait
         done",
    );
    let labels = "container=main namespace=training node=gpu-1 pod=worker-0 severity=warning";
    let says = "Torn down on the node, by pod: training/worker-0 ";
    stage.expect(&[
        Alert {
            name: "RdmaQueuePairSpike",
            labels,
            says,
        },
        Alert {
            name: "RdmaQueuePairChurn",
            labels,
            says,
        },
    ]);
}
