"""The host waits for the device once per step: where the gate decides. On a CPU the calls that would wait are counted;
on CUDA the driver itself refuses them inside a micro-batch.
"""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kha_train import distributed
from kha_train.config.compose import compose
from kha_train.config.schema import EvaluationSection
from kha_train.data.stream import open_stream
from kha_train.engine.deepspeed import Engine
from kha_train.evaluate.opening import open_tasks
from kha_train.evaluate.scoring import evaluate
from kha_train.train.step import next_batch, routing_metrics, train_step
from kha_train.variants.task import ContextOptions

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal", "is_nonzero"}
OURS = f"{Path(__file__).resolve().parents[2]}/kha_train/"


class Waits(TorchDispatchMode):
    """Counts calls whose answer the host needs, and copies of a tensor to the host, by the package that asked."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS:
            self.count[self._asked()] += 1
        return func(*args, **(kwargs or {}))

    def _asked(self) -> str:
        for frame in reversed(traceback.extract_stack()):
            if frame.filename.startswith(OURS):
                return f"{frame.filename.removeprefix(OURS)}:{frame.name}"
            if "/deepspeed/" in frame.filename:
                return "deepspeed"
        return "elsewhere"


@pytest.fixture
def engine(small: list[str], padded: list[str], request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine of two micro-batches a step; the parameter names the attention and the ZeRO stage."""
    attention, stage, *more = request.param
    settings = ["data.global_batch_size=4", "engine.micro_batch_size=2", f"engine.zero_stage={stage}", *more]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards = padded if "data.packing=best_fit" in more else small
    config = compose([*shards, f"attention={attention}", f"engine.device={device}", *settings])
    world = distributed.start(device, 60)
    engine = Engine(config, world)
    yield engine
    engine.close()
    Engine.leave_world()


CASES = [
    ("gqa", 1),
    ("kha_mlp", 2, "engine.activation_checkpointing=full", "moe.z_loss_weight=0.001"),
    ("kha_linear", 1, "attention.positions=alibi", "moe.routing_warmup_steps=5", "moe.auxiliary_loss.weight=0.01"),
    ("gqa", 3, "data.packing=best_fit", "moe.z_loss_weight=0.001", "moe.auxiliary_loss.weight=0.01"),
]


@pytest.mark.parametrize("engine", CASES, ids=[str(case[:2]) for case in CASES], indirect=True)
def test_a_micro_batch_asks_the_device_nothing(engine: Engine) -> None:
    batch, labels = next_batch(open_stream(engine.config), engine.world)
    train_step(engine, batch, labels, 1e-4)
    first, last = batch.micro_batches(2)
    with Waits() as waits:
        engine.accumulate(first, 1.0, 1.0, last=False)
    assert not {place: n for place, n in waits.count.items() if place != "deepspeed"}
    engine.accumulate(last, 1.0, 1.0, last=True)
    engine.discard()


@pytest.mark.parametrize("engine", CASES, ids=[str(case[:2]) for case in CASES], indirect=True)
def test_a_step_asks_the_device_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One transfer of a vector, by the gate; the record's figures of the routing are worked out from it. A step with
    statistics of layers asks once more, after the update."""
    asked: list[str] = []
    for name in ("cpu", "tolist", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, _noted(asked, name, original))
    stream = open_stream(engine.config)
    batch, labels = next_batch(stream, engine.world)
    train_step(engine, batch, labels, 1e-4)
    batch, labels = next_batch(stream, engine.world)
    asked.clear()
    with Waits() as waits:
        result = train_step(engine, batch, labels, 1e-4)
    # The vector crosses by `cpu`, and five numbers are then read off it.
    assert [one for one in asked if one != "deepspeed"] == [
        "cpu train/step.py:train_step",
        "tolist train/step.py:train_step",
    ]
    assert not {place: n for place, n in waits.count.items() if place != "deepspeed"}
    host = (result.load_LE, result.bias_LE)
    assert all(tensor.device.type == "cpu" for tensor in host)
    assert result.values == {}

    batch, labels = next_batch(stream, engine.world)
    asked.clear()
    with Waits() as waits:
        result = train_step(engine, batch, labels, 1e-4, observed=True)
    assert len(result.values) == 4, "a norm of gradient and update, each with its list"
    crossed = [one for one in asked if one.startswith("cpu ")]
    assert crossed == ["cpu train/step.py:train_step", "cpu train/step.py:_apply"]
    assert not {place: n for place, n in waits.count.items() if place != "deepspeed"}


@pytest.mark.parametrize("engine", CASES[:1], ids=["gqa"], indirect=True)
def test_an_evaluation_reads_no_loss_before_its_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels and bytes are the host's own; losses are the device's, and those of all tasks are read at once."""
    read: list[torch.dtype] = []

    class Numbers(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "_local_scalar_dense":
                read.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    config = replace(engine.config, evaluation=EvaluationSection(tasks=(ContextOptions(name="context"),)))
    tasks, lists = open_tasks(config), []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", _noted(lists, "tolist", original))
    with Numbers():
        found = evaluate(engine, tasks)
    assert found["validation/loss"] > 0 and found["evaluation/context/loss_from_1"] > 0
    assert not [dtype for dtype in read if dtype.is_floating_point]
    assert [place for place in lists if "scoring.py" in place] == ["tolist evaluate/scoring.py:evaluate"]


@pytest.mark.gpu
@pytest.mark.parametrize("engine", CASES[:2], ids=[str(case[:2]) for case in CASES[:2]], indirect=True)
def test_on_cuda_nothing_waits_inside_a_micro_batch(engine: Engine) -> None:
    batch, labels = next_batch(open_stream(engine.config), engine.world)
    for _ in range(3):
        train_step(engine, batch, labels, 1e-4)
    first, last = batch.micro_batches(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.accumulate(first, 1.0, 1.0, last=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.accumulate(last, 1.0, 1.0, last=True)
    engine.discard()


def test_the_record_of_a_step_reads_only_what_has_crossed() -> None:
    """Metrics of the router are made of the loads and biases of the gate's transfer, which a step's result brings."""
    assert "selection_bias_LE" not in routing_metrics.__code__.co_names
    assert {"load_LE", "bias_LE"} <= set(routing_metrics.__code__.co_names)


@pytest.mark.slow
def test_a_start_on_a_cpu_imports_no_compiler(small: list[str], clean_environment: dict[str, str]) -> None:
    """torch's compiler takes seconds to import, and nothing here is compiled."""
    program = (
        "import sys\n"
        "from kha_train import distributed\n"
        "from kha_train.config.compose import compose\n"
        "from kha_train.engine.deepspeed import Engine\n"
        "config = compose(sys.argv[1:])\n"
        "from kha_train.data.stream import open_stream\n"
        "from kha_train.train.step import next_batch, train_step\n"
        "world = distributed.start('cpu', 60)\n"
        "engine = Engine(config, world)\n"
        "train_step(engine, *next_batch(open_stream(config), world), 1e-4)\n"
        "print('torch._dynamo' in sys.modules, 'torch._inductor' in sys.modules)"
    )
    command = [sys.executable, "-c", program, *small, "engine.device=cpu"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=clean_environment)
    assert answer.stdout.split()[-2:] == ["False", "False"]


def _noted(asked: list[str], name: str, original: Any) -> Any:
    """`original`, which first notes who called it."""

    def noted(tensor: torch.Tensor, *arguments: Any) -> Any:
        frames = [frame.filename for frame in traceback.extract_stack()[-4:-1]]
        caller = traceback.extract_stack(limit=2)[0]
        ours = caller.filename.startswith(OURS)
        theirs = any("/deepspeed/" in frame or "/torch/" in frame for frame in frames)
        place = (
            f"{name} {caller.filename.removeprefix(OURS)}:{caller.name}" if ours else "deepspeed" if theirs else name
        )
        asked.append(place)
        return original(tensor, *arguments)

    return noted
