// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! How often are sessions derived, and with whom?

use aya_ebpf::{
    macros::{kprobe, kretprobe, map},
    maps::HashMap,
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::encryption::{
    INTERFACE_NAME, INTERVAL, Interface, InterfaceKey, MAX_INTERFACES, MAX_PEERS, Peer, PeerKey,
    Protocol, slot,
};
use exporter_ebpf::{Counters, Loss, Registers, add, constants, entry, field, lose, now};

use crate::{Function, LOST, enter_with, leave, packet::mapped};

constants!(
    OFF_NETDEV_NAME,
    OFF_NETDEV_NET,
    OFF_HANDSHAKE_PEER,
    OFF_HANDSHAKE_KEY,
    OFF_PEER_DEVICE,
    OFF_DEVICE_NETDEV,
    OFF_STATE_TARGET,
    OFF_STATE_SOURCE,
    OFF_STATE_FAMILY,
    OFF_STATE_NET,
);

#[map]
static INTERFACES: HashMap<InterfaceKey, Interface> = HashMap::with_max_entries(MAX_INTERFACES, 0);

#[map]
static PEERS: HashMap<PeerKey, Peer> = HashMap::with_max_entries(MAX_PEERS, 0);

// SAFETY: named for itself, so that the object is the same bytes whatever the crate's hash.
#[unsafe(no_mangle)]
static NO_INTERFACE: Interface = Interface {
    slots: [0; slot::ALL],
};

/// `AF_INET`.
const INET: u16 = 2;

/// The counters of an interface.
#[inline(always)]
fn counters(interface: &InterfaceKey) -> Result<Counters<{ slot::ALL }>, Loss> {
    let interface = entry(&INTERFACES, interface, &NO_INTERFACE)?;
    // SAFETY: a map value.
    Ok(unsafe { Counters::at(&raw mut (*interface).slots) })
}

/// Counts a session with a peer, and the time since the last.
#[inline(always)]
fn session(key: &PeerKey) -> Result<(), Loss> {
    let counters = counters(&key.interface)?;
    counters.add(slot::SESSIONS as u64, 1);
    let now = now();
    let zero = Peer {
        sessions: 0,
        last: 0,
    };
    let peer = entry(&PEERS, key, &zero)?;
    // SAFETY: a map value; two sessions with one peer are not derived at once, but for a race of two initiators.
    let last = unsafe {
        let last = (*peer).last;
        (*peer).last = now;
        add(&raw mut (*peer).sessions, 1);
        last
    };
    if last != 0 {
        let interval = now.saturating_sub(last);
        counters.observe(slot::INTERVALS as u64, INTERVAL, interval);
    }
    Ok(())
}

/// The interface of a peer of wireguard, and its network namespace.
#[inline(always)]
fn interface(peer: u64) -> Result<(InterfaceKey, u64), Loss> {
    let device: u64 = field(peer, &OFF_PEER_DEVICE)?;
    let netdev: u64 = field(device, &OFF_DEVICE_NETDEV)?;
    let name: [u8; INTERFACE_NAME] = field(netdev, &OFF_NETDEV_NAME)?;
    let key = InterfaceKey {
        name,
        protocol: Protocol::WireGuard as u64,
    };
    Ok((key, field(netdev, &OFF_NETDEV_NET)?))
}

/// `wg_noise_handshake_begin_session(struct noise_handshake *handshake, struct noise_keypairs *keypairs)`.
#[kprobe]
pub fn wireguard_session(ctx: ProbeContext) -> u32 {
    enter_with(&ctx, Function::Session, Registers::of(&ctx).argument::<0>());
    0
}

/// Returns whether keys were derived.
#[kretprobe]
pub fn wireguard_session_return(ctx: RetProbeContext) -> u32 {
    let registers = Registers::of(&ctx);
    if let Some(call) = leave(registers, Function::Session)
        && registers.returned() as u8 != 0
        && let Err(loss) = wireguard_derived(call.object)
    {
        lose(&LOST, loss);
    }
    0
}

#[inline(always)]
fn wireguard_derived(handshake: u64) -> Result<(), Loss> {
    let (interface, namespace) = interface(field(handshake, &OFF_HANDSHAKE_PEER)?)?;
    let key = PeerKey {
        interface,
        identity: field(handshake, &OFF_HANDSHAKE_KEY)?,
        namespace,
    };
    session(&key)
}

#[inline(always)]
fn handshake(peer: Result<u64, Loss>, event: usize) {
    let counters = peer
        .and_then(interface)
        .and_then(|(interface, _)| counters(&interface));
    match counters {
        Ok(counters) => counters.add((slot::HANDSHAKE + event) as u64, 1),
        Err(loss) => lose(&LOST, loss),
    }
}

/// `wg_noise_handshake_create_initiation(struct message_handshake_initiation *dst, struct noise_handshake *handshake)`.
#[kprobe]
pub fn wireguard_initiation(ctx: ProbeContext) -> u32 {
    enter_with(
        &ctx,
        Function::Initiation,
        Registers::of(&ctx).argument::<1>(),
    );
    0
}

/// Returns whether there is one to send.
#[kretprobe]
pub fn wireguard_initiation_return(ctx: RetProbeContext) -> u32 {
    let registers = Registers::of(&ctx);
    if let Some(call) = leave(registers, Function::Initiation)
        && registers.returned() as u8 != 0
    {
        handshake(field(call.object, &OFF_HANDSHAKE_PEER), 0);
    }
    0
}

/// `wg_timers_handshake_complete(struct wg_peer *peer)`: on both sides.
#[kprobe]
pub fn wireguard_complete(ctx: ProbeContext) -> u32 {
    handshake(Ok(Registers::of(&ctx).argument::<0>()), 1);
    0
}

/// `wg_packet_send_queued_handshake_initiation(struct wg_peer *peer, bool is_retry)`: a retry follows an initiation that
/// nobody answered within 5 s.
#[kprobe]
pub fn wireguard_expired(ctx: ProbeContext) -> u32 {
    let registers = Registers::of(&ctx);
    if registers.argument::<1>() as u8 != 0 {
        handshake(Ok(registers.argument::<0>()), 2);
    }
    0
}

/// The key of all that IPsec does: it has no interface.
const IPSEC: InterfaceKey = InterfaceKey {
    name: [0; INTERFACE_NAME],
    protocol: Protocol::Ipsec as u64,
};

#[inline(always)]
fn associated(state: u64, event: usize) -> Result<(), Loss> {
    counters(&IPSEC)?.add((slot::ASSOCIATION + event) as u64, 1);
    if event > 1 {
        return Ok(());
    }
    let mut key = PeerKey {
        interface: IPSEC,
        identity: [0; 32],
        namespace: field(state, &OFF_STATE_NET)?,
    };
    let v4 = field::<u16>(state, &OFF_STATE_FAMILY)? == INET;
    let source: [u8; 16] = field(state, &OFF_STATE_SOURCE)?;
    let target: [u8; 16] = field(state, &OFF_STATE_TARGET)?;
    for (at, address) in [(0, source), (16, target)] {
        let address = if v4 {
            mapped(address[0], address[1], address[2], address[3])
        } else {
            address
        };
        let mut i = 0;
        while i < 16 {
            key.identity[at + i] = address[i];
            i += 1;
        }
    }
    session(&key)
}

#[inline(always)]
fn association_return(ctx: &RetProbeContext, event: usize) {
    let registers = Registers::of(ctx);
    if let Some(call) = leave(registers, Function::Association)
        && registers.returned() as u32 == 0
        && let Err(loss) = associated(call.object, event)
    {
        lose(&LOST, loss);
    }
}

/// `xfrm_state_add(struct xfrm_state *x)`, `xfrm_state_update(struct xfrm_state *x)` and
/// `__xfrm_state_delete(struct xfrm_state *x)`.
#[kprobe]
pub fn association(ctx: ProbeContext) -> u32 {
    enter_with(
        &ctx,
        Function::Association,
        Registers::of(&ctx).argument::<0>(),
    );
    0
}

/// Returns 0 for one that was not there.
#[kretprobe]
pub fn association_added(ctx: RetProbeContext) -> u32 {
    association_return(&ctx, 0);
    0
}

/// Returns 0 for one that was there.
#[kretprobe]
pub fn association_updated(ctx: RetProbeContext) -> u32 {
    association_return(&ctx, 1);
    0
}

/// Returns 0 for one that was not dead yet.
#[kretprobe]
pub fn association_deleted(ctx: RetProbeContext) -> u32 {
    association_return(&ctx, 2);
    0
}

/// `km_state_expired(struct xfrm_state *x, int hard, u32 portid)`.
#[kprobe]
pub fn association_expired(ctx: ProbeContext) -> u32 {
    let registers = Registers::of(&ctx);
    if registers.argument::<1>() as u32 != 0
        && let Err(loss) = associated(registers.argument::<0>(), 3)
    {
        lose(&LOST, loss);
    }
    0
}
