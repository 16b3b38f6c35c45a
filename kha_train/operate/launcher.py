"""Starts the ranks of a run on this machine, and ends with their exit code.

A rank that ends by itself has said why, so nothing is printed below it. Only a rank that was killed has a line.
torchrun turns every failure into exit code 1 and a traceback, kills ranks that take more than 30 seconds to save after
a signal, and listens on every network interface.

`python -m kha_train.operate.launcher RANKS ARGUMENT...` is `launch` as a process of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from types import FrameType

from kha_train.literal import say

Process = subprocess.Popen[bytes]
HERE = "127.0.0.1"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GRACE_SECONDS = 30.0
"""Once a rank has failed, the others have this time to end before they are killed."""
POLL_SECONDS = 0.1


def launch(ranks: int, command: Sequence[str]) -> int:
    """Run Python with `command` (`["-m", "kha_train", ...]`) as `ranks` processes of one group; the exit code of the
    rank that failed first, or 0.

    Signals are passed on to the ranks, which save and end in their own time. A failed rank ends the others.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it without saying so

    # The store would listen on every interface if it opened the port itself.
    door = socket.create_server((HERE, 0))
    port = door.getsockname()[1]
    store = TCPStore(HERE, port, is_master=True, wait_for_workers=False, master_listen_fd=door.detach())
    environment = _environment(ranks, port)
    started: list[Process] = []
    with _signals_reach(started) as heard:
        try:
            for rank in range(ranks):
                own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                # A session of its own: Ctrl-C reaches a rank from here alone, and once.
                started.append(subprocess.Popen([sys.executable, "-u", *command], env=own, start_new_session=True))
            # Ranks that were not there yet have missed it; a rank counts two within a moment as one.
            for number, process in product(tuple(heard), started):
                process.send_signal(number)
            code = _first_failure(started)
        finally:
            _end(started)
    del store
    return code


def _environment(ranks: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set for all ranks. The store is this process's."""
    unless_set = {"OMP_NUM_THREADS": "1"}
    loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
    if loopback:
        unless_set["GLOO_SOCKET_IFNAME"] = min(loopback)
    ours = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": HERE,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": f"kha-{os.getpid()}",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return unless_set | dict(os.environ) | ours


def _first_failure(started: Sequence[Process]) -> int:
    """Wait until a rank has failed or all have ended; the exit code."""
    while True:
        codes = [process.poll() for process in started]
        # A killed rank before others, which may have failed of its death.
        failed = sorted((code > 0, rank, code) for rank, code in enumerate(codes) if code)
        if failed:
            exited, rank, code = failed[0]
            if exited:
                return code
            name = signal.Signals(-code).name
            say(f"rank {rank} was killed by {name}; the same command continues from the newest checkpoint", err=True)
            # As a shell reports it.
            return 128 - code
        if None not in codes:
            return 0
        time.sleep(POLL_SECONDS)


@contextmanager
def _signals_reach(started: Sequence[Process]) -> Iterator[Sequence[int]]:
    """Signals to this process go to the processes `started`; yields those that have come. A signal that is ignored
    (`nohup`) stays ignored.
    """
    heard: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        for process in started:
            process.send_signal(number)

    before = {number: signal.getsignal(number) for number in FORWARDED}
    caught = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for number in caught:
            signal.signal(number, forward)
        yield heard
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)


def _end(started: Sequence[Process]) -> None:
    """Ask the ranks that are left to end, and kill those that do not, with the processes that they started."""
    for process in started:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in started:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    raise SystemExit(launch(int(sys.argv[1]), sys.argv[2:]))
