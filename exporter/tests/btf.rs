// SPDX-License-Identifier: Apache-2.0
//! The BTF reader against types with known offsets, hostile bytes, and the running kernel.

use std::{
    collections::HashMap,
    fs::{self, File, Permissions},
    io::ErrorKind,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use chandra::kernel::btf::{Btf, BtfError, Field, MAX_STEPS, SYS_BTF};
use proptest::{collection::vec, prelude::*, sample::Index};

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

/// Writes BTF. It checks nothing, so it can also write what no compiler would.
#[derive(Clone, Debug)]
struct Builder {
    types: Vec<u8>,
    strings: Vec<u8>,
    /// Bytes after each kind, in a header of Linux 7.1.
    layout: Option<Vec<[u8; 4]>>,
    next_id: u32,
    first_string: u32,
}

impl Builder {
    fn new() -> Self {
        Self {
            types: vec![],
            strings: vec![0],
            layout: None,
            next_id: 1,
            first_string: 0,
        }
    }

    /// A module's types on top of the kernel's.
    fn on(base: &Self) -> Self {
        let first_string = base.first_string + base.strings.len() as u32;
        Self {
            types: vec![],
            strings: vec![],
            layout: None,
            next_id: base.next_id,
            first_string,
        }
    }

    fn text(&mut self, text: &str) -> u32 {
        if text.is_empty() {
            return 0;
        }
        let offset = self.first_string + self.strings.len() as u32;
        self.strings.extend_from_slice(text.as_bytes());
        self.strings.push(0);
        offset
    }

    fn raw(&mut self, name: u32, info: u32, size: u32, parts: &[u32]) -> u32 {
        for word in [name, info, size].iter().chain(parts) {
            self.types.extend_from_slice(&word.to_le_bytes());
        }
        self.next_id += 1;
        self.next_id - 1
    }

    /// A type of this kind with this name, size or referred type, and nothing behind it.
    fn plain(&mut self, kind: u32, name: &str, size: u32) -> u32 {
        let name = self.text(name);
        self.raw(name, kind << 24, size, &[])
    }

    fn int(&mut self, name: &str, size: u32, start: u32, bits: u32) -> u32 {
        let name = self.text(name);
        self.raw(name, INT << 24, size, &[start << 16 | bits])
    }

    fn array(&mut self, of: u32, length: u32) -> u32 {
        self.raw(0, ARRAY << 24, 0, &[of, 1, length])
    }

    /// Members are name, type and bit offset; with `flag` the offset has the width in its upper 8 bits.
    fn composite(
        &mut self,
        kind: u32,
        flag: bool,
        name: &str,
        size: u32,
        members: &[(&str, u32, u32)],
    ) -> u32 {
        let parts: Vec<u32> = members
            .iter()
            .flat_map(|(name, id, offset)| [self.text(name), *id, *offset])
            .collect();
        let name = self.text(name);
        self.raw(
            name,
            u32::from(flag) << 31 | kind << 24 | members.len() as u32,
            size,
            &parts,
        )
    }

    fn structure(&mut self, name: &str, size: u32, members: &[(&str, u32, u32)]) -> u32 {
        self.composite(STRUCT, false, name, size, members)
    }

    fn enumeration(&mut self, flag: bool, name: &str, values: &[(&str, u32)]) -> u32 {
        let parts: Vec<u32> = values
            .iter()
            .flat_map(|(name, value)| [self.text(name), *value])
            .collect();
        let name = self.text(name);
        self.raw(
            name,
            u32::from(flag) << 31 | ENUM << 24 | values.len() as u32,
            4,
            &parts,
        )
    }

    fn enumeration64(&mut self, flag: bool, name: &str, values: &[(&str, u64)]) -> u32 {
        let parts = values
            .iter()
            .flat_map(|(name, value)| [self.text(name), *value as u32, (*value >> 32) as u32]);
        let parts: Vec<u32> = parts.collect();
        let name = self.text(name);
        self.raw(
            name,
            u32::from(flag) << 31 | ENUM64 << 24 | values.len() as u32,
            8,
            &parts,
        )
    }

    fn prototype(&mut self, parameters: &[(&str, u32)]) -> u32 {
        let parts: Vec<u32> = parameters
            .iter()
            .flat_map(|(name, id)| [self.text(name), *id])
            .collect();
        self.raw(0, FUNC_PROTO << 24 | parameters.len() as u32, 0, &parts)
    }

    fn function(&mut self, name: &str, parameters: &[(&str, u32)]) -> u32 {
        let prototype = self.prototype(parameters);
        self.plain(FUNC, name, prototype)
    }

    fn bytes(&self) -> Vec<u8> {
        let layout = self.layout.as_ref().map(|table| table.concat());
        let layout_bytes = layout.as_ref().map_or(0, Vec::len) as u32;
        let types = self.types.len() as u32;
        let mut words = vec![types + layout_bytes, self.strings.len() as u32];
        if layout.is_some() {
            words.extend([types, layout_bytes]);
        }
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        for word in [8 + 8 + 4 * words.len() as u32, 0, types]
            .iter()
            .chain(&words)
        {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        [
            bytes,
            self.types.clone(),
            layout.unwrap_or_default(),
            self.strings.clone(),
        ]
        .concat()
    }

    fn parse(&self) -> Btf {
        Btf::parse(self.bytes(), None).expect("well-formed")
    }

    fn parse_on(&self, base: &Self) -> Btf {
        Btf::parse(self.bytes(), Some(Arc::new(base.parse()))).expect("well-formed")
    }
}

/// A kernel in little, with every kind of type.
fn kernel() -> Builder {
    let mut b = Builder::new();
    let int = b.int("int", 4, 0, 32);
    let long = b.int("long unsigned int", 8, 0, 64);
    let byte = b.int("u8", 1, 0, 8);
    let pid_t = b.plain(TYPEDEF, "pid_t", int);

    let next = b.next_id + 1;
    let list_head = b.structure("list_head", 16, &[("next", next, 0), ("prev", next, 64)]);
    b.plain(PTR, "", list_head);

    let volatile = b.plain(VOLATILE, "", long);
    let state = b.plain(CONST, "", volatile);
    let bytes = b.array(byte, 4);
    let either = b.composite(
        UNION,
        false,
        "",
        4,
        &[("tgid", pid_t, 0), ("raw", bytes, 0)],
    );
    let ids = b.structure("", 8, &[("pid", pid_t, 0), ("", either, 32)]);
    let value = b.structure("", 4, &[("val", int, 0)]);
    let kuid_t = b.plain(TYPEDEF, "kuid_t", value);
    let uid = b.plain(CONST, "", kuid_t);
    let to_value = b.plain(PTR, "", kuid_t);

    let task = b.next_id + 10;
    let rcu = b.plain(TYPE_TAG, "rcu", task);
    let parent = b.plain(PTR, "", rcu);
    let comm = b.array(byte, 16);
    let row = b.array(int, 3);
    let grid = b.array(row, 2);
    let tail = b.array(byte, 0);
    let color = b.enumeration(
        false,
        "color",
        &[("RED", 0), ("GREEN", 1), ("ALL", u32::MAX)],
    );
    let callback = b.prototype(&[("", task)]);
    let callback = b.plain(PTR, "", callback);
    let mut members = vec![
        ("state", state, 0),
        ("list", list_head, 64),
        ("", ids, 24 * 8),
        ("uid", uid, 32 * 8),
    ];
    members.extend([
        ("parent", parent, 40 * 8),
        ("comm", comm, 48 * 8),
        ("grid", grid, 64 * 8),
    ]);
    members.extend([
        ("first", int, 1 << 24 | (88 * 8)),
        ("crossing", int, 3 << 24 | (88 * 8 + 7)),
    ]);
    members.extend([
        ("color", color, 2 << 24 | (88 * 8 + 17)),
        ("callback", callback, 96 * 8),
    ]);
    members.extend([
        ("hidden", b.next_id, 104 * 8),
        ("value", to_value, 112 * 8),
        ("tail", tail, 128 * 8),
    ]);
    // The pointer to a struct that is only declared, just before the struct.
    let hidden = b.next_id + 2;
    b.plain(PTR, "", hidden);
    assert_eq!(
        b.composite(STRUCT, true, "task_struct", 128, &members),
        task
    );
    b.plain(FWD, "hidden", 0);

    let low = b.int("low", 4, 0, 5);
    let high = b.int("high", 4, 6, 7);
    b.structure(
        "old",
        8,
        &[
            ("low", low, 35),
            ("high", high, 32),
            ("whole", int, 0),
            ("astray", int, 12),
        ],
    );

    b.enumeration(true, "errors", &[("MINUS", -1_i32 as u32), ("PLUS", 1)]);
    b.enumeration64(false, "wide", &[("TOP", 1 << 63), ("MIDDLE", 1 << 40)]);
    b.enumeration64(true, "deep", &[("BOTTOM", (-(1_i64 << 40)) as u64)]);
    b.enumeration(false, "color_of_cars", &[("RED", 7), ("BLACK", 8)]);

    b.function(
        "tcp_sendmsg",
        &[("sk", task), ("msg", parent), ("size", long)],
    );
    b.function("printk", &[("fmt", parent), ("", 0)]);
    b.function("nothing", &[]);
    b.plain(FUNC, "broken", int);
    let probe = b.prototype(&[("__data", parent), ("prev", parent), ("next", parent)]);
    let probe = b.plain(PTR, "", probe);
    b.plain(TYPEDEF, "btf_trace_sched_switch", probe);
    b.plain(TYPEDEF, "btf_trace_odd", int);

    let restricted = b.plain(RESTRICT, "", parent);
    let name = b.text("jiffies");
    let jiffies = b.raw(name, VAR << 24, long, &[1]);
    let name = b.text(".data");
    b.raw(name, DATASEC << 24 | 1, 8, &[jiffies, 0, 8]);
    b.plain(FLOAT, "double", 8);
    let name = b.text("tag");
    b.raw(name, DECL_TAG << 24, jiffies, &[u32::MAX]);
    b.structure(
        "pair",
        16,
        &[("one", restricted, 0), ("two", restricted, 64)],
    );
    b
}

/// A module of that kernel, with a `pair` of its own.
fn module(kernel: &Builder) -> Builder {
    let mut b = Builder::on(kernel);
    let task = 26;
    let own = b.structure("own", 136, &[("task", task, 0), ("last", 3, 128 * 8)]);
    b.plain(PTR, "", own);
    b.structure("pair", 24, &[("zero", 2, 0), ("one", b.next_id - 1, 64)]);
    b.function("module_function", &[("own", b.next_id - 2)]);
    b.enumeration(false, "module_enum", &[("BLACK", 9)]);
    b
}

fn at(offset: u32, size: u32) -> Field {
    Field {
        offset,
        size: Some(size),
        bit: None,
        pointer: false,
        pointee: None,
    }
}

fn bits(offset: u32, size: u32, shift: u8, width: u8) -> Field {
    Field {
        bit: Some((shift, width)),
        ..at(offset, size)
    }
}

fn pointer(offset: u32, pointee: Option<&str>) -> Field {
    Field {
        pointer: true,
        pointee: pointee.map(str::to_owned),
        ..at(offset, 8)
    }
}

fn refusal(btf: &Btf, type_name: &str, path: &str) -> String {
    btf.field(type_name, path)
        .expect_err("no such member")
        .to_string()
}

#[test]
fn members_are_found_through_structs_unions_typedefs_and_qualifiers() {
    let btf = kernel().parse();
    let field = |path: &str| btf.field("task_struct", path).expect(path);
    assert_eq!(field("state"), at(0, 8));
    assert_eq!(field("list"), at(8, 16));
    assert_eq!(field("pid"), at(24, 4));
    assert_eq!(field("tgid"), at(28, 4));
    assert_eq!(field("raw"), at(28, 4));
    assert_eq!(field("uid.val"), at(32, 4));
    assert_eq!(field("comm"), at(48, 16));
    assert_eq!(field("grid"), at(64, 24));
    assert_eq!(field("tail"), at(128, 0));
    assert_eq!(
        btf.field("pair", "two").expect("pair.two"),
        pointer(8, Some("task_struct"))
    );
}

#[test]
fn pointers_are_named_and_not_followed() {
    let btf = kernel().parse();
    let field = |path: &str| btf.field("task_struct", path).expect(path);
    assert_eq!(field("list.prev"), pointer(16, Some("list_head")));
    assert_eq!(field("parent"), pointer(40, Some("task_struct")));
    assert_eq!(field("callback"), pointer(96, None));
    assert_eq!(field("hidden"), pointer(104, Some("hidden")));
    assert_eq!(field("value"), pointer(112, None));
    assert_eq!(
        refusal(&btf, "task_struct", "list.next.prev"),
        "task_struct.list.next is a pointer: prev is not part of the struct"
    );
}

#[test]
fn bitfields_have_the_byte_of_their_first_bit() {
    let btf = kernel().parse();
    let field = |of: &str, path: &str| btf.field(of, path).expect(path);
    assert_eq!(field("task_struct", "first"), bits(88, 1, 0, 1));
    assert_eq!(field("task_struct", "crossing"), bits(88, 2, 7, 3));
    assert_eq!(field("task_struct", "color"), bits(90, 1, 1, 2));
    // Before Linux 5.0 the integer has the width, and a shift that adds to the member's.
    assert_eq!(field("old", "low"), bits(4, 1, 3, 5));
    assert_eq!(field("old", "high"), bits(4, 2, 6, 7));
    assert_eq!(field("old", "whole"), at(0, 4));
    assert_eq!(field("old", "astray"), bits(1, 5, 4, 32));
}

#[test]
fn refusals_name_what_is_missing() {
    let btf = kernel().parse();
    assert_eq!(refusal(&btf, "sock", "a"), "no struct sock");
    assert_eq!(refusal(&btf, "hidden", "a"), "no struct hidden");
    assert_eq!(refusal(&btf, "", "val"), "no struct ");
    // In the strings, the second name follows the first.
    assert_eq!(
        refusal(&btf, "task_struct\0hidden", "state"),
        "no struct task_struct\0hidden"
    );
    assert_eq!(
        refusal(&btf, "task_struct", "mood"),
        "task_struct has no member mood"
    );
    assert_eq!(
        refusal(&btf, "task_struct", "stat"),
        "task_struct has no member stat"
    );
    assert_eq!(
        refusal(&btf, "task_struct", "uid.mood"),
        "task_struct.uid has no member mood"
    );
    assert_eq!(
        refusal(&btf, "task_struct", ""),
        "task_struct has no member "
    );
    assert_eq!(
        refusal(&btf, "task_struct", "uid..val"),
        "task_struct.uid has no member "
    );
    assert_eq!(
        refusal(&btf, "task_struct", "comm.0"),
        "task_struct.comm is not a struct: it has no member 0"
    );
    assert_eq!(
        refusal(&btf, "task_struct", "first.a"),
        "task_struct.first is not a struct: it has no member a"
    );
}

#[test]
fn a_module_continues_where_the_kernel_ends() {
    let kernel = kernel();
    let module = module(&kernel);
    let btf = module.parse_on(&kernel);
    assert_eq!(
        btf.field("own", "task.tgid").expect("own.task.tgid"),
        at(28, 4)
    );
    assert_eq!(btf.field("own", "last").expect("own.last"), at(128, 1));
    // Its own type hides the kernel's of the same name, but for members that only the kernel's has.
    assert_eq!(
        btf.field("pair", "one").expect("pair.one"),
        pointer(8, Some("own"))
    );
    assert_eq!(
        btf.field("pair", "two").expect("pair.two"),
        pointer(8, Some("task_struct"))
    );
    assert_eq!(btf.size_of("pair"), Some(24));
    assert_eq!(
        btf.field("task_struct", "pid").expect("task_struct.pid"),
        at(24, 4)
    );
    assert_eq!(btf.function_parameters("module_function"), Some(1));
    assert_eq!(btf.function_parameters("tcp_sendmsg"), Some(3));
    assert_eq!(btf.tracepoint_arguments("sched_switch"), Some(2));
    assert_eq!(btf.enumerator(None, "BLACK"), Some(9));
    assert_eq!(btf.enumerator(Some("color_of_cars"), "BLACK"), Some(8));
    assert_eq!(refusal(&btf, "pair", "three"), "pair has no member three");

    // A module without any type or string of its own, and a module on a module.
    let empty = Builder::on(&kernel).parse_on(&kernel);
    assert_eq!(
        empty.field("task_struct", "pid").expect("task_struct.pid"),
        at(24, 4)
    );
    let mut third = Builder::on(&module);
    third.structure("third", 300, &[("own", kernel.next_id, 8)]);
    let third = Btf::parse(third.bytes(), Some(Arc::new(btf))).expect("well-formed");
    assert_eq!(
        third
            .field("third", "own.task.tgid")
            .expect("third.own.task.tgid"),
        at(29, 4)
    );
}

#[test]
fn equal_copies_agree_and_different_types_are_ambiguous() {
    let mut b = kernel();
    b.structure("controller", 8, &[("one", 1, 0), ("two", 1, 32)]);
    b.structure("controller", 12, &[("two", 1, 32), ("one", 1, 64)]);
    let btf = b.parse();
    assert_eq!(
        btf.field("controller", "two").expect("controller.two"),
        at(4, 4)
    );
    assert_eq!(
        refusal(&btf, "controller", "one"),
        "several types are named controller, and they differ in what was asked"
    );
    assert_eq!(btf.size_of("controller"), None);
    assert_eq!(btf.enumerator(None, "RED"), None);
}

#[test]
fn functions_and_tracepoints_tell_how_many_parameters_they_have() {
    let btf = kernel().parse();
    assert_eq!(btf.function_parameters("tcp_sendmsg"), Some(3));
    assert_eq!(btf.function_parameters("printk"), Some(1));
    assert_eq!(btf.function_parameters("nothing"), Some(0));
    assert_eq!(btf.function_parameters("broken"), None);
    assert_eq!(btf.function_parameters("absent"), None);
    assert_eq!(btf.function_parameters(""), None);
    assert_eq!(btf.tracepoint_arguments("sched_switch"), Some(2));
    assert_eq!(btf.tracepoint_arguments("odd"), None);
    assert_eq!(btf.tracepoint_arguments("absent"), None);
}

#[test]
fn enumerators_have_their_sign_and_their_width() {
    let btf = kernel().parse();
    assert_eq!(btf.enumerator(Some("color"), "RED"), Some(0));
    assert_eq!(btf.enumerator(Some("color"), "ALL"), Some(0xffff_ffff));
    assert_eq!(btf.enumerator(None, "GREEN"), Some(1));
    assert_eq!(btf.enumerator(Some("errors"), "MINUS"), Some(-1));
    assert_eq!(btf.enumerator(None, "MIDDLE"), Some(1 << 40));
    assert_eq!(btf.enumerator(None, "TOP"), Some(i64::MIN));
    assert_eq!(btf.enumerator(Some("deep"), "BOTTOM"), Some(-(1 << 40)));
    assert_eq!(btf.enumerator(Some("color"), "BLACK"), None);
    assert_eq!(btf.enumerator(Some("task_struct"), "RED"), None);
    assert_eq!(btf.enumerator(None, ""), None);
}

#[test]
fn sizes_are_of_structs_first() {
    let mut b = kernel();
    let pair = b.int("other", 2, 0, 16);
    b.plain(TYPEDEF, "list_head", pair);
    let btf = b.parse();
    assert_eq!(btf.size_of("task_struct"), Some(128));
    assert_eq!(btf.size_of("list_head"), Some(16));
    assert_eq!(btf.size_of("kuid_t"), Some(4));
    assert_eq!(btf.size_of("u8"), Some(1));
    assert_eq!(btf.size_of("wide"), Some(8));
    assert_eq!(btf.size_of("double"), Some(8));
    assert_eq!(btf.size_of("btf_trace_sched_switch"), Some(8));
    assert_eq!(btf.size_of("hidden"), None);
    assert_eq!(btf.size_of("tcp_sendmsg"), None);
    assert_eq!(btf.size_of("absent"), None);
}

#[test]
fn kinds_newer_than_this_reader_are_passed_over_by_the_layout() {
    let mut b = kernel();
    b.raw(0, 20 << 24 | 2, 0, &[1, 2, 3]);
    b.raw(0, 127 << 24, 0, &[]);
    b.structure("after", 8, &[("member", 2, 0)]);
    assert!(matches!(
        Btf::parse(b.bytes(), None),
        Err(BtfError::Malformed {
            what: "a type of an unknown kind",
            ..
        })
    ));

    let mut layout = vec![[0; 4]; 128];
    layout[20] = [4, 4, 0, 0];
    b.layout = Some(layout.clone());
    assert_eq!(
        b.parse().field("after", "member").expect("after.member"),
        at(0, 8)
    );
    // A module relies on the kernel's layout.
    let mut module = Builder::on(&b);
    module.raw(0, 20 << 24 | 1, 0, &[1, 2]);
    module.structure("module", 8, &[("member", 2, 0)]);
    assert_eq!(
        module
            .parse_on(&b)
            .field("module", "member")
            .expect("module.member"),
        at(0, 8)
    );

    // A table that ends before the kind, and parts that are not whole words.
    layout[20] = [0, 6, 0, 0];
    for broken in [layout[..20].to_vec(), layout] {
        b.layout = Some(broken);
        assert!(Btf::parse(b.bytes(), None).is_err());
    }
}

#[test]
fn counts_have_24_bits() {
    let mut b = kernel();
    let names: Vec<String> = (0..70_000).map(|n| format!("E{n}")).collect();
    let values: Vec<(&str, u32)> = names
        .iter()
        .zip(0..)
        .map(|(name, value)| (name.as_str(), value))
        .collect();
    b.enumeration(false, "huge", &values);
    assert_eq!(b.parse().enumerator(None, "E69999"), Some(69_999));
}

#[test]
fn a_broken_header_or_type_is_refused_where_it_is_wrong() {
    let good = kernel().bytes();
    let (types, length) = (24, good.len());
    let strings = 24 + kernel().types.len();
    let refused = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        match Btf::parse(bad, None) {
            Err(BtfError::Malformed { offset, what }) => (offset, what),
            other => panic!("byte {at}: {other:?}"),
        }
    };
    let no_magic = "does not start with the magic number of BTF";
    assert_eq!(refused(0, &[0x7f]), (0, no_magic));
    assert_eq!(refused(2, &[2]), (2, "the version is not 1"));
    let max = [0xff; 4];
    for length in [[0; 4], [23, 0, 0, 0], max] {
        assert_eq!(
            refused(4, &length),
            (4, "the length of the header is wrong")
        );
    }
    for (field, header) in [(8, 8), (12, 8), (16, 16), (20, 16)] {
        assert_eq!(
            refused(field, &max),
            (header, "a section reaches past the end")
        );
    }
    let one_more = (kernel().strings.len() as u32 + 1).to_le_bytes();
    assert_eq!(
        refused(20, &one_more),
        (16, "a section reaches past the end")
    );
    assert_eq!(
        refused(12, &[20, 0, 0, 0]).1,
        "a type is cut off by the end of its section"
    );
    assert_eq!(
        refused(strings, &[1]),
        (
            strings,
            "the string section does not start with an empty string"
        )
    );
    assert_eq!(
        refused(length - 1, &[1]),
        (length, "the string section does not end with NUL")
    );
    assert_eq!(
        refused(types + 7, &[0]),
        (types, "a type of an unknown kind")
    );
    assert_eq!(
        refused(types + 7, &[20]),
        (types, "a type of an unknown kind")
    );
    let past = "the parts of a type reach past the end of its section";
    let one_word_less = (kernel().types.len() as u32 - 4).to_le_bytes();
    assert_eq!(refused(12, &one_word_less).1, past);
    assert_eq!(refused(types + 4, &[0xff, 0xff, 0xff, 4]), (types, past));

    assert!(matches!(
        Btf::parse(vec![], None),
        Err(BtfError::Malformed { offset: 0, .. })
    ));
    let cut = Btf::parse(good[..20].to_vec(), None)
        .expect_err("cut")
        .to_string();
    assert_eq!(
        cut,
        "malformed BTF at byte 4: the length of the header is wrong"
    );
    let mut swapped = good.clone();
    swapped[..2].copy_from_slice(&[0xeb, 0x9f]);
    let swapped = Btf::parse(swapped, None);
    assert!(matches!(swapped, Err(BtfError::UnsupportedEndianness)));
    let large = [&good[..], &vec![0; 64 << 20]].concat();
    assert!(matches!(
        Btf::parse(large, None),
        Err(BtfError::Malformed {
            what: "more than 64 MiB",
            ..
        })
    ));
}

#[test]
fn a_reference_to_nothing_spoils_only_what_needs_it() {
    let mut b = kernel();
    let nowhere = 1_000_000;
    let lost = b.plain(PTR, "", nowhere);
    let of = b.next_id;
    b.structure(
        "spoilt",
        32,
        &[
            ("good", 1, 0),
            ("gone", nowhere, 32),
            ("lost", lost, 64),
            ("", nowhere, 0),
        ],
    );
    let spoilt = b.types.len() - 48 - 12;
    let mut names = Builder::on(&b);
    names.raw(0, STRUCT << 24 | 1, 4, &[u32::MAX, 1, 0]);
    let name = b.text("nameless");
    b.raw(name, STRUCT << 24 | 2, 8, &[0x7fff_ffff, 1, 0, 0, of, 0]);
    let name = b.strings.len() as u32;
    b.strings.extend_from_slice(b"\xff\xfe\0");
    let odd = b.raw(name, STRUCT << 24, 0, &[]);
    let odd = b.plain(PTR, "", odd);
    b.structure("odd", 8, &[("member", odd, 0)]);
    b.structure("short", 3, &[("member", 1, 0), ("within", 1, 3)]);
    b.structure("short", 16, &[("far", 1, u32::MAX - 31)]);
    let btf = b.parse();
    assert_eq!(btf.field("spoilt", "good").expect("spoilt.good"), at(0, 4));
    let missing = format!(
        "malformed BTF at byte {}: refers to a type that does not exist",
        24 + spoilt
    );
    assert_eq!(refusal(&btf, "spoilt", "gone"), missing);
    assert_eq!(refusal(&btf, "spoilt", "absent"), missing);
    assert!(refusal(&btf, "spoilt", "lost").ends_with("refers to a type that does not exist"));
    assert!(refusal(&btf, "nameless", "a").ends_with("the name of a member is not in the strings"));
    assert!(refusal(&btf, "odd", "member").ends_with("the name of a type is not UTF-8"));
    assert!(
        refusal(&btf, "short", "member").ends_with("a member ends behind the end of its struct")
    );
    assert!(refusal(&btf, "short", "far").ends_with("a member ends behind the end of its struct"));
}

#[test]
fn impossible_bitfields_are_refused() {
    let mut b = kernel();
    let list_head = 5;
    let pointer = list_head + 1;
    let none = b.int("none", 4, 0, 0);
    let large = b.int("large", 4, 0, 200);
    let members = [
        ("int", 1, 33 << 24),
        ("struct", list_head, 1 << 24),
        ("pointer", pointer, 1 << 24),
    ];
    b.composite(STRUCT, true, "bits", 64, &members);
    b.structure(
        "legacy",
        64,
        &[
            ("none", none, 0),
            ("large", large, 0),
            ("inside", list_head, 4),
        ],
    );
    let btf = b.parse();
    for (of, member, why) in [
        ("bits", "int", "a bitfield is wider than its type"),
        ("bits", "struct", "a bitfield is wider than its type"),
        ("bits", "pointer", "a bitfield is wider than its type"),
        ("legacy", "none", "an integer without bits"),
        ("legacy", "large", "a bitfield is wider than its type"),
        (
            "legacy",
            "inside",
            "a member that is no bitfield starts within a byte",
        ),
    ] {
        assert!(refusal(&btf, of, member).ends_with(why), "{of}.{member}");
    }
}

/// Runs lookups of every sort and returns how many found something. Each ends soon, whatever the types are.
fn exercise(btf: &Btf) -> usize {
    let names = [
        "task_struct",
        "list_head",
        "pair",
        "own",
        "old",
        "a",
        "b",
        "c",
        "btf_trace_a",
        "",
    ];
    let paths = [
        "pid",
        "tgid",
        "uid.val",
        "list.next",
        "one",
        "task.comm",
        "color",
        "low",
        "a",
        "b.a",
        "c.b.a",
        "x",
        "",
    ];
    let start = Instant::now();
    let mut found = 0;
    for name in names {
        for path in paths {
            if let Ok(field) = btf.field(name, path) {
                assert!(
                    field
                        .bit
                        .is_none_or(|(shift, width)| shift < 8 && width > 0),
                    "{field:?}"
                );
                assert!(field.pointer || field.pointee.is_none(), "{field:?}");
                found += 1;
            }
            found += usize::from(btf.enumerator(Some(name), path).is_some());
        }
        found += usize::from(btf.function_parameters(name).is_some());
        found += usize::from(btf.tracepoint_arguments(name).is_some());
        found += usize::from(btf.enumerator(None, name).is_some());
        found += usize::from(btf.size_of(name).is_some());
    }
    for name in ["tcp_sendmsg", "printk", "module_function", "broken"] {
        found += usize::from(btf.function_parameters(name).is_some());
    }
    for name in ["RED", "TOP", "BOTTOM"] {
        found += usize::from(btf.enumerator(None, name).is_some());
    }
    found += usize::from(btf.tracepoint_arguments("sched_switch").is_some());
    // 180 lookups that each may take 65,536 steps; without that bound the crafted types take years.
    assert!(
        start.elapsed() < Duration::from_secs(60),
        "took {:?}",
        start.elapsed()
    );
    found
}

/// Parses bytes as a kernel's, and as a module's on top of a sound kernel.
fn exercise_bytes(bytes: &[u8], base: &Arc<Btf>) {
    if let Ok(btf) = Btf::parse(bytes.to_vec(), None) {
        exercise(&btf);
    }
    if let Ok(btf) = Btf::parse(bytes.to_vec(), Some(base.clone())) {
        exercise(&btf);
    }
}

#[test]
fn anonymous_structs_that_double_at_each_level_end_at_the_bound() {
    let mut b = Builder::new();
    let int = b.int("int", 4, 0, 32);
    let mut inner = b.structure("", 4, &[("a", int, 0)]);
    for _ in 0..29 {
        inner = b.structure("", 4, &[("", inner, 0), ("", inner, 0)]);
    }
    b.structure("deep", 4, &[("", inner, 0)]);
    let btf = b.parse();
    assert_eq!(btf.field("deep", "a").expect("deep.a"), at(0, 4));
    let start = Instant::now();
    assert!(matches!(
        btf.field("deep", "absent"),
        Err(BtfError::TooComplex)
    ));
    assert!(
        start.elapsed() < Duration::from_secs(60),
        "took {:?}",
        start.elapsed()
    );
}

#[test]
fn the_bound_is_exact_and_shared_by_all_types_of_a_name() {
    let wide = |members: u32| {
        let mut b = Builder::new();
        let int = b.int("int", 4, 0, 32);
        let mut all = vec![("b", int, 0); members as usize - 1];
        all.push(("a", int, 32));
        b.structure("wide", 8, &all);
        b
    };
    assert_eq!(
        wide(MAX_STEPS).parse().field("wide", "a").expect("wide.a"),
        at(4, 4)
    );
    let mut b = wide(MAX_STEPS + 1);
    assert!(matches!(
        b.parse().field("wide", "a"),
        Err(BtfError::TooComplex)
    ));
    // Many small copies take as many steps as one large struct.
    for _ in 0..2 {
        let copies = vec![("b", 1, 0); MAX_STEPS as usize / 2];
        b.structure("copies", 4, &copies);
    }
    b.structure("copies", 4, &[("a", 1, 0)]);
    assert!(matches!(
        b.parse().field("copies", "a"),
        Err(BtfError::TooComplex)
    ));
}

#[test]
fn cycles_end() {
    let mut b = Builder::new();
    let int = b.int("int", 4, 0, 32);
    let first = b.next_id;
    b.plain(TYPEDEF, "loop_t", first + 1);
    b.plain(CONST, "", first);
    b.plain(TYPEDEF, "self_t", first + 2);
    let array = b.array(b.next_id, 1);
    b.plain(PTR, "", first);
    b.structure(
        "cycle",
        64,
        &[
            ("direct", first, 0),
            ("array", array, 0),
            ("pointer", array + 1, 0),
        ],
    );
    let own = b.next_id;
    b.structure("own", 64, &[("", own, 8), ("named", own, 8), ("a", int, 0)]);
    let prototype = b.next_id + 1;
    b.plain(FUNC, "spin", prototype);
    b.plain(FUNC_PROTO, "", prototype);
    b.plain(TYPEDEF, "btf_trace_spin", first);
    let btf = b.parse();
    for path in ["direct", "direct.a", "array", "pointer"] {
        assert!(
            matches!(btf.field("cycle", path), Err(BtfError::TooComplex)),
            "{path}"
        );
    }
    assert!(matches!(btf.field("own", "a"), Err(BtfError::TooComplex)));
    assert!(matches!(
        btf.field("own", "named"),
        Err(BtfError::TooComplex)
    ));
    assert_eq!(btf.size_of("loop_t"), None);
    assert_eq!(btf.size_of("self_t"), None);
    assert_eq!(btf.tracepoint_arguments("spin"), None);
    assert_eq!(btf.function_parameters("spin"), Some(0));

    // A struct that holds itself has members at any depth, and ends behind its own end.
    let mut b = Builder::new();
    let int = b.int("int", 4, 0, 32);
    let own = b.next_id;
    b.structure("own", 64, &[("own", own, 8), ("a", int, 0)]);
    let btf = b.parse();
    assert_eq!(
        btf.field("own", "own.own.a").expect("own.own.own.a"),
        at(2, 4)
    );
    let path = vec!["own"; 2 * MAX_STEPS as usize].join(".");
    assert!(matches!(btf.field("own", &path), Err(BtfError::TooComplex)));
}

#[test]
fn nesting_up_to_the_kernels_own_limit_is_read() {
    for (levels, read) in [(31, true), (32, false)] {
        let mut b = Builder::new();
        let mut inner = b.int("int", 4, 0, 32);
        inner = b.structure("", 4, &[("a", inner, 0)]);
        for _ in 0..levels - 1 {
            inner = b.structure("", 4, &[("", inner, 0)]);
        }
        b.structure("nested", 4, &[("", inner, 0)]);
        let mut name = 1;
        for _ in 0..levels {
            name = b.plain(TYPEDEF, "t", name);
        }
        b.structure("renamed", 4, &[("a", name, 0)]);
        let btf = b.parse();
        assert_eq!(btf.field("nested", "a").is_ok(), read, "{levels} levels");
        assert_eq!(btf.field("renamed", "a").is_ok(), read, "{levels} typedefs");
    }
}

#[test]
fn files_that_cannot_be_read_say_why() {
    let folder = tempfile::tempdir().expect("a folder for the test");
    let dir = folder.path();
    fs::write(dir.join("vmlinux"), kernel().bytes()).expect("write");
    fs::write(dir.join("module"), module(&kernel()).bytes()).expect("write");
    let base = Arc::new(Btf::read(dir, "vmlinux", None).expect("well-formed"));
    let btf = Btf::read(dir, "module", Some(base)).expect("well-formed");
    assert_eq!(
        btf.field("own", "task.pid").expect("own.task.pid"),
        at(24, 4)
    );

    let absent = Btf::read(dir, "absent", None).expect_err("absent");
    assert!(matches!(&absent, BtfError::Absent { path } if *path == dir.join("absent")));
    assert_eq!(
        absent.to_string(),
        format!("{} does not exist", dir.join("absent").display())
    );
    fs::create_dir(dir.join("folder")).expect("create");
    let read = Btf::read(dir, "folder", None).expect_err("a folder");
    assert!(matches!(read, BtfError::Read { .. }), "{read:?}");
    fs::write(dir.join("text"), "text").expect("write");
    assert!(matches!(
        Btf::read(dir, "text", None),
        Err(BtfError::Malformed { offset: 0, .. })
    ));
    // Only its end, which a hole in the file makes cheap.
    File::create(dir.join("large"))
        .and_then(|file| file.set_len(1 << 40))
        .expect("a large file");
    assert!(matches!(
        Btf::read(dir, "large", None),
        Err(BtfError::Malformed {
            what: "more than 64 MiB",
            ..
        })
    ));

    fs::write(dir.join("closed"), "").expect("write");
    fs::set_permissions(dir.join("closed"), Permissions::from_mode(0o000)).expect("chmod");
    // Root may read any file but those of sysfs without a read bit.
    let closed = [
        (dir, "closed"),
        (Path::new("/sys/bus/platform"), "drivers_probe"),
    ]
    .into_iter()
    .find(|(dir, name)| {
        File::open(dir.join(name)).is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
    });
    match closed {
        Some((dir, name)) => {
            let denied = Btf::read(dir, name, None).expect_err("closed");
            assert!(
                matches!(&denied, BtfError::Denied { path } if *path == dir.join(name)),
                "{denied:?}"
            );
        }
        None => println!("skipped the file without permission: this user may read everything"),
    }
}

#[test]
fn every_truncation_is_survived() {
    let kernel = kernel();
    let module = module(&kernel);
    let base = Arc::new(kernel.parse());
    assert_eq!(exercise(&base), 16);
    for whole in [&kernel, &module] {
        let bytes = whole.bytes();
        for length in 0..bytes.len() {
            exercise_bytes(&bytes[..length], &base);
        }
        // With a header that fits, more is read before the end is missed.
        for length in 0..whole.types.len() {
            let mut cut = whole.clone();
            cut.types.truncate(length);
            exercise_bytes(&cut.bytes(), &base);
        }
        for length in (0..whole.strings.len()).step_by(5) {
            let mut cut = whole.clone();
            cut.strings.truncate(length);
            exercise_bytes(&cut.bytes(), &base);
            cut.strings.push(0);
            exercise_bytes(&cut.bytes(), &base);
        }
    }
}

/// One change to bytes, at a place that is drawn.
#[derive(Clone, Debug)]
enum Change {
    Byte(Index, u8),
    Word(Index, u32),
    Insert(Index, u8),
    Remove(Index),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            _ if bytes.len() < 4 => bytes.push(0),
            Self::Byte(at, value) => *at.get_mut(bytes) = *value,
            Self::Word(at, value) => {
                let at = at.index(bytes.len() / 4) * 4;
                bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
            Self::Insert(at, value) => bytes.insert(at.index(bytes.len()), *value),
            Self::Remove(at) => _ = bytes.remove(at.index(bytes.len())),
        }
    }
}

/// Numbers at which counts, ids and offsets go wrong, and small ones.
fn number() -> impl Strategy<Value = u32> {
    let edges = vec![
        0,
        u32::MAX,
        u32::MAX - 3,
        0x7fff_ffff,
        0x8000_0000,
        0xffff,
        0xff_ffff,
        0x84ff_ffff,
    ];
    prop_oneof![0..80_u32, proptest::sample::select(edges), any::<u32>()]
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => (any::<Index>(), any::<u8>()).prop_map(|(at, value)| Change::Byte(at, value)),
        3 => (any::<Index>(), number()).prop_map(|(at, value)| Change::Word(at, value)),
        1 => (any::<Index>(), any::<u8>()).prop_map(|(at, value)| Change::Insert(at, value)),
        1 => any::<Index>().prop_map(Change::Remove),
    ]
}

/// Names that are also looked up, so that lookups meet the types.
fn name() -> impl Strategy<Value = &'static str> {
    proptest::sample::select(vec!["a", "b", "c", "", "btf_trace_a"])
}

/// A type of any kind that refers to any other, itself, or none.
#[derive(Clone, Debug)]
struct AnyType {
    kind: u32,
    flag: bool,
    name: &'static str,
    size: u32,
    parts: Vec<(&'static str, u32, u32)>,
}

fn any_type() -> impl Strategy<Value = AnyType> {
    let kinds = prop_oneof![4 => STRUCT..=UNION, 2 => TYPEDEF..=RESTRICT, 3 => INT..=ENUM64, 1 => 20..26_u32];
    let id = 0..34_u32;
    let size = prop_oneof![3 => id.clone(), 1 => number()];
    let offset = prop_oneof![3 => (0..64_u32).prop_map(|byte| byte * 8), 1 => number()];
    let parts = vec((name(), prop_oneof![20 => id, 1 => number()], offset), 0..6);
    (kinds, any::<bool>(), name(), size, parts).prop_map(|(kind, flag, name, size, parts)| {
        AnyType {
            kind,
            flag,
            name,
            size,
            parts,
        }
    })
}

fn build(mut b: Builder, types: &[AnyType]) -> Builder {
    for AnyType {
        kind,
        flag,
        name,
        size,
        parts,
    } in types
    {
        let (count, parts): (usize, Vec<u32>) = match *kind {
            STRUCT | UNION | DATASEC | ENUM64 => (
                parts.len(),
                parts
                    .iter()
                    .flat_map(|(name, id, offset)| [b.text(name), *id, *offset])
                    .collect(),
            ),
            ENUM | FUNC_PROTO => (
                parts.len(),
                parts
                    .iter()
                    .flat_map(|(name, id, _)| [b.text(name), *id])
                    .collect(),
            ),
            ARRAY => (0, vec![*size, 1, parts.len() as u32]),
            INT => (0, vec![parts.first().map_or(32, |part| part.2)]),
            VAR | DECL_TAG => (0, vec![0]),
            _ => (0, vec![]),
        };
        let name = b.text(name);
        b.raw(
            name,
            u32::from(*flag) << 31 | kind << 24 | count as u32,
            *size,
            &parts,
        );
    }
    b
}

/// A member of a random struct of which the place is known.
#[derive(Clone, Debug)]
enum Shape {
    Number(u32),
    Pointer,
    Array(u32),
    Bits(u32),
    Struct {
        named: bool,
        union: bool,
        wrapped: bool,
        members: Vec<Shape>,
    },
}

fn shape() -> impl Strategy<Value = Shape> {
    let leaf = prop_oneof![
        (0..4_u32).prop_map(|power| Shape::Number(1 << power)),
        Just(Shape::Pointer),
        (0..9_u32).prop_map(Shape::Array),
        (1..32_u32).prop_map(Shape::Bits),
    ];
    leaf.prop_recursive(5, 40, 6, |inner| {
        (
            any::<bool>(),
            any::<bool>(),
            any::<bool>(),
            vec(inner, 1..6),
        )
            .prop_map(|(named, union, wrapped, members)| Shape::Struct {
                named,
                union,
                wrapped,
                members,
            })
    })
}

/// Adds a struct of these members, and returns it with its bits and what its members should be.
fn lay_out(
    b: &mut Builder,
    name: &str,
    union: bool,
    members: &[Shape],
) -> (u32, u32, Vec<(String, u32, Field)>) {
    let (mut end, mut parts, mut known) = (0_u32, vec![], vec![]);
    for (index, member) in members.iter().enumerate() {
        let start = if union { 0 } else { end };
        // All but bitfields start at a byte.
        let aligned = start.next_multiple_of(8);
        let name = format!("m{index}_{}", b.next_id);
        let mut add = |id: u32, at: u32, width: u32, bits: u32, field: Field| {
            parts.push((name.clone(), id, width << 24 | at));
            known.push((name.clone(), at, field));
            at + bits
        };
        let stop = match member {
            Shape::Number(bytes) => {
                let id = b.int("number", *bytes, 0, bytes * 8);
                add(id, aligned, 0, bytes * 8, at(0, *bytes))
            }
            Shape::Pointer => {
                let id = b.plain(PTR, "", 0);
                add(id, aligned, 0, 64, pointer(0, None))
            }
            Shape::Array(length) => {
                let id = b.int("element", 2, 0, 16);
                let id = b.array(id, *length);
                add(id, aligned, 0, length * 16, at(0, length * 2))
            }
            Shape::Bits(width) => {
                let id = b.int("word", 4, 0, 32);
                let shift = start % 8;
                add(
                    id,
                    start,
                    *width,
                    *width,
                    bits(0, (shift + width).div_ceil(8), shift as u8, *width as u8),
                )
            }
            Shape::Struct {
                named,
                union,
                wrapped,
                members,
            } => {
                let (mut id, bits, inner) = lay_out(b, "", *union, members);
                if *wrapped {
                    id = b.plain(CONST, "", id);
                    id = b.plain(TYPEDEF, "wrapped_t", id);
                }
                let own = if *named { name.clone() } else { String::new() };
                let prefix = if *named {
                    format!("{name}.")
                } else {
                    String::new()
                };
                known.extend(
                    inner
                        .into_iter()
                        .map(|(path, at, field)| (prefix.clone() + &path, aligned + at, field)),
                );
                if *named {
                    known.push((name, aligned, at(0, bits / 8)));
                }
                parts.push((own, id, aligned));
                aligned + bits
            }
        };
        end = end.max(stop);
    }
    let size = end.div_ceil(8);
    let parts: Vec<(&str, u32, u32)> = parts
        .iter()
        .map(|(name, id, at)| (name.as_str(), *id, *at))
        .collect();
    let kind = if union { UNION } else { STRUCT };
    (b.composite(kind, true, name, size, &parts), size * 8, known)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn any_layout_is_read_back(members in vec(shape(), 1..8)) {
        let mut b = Builder::new();
        b.int("int", 4, 0, 32);
        let (_, bits, known) = lay_out(&mut b, "root", false, &members);
        let btf = b.parse();
        prop_assert_eq!(btf.size_of("root"), Some(bits / 8));
        for (path, bit, field) in known {
            let expected = Field { offset: bit / 8, ..field };
            prop_assert_eq!(btf.field("root", &path).expect("known"), expected, "{}", path);
        }
    }

    #[test]
    fn any_bytes_are_survived(bytes in vec(any::<u8>(), 0..400)) {
        exercise_bytes(&bytes, &Arc::new(kernel().parse()));
    }

    #[test]
    fn any_sections_are_survived(types in vec(any::<u8>(), 0..400), mut strings in vec(0..4_u8, 0..60)) {
        strings.push(0);
        exercise_bytes(&Builder { types: types.clone(), strings: strings.clone(), ..Builder::new() }.bytes(), &Arc::new(kernel().parse()));
        let strings = [vec![0], strings].concat();
        exercise_bytes(&Builder { types, strings, ..Builder::new() }.bytes(), &Arc::new(kernel().parse()));
    }

    #[test]
    fn any_changed_bytes_are_survived(changes in vec(change(), 1..8), of_module: bool) {
        let kernel = kernel();
        let mut bytes = if of_module { module(&kernel).bytes() } else { kernel.bytes() };
        changes.iter().for_each(|change| change.apply(&mut bytes));
        exercise_bytes(&bytes, &Arc::new(kernel.parse()));
    }

    #[test]
    fn any_changed_header_is_survived(at in 0..8_usize, value in number(), layout: bool) {
        let mut kernel = kernel();
        kernel.layout = layout.then(|| vec![[0; 4]; 20]);
        let mut bytes = kernel.bytes();
        bytes[at * 4..at * 4 + 4].copy_from_slice(&value.to_le_bytes());
        exercise_bytes(&bytes, &Arc::new(kernel.parse()));
    }

    #[test]
    fn any_changed_sections_are_survived(
        types in vec(change(), 0..8), strings in vec(change(), 0..4), of_module: bool,
    ) {
        let kernel = kernel();
        let mut changed = if of_module { module(&kernel) } else { kernel.clone() };
        types.iter().for_each(|change| change.apply(&mut changed.types));
        strings.iter().for_each(|change| change.apply(&mut changed.strings));
        changed.strings.push(0);
        let base = Arc::new(kernel.parse());
        exercise_bytes(&changed.bytes(), &base);
        // The kernel changes under a module that does not.
        if !of_module && let Ok(changed) = Btf::parse(changed.bytes(), None) {
            let module = Btf::parse(module(&kernel).bytes(), Some(Arc::new(changed)));
            exercise(&module.expect("its own bytes are sound"));
        }
    }

    #[test]
    fn any_graph_of_types_is_survived(types in vec(any_type(), 1..30), more in vec(any_type(), 0..10)) {
        let mut base = build(Builder::new(), &types);
        base.layout = Some(vec![[0; 4]; 32]);
        let module = build(Builder::on(&base), &more);
        let base = Arc::new(base.parse());
        exercise(&base);
        exercise(&Btf::parse(module.bytes(), Some(base)).expect("its own bytes are sound"));
    }
}

/// The running kernel's BTF, if it has any.
fn running_kernel() -> Option<Vec<u8>> {
    match fs::read(Path::new(SYS_BTF).join("vmlinux")) {
        Ok(bytes) => Some(bytes),
        Err(error) => {
            println!("skipped: {SYS_BTF}/vmlinux: {error}");
            None
        }
    }
}

#[test]
fn the_running_kernels_bytes_are_survived_in_any_state() {
    let Some(bytes) = running_kernel() else {
        return;
    };
    let look_up = |bytes: Vec<u8>| {
        let btf = Btf::parse(bytes, None).ok()?;
        let fields = [
            ("task_struct", "pid"),
            ("sock", "__sk_common.skc_state"),
            ("sk_buff", "absent"),
        ];
        let found = fields
            .iter()
            .filter(|(name, path)| btf.field(name, path).is_ok())
            .count();
        let counts = [
            btf.function_parameters("tcp_sendmsg"),
            btf.tracepoint_arguments("sched_switch"),
        ];
        Some((found, counts, btf.enumerator(None, "BPF_MAP_TYPE_HASH")))
    };
    assert!(look_up(bytes.clone()).is_some_and(|(found, ..)| found == 2));
    for eighths in 0..8 {
        assert!(look_up(bytes[..bytes.len() * eighths / 8].to_vec()).is_none());
    }
    let mut seed = 1_u32;
    let mut random = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        seed >> 8
    };
    for changes in [1, 10, 1_000, 100_000] {
        for _ in 0..2 {
            let mut changed = bytes.clone();
            for _ in 0..changes {
                let at = 24 + random() as usize % (bytes.len() - 25);
                changed[at] = random() as u8;
            }
            look_up(changed);
        }
    }
}

/// What bpftool says of each type, by id: `STRUCT 'name' size=8 vlen=1`, and a line for each member.
fn dumped(text: &str) -> HashMap<u32, &str> {
    let types = text.trim_start_matches('[').split("\n[");
    types
        .filter_map(|found| found.split_once("] "))
        .map(|(id, rest)| (id.parse().expect("an id"), rest))
        .collect()
}

/// The name in a line of bpftool.
fn named(line: &str) -> &str {
    line.split('\'')
        .nth(1)
        .filter(|name| *name != "(anon)")
        .unwrap_or_default()
}

/// A number in a line of bpftool.
fn value(line: &str, key: &str) -> Option<u32> {
    let text = line.split_once(key)?.1;
    text.split(|c: char| !c.is_ascii_digit())
        .next()?
        .parse()
        .ok()
}

/// Bit offset and width by bpftool's dump.
fn expected(types: &HashMap<u32, &str>, id: u32, path: &[&str]) -> Option<(u32, u32)> {
    let mut lines = types.get(&id)?.lines();
    let head = lines.next()?;
    if let "TYPEDEF" | "CONST" | "VOLATILE" | "RESTRICT" | "TYPE_TAG" = head.split(' ').next()? {
        return expected(types, value(head, " type_id=")?, path);
    }
    lines.find_map(|line| {
        let (name, of, start) = (
            named(line),
            value(line, " type_id=")?,
            value(line, " bits_offset=")?,
        );
        let within = match path {
            [last] if *last == name => {
                return Some((start, value(line, " bitfield_size=").unwrap_or(0)));
            }
            [first, rest @ ..] if *first == name => rest,
            _ if name.is_empty() => path,
            _ => return None,
        };
        expected(types, of, within).map(|(inner, width)| (start + inner, width))
    })
}

#[test]
fn the_running_kernels_offsets_are_those_of_bpftool() {
    let Some(bytes) = running_kernel() else {
        return;
    };
    let dump = ["bpftool", "/usr/sbin/bpftool"].iter().find_map(|program| {
        let arguments = [
            "btf",
            "dump",
            "file",
            "/sys/kernel/btf/vmlinux",
            "format",
            "raw",
        ];
        Command::new(program)
            .args(arguments)
            .output()
            .ok()
            .filter(|output| output.status.success())
    });
    let Some(dump) = dump else {
        println!("skipped: bpftool is not installed or cannot dump the kernel's BTF");
        return;
    };
    let dump = String::from_utf8(dump.stdout).expect("text");
    let types = dumped(&dump);
    let btf = Btf::parse(bytes, None).expect("well-formed");

    let mut members = vec![
        ("task_struct", "pid".to_owned()),
        ("task_struct", "tgid".to_owned()),
        ("sock", "__sk_common.skc_state".to_owned()),
        ("sk_buff", "cb".to_owned()),
        ("inet_connection_sock", "icsk_ca_state".to_owned()),
        ("tcp_sock", "inet_conn.icsk_ca_state".to_owned()),
        ("tcp_skb_cb", "tcp_gso_segs".to_owned()),
    ];
    // And the first and last member of some twenty other structs.
    let mut structs: HashMap<&str, Vec<u32>> = HashMap::new();
    for (id, found) in types
        .iter()
        .filter(|(_, found)| found.starts_with("STRUCT '") || found.starts_with("UNION '"))
    {
        structs.entry(named(found)).or_default().push(*id);
    }
    let mut unique: Vec<_> = structs
        .iter()
        .filter(|(name, ids)| !name.is_empty() && ids.len() == 1)
        .collect();
    unique.sort();
    for (name, ids) in unique.into_iter().step_by(499) {
        let names = types[&ids[0]]
            .lines()
            .skip(1)
            .map(named)
            .filter(|name| !name.is_empty());
        let names: Vec<&str> = names.collect();
        members.extend(
            names
                .first()
                .iter()
                .chain(&names.last())
                .map(|member| (*name, member.to_string())),
        );
    }

    let mut compared = 0;
    for (name, path) in members {
        let split: Vec<&str> = path.split('.').collect();
        let ids = structs.get(name).map(Vec::as_slice).unwrap_or_default();
        let Some((bit, width)) = ids.iter().find_map(|id| expected(&types, *id, &split)) else {
            println!("skipped {name}.{path}: this kernel does not have it");
            continue;
        };
        let field = btf.field(name, &path).expect("bpftool sees it");
        assert_eq!(field.offset, bit / 8, "{name}.{path}");
        assert_eq!(
            field.bit,
            (width != 0).then_some(((bit % 8) as u8, width as u8)),
            "{name}.{path}"
        );
        compared += 1;
    }
    println!("compared {compared} members");
    assert!(compared > 20);
}
