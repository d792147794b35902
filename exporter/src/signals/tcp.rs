// SPDX-License-Identifier: Apache-2.0
//! Which pod's segments are sent again, and why?
//!
//! Hooks: tp_btf `tcp_retransmit_skb`, tp_btf `tcp_retransmit_synack`. Metric: `chandra_tcp_retransmits_total`.
//!
//! Counted are segments, as RetransSegs of `/proc/net/snmp` counts them, less the sends that the kernel itself refused
//! (no route, a full local queue): RetransSegs includes those. The owner is the cgroup in which the socket was made, or
//! its listener was; the task that happens to run is mostly a bystander.

use aya::{
    include_bytes_aligned,
    maps::{HashMap, MapData},
};
use exporter_common::tcp::{Kind, Retransmits};

use super::{Attempt, Entry, Options, Read, Scope, Signal};
use crate::{
    capabilities::{BPF, PERFMON},
    families::{self, Desc, Families},
    hook::{Program, Target},
    kernel::Kernel,
    ledger::{Attribution, Ledger},
    pods::Labels,
    probe::{self, Attached, Constants, Health},
};

/// The signal.
pub const ENTRY: Entry = Entry {
    name: "tcp",
    question: "Which pod's segments are sent again, and why?",
    descs: &[&RETRANSMITS],
    objects: &[OBJECT],
    needs: &[BPF, PERFMON],
    attach,
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("CHANDRA_EBPF_OBJECTS"), "/tcp.o"));

/// How many kinds of retransmit there are.
pub const KINDS: usize = Kind::LABELS.len();

pub(crate) static RETRANSMITS: Desc = Desc {
    name: "chandra_tcp_retransmits_total",
    kind: families::Kind::Counter,
    help: "TCP segments that were sent again.",
    per_pod: true,
    labels: &["kind"],
    values: &[("kind", &["syn", "synack", "rto", "fast", "probe"])],
    source: "tracepoints tcp:tcp_retransmit_skb (tcp_gso_segs of the skb) and tcp:tcp_retransmit_synack; the owner is the socket's cgroup",
};

const PROGRAMS: &[Program] = &[
    Program::required("tcp_retransmit_skb", Target::TpBtf).needing(&[
        "OFF_SOCK_STATE",
        "OFF_CA_STATE",
        "OFF_PENDING",
        "OFF_SEGMENTS",
    ]),
    Program::wanted("tcp_retransmit_synack", Target::TpBtf),
];

fn attach(kernel: &Kernel, options: &Options) -> Attempt {
    Attempt::of(
        probe::attach(OBJECT, PROGRAMS, kernel.types(), resolve, kernel),
        |mut attached| {
            let retransmits = attached.map("RETRANSMITS")?;
            Ok(Box::new(Tcp {
                attached,
                retransmits,
                ledger: Ledger::new(options.max_owners, |kinds| kinds.iter().sum()),
            }))
        },
    )
}

fn resolve(constants: &mut Constants<'_>) {
    constants.offset("OFF_SOCK_STATE", &[("sock", "__sk_common.skc_state")]);
    constants.offset("OFF_PENDING", &[("tcp_sock", "inet_conn.icsk_pending")]);
    constants.offset(
        "OFF_SEGMENTS",
        &[("sk_buff", "cb"), ("tcp_skb_cb", "tcp_gso_segs")],
    );
    // A bit field of a width that has changed over the years, in the low bits of its byte.
    let state = constants.btf().map_err(str::to_owned).and_then(|types| {
        let field = types.field("tcp_sock", "inet_conn.icsk_ca_state");
        field.map_err(|error| error.to_string())
    });
    match state {
        Ok(field) => match field.bit {
            Some((0, width)) if width < 8 => {
                constants.set("OFF_CA_STATE", field.offset);
                constants.set("MASK_CA_STATE", (1 << width) - 1);
            }
            other => constants.lack(
                "OFF_CA_STATE",
                format!("icsk_ca_state is not a field of low bits: {other:?}"),
            ),
        },
        Err(why) => constants.lack("OFF_CA_STATE", why),
    }
    // The third argument, `err`, exists on the newest kernels only.
    let has_error = constants.btf().is_ok_and(|types| {
        types
            .tracepoint_arguments("tcp_retransmit_skb")
            .is_some_and(|count| count > 2)
    });
    constants.set("RETRANSMIT_HAS_ERROR", u32::from(has_error));
    constants.socket_cgroup();
}

struct Tcp {
    attached: Attached,
    retransmits: HashMap<MapData, u64, Retransmits>,
    ledger: Ledger<u64, KINDS>,
}

impl Signal for Tcp {
    fn read(&mut self, scope: &Scope<'_>) -> anyhow::Result<Read> {
        scope.book(&mut self.ledger, &mut self.retransmits, |value| {
            value.segments
        })
    }

    fn render(&self, families: &mut Families) {
        render(self.ledger.accounts(), families);
    }

    fn attribution(&self) -> Attribution {
        self.ledger.attribution()
    }

    fn health(&self) -> anyhow::Result<Health> {
        self.attached.health()
    }
}

/// Renders accounts of segments by kind.
pub fn render<'a>(
    accounts: impl IntoIterator<Item = (Labels, &'a [u64; KINDS])>,
    families: &mut Families,
) {
    for (labels, segments) in accounts {
        for ((_, kind), count) in Kind::LABELS.iter().zip(segments) {
            let labels = [&*labels.namespace, &*labels.pod, &*labels.container, kind];
            families.add(&RETRANSMITS, &labels, *count as f64);
        }
    }
}
