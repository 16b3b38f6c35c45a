"""The recipe of an optimiser: a file, a preset and a registry line; then it trains, is saved, resumed and planned.

The first test follows the recipe in a copy of the tree and runs that. The others let this process see the files of the
copy, for they compare the optimiser with torch's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kha_train.optim
from kha_train import build_decoder, open_stream
from kha_train.checkpoint.compare import compare
from kha_train.checkpoint.manifest import parse_manifest
from kha_train.checkpoint.reader import Checkpoint
from kha_train.config import compose as compose_module
from kha_train.config.compose import compose
from kha_train.config.schema import RunConfig
from kha_train.engine import deepspeed, plain
from kha_train.errors import ConfigError, ResumeError
from kha_train.estimate.counts import count_parameters
from kha_train.estimate.memory import plan_memory, recipes
from kha_train.estimate.plan import make_plan
from kha_train.optim import learning_rate
from kha_train.record import read_events, read_metrics
from kha_train.train.run import train
from kha_train.variants.registry import OPTIMIZERS, Variant

STEPS = 4
ADDED = (
    Path("configs/optim/heavy_ball.yaml"),
    Path("kha_train/variants/registry.py"),
    Path("kha_train/optim/heavy_ball.py"),
)
ENGINES = {"plain": (plain.Engine, 1), "zero1": (deepspeed.Engine, 1), "zero3": (deepspeed.Engine, 3)}


@pytest.fixture
def configure(
    follow: Callable[[str], Any], small: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., RunConfig]]:
    """`configure(*overrides)`: a small run with the optimiser that the recipe adds."""
    recipe = follow("an optimiser")
    monkeypatch.setattr(kha_train.optim, "__path__", [*kha_train.optim.__path__, str(recipe.tree / ADDED[2].parent)])
    monkeypatch.setattr(compose_module, "shipped", lambda directory: recipe.tree / directory)
    (line,) = (block.text for block in recipe.blocks if block.options.get("file") == str(ADDED[1]))
    for name, variant in eval(f"{{{line}}}", {"Variant": Variant}).items():
        monkeypatch.setitem(OPTIMIZERS, name, variant)
    common = ["optim=heavy_ball", "engine.device=cpu", "data.global_batch_size=4", "engine.micro_batch_size=2"]
    saves = ["checkpoint.every_steps=2", f"run.steps={STEPS}"]
    yield lambda *overrides: compose([*small, *common, *saves, *overrides])
    sys.modules.pop("kha_train.optim.heavy_ball", None)


def checkpoint(config: RunConfig, step: int) -> Checkpoint:
    path = Path(config.run.dir) / "checkpoints" / f"step-{step:08d}"
    return Checkpoint(path, parse_manifest((path / "manifest.json").read_bytes()))


def losses(config: RunConfig) -> list[float]:
    return [line["train/loss"] for line in read_metrics(Path(config.run.dir))]


def by_torch(config: RunConfig) -> list[float]:
    """The losses of a loop with torch's own SGD, its gradient clipped, decay by hand."""
    decoder, found = build_decoder(config), []
    parameters = list(decoder.parameters())
    sgd = torch.optim.SGD(parameters, lr=1.0, momentum=0.9)
    for step, batch in zip(range(1, STEPS + 1), open_stream(config), strict=False):
        output = decoder(batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.cu_seqlens_S, batch.max_seqlen)
        loss = output.loss_sum / batch.label_count
        sgd.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.optim.grad_clip)
        lr = sgd.param_groups[0]["lr"] = learning_rate(config.optim, step, STEPS)
        with torch.no_grad():
            for parameter in parameters:
                if parameter.dim() > 1:
                    parameter.mul_(1 - lr * 0.1)
        sgd.step()
        decoder.finish_step(output.load_LE)
        found.append(loss.item())
    return found


@pytest.mark.slow
def test_three_files_make_an_optimiser_that_a_run_trains_with(
    follow: Callable[[str], Any], small: list[str], tmp_path: Path
) -> None:
    recipe = follow("an optimiser")
    assert recipe.touched() == sorted(map(str, ADDED))
    assert "velocity" not in recipe.type_commands()
    run = tmp_path / "run"
    settings = [*small, "engine.device=cpu", "engine.micro_batch_size=2", "run.steps=3", f"run.dir={run}"]
    recipe.run("kha", "train", "optim=heavy_ball", *settings)
    (manifest,) = (run / "checkpoints").glob("*/manifest.json")
    saved = parse_manifest(manifest.read_bytes()).contents.parameters.values()
    assert {kind for entry in saved for kind in entry.pieces} == {"master", "velocity"}
    assert len(read_metrics(run)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_it_trains_as_torchs_own_and_resumes_bit_for_bit(
    name: str, configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    engine_class, stage = ENGINES[name]
    whole, stopped = (
        configure(f"run.dir={tmp_path / run}", f"engine.zero_stage={stage}") for run in ("whole", "stopped")
    )
    for config in (whole, stopped):
        train(config, engine_class=engine_class)
    assert losses(whole) == pytest.approx(by_torch(whole), abs=2e-6)
    assert losses(whole)[0] - losses(whole)[-1] > 0.01, "it learns something: the test would show little"

    saved = checkpoint(whole, STEPS)
    assert saved.kinds == ("master", "velocity")
    assert {kind for entry in saved.manifest.contents.parameters.values() for kind in entry.pieces} == {*saved.kinds}
    run_dir = Path(stopped.run.dir)
    (run_dir / "DONE").unlink()
    last = checkpoint(stopped, STEPS).path
    last.rename(last.with_name(f"{last.name}.undone"))
    train(stopped, engine_class=engine_class)
    assert losses(stopped) == losses(whole)
    assert not compare(saved, checkpoint(stopped, STEPS)).tensors


@pytest.mark.slow
def test_its_one_state_is_planned_and_stored(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = configure(f"run.dir={tmp_path / 'run'}", "engine.zero_stage=1")
    total = count_parameters(config).total
    for dtype, size in (("fp32", 8), ("bf16", 6)):
        planned = plan_memory(configure(f"engine.moment_dtype={dtype}", "cluster.devices=2"))
        assert planned.terms["optimizer"] == size * total // 2
    assert make_plan(config).checkpoint["bytes"] == 8 * total
    assert [recipe.bytes_per_parameter for recipe in recipes(config.optim)] == [16, 14, 12, 10, 6, 4]
    train(config)
    files = checkpoint(config, STEPS).path.glob("*.safetensors")
    assert 8 * total < sum(path.stat().st_size for path in files) < 8.5 * total


@pytest.mark.slow
def test_states_in_bf16_are_rounded_and_train_nearly_alike(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    wide, narrow = (
        configure(f"run.dir={tmp_path / dtype}", f"engine.moment_dtype={dtype}") for dtype in ("fp32", "bf16")
    )
    for config in (wide, narrow):
        train(config, engine_class=plain.Engine)
    assert losses(wide) != losses(narrow) and losses(wide) == pytest.approx(losses(narrow), rel=1e-2)
    saved = checkpoint(narrow, STEPS)
    velocity = saved.read("blocks.0.attention.query.weight", "velocity")
    assert velocity.any() and torch.equal(velocity, velocity.bfloat16().float())


@pytest.mark.slow
def test_no_run_goes_on_with_the_states_of_another_optimiser_but_a_new_one_takes_its_weights(
    configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run = f"run.dir={tmp_path / 'adamw'}"
    adamw = configure("optim=adamw", run, "run.steps=2")
    train(adamw, engine_class=plain.Engine)
    with pytest.raises(ResumeError, match=r"optim\.name +'adamw' -> 'heavy_ball'"):
        train(configure(run), engine_class=plain.Engine)
    with pytest.raises(ResumeError, match="states of another optimiser") as caught:
        train(configure(run, "resume.allow_changes=[optim,run.steps]"), engine_class=plain.Engine)
    assert caught.value.field == "optim.name" and caught.value.exit_code == 3
    fresh = configure(f"run.dir={tmp_path / 'fresh'}", f"run.init_from={checkpoint(adamw, 2).path}")
    train(fresh, engine_class=plain.Engine)
    inherited = [event for event in read_events(Path(fresh.run.dir)) if event["kind"] == "weights_inherited"]
    assert inherited[0]["new"] == inherited[0]["left_out"] == []


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["+optim.betas=[0.9,0.95]"], "optim.betas"),
        (["optim.name=heavy_bal"], "optim.name"),
        (["optim.friction=much"], "optim.friction"),
    ],
)
def test_its_options_are_judged_as_any_others(
    overrides: list[str], field: str, configure: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(*overrides)
    assert caught.value.field == field
