// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//! Whose packets are encrypted and decrypted, what does that cost, and how often are sessions derived?
//!
//! Hooks: kprobes and kretprobes on functions of wireguard, esp4, esp6 and, for security associations, the kernel image.
//! Maps: `FLOWS` feeds the series per pod, `INTERFACES` and `PEERS` those of sessions.
#![no_std]
#![no_main]

mod esp;
mod packet;
mod session;
mod wireguard;
mod work;

use aya_ebpf::{macros::map, maps::HashMap, programs::ProbeContext};
use exporter_common::encryption::{Call, Direction, Flow, MAX_CALLS, Protocol};
use exporter_ebpf::{Loss, Registers, object};

use crate::{
    packet::{Payload, flow},
    work::{chosen, count, run_clock, time},
};

object!();

/// Calls between entry and return, by stack frame.
#[map]
static CALLS: HashMap<u64, Call> = HashMap::with_max_entries(MAX_CALLS, 0);

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
fn enter(ctx: &ProbeContext, function: Function, call: &Call) {
    let frame = Registers::of(ctx).frame() | function as u64;
    exporter_ebpf::enter(&CALLS, &frame, call, &LOST);
}

/// The same for one that is timed.
#[inline(always)]
fn enter_timed(ctx: &ProbeContext, function: Function, call: &Call) {
    let frame = Registers::of(ctx).frame() | function as u64;
    if let Some(call) = exporter_ebpf::enter_timed(&CALLS, &frame, call, &LOST) {
        // SAFETY: a map value that nobody else has before the call returns.
        unsafe { (*call).entered = run_clock() };
    }
}

/// Returns what was noted when the call began.
#[inline(always)]
fn leave(registers: Registers, function: Function) -> Option<Call> {
    let frame = registers.returned_frame() | function as u64;
    exporter_ebpf::leave(&CALLS, &frame)
}

/// A call of which only the object matters.
#[inline(always)]
fn of(object: u64) -> Call {
    Call {
        object,
        entered: 0,
        bytes: 0,
        flow: Flow::nobodys(0, 0),
    }
}

/// Notes a call of which only the object matters.
#[inline(always)]
fn enter_with(ctx: &ProbeContext, function: Function, object: u64) {
    enter(ctx, function, &of(object));
}

/// Counts a packet that is encrypted, and notes the call if it is to be timed.
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
