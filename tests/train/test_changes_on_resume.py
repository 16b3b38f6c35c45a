"""Settings that a resumed run may change freely: every other setting is refused, and these change no result.

`NOTHING` and `ROUNDING_ONLY` give each free setting another value, and a resumed run tries them; `ELSEWHERE` names the
test that proves what cannot be tried here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kha_train.config.build import build, flatten, to_plain
from kha_train.config.compose import compose, shipped
from kha_train.config.constants import BOUND, FREE_TO_CHANGE, ROUNDING, WITHOUT_EFFECT, may_differ
from kha_train.config.schema import RunConfig
from kha_train.data.stream import open_stream
from kha_train.errors import ConfigError, ResumeError
from kha_train.record import Marker, read_metrics, read_run, set_marker, timing_keys
from kha_train.train.progress import Progress, TrainerState
from kha_train.train.resume import differences
from kha_train.train.run import train

PRESETS = sorted(path.stem for path in (shipped("configs") / "attention").glob("*.yaml"))
STEPS = 5
NOTHING = {
    "run.name": "another",
    "run.init_from": "nowhere",
    "run.max_minutes": 1000.0,
    "resume.allow_changes": "[optim.betas]",
    "resume.strict": "true",
    "attention.name": "another",
    "model.name": "another",
    "data.name": "another",
    "data.train": "{copy}/train",
    "data.validation": "{copy}/validation",
    "data.reader": "memory_map",
    "data.prefetch": 2,
    "data.check_crc": "false",
    "data.cache_dir": "{copy}/cache",
    "data.cache_gib": 1.0,
    "engine.collective_timeout_seconds": 900.0,
    "engine.hang_timeout_seconds": 300.0,
    "engine.audit_every": 1,
    "checkpoint.every_steps": 2,
    "checkpoint.every_minutes": 1e-9,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every_steps": 3,
    "checkpoint.background": "false",
    "checkpoint.max_failures": 1,
    "checkpoint.ring_steps": 1,
    "profile.first_step": 3,
    "profile.last_step": 4,
    "profile.memory": "true",
    "validation.every_steps": 1,
    "validation.rows": 3,
    "validation.sets": "[{name: code, path: {copy}/train}]",
    "evaluation.tasks": "[{name: context, every_steps: 1}]",
    "stability.probe_every": 1,
    "telemetry.console": "lines",
    "telemetry.peak_tflops": 3.0,
    "telemetry.layer_statistics_every": 1,
    "telemetry.wandb.project": "another",
    "telemetry.wandb.entity": "another",
    "telemetry.wandb.group": "another",
    "telemetry.wandb.tags": "[another]",
    "cluster": "cpu",
}
ROUNDING_ONLY = {
    "attention.backend": "eager",
    "attention.interaction.impl": "folded",
    "model.loss_chunk_tokens": 7,
    "moe.backend": "loop",
    "engine.zero_stage": 2,
    "engine.micro_batch_size": 2,
    "engine.activation_checkpointing": "full",
    "engine.reduce_bucket_elements": 1000,
}
ELSEWHERE = {
    "engine.name": "train/test_plain_engine.py",
    "run.dir": "train/test_changes_on_resume.py",
    "run.branch_from": "train/test_branch.py",
    "telemetry.wandb.mode": "telemetry/test_wandb.py",
    "telemetry.sinks": "telemetry/test_tensorboard.py",
    "engine.device": "gpu/test_attention_backends.py",
    "engine.kernels": "model/kernels/test_experts.py",
    "engine.compile": "engine/test_compile.py",
    "engine.context_parallel": "faults/test_elastic.py",
    "engine.hpz_partition_size": "engine/test_hybrid_partition.py",
    "engine.expert_parallel": "faults/test_elastic.py",
}
COUNTED_BY_MICRO_BATCH = ("moe.auxiliary_loss.weight=10", "moe.auxiliary_loss.scope=micro_batch")


def _leaves(*overrides: str) -> dict[str, Any]:
    return flatten(to_plain(compose(overrides)))


def _changed(config: RunConfig, key: str) -> RunConfig:
    """`config` with another value, of the right type, at `key`; whether it makes sense is not asked here."""
    *path, last = key.split(".")
    plain = to_plain(config)
    section = plain
    for name in path:
        section = section[name]
    now = section[last]
    candidates: list[Any] = [not now] if isinstance(now, bool) else [now + 1] if isinstance(now, int | float) else []
    if now is None:
        candidates = [1]
    if isinstance(now, str):
        candidates = [now + "x"]
    if isinstance(now, list):
        source, phase = {"name": "a", "path": "b", "weight": 1.0}, {"start_sample": 1, "weights": [1.0]}
        named_set, change = {"name": "a", "path": "b"}, {"start_step": 2, "global_batch_size": 2}
        candidates = [[], now[:-1], now[::-1], ["q"], ["x"], [source], [phase], [0.5, 0.5], [[1, 2]]]
        candidates += [[named_set], [change], ["context"], [1]]
    while candidates:
        section[last] = candidates.pop(0)
        try:
            changed = build(RunConfig, plain)
        except ConfigError as error:
            # A choice among names: take another of those that are allowed.
            named = [choice.strip() for choice in (error.allowed or "").split(",")] if isinstance(now, str) else []
            values = [int(choice) if choice.isdigit() else choice for choice in named]
            candidates += [value for value in values if value != now and error.field == key]
            continue
        if to_plain(changed) != to_plain(config):
            return changed
    choices = [2] if key == "engine.zero_stage" else []
    assert choices, f"no other value found for {key} = {now!r}"
    section[last] = choices[0]
    return build(RunConfig, plain)


def _refused(saved: RunConfig, now: RunConfig, precisions: tuple[str, str] = ("", "")) -> list[tuple[str, Any, Any]]:
    """What a checkpoint of the configuration `saved` is refused for under `now`."""
    state = TrainerState(Progress(), {}, [], {}, to_plain(saved))
    return differences(now, state, {}, precisions)


@pytest.mark.parametrize("attention", PRESETS)
def test_a_changed_setting_is_refused_or_declared_to_change_nothing_but_rounding(attention: str) -> None:
    config = compose([f"attention={attention}"])
    for key in flatten(to_plain(config)):
        # Another variant has other settings; tests/recipes/test_optimizer.py resumes with another optimiser.
        if key in ("attention.base.name", "attention.interaction.name", "optim.name"):
            continue
        refused = key in {name for name, _, _ in _refused(config, _changed(config, key))}
        free = [listed for listed in (WITHOUT_EFFECT, ROUNDING) if may_differ(key, listed)]
        assert len(free) == (0 if refused else 1), key


def test_every_free_setting_is_tried_or_names_the_test_that_proves_it() -> None:
    leaves = {key for preset in PRESETS for key in _leaves(f"attention={preset}")}
    free = {key for key in leaves if may_differ(key, FREE_TO_CHANGE)}
    cluster = {key for key in leaves if key.startswith("cluster.")}
    assert free - cluster == (NOTHING.keys() - {"cluster"}) | ROUNDING_ONLY.keys() | ELSEWHERE.keys()
    assert {key for key in free if may_differ(key, ROUNDING)} >= ROUNDING_ONLY.keys()
    assert all((Path(__file__).parents[1] / where).is_file() for where in ELSEWHERE.values())
    assert set(BOUND) <= free


@pytest.fixture(scope="module")
def begun(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Callable[..., Path]]:
    """`begun(*overrides)` is a run of a few steps that was stopped after the first; it gives
    `go_on(*changes)`, which resumes a copy of it to the end and returns the copy."""
    common = [
        *small,
        "attention=kha_mlp",
        "attention.interaction.impl=eager",
        "data.global_batch_size=4",
        "optim.lr=1e-3",
    ]
    common += [
        f"run.steps={STEPS}",
        "engine.micro_batch_size=4",
        "checkpoint.every_steps=100",
        "validation.every_steps=0",
    ]

    def begin(*overrides: str) -> Callable[..., Path]:
        first = tmp_path_factory.mktemp("begun") / "run"
        first.mkdir()
        set_marker(first, Marker.STOP)
        train(compose([*common, *overrides, f"run.dir={first}"]))

        def go_on(*changes: str) -> Path:
            run_dir = tmp_path_factory.mktemp("on") / "run"
            shutil.copytree(first, run_dir)
            outcome = train(compose([*common, *overrides, f"run.dir={run_dir}", *changes]))
            assert outcome.finished
            return run_dir

        return go_on

    return begin


def _tensors(run_dir: Path) -> dict[str, Any]:
    step = run_dir / "checkpoints" / f"step-{STEPS:08d}"
    return {
        f"{path.name}/{name}": tensor
        for path in sorted(step.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def _curve(run_dir: Path) -> list[tuple[float, float]]:
    return [(line["train/loss"], line["train/grad_norm"]) for line in read_metrics(run_dir)]


@pytest.mark.slow
def test_what_is_declared_without_effect_leaves_every_number_of_training_as_it_is(
    begun: Callable[..., Callable[..., Path]], dataset: Path, tmp_path: Path
) -> None:
    go_on = begun()
    shutil.copytree(dataset, tmp_path / "copy")
    plain = go_on()
    changed = go_on(*(f"{key}={value}".replace("{copy}", str(tmp_path / "copy")) for key, value in NOTHING.items()))
    timings = timing_keys(read_run(plain))
    lines = [
        [{key: line[key] for key in read_metrics(plain)[0] if key not in timings} for line in read_metrics(run)]
        for run in (plain, changed)
    ]
    assert lines[0] == lines[1]
    before, after = _tensors(plain), _tensors(changed)
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


@pytest.mark.slow
def test_what_is_declared_to_round_changes_the_last_bits_of_a_curve(begun: Callable[..., Callable[..., Path]]) -> None:
    go_on = begun()
    plain = go_on()
    changed = go_on(*(f"{key}={value}" for key, value in ROUNDING_ONLY.items()))
    for before, after in zip(_curve(plain), _curve(changed), strict=True):
        assert after == pytest.approx(before, rel=1e-4)
    assert _curve(plain) != _curve(changed)


def test_another_micro_batch_is_refused_where_the_auxiliary_loss_counts_by_it(
    begun: Callable[..., Callable[..., Path]],
) -> None:
    go_on = begun(*COUNTED_BY_MICRO_BATCH)
    with pytest.raises(ResumeError, match=r"engine\.micro_batch_size +4 -> 1\n ") as refused:
        go_on("engine.micro_batch_size=1")
    assert "resume.allow_changes=[engine.micro_batch_size]" in refused.value.fix
    # It is right to refuse: the objective is another.
    allowed = go_on("engine.micro_batch_size=1", "resume.allow_changes=[engine.micro_batch_size]")
    (_, before), (_, after) = _curve(go_on())[1], _curve(allowed)[1]
    assert abs(after - before) > 1e-3 * before


@pytest.mark.parametrize(
    "free",
    [
        ["moe.auxiliary_loss.weight=0.1", "moe.auxiliary_loss.scope=sequence"],
        ["moe.auxiliary_loss.weight=0.1", "moe.auxiliary_loss.scope=previous_step"],
        ["moe.auxiliary_loss.weight=0", "moe.auxiliary_loss.scope=micro_batch"],
    ],
    ids=" ".join,
)
def test_another_micro_batch_is_free_where_no_loss_counts_by_it(free: list[str]) -> None:
    config = compose([*free, "engine.micro_batch_size=4"])
    assert _refused(config, compose([*free, "engine.micro_batch_size=2"])) == []


@pytest.mark.parametrize("key", sorted(key for key in BOUND if key.startswith("checkpoint.")))
def test_the_checkpoints_a_rewind_may_go_back_to_are_fixed(key: str) -> None:
    for policy, refused in (("rewind", True), ("observe", False), ("skip", False)):
        config = compose([f"stability.policy={policy}"])
        found = [name for name, _, _ in _refused(config, compose([f"stability.policy={policy}", f"{key}=7"]))]
        assert found == ([key] if refused else [])


def test_any_number_of_ranks_makes_the_same_micro_batches(small: list[str]) -> None:
    """So `moe.auxiliary_loss.scope=micro_batch` leaves the world size free."""
    config = compose([*small, "data.global_batch_size=24"])

    def groups(world_size: int, size: int) -> list[list[int]]:
        batches = [next(open_stream(config, rank, world_size)) for rank in range(world_size)]
        return [part.samples_B.tolist() for batch in batches for part in batch.micro_batches(size)]

    for size in (1, 2, 3):
        assert all(groups(ranks, size) == groups(1, size) for ranks in (2, 4, 8) if 24 % (ranks * size) == 0)
    assert groups(2, 2) != groups(2, 3)


def test_auto_precision_that_means_another_dtype_here_is_refused_and_its_name_is_not() -> None:
    def found(before: str, now: str, resolved: tuple[str, str]) -> list[tuple[str, Any, Any]]:
        return _refused(compose([f"engine.precision={before}"]), compose([f"engine.precision={now}"]), resolved)

    assert found("auto", "auto", ("bf16", "fp32")) == [("engine.precision", "bf16", "fp32")]
    assert found("auto", "auto", ("fp32", "fp32")) == []
    assert found("auto", "fp32", ("fp32", "fp32")) == []
    assert found("fp32", "auto", ("fp32", "bf16")) == [("engine.precision", "fp32", "bf16")]
    assert found("auto", "auto", ("", "fp32")) == []
    assert found("auto", "bf16", ("", "bf16")) == [("engine.precision", "auto", "bf16")]


def test_a_run_is_held_to_the_precision_it_had_on_its_device(
    begun: Callable[..., Callable[..., Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = begun()
    monkeypatch.setattr(
        "kha_train.train.resume._last_recorded", lambda run_dir, fact: "bfloat16" if fact == "dtype" else ""
    )
    with pytest.raises(ResumeError, match=r"engine\.precision +'bf16' -> 'fp32'\n "):
        go_on()


def test_a_seed_that_is_named_with_the_value_it_stands_for_is_no_change() -> None:
    config, named = compose(["run.seed=3"]), compose(["run.seed=3", "data.seed=3", "moe.routing_seed=3"])
    assert _refused(config, named) == [] == _refused(named, config)
    assert _refused(config, compose(["run.seed=4", "data.seed=3"])) == [("moe.routing_seed", 3, 4), ("run.seed", 3, 4)]
    other = compose(["run.seed=3", "data.seed=4"])
    assert _refused(config, other) == [("data.seed", 3, 4)]
