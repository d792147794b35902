// SPDX-License-Identifier: Apache-2.0
//! Where does the running kernel keep a member of a struct? Reads BTF, the type information that the
//! kernel publishes in `/sys/kernel/btf`; the eBPF programs get the answers as constants at load time.
//!
//! The format is described in `Documentation/bpf/btf.rst` and `include/uapi/linux/btf.h`.
//! The bytes are kept as read, with the position of each type; a lookup scans them, and everything it
//! follows is bounded, so no input makes it panic, hang or use much more memory than its own size.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    iter,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Where the kernel publishes its BTF: `vmlinux` and one file for each loaded module.
pub const SYS_BTF: &str = "/sys/kernel/btf";

/// How many members and references one lookup may visit, over all types of the name together.
///
/// A few hundred bytes can describe 2^30 members: structs without a name that each hold the next one twice.
/// To find that a struct lacks a member takes at most 273 steps in Linux 7.3, and 2,145 in its `amdgpu`.
pub const MAX_STEPS: u32 = 1 << 16;

/// How deep structs without a name, typedefs and qualifiers, or dimensions of an array may nest: the
/// kernel's own limit (`MAX_RESOLVE_DEPTH` in `kernel/bpf/btf.c`). It bounds the stack and ends cycles.
const MAX_DEPTH: u32 = 32;

/// Largest BTF that is read: Debian's kernels from 5.10 to 7.3 publish 3.6 to 5.5 MB, their `amdgpu`
/// 4.2 MB. Positions must fit in 32 bits.
const MAX_BYTES: usize = 64 << 20;

/// BTF does not record the size of a pointer. Chandra runs on 64-bit kernels only.
const POINTER_BYTES: u32 = 8;

/// `struct btf_type`: name, info, and size or type.
const TYPE_BYTES: usize = 12;

/// `struct btf_layout`: how many bytes follow a type of one kind.
const LAYOUT_BYTES: usize = 4;

const INT: u32 = 1;
const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FWD: u32 = 7;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const FLOAT: u32 = 16;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

/// Why BTF could not be read, or what it does not have.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The kernel is built without `CONFIG_DEBUG_INFO_BTF`, or the module is not loaded.
    #[error("{} does not exist", path.display())]
    Absent {
        /// The file that was looked for.
        path: PathBuf,
    },
    /// The files are readable by everyone on most kernels; a container's policy may differ.
    #[error("no permission to read {}", path.display())]
    Denied {
        /// The file that may not be read.
        path: PathBuf,
    },
    /// Any other failure to read the file.
    #[error("cannot read {}: {error}", path.display())]
    Read {
        /// The file that could not be read.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The bytes break a rule of the format.
    #[error("malformed BTF at byte {offset}: {what}")]
    Malformed {
        /// Position in the file of the header field, type or member that is wrong.
        offset: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The BTF of a big-endian kernel.
    #[error("big-endian BTF is not supported")]
    UnsupportedEndianness,
    /// No struct or union has this name.
    #[error("no struct {name}")]
    NoStruct {
        /// The name asked for.
        name: String,
    },
    /// The struct exists and has no such member.
    #[error("{of} has no member {member}")]
    NoMember {
        /// The struct, with the members already passed: `sock.__sk_common`.
        of: String,
        /// The member asked for.
        member: String,
    },
    /// The path continues behind a pointer, where no offset from the struct is fixed.
    #[error("{pointer} is a pointer: {member} is not part of the struct")]
    BehindPointer {
        /// The struct and the path up to the pointer.
        pointer: String,
        /// The member asked for behind it.
        member: String,
    },
    /// The path continues in a number, an array or another type without members.
    #[error("{of} is not a struct: it has no member {member}")]
    NotStruct {
        /// The struct and the path up to the member that has no members.
        of: String,
        /// The member asked for in it.
        member: String,
    },
    /// Different types of this name exist and give different answers.
    #[error("several types are named {name}, and they differ in what was asked")]
    Ambiguous {
        /// The name that they share.
        name: String,
    },
    /// The types refer to each other without end, or more deeply or widely than any kernel's do.
    #[error("types nest more than {MAX_DEPTH} deep or a lookup takes more than {MAX_STEPS} steps")]
    TooComplex,
}

/// Where a member lies and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Bytes from the start of the struct; of a bitfield, the byte that holds its first bit.
    pub offset: u32,
    /// Bytes it takes from there: of a bitfield the bytes that its bits touch, which may be 3, so round a load
    /// up; 0 for a flexible array; none for what has no size.
    pub size: Option<u32>,
    /// Only for a bitfield: shift within the little-endian number at `offset`, and width, in bits.
    pub bit: Option<(u8, u8)>,
    /// Whether it is a pointer (an array of pointers is not).
    pub pointer: bool,
    /// Name of the struct or union that it points to, if that has one.
    pub pointee: Option<String>,
}

/// Types of the kernel, or of one module together with those of the kernel below it.
pub struct Btf {
    data: Vec<u8>,
    strings: Range<usize>,
    layout: Range<usize>,
    /// Position in `data` of each type, by id from `first_id` on.
    types: Vec<u32>,
    first_id: u32,
    first_string: u32,
    base: Option<Arc<Btf>>,
}

impl fmt::Debug for Btf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Btf")
            .field("bytes", &self.data.len())
            .field("types", &self.types.len())
            .finish_non_exhaustive()
    }
}

impl Btf {
    /// Reads the types of the running kernel.
    pub fn vmlinux() -> Result<Btf, BtfError> {
        Btf::read(Path::new(SYS_BTF), "vmlinux", None)
    }

    /// Reads the types of a loaded module, on top of those of the kernel.
    ///
    /// The kernel writes a module's name with underscores: `ib_core` for `ib-core.ko`.
    pub fn module(name: &str, base: Arc<Btf>) -> Result<Btf, BtfError> {
        Btf::read(Path::new(SYS_BTF), name, Some(base))
    }

    /// Reads the file `name` of the folder `dir`; without `base` it must be a kernel's own.
    pub fn read(dir: &Path, name: &str, base: Option<Arc<Btf>>) -> Result<Btf, BtfError> {
        let path = dir.join(name);
        let read = || -> io::Result<Vec<u8>> {
            let file = File::open(&path)?;
            let length = usize::try_from(file.metadata()?.len()).unwrap_or(MAX_BYTES);
            let mut data = Vec::with_capacity(length.min(MAX_BYTES));
            // One byte more than is accepted, for `parse` to refuse.
            file.take(MAX_BYTES as u64 + 1).read_to_end(&mut data)?;
            Ok(data)
        };
        match read() {
            Ok(data) => Btf::parse(data, base),
            Err(error) => Err(match error.kind() {
                io::ErrorKind::NotFound => BtfError::Absent { path },
                io::ErrorKind::PermissionDenied => BtfError::Denied { path },
                _ => BtfError::Read { path, error },
            }),
        }
    }

    /// Checks the header and the extent of every type. With `base`, type ids and string offsets continue
    /// where the base's end ("split BTF").
    pub fn parse(data: Vec<u8>, base: Option<Arc<Btf>>) -> Result<Btf, BtfError> {
        if data.len() > MAX_BYTES {
            return Err(malformed(MAX_BYTES, "more than 64 MiB"));
        }
        let header = Header::read(&data)?;
        let strings = data.get(header.strings.clone()).unwrap_or_default();
        if base.is_none() && strings.first() != Some(&0) {
            return Err(malformed(
                header.strings.start,
                "the string section does not start with an empty string",
            ));
        }
        if strings.last().is_some_and(|last| *last != 0) {
            return Err(malformed(
                header.strings.end,
                "the string section does not end with NUL",
            ));
        }
        // Type 0 is `void` and has no bytes.
        let (first_id, first_string) = match &base {
            None => (1, 0),
            Some(base) => (base.end_id(), base.end_string()),
        };
        let mut btf = Btf {
            data,
            strings: header.strings,
            layout: header.layout,
            types: Vec::new(),
            first_id,
            first_string,
            base,
        };
        btf.types = btf.positions(header.types)?;
        let fits = |first: u32, count: usize| {
            u32::try_from(count).is_ok_and(|count| first.checked_add(count).is_some())
        };
        if !fits(btf.first_id, btf.types.len()) || !fits(btf.first_string, btf.strings.len()) {
            return Err(malformed(
                0,
                "more types or strings than 32 bits can number",
            ));
        }
        Ok(btf)
    }

    /// Finds a member by the path to it: `field("sock", "__sk_common.skc_state")`.
    ///
    /// The path goes through structs, unions, typedefs and qualifiers; members of a struct without a name
    /// count as members of the one that holds it, as in C. It does not follow pointers or index arrays.
    pub fn field(&self, type_name: &str, path: &str) -> Result<Field, BtfError> {
        let mut steps = Steps(MAX_STEPS);
        self.agreed(&[STRUCT, UNION], Some(type_name), |root| {
            root.field(type_name, path, &mut steps)
        })
    }

    /// How many parameters the function has, without the `...` of a variadic one.
    pub fn function_parameters(&self, name: &str) -> Option<usize> {
        let mut steps = Steps(MAX_STEPS);
        self.agreed(&[FUNC], Some(name), |function| {
            function.target(&mut steps)?.parameters()
        })
        .ok()
    }

    /// How many arguments a `tp_btf` program of the tracepoint gets: those of `TP_PROTO`.
    ///
    /// They are the parameters of `typedef void (*btf_trace_<tracepoint>)(void *__data, ...)`
    /// (`include/trace/bpf_probe.h`), without the first.
    pub fn tracepoint_arguments(&self, tracepoint: &str) -> Option<usize> {
        let mut steps = Steps(MAX_STEPS);
        let name = format!("btf_trace_{tracepoint}");
        let parameters = self.agreed(&[TYPEDEF], Some(&name), |typedef| {
            let pointer = typedef.target(&mut steps)?;
            pointer
                .must_be(PTR, "a tracepoint's typedef is not a pointer")?
                .target(&mut steps)?
                .parameters()
        });
        parameters.ok()?.checked_sub(1)
    }

    /// Value of an enumerator, of the enum named or of any; none if different enums give different values.
    ///
    /// Before pahole 1.24 (2022) BTF does not say that an enum is signed: a -1 reads as 4294967295 there. An
    /// unsigned 64-bit value keeps its bits, so one above `i64::MAX` is negative here.
    pub fn enumerator(&self, enum_name: Option<&str>, name: &str) -> Option<i64> {
        if !is_name(name) {
            return None;
        }
        let absent = || BtfError::NoMember {
            of: String::new(),
            member: String::new(),
        };
        self.agreed(&[ENUM, ENUM64], enum_name, |found| {
            found.enumerator(name).ok_or_else(absent)
        })
        .ok()
    }

    /// Bytes of the struct or union of this name, or else of the enum, number or typedef.
    pub fn size_of(&self, type_name: &str) -> Option<u32> {
        let mut steps = Steps(MAX_STEPS);
        [&[STRUCT, UNION][..], &[INT, ENUM, ENUM64, FLOAT, TYPEDEF]]
            .into_iter()
            .find_map(|kinds| {
                let size = self.agreed(kinds, Some(type_name), |named| {
                    named.resolve(&mut steps)?.size(&mut steps)
                });
                size.ok().flatten()
            })
    }

    /// The answer of the types of this name (or of all, without one). A module's own types hide those of the
    /// kernel that have the same name; of types in one file, those that have an answer must agree.
    ///
    /// Names are not unique. Unrelated drivers share some (`struct controller`), and a module whose BTF could
    /// not be matched with the kernel's repeats it: Debian's `ib_core` for 6.18.15 holds four `task_struct`.
    fn agreed<'a, T: PartialEq>(
        &'a self,
        kinds: &[u32],
        name: Option<&str>,
        mut ask: impl FnMut(Type<'a>) -> Result<T, BtfError>,
    ) -> Result<T, BtfError> {
        let mut refusal = None;
        for layer in self.layers() {
            let mut answer = None;
            for candidate in layer.named(kinds, name) {
                match ask(candidate) {
                    Ok(found) if answer.as_ref().is_some_and(|answer| *answer != found) => {
                        return Err(BtfError::Ambiguous {
                            name: name.unwrap_or_default().into(),
                        });
                    }
                    Ok(found) => answer = Some(found),
                    // That one of several lacks the member says less than any other refusal.
                    Err(error) => match refusal {
                        Some(BtfError::NoMember { .. })
                            if !matches!(error, BtfError::NoMember { .. }) =>
                        {
                            refusal = Some(error);
                        }
                        _ => _ = refusal.get_or_insert(error),
                    },
                }
            }
            if let Some(answer) = answer {
                return Ok(answer);
            }
        }
        Err(refusal.unwrap_or_else(|| BtfError::NoStruct {
            name: name.unwrap_or_default().into(),
        }))
    }

    /// This file, and the ones that it builds on.
    fn layers(&self) -> impl Iterator<Item = &Btf> {
        iter::successors(Some(self), |btf| btf.base.as_deref())
    }

    /// Types of this file alone, of some kinds, with this name or with any.
    fn named(&self, kinds: &[u32], name: Option<&str>) -> impl Iterator<Item = Type<'_>> {
        let mask = kinds.iter().fold(0_u128, |mask, kind| mask | 1 << kind);
        let types = if name.is_none_or(is_name) {
            &self.types[..]
        } else {
            &[]
        };
        types
            .iter()
            .filter_map(|at| self.type_at(*at as usize))
            .filter(move |found| mask >> found.kind() & 1 == 1)
            .filter(move |found| {
                name.is_none_or(|name| {
                    self.text(found.name)
                        .is_some_and(|text| is_text(text, name))
                })
            })
    }

    fn end_id(&self) -> u32 {
        self.first_id.saturating_add(self.types.len() as u32)
    }

    fn end_string(&self) -> u32 {
        self.first_string.saturating_add(self.strings.len() as u32)
    }

    /// Positions of all types of the section.
    fn positions(&self, section: Range<usize>) -> Result<Vec<u32>, BtfError> {
        let mut positions = Vec::new();
        let mut at = section.start;
        while at < section.end {
            let left = (section.end - at) as u64;
            let found = self.type_at(at).filter(|_| left >= TYPE_BYTES as u64);
            let found =
                found.ok_or(malformed(at, "a type is cut off by the end of its section"))?;
            let (fixed, each) = self
                .extent(found.kind())
                .ok_or(malformed(at, "a type of an unknown kind"))?;
            let bytes =
                TYPE_BYTES as u64 + u64::from(fixed) + u64::from(each) * found.count() as u64;
            if bytes > left {
                return Err(malformed(
                    at,
                    "the parts of a type reach past the end of its section",
                ));
            }
            positions.push(at as u32);
            at += bytes as usize;
        }
        positions.shrink_to_fit();
        Ok(positions)
    }

    /// How many bytes follow a type of this kind: once, and for each of its parts.
    ///
    /// Linux 7.1 adds a table of these ("layout", 01504da43e67), so that readers can pass over kinds that are
    /// newer than they are. A module's BTF that has none relies on the kernel's.
    fn extent(&self, kind: u32) -> Option<(u8, u8)> {
        match kind {
            INT | VAR | DECL_TAG => Some((4, 0)),
            ARRAY => Some((12, 0)),
            STRUCT | UNION | DATASEC | ENUM64 => Some((0, 12)),
            ENUM | FUNC_PROTO => Some((0, 8)),
            PTR | FWD | TYPEDEF | VOLATILE | CONST | RESTRICT | FUNC | FLOAT | TYPE_TAG => {
                Some((0, 0))
            }
            0 => None,
            _ => {
                let owner = self.layers().find(|btf| !btf.layout.is_empty())?;
                let table = owner.data.get(owner.layout.clone())?;
                match table.get(kind as usize * LAYOUT_BYTES..)? {
                    [fixed, each, _, _, ..] if fixed % 4 == 0 && each % 4 == 0 => {
                        Some((*fixed, *each))
                    }
                    _ => None,
                }
            }
        }
    }

    fn type_at(&self, at: usize) -> Option<Type<'_>> {
        let words = self
            .data
            .get(at..at + TYPE_BYTES)?
            .as_chunks::<4>()
            .0
            .first_chunk::<3>()?;
        let [name, info, size] = words.map(u32::from_le_bytes);
        Some(Type {
            btf: self,
            at,
            name,
            info,
            size,
        })
    }

    /// The type with this id, which a type of this file refers to.
    fn get(&self, id: u32) -> Option<Type<'_>> {
        if id == 0 {
            return Some(Type {
                btf: self,
                at: 0,
                name: 0,
                info: 0,
                size: 0,
            });
        }
        let owner = self.layers().find(|btf| id >= btf.first_id)?;
        owner.type_at(*owner.types.get((id - owner.first_id) as usize)? as usize)
    }

    /// The strings from this offset on; the one meant ends at the first NUL.
    fn text(&self, offset: u32) -> Option<&[u8]> {
        let owner = self.layers().find(|btf| offset >= btf.first_string)?;
        let text = owner
            .data
            .get(owner.strings.clone())?
            .get((offset - owner.first_string) as usize..)?;
        (!text.is_empty()).then_some(text)
    }
}

/// One type, in the file where it is described.
#[derive(Clone, Copy)]
struct Type<'a> {
    btf: &'a Btf,
    at: usize,
    name: u32,
    info: u32,
    /// Its size or, for the kinds that refer to one, the id of another type.
    size: u32,
}

/// A member as its struct describes it.
struct Member<'a> {
    bits: u64,
    /// Bits of a bitfield, 0 for others.
    width: u8,
    of: Type<'a>,
}

impl<'a> Type<'a> {
    /// Linux 7.2 widens the kind from 5 to 7 bits and the count from 16 to 24. Older kernels leave these zero.
    fn kind(self) -> u32 {
        self.info >> 24 & 0x7f
    }

    fn count(self) -> usize {
        (self.info & 0xff_ffff) as usize
    }

    fn flag(self) -> bool {
        self.info >> 31 == 1
    }

    /// The `count` parts of `N` words that follow the type.
    fn parts<const N: usize>(self, count: usize) -> impl Iterator<Item = [u32; N]> + use<'a, N> {
        let start = self.at + TYPE_BYTES;
        let bytes = self
            .btf
            .data
            .get(start..start + count * N * 4)
            .unwrap_or_default();
        bytes
            .as_chunks::<4>()
            .0
            .as_chunks::<N>()
            .0
            .iter()
            .map(|words| words.map(u32::from_le_bytes))
    }

    fn is_composite(self) -> bool {
        matches!(self.kind(), STRUCT | UNION)
    }

    fn must_be(self, kind: u32, what: &'static str) -> Result<Self, BtfError> {
        if self.kind() == kind {
            Ok(self)
        } else {
            Err(malformed(self.at, what))
        }
    }

    /// The type with this id, which this one refers to.
    fn refer(self, id: u32) -> Result<Self, BtfError> {
        self.btf
            .get(id)
            .ok_or(malformed(self.at, "refers to a type that does not exist"))
    }

    /// What this typedef, pointer or function refers to, behind typedefs and qualifiers.
    fn target(self, steps: &mut Steps) -> Result<Self, BtfError> {
        self.refer(self.size)?.resolve(steps)
    }

    /// The type behind typedefs, qualifiers and tags.
    fn resolve(mut self, steps: &mut Steps) -> Result<Self, BtfError> {
        for _ in 0..MAX_DEPTH {
            match self.kind() {
                TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => {
                    steps.take()?;
                    self = self.refer(self.size)?;
                }
                _ => return Ok(self),
            }
        }
        Err(BtfError::TooComplex)
    }

    fn field(self, type_name: &str, path: &str, steps: &mut Steps) -> Result<Field, BtfError> {
        let mut member = Member {
            bits: 0,
            width: 0,
            of: self,
        };
        let mut start = 0_usize;
        for name in path.split('.') {
            let of = || match path.get(..start.saturating_sub(1)) {
                None | Some("") => type_name.to_owned(),
                Some(passed) => format!("{type_name}.{passed}"),
            };
            let found = match member.of.kind() {
                STRUCT | UNION if is_name(name) => member.of.member(name, MAX_DEPTH, steps)?,
                STRUCT | UNION => None,
                PTR => {
                    return Err(BtfError::BehindPointer {
                        pointer: of(),
                        member: name.to_owned(),
                    });
                }
                _ => {
                    return Err(BtfError::NotStruct {
                        of: of(),
                        member: name.to_owned(),
                    });
                }
            };
            let found = found.ok_or_else(|| BtfError::NoMember {
                of: of(),
                member: name.to_owned(),
            })?;
            member = Member {
                bits: member.bits + found.bits,
                of: found.of.resolve(steps)?,
                ..found
            };
            start += name.len() + 1;
        }
        let field = member.field(steps)?;
        if u64::from(field.offset) + u64::from(field.size.unwrap_or(0)) > u64::from(self.size) {
            return Err(malformed(
                self.at,
                "a member ends behind the end of its struct",
            ));
        }
        Ok(field)
    }

    /// Searches this struct and the structs without a name in it.
    fn member(
        self,
        name: &str,
        depth: u32,
        steps: &mut Steps,
    ) -> Result<Option<Member<'a>>, BtfError> {
        let depth = depth.checked_sub(1).ok_or(BtfError::TooComplex)?;
        for [text, id, offset] in self.parts::<3>(self.count()) {
            steps.take()?;
            // With the flag, the upper 8 bits are the width of a bitfield.
            let (bits, width) = if self.flag() {
                (offset & 0xff_ffff, (offset >> 24) as u8)
            } else {
                (offset, 0)
            };
            let text = self.btf.text(text).ok_or(malformed(
                self.at,
                "the name of a member is not in the strings",
            ))?;
            if is_text(text, name) {
                return Ok(Some(Member {
                    bits: bits.into(),
                    width,
                    of: self.refer(id)?,
                }));
            }
            if is_text(text, "") {
                let inner = self.refer(id)?.resolve(steps)?;
                if inner.is_composite()
                    && let Some(found) = inner.member(name, depth, steps)?
                {
                    return Ok(Some(Member {
                        bits: found.bits + u64::from(bits),
                        ..found
                    }));
                }
            }
        }
        Ok(None)
    }

    /// Bytes it takes; none for `void`, functions and structs that are only declared.
    fn size(self, steps: &mut Steps) -> Result<Option<u32>, BtfError> {
        let too_large = || malformed(self.at, "a type is larger than 4 GiB");
        let mut of = self;
        let mut count = 1_u32;
        for _ in 0..MAX_DEPTH {
            let size = match of.kind() {
                INT | ENUM | ENUM64 | FLOAT | STRUCT | UNION => of.size,
                PTR => POINTER_BYTES,
                ARRAY => {
                    steps.take()?;
                    let [element, _index, length] = of.parts::<3>(1).next().unwrap_or_default();
                    count = count.checked_mul(length).ok_or_else(too_large)?;
                    of = of.refer(element)?.resolve(steps)?;
                    continue;
                }
                _ => return Ok(None),
            };
            return count.checked_mul(size).map(Some).ok_or_else(too_large);
        }
        Err(BtfError::TooComplex)
    }

    /// How many parameters a prototype has. A last one without name and type stands for `...`.
    fn parameters(self) -> Result<usize, BtfError> {
        let prototype = self.must_be(FUNC_PROTO, "a function's type is not a prototype")?;
        let variadic = prototype.parts::<2>(prototype.count()).last() == Some([0, 0]);
        Ok(prototype.count() - usize::from(variadic))
    }

    fn enumerator(self, name: &str) -> Option<i64> {
        let named = |text: u32| self.btf.text(text).is_some_and(|text| is_text(text, name));
        if self.kind() == ENUM64 {
            let [_, low, high] = self
                .parts::<3>(self.count())
                .find(|[text, ..]| named(*text))?;
            return Some((u64::from(high) << 32 | u64::from(low)) as i64);
        }
        let [_, value] = self
            .parts::<2>(self.count())
            .find(|[text, _]| named(*text))?;
        Some(if self.flag() {
            i64::from(value as i32)
        } else {
            i64::from(value)
        })
    }

    fn name(self) -> Result<Option<String>, BtfError> {
        let text = self.btf.text(self.name).ok_or(malformed(
            self.at,
            "the name of a type is not in the strings",
        ))?;
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let name = str::from_utf8(text)
            .map_err(|_| malformed(self.at, "the name of a type is not UTF-8"))?;
        Ok((!name.is_empty()).then(|| name.to_owned()))
    }
}

impl Member<'_> {
    fn field(&self, steps: &mut Steps) -> Result<Field, BtfError> {
        let wrong = |what| malformed(self.of.at, what);
        let (mut bits, mut width) = (self.bits, u32::from(self.width));
        let mut size = self.of.size(steps)?;
        if self.of.kind() == INT && width == 0 {
            // Before Linux 5.0 a bitfield is a member whose integer has fewer bits than its bytes have, or starts
            // at a bit of its own (9d5f9f701b18).
            let [encoding] = self.of.parts::<1>(1).next().unwrap_or_default();
            let (start, length) = (encoding >> 16 & 0xff, encoding & 0xff);
            if bits % 8 != 0 || u64::from(length) != u64::from(self.of.size) * 8 {
                bits += u64::from(start);
                width = length;
                if width == 0 {
                    return Err(wrong("an integer without bits"));
                }
            }
        }
        let shift = (bits % 8) as u32;
        if width != 0 {
            if !matches!(self.of.kind(), INT | ENUM | ENUM64)
                || u64::from(width) > u64::from(self.of.size) * 8
            {
                return Err(wrong("a bitfield is wider than its type"));
            }
            size = Some((shift + width).div_ceil(8));
        } else if shift != 0 {
            return Err(wrong("a member that is no bitfield starts within a byte"));
        }
        let pointer = self.of.kind() == PTR;
        let pointee = if pointer {
            Some(self.of.target(steps)?)
        } else {
            None
        };
        Ok(Field {
            offset: u32::try_from(bits / 8).map_err(|_| wrong("a member starts behind 4 GiB"))?,
            size,
            bit: (width != 0).then_some((shift as u8, width as u8)),
            pointer,
            pointee: match pointee.filter(|to| to.is_composite() || to.kind() == FWD) {
                Some(pointee) => pointee.name()?,
                None => None,
            },
        })
    }
}

/// What a lookup may still visit.
struct Steps(u32);

impl Steps {
    fn take(&mut self) -> Result<(), BtfError> {
        self.0 = self.0.checked_sub(1).ok_or(BtfError::TooComplex)?;
        Ok(())
    }
}

/// Extents of the sections, checked to lie within the bytes.
struct Header {
    types: Range<usize>,
    strings: Range<usize>,
    layout: Range<usize>,
}

impl Header {
    /// Bytes of `struct btf_header` up to Linux 7.0, and with the layout.
    const BYTES: usize = 24;
    const BYTES_WITH_LAYOUT: usize = 32;

    fn read(data: &[u8]) -> Result<Header, BtfError> {
        match data {
            [0x9f, 0xeb, 1, ..] => {}
            [0x9f, 0xeb, _, ..] => return Err(malformed(2, "the version is not 1")),
            [0xeb, 0x9f, ..] => return Err(BtfError::UnsupportedEndianness),
            _ => return Err(malformed(0, "does not start with the magic number of BTF")),
        }
        let word = |at: usize| {
            let bytes = data.get(at..at + 4).and_then(<[u8]>::first_chunk);
            let bytes = bytes.ok_or(malformed(data.len(), "the header is cut off"))?;
            Ok(u32::from_le_bytes(*bytes) as usize)
        };
        let length = word(4)?;
        if length < Header::BYTES || length > data.len() {
            return Err(malformed(4, "the length of the header is wrong"));
        }
        let section = |at: usize| {
            let start = length.checked_add(word(at)?);
            let end = start
                .zip(Some(word(at + 4)?))
                .and_then(|(start, bytes)| start.checked_add(bytes));
            match start.zip(end) {
                Some((start, end)) if end <= data.len() => Ok(start..end),
                _ => Err(malformed(at, "a section reaches past the end")),
            }
        };
        let types = section(8)?;
        let strings = section(16)?;
        let layout = if length >= Header::BYTES_WITH_LAYOUT {
            section(24)?
        } else {
            0..0
        };
        Ok(Header {
            types,
            strings,
            layout,
        })
    }
}

fn malformed(offset: usize, what: &'static str) -> BtfError {
    BtfError::Malformed { offset, what }
}

/// Whether anything can have this name: strings in BTF end at NUL, and the empty one means "no name".
fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.contains('\0')
}

/// Whether the string at the start of `text` is `name`.
fn is_text(text: &[u8], name: &str) -> bool {
    text.strip_prefix(name.as_bytes())
        .is_some_and(|rest| rest.first() == Some(&0))
}
