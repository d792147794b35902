// SPDX-License-Identifier: Apache-2.0
//! What does the table show of each pod, and by what is it sorted?

use super::{
    format::{number, share, time, visible},
    node::Row,
    words::{CPU, LAST_ARRIVALS, RETRANSMITS, RUNQUEUE, STRAGGLER, STUCK, TORN_DOWN},
};

/// A column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    /// Whose row it is; sorted by it, the worst is first.
    Pod,
    /// TCP segments sent again, in a second.
    Retransmits,
    /// Queue pairs, and those in ERR.
    Pairs,
    /// Queue pairs destroyed, in a second.
    Churn,
    /// What 99 in 100 waits of GPU threads for a CPU were at most.
    GpuWait,
    /// What ranks wait in a collective on average, or for how long one has been under way.
    NcclWait,
    /// The rank that is last most often, and in which share of the collectives.
    Last,
    /// CPU for encryption, in hundredths of a core.
    EncryptionCpu,
}

impl Column {
    /// In the order of the table.
    pub(super) const ALL: [Self; 8] = [
        Self::Pod,
        Self::Retransmits,
        Self::Pairs,
        Self::Churn,
        Self::GpuWait,
        Self::NcclWait,
        Self::Last,
        Self::EncryptionCpu,
    ];

    /// Its heading.
    pub(super) fn heading(self) -> &'static str {
        match self {
            Self::Pod => "POD",
            Self::Retransmits => "RETR/s",
            Self::Pairs => "QPs",
            Self::Churn => "CHURN/s",
            Self::GpuWait => "GPU-p99",
            Self::NcclWait => "NCCL",
            Self::Last => "LAST",
            Self::EncryptionCpu => "ENC%",
        }
    }

    /// What it says, in a sentence of the help.
    pub(super) fn meaning(self) -> &'static str {
        match self {
            Self::Pod => "the pod, or a cgroup of the host; sorted by it, what hurts most is first",
            Self::Retransmits => "TCP segments that it sent again, in a second",
            Self::Pairs => "RDMA queue pairs that it has, and how many of them are in ERR",
            Self::Churn => "RDMA queue pairs that it destroyed, in a second",
            Self::GpuWait => "99 in 100 waits of its GPU threads for a CPU were at most so long",
            Self::NcclWait => {
                "what its ranks wait for the last one in each collective; with a +, the age of a collective that does not end"
            }
            Self::Last => "its rank that is last most often, and in how many of the collectives",
            Self::EncryptionCpu => "CPU that the encryption of its packets takes, in % of a core",
        }
    }

    /// Characters that its cells take at most.
    pub(super) fn width(self) -> usize {
        match self {
            Self::Pod => 12,
            Self::Retransmits => 6,
            Self::Pairs => 8,
            Self::Churn | Self::GpuWait => 7,
            Self::NcclWait => 6,
            Self::Last => 10,
            Self::EncryptionCpu => 5,
        }
    }

    /// What stands in a row; `-` where the signal tells nothing of the pod.
    pub(super) fn cell(self, row: &Row) -> String {
        let text = match self {
            Self::Pod => Some(visible(&row.owner.name())),
            Self::Pairs => row.rdma.as_ref().map(|rdma| match rdma.in_error {
                0.0 => number(rdma.queue_pairs),
                in_error => format!("{} {}ERR", number(rdma.queue_pairs), number(in_error)),
            }),
            Self::NcclWait => row.nccl.as_ref().and_then(|nccl| {
                match nccl.oldest_pending_seconds >= STUCK.value {
                    true => Some(format!("+{}", time(nccl.oldest_pending_seconds))),
                    false => nccl.mean_wait_seconds.map(time),
                }
            }),
            Self::Last => row
                .nccl
                .as_ref()
                .and_then(|nccl| nccl.last.as_ref())
                .map(|last| format!("r{} {}", visible(&last.rank), share(last.share))),
            Self::GpuWait => self.value(row).map(time),
            Self::EncryptionCpu => self.value(row).map(|cores| number(cores * 100.0)),
            Self::Retransmits | Self::Churn => self.value(row).map(number),
        };
        text.unwrap_or_else(|| "-".to_owned())
    }

    /// By what it is sorted, the largest first.
    pub(super) fn value(self, row: &Row) -> Option<f64> {
        let nccl = row.nccl.as_ref();
        match self {
            Self::Pod => Some(row.hurts),
            Self::Retransmits => row.tcp.as_ref().map(|tcp| tcp.retransmits_per_second),
            Self::Pairs => row.rdma.as_ref().map(|rdma| rdma.queue_pairs),
            Self::Churn => row.rdma.as_ref().map(|rdma| rdma.destroyed_per_second),
            Self::GpuWait => row.gpu.as_ref()?.p99_seconds,
            Self::NcclWait => nccl.map(|nccl| match nccl.oldest_pending_seconds >= STUCK.value {
                true => nccl.oldest_pending_seconds,
                false => nccl.mean_wait_seconds.unwrap_or_default(),
            }),
            Self::Last => nccl?.last.as_ref().map(|last| last.share),
            Self::EncryptionCpu => row.encryption.as_ref().map(|all| all.cpu_cores),
        }
    }

    /// Whether what it shows is above an alert's threshold.
    pub(super) fn is_bad(self, row: &Row) -> bool {
        let above = |threshold: f64| self.value(row).is_some_and(|value| value > threshold);
        match self {
            Self::Pod => row.hurts >= 1.0,
            Self::Retransmits => above(RETRANSMITS.value),
            Self::Pairs => row.rdma.as_ref().is_some_and(|rdma| rdma.in_error > 0.0),
            Self::Churn => {
                let rdma = row.rdma.as_ref();
                rdma.is_some_and(|rdma| rdma.times_torn_down > TORN_DOWN.value)
            }
            Self::GpuWait => above(RUNQUEUE.value),
            Self::NcclWait => above(STUCK.value),
            Self::Last => {
                let wait = row.nccl.as_ref().and_then(|nccl| nccl.mean_wait_seconds);
                above(LAST_ARRIVALS) && wait.is_some_and(|wait| wait > STRAGGLER.value)
            }
            Self::EncryptionCpu => above(CPU.value),
        }
    }
}
