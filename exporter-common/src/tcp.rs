// SPDX-License-Identifier: Apache-2.0
//! TCP: segments sent again, by owner and by what made TCP send them again.

/// What made TCP send a segment again. The value is the index into [`Retransmits::segments`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// The SYN of an active open (the socket is in SYN-SENT).
    Syn = 0,
    /// The SYN-ACK of a passive open.
    SynAck = 1,
    /// Loss recovery after a retransmission time-out (congestion state Loss).
    Rto = 2,
    /// Loss recovery by SACK or RACK (congestion state Recovery), and whatever is none of the others.
    Fast = 3,
    /// A tail loss probe that carries old data.
    Probe = 4,
}

impl Kind {
    /// All kinds, in the order of their indexes, with the label that each has.
    pub const LABELS: [(Self, &str); 5] = [
        (Self::Syn, "syn"),
        (Self::SynAck, "synack"),
        (Self::Rto, "rto"),
        (Self::Fast, "fast"),
        (Self::Probe, "probe"),
    ];
}

/// The value of the map `RETRANSMITS`, whose key is the cgroup id (`u64`) of the socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Retransmits {
    /// Segments by [`Kind`]; only ever added to, by the kernel.
    pub segments: [u64; Kind::LABELS.len()],
}

const _: () = assert!(
    size_of::<Retransmits>() == 8 * Kind::LABELS.len(),
    "no padding"
);

// SAFETY: `repr(C)`, one array of `u64`: no padding (asserted above) and every bit pattern is valid.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Retransmits {}
