// SPDX-License-Identifier: Apache-2.0
//! RDMA netlink, as far as queue pairs need it: requests, answers, sockets.
//!
//! The messages are those of `include/uapi/rdma/rdma_netlink.h`, which is ABI; what is not known is passed over. An answer
//! is bounded, so no input makes the codec panic, hang or use much more memory than its own size.

use std::{
    collections::HashSet,
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
const PORT_INDEX: u16 = 3;
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
    /// Its last port; they count from 1. 0 if it does not say.
    pub ports: u32,
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

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// A command of nldev.
    pub command: u16,
    /// The device, by its index.
    pub device: Option<u32>,
    /// Of its queue pairs only those of a port: those that have been modified to INIT.
    pub port: Option<u32>,
    /// Whether there are many answers.
    pub dump: bool,
    /// Of a device's queue pairs also those of types that only its driver knows (EFA's SRD, mlx5's DCI), which kernels from 6.10 leave
    /// out unless asked (commit e18fa0bbcedf). Older ones list them in any case and pass over the attribute.
    pub details: bool,
}

impl Question {
    /// One about all devices.
    pub const fn of_all(command: u16, dump: bool) -> Self {
        Self {
            command,
            device: None,
            port: None,
            dump,
            details: false,
        }
    }

    /// One for the queue pairs of a device.
    pub const fn pairs_of(device: u32, part: Part) -> Self {
        let (port, details) = match part {
            Part::All => (None, true),
            Part::Plain => (None, false),
            Part::Port(port) => (Some(port), false),
        };
        Self {
            command: RES_QP_GET,
            device: Some(device),
            port,
            dump: true,
            details,
        }
    }
}

/// Which queue pairs of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Those of types that only the driver knows, too.
    All,
    /// The others, from 6.10 on.
    Plain,
    /// Of these, those of a port.
    Port(u32),
}

/// Makes a request.
pub fn request(question: Question, sequence: u32) -> Vec<u8> {
    let device = question
        .device
        .map(|index| (DEV_INDEX, index.to_ne_bytes().to_vec()));
    let port = question
        .port
        .map(|port| (PORT_INDEX, port.to_ne_bytes().to_vec()));
    let details = question.details.then(|| (DRIVER_DETAILS, vec![1]));
    let attributes: Vec<_> = [device, port, details].into_iter().flatten().collect();
    // Each takes its head of four bytes and its value, filled up to four.
    let mut bytes = vec![0; HEADER + 8 * attributes.len()];
    let length = bytes.len() as u32;
    let mut buffer = NetlinkBuffer::new(&mut bytes);
    buffer.set_length(length);
    buffer.set_message_type(message_type(question.command));
    buffer.set_flags(NLM_F_REQUEST | if question.dump { NLM_F_DUMP } else { 0 });
    buffer.set_sequence_number(sequence);
    for ((kind, value), place) in attributes.iter().zip(bytes[HEADER..].chunks_exact_mut(8)) {
        let mut attribute = NlaBuffer::new(place);
        attribute.set_kind(*kind);
        attribute.set_length(4 + value.len() as u16);
        attribute.value_mut().copy_from_slice(value);
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
    let (mut index, mut name, mut ports) = (None, None, 0);
    attributes(payload, |kind, value| {
        match kind {
            DEV_INDEX => index = Some(u32_of(value)?),
            PORT_INDEX => ports = u32_of(value)?,
            DEV_NAME => {
                let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
                name = Some(String::from_utf8_lossy(text).into_owned());
            }
            _ => {}
        }
        Ok(())
    })?;
    match (index, name) {
        (Some(index), Some(name)) if !name.is_empty() => Ok(Device { index, name, ports }),
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

/// The queue pairs of a device, as far as the kernel tells.
#[derive(Debug, Default)]
pub struct Pairs {
    /// Those.
    pub pairs: Vec<QueuePair>,
    /// How many had no number, type or state.
    pub odd: usize,
    /// Why there may be more, in one line.
    pub partial: Option<String>,
}

/// What takes each payload of an answer.
pub type Each<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), NldevError>;

/// Ports that are asked for one by one.
const MAX_PORTS: u32 = 16;

/// `IB_QPT_DRIVER` of `enum ib_qp_type`.
const DRIVER: u8 = 0xff;

/// Lists the queue pairs of a device with so many ports by `ask`, which asks for a part and hands over each payload.
///
/// One pair that its driver refuses to describe ends the kernel's list, and takes with it what the same message has before
/// (`res_get_common_dumpit` of nldev.c): mlx5 answers EINVAL of a DC target that is not in RTR and ENOSYS of a raw pair with RSS, and both come
/// first, since they have no number. Without details the kernel leaves out the targets, from 6.10 on. By port it leaves out all that
/// were not modified to INIT, raw pairs with RSS among them, before it asks the driver.
///
/// # Errors
/// When nothing could be had.
pub fn list(
    ports: u32,
    mut ask: impl FnMut(Part, Each<'_>) -> Result<(), NldevError>,
) -> Result<Pairs, NldevError> {
    let mut all = Pairs::default();
    let refused = match all.add(Part::All, &mut ask) {
        Ok(()) => return Ok(all),
        Err(NldevError::Refused(error)) => error,
        Err(error) => return Err(error),
    };
    let mut plain = Pairs::default();
    let missing = match plain.add(Part::Plain, &mut ask) {
        // Others have ended meanwhile.
        Ok(()) => {
            all.pairs.retain(|pair| pair.kind == DRIVER);
            "of the types that only the driver knows some may be missing"
        }
        Err(_) => {
            for port in 1..=ports.min(MAX_PORTS) {
                let mut of_port = Pairs::default();
                // What one port has is worth having without the others.
                let _ = of_port.add(Part::Port(port), &mut ask);
                plain.replace(of_port);
            }
            "those in RESET and some of the types that only the driver knows may be missing"
        }
    };
    all.replace(plain);
    if all.pairs.is_empty() {
        return Err(NldevError::Refused(refused));
    }
    all.partial = Some(format!(
        "the kernel's list ends at a queue pair that the driver refuses to describe ({refused}): {missing}"
    ));
    Ok(all)
}

impl Pairs {
    fn add(
        &mut self,
        part: Part,
        ask: &mut impl FnMut(Part, Each<'_>) -> Result<(), NldevError>,
    ) -> Result<(), NldevError> {
        ask(part, &mut |payload| {
            self.odd += queue_pairs(payload, &mut self.pairs)?;
            Ok(())
        })
    }

    /// Takes over what was listed later; of what is in both the later counts.
    fn replace(&mut self, later: Self) {
        let numbers: HashSet<u32> = later.pairs.iter().map(|pair| pair.number).collect();
        self.pairs.retain(|pair| !numbers.contains(&pair.number));
        self.pairs.extend(later.pairs);
        self.odd = self.odd.max(later.odd);
    }
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
        question: Question,
        budget: Duration,
        mut each: impl FnMut(&[u8]) -> Result<(), NldevError>,
    ) -> Result<(), NldevError> {
        self.sequence += 1;
        let began = Instant::now();
        let request = request(question, self.sequence);
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
            let asked = (question.command, self.sequence);
            if messages(&datagram, asked, question.dump, &mut each)? {
                return Ok(());
            }
        }
    }
}
