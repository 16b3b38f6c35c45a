"""A thread that runs calls in order.

At the end of a process Python stops a daemon thread where it next asks for the interpreter. Where that is inside a call
of torch, the process aborts and its exit code is lost; so the end waits a moment for the call in progress.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from kha_train.distributed import Caught

T = TypeVar("T")
_Calls = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
_PATIENCE_SECONDS = 2.0


class InOrder:
    """A thread that runs calls in the order they were submitted. A hanging call does not keep the process from ending,
    and the thread ends when this object is dropped. It does not survive a fork.
    """

    def __init__(self, name: str) -> None:
        self._calls: _Calls = SimpleQueue()
        self._process = os.getpid()
        # Not an executor of the standard library: those run every submitted call before a process ends.
        ended = threading.Event()
        thread = threading.Thread(target=_work, args=(self._calls, ended), name=name, daemon=True)
        thread.start()
        weakref.finalize(self, _end, self._calls, ended, thread)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """A future for the result or exception of `call`; a cancelled call is not run."""
        assert os.getpid() == self._process, "reading ahead does not work in a forked process"
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future


def _work(calls: _Calls, ended: threading.Event) -> None:
    while (one := calls.get()) is not None and not ended.is_set():
        _make(*one)
        # Otherwise it would stay alive until the next call.
        del one


def _end(calls: _Calls, ended: threading.Event, thread: threading.Thread) -> None:
    """Let `thread` end after the call in progress, and give that call a moment."""
    ended.set()
    calls.put(None)
    # The last reference may be dropped by one of the calls.
    if thread is not threading.current_thread():
        thread.join(_PATIENCE_SECONDS)


def _make(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    caught = Caught()
    with caught:
        future.set_result(call())
    if caught.error is not None:
        future.set_exception(caught.error)
