# SPDX-License-Identifier: Apache-2.0
"""Drives the profiler plugin through one real NCCL library.  usage: check.py VERSION LIBRARY FOLDER, or check.py versions

NCCL's internal functions that call a profiler need no GPU, only structures with the fields that they read. Here they get
them, zero but for these fields: so the table is chosen, the descriptors are written and the plugin is called by NCCL's own
code of that version. What comes of a GPU is made up: the times of the channels.

The probed functions are replaced by jumps to functions of this program, as nccl-profiler/tests/tables.rs does.
"""

import ctypes
import functools
import random
import re
import subprocess
import sys

# Offsets in NCCL's internal structures, x86-64, by version: of the debug information of each library (gdb: ptype /o).
# comm: commHash, rank, nRanks, nNodes, profilerContext. plan: collTaskQueue (comm is at 16 in all).
# task: nChannels, eActivationMask, eventHandle (func is at 8, datatype at 44 in all).
VERSIONS = {
    "2.26.5": (3, (492720, 492728, 492732, 492912, 501000), None, None),
    "2.27.5": (4, (1066160, 1066168, 1066172, 1066352, 1074504), 152, (200, 184, 192)),
    "2.28.9": (5, (1066184, 1066192, 1066196, 1066376, 1075720), 152, (232, 200, 224)),
    "2.29.7": (6, (1181392, 1181400, 1181404, 1181584, 1191536), 216, (240, 208, 232)),
    "2.30.7": (6, (1181416, 1181424, 1181428, 1181608, 1191568), 216, (240, 208, 232)),
    "2.31.2": (7, (1181408, 1181416, 1181420, 1181600, 1193768), 264, (240, 208, 232)),
    "2.32.3": (7, (1181408, 1181416, 1181420, 1181612, 1193792), 280, (256, 224, 248)),
}
# struct ncclProxyArgs begins with its array of struct ncclProxySubArgs, the same from 2.27 to 2.30. Later a channel is a
# struct ncclProfilerWorkOp. Of both: size, channelId, eActivationMask, taskEventHandle, profilerContext.
SUB = (512, 72, 248, 272, 264)
WORK = (88, 0, 16, 24, 32)
MASK = 1 | 2 | 64
FUNCTIONS = ["Broadcast", "Reduce", "AllGather", "ReduceScatter", "AllReduce"]
NUMBER, RANK, RANKS = 0xFEEDC0DE12345678, 3, 8


class Told(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("communicator", "sequence", "duration")]
    _fields_ += [(name, ctypes.c_uint32) for name in ("rank", "ranks", "operation", "outcome")]


CALLS = []
KEPT = []


def listen(plugin, event):
    """Makes chandra_nccl_<event> jump here: mov rax, target; jmp rax."""

    def called(address):
        told = Told.from_address(address)
        CALLS.append((event, *(getattr(told, name) for name, _ in Told._fields_)))

    callback = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(called)
    KEPT.append(callback)
    function = ctypes.cast(getattr(plugin, "chandra_nccl_" + event), ctypes.c_void_p).value
    assert ctypes.string_at(function, 6) == bytes.fromhex("0f1f440000c3"), "a nop of five bytes, and a return"
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(function & ~0xFFF), 4096, 7):
        raise OSError("mprotect")
    target = ctypes.cast(callback, ctypes.c_void_p).value
    code = b"\x48\xb8" + target.to_bytes(8, "little") + b"\xff\xe0"
    ctypes.memmove(function, code, len(code))


class Memory:
    """Zeroed memory, written and read by offset."""

    def __init__(self, size):
        self.buffer = ctypes.create_string_buffer(size)
        self.address = ctypes.addressof(self.buffer)

    def put(self, offset, value, size=8):
        ctypes.memmove(self.address + offset, value.to_bytes(size, "little"), size)

    def get(self, offset):
        return int.from_bytes(ctypes.string_at(self.address + offset, 8), "little")


class Library:
    """Internal functions of a library, by name."""

    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        self.symbols = {}
        listed = subprocess.run(["nm", path], check=True, capture_output=True, text=True).stdout
        for address, _, name in (line.split() for line in listed.splitlines() if len(line.split()) == 3):
            self.symbols[name] = int(address, 16)
        exported = ctypes.cast(self.library.ncclGetVersion, ctypes.c_void_p).value
        self.base = exported - self.symbols["ncclGetVersion"]

    @functools.cache
    def mangled(self, name):
        found = [symbol for symbol in self.symbols if re.fullmatch(rf"_Z{len(name)}{name}P\w+", symbol)]
        assert len(found) == 1, f"{name}: {found}"
        return found[0]

    def call(self, name, *arguments):
        function = ctypes.CFUNCTYPE(ctypes.c_int, *(type(argument) for argument in arguments))
        result = function(self.base + self.symbols[self.mangled(name)])(*arguments)
        assert result == 0, f"{name}: {result}"


def collective(nccl, version, comm, operation, times):
    """One collective whose channels have these times. Returns NCCL's handle of it."""
    _, (*_, context), queue, (channels, mask, handle) = VERSIONS[version]
    plan, task = Memory(4096), Memory(4096)
    plan.put(16, comm.address)
    plan.put(queue, task.address)
    plan.put(queue + 8, task.address)
    task.put(8, operation, 4)
    task.put(44, 7, 4)
    task.put(channels, len(times), 1)
    task.put(mask, MASK, 4)
    for function in ("StartGroupEvent", "StartTaskEvents"):
        nccl.call("ncclProfiler" + function, ctypes.c_void_p(plan.address))
    # NCCL hands it to the channels here: since 2.31 the task forgets it when it stops.
    event = task.get(handle)
    for function in ("StopTaskEvents", "StopGroupEvent"):
        nccl.call("ncclProfiler" + function, ctypes.c_void_p(plan.address))

    size, channel_id, mask, parent, of = WORK if VERSIONS[version][0] >= 7 else SUB
    work = Memory(len(times) * size)
    for index in range(len(times)):
        work.put(index * size + channel_id, index, 4)
        work.put(index * size + mask, MASK, 4)
        work.put(index * size + parent, event)
        work.put(index * size + of, comm.get(context))
    one = lambda index: (ctypes.c_void_p(work.address + index * size),)
    both = lambda index: (ctypes.c_void_p(work.address), ctypes.c_int(index))
    arguments = one if VERSIONS[version][0] >= 7 else both
    order = list(enumerate(times))
    random.shuffle(order)
    for index, (start, _) in order:
        nccl.call("ncclProfilerStartKernelChEvent", *arguments(index), ctypes.c_uint64(start))
    random.shuffle(order)
    for index, (_, stop) in order:
        nccl.call("ncclProfilerStopKernelChEvent", *arguments(index), ctypes.c_uint64(stop))
    return event


def expect(*calls):
    assert CALLS == list(calls), f"told {CALLS}, expected {list(calls)}"
    CALLS.clear()


def main(version, path, folder):
    table, (number, rank, ranks, nodes, _), _, _ = VERSIONS[version]
    plugin = ctypes.CDLL(f"{folder}/libnccl-profiler.so")
    for event in ("opened", "started", "finished", "closed"):
        listen(plugin, event)
    nccl = Library(path)
    found = ctypes.c_int()
    nccl.library.ncclGetVersion(ctypes.byref(found))
    digits = [int(part) for part in version.split(".")]
    assert found.value == digits[0] * 10000 + digits[1] * 100 + digits[2], f"it says {found.value}"

    comm = Memory(2 << 20)
    comm.put(number, NUMBER)
    comm.put(rank, RANK, 4)
    comm.put(ranks, RANKS, 4)
    comm.put(nodes, 1, 4)
    nccl.call("ncclProfilerPluginInit", ctypes.c_void_p(comm.address))
    if table == 3:
        expect()
    else:
        expect(("opened", NUMBER, 0, 0, RANK, RANKS, 0, 0))

    count = 0
    if table >= 4:
        sequences = [0] * len(FUNCTIONS)
        now = 1_790_000_000_000_000_000
        for channels in (1, 2, 4, 24, 64):
            for operation in range(len(FUNCTIONS)):
                times = [(now + random.randrange(10**6), now + random.randrange(10**6, 10**10)) for _ in range(channels)]
                collective(nccl, version, comm, operation, times)
                duration = max(stop for _, stop in times) - min(start for start, _ in times)
                head = (NUMBER, sequences[operation])
                tail = (RANK, RANKS, operation)
                expect(("started", *head, 0, *tail, 0), ("finished", *head, duration, *tail, 0))
                sequences[operation] += 1
                count += 1
        # A channel that stopped before it started; a collective whose channels NCCL does not count.
        collective(nccl, version, comm, 4, [(now + 5, now + 4), (now, now + 9)])
        assert CALLS.pop()[-1] == 1
        CALLS.clear()
        assert collective(nccl, version, comm, 4, []) == 0
        expect()
    nccl.call("ncclProfilerPluginFinalize", ctypes.c_void_p(comm.address))
    expect(*([("closed", NUMBER, 0, 0, RANK, RANKS, 0, 0)] if table >= 4 else []))

    with open(f"{folder}/log", encoding="utf-8", errors="replace") as file:
        loaded = re.findall(r"PROFILER/Plugin: [Ll]oaded (Chandra.*)", file.read())
    # NCCL 2.27 does not say which table it took; v4 is the newest that it knows.
    expected = {3: "Chandra (sees nothing: this NCCL is too old, 2.27 is needed)", 4: "Chandra"}
    assert loaded == [expected.get(table, f"Chandra (v{table})")], f"NCCL's log says {loaded}"
    print(f"NCCL {version}: table v{table}, {count} of {count} durations exact" if count else f"NCCL {version}: {loaded[0]}")


if sys.argv[1:] == ["versions"]:
    print(*VERSIONS, sep="\n")
else:
    main(*sys.argv[1:])
