"""This process among the ranks, and how all ranks decide something together.

Understands torchrun's variables and those of `srun` (one task per rank). Every method is collective: all ranks call it
in the same order. No rank raises alone while others wait.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

# Its functions keep the world group from the time of the import as a default, and with it the group's threads forever:
# import it before a group exists.
import torch.distributed.nn.functional

from kha_train import errors
from kha_train.collectives import all_to_all
from kha_train.errors import ConfigError, DivergedError, KhaError, MachineError, RankError, Settings
from kha_train.literal import say

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
PATIENCE_SECONDS = 5.0
"""Ranks wait this many seconds for each other before they report it."""
_PR_SET_PDEATHSIG = 1
"""prctl(2)."""
_MISTAKES = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_KINDS = {kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type)}


def _nobody_listens() -> None:
    """The default `alive`, for a process without a watchdog."""


def ranks_of_node(environ: Mapping[str, str] = os.environ) -> int:
    """How many ranks share a node (the maximum where nodes differ), according to torchrun or srun; 1 without either."""
    told = environ.get("LOCAL_WORLD_SIZE", "")
    if told.isdigit() and int(told):
        return int(told)
    # As in 8(x2),4: eight on two nodes, four on the third.
    tasks = re.findall(r"(\d+)(?:\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return max(map(int, tasks), default=1)


@dataclass(frozen=True)
class World:
    """This process among `size` processes. `device` is where tensors are (cpu for gloo, cuda for nccl). Integers and
    texts use `host_group` (gloo), if there is one, so that an agreement never waits for the device.

    `life` is a name shared only by the processes of this start; it marks what belongs to this start. Slow work calls
    `alive` while it makes progress, so that a watchdog does not report a hang.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    life: str = ""
    alive: Callable[[], None] = _nobody_listens
    host_group: dist.ProcessGroup | None = None

    @staticmethod
    def single() -> World:
        """One process, no process group."""
        return World()

    @staticmethod
    def from_environment(environ: Mapping[str, str] = os.environ) -> World:
        """Rank and size as torchrun or srun set them; a single process if neither did, or in a shell of `srun --pty`.

        Raises ConfigError when only some of torchrun's variables are set.
        """
        present = [name for name in TORCHRUN if name in environ]
        if present and len(present) < len(TORCHRUN):
            missing = ", ".join(name for name in TORCHRUN if name not in environ)
            problem = f"{', '.join(present)} set but not {missing}"
            raise ConfigError(
                problem,
                field="environment",
                fix="start with kha train --ranks N or torchrun, or unset them",
                code="E19",
            )
        names = TORCHRUN if present else SRUN
        if not present and is_interactive_step(environ):
            return World()
        if not all(name in environ for name in names) or ("SLURM_STEP_ID" not in environ and not present):
            return World()
        rank, size, local_rank = (int(environ[name]) for name in names)
        return World(rank, size, local_rank)

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes the record."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.max_ints(0)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce `tensor` in place by summation and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce `tensor` in place by its element-wise maximum and return it."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def exchange(self, values: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """All-to-all: `values` (1-D) is what this rank sends to each rank, one after another, `sent` numbers each. The
        result is what it received from each, `received` numbers.
        """
        result = values.new_empty(sum(received))
        all_to_all(result, values, received, sent)
        return result

    def max_ints(self, *values: int) -> tuple[int, ...]:
        """The element-wise maximum over ranks, the same on every rank."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def sum_ints(self, *values: int) -> tuple[int, ...]:
        """The element-wise sum over ranks, the same on every rank."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: tuple[int, ...], how: dist.ReduceOp.RedOpType) -> tuple[int, ...]:
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64, device=self._talking_device)
        dist.all_reduce(tensor, op=how, group=self.host_group)
        return tuple(tensor.tolist())

    @property
    def _talking_device(self) -> torch.device:
        """Where agreed values are stored: with a host group, a failed device is not even used."""
        return torch.device("cpu") if self.host_group else self.device

    def broadcast_text(self, text: str, source: int = 0) -> str:
        """The `text` of rank `source`, on every rank. Transfers bytes, never pickles."""
        if self.size == 1:
            return text
        payload = text.encode()
        (length,) = self.max_ints(len(payload) if self.rank == source else 0)
        if not length:
            return ""
        buffer = torch.zeros(length, dtype=torch.uint8, device=self._talking_device)
        if self.rank == source:
            buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        dist.broadcast(buffer, source, group=self.host_group)
        return bytes(buffer.tolist()).decode()

    def raise_together(self, error: BaseException | None) -> None:
        """Return on all ranks when none has an error, else raise on all.

        Every rank raises the kind of error of the first failing rank, with that rank's message. For a bug (anything but
        a KhaError, an OSError, a lack of memory) the failing rank raises its own exception, the others a RankError.
        """
        first_failing = self.size - self.max_ints(0 if error is None else self.size - self.rank)[0]
        if first_failing == self.size:
            return
        found = as_error(error, "go on") if error is not None else None
        kind = type(found).__name__ if isinstance(found, KhaError) else RankError.__name__
        words = str(found) if isinstance(found, KhaError) else f"{type(found).__name__}: {found}"
        code = found.code if isinstance(found, KhaError) else ""
        head, _, words = self.broadcast_text(f"{kind} {code}\n{words}", first_failing).partition("\n")
        kind, _, code = head.partition(" ")
        agreed: BaseException | None = (
            found if self.rank == first_failing else _KINDS[kind](f"rank {first_failing}: {words}", code=code)
        )
        assert agreed is not None
        vars(agreed)["agreed"] = True  # the class of a bug has no such field
        raise agreed

    @contextmanager
    def agreed(
        self, doing: str = "go on", kind: type[KhaError] = MachineError, fix: str | None = None
    ) -> Iterator[None]:
        """Around local work without collectives: all ranks leave it together, either successfully or with the same
        error.

        An OSError or a lack of memory in it becomes `kind`: "cannot `doing`: ...; fix: `fix`".
        """
        with Caught() as caught:
            yield
        self.raise_together(as_error(caught.error, doing, kind, fix) if caught.error else None)


def as_error(
    error: BaseException, doing: str, kind: type[KhaError] = MachineError, fix: str | None = None
) -> BaseException:
    """A machine's failure as an error that says "cannot `doing`"; anything else unchanged.

    A missing or forbidden file is not a failing machine, so it becomes a plain KhaError, never a MachineError.
    """
    if not isinstance(error, OSError | MemoryError):
        return error
    kind = KhaError if kind is MachineError and isinstance(error, _MISTAKES) else kind
    told = kind(f"cannot {doing}: {error}" if str(error) else f"cannot {doing}: {type(error).__name__}", fix=fix)
    told.__cause__ = error
    return told


def is_known_to_all(error: BaseException) -> bool:
    """Whether all ranks raise `error` together. Divergence follows from figures that all ranks have."""
    return isinstance(error, DivergedError) or getattr(error, "agreed", False)


class Caught:
    """Keeps any exception of the block in `error` (bugs too: other ranks must not wait for one that is gone). The
    caller must check `error`. KeyboardInterrupt and SystemExit are also passed on.
    """

    error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return isinstance(error, Exception)


def is_interactive_step(environ: Mapping[str, str], processes: Path = Path("/proc")) -> bool:
    """Whether this command was typed in a shell opened by `srun --pty`: its step has tasks, but they are not ranks.

    Steps started from such a shell inherit its variables, but their tasks have no terminal.
    """
    if "SLURM_PTY_PORT" not in environ and "SLURM_PTY_WIN_COL" not in environ:
        return False
    if "SLURM_TASK_PID" not in environ:
        return True
    task = processes / environ["SLURM_TASK_PID"] / "stat"
    # In a container the task may be invisible; this process has the same terminal.
    stat = task if task.exists() else processes / "self" / "stat"
    # proc(5): the name may hold spaces and parentheses; the terminal is the fifth field after it, 0 for none.
    return stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[4] != "0"


@contextmanager
def _said_when_it_takes_long(world: World) -> Iterator[None]:
    """Reports on standard error what this rank waits for, if ranks do not meet within `PATIENCE_SECONDS`."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    text = f"rank {world.rank} waits at {where} until all {world.size} ranks are there"
    if "SLURM_PROCID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        text += (
            " (SLURM_NTASKS); in a shell of a job type `srun kha train ...`, or `unset SLURM_PROCID` for one process"
        )
    timer = threading.Timer(PATIENCE_SECONDS, say, (text,), {"err": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def srun_meeting_point(environ: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT for ranks that srun started one by one: the first node of the step, and a port
    derived from the job, its restarts and the step. Empty in all other cases.
    """
    nodes = environ.get("SLURM_STEP_NODELIST")
    if not nodes or any(name in environ for name in TORCHRUN):
        return {}
    # In r[01-04,7]n[2-3],x1 the first node is r01n2.
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert first is not None, nodes
    numbers = [int(environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")]
    port = 20_000 + (numbers[0] + numbers[1] * 7919 + numbers[2] * 101) % 10_000
    return {"MASTER_ADDR": re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()), "MASTER_PORT": str(port)}


def start(device: str, timeout_seconds: float) -> World:
    """Join the process group this process was started for (a group of one when it was started alone).

    `device` is `auto`, `cpu` (gloo) or `cuda` (nccl). Raises ConfigError when CUDA is configured but absent, when there
    are more ranks than GPUs on this host, when the address where ranks connect is unknown, or when the environment
    would let pickles run code. From here on no library in this process can do so. Close with `stop()`.

    On Linux, a rank gets SIGUSR1 when its launcher dies: a request to save and end that interrupts no save.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device here", field="engine.device", value=device, fix=Settings("engine.device=cpu"))
    _refuse_pickles()
    world = World.from_environment()
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda and world.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {world.local_rank} has no GPU of its own; there are {torch.cuda.device_count()}",
            field="engine.device",
            value=device,
            fix="start one rank per GPU, with all GPUs of the host visible (srun: no --gpus-per-task)",
        )
    for name, value in srun_meeting_point(os.environ).items():
        os.environ.setdefault(name, value)
    if world.size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ConfigError(
            f"{world.size} ranks, but no MASTER_ADDR and MASTER_PORT to connect to",
            field="environment",
            fix="start with kha train --ranks N or torchrun, or export both (the first node's name and a free port) "
            "before srun",
        )
    where = torch.device("cuda", world.local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
        _let_segments_grow(os.environ)
    # DeepSpeed reads torchrun's variables itself, even if srun or nobody set them.
    os.environ.update(zip(TORCHRUN, map(str, (world.rank, world.size, world.local_rank)), strict=True))
    timeout = timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        store: dict[str, Any] = {"init_method": "env://"}
        if world.size == 1:
            store = {"store": dist.HashStore()}  # type: ignore[attr-defined]  # torch exports it without saying so
        backend = "nccl" if use_cuda else "gloo"
        # One rank per node is enough to report it.
        with _said_when_it_takes_long(world) if world.size > 1 and not world.local_rank else nullcontext():
            dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout, **store)
    host_group = dist.new_group(backend="gloo", timeout=timeout) if use_cuda and world.size > 1 else None
    world = replace(world, device=where, host_group=host_group)
    return replace(world, life=world.broadcast_text(secrets.token_hex(6)))


def _let_segments_grow(environ: Mapping[str, str]) -> None:
    """Let segments of torch's CUDA allocator grow, unless the environment configures it. Otherwise blocks of many sizes
    leave gaps: up to 10 GiB of a device on which a model just fits.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def _refuse_pickles() -> None:
    """From here on, no library in this process can load a pickle that runs code. Raises ConfigError."""
    twin = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    if os.environ.get(twin):
        raise ConfigError("would let a checkpoint run code", field=twin, value=os.environ[twin], fix=f"unset {twin}")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def stop(error: BaseException | None = None) -> None:
    """Leave the process group, so that no agent waits for this process.

    NCCL waits for the other ranks when a group is destroyed. After an `error` that they do not know of, it would wait
    in vain and hide the error; so the group is aborted.
    """
    if not dist.is_initialized():
        return
    is_alone = error is not None and not is_known_to_all(error) and dist.get_world_size() > 1
    if is_alone and dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()
