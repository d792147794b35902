// SPDX-License-Identifier: Apache-2.0
//! What the built plugin tells, when its tables are called as NCCL calls them.
//!
//! The probed functions do nothing. To hear what they are told, each test writes a jump over those of its copy of the
//! library, where a uprobe would have its own instruction.
#![cfg(target_arch = "x86_64")]

mod plugin;

use std::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use exporter_common::nccl::OPERATIONS;
use exporter_common::nccl_profiler::{
    CLOSED, FINE, FINISHED, IMPOSSIBLE, OPENED, OVERWRITTEN, STARTED, Told,
};
use plugin::{COLLECTIVE, GROUP, Handle, KERNEL_CHANNEL, KINDS, P2P, Plugin};

/// Which function was told, and what.
type Call = (&'static str, Told);

static CALLS: Mutex<Vec<Call>> = Mutex::new(Vec::new());
/// One test at a time: they share [`CALLS`].
static ONE: Mutex<()> = Mutex::new(());

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

unsafe extern "C" {
    fn mprotect(address: *mut c_void, length: usize, protection: c_int) -> c_int;
}

macro_rules! listener {
    ($listener:ident, $name:expr) => {
        unsafe extern "C" fn $listener(told: *const Told) {
            // SAFETY: valid during the call, by the contract.
            locked(&CALLS).push(($name, unsafe { *told }));
        }
    };
}
listener!(opened, OPENED);
listener!(started, STARTED);
listener!(finished, FINISHED);
listener!(closed, CLOSED);

/// A copy of the plugin that is listened to.
struct Heard {
    library: *mut c_void,
    _one: MutexGuard<'static, ()>,
}

impl Heard {
    fn new(name: &str) -> Self {
        let one = locked(&ONE);
        let library = plugin::open(name);
        locked(&CALLS).clear();
        let listeners: [(_, unsafe extern "C" fn(*const Told)); 4] = [
            (OPENED, opened),
            (STARTED, started),
            (FINISHED, finished),
            (CLOSED, closed),
        ];
        for (name, listener) in listeners {
            jump(plugin::symbol(library, name), listener as *const c_void);
        }
        Self { library, _one: one }
    }

    fn version(&self, version: u32) -> Plugin {
        Plugin::new(self.library, version)
    }

    /// What was told since the last call.
    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut *locked(&CALLS))
    }
}

/// Makes a probed function jump: mov rax, target; jmp rax.
fn jump(function: *mut c_void, target: *const c_void) {
    const NOP5_RET: [u8; 6] = [0x0f, 0x1f, 0x44, 0x00, 0x00, 0xc3];
    let address = function as usize;
    assert_eq!(
        address % 16,
        0,
        "aligned, so that 16 bytes are its own and no nop straddles two pages"
    );
    // SAFETY: code of the library, 16 bytes of which are this function's.
    assert_eq!(unsafe { *function.cast::<[u8; 6]>() }, NOP5_RET);
    let mut code = [0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xe0];
    code[2..10].copy_from_slice(&(target as u64).to_le_bytes());
    let page = (address & !0xfff) as *mut c_void;
    // SAFETY: the page becomes writable (and stays executable), and nobody runs the function yet.
    unsafe {
        assert_eq!(mprotect(page, 0x1000, 7), 0);
        function.cast::<[u8; 12]>().write(code);
    }
}

const NUMBER: u64 = 0xfeed_c0de_1234_5678;
/// A time of a GPU: nanoseconds since 1970.
const NOW: u64 = 1_790_000_000_123_456_789;
const HOUR: u64 = 3_600_000_000_000;

/// Runs a collective whose channels have these times, and returns what is told of its end.
fn run(
    heard: &Heard,
    plugin: Plugin,
    context: Handle,
    sequence: u64,
    times: &[(u64, u64)],
) -> Vec<Call> {
    let collective = plugin.collective(context, c"AllReduce", sequence, times.len() as u8);
    let channels: Vec<_> = times
        .iter()
        .enumerate()
        .map(|(channel, (start, _))| plugin.channel(context, collective, channel as u8, *start))
        .collect();
    assert_eq!(heard.calls().last().map(|call| call.0), Some(STARTED));
    for (channel, (_, stop)) in channels.into_iter().zip(times) {
        plugin.channel_stop(channel, *stop);
    }
    heard.calls()
}

#[track_caller]
fn outcome(calls: &[Call]) -> (u64, u32) {
    let [(FINISHED, told)] = calls else {
        panic!("one end, but {calls:?}")
    };
    (told.duration, told.outcome)
}

#[test]
fn every_version_tells_a_collective_from_start_to_end() {
    let heard = Heard::new("versions");
    for version in 4..=7 {
        let plugin = heard.version(version);
        let (context, mask) = plugin.init(NUMBER, 8, 3);
        assert_eq!(mask as u64, GROUP | COLLECTIVE | KERNEL_CHANNEL);
        let communicator = Told {
            communicator: NUMBER,
            rank: 3,
            ranks: 8,
            ..Told::default()
        };
        assert_eq!(heard.calls(), [(OPENED, communicator)]);

        let group = plugin.start_kind(context, GROUP);
        assert_ne!(group, Handle::NULL, "NCCL 2.27 would start no collective");
        let collective = plugin.collective(context, c"AllReduce", 41, 24);
        plugin.stop(group);
        let told = Told {
            sequence: 41,
            operation: 4,
            ..communicator
        };
        assert_eq!(heard.calls(), [(STARTED, told)], "version {version}");

        let channels: Vec<_> = (0..24)
            .map(|channel| {
                plugin.channel(
                    context,
                    collective,
                    channel,
                    NOW + 1000 * u64::from(channel),
                )
            })
            .collect();
        for (index, channel) in (0..).zip(&channels) {
            assert_eq!(heard.calls(), []);
            plugin.channel_stop(*channel, NOW + 5_000_000 + index);
        }
        let told = Told {
            duration: 5_000_023,
            ..told
        };
        assert_eq!(heard.calls(), [(FINISHED, told)], "version {version}");

        plugin.finalize(context);
        assert_eq!(heard.calls(), [(CLOSED, communicator)]);
    }
}

#[test]
fn the_version_without_times_says_so_and_asks_for_nothing() {
    let heard = Heard::new("v3");
    let plugin = heard.version(3);
    // SAFETY: a constant string.
    let name = unsafe { CStr::from_ptr(plugin.table.name) }.to_string_lossy();
    assert!(name.contains("2.27 is needed"), "{name}");
    assert_eq!(plugin.init(0, 0, 0), (Handle::NULL, 0));
    for kind in KINDS.into_iter().take(8) {
        assert_eq!(plugin.start_kind(Handle::NULL, kind), Handle::NULL);
    }
    plugin.record(Handle::NULL, plugin::STOP, std::ptr::null_mut());
    plugin.finalize(Handle::NULL);
    assert_eq!(heard.calls(), []);
}

#[test]
fn other_events_get_no_handle_and_are_not_told() {
    let heard = Heard::new("others");
    for version in 4..=7 {
        let plugin = heard.version(version);
        let (context, _) = plugin.init(NUMBER, 8, 3);
        heard.calls();
        let kinds = KINDS.into_iter().filter(|kind| version > 4 || *kind < 256);
        for kind in kinds.filter(|kind| ![GROUP, COLLECTIVE, KERNEL_CHANNEL].contains(kind)) {
            assert_eq!(
                plugin.start_kind(context, kind),
                Handle::NULL,
                "kind {kind}"
            );
        }
        assert_eq!(plugin.start_kind(context, P2P), Handle::NULL);
        // Channels of a send, and of what was not followed; a pointer that is not the plugin's.
        let stray = Handle(plugin.library);
        for parent in [Handle::NULL, stray, context] {
            assert_eq!(plugin.channel(context, parent, 0, NOW), Handle::NULL);
        }
        // NCCL counts no channels of CollNet, and has no more than 64.
        for channels in [0, 65, 255] {
            assert_eq!(
                plugin.collective(context, c"AllReduce", 1, channels),
                Handle::NULL
            );
        }
        for handle in [Handle::NULL, stray, context] {
            plugin.channel_stop(handle, NOW);
            plugin.stop(handle);
        }
        assert_eq!(plugin.collective(stray, c"AllReduce", 1, 4), Handle::NULL);
        plugin.finalize(stray);
        plugin.finalize(Handle::NULL);
        assert_eq!(heard.calls(), []);
        plugin.finalize(context);
        plugin.finalize(context);
        assert_eq!(heard.calls().len(), 1, "closed once");
    }
}

#[test]
fn operations_have_their_label() {
    let heard = Heard::new("operations");
    let plugin = heard.version(6);
    let (context, _) = plugin.init(NUMBER, 8, 3);
    for (name, label) in [
        (c"Broadcast", "broadcast"),
        (c"Reduce", "reduce"),
        (c"AllGather", "all_gather"),
        (c"ReduceScatter", "reduce_scatter"),
        (c"AllReduce", "all_reduce"),
        (c"AlltoAll", "all_to_all"),
        (c"Gather", "gather"),
        (c"Scatter", "scatter"),
        (c"Send", "send"),
        (c"Recv", "recv"),
        (c"PutSignal", "other"),
        (c"", "other"),
        (c"a name that is longer than sixteen letters", "other"),
        (c"a name that ends with AllReduce", "other"),
    ] {
        heard.calls();
        plugin.collective(context, name, 0, 1);
        assert_eq!(
            OPERATIONS[heard.calls()[0].1.operation as usize],
            label,
            "{name:?}"
        );
    }
}

#[test]
fn channels_may_come_in_any_order() {
    let heard = Heard::new("order");
    let plugin = heard.version(5);
    let (context, _) = plugin.init(NUMBER, 8, 3);
    // Some channels only, the highest first; one starts after another has stopped.
    let collective = plugin.collective(context, c"AllGather", 1, 3);
    let last = plugin.channel(context, collective, 63, NOW + 700);
    let second = plugin.channel(context, collective, 40, NOW + 900);
    plugin.channel_stop(second, NOW + 2000);
    let first = plugin.channel(context, collective, 39, NOW + 500);
    plugin.channel_stop(last, NOW + 8000);
    heard.calls();
    plugin.channel_stop(first, NOW + 4000);
    assert_eq!(outcome(&heard.calls()), (7500, FINE));

    // Two collectives at once, whose channels mix.
    let one = plugin.collective(context, c"AllReduce", 1, 2);
    let two = plugin.collective(context, c"AllReduce", 2, 2);
    let channels = [
        plugin.channel(context, two, 1, NOW + 30),
        plugin.channel(context, one, 1, NOW + 10),
        plugin.channel(context, two, 0, NOW + 20),
        plugin.channel(context, one, 0, NOW),
    ];
    heard.calls();
    for channel in channels {
        plugin.channel_stop(channel, NOW + 100);
    }
    let ends: Vec<_> = heard
        .calls()
        .iter()
        .map(|(_, told)| (told.sequence, told.duration))
        .collect();
    assert_eq!(ends, [(2, 80), (1, 100)]);
}

#[test]
fn durations_are_exact_where_stamps_turn_over() {
    let heard = Heard::new("turn");
    let plugin = heard.version(6);
    let (context, _) = plugin.init(NUMBER, 8, 3);
    for bits in [32, 48] {
        let turn = 4000_u64 << bits;
        for before in [1, 500, 10_000] {
            let times = [
                (turn - before + 7, turn + 20),
                (turn - before, turn + 10),
                (turn - before + 3, turn - 1),
            ];
            let calls = run(&heard, plugin, context, 9, &times);
            assert_eq!(outcome(&calls).0, if before == 1 { 0 } else { before + 20 });
            assert_eq!(
                outcome(&calls).1,
                if before == 1 { IMPOSSIBLE } else { FINE }
            );
        }
    }
}

#[test]
fn impossible_times_are_told_as_such() {
    let heard = Heard::new("impossible");
    let plugin = heard.version(6);
    let (context, _) = plugin.init(NUMBER, 8, 3);
    let expect = |times: &[(u64, u64)], expected| {
        assert_eq!(
            outcome(&run(&heard, plugin, context, 9, times)),
            expected,
            "{times:?}"
        );
    };
    let fine = (NOW, NOW + 10);
    expect(&[fine], (10, FINE));
    expect(&[(NOW, NOW)], (0, FINE));
    expect(&[(NOW, NOW + HOUR), fine], (HOUR, FINE));
    expect(&[(NOW, NOW + HOUR + 1), fine], (0, IMPOSSIBLE));
    expect(&[(NOW, NOW + 70 * HOUR)], (0, IMPOSSIBLE));
    // Two channels that lie more than an hour apart.
    expect(
        &[(NOW + 2 * HOUR, NOW + 2 * HOUR + 5), fine],
        (0, IMPOSSIBLE),
    );
    // One stopped before it started, within what the others took.
    expect(&[fine, (NOW + 6, NOW + 5), fine], (0, IMPOSSIBLE));
    expect(&[(NOW + 6, NOW + 5)], (0, IMPOSSIBLE));
    // No time of the start, none of the end.
    expect(&[fine, (0, NOW + 5)], (0, IMPOSSIBLE));
    expect(&[fine, (NOW, 0)], (0, IMPOSSIBLE));
    expect(&[(0, 0)], (0, IMPOSSIBLE));
    // Stopped without a time; stopped twice, another never.
    let collective = plugin.collective(context, c"AllReduce", 9, 1);
    let channel = plugin.channel(context, collective, 0, NOW);
    heard.calls();
    plugin.stop(channel);
    assert_eq!(outcome(&heard.calls()), (0, IMPOSSIBLE));
    let collective = plugin.collective(context, c"AllReduce", 9, 2);
    let channels = [0, 1].map(|channel| plugin.channel(context, collective, channel, NOW));
    heard.calls();
    plugin.channel_stop(channels[0], NOW + 1);
    plugin.channel_stop(channels[0], NOW + 1);
    assert_eq!(outcome(&heard.calls()), (0, IMPOSSIBLE));
    plugin.channel_stop(channels[1], NOW + 1);
    assert_eq!(heard.calls(), [], "it was over");
    // Other states have other arguments.
    let collective = plugin.collective(context, c"AllReduce", 9, 1);
    let channel = plugin.channel(context, collective, 0, NOW);
    heard.calls();
    for (state, mut time) in [
        (plugin::STOP, NOW + 5),
        (plugin::STOP + 1, NOW + 99),
        (9, NOW + 99),
    ] {
        plugin.record(channel, state, (&raw mut time).cast());
    }
    plugin.record(channel, plugin::STOP, std::ptr::null_mut());
    plugin.stop(channel);
    assert_eq!(outcome(&heard.calls()), (5, FINE));
    // Nothing of all this stays behind: the next rounds are exact.
    for round in 0..5000 {
        expect(&[(NOW, NOW + 10 + round), fine, fine], (10 + round, FINE));
    }
}

#[test]
fn a_collective_that_takes_long_keeps_its_place() {
    let heard = Heard::new("long");
    let plugin = heard.version(6);
    let (context, _) = plugin.init(NUMBER, 8, 3);
    let long = plugin.collective(context, c"AllReduce", 77, 1);
    let channel = plugin.channel(context, long, 0, NOW);
    for sequence in 0..10_000 {
        assert_eq!(
            outcome(&run(
                &heard,
                plugin,
                context,
                sequence,
                &[(NOW, NOW + 3); 3]
            )),
            (3, FINE)
        );
    }
    plugin.channel_stop(channel, NOW + 123_456_789);
    assert_eq!(outcome(&heard.calls()), (123_456_789, FINE));
}

#[test]
fn collectives_that_never_end_are_overwritten_and_told_once() {
    const PLACES: u64 = 2048;
    let heard = Heard::new("overwritten");
    let plugin = heard.version(6);
    let (context, _) = plugin.init(NUMBER, 8, 3);
    heard.calls();
    let stuck: Vec<_> = (0..PLACES)
        .map(|sequence| {
            let collective = plugin.collective(context, c"Reduce", sequence, 4);
            let channels =
                [0, 1, 2].map(|channel| plugin.channel(context, collective, channel, NOW));
            plugin.channel_stop(channels[0], NOW + 1);
            (collective, channels)
        })
        .collect();
    assert!(heard.calls().iter().all(|(name, _)| *name == STARTED));
    // Each takes the place of one of these, and none is left open itself until the end.
    let mut open = Vec::new();
    for (sequence, (late, late_channels)) in (0..).zip(&stuck) {
        let collective = plugin.collective(context, c"AllReduce", sequence, 4);
        let overwritten = Told {
            communicator: NUMBER,
            sequence,
            duration: 0,
            rank: 3,
            ranks: 8,
            operation: 1,
            outcome: OVERWRITTEN,
        };
        let started = Told {
            operation: 4,
            outcome: 0,
            ..overwritten
        };
        assert_eq!(heard.calls(), [(FINISHED, overwritten), (STARTED, started)]);
        open.push(
            [0, 1, 2, 3].map(|channel| plugin.channel(context, collective, channel, NOW + 50)),
        );
        // What comes late of the former one.
        assert_eq!(plugin.channel(context, *late, 3, NOW), Handle::NULL);
        plugin.channel_stop(late_channels[1], NOW + 9999);
        plugin.channel_stop(late_channels[2], NOW + 9999);
        assert_eq!(heard.calls(), []);
    }
    for (sequence, channels) in (0..).zip(open) {
        channels
            .into_iter()
            .for_each(|channel| plugin.channel_stop(channel, NOW + 50 + sequence));
        assert_eq!(outcome(&heard.calls()), (sequence, FINE));
    }
}

#[test]
fn nothing_is_told_of_a_closed_communicator() {
    let heard = Heard::new("closed");
    let plugin = heard.version(7);
    let (context, _) = plugin.init(NUMBER, 8, 3);
    let (other, _) = plugin.init(1, 4, 0);
    let open = plugin.collective(context, c"AllReduce", 1, 2);
    let channel = plugin.channel(context, open, 0, NOW);
    let of_other = plugin.collective(other, c"AllReduce", 1, 1);
    plugin.finalize(context);
    heard.calls();
    plugin.channel_stop(channel, NOW + 1);
    assert_eq!(plugin.channel(context, open, 1, NOW), Handle::NULL);
    assert_eq!(plugin.collective(context, c"AllReduce", 2, 2), Handle::NULL);
    for sequence in 0..3000 {
        let calls = run(&heard, plugin, other, sequence, &[(NOW, NOW + 3)]);
        assert_eq!(calls.last().map(|call| call.1.duration), Some(3));
        assert!(calls.iter().all(|(_, told)| told.communicator == 1));
    }
    // What was open of the other one still is; the next communicator has the place of the first.
    assert_eq!(plugin.init(NUMBER, 8, 3).0, context);
    heard.calls();
    plugin.channel_stop(channel, NOW + 1);
    assert_eq!(heard.calls(), []);
    plugin.channel_stop(plugin.channel(other, of_other, 0, NOW), NOW + 1);
    assert_eq!(outcome(&heard.calls()), (1, FINE));
}

static LOGGED: Mutex<Vec<(c_int, String)>> = Mutex::new(Vec::new());

unsafe extern "C" fn log(
    level: c_int,
    _: c_ulong,
    _: *const c_char,
    _: c_int,
    message: *const c_char,
) {
    // SAFETY: a format without conversions.
    let message = unsafe { CStr::from_ptr(message) };
    locked(&LOGGED).push((level, message.to_string_lossy().into_owned()));
}

#[test]
fn a_communicator_without_a_place_works_unseen() {
    let heard = Heard::new("many");
    let plugin = heard.version(4);
    let contexts: Vec<_> = (0..1024)
        .map(|number| plugin.init_with(number, 4, 1, log).0)
        .collect();
    let mut opened: Vec<_> = heard
        .calls()
        .iter()
        .map(|(_, told)| told.communicator)
        .collect();
    opened.sort_unstable();
    assert_eq!(opened, (0..1024).collect::<Vec<_>>());
    assert!(locked(&LOGGED).is_empty());

    let (context, mask) = plugin.init_with(9999, 4, 1, log);
    assert_eq!(context, Handle::NULL);
    assert_eq!(
        mask, 67,
        "the mask is one for all communicators of the process"
    );
    assert_eq!(locked(&LOGGED).len(), 1);
    assert_eq!(plugin.start_kind(context, GROUP), Handle::NULL);
    assert_eq!(plugin.collective(context, c"AllReduce", 1, 4), Handle::NULL);
    plugin.finalize(context);
    assert_eq!(heard.calls(), []);

    for (number, context) in contexts.iter().enumerate() {
        let calls = run(&heard, plugin, *context, 5, &[(NOW, NOW + number as u64)]);
        assert_eq!(
            (calls[0].1.communicator, calls[0].1.duration),
            (number as u64, number as u64)
        );
    }
    plugin.finalize(contexts[500]);
    assert_ne!(plugin.init_with(9999, 4, 1, log).0, Handle::NULL);
    assert_eq!(locked(&LOGGED).len(), 1);
}

/// A small generator of numbers (xorshift).
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn threads_and_communicators_do_not_disturb_each_other() {
    const THREADS: u64 = 8;
    const COLLECTIVES: u64 = 20_000;
    let heard = Heard::new("threads");
    let plugin = heard.version(6);
    thread::scope(|scope| {
        for thread in 1..=THREADS {
            scope.spawn(move || {
                let mut state = thread;
                let (context, _) = plugin.init(thread, 8, thread as c_int);
                let mut open = Vec::new();
                for sequence in 0..COLLECTIVES {
                    let channels = 1 + random(&mut state) % 64;
                    let start = NOW + random(&mut state) % HOUR;
                    let collective =
                        plugin.collective(context, c"AllReduce", sequence, channels as u8);
                    let channels: Vec<_> = (0..channels)
                        .map(|channel| {
                            plugin.channel(context, collective, channel as u8, start + channel)
                        })
                        .collect();
                    // The duration is the sequence and 64, so that a wrong one is recognised.
                    open.push((channels, start + sequence));
                    if random(&mut state).is_multiple_of(8) || open.len() > 100 {
                        for (channels, stop) in open.drain(..) {
                            channels
                                .into_iter()
                                .for_each(|channel| plugin.channel_stop(channel, stop + 64));
                        }
                    }
                }
                for (channels, stop) in open.drain(..) {
                    channels
                        .into_iter()
                        .for_each(|channel| plugin.channel_stop(channel, stop + 64));
                }
                plugin.finalize(context);
            });
        }
    });
    let calls = heard.calls();
    for thread in 1..=THREADS {
        let own: Vec<_> = calls
            .iter()
            .filter(|(_, told)| told.communicator == thread)
            .collect();
        assert_eq!(own.len() as u64, 2 + 2 * COLLECTIVES);
        assert_eq!((own[0].0, own[own.len() - 1].0), (OPENED, CLOSED));
        for (name, told) in own {
            assert_eq!(told.rank, thread as u32);
            if *name == FINISHED {
                assert_eq!((told.duration, told.outcome), (told.sequence + 64, FINE));
            }
        }
    }
}

#[test]
fn channels_of_one_collective_may_stop_in_several_threads() {
    let heard = Heard::new("shared");
    let plugin = heard.version(6);
    let (context, _) = plugin.init(NUMBER, 8, 3);
    for sequence in 0..300 {
        let collective = plugin.collective(context, c"AllReduce", sequence, 64);
        heard.calls();
        thread::scope(|scope| {
            for part in 0..4 {
                scope.spawn(move || {
                    for channel in (part..64).step_by(4) {
                        let handle =
                            plugin.channel(context, collective, channel, NOW + u64::from(channel));
                        plugin.channel_stop(handle, NOW + 1000 + u64::from(channel));
                    }
                });
            }
        });
        assert_eq!(outcome(&heard.calls()), (1063, FINE));
    }
}

#[test]
fn places_that_run_out_under_several_threads_tell_no_wrong_duration() {
    const THREADS: u64 = 4;
    let heard = Heard::new("run-out");
    let plugin = heard.version(6);
    thread::scope(|scope| {
        for thread in 1..=THREADS {
            scope.spawn(move || {
                let (context, _) = plugin.init(thread, 8, 0);
                let mut open = std::collections::VecDeque::new();
                for sequence in 0..20_000_u64 {
                    let collective = plugin.collective(context, c"AllReduce", sequence, 4);
                    let start = NOW + thread * 1_000_000_000 + sequence * 1000;
                    let channels = [0, 1, 2, 3]
                        .map(|channel| plugin.channel(context, collective, channel, start));
                    open.push_back((channels, start + sequence));
                    // Together just more than there are places.
                    if open.len() as u64 > 2048 / THREADS + thread
                        && let Some((channels, stop)) = open.pop_front()
                    {
                        channels
                            .into_iter()
                            .for_each(|channel| plugin.channel_stop(channel, stop));
                    }
                }
            });
        }
    });
    let calls = heard.calls();
    let (mut fine, mut overwritten) = (0, 0);
    for (_, told) in calls.iter().filter(|(name, _)| *name == FINISHED) {
        match told.outcome {
            FINE => {
                assert_eq!(told.duration, told.sequence);
                fine += 1;
            }
            OVERWRITTEN => overwritten += 1,
            _ => panic!("{told:?}"),
        }
    }
    assert!(
        fine > 0 && overwritten > 0,
        "{fine} fine, {overwritten} overwritten"
    );
    let started = calls.iter().filter(|(name, _)| *name == STARTED).count();
    assert!(
        started - fine - overwritten <= 2048,
        "the rest is still open"
    );
}
