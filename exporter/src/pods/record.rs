// SPDX-License-Identifier: Apache-2.0
//! What does the source of names tell of a pod, as far as it matters here?

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use k8s_openapi::{
    api::core::v1::{ContainerStatus, Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::{Labels, Name, Owner};

/// One pod as its source describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What the cgroup's path calls the pod: its uid, or the config hash of a static pod.
    pub uid: Arc<str>,
    /// The uid of the object that says so: another for the mirror of a static pod, which only claims to be it. Of two objects that claim
    /// one uid neither has it, unless it is one's own.
    pub object: Arc<str>,
    /// The pod's namespace.
    pub namespace: Arc<str>,
    /// The pod's name.
    pub name: Arc<str>,
    /// Seconds since 1970 at which the pod was created: of two pods with one name, the younger holds it.
    pub created: i64,
    /// Container ids (without the runtime's prefix) and their names, earlier instances of a container included.
    pub containers: HashMap<Arc<str>, Arc<str>>,
    /// Whether it runs.
    pub is_running: bool,
    /// Whether it is in the host's network: its addresses are the node's.
    pub in_host: bool,
    /// The addresses that are the pod's own while it runs: none for one that has ended, or is in the host's network.
    pub addresses: Vec<IpAddr>,
}

impl Record {
    /// Reads what Chandra needs of a pod, or `None` of one that lacks a uid or a name.
    pub fn of(pod: &Pod) -> Option<Self> {
        let meta = &pod.metadata;
        let own = meta.uid.as_ref()?;
        let uid = mirrored(meta).unwrap_or(own);
        let status = pod.status.as_ref();
        let lists = [
            status.and_then(|s| s.container_statuses.as_deref()),
            status.and_then(|s| s.init_container_statuses.as_deref()),
            status.and_then(|s| s.ephemeral_container_statuses.as_deref()),
        ];
        let phase = status.and_then(|status| status.phase.as_deref());
        let (is_running, in_host) = (phase == Some("Running"), in_host(pod));
        let containers = lists
            .into_iter()
            .flatten()
            .flatten()
            .flat_map(|container| {
                ids(container).map(|id| (id.into(), container.name.as_str().into()))
            })
            .collect();
        Some(Self {
            uid: uid.into(),
            object: own.as_str().into(),
            namespace: meta.namespace.as_deref().unwrap_or("default").into(),
            name: meta.name.as_deref()?.into(),
            created: meta
                .creation_timestamp
                .as_ref()
                .map_or(0, |t| t.0.as_second()),
            containers,
            is_running,
            in_host,
            addresses: match is_running && !in_host {
                true => listed(pod),
                false => Vec::new(),
            },
        })
    }

    pub(super) fn full_name(&self) -> Name {
        (Arc::clone(&self.namespace), Arc::clone(&self.name))
    }

    /// One of its containers as an owner.
    pub(super) fn owner(&self, container: &str) -> Owner {
        Owner {
            labels: Labels {
                namespace: Arc::clone(&self.namespace),
                pod: Arc::clone(&self.name),
                container: container.into(),
            },
            uid: Arc::clone(&self.uid),
        }
    }
}

/// The hash of the manifest of the static pod that an object mirrors.
///
/// The API's object for a static pod has a uid of its own. The kubelet names the cgroup after the hash of the manifest
/// (pkg/kubelet/config/common.go, applyDefaults), which the mirror carries, and makes its node the mirror's owner
/// (pkg/kubelet/pod/mirror_client.go). Whoever may create pods can write all of this, so it is a claim: see [`Record::object`]. A pod
/// that is no static one cannot be meant, since a uid of the API server has dashes and a hash has none.
fn mirrored(meta: &ObjectMeta) -> Option<&str> {
    let annotation = |key| meta.annotations.as_ref().and_then(|all| all.get(key));
    annotation("kubernetes.io/config.mirror")?;
    let hash = annotation("kubernetes.io/config.hash")?;
    let of_node = meta.owner_references.iter().flatten();
    let of_node = of_node.filter(|owner| owner.kind == "Node").count() == 1;
    let is_hash = hash.len() == HASH && hash.bytes().all(|b| b.is_ascii_hexdigit());
    (of_node && is_hash).then_some(hash)
}

/// Hexadecimal digits of a manifest's hash.
const HASH: usize = 32;

/// Says if a pod is in the host's network. Its spec says so, or its addresses are those of its node.
fn in_host(pod: &Pod) -> bool {
    let asked = pod.spec.as_ref().and_then(|spec| spec.host_network);
    let status = pod.status.as_ref();
    let hosts = status.and_then(|status| status.host_ips.as_ref());
    let hosts = hosts.into_iter().flatten().map(|ip| ip.ip.as_str());
    let host = status.and_then(|status| status.host_ip.as_deref());
    let hosts: Vec<IpAddr> = parsed(hosts.chain(host));
    asked == Some(true) || listed(pod).iter().any(|address| hosts.contains(address))
}

/// The addresses that a pod's status has, of both families.
fn listed(pod: &Pod) -> Vec<IpAddr> {
    let Some(status) = pod.status.as_ref() else {
        return Vec::new();
    };
    let all = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
    let mut addresses = parsed(all.chain(status.pod_ip.as_deref()));
    addresses.sort();
    addresses.dedup();
    addresses
}

fn parsed<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<IpAddr> {
    texts.filter_map(|text| text.parse().ok()).collect()
}

/// The ids of a container's instances, `containerd://` and the like removed.
fn ids(status: &ContainerStatus) -> impl Iterator<Item = &str> {
    let earlier = status
        .last_state
        .as_ref()
        .and_then(|state| state.terminated.as_ref());
    let ended = status
        .state
        .as_ref()
        .and_then(|state| state.terminated.as_ref());
    [
        status.container_id.as_deref(),
        earlier.and_then(|t| t.container_id.as_deref()),
        ended.and_then(|t| t.container_id.as_deref()),
    ]
    .into_iter()
    .flatten()
    .filter_map(|id| id.split_once("://"))
    .map(|(_, id)| id)
    .filter(|id| !id.is_empty())
}
