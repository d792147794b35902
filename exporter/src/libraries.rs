// SPDX-License-Identifier: Apache-2.0
//! Which libraries has a process mapped?
//!
//! A file is known by its inode's number, size and time of change. Overlay file systems hand these on from the file
//! beneath, but not its device: two containers of one image show different devices for what is one inode to the kernel, and a
//! probe in one of them is in both. No two files of different file systems change in the same nanosecond and have one number.

pub(crate) mod elf;

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use anyhow::bail;

/// A file, whatever it is called and wherever it is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Identity {
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Identity {
    /// Of an open file.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is not a file"));
        }
        Ok(Self {
            inode: metadata.ino(),
            size: metadata.size(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

/// A library in the memory of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapped {
    /// Its path, as the process sees it.
    pub(crate) path: String,
    range: String,
    inode: u64,
}

/// The files with code in a text of `/proc/PID/maps`, each once, of those whose name is `wanted`.
pub(crate) fn mapped(maps: &str, wanted: impl Fn(&str) -> bool) -> Vec<Mapped> {
    let mut found: Vec<Mapped> = Vec::new();
    for line in maps.lines() {
        let mut fields = line.splitn(6, ' ');
        let (Some(range), Some(access), Some(_offset), Some(_device), Some(inode), Some(path)) = (
            fields.next(),
            fields.next(),
            fields.next(),
            fields.next(),
            fields.next(),
            fields.next(),
        ) else {
            continue;
        };
        let path = path.trim_start();
        let path = path.strip_suffix(" (deleted)").unwrap_or(path);
        let name = path.rsplit('/').next().unwrap_or_default();
        let inode = inode.parse().unwrap_or_default();
        let known = found
            .iter()
            .any(|other| other.path == path && other.inode == inode);
        if path.starts_with('/') && wanted(name) && access.contains('x') && !known {
            found.push(Mapped {
                path: path.to_owned(),
                range: range.to_owned(),
                inode,
            });
        }
    }
    found
}

/// Whether a file is called as a library is, whatever its version.
pub(crate) fn is_library(name: &str, library: &str) -> bool {
    let rest = name
        .strip_prefix(library)
        .and_then(|rest| rest.strip_prefix(".so"));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

impl Mapped {
    /// Opens the very file that is mapped.
    ///
    /// The path may have got another file since, and wants no more than CAP_SYS_PTRACE; `map_files` is exact.
    pub(crate) fn open(&self, process: &Path) -> anyhow::Result<File> {
        let address = |text: &str| match text.trim_start_matches('0') {
            "" => "0".to_owned(),
            text => text.to_owned(),
        };
        let (from, to) = self.range.split_once('-').unwrap_or_default();
        let range = format!("{}-{}", address(from), address(to));
        let exact = process.join("map_files").join(range);
        let refused = match open(&exact) {
            Ok(file) => return Ok(file),
            Err(error) => anyhow::anyhow!(
                "cannot open {}: {error}; add CAP_SYS_PTRACE and CAP_SYS_ADMIN",
                exact.display()
            ),
        };
        let named = process.join("root").join(self.path.trim_start_matches('/'));
        match open(&named) {
            Ok(file) if file.metadata()?.ino() == self.inode => Ok(file),
            _ => Err(refused),
        }
    }
}

/// Opens a file, but waits for nothing, as opening a pipe would.
fn open(path: &Path) -> io::Result<File> {
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits();
    let nonblock = i32::try_from(nonblock).map_err(io::Error::other)?;
    OpenOptions::new()
        .read(true)
        .custom_flags(nonblock)
        .open(path)
}

/// Reads what a process has mapped. `None` where it is gone.
pub(crate) fn read_maps(process: &Path) -> anyhow::Result<Option<String>> {
    let path: PathBuf = process.join("maps");
    match fs::read(&path) {
        Ok(maps) => Ok(Some(String::from_utf8_lossy(&maps).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {
            Ok(None)
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            bail!(
                "cannot read {}: {error}; add CAP_SYS_PTRACE",
                path.display()
            )
        }
        Err(error) => bail!("cannot read {}: {error}", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_driver_is_found_and_its_like_are_not() {
        let maps = "\
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
        let found = mapped(maps, |name| is_library(name, "libcuda"));
        let shown: Vec<_> = found
            .iter()
            .map(|mapped| (&*mapped.path, &*mapped.range, mapped.inode))
            .collect();
        assert_eq!(
            shown,
            [
                (
                    "/usr/lib/libcuda.so.550.54.14",
                    "7f0000100000-7f0000900000",
                    77
                ),
                ("/a b/libcuda.so.1", "7f0001000000-7f0001100000", 78),
            ]
        );
    }

    #[test]
    fn the_file_that_is_mapped_is_opened() {
        let maps = fs::read_to_string("/proc/self/maps").expect("it runs");
        let libc = maps
            .lines()
            .find(|line| line.contains(" r-xp ") && line.contains("libc.so"));
        let Some(line) = libc else {
            return println!("SKIPPED: this test is linked statically");
        };
        let mapped = mapped(&line.replace("libc.so", "libcuda.so"), |name| {
            is_library(name, "libcuda")
        });
        let process = Path::new("/proc/self");
        // By path there is no such file: it is opened by its address, where that is allowed.
        match mapped[0].open(process) {
            Ok(file) => {
                let opened = Identity::of(&file).expect("a file");
                assert_eq!(opened.inode, mapped[0].inode);
            }
            Err(error) => println!("SKIPPED: needs root: {error:#}"),
        }
    }
}
