// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Packets of wireguard.

use aya_ebpf::{
    macros::{kprobe, kretprobe},
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::encryption::{Call, Direction, Protocol};
use exporter_ebpf::{Loss, Registers, lose};

use crate::{
    Function, LOST, encrypted, encrypts, enter, enter_timed, leave, of,
    packet::{data, flow, length, network},
    work::{chosen, count, run_clock, time},
};

/// `encrypt_packet(struct sk_buff *skb, struct noise_keypair *keypair)` of wireguard: every packet of a device, in the
/// worker of a CPU. A keepalive has no length.
#[kprobe]
pub fn wireguard_encrypt(ctx: ProbeContext) -> u32 {
    let skb = Registers::of(&ctx).argument::<0>();
    if let Err(loss) = wireguard_encrypts(&ctx, skb) {
        lose(&LOST, loss);
    }
    0
}

#[inline(always)]
fn wireguard_encrypts(ctx: &ProbeContext, skb: u64) -> Result<(), Loss> {
    if length(skb)? == 0 {
        return Ok(());
    }
    encrypts(ctx, skb, network(skb)?, None, Protocol::WireGuard)
}

/// Returns whether it could.
#[kretprobe]
pub fn wireguard_encrypt_return(ctx: RetProbeContext) -> u32 {
    let end = run_clock();
    if let Err(loss) = encrypted(Registers::of(&ctx), end) {
        lose(&LOST, loss);
    }
    0
}

/// `decrypt_packet(struct sk_buff *skb, struct noise_keypair *keypair)` of wireguard, in the worker of a CPU.
#[kprobe]
pub fn wireguard_decrypt(ctx: ProbeContext) -> u32 {
    let call = of(Registers::of(&ctx).argument::<0>());
    if chosen() {
        enter_timed(&ctx, Function::Decrypt, &call);
    } else {
        enter(&ctx, Function::Decrypt, &call);
    }
    0
}

/// Returns whether it was authentic. The packet then begins with the header that was encrypted; a keepalive is empty.
#[kretprobe]
pub fn wireguard_decrypt_return(ctx: RetProbeContext) -> u32 {
    let end = run_clock();
    let registers = Registers::of(&ctx);
    if let Some(call) = leave(registers, Function::Decrypt)
        && registers.returned() as u8 != 0
        && let Err(loss) = wireguard_decrypted(&call, end)
    {
        lose(&LOST, loss);
    }
    0
}

#[inline(always)]
fn wireguard_decrypted(call: &Call, end: u64) -> Result<(), Loss> {
    let skb = call.object;
    if length(skb)? == 0 {
        return Ok(());
    }
    let (flow, bytes) = flow(
        skb,
        data(skb)?,
        None,
        Protocol::WireGuard,
        Direction::Decrypt,
    )?;
    count(&flow, bytes)?;
    if call.entered != 0 {
        time(&flow, bytes, call.entered, end)?;
    }
    Ok(())
}
