// SPDX-License-Identifier: Apache-2.0
//! What a process of a container can do to the exporter: the real binary beside real attacks, on this kernel. `docs/security.md` names these
//! tests. They need root and a C compiler; each prints what it saw.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Lines, Write},
    net::TcpStream,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use common::{
    Exporter, Pod, Scrape, build, cgroup_root, may_trace, run, skip, succeeds, write_pods,
};
use inotify::{Inotify, WatchMask};

mod common;

/// Taken by every test: each looks at all processes of this host.
fn alone() -> MutexGuard<'static, ()> {
    static HOST: Mutex<()> = Mutex::new(());
    HOST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a page may take. A machine that has other things to do is given more.
fn soon() -> Duration {
    let strict = std::env::var_os("CHANDRA_TEST_DURATIONS").is_some();
    Duration::from_secs(if strict { 1 } else { 10 })
}

/// Bytes that the exporter and its helper may have resident, and files that it may have open.
const RESIDENT: u64 = 96 << 20;
const OPEN: usize = 512;

/// The programs of tests/hostile, and the stand-in for NCCL.
struct Programs {
    folder: PathBuf,
    library: PathBuf,
}

fn programs() -> Option<Programs> {
    if !may_trace() {
        skip("needs root and a kernel with BTF");
        return None;
    }
    if !succeeds("cc --version") {
        skip("needs a C compiler");
        return None;
    }
    let package = env!("CARGO_MANIFEST_DIR");
    let folder = build().join("hostile");
    run(&format!(
        "mkdir -p {folder}
                  for program in attack silent forge; do
             cc -O2 -Wall -Wextra -Werror -o {folder}/$program {package}/tests/hostile/$program.c -ldl -pthread
         done
         cc -O2 -Wall -Wextra -Werror -fPIC -shared -DLIBRARY -o {folder}/libnccl-forge.so {package}/tests/hostile/forge.c
         {package}/../tests/nccl-sim/build {folder}/nccl",
        folder = folder.display()
    ));
    let library = folder.join("nccl/libnccl.so.2");
    Some(Programs { folder, library })
}

/// A process that does harm. Its end is that of its input.
struct Attack {
    child: Child,
    input: Option<ChildStdin>,
    output: Lines<BufReader<ChildStdout>>,
    said: Vec<String>,
}

impl Attack {
    /// Starts a program and waits for a line.
    fn start(program: &Path, arguments: &[&str], until: &str) -> Self {
        let mut command = Command::new(program);
        command.args(arguments);
        Self::start_by(command, until)
    }

    fn start_by(mut command: Command, until: &str) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut attack = Self {
            child,
            input,
            output,
            said: Vec::new(),
        };
        attack.hear(until);
        attack
    }

    /// Waits until it says a line.
    fn hear(&mut self, until: &str) {
        for line in self.output.by_ref().map_while(Result::ok) {
            let done = line.starts_with(until);
            self.said.push(line);
            if done {
                return;
            }
        }
        panic!("it said {:?}, and not {until}", self.said);
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.input.as_ref().expect("piped"), "{line}").expect("it listens");
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

impl Programs {
    fn attack(&self, arguments: &[&str]) -> Attack {
        Attack::start(&self.folder.join("attack"), arguments, "ready")
    }
}

/// Bytes resident of a process and of those that it started, and how many files it has open.
fn held(exporter: &Exporter) -> (u64, usize) {
    let pid = exporter.child.id();
    let children = run(&format!(
        "cat /proc/{pid}/task/*/children 2>/dev/null || true"
    ));
    let resident = |pid: &str| -> u64 {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kilobytes.unwrap_or_default() << 10
    };
    let own = pid.to_string();
    let all = children.split_whitespace().chain([&*own]);
    let open = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    (all.map(resident).sum(), open)
}

/// Watches the exporter for a while: its pages come in time and are whole, and it holds little.
fn keeps_well(exporter: &Exporter, seconds: u64) {
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut slowest, mut resident, mut open) = (Duration::ZERO, 0, 0);
    while Instant::now() < end {
        let begin = Instant::now();
        let scrape = exporter.scrape();
        slowest = slowest.max(begin.elapsed());
        let states = scrape.sum("chandra_signal_state", &[]);
        assert_eq!(states, 5.0, "{}", scrape.text);
        let up = [("signal", "tcp"), ("state", "up")];
        assert_eq!(
            scrape.sum("chandra_signal_state", &up),
            1.0,
            "{}",
            scrape.text
        );
        exporter.get("/livez");
        exporter.get("/readyz");
        let now = held(exporter);
        (resident, open) = (resident.max(now.0), open.max(now.1));
        thread::sleep(Duration::from_millis(50));
    }
    println!(
        "the slowest page took {slowest:?}; {} MiB resident, {open} files open at most",
        resident >> 20
    );
    assert!(slowest < soon(), "{slowest:?}");
    assert!(resident < RESIDENT, "{resident}");
    assert!(open < OPEN, "{open}");
}

/// Ends it, and says how long that took.
fn ends(exporter: &mut Exporter, within: u64) {
    let (status, took) = exporter.stop("TERM");
    println!("ended in {took:?}");
    assert!(status.success(), "{status}");
    let strict = std::env::var_os("CHANDRA_TEST_DURATIONS").is_some();
    let within = if strict { within } else { within * 6 };
    assert!(took < Duration::from_secs(within), "{took:?}");
}

fn start() -> Exporter {
    Exporter::start(&["--pods", "none", "--web.show-paths"])
}

fn skipped(exporter: &Exporter, reason: &str) {
    exporter.scrape_until(&format!("something is skipped: {reason}"), |scrape| {
        let labels = [("signal", "nccl"), ("reason", reason)];
        scrape.sum("chandra_libraries_skipped_total", &labels) > 0.0
    });
}

/// Waits until the page for people has a text.
fn page_says(exporter: &Exporter, text: &str) {
    exporter.page_until(&format!("it says {text:?}"), |page| page.contains(text));
}

fn is_probed(exporter: &Exporter) {
    exporter.until_attached("nccl", "ncclEnqueueCheck");
}

#[test]
fn mappings_without_end_are_cut() {
    let _alone = alone();
    let Some(programs) = programs() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let place = folder.path().to_str().expect("UTF-8");
    let attack = programs.attack(&["mappings", place, "65000", "3500"]);
    println!("{:?}", attack.said);
    let mut exporter = start();
    skipped(&exporter, "mappings");
    keeps_well(&exporter, 5);
    page_says(&exporter, "more mappings or files than are read");
    ends(&mut exporter, 5);
}

#[test]
fn a_file_with_many_names_is_one() {
    let _alone = alone();
    let Some(programs) = programs() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let place = folder.path().to_str().expect("UTF-8");
    let library = programs.library.to_str().expect("UTF-8");
    let _attack = programs.attack(&["links", place, "20000", library]);
    let mut exporter = start();
    is_probed(&exporter);
    keeps_well(&exporter, 5);
    ends(&mut exporter, 5);
}

#[test]
fn files_without_number_take_their_share_and_no_more() {
    let _alone = alone();
    let Some(programs) = programs() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let library = programs.library.to_str().expect("UTF-8");
    let good = folder.path().join("good");
    let bad = folder.path().join("bad");
    let _attack = programs.attack(&["files", good.to_str().expect("UTF-8"), "500", library]);
    // What is no library at all.
    let text = folder.path().join("text");
    fs::write(&text, vec![b'x'; 4096]).expect("written");
    let text = text.to_str().expect("UTF-8");
    let _more = programs.attack(&["files", bad.to_str().expect("UTF-8"), "2000", text]);
    let mut exporter = start();
    is_probed(&exporter);
    exporter.scrape_until("what has no room is said", |scrape| {
        scrape.has("chandra_hook_info", "reason=\"no_room\"")
    });
    skipped(&exporter, "files");
    keeps_well(&exporter, 5);
    page_says(&exporter, "of one pod that are probed at once");
    ends(&mut exporter, 30);
}

#[test]
fn files_that_come_and_go_do_not_hold_up_a_page() {
    let _alone = alone();
    let Some(programs) = programs() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let place = folder.path().to_str().expect("UTF-8");
    let library = programs.library.to_str().expect("UTF-8");
    let _attack = programs.attack(&["churn", place, library]);
    let mut exporter = start();
    is_probed(&exporter);
    keeps_well(&exporter, 10);
    ends(&mut exporter, 30);
}

/// Where an ELF file has its table of sections, and of each its kind.
fn sections(file: &[u8]) -> Vec<(usize, u32)> {
    let number = |at: usize, bytes: usize| {
        let bytes = file[at..at + bytes].iter().rev();
        bytes.fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let (table, count) = (number(0x28, 8) as usize, number(0x3c, 2) as usize);
    let places = (0..count).map(|index| table + 64 * index);
    places.map(|at| (at, number(at + 4, 4) as u32)).collect()
}

/// Copies of the library that are spoilt: what is done to the sections of a kind.
fn spoil(library: &Path, to: &Path, kind: u32, offset: Option<u64>, size: u64, file_size: u64) {
    let mut bytes = fs::read(library).expect("built");
    for (at, _) in sections(&bytes).into_iter().filter(|(_, of)| *of == kind) {
        if let Some(offset) = offset {
            bytes[at + 24..at + 32].copy_from_slice(&offset.to_le_bytes());
        }
        bytes[at + 32..at + 40].copy_from_slice(&size.to_le_bytes());
    }
    fs::write(to, &bytes).expect("written");
    let file = File::options().write(true).open(to).expect("there");
    if file_size > 0 {
        file.set_len(file_size).expect("sparse");
    }
}

#[test]
fn what_a_file_says_of_itself_is_not_believed() {
    const SYMTAB: u32 = 2;
    const STRTAB: u32 = 3;
    const NOTE: u32 = 7;
    const DYNSYM: u32 = 11;
    let _alone = alone();
    let Some(programs) = programs() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let place = |name: &str| {
        let own = folder.path().join(name);
        fs::create_dir(&own).expect("made");
        own.join("libnccl.so.2")
    };
    let library = &programs.library;
    let end = fs::metadata(library).expect("built").len();
    let files = [
        ("notes", place("notes")),
        ("symbols", place("symbols")),
        ("names", place("names")),
        ("all", place("all")),
        ("cut", place("cut")),
        ("endless", place("endless")),
    ];
    spoil(library, &files[0].1, NOTE, None, 2 << 30, 3 << 30);
    spoil(library, &files[1].1, DYNSYM, None, 2 << 30, 3 << 30);
    spoil(library, &files[2].1, STRTAB, None, 31 << 20, 3 << 30);
    spoil(library, &files[3].1, SYMTAB, Some(0), 1 << 40, 1 << 41);
    fs::write(&files[4].1, &fs::read(library).expect("built")[..3000]).expect("written");
    // 20 000 symbols whose names begin in a megabyte that nothing ends.
    let names = vec![b'n'; 1 << 20];
    spoil(
        library,
        &files[5].1,
        STRTAB,
        Some(end),
        names.len() as u64,
        0,
    );
    let file = File::options()
        .write(true)
        .open(&files[5].1)
        .expect("there");
    file.write_all_at(&names, end).expect("written");
    drop(file);
    let mut symbols = Vec::new();
    for number in 0..20_000_u32 {
        symbols.extend((1 + number).to_le_bytes());
        symbols.extend([0x12, 0, 1, 0]);
        symbols.extend([0; 16]);
    }
    let spoilt = files[5].1.clone();
    let after = end + names.len() as u64;
    spoil(
        &spoilt,
        &spoilt,
        DYNSYM,
        Some(after),
        symbols.len() as u64,
        0,
    );
    let file = File::options().write(true).open(&spoilt).expect("there");
    file.write_all_at(&symbols, after).expect("written");
    drop(file);

    let _attacks: Vec<_> = files
        .iter()
        .map(|(_, file)| programs.attack(&["one", file.to_str().expect("UTF-8")]))
        .collect();
    let mut exporter = start();
    for reason in ["size", "malformed", "notes"] {
        skipped(&exporter, reason);
    }
    keeps_well(&exporter, 10);
    for (what, file) in &files[1..5] {
        println!("{what}");
        page_says(&exporter, file.to_str().expect("UTF-8"));
    }
    ends(&mut exporter, 30);
}

/// An exporter that has to go by the path of what is mapped.
fn without_map_files() -> Option<Exporter> {
    let setpriv = [
        "--bounding-set",
        "-sys_admin,-checkpoint_restore",
        "--inh-caps",
        "-sys_admin,-checkpoint_restore",
    ];
    if !Command::new("setpriv")
        .args(setpriv)
        .arg("true")
        .status()
        .is_ok_and(|status| status.success())
    {
        skip("needs setpriv");
        return None;
    }
    let mut command = Command::new("setpriv");
    command.args(setpriv).arg(build().join("chandra"));
    let flags = ["--pods", "none", "--web.show-paths"];
    Some(Exporter::start_by(&mut command, &flags))
}

#[test]
fn a_path_does_not_lead_to_another_file() {
    let _alone = alone();
    let Some(programs) = programs() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let secret = folder.path().join("secret");
    fs::write(&secret, "of somebody else").expect("written");
    let copy = |name: &str| {
        let own = folder.path().join(name);
        fs::create_dir(&own).expect("made");
        let file = own.join("libnccl.so.2");
        fs::copy(&programs.library, &file).expect("copied");
        file.to_str().expect("UTF-8").to_owned()
    };
    let (moved, fifo) = (copy("moved"), copy("fifo"));
    let _one = programs.attack(&["moved", &moved, secret.to_str().expect("UTF-8")]);
    let _other = programs.attack(&["fifo", &fifo]);
    let mut opened = Inotify::init().expect("inotify");
    for file in [&secret, Path::new(&fifo)] {
        opened
            .watches()
            .add(file, WatchMask::OPEN)
            .expect("watched");
    }
    let Some(mut exporter) = without_map_files() else {
        return;
    };
    page_says(&exporter, &moved);
    page_says(&exporter, &fifo);
    keeps_well(&exporter, 2);
    let mut buffer = [0; 4096];
    let events = opened.read_events(&mut buffer);
    assert!(events.is_err(), "it was opened");
    ends(&mut exporter, 5);
    // With CAP_SYS_ADMIN the file itself is found, wherever its path leads.
    let exporter = start();
    is_probed(&exporter);
    let events = opened.read_events(&mut buffer);
    assert!(events.is_err(), "it was opened");
}

/// A file system of user space, mounted, and a process that has a file of it mapped.
fn silent(programs: &Programs, folder: &Path, mode: &str) -> Option<Attack> {
    if !Path::new("/dev/fuse").exists()
        || !succeeds("grep -qw fuse /proc/filesystems || modprobe fuse")
    {
        skip("needs FUSE");
        return None;
    }
    let place = folder.join(mode);
    fs::create_dir(&place).expect("made");
    let arguments = [
        place.as_os_str(),
        programs.library.as_os_str(),
        "libnccl.so.2".as_ref(),
        mode.as_ref(),
    ];
    let arguments = arguments.map(|word| word.to_str().expect("UTF-8"));
    Some(Attack::start(
        &programs.folder.join("silent"),
        &arguments,
        "mapped",
    ))
}

/// A file system that does not answer costs its file, not the signal: neither before its server has taken the request, when SIGKILL still
/// helps who waits, nor after, when it does not.
#[test]
fn a_file_system_that_never_answers_costs_that_file() {
    let _alone = alone();
    let Some(programs) = programs() else { return };
    for mode in ["deaf", "mute"] {
        println!("{mode}");
        let folder = tempfile::tempdir().expect("a folder");
        let Some(attack) = silent(&programs, folder.path(), mode) else {
            return;
        };
        let mut exporter = start();
        let file = folder.path().join(mode).join("libnccl.so.2");
        page_says(&exporter, file.to_str().expect("UTF-8"));
        skipped(&exporter, "deadline");
        // Another library is found meanwhile.
        let good = folder.path().join("good");
        let library = programs.library.to_str().expect("UTF-8");
        let good = good.to_str().expect("UTF-8");
        let _good = programs.attack(&["files", good, "1", library]);
        is_probed(&exporter);
        keeps_well(&exporter, 10);
        ends(&mut exporter, 5);
        drop(attack);
    }
}

/// One that does answer is said, and its file not probed: the kernel would wait for it where no process can be given up.
#[test]
fn a_file_system_of_user_space_is_not_probed() {
    let _alone = alone();
    let Some(programs) = programs() else { return };
    for mode in ["well", "slow"] {
        println!("{mode}");
        let folder = tempfile::tempdir().expect("a folder");
        let Some(attack) = silent(&programs, folder.path(), mode) else {
            return;
        };
        let mut exporter = start();
        skipped(&exporter, "file_system");
        page_says(&exporter, "file system of user space");
        keeps_well(&exporter, 2);
        ends(&mut exporter, 5);
        drop(attack);
    }
}

/// The folders of a container's files are told only to who asks for them.
#[test]
fn paths_are_shown_where_they_are_asked_for() {
    let _alone = alone();
    let Some(programs) = programs() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let place = folder.path().join("private");
    let library = programs.library.to_str().expect("UTF-8");
    let _job = programs.attack(&["files", place.to_str().expect("UTF-8"), "1", library]);
    let exporter = Exporter::start(&["--pods", "none"]);
    is_probed(&exporter);
    page_says(&exporter, "NCCL 2.27.5: libnccl.so.0");
    let page = exporter.get("/");
    assert!(
        !page.contains("private") && !page.contains("build id"),
        "{page}"
    );
    drop(exporter);
    let exporter = start();
    is_probed(&exporter);
    page_says(&exporter, "private/libnccl.so.0, build id");
}

/// Ticks of CPU time, of which a second has a hundred.
fn ticks(pid: &str) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    let times = fields
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().unwrap_or_default());
    times.sum()
}

#[test]
#[ignore = "a measurement of two minutes: what it costs to look at 250 processes of PyTorch's kind"]
fn the_cost_of_looking_at_many_processes() {
    let _alone = alone();
    let Some(programs) = programs() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for number in 0..199 {
        // What has nothing to do with NCCL.
        let file = folder.path().join(format!("libtorch.so.{number}"));
        fs::copy(programs.folder.join("attack"), file).expect("copied");
    }
    // Beside the driver every file with code is looked into, once.
    fs::copy(&programs.library, folder.path().join("libcuda.so.1")).expect("copied");
    let place = folder.path().to_str().expect("UTF-8");
    let _job = programs.attack(&["job", place, "250"]);
    let exporter = start();
    is_probed(&exporter);
    // Each is looked at after 1, 2, 4, 8 and 16 s, then every 16 s.
    thread::sleep(Duration::from_secs(32));
    let pid = exporter.child.id().to_string();
    let children = run(&format!("cat /proc/{pid}/task/*/children"));
    let spent = || ticks(&pid) + children.split_whitespace().map(ticks).sum::<u64>();
    let (before, begin) = (spent(), Instant::now());
    thread::sleep(Duration::from_secs(120));
    let share = (spent() - before) as f64 / 100.0 / begin.elapsed().as_secs_f64();
    println!(
        "250 processes with {} mappings each: {:.2} % of a core",
        run("grep -c . /proc/$(pgrep -n -x attack)/maps").trim(),
        100.0 * share
    );
    assert!(share < 0.01, "{share}");
}

/// Sockets that never finish a request keep nobody out.
#[test]
fn slow_sockets_keep_no_probe_out() {
    let _alone = alone();
    if programs().is_none() {
        return;
    }
    let mut exporter = Exporter::start(&["--pods", "none"]);
    let mut slow: Vec<TcpStream> = Vec::new();
    for _ in 0..40 {
        for _ in 0..128 {
            let mut socket = TcpStream::connect(&exporter.address).expect("it listens");
            let _ = socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: slow\r\n");
            slow.push(socket);
        }
        let begin = Instant::now();
        assert_eq!(exporter.get("/livez"), "ok");
        exporter.get("/readyz");
        assert!(begin.elapsed() < soon());
        let keep = slow.len().saturating_sub(128);
        slow.drain(..keep);
    }
    keeps_well(&exporter, 1);
    ends(&mut exporter, 5);
}

/// SIGTERM ends it from its first moment on, `/livez` answers and `/readyz` tells as soon as it listens.
#[test]
fn it_can_be_ended_from_its_first_moment() {
    let _alone = alone();
    if programs().is_none() {
        return;
    }
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a port")
        .to_string();
    let start = || {
        let mut command = Command::new(build().join("chandra"));
        command.args(["--pods", "none", "--web.listen-address", &port]);
        command.stderr(Stdio::null()).spawn().expect("it starts")
    };
    for wait in [0, 10, 30, 100, 300, 1000] {
        let mut child = start();
        thread::sleep(Duration::from_millis(wait));
        let begin = Instant::now();
        run(&format!("kill -TERM {}", child.id()));
        let status = child.wait().expect("it ends");
        println!("after {wait} ms: {status} in {:?}", begin.elapsed());
        assert!(begin.elapsed() < soon() * 5);
    }
    let mut child = start();
    let mut answers: Vec<String> = Vec::new();
    let end = Instant::now() + Duration::from_secs(60);
    while answers.last().is_none_or(|last| !last.ends_with(" 200 OK")) {
        assert!(Instant::now() < end, "{answers:?}");
        let Ok(mut socket) = TcpStream::connect(&port) else {
            thread::sleep(Duration::from_millis(1));
            continue;
        };
        let _ = socket.write_all(b"GET /readyz HTTP/1.0\r\n\r\n");
        let line = BufReader::new(socket).lines().next();
        answers.extend(line.and_then(Result::ok));
        answers.dedup();
    }
    println!("{answers:?}");
    let first = answers.first();
    assert!(
        first.is_some_and(|first| first.contains(" 503 ")),
        "it is not ready at once"
    );
    run(&format!("kill -TERM {}", child.id()));
    child.wait().expect("it ends");
}

const COLLECTIVES: &str = "chandra_nccl_rank_collectives_total";
const WAIT: &str = "chandra_nccl_rank_wait_seconds_total";
const LAST: &str = "chandra_nccl_rank_last_arrivals_total";

/// The accounts of ranks that a container and a node have at most: docs/security.md.
const OF_OWNER: usize = 512;
const OF_NODE: usize = 2048;

/// A node with pods that tell what they do by themselves.
struct Forged {
    folder: tempfile::TempDir,
    pods: Vec<Pod>,
    programs: Programs,
}

impl Forged {
    fn new(names: &[&str]) -> Option<Self> {
        let programs = programs()?;
        let folder = tempfile::tempdir().expect("a folder");
        let seeds = 0xf0..;
        let pods = names.iter().zip(seeds);
        let pods: Vec<_> = pods
            .map(|(name, seed)| Pod::new("ml", name, seed))
            .collect();
        for pod in &pods {
            run(&format!(
                "mkdir -p {}/{}",
                cgroup_root().display(),
                pod.cgroup(0)
            ));
        }
        write_pods(&folder.path().join("pods.json"), &pods);
        Some(Self {
            folder,
            pods,
            programs,
        })
    }

    fn exporter(&self, flags: &[&str]) -> Exporter {
        let pods = self.folder.path().join("pods.json");
        let pods = pods.to_str().expect("UTF-8");
        let flags = [&["--pods", pods, "--retention", "5s"], flags].concat();
        let exporter = Exporter::start(&flags);
        exporter.until_attached("nccl", "nccl_profiler_closed");
        exporter
    }

    /// Starts the program in a pod.
    fn start(&self, pod: &str, arguments: &str) -> Attack {
        let pod = self
            .pods
            .iter()
            .find(|each| each.name == pod)
            .expect("there");
        let forge = self.programs.folder.join("forge");
        let (root, cgroup) = (cgroup_root(), pod.cgroup(0));
        let mut command = Command::new("sh");
        command.arg("-ec").arg(format!(
            "echo $$ >{}/{cgroup}/cgroup.procs; exec {} {arguments}",
            root.display(),
            forge.display()
        ));
        Attack::start_by(command, "ready")
    }
}

impl Drop for Forged {
    fn drop(&mut self) {
        for pod in &self.pods {
            let path = cgroup_root().join(pod.cgroup(0));
            let pod = path.parent().expect("the pod's");
            succeeds(&format!("rmdir {} {}", path.display(), pod.display()));
        }
    }
}

/// Accounts of ranks on a page, of a pod or all.
fn ranks(scrape: &Scrape, pod: Option<&str>) -> usize {
    let lines = scrape
        .text
        .lines()
        .filter(|line| line.starts_with(COLLECTIVES));
    let of_pod = pod.map(|pod| format!("pod=\"{pod}\""));
    let of_pod = |line: &&str| of_pod.as_ref().is_none_or(|pod| line.contains(pod));
    let named = |line: &&str| !line.contains("communicator=\"other\"");
    lines.filter(of_pod).filter(named).count()
}

/// What a job of eight ranks has counted is what it did.
fn counts(scrape: &Scrape, collectives: u32) {
    for rank in 0..8 {
        let rank = rank.to_string();
        let of = |metric: &str| scrape.sum(metric, &[("pod", "victim"), ("rank", &rank)]);
        let is_last = rank == "7";
        let all = f64::from(collectives);
        let (waited, last) = if is_last {
            (0.0, all)
        } else {
            (all / 1000.0, 0.0)
        };
        assert_eq!((of(COLLECTIVES), of(LAST)), (all, last), "rank {rank}");
        assert!(
            (of(WAIT) - waited).abs() < 1e-6,
            "rank {rank} waited {}",
            of(WAIT)
        );
    }
}

/// Whatever one job tells, the series have a bound, and another job's are what it did.
#[test]
fn one_job_takes_nothing_from_another() {
    let _alone = alone();
    const ATTACKS: [(&str, &str); 5] = [
        ("storm", "storm 6"),
        ("many", "communicators 10000"),
        ("random", "ranks 6"),
        ("pending", "pending"),
        ("again", "reopen 6"),
    ];
    let names = ATTACKS.map(|(name, _)| name);
    let Some(node) = Forged::new(&[&["victim"][..], &names].concat()) else {
        return;
    };
    let mut job = node.start("victim", "job 5afe 8");
    let mut exporter = node.exporter(&[]);
    let mut done = 0;
    let mut work = |job: &mut Attack| {
        job.tell("run 50");
        job.hear("done");
        done += 50;
        done
    };
    work(&mut job);
    for (name, arguments) in ATTACKS {
        let mut attack = node.start(name, arguments);
        attack.tell("go");
        let begin = Instant::now();
        let mut most = (0, 0);
        let mut scrape = exporter.scrape();
        while begin.elapsed() < Duration::from_secs(8) {
            let all = work(&mut job);
            scrape = exporter.scrape();
            counts(&scrape, all);
            let now = (ranks(&scrape, Some(name)), ranks(&scrape, None));
            assert!(now.0 <= OF_OWNER && now.1 <= OF_NODE, "{now:?}");
            most = (most.0.max(now.0), most.1.max(now.1));
            thread::sleep(Duration::from_millis(100));
        }
        attack.hear("done");
        let lost = scrape.sum("chandra_lost_events_total", &[("signal", "nccl")]);
        println!("{name}: at most {most:?} accounts of ranks, {lost} events lost");
        assert!(most.0 > 0, "it counts");
        drop(attack);
    }
    // Nothing of its share is left with the dead.
    exporter.scrape_until("what was opened again and again is gone", |scrape| {
        scrape.sum(COLLECTIVES, &[("pod", "again")]) == 0.0
    });
    let mut another = node.start("again", "job 7e57 8");
    another.tell("run 50");
    another.hear("done");
    exporter.scrape_until("another job of that pod counts", |scrape| {
        scrape.sum(COLLECTIVES, &[("pod", "again")]) == 400.0
    });
    drop(another);
    for (name, _) in ATTACKS {
        exporter.scrape_until(&format!("{name} is gone"), |scrape| {
            ranks(scrape, Some(name)) == 0 && scrape.sum(COLLECTIVES, &[("pod", name)]) == 0.0
        });
    }
    let all = work(&mut job);
    counts(&exporter.scrape(), all);
    ends(&mut exporter, 5);
}

/// What a page tells of a communicator is of no use to join it.
#[test]
fn nobody_joins_a_communicator_by_what_a_page_says() {
    let _alone = alone();
    let Some(node) = Forged::new(&["victim", "forger"]) else {
        return;
    };
    let salt = node.folder.path().join("salt");
    fs::write(&salt, "a secret of the whole cluster").expect("written");
    let mut job = node.start("victim", "job 5afe 8");
    let mut exporter = node.exporter(&["--nccl.salt-file", salt.to_str().expect("UTF-8")]);
    job.tell("run 50");
    job.hear("done");
    let scrape = exporter.scrape_until("it counts", |scrape| ranks(scrape, Some("victim")) == 8);
    counts(&scrape, 50);
    assert!(!scrape.text.contains("5afe"), "{}", scrape.text);
    let line = scrape
        .text
        .lines()
        .find(|line| line.starts_with(COLLECTIVES));
    let name = line.and_then(|line| line.split("communicator=\"").nth(1));
    let name = name
        .and_then(|rest| rest.split('"').next())
        .expect("a name");
    let mut forger = node.start("forger", &format!("join {name} 3"));
    forger.tell("go");
    job.tell("run 50");
    job.hear("done");
    forger.hear("done");
    job.tell("run 50");
    job.hear("done");
    let scrape = exporter.scrape_until("the forger counts", |scrape| {
        scrape.sum(COLLECTIVES, &[("pod", "forger")]) > 0.0
    });
    counts(&scrape, 150);
    let same = [("pod", "forger"), ("communicator", name)];
    assert_eq!(scrape.sum(COLLECTIVES, &same), 0.0, "{}", scrape.text);
    ends(&mut exporter, 5);
}
