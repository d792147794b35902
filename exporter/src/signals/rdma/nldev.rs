// SPDX-License-Identifier: Apache-2.0
//! RDMA netlink, as far as queue pairs need it: requests, answers, sockets.
//!
//! The messages are those of `include/uapi/rdma/rdma_netlink.h`, which is ABI; what is not known is passed over. An answer
//! is bounded, so no input makes the codec panic, hang or use much more memory than its own size.

use std::{
    io,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NlaBuffer, NlasIterator};
use netlink_sys::{Socket, SocketAddr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

/// `NETLINK_RDMA` of `include/uapi/linux/netlink.h`.
const NETLINK_RDMA: isize = 20;

/// `RDMA_NL_NLDEV`.
const CLIENT: u16 = 5;

/// Devices (`RDMA_NLDEV_CMD_GET`).
pub const GET: u16 = 1;
/// How devices and network namespaces go together (`RDMA_NLDEV_CMD_SYS_GET`).
pub const SYS_GET: u16 = 6;
/// Queue pairs of a device (`RDMA_NLDEV_CMD_RES_QP_GET`).
pub const RES_QP_GET: u16 = 10;

const DEV_INDEX: u16 = 1;
const DEV_NAME: u16 = 2;
const RES_QP: u16 = 19;
const RES_QP_ENTRY: u16 = 20;
const RES_LQPN: u16 = 21;
const RES_TYPE: u16 = 26;
const RES_STATE: u16 = 27;
const RES_PID: u16 = 28;
const RES_KERN_NAME: u16 = 29;
const SYS_NETNS_MODE: u16 = 66;
const DRIVER_DETAILS: u16 = 97;

const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;

/// `sizeof(struct nlmsghdr)`.
const HEADER: usize = 16;

/// Queue pairs of one device that are read; adapters have up to 2^18.
pub const MAX_PAIRS: usize = 1 << 19;

/// Largest datagram: the kernel fills at most 32 KiB.
const DATAGRAM: usize = 64 << 10;

/// A device as nldev lists it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Device {
    /// Its index, unique until the next boot.
    pub index: u32,
    /// Its name.
    pub name: String,
}

/// A queue pair as nldev lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePair {
    /// Its number on the device.
    pub number: u32,
    /// `enum ib_qp_type`.
    pub kind: u8,
    /// `enum ib_qp_state`.
    pub state: u8,
    /// It has a name of the kernel's: the kernel made it for itself, or it is the pair behind an XRC target, which has no
    /// other (`ib_create_qp_user` from 5.15).
    pub of_kernel: bool,
    /// The thread that made it (before 5.15, that made its protection domain), while that lives, as this process' pid
    /// namespace numbers it.
    pub pid: Option<u32>,
}

/// Why an answer could not be had.
#[derive(Debug, thiserror::Error)]
pub enum NldevError {
    /// The socket failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The kernel refused the request, or gave up on it.
    #[error("the kernel answered: {0}")]
    Refused(io::Error),
    /// The answer breaks the format.
    #[error("the answer is malformed: {0}")]
    Malformed(&'static str),
    /// The answer took longer than it may.
    #[error("no whole answer within {0:?}")]
    Late(Duration),
}

/// Makes a request. A dump asks for all there is: of a device's queue pairs also for those of types that only its driver
/// knows (EFA's SRD, mlx5's DC), which kernels from 5.16 leave out unless asked. Older ones pass over the attribute.
pub fn request(command: u16, sequence: u32, device: Option<u32>, dump: bool) -> Vec<u8> {
    let length = HEADER + if device.is_some() { 16 } else { 0 };
    let mut bytes = vec![0; length];
    let mut buffer = NetlinkBuffer::new(&mut bytes);
    buffer.set_length(length as u32);
    buffer.set_message_type(message_type(command));
    buffer.set_flags(NLM_F_REQUEST | if dump { NLM_F_DUMP } else { 0 });
    buffer.set_sequence_number(sequence);
    if let Some(index) = device {
        let mut attribute = NlaBuffer::new(&mut bytes[HEADER..]);
        attribute.set_kind(DEV_INDEX);
        attribute.set_length(8);
        attribute.value_mut().copy_from_slice(&index.to_ne_bytes());
        let mut attribute = NlaBuffer::new(&mut bytes[HEADER + 8..]);
        attribute.set_kind(DRIVER_DETAILS);
        attribute.set_length(5);
        attribute.value_mut().copy_from_slice(&[1]);
    }
    bytes
}

/// `RDMA_NL_GET_TYPE`.
fn message_type(command: u16) -> u16 {
    (CLIENT << 10) + command
}

/// Reads one datagram of an answer and hands the payload of each message to `each`. Says if the answer ends with it;
/// that of a plain request ends with its first message.
///
/// # Errors
/// When the kernel reports an error, or the bytes are no netlink messages.
pub fn messages(
    mut datagram: &[u8],
    (command, sequence): (u16, u32),
    dump: bool,
    mut each: impl FnMut(&[u8]) -> Result<(), NldevError>,
) -> Result<bool, NldevError> {
    while !datagram.is_empty() {
        let message = NetlinkBuffer::new_checked(datagram)
            .map_err(|_| NldevError::Malformed("a message is cut off"))?;
        let (length, payload) = (message.length() as usize, message.payload());
        // An answer to another request of this socket would be late: it was given up.
        if message.sequence_number() == sequence {
            match message.message_type() {
                NLMSG_NOOP => {}
                NLMSG_OVERRUN => return Err(NldevError::Malformed("messages were lost")),
                NLMSG_ERROR | NLMSG_DONE => {
                    // A negative errno, or 0; some kernels leave it out of NLMSG_DONE.
                    let code = payload
                        .first_chunk()
                        .map_or(0, |code| i32::from_ne_bytes(*code));
                    if code < 0 {
                        let error = io::Error::from_raw_os_error(code.saturating_neg());
                        return Err(NldevError::Refused(error));
                    }
                    return Ok(true);
                }
                kind if kind == message_type(command) => {
                    each(payload)?;
                    if !dump {
                        return Ok(true);
                    }
                }
                _ => {}
            }
        }
        datagram = datagram
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Ok(false)
}

/// Goes through attributes.
fn attributes(
    payload: &[u8],
    mut each: impl FnMut(u16, &[u8]) -> Result<(), NldevError>,
) -> Result<(), NldevError> {
    for attribute in NlasIterator::new(payload) {
        let attribute = attribute.map_err(|_| NldevError::Malformed("an attribute is cut off"))?;
        each(attribute.kind(), attribute.value())?;
    }
    Ok(())
}

fn u32_of(value: &[u8]) -> Result<u32, NldevError> {
    value
        .first_chunk()
        .map(|bytes| u32::from_ne_bytes(*bytes))
        .ok_or(NldevError::Malformed("a number is too short"))
}

fn u8_of(value: &[u8]) -> Result<u8, NldevError> {
    value
        .first()
        .copied()
        .ok_or(NldevError::Malformed("a number is empty"))
}

/// Reads a message of a [`GET`] answer.
///
/// # Errors
/// When it is malformed.
pub fn device(payload: &[u8]) -> Result<Device, NldevError> {
    let (mut index, mut name) = (None, None);
    attributes(payload, |kind, value| {
        match kind {
            DEV_INDEX => index = Some(u32_of(value)?),
            DEV_NAME => {
                let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
                name = Some(String::from_utf8_lossy(text).into_owned());
            }
            _ => {}
        }
        Ok(())
    })?;
    match (index, name) {
        (Some(index), Some(name)) if !name.is_empty() => Ok(Device { index, name }),
        _ => Err(NldevError::Malformed("a device has no index or no name")),
    }
}

/// Reads a message of a [`RES_QP_GET`] answer into `pairs`. Returns how many entries lack a number, type or state.
///
/// # Errors
/// When it is malformed, or there are more than [`MAX_PAIRS`].
pub fn queue_pairs(payload: &[u8], pairs: &mut Vec<QueuePair>) -> Result<usize, NldevError> {
    let mut odd = 0;
    attributes(payload, |kind, table| {
        if kind != RES_QP {
            return Ok(());
        }
        attributes(table, |kind, entry| {
            if kind != RES_QP_ENTRY {
                return Ok(());
            }
            match queue_pair(entry)? {
                Some(_) if pairs.len() >= MAX_PAIRS => {
                    return Err(NldevError::Malformed(
                        "more queue pairs than a device can have",
                    ));
                }
                Some(pair) => pairs.push(pair),
                None => odd += 1,
            }
            Ok(())
        })
    })?;
    Ok(odd)
}

fn queue_pair(entry: &[u8]) -> Result<Option<QueuePair>, NldevError> {
    let (mut number, mut qp_type, mut state) = (None, None, None);
    let (mut of_kernel, mut pid) = (false, None);
    attributes(entry, |kind, value| {
        match kind {
            RES_LQPN => number = Some(u32_of(value)?),
            RES_TYPE => qp_type = Some(u8_of(value)?),
            RES_STATE => state = Some(u8_of(value)?),
            RES_PID => pid = Some(u32_of(value)?).filter(|pid| *pid != 0),
            RES_KERN_NAME => of_kernel = true,
            _ => {}
        }
        Ok(())
    })?;
    let known = number.zip(qp_type).zip(state);
    Ok(known.map(|((number, kind), state)| QueuePair {
        number,
        kind,
        state,
        of_kernel,
        pid,
    }))
}

/// Reads a message of a [`SYS_GET`] answer: whether each device belongs to one network namespace (exclusive mode).
///
/// # Errors
/// When it is malformed.
pub fn exclusive(payload: &[u8]) -> Result<bool, NldevError> {
    let mut shared = true;
    attributes(payload, |kind, value| {
        if kind == SYS_NETNS_MODE {
            shared = u8_of(value)? != 0;
        }
        Ok(())
    })?;
    Ok(!shared)
}

/// A socket in the network namespace of the thread that opens it. It holds ib_core in place: close it soon.
pub struct Client {
    socket: Socket,
    sequence: u32,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

impl Client {
    /// Opens a socket.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_RDMA)?;
        socket.bind_auto()?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Asks, and hands the payload of each message of the answer to `each`.
    ///
    /// # Errors
    /// When the answer is refused, malformed or not whole within `budget`.
    pub fn ask(
        &mut self,
        command: u16,
        device: Option<u32>,
        dump: bool,
        budget: Duration,
        mut each: impl FnMut(&[u8]) -> Result<(), NldevError>,
    ) -> Result<(), NldevError> {
        self.sequence += 1;
        let began = Instant::now();
        let request = request(command, self.sequence, device, dump);
        self.socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
        let mut datagram = Vec::with_capacity(DATAGRAM);
        loop {
            let left = budget.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(NldevError::Late(budget));
            }
            set_socket_timeout(self.socket.as_fd(), Timeout::Recv, Some(left))
                .map_err(io::Error::from)?;
            datagram.clear();
            match self.socket.recv_from(&mut datagram, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            }
            if messages(&datagram, (command, self.sequence), dump, &mut each)? {
                return Ok(());
            }
        }
    }
}
