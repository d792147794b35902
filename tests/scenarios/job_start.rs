// SPDX-License-Identifier: Apache-2.0
//! rdma: a job starts, scales out and ends, and the next one starts at once. No alert at all.

use crate::frame::{Pod, Scenario, Stage, minutes};

pub(crate) const SCENARIO: Scenario = Scenario::new("job-start", play);

fn play(stage: &mut Stage) {
    let lasting = stage.rdma_pod("gpu-1", "training", "cache");
    let mut job = |name: &str| {
        let nodes = [(0, "gpu-1"), (1, "gpu-1"), (2, "gpu-2"), (3, "gpu-2")];
        nodes.map(|(rank, node)| stage.rdma_pod(node, "training", &format!("{name}-{rank}")))
    };
    let (first, next) = (job("first"), job("next"));
    stage.open();

    let start = |stage: &mut Stage, workers: &[Pod]| {
        for worker in workers {
            stage.work(worker, "verbs $UVERBS hold 16");
        }
    };
    stage.work(&lasting, "verbs $UVERBS hold 8");
    stage.queue_pairs(8);
    stage.healthy(minutes(2));

    stage.note("a job starts on one node");
    start(stage, &first[..2]);
    stage.queue_pairs(8 + 32);
    stage.note("it scales out to the other node");
    start(stage, &first[2..]);
    stage.queue_pairs(8 + 64);
    stage.note("it ends, and the next one starts");
    for worker in &first {
        stage.end(worker);
    }
    start(stage, &next);
    stage.until(
        "both jobs have had their queue pairs",
        "sum(chandra_rdma_device_queue_pairs_created_total) == 8 + 64 + 64",
    );
    stage.healthy(minutes(2));
}
