// SPDX-License-Identifier: Apache-2.0
//! The library that `build` makes, as NCCL sees it: opened, its tables looked up, its functions called with NCCL's types.
#![allow(dead_code, reason = "tests and benchmark each use a part")]

use std::ffi::{CStr, CString, c_char, c_int, c_ulong, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

/// `ncclProfileGroup` and so on.
pub(crate) const GROUP: u64 = 1;
pub(crate) const COLLECTIVE: u64 = 2;
pub(crate) const P2P: u64 = 4;
pub(crate) const KERNEL_CHANNEL: u64 = 64;
/// All kinds that a version of NCCL knows.
pub(crate) const KINDS: [u64; 16] = [
    1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768,
];
/// `ncclProfilerKernelChStop`.
pub(crate) const STOP: c_int = 22;

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, symbol: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
}
const RTLD_NOW: c_int = 2;

pub(crate) type Logger = unsafe extern "C" fn(c_int, c_ulong, *const c_char, c_int, *const c_char);

/// `ncclProfiler_vN_t`: `init` differs.
#[repr(C)]
pub(crate) struct Table {
    pub(crate) name: *const c_char,
    pub(crate) init: *const c_void,
    pub(crate) start: unsafe extern "C" fn(*mut c_void, *mut *mut c_void, *mut c_void) -> c_int,
    pub(crate) stop: unsafe extern "C" fn(*mut c_void) -> c_int,
    pub(crate) record: unsafe extern "C" fn(*mut c_void, c_int, *mut c_void) -> c_int,
    pub(crate) finalize: unsafe extern "C" fn(*mut c_void) -> c_int,
}
pub(crate) type InitV3 = unsafe extern "C" fn(*mut *mut c_void, *mut c_int) -> c_int;
pub(crate) type InitV4 = unsafe extern "C" fn(
    *mut *mut c_void,
    *mut c_int,
    *const c_char,
    u64,
    c_int,
    c_int,
    c_int,
    Logger,
) -> c_int;
pub(crate) type InitV5 = unsafe extern "C" fn(
    *mut *mut c_void,
    u64,
    *mut c_int,
    *const c_char,
    c_int,
    c_int,
    c_int,
    Logger,
) -> c_int;

/// `ncclProfilerEventDescr_vN_t` with one member of its union. `Kind` is u8 up to v4, then u64.
#[repr(C)]
pub(crate) struct Descriptor<Kind, Event> {
    pub(crate) kind: Kind,
    pub(crate) parent: *mut c_void,
    pub(crate) rank: c_int,
    pub(crate) event: Event,
}

/// `coll`, with what versions after v4 have added at its end.
#[repr(C)]
pub(crate) struct Collective {
    pub(crate) sequence: u64,
    pub(crate) function: *const c_char,
    pub(crate) send: *const c_void,
    pub(crate) receive: *mut c_void,
    pub(crate) count: usize,
    pub(crate) root: c_int,
    pub(crate) data_type: *const c_char,
    pub(crate) channels: u8,
    pub(crate) warps: u8,
    pub(crate) algorithm: *const c_char,
    pub(crate) protocol: *const c_char,
    // v5
    pub(crate) parent_group: *mut c_void,
    // v7
    pub(crate) kernel_variant: *const c_char,
    pub(crate) symmetric: bool,
    pub(crate) user_tag: u64,
}

/// `kernelCh`.
#[repr(C)]
pub(crate) struct KernelChannel {
    pub(crate) channel: u8,
    pub(crate) time: u64,
}

/// The plugin, seen through the table of one version.
#[derive(Clone, Copy)]
pub(crate) struct Plugin {
    pub(crate) library: *mut c_void,
    pub(crate) table: &'static Table,
    pub(crate) version: u32,
}

// SAFETY: NCCL calls the table from all threads.
unsafe impl Send for Plugin {}
// SAFETY: as above.
unsafe impl Sync for Plugin {}

/// What stands where the plugin is to write.
const STRAY: *mut c_void = 0x5a5a as *mut c_void;

/// What NCCL holds of an event or a communicator, which other threads may be handed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Handle(pub(crate) *mut c_void);

// SAFETY: nobody follows it.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    pub(crate) const NULL: Self = Self(null_mut());
}

/// The library, built once.
pub(crate) fn built() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("build");
        let status = Command::new(build)
            .arg(folder)
            .status()
            .expect("build can be run");
        assert!(status.success(), "build failed");
        folder.join("libnccl-profiler.so")
    })
}

/// Opens a library of its own copy, so with state of its own.
pub(crate) fn open(name: &str) -> *mut c_void {
    let copy = built().with_file_name(format!("{name}-{}.so", std::process::id()));
    std::fs::copy(built(), &copy).expect("copied");
    let path = CString::new(copy.as_os_str().as_encoded_bytes()).expect("no NUL");
    // SAFETY: a path that ends with NUL.
    let library = unsafe { dlopen(path.as_ptr(), RTLD_NOW) };
    if library.is_null() {
        // SAFETY: after an error it returns a string.
        panic!("{}", unsafe { CStr::from_ptr(dlerror()) }.to_string_lossy());
    }
    std::fs::remove_file(copy).expect("removed");
    library
}

pub(crate) fn symbol(library: *mut c_void, name: &str) -> *mut c_void {
    let name_c = CString::new(name).expect("no NUL");
    // SAFETY: the library is open and stays so.
    let symbol = unsafe { dlsym(library, name_c.as_ptr()) };
    assert!(!symbol.is_null(), "{name} is missing");
    symbol
}

unsafe extern "C" fn no_log(_: c_int, _: c_ulong, _: *const c_char, _: c_int, _: *const c_char) {}

impl Plugin {
    pub(crate) fn new(library: *mut c_void, version: u32) -> Self {
        let table = symbol(library, &format!("ncclProfiler_v{version}")).cast::<Table>();
        // SAFETY: the symbol is such a table, and the library is never closed.
        let table = unsafe { &*table };
        Self {
            library,
            table,
            version,
        }
    }

    /// Returns the context and the mask.
    pub(crate) fn init(&self, number: u64, ranks: c_int, rank: c_int) -> (Handle, c_int) {
        self.init_with(number, ranks, rank, no_log)
    }

    pub(crate) fn init_with(
        &self,
        number: u64,
        ranks: c_int,
        rank: c_int,
        logger: Logger,
    ) -> (Handle, c_int) {
        let (mut context, mut mask) = (STRAY, -1);
        let name = c"name".as_ptr();
        // SAFETY: by version, each with its arguments.
        let result = unsafe {
            match self.version {
                3 => std::mem::transmute::<*const c_void, InitV3>(self.table.init)(
                    &mut context,
                    &mut mask,
                ),
                4 => std::mem::transmute::<*const c_void, InitV4>(self.table.init)(
                    &mut context,
                    &mut mask,
                    name,
                    number,
                    1,
                    ranks,
                    rank,
                    logger,
                ),
                _ => std::mem::transmute::<*const c_void, InitV5>(self.table.init)(
                    &mut context,
                    number,
                    &mut mask,
                    name,
                    1,
                    ranks,
                    rank,
                    logger,
                ),
            }
        };
        assert_eq!(result, 0);
        (Handle(context), mask)
    }

    fn start<Event>(&self, context: Handle, kind: u64, parent: Handle, event: Event) -> Handle {
        let mut handle = STRAY;
        let rank = 0;
        let parent = parent.0;
        // SAFETY: a descriptor of this version.
        let result = unsafe {
            if self.version <= 4 {
                let kind = kind as u8;
                let mut descriptor = Descriptor {
                    kind,
                    parent,
                    rank,
                    event,
                };
                (self.table.start)(context.0, &mut handle, (&raw mut descriptor).cast())
            } else {
                let mut descriptor = Descriptor {
                    kind,
                    parent,
                    rank,
                    event,
                };
                (self.table.start)(context.0, &mut handle, (&raw mut descriptor).cast())
            }
        };
        assert_eq!(result, 0);
        Handle(handle)
    }

    /// An event of a kind whose descriptor nobody should read.
    pub(crate) fn start_kind(&self, context: Handle, kind: u64) -> Handle {
        self.start(context, kind, Handle(0xdead as *mut c_void), [0xa5_u8; 112])
    }

    pub(crate) fn collective(
        &self,
        context: Handle,
        function: &'static CStr,
        sequence: u64,
        channels: u8,
    ) -> Handle {
        let event = Collective {
            sequence,
            function: function.as_ptr(),
            send: 0x1000 as *const c_void,
            receive: 0x2000 as *mut c_void,
            count: 1 << 20,
            root: -1,
            data_type: c"ncclFloat32".as_ptr(),
            channels,
            warps: 17,
            algorithm: c"RING".as_ptr(),
            protocol: c"SIMPLE".as_ptr(),
            parent_group: null_mut(),
            kernel_variant: null(),
            symmetric: false,
            user_tag: 0,
        };
        let handle = self.start(context, COLLECTIVE, Handle::NULL, event);
        if handle != Handle::NULL {
            self.stop(handle);
        }
        handle
    }

    pub(crate) fn channel(
        &self,
        context: Handle,
        collective: Handle,
        channel: u8,
        time: u64,
    ) -> Handle {
        self.start(
            context,
            KERNEL_CHANNEL,
            collective,
            KernelChannel { channel, time },
        )
    }

    /// As NCCL does: the time, then the end.
    pub(crate) fn channel_stop(&self, channel: Handle, mut time: u64) {
        if channel != Handle::NULL {
            // SAFETY: with this state the argument is a time.
            let result = unsafe { (self.table.record)(channel.0, STOP, (&raw mut time).cast()) };
            assert_eq!(result, 0);
            self.stop(channel);
        }
    }

    pub(crate) fn record(&self, event: Handle, state: c_int, argument: *mut c_void) {
        // SAFETY: the caller's argument is that of the state.
        assert_eq!(unsafe { (self.table.record)(event.0, state, argument) }, 0);
    }

    pub(crate) fn stop(&self, event: Handle) {
        // SAFETY: any handle may be stopped.
        assert_eq!(unsafe { (self.table.stop)(event.0) }, 0);
    }

    pub(crate) fn finalize(&self, context: Handle) {
        // SAFETY: any context may be closed.
        assert_eq!(unsafe { (self.table.finalize)(context.0) }, 0);
    }
}
