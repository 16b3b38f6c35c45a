"""Runs pieces of work in many processes; yields results in order and reports progress as it happens."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from queue import Empty, Queue
from typing import TypeVar

from kha_train.errors import MachineError

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]
_LOOK_SECONDS = 0.2


def each(
    work: Callable[[Item, Advance], Result], items: Sequence[Item], workers: int, progress: Advance | None
) -> Iterator[Result]:
    """`work(item, advance)` for every item, in order; the calls of `advance` go to `progress`.

    One worker is this process itself. Several are separate processes, which end when this one is killed; `work` and its
    items must then be picklable. The first error ends everything. Raises MachineError when a process is killed.
    """
    advance = progress or (lambda amount: None)
    if workers == 1:
        yield from (work(item, advance) for item in items)
        return
    # A forked child would inherit the threads of the libraries that the caller has loaded.
    context, mine = get_context("spawn"), (os.getpid(),)
    manager = SyncManager(ctx=context)
    manager.start(_end_with, mine)
    pool = ProcessPoolExecutor(max_workers=workers, mp_context=context, initializer=_end_with, initargs=mine)
    with manager, pool:
        told = manager.Queue()
        futures = [pool.submit(work, item, told.put) for item in items]
        try:
            for future in futures:
                while not future.done():
                    _pass_on(told, advance, _LOOK_SECONDS)
                yield future.result()
            _pass_on(told, advance, 0)
        except BrokenProcessPool as error:
            raise MachineError(
                "a process was killed; possibly out of memory",
                field="workers",
                value=workers,
                fix="start again with fewer of them; finished work is kept",
            ) from error
        finally:
            for future in futures:
                future.cancel()


def _pass_on(told: Queue[int], advance: Advance, seconds: float) -> None:
    """All reported progress, including what arrives before a pause of `seconds`."""
    try:
        while True:
            advance(told.get(timeout=seconds) if seconds else told.get_nowait())
            seconds = 0
    except Empty:
        return


def _end_with(parent: int) -> None:
    """End this process soon after `parent` ends, for whatever reason."""

    def watch() -> None:
        """An orphan gets another parent."""
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
