// SPDX-License-Identifier: Apache-2.0
//! All is well: inference over a clean link between the nodes, a training job with steady queue pairs. No alert at all.

use crate::frame::{Scenario, Stage, minutes};

pub(crate) const SCENARIO: Scenario = Scenario::new("healthy", play);

fn play(stage: &mut Stage) {
    let gateway = stage.pod("gpu-2", "inference", "gateway");
    let models = [
        stage.pod("gpu-1", "inference", "vllm-0"),
        stage.pod("gpu-1", "inference", "vllm-1"),
        stage.pod("gpu-2", "inference", "vllm-2"),
    ];
    let workers = [
        stage.rdma_pod("gpu-1", "training", "worker-0"),
        stage.rdma_pod("gpu-1", "training", "worker-1"),
        stage.rdma_pod("gpu-2", "training", "worker-2"),
    ];
    stage.open();

    stage.work(&gateway, "traffic serve [::]:5201");
    for model in &models {
        stage.work(model, &gateway.steps_to(5201));
    }
    for worker in &workers {
        stage.work(worker, "verbs $UVERBS hold 8");
    }
    stage.queue_pairs(24);
    stage.healthy(minutes(5));
}
