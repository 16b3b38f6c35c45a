"""Pieces of work by many processes, their results in order, their progress told as it happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from queue import Empty, Queue
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]
_LOOK_SECONDS = 0.2


def each(
    work: Callable[[Item, Advance], Result], items: Sequence[Item], workers: int, progress: Advance | None
) -> Iterator[Result]:
    """`work(item, advance)` of every item, in order; what `advance` is told goes to `progress`.

    One worker is this process itself, several are processes of their own: `work` and its items must pickle then. The
    first error ends it all.
    """
    advance = progress or (lambda amount: None)
    if workers == 1:
        yield from (work(item, advance) for item in items)
        return
    # A forked child would inherit the threads of whatever the caller has loaded.
    context = get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        told = manager.Queue()
        futures = [pool.submit(work, item, told.put) for item in items]
        try:
            for future in futures:
                while not future.done():
                    _pass_on(told, advance, _LOOK_SECONDS)
                yield future.result()
            _pass_on(told, advance, 0)
        finally:
            for future in futures:
                future.cancel()


def _pass_on(told: Queue[int], advance: Advance, seconds: float) -> None:
    """All that was told, and what comes within the first `seconds` of silence."""
    try:
        while True:
            advance(told.get(timeout=seconds) if seconds else told.get_nowait())
            seconds = 0
    except Empty:
        return
