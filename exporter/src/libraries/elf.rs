// SPDX-License-Identifier: Apache-2.0
//! What is in a library: which functions, and where in them does a probe cost little?
//!
//! A file comes from a container, so nothing that it says of itself is believed. Every length is bounded before it is read, all
//! that is read of a file is bounded together, and no work is more than linear in what is read.

use std::{
    cell::Cell,
    collections::BTreeSet,
    fs::File,
    io,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use object::{
    Endianness, Pod,
    elf::{
        FileHeader64, NT_GNU_BUILD_ID, PF_X, PT_LOAD, ProgramHeader64, SHN_UNDEF, SHT_DYNSYM,
        SHT_NOTE, SHT_SYMTAB, STT_FUNC, STT_GNU_IFUNC, SectionHeader64, Sym64,
    },
    pod,
    read::elf::{FileHeader, ProgramHeader, SectionHeader, Sym},
};
use serde::{Deserialize, Serialize};

use super::{Refusal, Skip};

/// Bytes that are read of one file in one attempt. Of libnccl and libcuda it is a tenth.
const READ: u64 = 64 << 20;

/// How long one attempt may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes that are read at once.
const PIECE: u64 = 1 << 20;

/// Sections and segments of a file. Libraries have some forty.
const HEADERS: u16 = 4096;

/// Bytes of a table of names, which is held while its symbols pass by.
const NAMES: u64 = 32 << 20;

/// Bytes of a name.
const NAME: usize = 256;

/// Bytes of a section of notes, how many of them are looked at, and bytes of a build id.
const NOTES: u64 = 4 << 10;
const NOTE_SECTIONS: usize = 8;
const BUILD_ID: usize = 64;

/// Functions that are found. Nobody looks for as many names.
const FUNCTIONS: usize = 256;

/// Bytes of a function that are looked at.
const BEGINNING: u64 = 32;

/// Bytes of a text that is looked for.
const TEXT: usize = 64;

/// Reads a file piece by piece, as much as one attempt may.
struct Reader<'f> {
    file: &'f File,
    size: u64,
    left: Cell<u64>,
    until: Instant,
    /// What the last error was about, where it was not the file's contradicting itself.
    skip: Cell<Skip>,
}

impl<'f> Reader<'f> {
    fn new(file: &'f File) -> io::Result<Self> {
        Ok(Self {
            file,
            size: file.metadata()?.len(),
            left: Cell::new(READ),
            until: Instant::now() + PATIENCE,
            skip: Cell::new(Skip::Malformed),
        })
    }

    fn read(&self, at: u64, length: u64) -> anyhow::Result<Vec<u8>> {
        let end = at.checked_add(length);
        ensure!(
            end.is_some_and(|end| end <= self.size),
            "it says that it has more than it has"
        );
        let Some(left) = self.left.get().checked_sub(length) else {
            self.skip.set(Skip::Size);
            bail!("more than {} MiB of it would be read", READ >> 20);
        };
        self.left.set(left);
        let mut bytes = vec![0; usize::try_from(length)?];
        let mut from = at;
        for piece in bytes.chunks_mut(PIECE as usize) {
            if Instant::now() >= self.until {
                self.skip.set(Skip::Deadline);
                bail!("reading it takes longer than {} s", PATIENCE.as_secs());
            }
            if let Err(error) = self.file.read_exact_at(piece, from) {
                self.skip.set(Skip::Unreadable);
                return Err(error).context("cannot read it");
            }
            from += piece.len() as u64;
        }
        Ok(bytes)
    }

    /// An error, with what it was about.
    fn refusal(&self, error: &anyhow::Error) -> Refusal {
        let skip = self.skip.replace(Skip::Malformed);
        Refusal::new(skip, format!("{error:#}"))
    }

    fn table<T: Pod>(&self, at: u64, count: usize) -> anyhow::Result<Vec<T>> {
        let bytes = self.read(at, (count * size_of::<T>()) as u64)?;
        let (table, _) = pod::slice_from_bytes::<T>(&bytes, count)
            .map_err(|()| anyhow::anyhow!("a table of it is cut off"))?;
        Ok(table.to_vec())
    }
}

type Section = SectionHeader64<Endianness>;

/// An ELF file of 64 bits, as far as its headers tell.
struct Elf<'r> {
    reader: &'r Reader<'r>,
    endian: Endianness,
    machine: u16,
    sections: Vec<Section>,
    segments: Vec<ProgramHeader64<Endianness>>,
    names: u16,
}

/// What is looked for in a library.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Wanted {
    /// Functions, by their names.
    pub(crate) names: BTreeSet<String>,
    /// Functions, by what C++ makes their names of.
    pub(crate) inside: BTreeSet<String>,
    /// The texts of which one stands before that of the version, which is looked for where the library has one of [`Self::of_version`].
    pub(crate) before_version: Vec<String>,
    /// The functions that a library with such a version has.
    pub(crate) of_version: BTreeSet<String>,
}

impl Wanted {
    fn has(&self, name: &[u8]) -> bool {
        let Ok(name) = std::str::from_utf8(name) else {
            return false;
        };
        self.names.contains(name) || cpp(name).is_some_and(|inside| self.inside.contains(inside))
    }
}

/// The plain name in one of C++'s: _Z13bootstrapInit…, and _ZL9commAlloc… where it is static. What follows are arguments, and for a
/// copy that the compiler has specialised .isra or .constprop; .cold is a part of it.
pub(crate) fn cpp(name: &str) -> Option<&str> {
    let rest = name.strip_prefix("_Z")?;
    let rest = rest.strip_prefix('L').unwrap_or(rest);
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let length: usize = rest[..digits].parse().ok()?;
    let plain = rest.get(digits..digits.checked_add(length)?)?;
    (!name.contains(".cold")).then_some(plain)
}

/// A function of a library that has one of the names that are looked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Function {
    /// Its name.
    pub(crate) name: String,
    /// Where it begins in the file.
    pub(crate) at: u64,
    /// Its first bytes.
    pub(crate) code: Vec<u8>,
}

/// What a library has of what is looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Library {
    /// The machine that it is for, `e_machine`.
    pub(crate) machine: u16,
    /// Those of its functions, of several names of one place each.
    pub(crate) functions: Vec<Function>,
    /// Its build id, in hex digits. This and the following only where it has such a function.
    pub(crate) build_id: Option<String>,
    /// The text before its version, and the version: digits and dots.
    pub(crate) version: Option<(String, String)>,
    /// What of it is passed over.
    pub(crate) lacks: Vec<Refusal>,
}

impl Library {
    /// Reads a file.
    ///
    /// # Errors
    /// When it is no library, or one that says of itself what no library would.
    pub(crate) fn of(file: &File, wanted: &Wanted) -> Result<Self, Refusal> {
        let unreadable =
            |error| Refusal::new(Skip::Unreadable, format!("cannot look at it: {error}"));
        let reader = Reader::new(file).map_err(unreadable)?;
        Self::read(&reader, wanted)
    }

    fn read(reader: &Reader<'_>, wanted: &Wanted) -> Result<Self, Refusal> {
        let elf = Elf::of(reader).map_err(|why| reader.refusal(&why))?;
        let mut library = Self {
            machine: elf.machine,
            ..Self::default()
        };
        let all = elf.functions(wanted, &mut library);
        all.map_err(|why| reader.refusal(&why))?;
        let has = |name: &str| {
            library
                .functions
                .iter()
                .any(|function| function.name == name)
        };
        let versioned = wanted.of_version.iter().any(|name| has(name));
        if !library.functions.is_empty() {
            library.build_id = elf.build_id(&mut library.lacks);
        }
        if versioned {
            match elf.text_after(&wanted.before_version) {
                Ok(version) => library.version = version,
                Err(why) => {
                    let mut lack = reader.refusal(&why);
                    lack.why = format!("its version is not known: {}", lack.why);
                    library.lacks.push(lack);
                }
            }
        }
        Ok(library)
    }
}

impl<'r> Elf<'r> {
    /// Reads the headers.
    fn of(reader: &'r Reader<'r>) -> anyhow::Result<Self> {
        let header = reader.table::<FileHeader64<Endianness>>(0, 1);
        let header = header.context("it is no ELF file")?[0];
        ensure!(header.is_supported(), "it is no ELF file of 64 bits");
        let endian = header.endian()?;
        let (sections, segments) = (header.e_shnum(endian), header.e_phnum(endian));
        ensure!(
            (1..=HEADERS).contains(&sections) && segments <= HEADERS,
            "it has no table of sections, or too large ones"
        );
        Ok(Self {
            endian,
            machine: header.e_machine(endian),
            sections: reader.table(header.e_shoff(endian), sections.into())?,
            segments: reader.table(header.e_phoff(endian), segments.into())?,
            names: header.e_shstrndx(endian),
            reader,
        })
    }

    /// Its build id, in hex digits.
    fn build_id(&self, lacks: &mut Vec<Refusal>) -> Option<String> {
        let endian = self.endian;
        let notes = || {
            let sections = self.sections.iter();
            sections.filter(|section| section.sh_type(endian) == SHT_NOTE)
        };
        let few = notes().filter(|section| section.sh_size(endian) <= NOTES);
        let found = few.take(NOTE_SECTIONS).find_map(|section| {
            let bytes = self.all(section).ok()?;
            build_id(&bytes, |word| match endian {
                Endianness::Little => u32::from_le_bytes(word),
                Endianness::Big => u32::from_be_bytes(word),
            })
        });
        let large = notes().any(|section| section.sh_size(endian) > NOTES);
        if found.is_none() && (large || notes().count() > NOTE_SECTIONS) {
            let why = format!(
                "its build id is not looked for in notes of more than {} KiB, nor in more than {NOTE_SECTIONS} sections",
                NOTES >> 10
            );
            lacks.push(Refusal::new(Skip::Notes, why));
        }
        found
    }

    fn all(&self, section: &Section) -> anyhow::Result<Vec<u8>> {
        let endian = self.endian;
        self.reader
            .read(section.sh_offset(endian), section.sh_size(endian))
    }

    /// Finds functions among those that it exports and, where it is not stripped, all others.
    ///
    /// # Errors
    /// When what it exports cannot be read.
    fn functions(&self, wanted: &Wanted, library: &mut Library) -> anyhow::Result<()> {
        let tables = |kind: u32| {
            let tables = self.sections.iter();
            tables.filter(move |section| section.sh_type(self.endian) == kind)
        };
        let mut long = 0;
        if let Some(exported) = tables(SHT_DYNSYM).next() {
            long += self.functions_of(exported, wanted, &mut library.functions)?;
        }
        if let Some(all) = tables(SHT_SYMTAB).next() {
            let before = library.functions.len();
            match self.functions_of(all, wanted, &mut library.functions) {
                Ok(more) => long += more,
                Err(why) if before > 0 => {
                    library.functions.truncate(before);
                    library.lacks.push(self.reader.refusal(&why));
                }
                Err(why) => return Err(why),
            }
        }
        if library.functions.is_empty() {
            return Ok(());
        }
        if tables(SHT_DYNSYM).count() > 1 || tables(SHT_SYMTAB).count() > 1 {
            let why = "of its tables of symbols the first of each kind is read";
            library.lacks.push(Refusal::new(Skip::Symbols, why));
        }
        if long > 0 {
            let why = format!(
                "{long} of its functions have names of more than {NAME} bytes, which are not looked at"
            );
            library.lacks.push(Refusal::new(Skip::Names, why));
        }
        Ok(())
    }

    /// Adds to what is found, and returns how many names are too long to be looked at.
    fn functions_of(
        &self,
        table: &Section,
        wanted: &Wanted,
        found: &mut Vec<Function>,
    ) -> anyhow::Result<usize> {
        let endian = self.endian;
        let names = self.sections.get(table.sh_link(endian) as usize);
        let names = names.context("its symbols have no names")?;
        if names.sh_size(endian) > NAMES {
            self.reader.skip.set(Skip::Size);
            bail!(
                "the names of its symbols have more than {} MiB",
                NAMES >> 20
            );
        }
        let names = self.all(names)?;
        let mut long = 0;
        let each = size_of::<Sym64<Endianness>>() as u64;
        let (mut at, mut left) = (table.sh_offset(endian), table.sh_size(endian) / each);
        while left > 0 {
            let count = left.min(PIECE / each);
            let symbols = self.reader.table::<Sym64<Endianness>>(at, count as usize)?;
            left -= count;
            at += count * each;
            for symbol in &symbols {
                let is_code = [STT_FUNC, STT_GNU_IFUNC].contains(&symbol.st_type());
                if !is_code || symbol.st_shndx(endian) == SHN_UNDEF {
                    continue;
                }
                let begin = symbol.st_name(endian);
                let Some(called) = name(&names, begin) else {
                    long += usize::from((begin as usize) < names.len());
                    continue;
                };
                if !wanted.has(called) {
                    continue;
                }
                if found.len() == FUNCTIONS {
                    self.reader.skip.set(Skip::Symbols);
                    bail!("more than {FUNCTIONS} functions have the names that are looked for");
                }
                let at = self.offset(symbol.st_value(endian))?;
                let code = self.reader.size.saturating_sub(at).min(BEGINNING);
                found.push(Function {
                    name: String::from_utf8_lossy(called).into_owned(),
                    at,
                    code: self.reader.read(at, code)?,
                });
            }
        }
        Ok(long)
    }

    /// Where an address of the library lies in its file.
    fn offset(&self, address: u64) -> anyhow::Result<u64> {
        let endian = self.endian;
        let inside = self.segments.iter().find_map(|segment| {
            let code = segment.p_type(endian) == PT_LOAD && segment.p_flags(endian) & PF_X != 0;
            let within = address.checked_sub(segment.p_vaddr(endian))?;
            let there = code && within < segment.p_filesz(endian);
            there.then(|| within.checked_add(segment.p_offset(endian)))?
        });
        inside.context("a function lies outside of the code")
    }

    /// Returns the first text of digits and dots in the library's read-only data that follows one of `begins`, at most 64 bytes, and that.
    /// It begins with a digit.
    ///
    /// # Errors
    /// When the data cannot be read.
    fn text_after(&self, begins: &[String]) -> anyhow::Result<Option<(String, String)>> {
        let endian = self.endian;
        let names = self.sections.get(usize::from(self.names));
        let names = names.filter(|names| names.sh_size(endian) <= u64::from(HEADERS) * 64);
        let names = names.map(|names| self.all(names)).transpose()?;
        for section in &self.sections {
            let names = names.as_deref().unwrap_or_default();
            let called = name(names, section.sh_name(endian)).unwrap_or_default();
            if !called.starts_with(b".rodata") {
                continue;
            }
            // Pieces overlap, so that what lies across two is whole in one.
            let longest = begins.iter().map(String::len).max().unwrap_or_default();
            let overlap = (longest + TEXT) as u64;
            let (mut at, mut left) = (section.sh_offset(endian), section.sh_size(endian));
            while left > 0 {
                let piece = self.reader.read(at, left.min(PIECE))?;
                let found = begins.iter().filter_map(|begin| {
                    let (place, text) = number_after(&piece, begin, left <= PIECE)?;
                    Some((place, begin, text))
                });
                if let Some((_, begin, text)) = found.min_by_key(|(place, ..)| *place) {
                    return Ok(Some((begin.clone(), text)));
                }
                let step = match left > PIECE {
                    true => PIECE - overlap,
                    false => left,
                };
                at += step;
                left -= step;
            }
        }
        Ok(None)
    }
}

/// Where in a piece of a text digits and dots follow `begin`, and which. In the `last` piece they may end with it: in others they are whole
/// in the next.
fn number_after(piece: &[u8], begin: &str, last: bool) -> Option<(usize, String)> {
    let is_part = |byte: &u8| byte.is_ascii_digit() || *byte == b'.';
    memchr::memmem::find_iter(piece, begin).find_map(|place| {
        let rest = &piece[place + begin.len()..];
        let rest = &rest[..rest.len().min(TEXT)];
        let text: Vec<u8> = rest.iter().copied().take_while(is_part).collect();
        let starts = text.first().is_some_and(u8::is_ascii_digit);
        let whole = text.len() < rest.len() || rest.len() == TEXT || last;
        (starts && whole).then(|| (place, String::from_utf8_lossy(&text).into_owned()))
    })
}

/// A name that begins somewhere in a table of names. `None`: it lies outside, or is longer than any that is looked for.
fn name(names: &[u8], begin: u32) -> Option<&[u8]> {
    let rest = names.get(begin as usize..)?;
    let rest = &rest[..rest.len().min(NAME)];
    let end = memchr::memchr(0, rest)?;
    Some(&rest[..end])
}

/// The build id among notes.
fn build_id(mut notes: &[u8], number: impl Fn([u8; 4]) -> u32) -> Option<String> {
    loop {
        let (head, rest) = notes.split_at_checked(12)?;
        let word = |at: usize| number([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let padded = |length: u32| (length as usize).checked_next_multiple_of(4);
        let (name, rest) = rest.split_at_checked(padded(word(0))?)?;
        let (desc, rest) = rest.split_at_checked(padded(word(4))?)?;
        let desc = desc.get(..word(4) as usize)?;
        if name == b"GNU\0" && word(8) == NT_GNU_BUILD_ID && (1..=BUILD_ID).contains(&desc.len()) {
            return Some(desc.iter().map(|byte| format!("{byte:02x}")).collect());
        }
        notes = rest;
    }
}

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

#[cfg(test)]
mod tests;
