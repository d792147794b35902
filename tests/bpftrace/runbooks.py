# SPDX-License-Identifier: Apache-2.0
"""Runs the shell commands of the runbooks, each as an on-call engineer would paste it, with something to look at. A command is wrong if a
tool does not understand it: whatever it finds, it complains of nothing but what this machine lacks."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

RUNBOOKS = Path("docs/runbooks")

# Tools of a cluster, of a vendor's driver, or of packages that the guest does not have.
ELSEWHERE = {"kubectl", "crictl", "helm", "hubble", "cilium-dbg", "chandra-mixin", "nvme", "py-spy", "nvidia-smi", "mpstat", "sminfo"}

# What hardware and kernels without it answer; the command was understood.
LACKS = re.compile(
    r"Operation not supported|no stats available|Attribute failed policy validation|dcb: Error: netlink|kernel answers: |"
    # rdma_rxe has no such counters; a tunnel's far end does not answer.
    r"/ports/1/counters/.*No such file|dropped privs to tcpdump|listening on|packets (captured|received|dropped)|verbose output suppressed|"
    r"perftest doesn't supports|Conflicting CPU frequency|^real|^user|^sys|^$"
)

PLACES = {
    "cilium_wg0": "wg0",
    "NETDEV": "near",
    "DEVICE": "rxe0",
    "GID_INDEX": "1",
    "NODE": "node",
    "eth0": "near",
}


def commands(text):
    """The commands of all shell blocks; a line that is indented, or follows an open pipe, goes on with the one before."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
        command = ""
        for line in block.splitlines():
            if command and (line.startswith(" ") or command.rstrip().endswith(("|", "\\"))):
                command += "\n" + line
                continue
            if command:
                yield command
            command = line
        yield command


def tools(command):
    """The words that a shell would look up, roughly: the first of each part of a pipeline."""
    plain = re.sub(r"'[^']*'|\"[^\"]*\"", "x", command)
    return {part.split()[0] for part in re.split(r"\||;|&&|\bdo\b|\$\(|\btimeout \d+|\btime\b|nsenter -t PID -n", plain) if part.split()}


def prepared(command, peer):
    for place, here in (PLACES | {"PEER_NODE_ADDRESS": peer, "PEER_ADDRESS": peer, "PID": str(os.getpid())}).items():
        command = re.sub(rf"\b{place}\b", here, command)
    command = re.sub(r"\bsleep \d+", "sleep 1", command)
    if "bpftrace" not in command:
        command = re.sub(r"\btimeout \d+", "timeout 3", command)
    return command


def check():
    """What, what was seen, whether it is right."""
    exporter = subprocess.Popen(["target/debug/chandra", "--pods", "none"], stderr=subprocess.DEVNULL)
    skipped = 0
    try:
        for path in sorted(RUNBOOKS.glob("*.md")):
            # An RDMA device is its own peer; packets need another host.
            peer = "10.79.0.1" if path.stem == "rdma" else "10.79.0.2"
            server = None
            for command in commands(path.read_text()):
                if tools(command) & ELSEWHERE:
                    skipped += 1
                    continue
                line = prepared(command, peer)
                if server:
                    # Until the server listens.
                    line = f"for i in $(seq 20); do out=$({line.split('#')[0]} 2>&1) && break; sleep 1; done; [ $i -lt 20 ] || echo \"$out\" >&2"
                shell = subprocess.Popen(["bash", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
                if "# on PEER_NODE" in command:
                    server = shell
                    continue
                try:
                    out, err = shell.communicate(timeout=300)
                except subprocess.TimeoutExpired:
                    os.killpg(shell.pid, signal.SIGKILL)
                    yield f"{path.name}: {command}", "no end in 300 s", False
                    continue
                if server:
                    os.killpg(server.pid, signal.SIGTERM)
                    server.communicate()
                    server = None
                complaints = [line for line in err.splitlines() if not LACKS.search(line)]
                print(f"--- {path.name}: {command}\n{out[-600:]}", flush=True)
                yield f"{path.name}: {command}", complaints or "understood", not complaints
    finally:
        exporter.terminate()
    print(f"SKIPPED: {skipped} commands of the runbooks, for {', '.join(sorted(ELSEWHERE))}", flush=True)


if __name__ == "__main__":
    for path in sorted(RUNBOOKS.glob("*.md")):
        for command in commands(path.read_text()):
            print(path.name, tools(command) & ELSEWHERE or "", command)
    sys.exit()
