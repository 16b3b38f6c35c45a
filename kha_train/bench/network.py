"""Nodes on one machine: network namespaces, each with a cable to one switch, and all cables of one speed.

    node 0   eth0 10.77.0.1 ---- port0 \\
    node 1   eth0 10.77.0.2 ---- port1  bridge
    ...                                /

A token bucket (`tc tbf`) at both ends of a cable limits each direction by itself, as a full-duplex network card does.
A namespace has no name and no file: it belongs to a process that waits for the end of its input, which is a pipe of
this process, and to what runs on the node. So the kernel removes all of it however this process ends. Needs Linux, root
and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kha_train.errors import ConfigError

PROGRAMS = ("ip", "tc", "unshare", "nsenter", "setpriv")
CARD = "eth0"
MTU_BYTES = 9000
"""Jumbo frames: headers add 0.3 % to the bytes of a collective; with 1,500 they would add 5 %."""
BURST_BYTES, QUEUE_BYTES = 65536, 4 << 20
"""What a cable carries at once after a pause, and what may wait for it: more than the sockets send, so nothing is
lost.
"""
PIPE = subprocess.PIPE
Holder = subprocess.Popen[bytes]


def why_not_here() -> str | None:
    """Why this machine cannot have such nodes; None when it can, as far as that is known before they are made."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)} here: they are of Linux, iproute2 and util-linux"
    if os.geteuid():
        return "only root can make network namespaces and throttle links"
    probe = subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True, text=True)
    return f"no right to make network namespaces: {probe.stderr.strip()}" if probe.returncode else None


class Nodes:
    """The nodes of `nodes_on_a_switch`, numbered from 0."""

    def __init__(self, holders: Sequence[Holder]) -> None:
        *self._nodes, self._switch = holders

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._nodes)

    def address(self, node: int) -> str:
        """The address of a node on the network of the nodes."""
        return f"10.77.0.{node + 1}"

    def throttle(self, megabits: float) -> None:
        """Let every cable carry so many million bits a second in each direction; 0: as many as the machine can."""
        for node, holder in enumerate(self._nodes):
            for where, device in ((holder, CARD), (self._switch, _port(node))):
                if megabits:
                    rate = ("rate", f"{round(1e6 * megabits)}bit", "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES))
                    _inside(where, "tc", "qdisc", "replace", "dev", device, "root", "tbf", *rate)
                else:
                    # It fails where the cable is open already.
                    _inside(where, "tc", "qdisc", "delete", "dev", device, "root", check=False)

    def sent_bytes(self) -> list[int]:
        """What the card of each node has sent, with the headers of Ethernet, IP and TCP."""
        return [_sent(Path(f"/proc/{holder.pid}/net/dev").read_text()) for holder in self._nodes]

    def start(self, node: int, command: Sequence[str], environment: Mapping[str, str], **how: Any) -> Holder:
        """Start `command` on a node, in a session of its own, with `environment` on top of this process's. The kernel
        kills it when this process ends.
        """
        # A process that was killed before the kernel knew of the wish has left its children to another parent.
        unless_orphaned = ("sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid()))
        argv = [*_entering(self._nodes[node]), "setpriv", "--pdeathsig", "KILL", *unless_orphaned, *command]
        return subprocess.Popen(argv, env={**os.environ, **environment}, start_new_session=True, **how)


@contextmanager
def nodes_on_a_switch(count: int) -> Iterator[Nodes]:
    """`count` nodes, removed at the end. Raises ConfigError where the machine cannot have them."""
    reason = why_not_here()
    if reason:
        raise ConfigError(reason, fix="run this as root on a Linux machine with iproute2, outside containers")
    with ExitStack() as removed_last:
        holders = [removed_last.enter_context(_namespace()) for _ in range(count + 1)]
        nodes = Nodes(holders)
        switch = holders[-1]
        _inside(switch, "ip", "link", "add", "bridge", "mtu", str(MTU_BYTES), "type", "bridge")
        _inside(switch, "ip", "link", "set", "bridge", "up")
        for node, holder in enumerate(holders[:-1]):
            ends = ("mtu", str(MTU_BYTES), "type", "veth", "peer", "name", CARD, "mtu", str(MTU_BYTES))
            _inside(switch, "ip", "link", "add", _port(node), *ends, "netns", str(holder.pid))
            _inside(switch, "ip", "link", "set", _port(node), "master", "bridge", "up")
            _inside(holder, "ip", "address", "add", f"{nodes.address(node)}/24", "dev", CARD)
            _inside(holder, "ip", "link", "set", CARD, "up")
            _inside(holder, "ip", "link", "set", "lo", "up")
        yield nodes


@contextmanager
def _namespace() -> Iterator[Holder]:
    """A process in a network namespace of its own."""
    argv = ["unshare", "--net", "sh", "-c", "echo; exec cat"]
    holder = subprocess.Popen(argv, stdin=PIPE, stdout=PIPE, start_new_session=True)
    assert holder.stdin is not None and holder.stdout is not None
    try:
        # It answers from inside the namespace.
        holder.stdout.readline()
        yield holder
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


def _port(node: int) -> str:
    """The end of a node's cable in the switch."""
    return f"port{node}"


def _entering(holder: Holder) -> list[str]:
    return ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]


def _inside(holder: Holder, *argv: str, check: bool = True) -> None:
    """Run a command in the namespace of `holder`. Raises ConfigError with what it says when it fails."""
    ended = subprocess.run([*_entering(holder), *argv], check=False, capture_output=True, text=True)
    if check and ended.returncode:
        problem = f"this machine refuses `{' '.join(argv)}`: {ended.stderr.strip()}"
        raise ConfigError(problem, fix="use a kernel with veth, bridge and sch_tbf")


def _sent(listed: str) -> int:
    """The bytes sent by `CARD`, in the format of /proc/net/dev."""
    line = next(line for line in listed.splitlines() if line.lstrip().startswith(f"{CARD}:"))
    return int(line.partition(":")[2].split()[8])
