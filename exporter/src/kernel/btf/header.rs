// SPDX-License-Identifier: Apache-2.0
//! Where are the sections of a file of BTF?

use std::ops::Range;

use super::{BtfError, malformed};

/// Extents of the sections, checked to lie within the bytes.
pub(super) struct Header {
    pub(super) types: Range<usize>,
    pub(super) strings: Range<usize>,
    pub(super) layout: Range<usize>,
}

impl Header {
    /// Bytes of `struct btf_header` up to Linux 7.0, and with the layout.
    const BYTES: usize = 24;
    const BYTES_WITH_LAYOUT: usize = 32;

    pub(super) fn read(data: &[u8]) -> Result<Header, BtfError> {
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
