// SPDX-License-Identifier: Apache-2.0
//! encryption: the key of IPsec is rotated twice, as it should be, while pods send. No alert at all.

use std::time::Duration;

use crate::frame::{Encryption, Scenario, Stage, minutes};

/// In real time, since the alert counts sessions a minute.
pub(crate) const SCENARIO: Scenario = Scenario::new("ipsec-rotation", play).speed(1, "{}");

fn play(stage: &mut Stage) {
    let gateway = stage.pod("gpu-2", "inference", "gateway");
    let models = [
        stage.pod("gpu-1", "inference", "vllm-0"),
        stage.pod("gpu-1", "inference", "vllm-1"),
    ];
    stage.encrypt(Encryption::Ipsec);
    stage.open();

    stage.work(&gateway, "traffic serve 0.0.0.0:5201");
    for model in &models {
        stage.work(model, &gateway.steps_to(5201));
    }
    stage.until(
        "three pods' traffic is encrypted",
        "count(sum by (pod) (chandra_encryption_packets_total{namespace=\"inference\",protocol=\"ipsec\"}) > 100) == 3",
    );
    stage.healthy(minutes(2));
    for rotation in [1, 2] {
        stage.rotate_keys(Duration::from_secs(60));
        // Four associations each time: a key for each direction, on each node. The first ones were there before.
        stage.until(
            &format!("rotation {rotation} is counted"),
            &format!(
                "max(sum by (node) (chandra_encryption_security_associations_total{{event=\"deleted\"}})) == {}",
                4 * rotation
            ),
        );
        stage.healthy(minutes(2));
    }
}
