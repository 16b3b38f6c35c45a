"""Calls made one after another beside the caller's own work."""

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
    """A thread that makes calls in the order they are given. A call that hangs keeps no process from ending, and the
    thread ends when this object is dropped. It does not cross a fork."""

    def __init__(self, name: str) -> None:
        self._calls: _Calls = SimpleQueue()
        self._process = os.getpid()
        # Not an executor of the standard library: those make every call they were given before a process ends.
        threading.Thread(target=_work, args=(self._calls,), name=name, daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """What `call` will have answered or raised; it is not made when that is cancelled before."""
        assert os.getpid() == self._process, "what reads ahead cannot be used in a forked process"
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future


def _work(calls: _Calls) -> None:
    while (one := calls.get()) is not None:
        _make(*one)
        # Or else it would live until the next one comes.
        del one


def _make(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    caught = Caught()
    with caught:
        future.set_result(call())
    if caught.error is not None:
        future.set_exception(caught.error)
