"""Imports torch and DeepSpeed once, then starts ranks by fork: of a training run, with faults where a test wants them,
or of a script.

Reads one JSON request a line: {"cwd", "overrides", "ranks", "faults", "log", "patience", "environment"}, or for a
script {"cwd", "script", "arguments", "ranks", "logs"}: the words of `sys.argv` and a log for each rank. Answers one
line: {"codes", "seconds", "processor"} of the ranks, and the "number" of the request. A signal is a negative code. None
stands for a rank that had to be killed because it was still there `patience` seconds after another had failed. All
ranks of a request share one process group.

A fault is {"at", "do"} and conditions; it happens once in a process:

    at  step:N              before step N is trained
        save:N:STAGE        at a stage of the writer (writer.STAGES, before_prune, mid_prune) while step N is saved
        gradient:N          in the gradient of step N
        exchange:N          while copies of tokens travel to their experts, in step N
        batch:N             while the batch of step N is read
        snapshot:N          while the state is copied to host memory for the save of step N
        restore             while this rank's share of a checkpoint is read, its own or another run's
        event:KIND          while an event of this kind is recorded
        marker:NAME         while this marker is set at the end
        rewind              amid a rewind: the newer checkpoints are gone, the record is not cut yet
        wandb:N             while something of step N is sent to W&B
    do  kill (this rank), kill_all (every rank), stop (SIGSTOP), sleep, term (SIGTERM), usr2, nan, enospc, erofs, eio,
        partial (a half-written directory under the final name), clock (set back by a day), data (a DataError),
        file_limit (no file above 200 kB), noise (the batch is noise), memory (the host has none left), oom (the device
        has none left), host_oom (the host, in torch's words), flip (a bit of this rank's copy of a weight), flip_bias
        (of a selection bias), defect
    rank    only there (default: everywhere)
"""

from __future__ import annotations

import atexit
import errno
import functools
import gc
import json
import math
import os
import resource
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - drags in the compiler, at every start but for this
import numpy as np
import torch

from kha_train import compose
from kha_train.checkpoint.background import BackgroundWriter
from kha_train.checkpoint.host_buffers import HostBuffers
from kha_train.checkpoint.reader import Checkpoint
from kha_train.engine.deepspeed import Engine, _import_deepspeed
from kha_train.errors import DataError, KhaError
from kha_train.model.moe import parallel
from kha_train.record import Record
from kha_train.telemetry.wandb import WandbMirror
from kha_train.train import run, saving, session

torch.set_num_threads(1)
_import_deepspeed(torch.device("cpu"))
cached_compose = functools.cache(lambda overrides: compose(list(overrides)))


class Faults:
    """The faults of one process, and the seams of the trainer they enter by."""

    def __init__(self, wanted: list[dict[str, Any]], rank: int) -> None:
        self.waiting = [fault for fault in wanted if fault.get("rank", rank) == rank]
        self.step = self.saving = 0
        self.saver: Any = None

    def install(self) -> None:
        """Patch the named seams."""
        train_step, next_batch = run.train_step, run.next_batch
        accumulate, begin = Engine.accumulate, BackgroundWriter.begin

        def at_step(*arguments: Any, **options: Any) -> Any:
            self.happen(f"step:{self.step}")
            return train_step(*arguments, **options)

        def at_batch(stream: Any, *others: Any) -> Any:
            self.step = self.progress() + 1
            happened = self.happen(f"batch:{self.step}")
            if "data" in happened:
                damaged = {"__next__": lambda _: _raise(DataError("damaged", field="shard"))}
                return next_batch(type("Failing", (), damaged | {"samples_seen": stream.samples_seen})(), *others)
            batch, labels = next_batch(stream, *others)
            if "noise" in happened:
                noise = np.random.default_rng([self.step, int(os.environ["RANK"])])
                batch.rows_BW[:] = noise.integers(0, 256, batch.rows_BW.shape)
            return batch, labels

        def at_gradient(engine: Engine, batch: Any, loss_scale: float, *scales: float, last: bool) -> Any:
            happened = self.happen(f"gradient:{self.step}")
            weight = next(engine.decoder.parameters())
            for name, tensor in (("flip", getattr(weight, "ds_tensor", weight)), ("flip_bias", _first_bias(engine))):
                if name in happened:
                    tensor.data.view(torch.int32).view(-1)[3] ^= 1 << 12
            scale = math.nan if "nan" in happened else loss_scale
            return accumulate(engine, batch, scale, *scales, last=last)

        def at_save(writer: BackgroundWriter, step: int, *arguments: Any) -> None:
            self.saving = step
            begin(writer, step, *arguments)

        def stage(name: str) -> None:
            self.happen(f"save:{self.saving}:{name}")

        run.train_step, run.next_batch, Engine.accumulate, BackgroundWriter.begin = (
            at_step,
            at_batch,
            at_gradient,
            at_save,
        )
        self._install_more()
        saving.BackgroundWriter = functools.partial(BackgroundWriter, stage=stage)
        saving.prune = functools.partial(saving.prune, stage=stage)
        made = session.Session.__init__

        def remember(this: session.Session, *parts: Any) -> None:
            made(this, *parts)
            self.progress = lambda: this.progress.step

        session.Session.__init__ = remember

    def _install_more(self) -> None:
        """The seams that few faults enter by."""

        def before(owner: Any, name: str, where: Callable[..., str]) -> None:
            original = getattr(owner, name)

            def seam(*arguments: Any, **options: Any) -> Any:
                self.happen(where(*arguments))
                return original(*arguments, **options)

            setattr(owner, name, seam)

        before(parallel, "exchanged", lambda *_: f"exchange:{self.step}")
        before(HostBuffers, "restart", lambda *_: f"snapshot:{self.progress()}")
        before(Checkpoint, "read", lambda *_: "restore")
        before(run, "set_marker", lambda run_dir, marker, *_: f"marker:{marker.value}")
        before(Record, "event", lambda record, kind, *_: f"event:{kind}")
        before(Record, "rewind_to", lambda record, step, reason: "rewind" if reason.startswith("rewind") else "")
        attempt = WandbMirror._attempt

        def at_wandb(mirror: WandbMirror, act: Callable[[Any], Any]) -> None:
            attempt(mirror, lambda sent: (self.happen(f"wandb:{self.step}"), act(sent)))

        WandbMirror._attempt = at_wandb

    def happen(self, where: str) -> list[str]:
        """Let what waits for `where` happen; what did."""
        due = [fault for fault in self.waiting if fault["at"] == where]
        self.waiting = [fault for fault in self.waiting if fault not in due]
        for fault in due:
            print(f"fault: {fault}", flush=True)
            getattr(self, fault["do"])()
        return [fault["do"] for fault in due]

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_all(self) -> None:
        os.killpg(0, signal.SIGKILL)
        time.sleep(60)

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def sleep(self) -> None:
        time.sleep(300)

    def term(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def usr2(self) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)

    def nan(self) -> None:
        """The caller does it."""

    def data(self) -> None:
        """The caller does it."""

    def enospc(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def erofs(self) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def eio(self) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def memory(self) -> None:
        raise MemoryError

    def oom(self) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    def host_oom(self) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 20 bytes")

    def defect(self) -> None:
        raise ZeroDivisionError("a defect")

    def noise(self) -> None:
        """The caller does it."""

    def flip(self) -> None:
        """The caller does it."""

    def flip_bias(self) -> None:
        """The caller does it."""

    def partial(self) -> None:
        directory = Path(f"runs/one/checkpoints/step-{self.saving:08d}")
        directory.mkdir()
        (directory / "model-00000.safetensors").write_bytes(b"half")

    def clock(self) -> None:
        now = time.time
        time.time = lambda: now() - 86400

    def file_limit(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def _first_bias(engine: Engine) -> torch.Tensor:
    return next(buffer for name, buffer in engine.buffers().items() if "bias" in name)


def _raise(error: Exception) -> None:
    raise error


def _child(request: dict[str, Any], rank: int, port: int) -> None:
    path = request["logs"][rank] if "logs" in request else request["log"]
    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request["cwd"])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **request.get("environment", {})}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["ranks"])}
    if "script" in request:
        sys.argv = [request["script"], *request["arguments"][rank]]
        sys.path.insert(0, str(Path(request["script"]).parent))
        runpy.run_path(request["script"], run_name="__main__")
        sys.exit()
    faults = Faults(request.get("faults", []), rank)
    faults.install()
    for module in request.get("without", ()):
        sys.modules[module] = None
    try:
        run.train(cached_compose(tuple(request["overrides"])))
    except KhaError as error:
        print(f"rank {rank}: {error.line()}", flush=True)
        sys.exit(error.exit_code)
    sys.exit()


def _live(request: dict[str, Any], rank: int, port: int) -> None:
    """A child from its first to its last breath: it ends as an interpreter does, but for taking torch apart object by
    object. That copies all pages that it shares with the server, and takes as long as a short run."""
    code = 1
    try:
        _child(request, rank, port)
    except SystemExit as ended:
        code = ended.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001 - printed as an interpreter would
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    started, computed = time.monotonic(), _computed()
    if "overrides" in request:
        cached_compose(tuple(request["overrides"]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids: list[int] = []
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            _live(request, rank, port)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    codes: dict[int, int | None] = {}
    deadline = started + 300
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in set(pids) - codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + request.get("patience", 30))
        time.sleep(0.005)
    for pid in set(pids) - codes.keys():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        codes[pid] = None
    seconds = {"seconds": time.monotonic() - started, "processor": _computed() - computed}
    return {"codes": [codes[pid] for pid in pids], **seconds}


def _computed() -> float:
    """Processor seconds of the children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    # Children neither walk through what is imported here when they collect garbage, nor copy its pages.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"number": request["number"], **_serve(request)}
        sys.__stdout__.write(json.dumps(answer) + "\n")
        sys.__stdout__.flush()
