// SPDX-License-Identifier: Apache-2.0
//! encryption: the opening incident. Traffic between pods goes through WireGuard, and something besides the agent removes
//! the peer and adds it again every few seconds, so that keys are derived anew each time. The alert names node and
//! interface, on both ends, and lists the pods.

use crate::frame::{Alert, Encryption, Scenario, Stage, minutes};

/// In real time: what is at stake is how many sessions a minute are too many, and how soon that is told.
pub(crate) const SCENARIO: Scenario = Scenario::new("rekey-storm", play).speed(1, "{}");

fn play(stage: &mut Stage) {
    let gateway = stage.pod("gpu-2", "inference", "gateway");
    let models = [
        stage.pod("gpu-1", "inference", "vllm-0"),
        stage.pod("gpu-1", "inference", "vllm-1"),
    ];
    stage.encrypt(Encryption::WireGuard);
    stage.open();

    stage.work(&gateway, "traffic serve [::]:5201");
    for model in &models {
        stage.work(model, &gateway.steps_to(5201));
    }
    stage.until(
        "three pods' traffic is encrypted",
        "count(sum by (pod) (chandra_encryption_packets_total{namespace=\"inference\"}) > 100) == 3",
    );
    // The initiator renews the session five times in it.
    stage.healthy(minutes(10));

    stage.fault("a tool on gpu-1 removes the peer and adds it again, every 5 s");
    stage.on_node(
        "gpu-1",
        "while :; do
           wg set $WG peer $PEER remove
           wg set $WG peer $PEER allowed-ips $ALLOWED endpoint $ENDPOINT
           sleep 5
         done",
    );
    let says = "Pods with most encrypted traffic on this node: inference/";
    stage.expect(&[
        Alert {
            name: "EncryptionRekeyStorm",
            labels: "interface=wg1 node=gpu-1 protocol=wireguard severity=critical",
            says,
        },
        Alert {
            name: "EncryptionRekeyStorm",
            labels: "interface=wg2 node=gpu-2 protocol=wireguard severity=critical",
            says,
        },
    ]);
}
