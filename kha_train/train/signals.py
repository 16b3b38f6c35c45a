"""Receives signals at once.

Python runs a handler only when the main thread returns from library code, which may take minutes in a long micro-batch
or a collective, and merges two signals of one number that arrive in between. But the interpreter writes to its wakeup
descriptor at the moment a signal arrives. A thread reads it there, and may print, allocate and take locks, which a
handler must not.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, Self

GRACE_SECONDS = 5.0
"""If the main thread does not return within this time, a process that should end is ended without it."""
INTERRUPTED = 128 + signal.SIGINT
_LEAVE = 0
"""No signal has this number."""


class SignalListener:
    """Inside the `with` block, `hear(number)` is called in a separate thread for every one of the signals `numbers`.

    If it returns True, KeyboardInterrupt is raised in the main thread; if the process has not ended after
    `GRACE_SECONDS`, it exits with 130. The interpreter drops an exception that a handler raises within a `__del__` or a
    weak reference's callback, so `raise_if_ending` and the end of the block raise it again. Enter it in the main
    thread. Signals of a forked child are not received here.
    """

    def __init__(self, numbers: Sequence[signal.Signals], hear: Callable[[int], bool]) -> None:
        self._numbers, self._hear = numbers, hear
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_wakeup = -1
        self._ending = self._has_raised = False
        self.has_heard = False
        """Whether any of them has arrived."""
        self._left = threading.Event()
        self._read = self._write = -1
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._is_copy = False
        """Whether this is the copy in a forked child."""

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # A registered function stays registered for the life of the process: it must not keep this object alive.
        in_child = weakref.WeakMethod(self._in_child)
        os.register_at_fork(after_in_child=lambda: (call := in_child()) and call())
        self._previous_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread.start()
        self._previous = {number: signal.signal(number, self._interrupt) for number in self._numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_copy:
            return
        self._left.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.write(self._write, bytes([_LEAVE]))
        self._thread.join()
        os.close(self._write)
        os.close(self._read)
        if kind is None:
            self.raise_if_ending()

    def raise_if_ending(self) -> None:
        """Raises KeyboardInterrupt once `hear` has returned True. Call it in the main thread from time to time."""
        if self._ending:
            raise KeyboardInterrupt

    def _in_child(self) -> None:
        """A forked child shares the pipe and must not write to it."""
        if not self._left.is_set():
            self._is_copy = True
            signal.set_wakeup_fd(-1)

    def _listen(self) -> None:
        while True:
            for number in os.read(self._read, 64):
                if number == _LEAVE:
                    return
                if number not in self._numbers:
                    continue
                self.has_heard = True
                if not self._ending and self._hear(number):
                    self._ending = True
                    threading.Thread(target=self._end, name="end", daemon=True).start()

    def _end(self) -> None:
        _thread.interrupt_main()
        if not self._left.wait(GRACE_SECONDS):
            os._exit(INTERRUPTED)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.has_heard = True
        if self._ending and not self._has_raised:
            # A second exception would interrupt the cleanup of the first one.
            self._has_raised = True
            raise KeyboardInterrupt
