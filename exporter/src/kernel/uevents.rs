// SPDX-License-Identifier: Apache-2.0
//! When is a module loaded or unloaded? The kernel tells everybody who listens (kobject uevents).

use std::{io, os::fd::AsFd, thread, time::Duration};

use netlink_sys::{Socket, SocketAddr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

/// How long nobody waits longer than, heard or not.
const PATIENCE: Duration = Duration::from_secs(2);

/// The ear of one signal.
pub struct Uevents {
    socket: Option<Socket>,
    event: Vec<u8>,
}

impl Uevents {
    /// Listens, or says in the log why it can only look every two seconds.
    pub fn listen(signal: &str) -> Self {
        let socket = uevents().map_err(|error| {
            tracing::info!("signal {signal}: modules are looked for every 2 s, since uevents are not to be had: {error}");
        });
        Self {
            socket: socket.ok(),
            event: Vec::with_capacity(8 << 10),
        }
    }

    /// Returns when something was said, and after two seconds in any case.
    pub fn wait(&mut self) {
        match &self.socket {
            Some(socket) => {
                self.event.clear();
                let _ = socket.recv_from(&mut self.event, 0);
            }
            None => thread::sleep(PATIENCE),
        }
    }
}

fn uevents() -> io::Result<Socket> {
    /// `NETLINK_KOBJECT_UEVENT`, whose group 1 is the kernel's.
    const KOBJECT_UEVENT: isize = 15;
    let mut socket = Socket::new(KOBJECT_UEVENT)?;
    socket.bind(&SocketAddr::new(0, 1))?;
    set_socket_timeout(socket.as_fd(), Timeout::Recv, Some(PATIENCE))?;
    Ok(socket)
}
