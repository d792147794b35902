// SPDX-License-Identifier: Apache-2.0
//! Retransmits on demand, and what one of them takes from the CPU.
//!
//! Two network namespaces, joined by a veth pair, live as long as this process does: each is held by a `cat` that ends
//! with its standard input. Segments are sent to a permanent neighbour entry with a hardware address that nobody has, so
//! they cross the pair and are dropped at its far end, and the kernel's own timers send them again.
//!
//! The load runs in this same program, started again as `overhead load …` on one CPU under SCHED_FIFO. Between the
//! timers' softirqs it spins on the clock: a jump of the clock during which RetransSegs grew is a batch of retransmits.

use std::{
    env, fs,
    future::Future,
    io::{self, BufRead, BufReader, Read, Write},
    net::{self, SocketAddr},
    path::{Path, PathBuf},
    pin::Pin,
    process::{Child, Command, Stdio},
    task::{Context, Waker},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::net::{TcpSocket, TcpStream};

use crate::common::{cgroup_root, run, succeeds};

/// Sockets of one load.
const SOCKETS: usize = 3000;

/// Timers of a second expire in steps of 8 jiffies, 32 ms at 250 Hz (kernel/time/timer.c). Sockets opened in step make
/// batches that are all alike, and short enough (2 ms) for one softirq to finish.
const STEP: Duration = Duration::from_millis(32);

/// Sockets opened in one step; all of them within a second.
const PER_STEP: usize = SOCKETS / 30;

/// Shortest jump of the clock that is looked at. The tick alone takes 2 to 10 µs.
const JUMP: Duration = Duration::from_micros(20);

/// Fewest retransmits that make a batch: in a smaller one the tick's own work shows.
const BATCH: u64 = 10;

const NEAR: &str = "10.79.0.1";
const FAR: &str = "10.79.0.2";
const FAR_HARDWARE: &str = "02:00:00:00:00:02";
/// An address of the far side's network that nobody has.
const NOBODY: &str = "10.79.0.9";
/// A hardware address that nobody has.
const NOWHERE: &str = "02:00:00:00:00:09";

/// What makes TCP send again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// Connects that nobody answers.
    Syn,
    /// Established connections whose peer becomes unreachable with one segment in flight: a tail loss probe, then
    /// time-outs.
    Rto,
    /// Half-open connections whose client is gone.
    SynAck,
}

impl Load {
    /// Every load.
    pub(crate) const ALL: [Self; 3] = [Self::Syn, Self::Rto, Self::SynAck];

    fn argument(self) -> &'static str {
        match self {
            Self::Syn => "syn",
            Self::Rto => "rto",
            Self::SynAck => "synack",
        }
    }
}

/// Seconds since the boot, to a hundredth: the same for every process, and never set back.
pub(crate) fn uptime() -> f64 {
    let text = fs::read_to_string("/proc/uptime").expect("procfs");
    let seconds = text.split(' ').next().and_then(|text| text.parse().ok());
    seconds.expect("two numbers")
}

/// A batch of retransmits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch {
    /// When it was over, by [`uptime`].
    pub(crate) at: f64,
    /// Nanoseconds per retransmit.
    pub(crate) cost: f64,
}

/// The two network namespaces.
pub(crate) struct Lab {
    near: Holder,
    far: Holder,
    cpu: usize,
}

struct Holder(Child);

impl Holder {
    fn new() -> Option<Self> {
        let mut child = Command::new("unshare")
            .args(["--net", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let own = fs::read_link("/proc/self/ns/net").ok()?;
        let theirs = format!("/proc/{}/ns/net", child.id());
        for _ in 0..500 {
            thread::sleep(Duration::from_millis(10));
            if fs::read_link(&theirs).is_ok_and(|theirs| theirs != own) {
                return Some(Self(child));
            }
            if child.try_wait().ok()?.is_some() {
                return None;
            }
        }
        None
    }

    fn enter(&self) -> String {
        format!("nsenter --net=/proc/{}/ns/net", self.0.id())
    }

    fn counters(&self) -> String {
        format!("/proc/{}/net/snmp", self.0.id())
    }

    /// This program once more, inside.
    fn again(&self, through: &[&str], work: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/proc/{}/ns/net", self.0.id()))
            .args(through)
            .arg(env::current_exe().expect("a path"))
            .arg("load")
            .args(work);
        command
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

impl Lab {
    /// Makes the namespaces, or says what this host lacks.
    pub(crate) fn new() -> Result<Self, &'static str> {
        for tool in ["ip", "unshare", "nsenter", "taskset", "chrt"] {
            if !succeeds(&format!("command -v {tool}")) {
                return Err("needs iproute2 and util-linux (ip, unshare, nsenter, taskset, chrt)");
            }
        }
        let (Some(near), Some(far)) = (Holder::new(), Holder::new()) else {
            return Err("cannot make network namespaces");
        };
        let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        let last = online.trim().rsplit([',', '-']).next();
        let lab = Self {
            cpu: last.and_then(|cpu| cpu.parse().ok()).unwrap_or(0),
            near,
            far,
        };
        let (near, far, pid) = (lab.near.enter(), lab.far.enter(), lab.far.0.id());
        if !succeeds(&format!(
            "{near} ip link add near type veth peer name far address {FAR_HARDWARE} netns {pid}"
        )) {
            return Err("this kernel has no veth");
        }
        run(&format!(
            "{near} ip addr add {NEAR}/24 dev near; {near} ip link set near up; {near} ip link set lo up
             {far} ip addr add {FAR}/24 dev far; {far} ip link set far up; {far} ip link set lo up
             {near} ip neigh add {NOBODY} lladdr {NOWHERE} dev near nud permanent
             {near} sysctl -qw net.core.somaxconn=65535 net.ipv4.tcp_max_syn_backlog=65535
             {near} sysctl -qw net.ipv4.tcp_syn_retries=100 net.ipv4.tcp_retries2=100
             {near} sysctl -qw net.ipv4.tcp_synack_retries=2"
        ));
        if !succeeds(&format!("{near} sysctl -qw net.ipv4.tcp_rto_max_ms=1000")) {
            return Err("needs net.ipv4.tcp_rto_max_ms (Linux 6.15) to send again every second");
        }
        Ok(lab)
    }

    /// Starts a load and waits until all of its sockets are open.
    pub(crate) fn start(&self, load: Load) -> Running {
        let (server, client, address) = match load {
            Load::Syn => (None, &self.near, format!("{NOBODY}:81")),
            Load::Rto => {
                self.aim(FAR_HARDWARE);
                (Some(&self.far), &self.near, format!("{FAR}:81"))
            }
            Load::SynAck => {
                self.aim(NOWHERE);
                (Some(&self.near), &self.far, format!("{NEAR}:81"))
            }
        };
        let server = server.map(|side| Server::start(side, &address));
        let (cpu, counters) = (self.cpu.to_string(), self.near.counters());
        let work = [load.argument(), &address, &counters];
        let mut child = client
            .again(&["taskset", "-c", &cpu, "chrt", "-f", "1"], &work)
            .stdout(Stdio::piped())
            .spawn()
            .expect("nsenter");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let open = lines.next();
        assert!(matches!(open, Some(Ok(_))), "the load {load:?} failed");
        let batches = thread::spawn(move || lines.map_while(|line| batch(&line.ok()?)).collect());
        Running {
            child,
            batches: Some(batches),
            _server: server,
        }
    }

    /// Starts a connection that nobody answers from every cgroup.
    pub(crate) fn knock_from(&self, cgroups: &[PathBuf]) -> Knocking {
        let work = ["knock", &format!("{NOBODY}:81")];
        let mut child = self
            .near
            .again(&[], &work)
            .stdin(Stdio::piped())
            .spawn()
            .expect("nsenter");
        let stdin = child.stdin.as_mut().expect("piped");
        for cgroup in cgroups {
            writeln!(stdin, "{}", cgroup.display()).expect("it reads");
        }
        writeln!(stdin).expect("it reads");
        Knocking(child)
    }

    /// Tells the near side where the far one is.
    fn aim(&self, hardware: &str) {
        let near = self.near.enter();
        run(&format!(
            "{near} ip neigh replace {FAR} lladdr {hardware} dev near nud permanent"
        ));
    }
}

/// A load at work. Killed when dropped; the kernel then closes its sockets.
pub(crate) struct Running {
    child: Child,
    batches: Option<JoinHandle<Vec<Batch>>>,
    _server: Option<Server>,
}

impl Running {
    /// Ends it, and returns what it measured.
    pub(crate) fn stop(mut self) -> Vec<Batch> {
        assert!(
            self.child.try_wait().is_ok_and(|ended| ended.is_none()),
            "the load ended early"
        );
        let _ = self.child.kill();
        let batches = self.batches.take().expect("it stops once");
        batches.join().expect("no panic")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn batch(line: &str) -> Option<Batch> {
    let (at, cost) = line.split_once(' ')?;
    Some(Batch {
        at: at.parse().ok()?,
        cost: cost.parse().ok()?,
    })
}

/// Connections that nobody answers, until dropped.
pub(crate) struct Knocking(Child);

impl Drop for Knocking {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// A listener in one of the namespaces.
struct Server(Child);

impl Server {
    fn start(side: &Holder, address: &str) -> Self {
        let mut child = side
            .again(&[], &["listen", address])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("nsenter");
        let mut ready = [0];
        let stdout = child.stdout.as_mut().expect("piped");
        stdout.read_exact(&mut ready).expect("it listens");
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// RetransSegs in a copy of `/proc/net/snmp`.
fn retransmits(counters: &Path) -> u64 {
    let text = fs::read_to_string(counters).expect("procfs");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let mut pairs = names.split(' ').zip(values.split(' '));
    let (_, value) = pairs
        .find(|(name, _)| *name == "RetransSegs")
        .expect("every kernel counts them");
    value.parse().expect("a counter")
}

/// The part of this program that runs inside of the namespaces: `load WORK ADDRESS [COUNTERS]`.
pub(crate) fn work(args: &[String]) {
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(1 << 16),
            maximum: Some(1 << 16),
        },
    );
    let address: SocketAddr = args[1].parse().expect("ADDRESS:PORT");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .expect("a runtime");
    // Sockets are made and polled by hand: nothing may run beside the spinning.
    let _inside = runtime.enter();
    match args[0].as_str() {
        "listen" => listen(address),
        "knock" => knock_from_each(address),
        "syn" => {
            let mut knocks = Vec::new();
            in_steps(|_| knocks.push(knock(address)));
            meter(Path::new(&args[2]), || {});
        }
        "synack" => meter(Path::new(&args[2]), || {
            // A client that closes in SYN-SENT sends nothing, so the server is left with its half of the connection.
            (0..PER_STEP).for_each(|_| drop(knock(address)));
        }),
        "rto" => {
            let mut streams: Vec<_> = (0..SOCKETS).map(|_| open(address)).collect();
            run(&format!(
                "ip neigh replace {FAR} lladdr {NOWHERE} dev near nud permanent"
            ));
            in_steps(|i| streams[i].write_all(&[1]).expect("room for a byte"));
            meter(Path::new(&args[2]), || {});
        }
        other => panic!("unknown work {other}"),
    }
}

type Knock = Pin<Box<dyn Future<Output = io::Result<TcpStream>>>>;

/// Sends a SYN and does not wait for the answer.
fn knock(address: SocketAddr) -> Knock {
    let mut knock: Knock = Box::pin(TcpStream::connect(address));
    let sent = knock.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(sent.is_pending(), "the connect was answered or refused");
    knock
}

fn open(address: SocketAddr) -> net::TcpStream {
    let stream = net::TcpStream::connect(address).expect("the far side answers");
    stream.set_nonblocking(true).expect("a socket");
    let stream = TcpStream::from_std(stream).expect("a socket");
    // The close sends a reset instead of a FIN that would be sent again for minutes.
    stream.set_zero_linger().expect("a socket");
    stream.into_std().expect("a socket")
}

/// Does something for each socket, spread over a second.
fn in_steps(mut work: impl FnMut(usize)) {
    let begin = Instant::now();
    for i in 0..SOCKETS {
        if i % PER_STEP == 0 {
            let step = begin + STEP * (i / PER_STEP) as u32;
            thread::sleep(step.saturating_duration_since(Instant::now()));
        }
        work(i);
    }
}

/// Holds what connects, until standard input ends.
fn listen(address: SocketAddr) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("a socket");
    socket.bind(address).expect("an address of this side");
    // Requests are pruned once they fill half of the backlog (net/ipv4/inet_connection_sock.c, reqsk_timer_handler).
    let listener = socket.listen(1 << 16).and_then(|all| all.into_std());
    let listener = listener.expect("a listener");
    listener.set_nonblocking(false).expect("a listener");
    println!();
    thread::spawn(move || {
        let mut held = Vec::new();
        loop {
            held.push(listener.accept());
        }
    });
    let _ = io::stdin().read(&mut [0]);
}

/// Knocks from every cgroup that standard input names up to an empty line, until it ends.
fn knock_from_each(address: SocketAddr) {
    let mut knocks = Vec::new();
    let mut lines = io::stdin().lines().map_while(Result::ok);
    for cgroup in lines.by_ref().take_while(|line| !line.is_empty()) {
        fs::write(Path::new(&cgroup).join("cgroup.procs"), "0").expect("a cgroup");
        knocks.push(knock(address));
    }
    // A cgroup with a process in it cannot be removed.
    fs::write(cgroup_root().join("cgroup.procs"), "0").expect("the root");
    lines.for_each(drop);
}

/// Spins on the clock and prints each batch of retransmits, until this process is killed. Does some work in each step.
fn meter(counters: &Path, mut work: impl FnMut()) {
    let look = || {
        let schedstat = fs::read_to_string("/proc/thread-self/schedstat").expect("procfs");
        let turns = schedstat.split_whitespace().nth(2).map(str::to_owned);
        (retransmits(counters), turns.expect("three numbers"))
    };
    println!("open");
    loop {
        work();
        let (mut count, mut turn) = look();
        let mut last = Instant::now();
        let end = last + STEP;
        while last < end {
            let now = Instant::now();
            let jump = now - last;
            last = now;
            if jump < JUMP {
                continue;
            }
            let before = (count, turn);
            (count, turn) = look();
            let sent = count - before.0;
            // Another turn on the CPU: the jump was not the softirq's alone.
            if turn == before.1 && sent >= BATCH {
                println!("{} {}", uptime(), jump.as_nanos() as f64 / sent as f64);
            }
            last = Instant::now();
        }
    }
}
