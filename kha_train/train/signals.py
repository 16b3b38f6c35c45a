"""Signals heard at once.

Python runs a handler only when the main thread is back from the library it is in, which may take minutes in a long
micro-batch or a collective, and takes two signals of one number that come meanwhile for one. The interpreter writes to
its wakeup descriptor at the moment a signal arrives: a thread reads it there and may print, allocate and take locks,
which a handler must not.
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
"""After so long a process that is to end, and whose main thread does not come back, is ended without it."""
INTERRUPTED = 128 + signal.SIGINT
_LEAVE = 0
"""No signal has this number."""


class SignalListener:
    """While entered, `hear(number)` is called in a thread of its own for every one of the signals `numbers`.

    Where it returns True, KeyboardInterrupt is raised in the main thread; if that does not get to leave in
    `GRACE_SECONDS`, the process exits with 130. The interpreter drops an exception that a handler raises amid a
    `__del__` or a weak reference's callback: `raise_if_ending` and leaving raise it again. To be entered in the main
    thread. A forked child's signals are not heard here.
    """

    def __init__(self, numbers: Sequence[signal.Signals], hear: Callable[[int], bool]) -> None:
        self._numbers, self._hear = numbers, hear
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_wakeup = -1
        self._ending = self._has_raised = False
        self.has_heard = False
        """Whether any of them has arrived."""
        self._left = threading.Event()
        self._is_copy = False
        """Whether this is the copy that a forked child has."""

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # What is registered stays so for as long as the process lives: it must not keep this object.
        in_child = weakref.WeakMethod(self._in_child)
        os.register_at_fork(after_in_child=lambda: (call := in_child()) and call())
        self._previous_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
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
        """Raises KeyboardInterrupt once `hear` has returned True. To be called in the main thread, now and then."""
        if self._ending:
            raise KeyboardInterrupt

    def _in_child(self) -> None:
        """The pipe is shared by a forked child, which must not write to it."""
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
            # A second exception would break off what the first one is closing.
            self._has_raised = True
            raise KeyboardInterrupt
