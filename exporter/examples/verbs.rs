// SPDX-License-Identifier: Apache-2.0
//! Queue pairs for the tests, made over `/dev/infiniband/uverbs*` without a library (the write interface of
//! `include/uapi/rdma/ib_user_verbs.h`), so that a test knows to the last one what was done.
//!
//! usage: `verbs DEVICE churn PAIRS PER_SECOND THREADS` makes each pair UD, takes it to RTS and destroys it;
//!        `verbs DEVICE hold PAIRS [COMMAND…]` takes pairs to RTS in a thread that ends, then runs COMMAND, which inherits
//!        the device, and ends at once; without COMMAND it waits to be killed;
//!        `verbs DEVICE register BYTES TIMES` registers memory;
//!        `verbs DEVICE fail ADDRESS` connects an RC pair to an IPv4 address where nobody answers, sends, and waits to be
//!        killed: the device gives up after its retries (rxe only).
//!        `verbs DEVICE drain PAIRS ADDRESS` takes RC pairs from RTS to SQD, which makes the device report that each is drained;
//!        `verbs DEVICE time PAIRS` does as `churn` does, and prints what a create, a modify and a destroy took: the lower
//!        quartile of each, in nanoseconds.
//! It prints `ready` once everything is made.

#![expect(clippy::print_stdout, reason = "a tool of the tests")]

use std::{
    env,
    fs::{File, OpenOptions},
    io::{self, Write},
    net::Ipv4Addr,
    os::unix::fs::FileExt,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const GET_CONTEXT: u32 = 0;
const ALLOC_PD: u32 = 3;
const REG_MR: u32 = 9;
const DEREG_MR: u32 = 13;
const CREATE_CQ: u32 = 18;
const CREATE_QP: u32 = 24;
const MODIFY_QP: u32 = 26;
const DESTROY_QP: u32 = 27;
const POST_SEND: u32 = 28;

const RC: u8 = 2;
const UD: u8 = 4;
const INIT: u8 = 1;
const RTR: u8 = 2;
const RTS: u8 = 3;
const SQD: u8 = 4;

/// The bits of `enum ib_qp_attr_mask` that the transitions need.
const STATE: u32 = 1;
const EN_SQD_ASYNC_NOTIFY: u32 = 1 << 2;
const ACCESS_FLAGS: u32 = 1 << 3;
const PKEY_INDEX: u32 = 1 << 4;
const PORT: u32 = 1 << 5;
const QKEY: u32 = 1 << 6;
const AV: u32 = 1 << 7;
const PATH_MTU: u32 = 1 << 8;
const TIMEOUT: u32 = 1 << 9;
const RETRY_CNT: u32 = 1 << 10;
const RNR_RETRY: u32 = 1 << 11;
const RQ_PSN: u32 = 1 << 12;
const MAX_QP_RD_ATOMIC: u32 = 1 << 13;
const MIN_RNR_TIMER: u32 = 1 << 15;
const SQ_PSN: u32 = 1 << 16;
const MAX_DEST_RD_ATOMIC: u32 = 1 << 17;
const DEST_QPN: u32 = 1 << 20;

use memmap2::MmapOptions;

/// An open device.
struct Device {
    file: File,
    pd: u32,
    cq: u32,
}

/// Where the kernel writes an answer, behind the compiler's back.
type Answer = [AtomicU32; 64];

fn answer() -> Box<Answer> {
    Box::new([const { AtomicU32::new(0) }; 64])
}

fn word(answer: &Answer, index: usize) -> u32 {
    answer[index].load(Ordering::SeqCst)
}

/// Sends a command whose body begins with the address of the answer where `answer` is given.
fn command(
    mut file: &File,
    code: u32,
    answer: Option<&Answer>,
    answer_bytes: usize,
    body: &[u8],
) -> io::Result<()> {
    let mut bytes = vec![0; 8];
    if let Some(answer) = answer {
        bytes.extend((answer.as_ptr() as u64).to_ne_bytes());
    }
    bytes.extend(body);
    let words = u16::try_from(bytes.len() / 4).expect("a short command");
    bytes[0..4].copy_from_slice(&code.to_ne_bytes());
    bytes[4..6].copy_from_slice(&words.to_ne_bytes());
    bytes[6..8].copy_from_slice(&((answer_bytes / 4) as u16).to_ne_bytes());
    file.write_all(&bytes)
}

fn words(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect()
}

impl Device {
    fn open(path: &str) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let said = answer();
        command(&file, GET_CONTEXT, Some(&said), 8, &[])?;
        command(&file, ALLOC_PD, Some(&said), 4, &[])?;
        let pd = word(&said, 0);
        // user_handle, cqe, comp_vector, comp_channel (none), reserved; rxe answers with 16 bytes of its own.
        let body = words(&[0, 0, 16, 0, u32::MAX, 0]);
        command(&file, CREATE_CQ, Some(&said), 8 + 16, &body)?;
        let cq = word(&said, 0);
        Ok(Self { file, pd, cq })
    }

    /// Creates a UD queue pair, and returns its handle.
    fn create(&self) -> io::Result<u32> {
        let said = self.create_of(UD)?;
        Ok(word(&said, 0))
    }

    /// Creates a queue pair, and returns the kernel's answer.
    fn create_of(&self, kind: u8) -> io::Result<Box<Answer>> {
        let said = answer();
        let mut body = words(&[0, 0, self.pd, self.cq, self.cq, 0, 1, 1, 1, 1, 0]);
        body.extend([0, kind, 0, 0]);
        // rxe answers with 32 bytes of its own.
        command(&self.file, CREATE_QP, Some(&said), 32 + 32, &body)?;
        Ok(said)
    }

    fn modify(&self, pair: u32, state: u8, mask: u32, to: Ipv4Addr) -> io::Result<()> {
        // The address: dgid, flow_label, dlid, sgid_index (the one of IPv4), hop_limit, is_global, port_num.
        let mut body = Vec::from(to.to_ipv6_mapped().octets());
        body.extend([0, 0, 0, 0, 0, 0, 0, 0, 1, 64, 0, 0, 0, 0, 1, 1]);
        body.extend([0; 32]);
        // qp_handle, attr_mask, qkey, rq_psn, sq_psn, dest_qp_num, qp_access_flags, both pkey indexes.
        body.extend(words(&[pair, mask | STATE, 0x1111_1111, 0, 0, 17, 0, 0]));
        // Then path_mtu (1024), en_sqd_async_notify, min_rnr_timer, port_num, timeout (4 ms), retry_cnt, rnr_retry.
        body.extend([state, 0, 3, 0, 1, 1, 1, 12, 1, 10, 2, 2, 0, 0, 0, 0]);
        command(&self.file, MODIFY_QP, None, 0, &body)
    }

    fn connect(&self, pair: u32) -> io::Result<()> {
        let nobody = Ipv4Addr::UNSPECIFIED;
        self.modify(pair, INIT, PKEY_INDEX | PORT | QKEY, nobody)?;
        self.modify(pair, RTR, 0, nobody)?;
        self.modify(pair, RTS, SQ_PSN, nobody)
    }

    /// Connects an RC pair to nobody, and returns the kernel's answer to its creation.
    fn connect_to(&self, to: Ipv4Addr) -> io::Result<Box<Answer>> {
        let said = self.create_of(RC)?;
        let pair = word(&said, 0);
        self.modify(pair, INIT, PKEY_INDEX | PORT | ACCESS_FLAGS, to)?;
        let mask = AV | PATH_MTU | DEST_QPN | RQ_PSN | MAX_DEST_RD_ATOMIC | MIN_RNR_TIMER;
        self.modify(pair, RTR, mask, to)?;
        let mask = SQ_PSN | TIMEOUT | RETRY_CNT | RNR_RETRY | MAX_QP_RD_ATOMIC;
        self.modify(pair, RTS, mask, to)?;
        Ok(said)
    }

    /// Connects an RC pair to nobody, and sends an empty message there.
    fn fail(&self, to: Ipv4Addr) -> io::Result<()> {
        let said = self.connect_to(to)?;
        let pair = word(&said, 0);
        // rxe's answer ends with where the send queue is to be mapped: offset and size.
        let offset = u64::from(word(&said, 12)) | u64::from(word(&said, 13)) << 32;
        let queue = MmapOptions::new()
            .offset(offset)
            .len(word(&said, 14) as usize)
            .map_raw(&self.file)?;
        // `struct rxe_queue_buf` of include/uapi/rdma/rdma_user_rxe.h: entries from byte 384, the producer's index at 128.
        // An entry of zeros but for opcode IB_WR_SEND, IB_SEND_SIGNALED and the first sequence number is an empty message.
        let memory = OpenOptions::new().write(true).open("/proc/self/mem")?;
        let at = queue.as_mut_ptr() as u64;
        memory.write_all_at(&2_u32.to_ne_bytes(), at + 384 + 12)?;
        memory.write_all_at(&2_u32.to_ne_bytes(), at + 384 + 16)?;
        memory.write_all_at(&1_u32.to_ne_bytes(), at + 128)?;
        // The doorbell: no work request by the command itself.
        let doorbell = words(&[pair, 0, 0, 128]);
        command(&self.file, POST_SEND, Some(&answer()), 4, &doorbell)
    }

    fn destroy(&self, pair: u32) -> io::Result<()> {
        command(
            &self.file,
            DESTROY_QP,
            Some(&answer()),
            4,
            &words(&[pair, 0]),
        )
    }

    fn register(&self, memory: &[u8]) -> io::Result<()> {
        let said = answer();
        let address = (memory.as_ptr() as u64).to_ne_bytes();
        let mut body = Vec::from(address);
        body.extend((memory.len() as u64).to_ne_bytes());
        body.extend(address);
        // IB_ACCESS_LOCAL_WRITE.
        body.extend(words(&[self.pd, 1]));
        command(&self.file, REG_MR, Some(&said), 12, &body)?;
        command(&self.file, DEREG_MR, None, 0, &words(&[word(&said, 0)]))
    }
}

fn number(text: Option<&String>) -> usize {
    text.and_then(|text| text.parse().ok())
        .expect("usage: see the source")
}

fn churn(device: &Arc<Device>, pairs: usize, per_second: usize, threads: usize) {
    let began = Instant::now();
    let work = |thread: usize| {
        let device = Arc::clone(device);
        move || {
            for i in (thread..pairs).step_by(threads) {
                let due = Duration::from_secs(1) * i as u32 / per_second as u32;
                thread::sleep(due.saturating_sub(began.elapsed()));
                let pair = device.create().expect("create");
                device.connect(pair).expect("connect");
                device.destroy(pair).expect("destroy");
            }
        }
    };
    let running: Vec<_> = (0..threads).map(|i| thread::spawn(work(i))).collect();
    for thread in running {
        thread.join().expect("it ends");
    }
    let took = began.elapsed();
    println!("{pairs} pairs in {:.1} s", took.as_secs_f64());
}

fn time(device: &Device, pairs: usize) -> io::Result<()> {
    let mut took = [const { Vec::new() }; 3];
    let mut timed = |operation: usize, began: Instant| {
        took[operation].push(began.elapsed().as_nanos());
    };
    for _ in 0..pairs {
        let began = Instant::now();
        let pair = device.create()?;
        timed(0, began);
        let nobody = Ipv4Addr::UNSPECIFIED;
        for (state, mask) in [(INIT, PKEY_INDEX | PORT | QKEY), (RTR, 0), (RTS, SQ_PSN)] {
            let began = Instant::now();
            device.modify(pair, state, mask, nobody)?;
            timed(1, began);
        }
        let began = Instant::now();
        device.destroy(pair)?;
        timed(2, began);
    }
    let quartiles = took.map(|mut times| {
        times.sort_unstable();
        times[times.len() / 4].to_string()
    });
    println!("{}", quartiles.join(" "));
    Ok(())
}

#[expect(
    clippy::zombie_processes,
    reason = "the command is to outlive this process"
)]
fn hold(device: &Arc<Device>, pairs: usize, then: &[String]) {
    let of_thread = Arc::clone(device);
    let make = move || {
        for _ in 0..pairs {
            let pair = of_thread.create().expect("create");
            of_thread.connect(pair).expect("connect");
        }
    };
    thread::spawn(make).join().expect("it ends");
    println!("ready");
    let Some((program, arguments)) = then.split_first() else {
        thread::sleep(Duration::from_secs(3600));
        return;
    };
    rustix::io::fcntl_setfd(&device.file, rustix::io::FdFlags::empty()).expect("a descriptor");
    let error = Command::new(program).args(arguments).spawn();
    error.expect("the command runs");
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let device = Arc::new(Device::open(&arguments[0]).expect("a device"));
    match arguments[1].as_str() {
        "churn" => churn(
            &device,
            number(arguments.get(2)),
            number(arguments.get(3)),
            number(arguments.get(4)),
        ),
        "hold" => hold(&device, number(arguments.get(2)), &arguments[3..]),
        "register" => {
            let memory = vec![1; number(arguments.get(2))];
            for _ in 0..number(arguments.get(3)) {
                device.register(&memory).expect("register");
            }
            println!("ready");
        }
        "drain" => {
            let to = arguments[3].parse().expect("an address");
            for _ in 0..number(arguments.get(2)) {
                let said = device.connect_to(to).expect("connect");
                let pair = word(&said, 0);
                let drained = device.modify(pair, SQD, EN_SQD_ASYNC_NOTIFY, to);
                drained.expect("drain");
            }
            println!("ready");
            thread::sleep(Duration::from_secs(3600));
        }
        "time" => time(&device, number(arguments.get(2))).expect("queue pairs"),
        "fail" => {
            let to = arguments[2].parse().expect("an address");
            device.fail(to).expect("a message that nobody takes");
            println!("ready");
            thread::sleep(Duration::from_secs(3600));
        }
        other => panic!("no command {other}: see the source"),
    }
}
