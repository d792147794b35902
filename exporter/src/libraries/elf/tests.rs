// SPDX-License-Identifier: Apache-2.0
//! What is read of libraries, made-up ones and those of this host.

use std::{fs, io::Write};

use proptest::prelude::*;

use super::*;

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

/// Where a made-up library has its parts.
const CODE: usize = 0x1000;
const SECTIONS: usize = 0x2000;
const DATA: usize = 0x3000;

/// A library with symbols, texts and notes of its own.
struct Made {
    /// Name, address.
    symbols: Vec<(Vec<u8>, u64)>,
    text: Vec<u8>,
    note: Vec<u8>,
}

impl Made {
    fn new() -> Self {
        let symbols = [
            ("ncclAllReduce", 0x10),
            ("other", 0x20),
            ("cuLaunchKernel", 0x30),
        ];
        let mut note = Vec::new();
        for word in [4, 3, 3] {
            note.extend(u32::to_le_bytes(word));
        }
        note.extend(b"GNU\0\x01\xab\xff\0");
        Self {
            symbols: symbols
                .map(|(name, at)| (name.as_bytes().to_vec(), at))
                .to_vec(),
            text: b"so NCCL version x and NCCL version 2.27.5+cuda12.9\0".to_vec(),
            note,
        }
    }

    /// The parts after the headers: null, dynsym, dynstr, rodata, note, names of sections.
    fn bytes(&self) -> Vec<u8> {
        let mut names = vec![0];
        let mut table = vec![0; 24];
        for (name, at) in &self.symbols {
            table.extend(u32::try_from(names.len()).expect("small").to_le_bytes());
            table.extend([0x12, 0, 1, 0]);
            table.extend((0x4000 + at).to_le_bytes());
            table.extend(8_u64.to_le_bytes());
            names.extend(name);
            names.push(0);
        }
        let shown = b"\0.dynsym\0.dynstr\0.rodata.str1.1\0.note\0.shstrtab\0";
        let parts: [(u32, u32, u32, &[u8]); 5] = [
            (1, SHT_DYNSYM, 2, &table),
            (9, 3, 0, &names),
            (17, 1, 0, &self.text),
            (33, SHT_NOTE, 0, &self.note),
            (39, 3, 0, shown),
        ];
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        file.extend([3, 0, 62, 0, 1, 0, 0, 0]);
        for word in [0, 64, SECTIONS as u64] {
            file.extend(word.to_le_bytes());
        }
        file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 6, 0, 5, 0]);
        // One segment: all of the file at 0x3000 and on, its code at 0x4000.
        file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
        for word in [0, 0x3000, 0x3000, 0x2000_u64, 0x2000, 0x1000] {
            file.extend(word.to_le_bytes());
        }
        file.resize(CODE, 0);
        file.resize(SECTIONS, 0x90);
        file.resize(SECTIONS + 64, 0);
        let mut at = DATA;
        for (name, kind, link, part) in parts {
            file.extend(u32::to_le_bytes(name));
            file.extend(u32::to_le_bytes(kind));
            for word in [0, 0, at as u64, part.len() as u64] {
                file.extend(word.to_le_bytes());
            }
            file.extend(u32::to_le_bytes(link));
            file.extend([0; 20]);
            at += part.len();
        }
        file.resize(DATA, 0);
        for (.., part) in parts {
            file.extend(part);
        }
        file
    }
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(bytes).expect("room");
    file
}

fn wanted() -> Wanted {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    Wanted {
        names: names(&["ncclAllReduce", "cuLaunchKernel", "main"]),
        inside: BTreeSet::new(),
        before_version: ["NCCL version ", "RCCL version : "]
            .map(str::to_owned)
            .into(),
        of_version: names(&["ncclAllReduce", "cuLaunchKernel"]),
    }
}

/// All that is ever asked of a file, and how many bytes were read for it.
fn look(file: &File) -> (Result<Library, Refusal>, u64) {
    let reader = Reader::new(file).expect("open");
    let seen = Library::read(&reader, &wanted());
    (seen, READ - reader.left.get())
}

fn names(library: &Library) -> Vec<&str> {
    let functions = library.functions.iter();
    functions.map(|function| &*function.name).collect()
}

fn version(library: &Library) -> Option<(&str, &str)> {
    let version = library.version.as_ref();
    version.map(|(begin, number)| (&**begin, &**number))
}

#[test]
fn what_a_library_has_is_found() {
    let (seen, read) = look(&file(&Made::new().bytes()));
    let library = seen.expect("it is sound");
    assert_eq!(names(&library), ["ncclAllReduce", "cuLaunchKernel"]);
    assert_eq!(library.build_id.as_deref(), Some("01abff"));
    assert_eq!(version(&library), Some(("NCCL version ", "2.27.5")));
    assert_eq!(library.lacks, []);
    assert!(read < 64 << 10, "{read}");

    let own = File::open("/proc/self/exe").expect("it runs");
    let own = Library::of(&own, &wanted()).expect("an ELF file with symbols");
    assert_eq!(names(&own), ["main"]);
}

#[test]
fn a_text_across_two_pieces_is_found() {
    for before in [
        PIECE - 40,
        PIECE - 20,
        PIECE - 14,
        PIECE - 1,
        2 * PIECE - 100,
    ] {
        let mut library = Made::new();
        library.text = vec![b'x'; before as usize];
        for (text, expected) in [
            ("NCCL version 2.30.7+cuda13.0", ("NCCL version ", "2.30.7")),
            (
                "RCCL version : 2.27.7-HEAD:0d2c4fd",
                ("RCCL version : ", "2.27.7"),
            ),
        ] {
            library.text.truncate(before as usize);
            library.text.extend(text.as_bytes());
            library.text.push(0);
            let (seen, _) = look(&file(&library.bytes()));
            let library = seen.expect("it is sound");
            assert_eq!(version(&library), Some(expected), "{before}");
        }
    }
}

/// 20 000 symbols whose names all begin in one text of a megabyte that nothing ends: looked at to its end for each of them, these would be
/// twenty thousand million bytes.
#[test]
fn names_without_end_are_not_looked_for_to_the_end() {
    let mut library = Made::new();
    library.symbols = vec![(vec![b'n'; 1 << 20], 0)];
    let mut bytes = library.bytes();
    let end = bytes.len();
    let mut symbols = Vec::new();
    for number in 0..20_000_u32 {
        symbols.extend((1 + number).to_le_bytes());
        symbols.extend([0x12, 0, 1, 0]);
        symbols.extend(0x4000_u64.to_le_bytes());
        symbols.extend(8_u64.to_le_bytes());
    }
    let place = SECTIONS + 64 + 24;
    bytes[place..place + 8].copy_from_slice(&(end as u64).to_le_bytes());
    bytes[place + 8..place + 16].copy_from_slice(&(symbols.len() as u64).to_le_bytes());
    bytes.extend(symbols);
    let (seen, _) = look(&file(&bytes));
    assert_eq!(seen.expect("it is read").functions, []);
}

/// A section of notes of two gigabytes of nothing, as a sparse file has it.
#[test]
fn what_is_large_is_not_read() {
    let sound = Made::new().bytes();
    for section in 1..=5_usize {
        let mut bytes = sound.clone();
        let place = SECTIONS + 64 * section + 32;
        bytes[place..place + 8].copy_from_slice(&(2_u64 << 30).to_le_bytes());
        let file = file(&bytes);
        file.set_len(3 << 30).expect("a sparse file");
        let (seen, read) = look(&file);
        println!("section {section}: {seen:?}, {read} bytes read");
        assert!(read <= READ);
        let skips = match &seen {
            Ok(library) => library.lacks.iter().map(|lack| lack.skip).collect(),
            Err(refusal) => vec![refusal.skip],
        };
        // Its symbols, their names, its notes; of its text the beginning is enough.
        let expected = match section {
            1 | 2 => Some(&Skip::Size),
            4 => Some(&Skip::Notes),
            _ => None,
        };
        assert_eq!(skips.first(), expected, "{section}");
    }
}

#[test]
fn what_is_passed_over_is_said() {
    let mut library = Library::of(&file(&Made::new().bytes()), &wanted()).expect("sound");
    assert_eq!(library.lacks, []);
    let mut long = Made::new();
    long.symbols.push((vec![b'n'; NAME], 0x40));
    let mut bytes = long.bytes();
    // Its notes pass for a second table of what it exports.
    let place = SECTIONS + 64 * 4 + 4;
    bytes[place..place + 4].copy_from_slice(&SHT_DYNSYM.to_le_bytes());
    library = Library::of(&file(&bytes), &wanted()).expect("read");
    let skips: Vec<_> = library.lacks.iter().map(|lack| lack.skip).collect();
    assert_eq!(skips, [Skip::Symbols, Skip::Names]);
    assert_eq!(names(&library), ["ncclAllReduce", "cuLaunchKernel"]);
}

#[test]
fn functions_are_known_by_the_names_that_cpp_makes_of_theirs() {
    for (name, plain) in [
        (
            "_Z20ncclCommInitRankFuncP12ncclAsyncJob",
            Some("ncclCommInitRankFunc"),
        ),
        ("_ZL9commAllocP8ncclCommS0_ii", Some("commAlloc")),
        ("_ZL9commAllocP8ncclCommS0_ii.isra.0", Some("commAlloc")),
        ("_ZL9commAllocP8ncclCommS0_ii.cold", None),
        ("_Z99commAlloc", None),
        ("_Z18446744073709551615commAlloc", None),
        ("_Zcomm", None),
        ("_Z2\u{e9}", Some("\u{e9}")),
        ("_Z1\u{e9}", None),
        ("commAlloc", None),
        ("", None),
    ] {
        assert_eq!(cpp(name), plain, "{name}");
    }
}

#[test]
fn a_library_with_too_many_functions_of_a_name_is_refused() {
    let mut library = Made::new();
    library.symbols = vec![(b"ncclAllReduce".to_vec(), 0x10); FUNCTIONS + 1];
    let (seen, _) = look(&file(&library.bytes()));
    let refusal = seen.expect_err("too many");
    assert!(
        refusal.why.contains("more than 256 functions"),
        "{refusal:?}"
    );
    assert_eq!(refusal.skip, Skip::Symbols);
}

#[test]
fn what_is_no_file_of_elf_is_refused_in_a_line() {
    for bytes in [&b""[..], b"\x7fELF", b"#!/bin/sh\n", &[0; 4096]] {
        let refusal = look(&file(bytes)).0.expect_err("no ELF file");
        let why = refusal.why;
        assert_eq!(refusal.skip, Skip::Malformed);
        assert!(
            why.contains("it is no ELF file") && !why.contains('\n'),
            "{why}"
        );
    }
    let maps = fs::File::open("/proc/self/maps").expect("procfs");
    look(&maps).0.expect_err("no ELF file");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Truncated, with any of its bytes another, with tables that lie over each other or themselves: it ends, with an answer or a reason.
    #[test]
    fn a_spoilt_library_is_read_or_refused(
        cut in prop::option::weighted(0.3, 0..0x3400_usize),
        bytes in prop::collection::vec((0..0x3400_usize, any::<u8>()), 0..8),
        words in prop::collection::vec((prop::sample::select(vec![32_usize, 40, 56, 58, 60, 62, 64 + 8, 64 + 16, 64 + 32]), any::<u64>()), 0..3),
        headers in prop::collection::vec((1..6_usize, prop::sample::select(vec![0_usize, 4, 24, 32, 40]), prop_oneof![any::<u64>(), 0..0x4000_u64]), 0..6),
    ) {
        let mut spoilt = Made::new().bytes();
        for (at, byte) in bytes {
            if let Some(place) = spoilt.get_mut(at) {
                *place = byte;
            }
        }
        for (at, word) in words {
            spoilt[at..at + 2].copy_from_slice(&word.to_le_bytes()[..2]);
        }
        for (section, field, word) in headers {
            let at = SECTIONS + 64 * section + field;
            let width = if field == 0 || field == 4 || field == 40 { 4 } else { 8 };
            spoilt[at..at + width].copy_from_slice(&word.to_le_bytes()[..width]);
        }
        if let Some(cut) = cut {
            spoilt.truncate(cut);
        }
        let (_, read) = look(&file(&spoilt));
        prop_assert!(read <= READ);
    }

    #[test]
    fn noise_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        let mut noise = b"\x7fELF\x02\x01\x01".to_vec();
        noise.extend(bytes);
        let (_, read) = look(&file(&noise));
        prop_assert!(read <= READ);
    }
}
