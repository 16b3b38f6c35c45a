"""Profiles time and memory of some steps, under `<run.dir>/profile/`.

`steps-A-B.trace.json.gz` opens in Perfetto or chrome://tracing; `steps-A-B.txt` lists operators by the time they took.
With `profile.memory` the trace also follows memory, the list has what operators allocated, and on CUDA
`steps-A-B.memory.pickle` holds every allocation with its stack, for pytorch.org/memory_viz. Only rank 0 writes. If it
cannot, it warns, and training continues. A profiled step is slower than others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from kha_train.config.schema import RunConfig
from kha_train.distributed import World
from kha_train.record import Redactor

ROWS = 60
MAX_ALLOCATIONS = 200_000


class Profiler:
    """Profiles the steps `profile.first_step` .. `profile.last_step` of a run; does nothing when the first is 0.

    `warn` is called for a profile that could not be written.
    """

    def __init__(self, config: RunConfig, run_dir: Path, world: World, warn: Callable[[str], None]) -> None:
        self._section, self._world, self._folder = config.profile, world, run_dir / "profile"
        self._wanted = config.profile.first_step > 0 and world.is_main
        self._running: Any = None
        self._warn, self._first, self._next = warn, 0, 0

    @contextmanager
    def over(self, step: int) -> Iterator[None]:
        """Around optimiser step `step` (1-based): starts with the first profiled step, writes after the last.

        A profile interrupted by a rewind is dropped; it starts again when its steps are repeated.
        """
        wanted = self._wanted and self._section.first_step <= step <= self._section.last_step
        if self._running is not None and step != self._next:
            self.close()
        if wanted and self._running is None:
            self._start(step)
        self._next = step + 1
        yield
        if self._running is not None and step >= self._section.last_step:
            self._write(step)

    def close(self) -> None:
        """Drop an incomplete profile: a run that ends before its last step leaves none."""
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._running = None
            self._forget_allocations()

    def _start(self, step: int) -> None:
        self._first = step
        cuda = self._world.device.type == "cuda"
        if cuda and self._section.memory:
            torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._running = profile(activities=activities, record_shapes=True, profile_memory=self._section.memory)
        self._running.__enter__()

    def _write(self, step: int) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        found, self._running = self._running, None
        found.__exit__(None, None, None)
        place = self._folder / f"steps-{self._first}-{step}"
        try:
            self._export(found, place)
        except OSError as error:
            self._warn(f"the profile {place} was not written: {error}")
        self._forget_allocations()

    def _forget_allocations(self) -> None:
        if self._world.device.type == "cuda" and self._section.memory:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _export(self, found: Any, place: Path) -> None:
        self._folder.mkdir(exist_ok=True)
        found.export_chrome_trace(f"{place}.trace.json.gz")
        order = "self_cuda_time_total" if self._world.device.type == "cuda" else "self_cpu_time_total"
        averages = found.key_averages()
        text = averages.table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        if self._section.memory:
            order = order.replace("time_total", "memory_usage")
            text += "\n" + averages.table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
            if self._world.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(f"{place}.memory.pickle")
        Path(f"{place}.txt").write_text(Redactor.from_environment().text(text), encoding="utf-8")
