// SPDX-License-Identifier: Apache-2.0
//! Which libraries do processes have mapped, and what is in them?
//!
//! [`watch`] looks at processes in a thread of its own and publishes what it has found; [`helper`] is the process that reads what
//! containers have made: [`maps`] which files are mapped, [`open`] the very file, [`elf`] what is in it. [`probed`] attaches to what is of use.

pub(crate) mod elf;
mod helper;
pub(crate) mod maps;
mod open;
pub(crate) mod probed;
pub(crate) mod watch;

use std::{
    fs::File,
    io::{self, BufReader},
    os::unix::fs::MetadataExt,
};

use serde::{Deserialize, Serialize};

pub use helper::look;
pub use watch::Gate;

/// A file, whatever it is called and wherever it is mounted: its inode's number, size and time of change.
///
/// Overlay file systems hand these on from the file beneath, but not its device: two containers of one image show different
/// devices for what is one inode to the kernel, and a probe in one of them is in both. No two files of different file systems of this node
/// change in the same nanosecond and have one number, and nobody can set that time. A server of files says what it likes: there the
/// device counts too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Identity {
    inode: u64,
    size: u64,
    changed: (i64, i64),
    /// 0 of an overlay and of file systems of this node.
    device: u64,
}

/// `f_type` of file systems whose times the kernel of this node sets, and of overlays (include/uapi/linux/magic.h; ZFS).
const LOCAL: [u64; 8] = [
    0x794c_7630, // overlay
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // xfs
    0x9123_683e, // btrfs
    0x0102_1994, // tmpfs
    0xf2f5_2010, // f2fs
    0x2fc1_2fc1, // zfs
    0x7371_7368, // squashfs
];

impl Identity {
    /// Of an open file.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is not a file"));
        }
        let local = LOCAL.contains(&open::file_system(file)?);
        Ok(Self {
            inode: metadata.ino(),
            size: metadata.size(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            device: if local { 0 } else { metadata.dev() },
        })
    }
}

/// Why a file, or a part of one, is not looked at. The label `reason` of `chandra_libraries_skipped_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Skip {
    /// It says of itself what cannot be.
    Malformed,
    /// More of it would have to be read or held than a file may take.
    Size,
    /// Functions with longer names than any that is looked for.
    Names,
    /// Notes that are larger than a build id's.
    Notes,
    /// More tables of symbols, or more functions of the names that are looked for, than a library has.
    Symbols,
    /// It does not come in time. It is tried again.
    Deadline,
    /// It cannot be opened or read. It is tried again.
    Unreadable,
    /// It lies on a file system of user space, for which the kernel would wait as long as that likes.
    FileSystem,
    /// A process has more mappings than are read.
    Mappings,
    /// More files than are remembered of one container's pod, or probed at once. It is tried again.
    Files,
    /// Looking at a pod has taken its share of the time. It is gone on with later.
    Share,
}

impl Skip {
    /// Every reason, for the reference.
    pub const LABELS: [&'static str; 11] = [
        "malformed",
        "size",
        "names",
        "notes",
        "symbols",
        "deadline",
        "unreadable",
        "file_system",
        "mappings",
        "files",
        "share",
    ];

    /// Says if it may be otherwise the next time.
    fn passes(self) -> bool {
        matches!(self, Self::Deadline | Self::Unreadable | Self::Files)
    }
}

/// How many files, or parts of them, were not looked at, by [`Skip`].
pub type Skipped = [u64; Skip::LABELS.len()];

/// Why a file is not looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    pub(crate) skip: Skip,
    pub(crate) why: String,
}

impl Refusal {
    fn new(skip: Skip, why: impl Into<String>) -> Self {
        Self {
            skip,
            why: why.into(),
        }
    }
}

/// Says if a process has a file mapped that is called as NCCL is.
pub(crate) fn has_nccl(process: u32) -> bool {
    let interest = maps::Interest::Nccl;
    let maps = File::open(format!("/proc/{process}/maps"))
        .and_then(|file| maps::Maps::read(BufReader::new(file), interest));
    let files = maps.map(|maps| maps.files).unwrap_or_default();
    files.iter().any(|mapped| interest.names(mapped.name()))
}
