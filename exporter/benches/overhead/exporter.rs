// SPDX-License-Identifier: Apache-2.0
//! The exporter as a process, and what procfs says that it takes.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::common::{Scrape, build};

/// What the exporter complains of belongs beside the numbers.
fn pass_on(line: &String) {
    if !line.contains(" INFO ") {
        let _ = writeln!(io::stderr(), "chandra: {line}");
    }
}

/// The exporter at work. Killed when dropped.
pub(crate) struct Exporter {
    child: Child,
    address: String,
    /// From before the process was made to the end of its first page.
    pub(crate) first_scrape: Duration,
}

impl Exporter {
    /// Starts it and waits for its first page.
    pub(crate) fn start(args: &[&str]) -> Self {
        let begin = Instant::now();
        let mut child = Command::new(build().join("chandra"))
            .args(["--web.listen-address", "127.0.0.1:0"])
            .args(args)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the exporter starts");
        let mut log = BufReader::new(child.stderr.take().expect("piped")).lines();
        let mut lines = log.by_ref().map_while(Result::ok).inspect(pass_on);
        let address =
            lines.find_map(|line| Some(line.split_once("serving on http://")?.1.to_owned()));
        let mut exporter = Self {
            child,
            address: address.expect("the exporter serves"),
            first_scrape: Duration::ZERO,
        };
        thread::spawn(move || log.map_while(Result::ok).for_each(|line| pass_on(&line)));
        exporter.fetch("identity");
        exporter.first_scrape = begin.elapsed();
        exporter
    }

    /// One page as the wire carries it: `gzip`, which is what Prometheus asks for, or `identity`.
    pub(crate) fn fetch(&self, coding: &str) -> Vec<u8> {
        let mut stream = TcpStream::connect(&self.address).expect("it listens");
        write!(
            stream,
            "GET /metrics HTTP/1.1\r\nHost: bench\r\nAccept-Encoding: {coding}\r\nConnection: close\r\n\r\n"
        )
        .expect("it reads");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("it answers");
        assert!(answer.starts_with(b"HTTP/1.1 200 "), "not a page");
        let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
        answer.split_off(end.expect("a header") + 4)
    }

    /// One page, read.
    pub(crate) fn scrape(&self) -> Scrape {
        Scrape::parse(&String::from_utf8(self.fetch("identity")).expect("UTF-8"))
    }

    fn proc(&self, path: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{path}", self.child.id())).expect("it runs")
    }

    /// CPU time of all of its threads so far.
    pub(crate) fn cpu(&self) -> Duration {
        cpu(&self.child.id().to_string())
    }

    /// A line of `/proc/PID/status` that is a number of KiB, in bytes.
    pub(crate) fn memory(&self, key: &str) -> f64 {
        let status = self.proc("status");
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        let number = line.and_then(|line| line.split_whitespace().next());
        1024.0 * number.and_then(|n| n.parse::<f64>().ok()).expect(key)
    }

    /// What the kernel says that its maps take (`memlock` of each map's fdinfo).
    pub(crate) fn maps(&self) -> u64 {
        let fds = fs::read_dir(format!("/proc/{}/fdinfo", self.child.id())).expect("it runs");
        let maps = fds.filter_map(|fd| {
            let text = fs::read_to_string(fd.ok()?.path()).ok()?;
            let value = |key| {
                let line = text.lines().find_map(|line| line.strip_prefix(key))?;
                line.trim().parse::<u64>().ok()
            };
            Some((value("map_id:")?, value("memlock:")?))
        });
        // Two descriptors may be of one map.
        maps.collect::<BTreeMap<_, _>>().values().sum()
    }
}

/// CPU time of all threads of a process so far. The kernel counts it in nanoseconds; `/proc/PID/stat` would show ticks.
pub(crate) fn cpu(pid: &str) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let times = tasks.filter_map(|task| {
        let text = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(times.sum())
}

impl Drop for Exporter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
