// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Which pod's segments are sent again, and why?
//!
//! Hooks: tp_btf `tcp_retransmit_skb`, tp_btf `tcp_retransmit_synack`. Map: `RETRANSMITS` feeds
//! `chandra_tcp_retransmits_total`.
#![no_std]
#![no_main]

use aya_ebpf::{
    helpers::generated::bpf_skc_to_tcp_sock,
    macros::{btf_tracepoint, map},
    maps::HashMap,
    programs::BtfTracePointContext,
};
use exporter_common::tcp::{Kind, Retransmits};
use exporter_ebpf::{
    Counters, Loss, MAX_CGROUPS, constants, entry, load, lose, object, socket_cgroup,
};

object!();

constants!(
    OFF_SOCK_STATE,
    OFF_CA_STATE,
    MASK_CA_STATE,
    OFF_PENDING,
    OFF_SEGMENTS,
    RETRANSMIT_HAS_ERROR,
);

/// By cgroup id. Preallocated, so an event never allocates.
#[map]
static RETRANSMITS: HashMap<u64, Retransmits> = HashMap::with_max_entries(MAX_CGROUPS, 0);

// SAFETY: named for itself, so that the object is the same bytes whatever the crate's hash.
#[unsafe(no_mangle)]
static NONE: Retransmits = Retransmits {
    segments: [0; Kind::LABELS.len()],
};

// include/net/tcp_states.h, include/net/inet_connection_sock.h and include/uapi/linux/tcp.h: part of the ABI or
// unchanged since 3.x.
const TCP_SYN_SENT: u8 = 2;
const TCP_SYN_RECV: u8 = 3;
const TCP_CA_RECOVERY: u8 = 3;
const TCP_CA_LOSS: u8 = 4;
const ICSK_TIME_LOSS_PROBE: u8 = 5;

/// `tcp_retransmit_skb(const struct sock *sk, const struct sk_buff *skb)`, with a third argument `int err` on the
/// newest kernels. Called once for each send by `__tcp_retransmit_skb`, in whatever context the timer or the ACK ran.
#[btf_tracepoint(function = "tcp_retransmit_skb")]
pub fn tcp_retransmit_skb(ctx: BtfTracePointContext) -> i32 {
    // Where the argument exists, sends that failed are traced as well: nothing went to the wire.
    if RETRANSMIT_HAS_ERROR.load() == 1 {
        let error: i32 = ctx.arg(2);
        if error != 0 {
            return 0;
        }
    }
    // SAFETY: the arguments are typed as the tracepoint declares them.
    if let Err(loss) = unsafe { try_tcp_retransmit_skb(ctx.arg(0), ctx.arg(1)) } {
        lose(&LOST, loss);
    }
    0
}

#[inline(always)]
unsafe fn try_tcp_retransmit_skb(sock: *const u8, skb: *const u8) -> Result<(), Loss> {
    // SAFETY: typed pointers of the tracepoint. `OFF_SEGMENTS` is that of `sk_buff.cb` plus that of
    // `tcp_skb_cb.tcp_gso_segs`; the verifier lets `cb` be read as scratch space.
    let segments: u16 = unsafe { load(skb, &OFF_SEGMENTS) };
    // SAFETY: as above.
    unsafe { count(sock, kind(sock), u64::from(segments)) }
}

/// `tcp_retransmit_synack(const struct sock *sk, const struct request_sock *req)`: `sk` is the listener. One SYN-ACK
/// is one segment.
#[btf_tracepoint(function = "tcp_retransmit_synack")]
pub fn tcp_retransmit_synack(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the argument is typed as the tracepoint declares it.
    if let Err(loss) = unsafe { count(ctx.arg(0), Kind::SynAck, 1) } {
        lose(&LOST, loss);
    }
    0
}

/// A probe is told from a fast retransmit by the congestion state first: entering Recovery leaves the probe's timer
/// pending, while a probe is only ever scheduled in Open or CWR (`tcp_schedule_loss_probe`). A probe whose timer was
/// left pending and fires in Recovery counts as fast.
#[inline(always)]
unsafe fn kind(sock: *const u8) -> Kind {
    // SAFETY: `sock` is a typed `struct sock *`.
    match unsafe { load::<u8>(sock, &OFF_SOCK_STATE) } {
        TCP_SYN_SENT => return Kind::Syn,
        TCP_SYN_RECV => return Kind::SynAck,
        _ => {}
    }
    // SAFETY: the helper takes any typed socket and returns a typed `struct tcp_sock *` or null.
    let tcp = unsafe { bpf_skc_to_tcp_sock(sock.cast_mut().cast()) } as *const u8;
    if tcp.is_null() {
        return Kind::Fast;
    }
    // SAFETY: `tcp` is typed.
    let (state, pending) = unsafe {
        (
            load::<u8>(tcp, &OFF_CA_STATE),
            load::<u8>(tcp, &OFF_PENDING),
        )
    };
    match state & MASK_CA_STATE.load() as u8 {
        TCP_CA_LOSS => Kind::Rto,
        TCP_CA_RECOVERY => Kind::Fast,
        _ if pending == ICSK_TIME_LOSS_PROBE => Kind::Probe,
        _ => Kind::Fast,
    }
}

#[inline(always)]
unsafe fn count(sock: *const u8, kind: Kind, segments: u64) -> Result<(), Loss> {
    // SAFETY: the callers pass a typed `struct sock *`.
    let cgroup = unsafe { socket_cgroup(sock) }?;
    let value = entry(&RETRANSMITS, &cgroup, &NONE)?;
    // SAFETY: a map value.
    unsafe { Counters::at(&raw mut (*value).segments) }.add(kind as u64, segments);
    Ok(())
}
