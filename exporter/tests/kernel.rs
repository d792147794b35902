// SPDX-License-Identifier: Apache-2.0
//! The real binary on a real kernel. Needs root, and for most tests a kernel with veth and netem: `make kernel-test`
//! runs all of it in a VM, `make test` what this host can, and one test of each signal in a VM. A test that cannot run here prints
//! why.

use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

mod common;

#[path = "kernel/capabilities.rs"]
mod capabilities;
#[path = "kernel/churn.rs"]
mod churn;
#[path = "kernel/encryption.rs"]
mod encryption;
#[path = "kernel/gpu.rs"]
mod gpu;
#[path = "kernel/nccl.rs"]
mod nccl;
#[path = "kernel/process.rs"]
mod process;
#[path = "kernel/rdma.rs"]
mod rdma;
#[path = "kernel/smoke.rs"]
mod smoke;
#[path = "kernel/tcp.rs"]
mod tcp;
#[path = "kernel/top.rs"]
mod top;

#[path = "common/screen.rs"]
mod screen;

/// Prints why a test is skipped. In the VM nothing may be skipped.
fn skip(why: &str) {
    assert!(!in_vm(), "the VM has to have this: {why}");
    println!("SKIPPED: {why}");
}

/// Says if this is the VM of `make kernel-test`.
fn in_vm() -> bool {
    std::env::var_os("CHANDRA_TEST_VM").is_some()
}

/// The folder of a program that stands in for something, in the VM, where there is no compiler: `tools/kernel-test` has it built outside
/// before, by the tests that are called `stand_ins`.
fn built_outside(folder: PathBuf, program: &str) -> Option<PathBuf> {
    let there = folder.join(program).exists();
    if !there {
        println!("SKIPPED: nothing that a run outside of the VM has built");
    }
    there.then_some(folder)
}

/// Says if durations are held against another measurement of the same. On a machine that has other things to do that fails now and
/// then, so `make kernel-test` does it (`KERNEL=host` for this one) and `make test` does not.
fn compares_durations() -> bool {
    std::env::var_os("CHANDRA_TEST_DURATIONS").is_some()
}

/// Taken by every test: what one does to the kernel, another would count.
fn alone() -> MutexGuard<'static, ()> {
    static KERNEL: Mutex<()> = Mutex::new(());
    KERNEL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says if this process may load programs, and prints why not.
fn can_trace() -> bool {
    let can = common::may_trace();
    if !can {
        skip("needs root and a kernel with BTF");
    }
    can
}

/// Says if this kernel can make the tests' lossy networks, and prints why not.
fn can_lose_packets() -> bool {
    let works = common::succeeds(
        "modprobe -qa sch_netem veth 2>/dev/null; ip netns add chandra-probe && \
         ip -n chandra-probe link add va type veth peer name vb && ip -n chandra-probe link set va up && \
         tc -n chandra-probe qdisc add dev va root netem loss 1%",
    );
    common::succeeds("ip netns del chandra-probe");
    if !works {
        skip("needs root, veth and netem; make kernel-test has them");
    }
    works
}
