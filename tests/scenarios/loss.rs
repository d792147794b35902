// SPDX-License-Identifier: Apache-2.0
//! tcp: the link of one pod loses packets. The alert names this pod; its neighbours are silent, and so is the peer.

use crate::frame::{Alert, Scenario, Stage, minutes};

pub(crate) const SCENARIO: Scenario = Scenario::new("loss", play);

fn play(stage: &mut Stage) {
    let gateway = stage.pod("gpu-2", "inference", "gateway");
    let victim = stage.pod("gpu-1", "inference", "vllm-0");
    let neighbour = stage.pod("gpu-1", "inference", "vllm-1");
    let remote = stage.pod("gpu-2", "inference", "vllm-2");
    stage.open();

    stage.work(&gateway, "traffic serve [::]:5201");
    // The victim has three connections, so that some send while others wait for a timeout.
    for model in [&victim, &victim, &victim, &neighbour, &remote] {
        stage.work(model, &gateway.steps_to(5201));
    }
    stage.healthy(minutes(1));

    stage.fault("the link of vllm-0 loses one packet in ten");
    stage.link(&victim, "loss 10%");
    stage.expect(&[Alert {
        name: "TcpRetransmitsHigh",
        labels: "namespace=inference node=gpu-1 pod=vllm-0 severity=warning",
        says: "Pod inference/vllm-0 on node gpu-1 retransmits ",
    }]);

    stage.mended("the link is clean again");
    stage.link(&victim, "");
    stage.resolved();
}
