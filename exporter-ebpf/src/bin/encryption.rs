// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Whose packets are encrypted and decrypted, what does that cost, and how often are sessions derived?
//!
//! Hooks: kprobes and kretprobes on functions of wireguard, esp4, esp6 and, for security associations, the kernel image.
//! Maps: `FLOWS` feeds the series per pod, `INTERFACES` and `PEERS` those of sessions.
//!
//! Every packet is counted; one in `SAMPLE` on each CPU is timed from entry to return.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_current_task, bpf_ktime_get_ns, bpf_probe_read_kernel,
    },
    macros::{kprobe, kretprobe, map},
    maps::{HashMap, PerCpuArray, PerCpuHashMap},
    programs::{ProbeContext, RetProbeContext},
};
use exporter_common::encryption::{
    CALLS as MAX_CALLS, Call, Direction, FLOWS as MAX_FLOWS, Flow, INTERFACE_NAME,
    INTERFACES as MAX_INTERFACES, INTERVAL, Interface, InterfaceKey, KNOWN as MAX_KNOWN,
    PEERS as MAX_PEERS, Peer, PeerKey, Protocol, STRANGERS as MAX_STRANGERS, Work, slot,
};
use exporter_ebpf::{
    ABSENT, Loss, NO_CGROUP, Registers, add, constants, entry, lose, object, probed_socket_cgroup,
    unknown,
};

object!();

constants!(
    OFF_SKB_HEAD,
    OFF_SKB_DATA,
    OFF_SKB_TAIL,
    OFF_SKB_LEN,
    OFF_SKB_SOCK,
    OFF_SKB_NETWORK,
    OFF_SKB_TRANSPORT,
    OFF_SOCK_STATE,
    OFF_NETDEV_NAME,
    OFF_NETDEV_NET,
    OFF_HANDSHAKE_PEER,
    OFF_HANDSHAKE_KEY,
    OFF_PEER_DEVICE,
    OFF_DEVICE_NETDEV,
    OFF_STATE_TARGET,
    OFF_STATE_SOURCE,
    OFF_STATE_FAMILY,
    OFF_STATE_MODE,
    OFF_STATE_HEADER,
    OFF_STATE_NET,
    OFF_RUN_DELAY,
    SAMPLE,
    PORT_VXLAN,
    PORT_GENEVE,
);

/// By owner, protocol and direction.
#[map]
static FLOWS: PerCpuHashMap<Flow, Work> = PerCpuHashMap::with_max_entries(MAX_FLOWS, 0);

/// The same of addresses that are not in `KNOWN`.
#[map]
static STRANGERS: PerCpuHashMap<Flow, Work> = PerCpuHashMap::with_max_entries(MAX_STRANGERS, 0);

/// The addresses of pods and of the node, which user space tells.
#[map]
static KNOWN: HashMap<[u8; 16], u32> = HashMap::with_max_entries(MAX_KNOWN, 0);

/// Packets that this CPU has seen, to choose those that are timed.
#[map]
static SEEN: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Calls between entry and return, by stack frame.
#[map]
static CALLS: HashMap<u64, Call> = HashMap::with_max_entries(MAX_CALLS, 0);

/// ESP packets that are decrypted and timed: by the address of the packet, when and in which thread that began.
#[map]
static DECRYPTING: HashMap<u64, [u64; 2]> = HashMap::with_max_entries(MAX_CALLS, 0);

#[map]
static INTERFACES: HashMap<InterfaceKey, Interface> = HashMap::with_max_entries(MAX_INTERFACES, 0);

#[map]
static PEERS: HashMap<PeerKey, Peer> = HashMap::with_max_entries(MAX_PEERS, 0);

// SAFETY: named for itself, so that the object is the same bytes whatever the crate's hash.
#[unsafe(no_mangle)]
static NO_INTERFACE: Interface = Interface {
    slots: [0; slot::ALL],
};

const NO_WORK: Work = Work {
    packets: 0,
    bytes: 0,
    timed_bytes: 0,
    timed_nanoseconds: 0,
};

/// `IPPROTO_UDP`.
const UDP: u8 = 17;

/// `XFRM_MODE_TUNNEL` (include/uapi/linux/xfrm.h).
const TUNNEL: u8 = 1;

/// `AF_INET`.
const INET: u16 = 2;

/// `TCP_TIME_WAIT` and `TCP_NEW_SYN_RECV` (include/net/tcp_states.h): sockets that are only the head of one.
const TIME_WAIT: u8 = 6;
const NEW_SYN_RECV: u8 = 12;

/// `-EINPROGRESS`: the crypto goes on in another thread.
const IN_PROGRESS: u32 = -115_i32 as u32;

/// Reads kernel memory behind a pointer of which the verifier knows nothing.
#[inline(always)]
fn read<T: Copy>(address: u64) -> Result<T, Loss> {
    // SAFETY: the helper checks the address and copies.
    unsafe { bpf_probe_read_kernel(address as *const T) }.map_err(|_| Loss::Unreadable)
}

/// Reads a field of an object of the kernel.
#[inline(always)]
fn field<T: Copy>(object: u64, offset: &aya_ebpf::Global<u32>) -> Result<T, Loss> {
    read(object + u64::from(offset.load()))
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper takes no arguments.
    unsafe { bpf_ktime_get_ns() }
}

/// CLOCK_MONOTONIC in nanoseconds, less what this thread has waited for a CPU since it began: between two readings in a
/// thread lies what it ran, and interrupts. Kernels that preempt in the kernel (6.18 does, lazily) take the CPU from WireGuard's
/// workers in the middle of a packet. No thread switch is within a softirq.
#[inline(always)]
fn run_clock() -> u64 {
    let now = now();
    if OFF_RUN_DELAY.load() == ABSENT {
        return now;
    }
    // SAFETY: the helper takes no arguments.
    let task = unsafe { bpf_get_current_task() };
    now.wrapping_sub(field(task, &OFF_RUN_DELAY).unwrap_or(0))
}

/// What an IP header says.
#[derive(Clone, Copy)]
struct Header {
    source: [u8; 16],
    target: [u8; 16],
    /// Bytes of the whole packet.
    bytes: u64,
    protocol: u8,
    /// Where the payload begins.
    payload: u64,
}

/// An IPv4 address as `::ffff:a.b.c.d`.
#[inline(always)]
fn mapped(a: u8, b: u8, c: u8, d: u8) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// Reads the IP header at an address, of which it and its payload lie before `end`.
#[inline(always)]
fn header(at: u64, end: u64) -> Option<Header> {
    if at + 20 > end {
        return None;
    }
    let b: [u8; 20] = read(at).ok()?;
    if b[0] >> 4 == 4 {
        return Some(Header {
            source: mapped(b[12], b[13], b[14], b[15]),
            target: mapped(b[16], b[17], b[18], b[19]),
            bytes: u64::from(b[2]) << 8 | u64::from(b[3]),
            protocol: b[9],
            payload: at + u64::from(b[0] & 15) * 4,
        });
    }
    if b[0] >> 4 != 6 || at + 40 > end {
        return None;
    }
    Some(Header {
        source: read(at + 8).ok()?,
        target: read(at + 24).ok()?,
        bytes: 40 + (u64::from(b[4]) << 8 | u64::from(b[5])),
        protocol: b[6],
        payload: at + 40,
    })
}

/// Looks through VXLAN and Geneve: the header of the packet inside, or the one that was given. `None` where there is one
/// inside that cannot be read.
#[inline(always)]
fn innermost(outer: Header, end: u64) -> Option<Header> {
    if outer.protocol != UDP || outer.payload + 16 > end {
        return Some(outer);
    }
    // Source and destination port, length, checksum; then eight bytes of VXLAN or Geneve.
    let b: [u8; 16] = read(outer.payload).ok()?;
    let port = u32::from(b[2]) << 8 | u32::from(b[3]);
    let options = if port == PORT_VXLAN.load() {
        0
    } else if port == PORT_GENEVE.load() {
        u64::from(b[8] & 0x3f) * 4
    } else {
        return Some(outer);
    };
    let frame = outer.payload + 16 + options;
    if frame + 14 > end {
        return None;
    }
    let kind: [u8; 2] = read(frame + 12).ok()?;
    match kind {
        [0x08, 0x00] | [0x86, 0xdd] => header(frame + 14, end),
        // ARP and the like are the nodes' own.
        _ => Some(outer),
    }
}

/// Returns the cgroup of the socket that a packet was sent from. [`NO_CGROUP`] where there is none any more.
#[inline(always)]
fn sender(skb: u64) -> Result<u64, Loss> {
    let sock: u64 = field(skb, &OFF_SKB_SOCK)?;
    if sock == 0 {
        return Ok(NO_CGROUP);
    }
    let state: u8 = field(sock, &OFF_SOCK_STATE)?;
    if state == TIME_WAIT || state == NEW_SYN_RECV {
        return Ok(NO_CGROUP);
    }
    // SAFETY: a packet holds its socket, and this one is whole.
    unsafe { probed_socket_cgroup(sock as *const u8) }
}

/// What ESP in transport mode encrypts: the payload of a packet whose IP header speaks of ESP.
#[derive(Clone, Copy)]
struct Payload {
    /// What the IP header says without encryption.
    protocol: u8,
    at: u64,
    /// Bytes of the packet without encryption.
    bytes: u64,
}

/// Whose packet it is, and its bytes. `at` is where its IP header begins.
#[inline(always)]
fn flow(
    skb: u64,
    at: u64,
    payload: Option<Payload>,
    protocol: Protocol,
    direction: Direction,
) -> Result<(Flow, u64), Loss> {
    let head: u64 = field(skb, &OFF_SKB_HEAD)?;
    let tail: u32 = field(skb, &OFF_SKB_TAIL)?;
    let end = head + u64::from(tail);
    let mut flow = Flow {
        address: [0; 16],
        cgroup: NO_CGROUP,
        protocol: protocol as u32,
        direction: direction as u32,
    };
    let bytes = match header(at, end) {
        Some(mut outer) => {
            if let Some(payload) = payload {
                outer.protocol = payload.protocol;
                outer.payload = payload.at;
                outer.bytes = payload.bytes;
            }
            if let Some(inner) = innermost(outer, end) {
                flow.address = match direction {
                    Direction::Encrypt => inner.source,
                    Direction::Decrypt => inner.target,
                };
            }
            outer.bytes
        }
        // Not in the linear part, or no IP: counted for nobody.
        None => u64::from(field::<u32>(skb, &OFF_SKB_LEN)?),
    };
    if matches!(direction, Direction::Encrypt) {
        flow.cgroup = sender(skb)?;
        if flow.cgroup != NO_CGROUP {
            flow.address = [0; 16];
        }
    }
    Ok((flow, bytes))
}

/// Where the packets of a flow are counted: where there is no room for it, among those that are nobody's.
#[inline(always)]
fn work(flow: &Flow) -> Result<*mut Work, Loss> {
    if let Some(work) = FLOWS.get_ptr_mut(flow) {
        return Ok(work);
    }
    let is_known = flow.cgroup != NO_CGROUP || KNOWN.get_ptr(&flow.address).is_some();
    let own = if is_known {
        entry_of(&FLOWS, flow)
    } else {
        STRANGERS
            .get_ptr_mut(flow)
            .or_else(|| entry_of(&STRANGERS, flow))
    };
    or_nobodys(own, flow)
}

/// Where there is nothing of a flow: what is nobody's.
#[inline(always)]
fn or_nobodys(own: Option<*mut Work>, flow: &Flow) -> Result<*mut Work, Loss> {
    let nobodys = Flow::nobodys(flow.protocol, flow.direction);
    own.or_else(|| FLOWS.get_ptr_mut(&nobodys))
        .ok_or(Loss::MapFull)
}

#[inline(always)]
fn entry_of(map: &PerCpuHashMap<Flow, Work>, flow: &Flow) -> Option<*mut Work> {
    let _ = map.insert(flow, &NO_WORK, u64::from(BPF_NOEXIST));
    map.get_ptr_mut(flow)
}

/// Counts a packet. A softirq may interrupt this program on its CPU, so the additions are atomic.
#[inline(always)]
fn count(flow: &Flow, bytes: u64) -> Result<(), Loss> {
    let work = work(flow)?;
    // SAFETY: a map value.
    unsafe {
        add(&raw mut (*work).packets, 1);
        add(&raw mut (*work).bytes, bytes);
    }
    Ok(())
}

/// What took longer than this was no work on a packet: the return of an earlier call in the same frame was not seen, or
/// interrupts came without end.
const LONGEST: u64 = 100_000_000;

/// Books the time that a packet took.
#[inline(always)]
fn time(flow: &Flow, bytes: u64, began: u64, end: u64) -> Result<(), Loss> {
    let nanoseconds = end.wrapping_sub(began);
    if nanoseconds > LONGEST {
        return Err(Loss::Untimed);
    }
    // Where its packet was counted, or as nobody's.
    let own = FLOWS
        .get_ptr_mut(flow)
        .or_else(|| STRANGERS.get_ptr_mut(flow));
    let work = or_nobodys(own, flow)?;
    // SAFETY: a map value.
    unsafe {
        add(&raw mut (*work).timed_bytes, bytes);
        add(&raw mut (*work).timed_nanoseconds, nanoseconds);
    }
    Ok(())
}

/// Says if this packet is one that is timed.
#[inline(always)]
fn chosen() -> bool {
    let Some(seen) = SEEN.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: a map value of this CPU; a softirq in between chooses a packet more or less.
    let number = unsafe {
        *seen += 1;
        *seen
    };
    let sample = u64::from(SAMPLE.load());
    sample != 0 && number % sample == 0
}

/// Which function a call is of, in the low bits of its frame's address, which is aligned.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Function {
    Encrypt = 0,
    Decrypt = 1,
    Session = 2,
    Initiation = 3,
    Association = 4,
}

/// Notes that a call has begun.
#[inline(always)]
fn enter(ctx: &ProbeContext, function: Function, call: &Call) -> u64 {
    let key = Registers::of(ctx).frame() | function as u64;
    if CALLS.insert(&key, call, u64::from(BPF_NOEXIST)).is_err() {
        // An earlier call had this frame, and its return was not seen; or there is no room.
        let loss = if CALLS.insert(&key, call, 0).is_ok() {
            Loss::MissedReturn
        } else {
            Loss::MapFull
        };
        lose(&LOST, loss);
    }
    key
}

/// The same for one that is timed. The clock is read last: what is done here is not the packet's.
#[inline(always)]
fn enter_timed(ctx: &ProbeContext, function: Function, call: &Call) {
    let key = enter(ctx, function, call);
    if let Some(call) = CALLS.get_ptr_mut(&key) {
        // SAFETY: a map value that nobody else has before the call returns.
        unsafe { (*call).entered = run_clock() };
    }
}

/// Returns what was noted when the call began. `None` for one that was not to be followed.
#[inline(always)]
fn leave(registers: Registers, function: Function) -> Option<Call> {
    let key = registers.returned_frame() | function as u64;
    let call = CALLS.get_ptr(&key)?;
    // SAFETY: a value of a preallocated map: its memory lives as long as the program runs.
    let call = unsafe { *call };
    let _ = CALLS.remove(&key);
    Some(call)
}

const NO_FLOW: Flow = Flow {
    address: [0; 16],
    cgroup: NO_CGROUP,
    protocol: 0,
    direction: 0,
};

/// Notes a call of which only the object matters.
#[inline(always)]
fn enter_with(ctx: &ProbeContext, function: Function, object: u64) {
    let call = Call {
        object,
        entered: 0,
        bytes: 0,
        flow: NO_FLOW,
    };
    enter(ctx, function, &call);
}

#[inline(always)]
fn encrypts(
    ctx: &ProbeContext,
    skb: u64,
    at: u64,
    payload: Option<Payload>,
    protocol: Protocol,
) -> Result<(), Loss> {
    let (flow, bytes) = flow(skb, at, payload, protocol, Direction::Encrypt)?;
    count(&flow, bytes)?;
    if chosen() {
        let call = Call {
            object: skb,
            entered: 0,
            bytes,
            flow,
        };
        enter_timed(ctx, Function::Encrypt, &call);
    }
    Ok(())
}

/// Books the time of an encryption that returns, if it was timed.
#[inline(always)]
fn encrypted(registers: Registers, end: u64) -> Result<(), Loss> {
    let Some(call) = leave(registers, Function::Encrypt) else {
        return Ok(());
    };
    time(&call.flow, call.bytes, call.entered, end)
}

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
    if field::<u32>(skb, &OFF_SKB_LEN)? == 0 {
        return Ok(());
    }
    let head: u64 = field(skb, &OFF_SKB_HEAD)?;
    let network: u16 = field(skb, &OFF_SKB_NETWORK)?;
    encrypts(
        ctx,
        skb,
        head + u64::from(network),
        None,
        Protocol::WireGuard,
    )
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
    let call = Call {
        object: Registers::of(&ctx).argument::<0>(),
        entered: 0,
        bytes: 0,
        flow: NO_FLOW,
    };
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
    if field::<u32>(skb, &OFF_SKB_LEN)? == 0 {
        return Ok(());
    }
    let data: u64 = field(skb, &OFF_SKB_DATA)?;
    let (flow, bytes) = flow(skb, data, None, Protocol::WireGuard, Direction::Decrypt)?;
    count(&flow, bytes)?;
    if call.entered != 0 {
        time(&flow, bytes, call.entered, end)?;
    }
    Ok(())
}

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
    let head: u64 = field(skb, &OFF_SKB_HEAD)?;
    let network: u16 = field(skb, &OFF_SKB_NETWORK)?;
    let network = head + u64::from(network);
    // What was put before the plaintext: ESP's header and, in tunnel mode, another IP header. The packet's inner offsets do not
    // tell: in 7.3 they are those of a VXLAN or Geneve packet inside, in 6.18 those of what is encrypted.
    let added = u64::from(field::<u32>(state, &OFF_STATE_HEADER)?);
    if field::<u8>(state, &OFF_STATE_MODE)? == TUNNEL {
        return encrypts(ctx, skb, network + added, None, Protocol::Ipsec);
    }
    let transport: u16 = field(skb, &OFF_SKB_TRANSPORT)?;
    let transport = head + u64::from(transport);
    let [padding, _, trailer, encrypted]: [u32; 4] = read(info + INFO_LENGTHS)?;
    let length = encrypted.wrapping_sub(trailer).wrapping_sub(padding);
    let payload = Payload {
        protocol: read(info + INFO_PROTOCOL)?,
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
    let _ = DECRYPTING.insert(&skb, &[0, bpf_get_current_pid_tgid()], 0);
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
        let began = DECRYPTING.get_ptr(&call.object);
        // SAFETY: a value of a preallocated map.
        let began = began.map(|began| unsafe { *began });
        if began.is_some() {
            let _ = DECRYPTING.remove(&call.object);
        }
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
    let data: u64 = field(skb, &OFF_SKB_DATA)?;
    // IPPROTO_IPIP and IPPROTO_IPV6: tunnel mode, the packet begins with the header that was encrypted. Else the payload was; the
    // IP header is before it, and the transport header lies as far before the payload as the IP header is long.
    let (at, payload) = if protocol == 4 || protocol == 41 {
        (data, None)
    } else {
        let head: u64 = field(skb, &OFF_SKB_HEAD)?;
        let network: u16 = field(skb, &OFF_SKB_NETWORK)?;
        let transport: u16 = field(skb, &OFF_SKB_TRANSPORT)?;
        let header = data.wrapping_sub(head + u64::from(transport));
        let payload = Payload {
            protocol: protocol as u8,
            at: data,
            bytes: header + u64::from(field::<u32>(skb, &OFF_SKB_LEN)?),
        };
        (head + u64::from(network), Some(payload))
    };
    let (flow, bytes) = flow(skb, at, payload, Protocol::Ipsec, Direction::Decrypt)?;
    count(&flow, bytes)?;
    match began {
        Some([began, thread]) if thread == bpf_get_current_pid_tgid() => {
            time(&flow, bytes, began, end)
        }
        // Between the two it waited for another thread: no CPU time.
        Some(_) => Err(Loss::Untimed),
        None => Ok(()),
    }
}

/// Adds to a counter of an interface.
#[inline(always)]
fn count_on(interface: &InterfaceKey, slot: usize, by: u64) -> Result<(), Loss> {
    let counters: *mut u64 = entry(&INTERFACES, interface, &NO_INTERFACE)?.cast();
    let slot = unknown(slot as u64);
    if slot < slot::ALL as u64 {
        // SAFETY: below the end of the map value.
        unsafe { add(counters.add(slot as usize), by) };
    }
    Ok(())
}

/// Counts a session with a peer, and the time since the last.
#[inline(always)]
fn session(key: &PeerKey) -> Result<(), Loss> {
    count_on(&key.interface, slot::SESSIONS, 1)?;
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
        count_on(
            &key.interface,
            slot::INTERVALS + INTERVAL.bucket(interval),
            1,
        )?;
        count_on(&key.interface, slot::INTERVALS + INTERVAL.sum(), interval)?;
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
    let counted = peer
        .and_then(interface)
        .and_then(|(interface, _)| count_on(&interface, slot::HANDSHAKE + event, 1));
    if let Err(loss) = counted {
        lose(&LOST, loss);
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
    count_on(&IPSEC, slot::ASSOCIATION + event, 1)?;
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
