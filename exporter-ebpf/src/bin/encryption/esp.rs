// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Packets of esp4 and esp6.

use aya_ebpf::{
    macros::{kprobe, kretprobe, map},
    maps::HashMap,
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::encryption::{Direction, MAX_CALLS, Protocol};
use exporter_ebpf::{Loss, Registers, constants, field, lose, read_kernel, remove, thread};

use crate::{
    Function, LOST, encrypted, encrypts, enter_with, leave,
    packet::{Payload, data, flow, length, network, transport},
    work::{chosen, count, run_clock, time},
};

constants!(OFF_STATE_MODE, OFF_STATE_HEADER);

/// ESP packets that are decrypted and timed: by the address of the packet, when and in which thread that began.
#[map]
static DECRYPTING: HashMap<u64, [u64; 2]> = HashMap::with_max_entries(MAX_CALLS, 0);

/// `XFRM_MODE_TUNNEL` (include/uapi/linux/xfrm.h).
const TUNNEL: u8 = 1;

/// `-EINPROGRESS`: the crypto goes on in another thread.
const IN_PROGRESS: u32 = -115_i32 as u32;

/// `esp_output_tail(struct xfrm_state *x, struct sk_buff *skb, struct esp_info *esp)` of esp4, and `esp6_output_tail` of
/// esp6: where the ordinary way (`esp_output`) and that of software offload (`esp_xmit`) meet.
#[kprobe]
pub fn esp_encrypt(ctx: ProbeContext) -> u32 {
    let registers = Registers::of(&ctx);
    let (state, skb, info) = (
        registers.argument::<0>(),
        registers.argument::<1>(),
        registers.argument::<2>(),
    );
    if let Err(loss) = esp_encrypts(&ctx, state, skb, info) {
        lose(&LOST, loss);
    }
    0
}

/// `struct esp_info` (include/net/esp.h, the same from 5.10 to 7.3): what is encrypted, as bytes 16 to 40 tell it
/// (`tfclen`, `tailen`, `plen`, `clen`, `len`, `nfrags`), and its protocol.
const INFO_LENGTHS: u64 = 16;
const INFO_PROTOCOL: u64 = 40;

#[inline(always)]
fn esp_encrypts(ctx: &ProbeContext, state: u64, skb: u64, info: u64) -> Result<(), Loss> {
    let network = network(skb)?;
    // What was put before the plaintext: ESP's header and, in tunnel mode, another IP header. The packet's inner offsets do not
    // tell: in 7.3 they are those of a VXLAN or Geneve packet inside, in 6.18 those of what is encrypted.
    let added = u64::from(field::<u32>(state, &OFF_STATE_HEADER)?);
    if field::<u8>(state, &OFF_STATE_MODE)? == TUNNEL {
        return encrypts(ctx, skb, network + added, None, Protocol::Ipsec);
    }
    let transport = transport(skb)?;
    let [padding, _, trailer, encrypted]: [u32; 4] = read_kernel(info + INFO_LENGTHS)?;
    let length = encrypted.wrapping_sub(trailer).wrapping_sub(padding);
    let payload = Payload {
        protocol: read_kernel(info + INFO_PROTOCOL)?,
        at: transport + added,
        bytes: transport.wrapping_sub(network) + u64::from(length),
    };
    encrypts(ctx, skb, network, Some(payload), Protocol::Ipsec)
}

/// Returns 0, an error, or that another thread goes on with it.
#[kretprobe]
pub fn esp_encrypt_return(ctx: RetProbeContext) -> u32 {
    let end = run_clock();
    let registers = Registers::of(&ctx);
    let timed = if registers.returned() as u32 == IN_PROGRESS {
        leave(registers, Function::Encrypt).map_or(Ok(()), |_| Err(Loss::Untimed))
    } else {
        encrypted(registers, end)
    };
    if let Err(loss) = timed {
        lose(&LOST, loss);
    }
    0
}

/// `esp_input(struct xfrm_state *x, struct sk_buff *skb)` of esp4, and `esp6_input`. What was noted of an earlier packet
/// at the same address goes.
#[kprobe]
pub fn esp_decrypt(ctx: ProbeContext) -> u32 {
    let skb = Registers::of(&ctx).argument::<1>();
    if !chosen() {
        let _ = DECRYPTING.remove(&skb);
        return 0;
    }
    let _ = DECRYPTING.insert(&skb, &[0, thread()], 0);
    if let Some(call) = DECRYPTING.get_ptr_mut(&skb) {
        // SAFETY: a map value that nobody else has before the packet is decrypted.
        unsafe { (*call)[0] = run_clock() };
    } else {
        lose(&LOST, Loss::MapFull);
    }
    0
}

/// `esp_input_done2(struct sk_buff *skb, int err)` of esp4, and `esp6_input_done2`: within `esp_input`, or later, when
/// another thread has decrypted.
#[kprobe]
pub fn esp_decrypted(ctx: ProbeContext) -> u32 {
    enter_with(&ctx, Function::Decrypt, Registers::of(&ctx).argument::<0>());
    0
}

/// Returns the protocol of what was encrypted, or an error.
#[kretprobe]
pub fn esp_decrypted_return(ctx: RetProbeContext) -> u32 {
    let end = run_clock();
    let registers = Registers::of(&ctx);
    if let Some(call) = leave(registers, Function::Decrypt) {
        let protocol = registers.returned() as i32;
        let began = remove(&DECRYPTING, &call.object);
        if protocol > 0
            && let Err(loss) = esp_is_decrypted(call.object, protocol, began, end)
        {
            lose(&LOST, loss);
        }
    }
    0
}

#[inline(always)]
fn esp_is_decrypted(
    skb: u64,
    protocol: i32,
    began: Option<[u64; 2]>,
    end: u64,
) -> Result<(), Loss> {
    let data = data(skb)?;
    // IPPROTO_IPIP and IPPROTO_IPV6: tunnel mode, the packet begins with the header that was encrypted. Else the payload was; the
    // IP header is before it, and the transport header lies as far before the payload as the IP header is long.
    let (at, payload) = if protocol == 4 || protocol == 41 {
        (data, None)
    } else {
        let header = data.wrapping_sub(transport(skb)?);
        let payload = Payload {
            protocol: protocol as u8,
            at: data,
            bytes: header + u64::from(length(skb)?),
        };
        (network(skb)?, Some(payload))
    };
    let (flow, bytes) = flow(skb, at, payload, Protocol::Ipsec, Direction::Decrypt)?;
    count(&flow, bytes)?;
    match began {
        Some([began, in_thread]) if in_thread == thread() => time(&flow, bytes, began, end),
        // Between the two it waited for another thread: no CPU time.
        Some(_) => Err(Loss::Untimed),
        None => Ok(()),
    }
}
