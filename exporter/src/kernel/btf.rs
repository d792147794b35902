// SPDX-License-Identifier: Apache-2.0
//! Where does the running kernel keep a member of a struct? Reads BTF, the type information that the
//! kernel publishes in `/sys/kernel/btf`; the eBPF programs get the answers as constants at load time.
//!
//! The format is described in `Documentation/bpf/btf.rst` and `include/uapi/linux/btf.h`.
//! The bytes are kept as read, with the position of each type; a lookup scans them, and everything it
//! follows is bounded, so no input makes it panic, hang or use much more memory than its own size.

mod header;
mod types;

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    iter,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use self::{
    header::Header,
    types::{
        ARRAY, CONST, DATASEC, DECL_TAG, ENUM, ENUM64, FLOAT, FUNC, FUNC_PROTO, FWD, INT, PTR,
        RESTRICT, STRUCT, Steps, TYPE_TAG, TYPEDEF, Type, UNION, VAR, VOLATILE,
    },
};
use super::symbols;

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

    /// Reads the types of a loaded module, on top of those of the kernel. Those of one that is built in are the kernel's.
    ///
    /// The kernel writes a module's name with underscores: `ib_core` for `ib-core.ko`.
    pub fn module(name: &str, base: Arc<Btf>) -> Result<Arc<Btf>, BtfError> {
        match Btf::read(Path::new(SYS_BTF), name, Some(Arc::clone(&base))) {
            Err(BtfError::Absent { .. }) if symbols::is_built_in(name) => Ok(base),
            read => read.map(Arc::new),
        }
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
