// SPDX-License-Identifier: Apache-2.0
//! What is a type, and where are its members?

use super::{
    Btf, BtfError, Field, MAX_DEPTH, POINTER_BYTES, TYPE_BYTES, is_name, is_text, malformed,
};

pub(super) const INT: u32 = 1;
pub(super) const PTR: u32 = 2;
pub(super) const ARRAY: u32 = 3;
pub(super) const STRUCT: u32 = 4;
pub(super) const UNION: u32 = 5;
pub(super) const ENUM: u32 = 6;
pub(super) const FWD: u32 = 7;
pub(super) const TYPEDEF: u32 = 8;
pub(super) const VOLATILE: u32 = 9;
pub(super) const CONST: u32 = 10;
pub(super) const RESTRICT: u32 = 11;
pub(super) const FUNC: u32 = 12;
pub(super) const FUNC_PROTO: u32 = 13;
pub(super) const VAR: u32 = 14;
pub(super) const DATASEC: u32 = 15;
pub(super) const FLOAT: u32 = 16;
pub(super) const DECL_TAG: u32 = 17;
pub(super) const TYPE_TAG: u32 = 18;
pub(super) const ENUM64: u32 = 19;

/// One type, in the file where it is described.
#[derive(Clone, Copy)]
pub(super) struct Type<'a> {
    pub(super) btf: &'a Btf,
    pub(super) at: usize,
    pub(super) name: u32,
    pub(super) info: u32,
    /// Its size or, for the kinds that refer to one, the id of another type.
    pub(super) size: u32,
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
    pub(super) fn kind(self) -> u32 {
        self.info >> 24 & 0x7f
    }

    pub(super) fn count(self) -> usize {
        (self.info & 0xff_ffff) as usize
    }

    pub(super) fn flag(self) -> bool {
        self.info >> 31 == 1
    }

    /// The `count` parts of `N` words that follow the type.
    pub(super) fn parts<const N: usize>(
        self,
        count: usize,
    ) -> impl Iterator<Item = [u32; N]> + use<'a, N> {
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

    pub(super) fn is_composite(self) -> bool {
        matches!(self.kind(), STRUCT | UNION)
    }

    pub(super) fn must_be(self, kind: u32, what: &'static str) -> Result<Self, BtfError> {
        if self.kind() == kind {
            Ok(self)
        } else {
            Err(malformed(self.at, what))
        }
    }

    /// The type with this id, which this one refers to.
    pub(super) fn refer(self, id: u32) -> Result<Self, BtfError> {
        self.btf
            .get(id)
            .ok_or(malformed(self.at, "refers to a type that does not exist"))
    }

    /// What this typedef, pointer or function refers to, behind typedefs and qualifiers.
    pub(super) fn target(self, steps: &mut Steps) -> Result<Self, BtfError> {
        self.refer(self.size)?.resolve(steps)
    }

    /// The type behind typedefs, qualifiers and tags.
    pub(super) fn resolve(mut self, steps: &mut Steps) -> Result<Self, BtfError> {
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

    pub(super) fn field(
        self,
        type_name: &str,
        path: &str,
        steps: &mut Steps,
    ) -> Result<Field, BtfError> {
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
    pub(super) fn size(self, steps: &mut Steps) -> Result<Option<u32>, BtfError> {
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
    pub(super) fn parameters(self) -> Result<usize, BtfError> {
        let prototype = self.must_be(FUNC_PROTO, "a function's type is not a prototype")?;
        let variadic = prototype.parts::<2>(prototype.count()).last() == Some([0, 0]);
        Ok(prototype.count() - usize::from(variadic))
    }

    pub(super) fn enumerator(self, name: &str) -> Option<i64> {
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

    pub(super) fn name(self) -> Result<Option<String>, BtfError> {
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
pub(super) struct Steps(pub(super) u32);

impl Steps {
    fn take(&mut self) -> Result<(), BtfError> {
        self.0 = self.0.checked_sub(1).ok_or(BtfError::TooComplex)?;
        Ok(())
    }
}
