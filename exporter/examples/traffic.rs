// SPDX-License-Identifier: Apache-2.0
//! TCP traffic for the tests that need a kernel: `traffic serve ADDRESS`, `traffic send ADDRESS MIB`,
//! `traffic chat ADDRESS MESSAGES`, `traffic knock ADDRESS SOCKETS SECONDS`. And UDP: `traffic scatter ADDRESS FIRST_SOURCE SOURCES`.

use std::{
    env,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

fn main() -> io::Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let number = |i: usize| {
        args.get(i)
            .and_then(|n| n.parse::<u64>().ok())
            .expect("a number")
    };
    let address: SocketAddr = args
        .get(1)
        .and_then(|a| a.parse().ok())
        .expect("ADDRESS:PORT");
    match args[0].as_str() {
        "serve" => serve(address),
        "send" => send(address, number(2)),
        "chat" => chat(address, number(2)),
        "knock" => knock(address, number(2), Duration::from_secs(number(3))),
        "scatter" => {
            let first: Ipv4Addr = args[2].parse().expect("an address");
            scatter(address, first, number(3) as u32)
        }
        other => panic!("unknown work {other}"),
    }
}

/// Reads what comes and answers each byte 0 with a byte, until killed.
fn serve(address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                if buffer[n - 1] == 0 && stream.write_all(&[0]).is_err() {
                    break;
                }
            }
        });
    }
    Ok(())
}

/// Sends a bulk and waits until the peer has it all.
fn send(address: SocketAddr, mib: u64) -> io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    let block = vec![1; 64 << 10];
    for _ in 0..mib * 16 {
        stream.write_all(&block)?;
    }
    finish(&mut stream)
}

/// Sends small messages and waits for each answer: a lost one is found by a tail loss probe.
fn chat(address: SocketAddr, messages: u64) -> io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    for _ in 0..messages {
        finish(&mut stream)?;
    }
    Ok(())
}

fn finish(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(&[0])?;
    stream.read_exact(&mut [0])
}

/// Opens connections that nobody answers, and gives up after a while.
fn knock(address: SocketAddr, sockets: u64, time: Duration) -> io::Result<()> {
    let end = Instant::now() + time;
    let knocks = (0..sockets).map(|_| {
        let left = end
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(move || TcpStream::connect_timeout(&address, left).is_err())
    });
    for knock in knocks.collect::<io::Result<Vec<_>>>()? {
        assert!(knock.join().expect("no panic"), "somebody answered");
    }
    Ok(())
}

/// Sends a packet from each of many addresses, which have to be local.
fn scatter(address: SocketAddr, first: Ipv4Addr, sources: u32) -> io::Result<()> {
    for source in (first.to_bits()..).take(sources as usize) {
        let socket = UdpSocket::bind((Ipv4Addr::from_bits(source), 0))?;
        socket.send_to(&[0; 8], address)?;
    }
    Ok(())
}
