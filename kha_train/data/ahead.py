"""A thread that runs calls in order."""

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


class InOrder:
    """A thread that runs calls in the order they were submitted. A hanging call does not keep the process from ending,
    and the thread ends when this object is dropped. It does not survive a fork.
    """

    def __init__(self, name: str) -> None:
        self._calls: _Calls = SimpleQueue()
        self._process = os.getpid()
        # Not an executor of the standard library: those run every submitted call before a process ends.
        threading.Thread(target=_work, args=(self._calls,), name=name, daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """A future for the result or exception of `call`; a cancelled call is not run."""
        assert os.getpid() == self._process, "reading ahead does not work in a forked process"
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future


def _work(calls: _Calls) -> None:
    while (one := calls.get()) is not None:
        _make(*one)
        # Otherwise it would stay alive until the next call.
        del one


def _make(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    caught = Caught()
    with caught:
        future.set_result(call())
    if caught.error is not None:
        future.set_exception(caught.error)
