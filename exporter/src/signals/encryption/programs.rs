// SPDX-License-Identifier: Apache-2.0
//! Where does `encryption` hook, and what has its object to know of the kernel?

use std::sync::Arc;

use super::Settings;
use crate::{
    hook::{Program, Target},
    kernel::{Kernel, btf::Btf},
    probe::Constants,
};

const PACKET: &[&str] = &[
    "OFF_SKB_HEAD",
    "OFF_SKB_DATA",
    "OFF_SKB_TAIL",
    "OFF_SKB_LEN",
    "OFF_SKB_SOCK",
    "OFF_SKB_NETWORK",
    "OFF_SOCK_STATE",
];
/// How an association encrypts, besides.
const ESP: &[&str] = &[
    "OFF_SKB_HEAD",
    "OFF_SKB_DATA",
    "OFF_SKB_TAIL",
    "OFF_SKB_LEN",
    "OFF_SKB_SOCK",
    "OFF_SKB_NETWORK",
    "OFF_SKB_TRANSPORT",
    "OFF_SOCK_STATE",
    "OFF_STATE_MODE",
    "OFF_STATE_HEADER",
];
const NETDEV: &[&str] = &["OFF_NETDEV_NAME", "OFF_NETDEV_NET"];
const STATE: &[&str] = &[
    "OFF_STATE_TARGET",
    "OFF_STATE_SOURCE",
    "OFF_STATE_FAMILY",
    "OFF_STATE_MODE",
    "OFF_STATE_NET",
];

/// Where a packet begins is attached after where it ends, or its end would be taken for another's.
pub(super) const PROGRAMS: &[Program] = &[
    Program::if_there(
        "wireguard_encrypt_return",
        Target::Kretprobe(&["encrypt_packet"]),
    )
    .needing(PACKET),
    Program::if_there("wireguard_encrypt", Target::Kprobe(&["encrypt_packet"])).needing(PACKET),
    Program::if_there(
        "wireguard_decrypt_return",
        Target::Kretprobe(&["decrypt_packet"]),
    )
    .needing(PACKET),
    Program::if_there("wireguard_decrypt", Target::Kprobe(&["decrypt_packet"])).needing(PACKET),
    Program::if_there(
        "wireguard_session_return",
        Target::Kretprobe(&["wg_noise_handshake_begin_session"]),
    )
    .needing(NETDEV),
    Program::if_there(
        "wireguard_session",
        Target::Kprobe(&["wg_noise_handshake_begin_session"]),
    )
    .needing(NETDEV),
    Program::if_there(
        "wireguard_initiation_return",
        Target::Kretprobe(&["wg_noise_handshake_create_initiation"]),
    )
    .needing(NETDEV),
    Program::if_there(
        "wireguard_initiation",
        Target::Kprobe(&["wg_noise_handshake_create_initiation"]),
    )
    .needing(NETDEV),
    Program::if_there(
        "wireguard_complete",
        Target::Kprobe(&["wg_timers_handshake_complete"]),
    )
    .needing(NETDEV),
    Program::if_there(
        "wireguard_expired",
        Target::Kprobe(&["wg_packet_send_queued_handshake_initiation"]),
    )
    .needing(NETDEV),
    Program::if_there(
        "esp_encrypt_return",
        Target::Kretprobe(&["esp_output_tail", "esp6_output_tail"]),
    )
    .needing(ESP),
    Program::if_there(
        "esp_encrypt",
        Target::Kprobe(&["esp_output_tail", "esp6_output_tail"]),
    )
    .needing(ESP),
    Program::if_there(
        "esp_decrypted_return",
        Target::Kretprobe(&["esp_input_done2", "esp6_input_done2"]),
    )
    .needing(ESP),
    Program::if_there(
        "esp_decrypted",
        Target::Kprobe(&["esp_input_done2", "esp6_input_done2"]),
    )
    .needing(ESP),
    Program::if_there("esp_decrypt", Target::Kprobe(&["esp_input", "esp6_input"])).needing(ESP),
    Program::if_there("association_added", Target::Kretprobe(&["xfrm_state_add"])).needing(STATE),
    Program::if_there(
        "association_updated",
        Target::Kretprobe(&["xfrm_state_update"]),
    )
    .needing(STATE),
    Program::if_there(
        "association_deleted",
        Target::Kretprobe(&["__xfrm_state_delete"]),
    )
    .needing(STATE),
    Program::if_there(
        "association",
        Target::Kprobe(&["xfrm_state_add", "xfrm_state_update", "__xfrm_state_delete"]),
    )
    .needing(STATE),
    Program::if_there("association_expired", Target::Kprobe(&["km_state_expired"])).needing(STATE),
];

/// The modules whose functions are hooked, and what each cannot do without.
pub(super) const MODULES: [(&str, &[&str]); 3] = [
    (
        "wireguard",
        &[
            "encrypt_packet",
            "decrypt_packet",
            "wg_noise_handshake_begin_session",
        ],
    ),
    ("esp4", &["esp_output_tail", "esp_input_done2"]),
    ("esp6", &["esp6_output_tail", "esp6_input_done2"]),
];

pub(super) fn resolve(constants: &mut Constants<'_>, kernel: &Kernel, settings: &Settings) {
    for (constant, member) in [
        ("OFF_SKB_HEAD", "head"),
        ("OFF_SKB_DATA", "data"),
        ("OFF_SKB_TAIL", "tail"),
        ("OFF_SKB_LEN", "len"),
        ("OFF_SKB_SOCK", "sk"),
        ("OFF_SKB_NETWORK", "network_header"),
        ("OFF_SKB_TRANSPORT", "transport_header"),
    ] {
        constants.offset(constant, &[("sk_buff", member)]);
    }
    constants.offset("OFF_SOCK_STATE", &[("sock", "__sk_common.skc_state")]);
    constants.socket_cgroup();
    constants.offset("OFF_NETDEV_NAME", &[("net_device", "name")]);
    constants.offset("OFF_NETDEV_NET", &[("net_device", "nd_net.net")]);
    constants.offset("OFF_STATE_TARGET", &[("xfrm_state", "id.daddr")]);
    constants.offset("OFF_STATE_SOURCE", &[("xfrm_state", "props.saddr")]);
    constants.offset("OFF_STATE_FAMILY", &[("xfrm_state", "props.family")]);
    constants.offset("OFF_STATE_MODE", &[("xfrm_state", "props.mode")]);
    constants.offset("OFF_STATE_HEADER", &[("xfrm_state", "props.header_len")]);
    constants.offset("OFF_STATE_NET", &[("xfrm_state", "xs_net.net")]);
    constants.offset("OFF_RUN_DELAY", &[("task_struct", "sched_info.run_delay")]);
    // Debian's 5.10 has no types of modules, and a module may be loaded after the exporter's start. The structs have begun like
    // this on every 64-bit kernel since WireGuard came (5.6 to 7.3; drivers/net/wireguard/{noise,peerlookup,peer,device}.h);
    // where the types can be read, they decide.
    let wireguard = kernel
        .btf
        .as_ref()
        .ok()
        .and_then(|base| Btf::module("wireguard", Arc::clone(base)).ok());
    let of_module = |name: &str, path: &str, usual: u32| {
        let field = wireguard
            .as_ref()
            .and_then(|types| types.field(name, path).ok());
        field.map_or(usual, |field| field.offset)
    };
    constants.set(
        "OFF_HANDSHAKE_PEER",
        of_module("noise_handshake", "entry.peer", 0),
    );
    constants.set(
        "OFF_HANDSHAKE_KEY",
        of_module("noise_handshake", "remote_static", 88),
    );
    constants.set("OFF_PEER_DEVICE", of_module("wg_peer", "device", 0));
    constants.set("OFF_DEVICE_NETDEV", of_module("wg_device", "dev", 0));
    constants.set("SAMPLE", settings.timed_every);
    constants.set("PORT_VXLAN", u32::from(settings.vxlan_port));
    constants.set("PORT_GENEVE", u32::from(settings.geneve_port));
}
