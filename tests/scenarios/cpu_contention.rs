// SPDX-License-Identifier: Apache-2.0
//! gpu: a pod drives a GPU and requests no CPU, and another pod takes all that is to be had. The alert names the victim:
//! not the hog, nor a pod beside them that requests what it needs.

use crate::frame::{Alert, Scenario, Stage, minutes};

pub(crate) const SCENARIO: Scenario = Scenario::new("cpu-contention", play);

fn play(stage: &mut Stage) {
    let victim = stage.pod("gpu-1", "inference", "vllm-0");
    let neighbour = stage.pod("gpu-1", "inference", "vllm-1");
    let hog = stage.pod("gpu-1", "batch", "preprocess");
    stage.gpus();
    stage.open();

    // Each has two threads that launch something a hundred times a second.
    let decode = "(while :; do echo pulse 1; sleep 1.1; done) | gpu $GPU 2";
    for (pod, cores) in [(&victim, 0.0), (&neighbour, 4.0), (&hog, 4.0)] {
        stage.requests(pod, cores);
    }
    stage.work(&victim, decode);
    stage.work(&neighbour, decode);
    stage.until(
        "two pods drive a GPU",
        "count(sum by (pod) (chandra_gpu_processes{namespace=\"inference\",driver=\"drm\"}) == 1) == 2",
    );
    stage.quiet(minutes(3));

    stage.fault("preprocess computes with four processes, on the two CPUs that there are");
    for _ in 0..4 {
        stage.work(&hog, "while :; do :; done");
    }
    stage.expect(&[Alert {
        name: "GpuRunqueueDelayHigh",
        labels: "namespace=inference node=gpu-1 pod=vllm-0 severity=warning",
        says: "Seconds waited per second on this node: inference/vllm-0 ",
    }]);

    stage.mended("preprocess is gone");
    stage.end(&hog);
    stage.resolved();
}
