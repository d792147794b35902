// SPDX-License-Identifier: Apache-2.0
//! Which libraries has a process mapped, and where in their functions does a probe cost little?
//!
//! A file is known by its inode's number, size and time of change. Overlay file systems hand these on from the file
//! beneath, but not its device: two containers of one image show different devices for what is one inode to the kernel, and a
//! probe in one of them is in both. No two files of different file systems change in the same nanosecond and have one number.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use object::{
    Endianness, ReadCache, ReadRef,
    elf::{
        FileHeader64, NT_GNU_BUILD_ID, PF_X, PN_XNUM, PT_LOAD, ProgramHeader64, SHN_UNDEF,
        SHT_DYNSYM, SHT_SYMTAB, STT_FUNC, STT_GNU_IFUNC, Sym64,
    },
    read::elf::{FileHeader, ProgramHeader, SectionHeader, Sym},
};

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

/// A function of a library that has one of the names that are looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Function<T> {
    /// Where it begins in the file.
    pub(crate) at: u64,
    /// What its name was taken for.
    pub(crate) what: T,
    /// Its first bytes.
    pub(crate) code: Vec<u8>,
}

/// What is known of a library.
#[derive(Clone, Debug)]
pub(crate) struct Contents<T> {
    /// The machine that it is for, `e_machine` of ELF.
    pub(crate) machine: u16,
    /// Functions that were looked for, by name; of several names of one place each.
    pub(crate) functions: Vec<Function<T>>,
    /// Its build id, in hex digits.
    pub(crate) build_id: Option<String>,
}

/// What of a library's tables is read, at most. Those of libcuda and libnccl have some 100 kB, of a program with everything linked
/// in some megabytes.
const TABLE: u64 = 64 << 20;

/// Finds functions in a library, among those that it exports and, where it is not stripped, all others. `wanted` is asked of each
/// name.
pub(crate) fn contents<T>(
    file: &File,
    wanted: impl Fn(&[u8]) -> Option<T>,
) -> anyhow::Result<Contents<T>> {
    let data = &ReadCache::new(file);
    let header = FileHeader64::<Endianness>::parse(data).context("read the ELF header")?;
    let endian = header.endian()?;
    ensure!(
        header.e_shnum(endian) != 0 && header.e_phnum(endian) != PN_XNUM,
        "it has no table of sections, or too large ones"
    );
    let sections = header.sections(endian, data)?;
    let segments = header.program_headers(endian, data)?;
    let mut functions = Vec::new();
    let mut build_id = None;
    for section in sections.iter() {
        if let Ok(Some(mut notes)) = section.notes(endian, data)
            && let Ok(Some(note)) = notes.next()
            && note.name() == b"GNU"
            && note.n_type(endian) == NT_GNU_BUILD_ID
        {
            let digits = note.desc().iter().map(|byte| format!("{byte:02x}"));
            build_id = Some(digits.collect());
        }
    }
    let tables = sections
        .iter()
        .filter(|section| [SHT_DYNSYM, SHT_SYMTAB].contains(&section.sh_type(endian)));
    for table in tables {
        let names = sections.section(table.link(endian))?;
        for section in [table, names] {
            ensure!(section.sh_size(endian) <= TABLE, "its tables are too large");
        }
        let names = names.data(endian, data)?;
        let symbols: &[Sym64<Endianness>] = table.data_as_array(endian, data)?;
        for symbol in symbols {
            let is_code = [STT_FUNC, STT_GNU_IFUNC].contains(&symbol.st_type());
            if !is_code || symbol.st_shndx(endian) == SHN_UNDEF {
                continue;
            }
            let name = names
                .get(symbol.st_name(endian) as usize..)
                .unwrap_or_default();
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            let Some(what) = wanted(name) else {
                continue;
            };
            let at = offset(symbol.st_value(endian), segments, endian)?;
            let left = data.len().unwrap_or_default().saturating_sub(at);
            let code = data
                .read_bytes_at(at, left.min(BEGINNING))
                .unwrap_or_default();
            functions.push(Function {
                at,
                what,
                code: code.to_vec(),
            });
        }
    }
    Ok(Contents {
        machine: header.e_machine(endian),
        functions,
        build_id,
    })
}

/// Returns the first text of the library's read-only data that follows `begin`, as far as `is_part` says.
pub(crate) fn text_after(
    file: &File,
    begin: &[u8],
    is_part: impl Fn(u8) -> bool,
) -> anyhow::Result<Option<String>> {
    let data = &ReadCache::new(file);
    let header = FileHeader64::<Endianness>::parse(data).context("read the ELF header")?;
    let endian = header.endian()?;
    let sections = header.sections(endian, data)?;
    for section in sections.iter() {
        let name = sections.section_name(endian, section).unwrap_or_default();
        if !name.starts_with(b".rodata") || section.sh_size(endian) > TABLE {
            continue;
        }
        let bytes = section.data(endian, data)?;
        let mut places = memchr::memmem::find_iter(bytes, begin);
        let found = places.find_map(|at| {
            let rest = &bytes[at + begin.len()..];
            let text: Vec<u8> = rest.iter().copied().take_while(|b| is_part(*b)).collect();
            let starts = text.first().is_some_and(u8::is_ascii_digit);
            starts.then(|| String::from_utf8_lossy(&text).into_owned())
        });
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// Where an address of the library lies in its file.
fn offset(
    address: u64,
    segments: &[ProgramHeader64<Endianness>],
    endian: Endianness,
) -> anyhow::Result<u64> {
    let inside = segments.iter().find_map(|segment| {
        let code = segment.p_type(endian) == PT_LOAD && segment.p_flags(endian) & PF_X != 0;
        let within = address.checked_sub(segment.p_vaddr(endian))?;
        let there = code && within < segment.p_filesz(endian);
        there.then(|| within.checked_add(segment.p_offset(endian)))?
    });
    inside.context("a function lies outside of the code")
}

/// How much of a function is looked at.
const BEGINNING: u64 = 32;

/// How many bytes after a function's beginning a probe costs little, or why there is no such place.
///
/// The kernel emulates pushes of a register, `nop`, and relative jumps and calls (`push_setup_xol_ops` and
/// `branch_setup_xol_ops` of arch/x86/kernel/uprobes.c, alike since 5.1), about 0.5 µs; anything else it runs out of line, with
/// two traps more. What is passed over neither touches the stack, so that the return address is on top of it at the probe, nor
/// is it jumped back to.
pub(crate) fn cheap(code: &[u8]) -> Result<u64, String> {
    let mut at = 0;
    loop {
        let rest = code.get(at..).unwrap_or_default();
        at += match rest {
            // push, nop, jmp, call, the conditional jumps with a short and a long way.
            [0x50..=0x57 | 0x90 | 0xeb | 0xe9 | 0xe8 | 0x70..=0x7f, ..]
            | [0x41, 0x50..=0x57, ..]
            | [0x0f, 0x80..=0x8f, ..] => return Ok(at as u64),
            // endbr64.
            [0xf3, 0x0f, 0x1e, 0xfa, ..] => 4,
            // nopl 0(%rax,%rax,1), which the kernel emulates from 6.18 on.
            [0x0f, 0x1f, 0x44, 0x00, 0x00, ..] => 5,
            // cmpl $number, distance(%rip), with which the stubs of NVIDIA's driver begin. A conditional jump follows.
            [0x81, 0x3d, _, _, _, _, _, _, _, _, 0x70..=0x7f, ..]
            | [0x81, 0x3d, _, _, _, _, _, _, _, _, 0x0f, 0x80..=0x8f, ..] => 10,
            [0xf0, ..] => {
                return Err("it begins with a lock prefix, where the kernel says that it probes and does not".to_owned());
            }
            _ => {
                let bytes = rest.iter().take(8).map(|byte| format!(" {byte:02x}"));
                return Err(format!(
                    "a probe would cost each call some 20 µs: the kernel does not emulate the instruction{}",
                    bytes.collect::<String>()
                ));
            }
        };
    }
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
    fn a_probe_goes_where_the_kernel_emulates_the_instruction() {
        let stub = [
            0x81, 0x3d, 1, 2, 3, 4, 0x00, 0xba, 0x1c, 0x32, 0x74, 6, 0xff, 0x25,
        ];
        for (place, code) in [
            (0, &[0x55, 0x48][..]),
            (0, &[0x41, 0x57, 0x41]),
            (0, &[0x90]),
            (0, &[0xe9, 1, 2, 3, 4]),
            (0, &[0x0f, 0x84, 1, 2, 3, 4]),
            (4, &[0xf3, 0x0f, 0x1e, 0xfa, 0x53]),
            (9, &[0xf3, 0x0f, 0x1e, 0xfa, 0x0f, 0x1f, 0x44, 0, 0, 0x55]),
            (10, &stub),
            (14, &[&[0xf3, 0x0f, 0x1e, 0xfa][..], &stub].concat()),
        ] {
            assert_eq!(cheap(code), Ok(place), "{code:x?}");
        }
        for (why, code) in [
            ("instruction 48 89 f8", &[0x48, 0x89, 0xf8][..]),
            (
                "instruction 48 83 ec 08 e8",
                &[0xf3, 0x0f, 0x1e, 0xfa, 0x48, 0x83, 0xec, 8, 0xe8],
            ),
            // What follows the comparison is no jump, or not known.
            ("instruction 81 3d", &stub[..10]),
            (
                "instruction 81 3d",
                &[0x81, 0x3d, 1, 2, 3, 4, 5, 6, 7, 8, 0x0f, 0x94],
            ),
            // A jump of 16 bits, which the kernel refuses; jumps by pointer.
            ("instruction 66 e9", &[0x66, 0xe9, 1, 2]),
            ("instruction ff 25", &[0xff, 0x25, 1, 2, 3, 4]),
            ("lock prefix", &[0xf0, 0xff, 0x05]),
            ("emulate the instruction", &[]),
        ] {
            let said = cheap(code).expect_err("refused");
            assert!(said.contains(why), "{said}");
        }
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
