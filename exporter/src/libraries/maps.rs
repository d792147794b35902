// SPDX-License-Identifier: Apache-2.0
//! Which files does a process have mapped?
//!
//! `/proc/PID/maps` is as long as the process likes: it is read line by line and held only as far as it is of interest.

use std::{
    collections::HashSet,
    io::{self, BufRead},
};

use serde::{Deserialize, Serialize};

/// Bytes and lines of `/proc/PID/maps` that are read. The kernel's own limit is 65 530 mappings (`vm.max_map_count`) unless it is
/// raised; PyTorch has some thousand.
const BYTES: u64 = 16 << 20;
const LINES: usize = 65_536;

/// Files of one process, and bytes of their paths. PyTorch has some four hundred.
const FILES: usize = 4096;
const PATHS: usize = 1 << 20;

/// Which files of a process are of interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Interest {
    /// CUDA's driver.
    Cuda,
    /// What is called as NCCL, RCCL or a plugin of theirs is; beside CUDA's driver all, since NCCL may be linked into anything.
    Nccl,
}

impl Interest {
    /// Whether a file is of interest by its name alone.
    pub(crate) fn names(self, name: &str) -> bool {
        match self {
            Self::Cuda => is_library(name, "libcuda"),
            // libnccl.so.2, libnccl-profiler.so, librccl.so.1.
            Self::Nccl => {
                let called = ["libnccl", "librccl"];
                called.iter().any(|begin| name.starts_with(begin)) && name.contains(".so")
            }
        }
    }
}

/// Whether a file is called as a library is, whatever its version.
fn is_library(name: &str, library: &str) -> bool {
    let rest = name
        .strip_prefix(library)
        .and_then(|rest| rest.strip_prefix(".so"));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// A file with code in the memory of a process.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Mapped {
    /// Its path, as the process sees it.
    pub(crate) path: String,
    /// One of the ranges of addresses that it is mapped to.
    pub(super) range: (u64, u64),
    /// The numbers of its device and inode, as the kernel shows them there.
    pub(super) device: (u32, u32),
    pub(super) inode: u64,
}

impl Mapped {
    /// Its name without folders.
    pub(crate) fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }
}

/// The files of a process that are of interest, each once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Maps {
    pub(crate) files: Vec<Mapped>,
    /// Whether there are more mappings or files than are read.
    pub(crate) cut: bool,
}

impl Maps {
    /// Reads a text of `/proc/PID/maps`.
    pub(crate) fn read(text: impl BufRead, interest: Interest) -> io::Result<Self> {
        let mut text = text.take(BYTES);
        let mut maps = Self::default();
        let mut known = HashSet::new();
        let (mut line, mut cuda, mut paths) = (Vec::new(), false, 0);
        for number in 0.. {
            line.clear();
            if text.read_until(b'\n', &mut line)? == 0 {
                maps.cut |= text.limit() == 0;
                break;
            }
            if number == LINES {
                maps.cut = true;
                break;
            }
            let Some((access, mapped)) = parse(&line) else {
                continue;
            };
            cuda |= is_library(mapped.name(), "libcuda");
            let may_be = interest == Interest::Nccl || interest.names(mapped.name());
            if !may_be || !access.contains(&b'x') {
                continue;
            }
            let room = maps.files.len() < FILES && paths + mapped.path.len() <= PATHS;
            if !room {
                maps.cut = true;
            } else if known.insert((mapped.path.clone(), mapped.inode)) {
                paths += mapped.path.len();
                maps.files.push(mapped);
            }
        }
        if !cuda {
            maps.files.retain(|mapped| interest.names(mapped.name()));
        }
        Ok(maps)
    }
}

/// Access, and what is mapped, of a line that is about a file.
fn parse(line: &[u8]) -> Option<(&[u8], Mapped)> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let mut field = || fields.next();
    let (range, access, _offset, device) = (field()?, field()?, field()?, field()?);
    let (inode, path) = (field()?, field()?.trim_ascii_start());
    if !path.starts_with(b"/") {
        return None;
    }
    let text = |field| std::str::from_utf8(field).ok();
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let (from, to) = text(range)?.split_once('-')?;
    let (major, minor) = text(device)?.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
    let mapped = Mapped {
        path: String::from_utf8_lossy(path).into_owned(),
        range: (hex(from)?, hex(to)?),
        device: (number(major)?, number(minor)?),
        inode: text(inode)?.parse().ok()?,
    };
    Some((access, mapped))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    const MAPS: &str = "\
00400000-00401000 r-xp 00000000 00:2b 12 /usr/bin/python3
7f0000000000-7f0000100000 r--p 00000000 00:2b 77                         /usr/lib/libcuda.so.550.54.14
7f0000100000-7f0000900000 r-xp 00100000 00:2b 77                         /usr/lib/libcuda.so.550.54.14
7f0000a00000-7f0000b00000 r-xp 00100000 00:2b 77                         /usr/lib/libcuda.so.550.54.14
7f0001000000-7f0001100000 r-xp 00000000 00:2b 78                         /a b/libcuda.so.1 (deleted)
7f0002000000-7f0002100000 r-xp 00000000 00:2b 79                         /usr/lib/libcudart.so.12
7f0003000000-7f0003100000 r-xp 00000000 00:2b 80                         /usr/lib/libcudadebugger.so.1
7f0004000000-7f0004100000 r-xp 00000000 00:00 0
7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0                          [vdso]
nonsense
";

    fn read(text: &str, interest: Interest) -> Maps {
        Maps::read(text.as_bytes(), interest).expect("it is read")
    }

    #[test]
    fn a_mapped_driver_is_found_and_its_like_are_not() {
        let found = read(MAPS, Interest::Cuda);
        let shown: Vec<_> = found
            .files
            .iter()
            .map(|mapped| (&*mapped.path, mapped.range.0, mapped.device, mapped.inode))
            .collect();
        assert_eq!(
            shown,
            [
                (
                    "/usr/lib/libcuda.so.550.54.14",
                    0x7f00_0010_0000,
                    (0, 0x2b),
                    77
                ),
                ("/a b/libcuda.so.1", 0x7f00_0100_0000, (0, 0x2b), 78),
            ]
        );
        assert!(!found.cut);
    }

    #[test]
    fn beside_the_driver_every_file_with_code_may_be_nccl() {
        assert_eq!(read(MAPS, Interest::Nccl).files.len(), 5);
        for name in ["libncclx", "librccl"] {
            let nccl = MAPS.replace("libcuda.so", &format!("{name}.so"));
            let named = read(&nccl, Interest::Nccl);
            let names: Vec<_> = named.files.iter().map(Mapped::name).collect();
            assert_eq!(
                names,
                [&*format!("{name}.so.550.54.14"), &*format!("{name}.so.1")]
            );
        }
    }

    /// What took 500 MB once.
    #[test]
    fn a_text_without_end_is_cut() {
        let folder = "d".repeat(200);
        let path = format!("/{folder}").repeat(15);
        let mut text = String::new();
        for number in 0..70_000 {
            let at = 0x7f00_0000_0000_u64 + number * 0x1000;
            let _ = writeln!(
                text,
                "{at:x}-{:x} r-xp 00000000 00:2b 77 {path}/libnccl.so.2",
                at + 0x1000
            );
        }
        let found = read(&text, Interest::Nccl);
        assert!(found.cut);
        assert_eq!(found.files.len(), 1);
        // As many lines, which are short, of files of their own.
        let mut text = String::new();
        for number in 0..LINES + 1 {
            let _ = writeln!(text, "1000-2000 r-xp 0 0:1 {number} /libnccl.so.{number}");
        }
        let found = read(&text, Interest::Nccl);
        assert!(found.cut);
        assert_eq!(found.files.len(), FILES);
        // One that ends in time.
        let text = "1000-2000 r-xp 0 0:1 1 /libnccl.so\n".repeat(LINES);
        assert!(!read(&text, Interest::Nccl).cut);
    }
}
