// SPDX-License-Identifier: Apache-2.0
//! encryption: a pod writes its checkpoint over the encrypted network, and the node's CPUs encrypt for it alone. The alert
//! names this pod: not those beside it, nor those it writes to.

use crate::frame::{Alert, Encryption, Scenario, Stage, minutes};

/// A machine of two CPUs is both nodes, so a core would be half of all there is.
pub(crate) const SCENARIO: Scenario = Scenario::new("encryption-hog", play).speed(
    10,
    "{ _config+:: { encryption+: { EncryptionCpuHigh+: { threshold: 0.13 } } } }",
);

fn play(stage: &mut Stage) {
    let gateway = stage.pod("gpu-2", "inference", "gateway");
    let model = stage.pod("gpu-1", "inference", "vllm-0");
    let stores = ["store-0", "store-1", "store-2", "store-3"]
        .map(|name| stage.pod("gpu-2", "storage", name));
    let hog = stage.pod("gpu-1", "training", "checkpoint");
    stage.encrypt(Encryption::WireGuard);
    stage.open();

    stage.work(&gateway, "traffic serve [::]:5201");
    stage.work(&model, &gateway.steps_to(5201));
    for store in &stores {
        stage.work(store, "traffic serve [::]:5201");
    }
    stage.work(&hog, &stores[0].steps_to(5201));
    // More than an emulated machine encrypts, or more at once after it has stood still, would be lost in its queues, which is
    // another alert.
    stage.link(&hog, "rate 30mbit");
    stage.work(
        &hog,
        "echo 4096 16384 65536 >/proc/sys/net/ipv4/tcp_wmem; sleep infinity",
    );
    stage.healthy(minutes(2));

    stage.fault("checkpoint writes as much as its link takes, to four stores");
    for store in &stores {
        let target = store.at(5201);
        stage.work(&hog, &format!("while :; do traffic send {target} 64; done"));
    }
    stage.expect(&[Alert {
        name: "EncryptionCpuHigh",
        labels: "namespace=training node=gpu-1 pod=checkpoint severity=warning",
        says: "Pods with most encrypted traffic on this node: training/checkpoint ",
    }]);
}
