// SPDX-License-Identifier: Apache-2.0
//! rdma: the peer of one worker is gone, its device gives up, the queue pair stays in ERR. The alert names the worker.
//! The control are pods whose connections close in order, which passes ERR as well.

use crate::frame::{Alert, Scenario, Stage, minutes};

pub(crate) const SCENARIO: Scenario = Scenario::new("qp-errors", play);

fn play(stage: &mut Stage) {
    let victim = stage.rdma_pod("gpu-1", "training", "worker-0");
    let steady = stage.rdma_pod("gpu-1", "training", "worker-1");
    let server = stage.rdma_pod("gpu-2", "storage", "server");
    let client = stage.rdma_pod("gpu-2", "storage", "client");
    stage.open();

    for worker in [&victim, &steady] {
        stage.work(worker, "verbs $UVERBS hold 4");
    }
    stage.queue_pairs(8);
    stage.work(&server, "while :; do rping -s -C 1 -a $RDMA; done");
    stage.work(&client, "while :; do rping -c -C 1 -a $RDMA; sleep 2; done");
    stage.until(
        "connections have been closed in order",
        "sum(chandra_rdma_queue_pair_transitions_total{namespace=\"storage\",state=\"ERR\"}) > 2",
    );
    stage.healthy(minutes(2));

    stage.fault("worker-0 sends to a peer that is gone");
    stage.end(&victim);
    stage.work(&victim, "verbs $UVERBS fail $NOBODY");
    stage.expect(&[Alert {
        name: "RdmaQueuePairErrors",
        labels: "namespace=training node=gpu-1 pod=worker-0 severity=critical",
        says: "Pod training/worker-0 on node gpu-1 has queue pairs in state ERR that it does not close: 1.",
    }]);

    stage.mended("worker-0 is restarted");
    stage.end(&victim);
    stage.work(&victim, "verbs $UVERBS hold 4");
    stage.resolved();
}
