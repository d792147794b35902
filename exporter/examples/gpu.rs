// SPDX-License-Identifier: Apache-2.0
//! A process that drives a GPU, for the tests that need a kernel: `gpu DEVICE THREADS`. It opens the device, says `ready`, and
//! does a line of its input at a time, each with `done` once all its threads sleep again:
//! `work SECONDS` (half of the threads compute, the others pass a token round), `pulse SECONDS` (each thread computes for a
//! millisecond, ten times in a tenth of a second, as one that launches kernels step by step), `fork N` (children that end at once, one
//! after the other), `child` (a child that stays; its number), `close` (the device), `open` (it again).

use std::{
    fs::{File, OpenOptions},
    hint,
    io::{self, BufRead, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Barrier,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

fn main() -> io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let device = Path::new(args.first().expect("DEVICE"));
    let threads: usize = args.get(1).and_then(|n| n.parse().ok()).expect("THREADS");
    let mut open = Some(drive(device)?);
    let done = Arc::new(Barrier::new(threads + 1));
    let starts: Vec<Sender<(bool, Duration)>> = spawn(threads, &done);
    let mut children: Vec<Child> = Vec::new();
    say("ready")?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let (what, number) = line.split_once(' ').unwrap_or((&line, "0"));
        let number: u64 = number.parse().expect("a number");
        match what {
            "work" | "pulse" => {
                for start in &starts {
                    let how = (what == "pulse", Duration::from_secs(number));
                    start.send(how).expect("it listens");
                }
                done.wait();
            }
            "fork" => {
                for _ in 0..number {
                    Command::new("true").status()?;
                }
            }
            "child" => {
                let child = Command::new("cat").stdin(Stdio::piped()).spawn()?;
                print!("{} ", child.id());
                children.push(child);
            }
            "close" => open = None,
            "open" => open = Some(drive(device)?),
            other => panic!("unknown work {other}"),
        }
        say("done")?;
    }
    drop(open);
    for mut child in children {
        child.kill()?;
        child.wait()?;
    }
    Ok(())
}

fn drive(device: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(device)
}

fn say(word: &str) -> io::Result<()> {
    println!("{word}");
    io::stdout().flush()
}

/// Starts threads that wait for how to work, pulsing or not, and how long; all of them meet at the barrier after it.
fn spawn(threads: usize, done: &Arc<Barrier>) -> Vec<Sender<(bool, Duration)>> {
    let ring: Vec<(Sender<bool>, Receiver<bool>)> = (0..threads / 2).map(|_| channel()).collect();
    let (mut sends, mut receives): (Vec<_>, Vec<_>) = ring.into_iter().unzip();
    if !sends.is_empty() {
        sends.rotate_left(1);
    }
    let mut starts = Vec::new();
    for i in 0..threads {
        let (start, started) = channel();
        starts.push(start);
        let done = Arc::clone(done);
        let passes = sends.pop().zip(receives.pop());
        thread::spawn(move || {
            for (pulsing, time) in started {
                let end = Instant::now() + time;
                match &passes {
                    _ if pulsing => pulse(end),
                    Some((next, previous)) => pass(next, previous, i == 0, end),
                    None => compute(end),
                }
                done.wait();
            }
        });
    }
    starts
}

fn compute(end: Instant) {
    while Instant::now() < end {
        hint::spin_loop();
    }
}

fn pulse(end: Instant) {
    while Instant::now() < end {
        compute(Instant::now() + Duration::from_millis(1));
        thread::sleep(Duration::from_millis(9));
    }
}

/// Takes a token and passes it on. The first has it to begin with; once the time is over, it sends it round as the last.
fn pass(next: &Sender<bool>, previous: &Receiver<bool>, first: bool, end: Instant) {
    if first {
        next.send(false).expect("it listens");
    }
    loop {
        let last = previous.recv().expect("it sends");
        if last && first {
            return;
        }
        compute(Instant::now() + Duration::from_micros(30));
        let last = last || first && Instant::now() >= end;
        next.send(last).expect("it listens");
        if last && !first {
            return;
        }
    }
}
