// SPDX-License-Identifier: Apache-2.0
//! HTTP as far as servers of tests need it.

#![allow(
    unreachable_pub,
    reason = "a module of several test crates, which export nothing"
)]

use std::{
    io::{BufRead, BufReader, Read},
    net::TcpStream,
};

/// Reads a request, and returns its body.
pub fn request(stream: &mut TcpStream) -> Option<String> {
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().ok()?;
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    String::from_utf8(body).ok()
}
