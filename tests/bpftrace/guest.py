# SPDX-License-Identifier: Apache-2.0
"""In the VM: each script of docs/bpftrace, and each one-liner of docs/article.md that works, beside something that it has to see, all at
the same time; then the one-liners that do not work, and the runbooks' commands.
usage: guest.py FOLDER-OF-NCCL-SIM"""

import contextlib
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import runbooks

SCRIPTS = Path("docs/bpftrace")
LIBSSL = next(Path("/usr/lib").glob("*/libssl.so.3"))
SIM = Path(sys.argv[1]).resolve()
problems = []


def sh(command, **options):
    return subprocess.run(["bash", "-ec", command], check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def check(what, seen, right):
    print(f"{'ok  ' if right else 'FAIL'} {what}: {seen}", flush=True)
    if not right:
        problems.append(what)


class Script:
    """A script at work."""

    def __init__(self, name, *arguments, text=None):
        self.name = name
        self.log = Path(tempfile.mkdtemp()) / "log"
        text = (text or (SCRIPTS / f"{name}.bt").read_text()) + '\ninterval:s:1 { printf("READY\\n"); }\n'
        script = self.log.with_name(f"{name}.bt")
        script.write_text(text)
        with self.log.open("w") as out:
            command = ["bpftrace", "-B", "line", str(script), *map(str, arguments)]
            self.child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

    def ready(self):
        end = time.monotonic() + 600
        while "READY" not in self.log.read_text():
            if self.child.poll() is not None or time.monotonic() > end:
                check(f"{self.name} starts", self.log.read_text()[-2000:], False)
                return False
            time.sleep(0.5)
        return True

    def end(self):
        """What it says at its end: by map, the keys with what follows them."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGINT)
        self.child.wait(120)
        text = self.text = self.log.read_text().replace("READY\n", "")
        print(f"--- {self.name}\n{text}", flush=True)
        found = {}
        for name, key, rest in re.findall(r"^@(\w*)(?:\[(.*)\])?:(.*(?:\n[\[(].*)*)", text, re.M):
            # A histogram is the sum of its rows.
            rows = re.findall(r"^[\[(].*?[\])]\s+(\d+) \|", rest, re.M)
            found.setdefault(name, {})[key] = sum(map(int, rows)) if rows else int(rest)
        return found


def handshakes(count):
    """TLS over a pair of sockets, without certificates."""
    for _ in range(count):
        sockets = socket.socketpair()
        contexts = [ssl.SSLContext(protocol) for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT)]
        for context in contexts:
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.set_ciphers("aNULL:@SECLEVEL=0")
        server = threading.Thread(target=lambda: contexts[0].wrap_socket(sockets[0], server_side=True))
        server.start()
        contexts[1].wrap_socket(sockets[1])
        server.join()


def one_liners():
    """Of docs/article.md: what each is about, its program as printed and what bpftrace says of it, the program that works."""
    section = re.search(r"^## The bpftrace one-liners\n(.*?)(?=^## |\Z)", Path("docs/article.md").read_text(), re.M | re.S).group(1)
    for part in re.split(r"^### ", section, flags=re.M)[1:]:
        printed, works = re.findall(r"^bpftrace -e '(.*?)'$", part, re.M | re.S)
        yield part.splitlines()[0], printed, re.findall(r"^> `(.*)`$", part, re.M), works


def as_printed():
    for about, program, errors, _ in one_liners():
        ran = subprocess.run(["timeout", "60", "bpftrace", "-e", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said = all(error in ran.stdout for error in errors)
        check(f"as printed, {about}", ran.stdout[:400], ran.returncode == 1 and said and errors)


def connect(address, port):
    with contextlib.suppress(OSError), socket.create_connection((address, port), 10):
        return True
    return False


def network():
    sh("""ip netns add far; ip link add near type veth peer name far netns far
          ip addr add 10.79.0.1/24 dev near; ip link set near up
          ip -n far addr add 10.79.0.2/24 dev far; ip -n far link set far up; ip -n far link set lo up""")


def retransmits():
    """A connection that loses a tenth of its packets, from a cgroup of its own: its segments, by the kernel."""
    sh("modprobe sch_netem; tc qdisc add dev near root netem loss 10%; mkdir -p /sys/fs/cgroup/sender")
    before = int(sh("nstat -asz TcpRetransSegs | awk '/Tcp/ {print $2}'"))
    server = subprocess.Popen(["ip", "netns", "exec", "far", "socat", "-u", "TCP-LISTEN:7000", "OPEN:/dev/null"])
    time.sleep(2)
    sh("echo $$ >/sys/fs/cgroup/sender/cgroup.procs; head -c 2000000 /dev/zero | socat -u - TCP:10.79.0.2:7000")
    server.wait()
    sh("tc qdisc del dev near root")
    return int(sh("nstat -asz TcpRetransSegs | awk '/Tcp/ {print $2}'")) - before


def wireguard():
    sh("""modprobe wireguard
          for n in 1 2; do wg genkey >/tmp/key$n; wg pubkey </tmp/key$n >/tmp/pub$n; done
          ip link add wg0 type wireguard; ip -n far link add wg0 type wireguard
          wg set wg0 listen-port 51871 private-key /tmp/key1
          ip netns exec far wg set wg0 listen-port 51871 private-key /tmp/key2 peer $(cat /tmp/pub1) allowed-ips 10.80.0.1/32 endpoint 10.79.0.1:51871
          ip addr add 10.80.0.1/24 dev wg0; ip link set wg0 up; ip -n far addr add 10.80.0.2/24 dev wg0; ip -n far link set wg0 up""")


def rekey(times):
    for _ in range(times):
        sh("""wg set wg0 peer $(cat /tmp/pub2) remove
              wg set wg0 peer $(cat /tmp/pub2) allowed-ips 10.80.0.2/32 endpoint 10.79.0.2:51871
              for i in $(seq 20); do ping -qc 1 -W 5 10.80.0.2 >/dev/null && exit; done; exit 1""")


def rdma():
    sh("""modprobe -a rdma_rxe rdma_ucm ib_uverbs; rdma link add rxe0 type rxe netdev near
          for i in $(seq 100); do [ -e /sys/class/infiniband_verbs/uverbs0/dev ] && break; sleep 0.1; done
          mkdir -p /dev/infiniband
          [ -e /dev/infiniband/uverbs0 ] || mknod /dev/infiniband/uverbs0 c $(tr : ' ' </sys/class/infiniband_verbs/uverbs0/dev)""")


def pingpong():
    server = subprocess.Popen(["ibv_rc_pingpong", "-d", "rxe0", "-g", "1", "-n", "10"], stdout=subprocess.DEVNULL)
    sh("for i in $(seq 50); do ibv_rc_pingpong -d rxe0 -g 1 -n 10 10.79.0.1 >/dev/null 2>&1 && exit; sleep 0.5; done; exit 1")
    server.wait()


def scripts():
    # A process whose threads have to share a CPU with each other.
    busy = subprocess.Popen(["taskset", "-c", "0", "stress-ng", "-q", "--cpu", "2"])
    worker = subprocess.Popen(["taskset", "-c", "0", "python3", "-c", "import time\nwhile True: time.sleep(0.001)"])
    running = {
        "retransmits": Script("retransmits"),
        "connects": Script("connects"),
        "tls-handshakes": Script("tls-handshakes", LIBSSL),
        "queue-pairs": Script("queue-pairs"),
        "wireguard-sessions": Script("wireguard-sessions"),
        "runqueue-delay": Script("runqueue-delay", worker.pid),
        "nccl-calls": Script("nccl-calls", SIM / "libnccl.so.2"),
    }
    lines = {about: Script(about.replace(" ", "-"), text=program) for about, _, _, program in one_liners()}
    running |= lines
    there = {path.stem for path in SCRIPTS.glob("*.bt")}
    check("every script is tested", sorted(there), there | set(lines) == set(running) and len(lines) == 3)
    if not all([script.ready() for script in running.values()]):
        return

    sent_again = retransmits()
    connected = [connect("10.79.0.1", port) for port in [7001] * 4 + [7002] * 3]
    handshakes(5)
    # An answer to a handshake is a session at each end; the asker takes none to a question that it has asked anew.
    capture = ["tcpdump", "-Z", "root", "-ni", "near", "-U", "-w", "/tmp/answers", "udp port 51871 and udp[8] = 2"]
    with subprocess.Popen(capture, stderr=subprocess.DEVNULL) as answers:
        time.sleep(2)
        rekey(4)
        time.sleep(2)
        answers.send_signal(signal.SIGINT)
    answered = len(sh("tcpdump -nr /tmp/answers 2>/dev/null").splitlines())
    pingpong()
    job = ["--library", SIM / "libnccl.so.2", "--ranks", "2", "--communicators", "1", "--collectives", "200", "--kinds", "all_reduce", "--groups", "0"]
    subprocess.run([SIM / "job", *map(str, job)], check=True, stdout=subprocess.DEVNULL)
    time.sleep(3)
    worker.kill()
    busy.kill()
    seen = {name: script.end() for name, script in running.items()}

    segments = seen["retransmits"].get("segments", {})
    ours = sum(count for key, count in segments.items() if "/sender" in key and "10.79.0.2, 7000" in key)
    check("segments of the cgroup, and by the kernel", (ours, sent_again), 0 < ours == sent_again)
    accepted = seen["connects"].get("us", {}).get("10.79.0.1, 7001")
    check("connects", accepted, accepted == 4 and connected == [True] * 4 + [False] * 3)
    refused = seen["connects"].get("failed", {}).get("10.79.0.1, 7002")
    check("refused connects", refused, refused == 3)
    tls = sum(seen["tls-handshakes"].get("ms", {}).values())
    check("handshakes, both ends", tls, tls == 10)
    transitions = seen["queue-pairs"].get("transitions", {})
    by_state = {}
    for key, count in transitions.items():
        if key.startswith("ibv_rc_pingpong"):
            by_state[key.rsplit(", ", 1)[1]] = by_state.get(key.rsplit(", ", 1)[1], 0) + count
    # The client that comes before the server listens has gone to INIT, too.
    right = by_state.get("RTR") == by_state.get("RTS") == 2 and by_state.get("INIT", 0) >= 2
    check("queue pairs", by_state, right)
    destroyed = sum(count for key, count in seen["queue-pairs"].get("destroyed", {}).items() if key.startswith("ibv_rc_pingpong"))
    check("queue pairs destroyed", destroyed, destroyed == by_state.get("INIT"))
    sessions = seen["wireguard-sessions"].get("sessions", {}).get("")
    check("sessions of both ends, answers on the wire", (sessions, answered), answered >= 4 and answered + 4 <= sessions <= 2 * answered)
    again = seen["TCP retransmits"].get("", {}).get("10.79.0.2, 7000", 0)
    check("retransmits, in one line", (again, sent_again), 0 < again <= sent_again)
    took = re.findall(r"handshake pid=\d+ duration_ns=(\d+)", lines["TLS handshakes"].text)
    check("handshakes, in one line", took, len(took) == 10 and all(int(time) > 0 for time in took))
    asked = re.findall(r"connect pid=\d+ \S+ to 10\.79\.0\.1:(700[12])", lines["Who connects to what"].text)
    check("connects, in one line", asked, asked == ["7001"] * 4 + ["7002"] * 3)
    waits = sum(seen["runqueue-delay"].get("us", {}).values())
    check("waits for the CPU", waits, waits > 100)
    calls = sum(seen["nccl-calls"].get("enqueue_us", {}).values())
    check("calls of NCCL, two ranks", calls, calls == 400)


listener = socket.create_server(("0.0.0.0", 7001))
threading.Thread(target=lambda: [listener.accept() for _ in iter(int, 1)], daemon=True).start()
network()
wireguard()
rdma()
scripts()
as_printed()
for what, seen, right in runbooks.check():
    check(what, seen, right)
print(f"{'FAILED: ' + ', '.join(problems) if problems else 'all as expected'}")
sys.exit(bool(problems))
