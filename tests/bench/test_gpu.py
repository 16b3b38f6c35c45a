"""The GPU run reports a missing GPU, keeps to its time limit, and keeps the results it has."""

from __future__ import annotations

import json
from dataclasses import replace
from inspect import signature
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kha_train.bench import everything, gpu
from kha_train.bench.gpu import Stage, as_markdown, measure, stages
from kha_train.cli.bench import gpu as command
from kha_train.cli.main import app
from kha_train.config.compose import compose
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.estimate.counts import count_parameters
from kha_train.estimate.memory import plan_memory


def test_without_a_device_it_says_so_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device here; nothing was measured"):
        measure(tmp_path / "out", seconds=500, rehearse=False, say=print)
    assert not (tmp_path / "out").exists()


def test_all_missing_packages_are_named_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu.find_spec
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name in ("hydra", "deepspeed") else found(name))
    with pytest.raises(ConfigError, match="packages are missing: deepspeed, hydra"):
        measure(tmp_path / "out", seconds=500, rehearse=True, say=print)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_stage_leaves_its_outcome_also_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ("engine.device=cpu", "model.layers=1", "model.seq_len=16", "model.vocab_size=64", "telemetry.peak_tflops=1")
    works = Stage("works", ("step", *tiny, "--blocks", "3", "--warmup", "1", "--arm", "attention=gqa"), 100)
    given = [works, Stage("fails", ("step", "model=huge"), 60), Stage("tests", ("pytest", "tests/gpu"), 60)]
    monkeypatch.setattr(gpu, "stages", lambda rehearse: given)
    found = measure(tmp_path, seconds=200, rehearse=True, say=lambda text: None)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert "no such preset" in found["stages"]["fails"]["error"] and "skipped" in found["stages"]["tests"]["summary"]
    table = (tmp_path / "results.md").read_text()
    assert "REHEARSAL" in table and "| works | `attention=gqa` |" in table and "no such preset" in table


def outcome_of(monkeypatch: pytest.MonkeyPatch, folder: Path, answers: dict[str, dict]) -> tuple[int, dict, str]:
    """Exit code, results and table of a run whose stages leave `answers`; a name is the first word of the command."""
    monkeypatch.setattr(gpu, "stages", lambda rehearse: [Stage(name, (name,), 60) for name in answers])
    monkeypatch.setattr(gpu, "_run", lambda stage, limit: {"seconds": 1.0} | answers[stage.name])
    ended = CliRunner().invoke(app, ["bench", "gpu", "--rehearse", "--out", str(folder), "--overwrite"])
    return ended.exit_code, json.loads((folder / "results.json").read_text()), (folder / "results.md").read_text()


FIGURES = {"seconds": 1.0, "against_base": {"ratio": 1.0, "low": 1.0, "high": 1.0}, "tokens_per_second": 1.0}
STEP = {
    "answer": {
        "given": {"arms": {"gqa": FIGURES | {"mfu": 0.1, "mfu_documents": 0.1, "mfu_palm": 0.2, "peak_gib": None}}}
    }
}


def test_figures_after_a_failed_parity_are_unproven_and_the_command_fails(tmp_path, monkeypatch) -> None:
    code, found, table = outcome_of(monkeypatch, tmp_path, {"pytest": {"error": "1 failed"}, "step": STEP})
    assert code == 1 and gpu.unproven(found)
    assert "UNPROVEN" in table and "| step (unproven) | `gqa` |" in table


def test_a_stage_that_fails_fails_the_command_but_proves_nothing_wrong(tmp_path, monkeypatch) -> None:
    answers = {"pytest": {"summary": "5 passed"}, "step": STEP}
    code, found, table = outcome_of(monkeypatch, tmp_path, answers)
    assert code == 0 and "unproven" not in table.lower()
    code, found, table = outcome_of(monkeypatch, tmp_path, answers | {"moe": {"error": "no memory"}})
    assert code == 1 and "| step | `gqa` |" in table and found["stages"]["moe"]["error"] == "no memory"


def test_the_command_of_all_benchmarks_fails_with_any_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = {"moe": {"error": "no memory"}}
    monkeypatch.setattr(everything, "run_one", lambda arguments: {"seconds": 1.0} | ended.get(arguments[0], {}))
    answer = CliRunner().invoke(app, ["bench", "all", "--quick"])
    assert answer.exit_code == 1 and "no memory" in answer.stdout
    ended.clear()
    assert CliRunner().invoke(app, ["bench", "all", "--quick"]).exit_code == 0


def test_a_peer_without_an_adapter_is_refused_before_the_first_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everything, "run_one", lambda arguments: pytest.fail("began"))
    answer = CliRunner().invoke(app, ["bench", "all", "--quick", "--against", "transformers"])
    assert isinstance(answer.exception, ConfigError) and "--peers" in answer.exception.line()


def test_only_files_with_tests_for_a_gpu_are_collected() -> None:
    files = {Path(name).relative_to(gpu.ROOT).as_posix() for name in gpu.gpu_tests(stages(False)[0])}
    assert {"tests/gpu/test_attention_backends.py", "tests/model/kernels/test_values.py"} <= files
    assert "tests/cli/test_commands.py" not in files


def test_what_there_is_no_time_for_is_left_out_and_said(tmp_path: Path) -> None:
    found = measure(tmp_path, seconds=1, rehearse=True, say=lambda text: None)
    assert all("no time left" in stage["error"] for stage in found["stages"].values())
    assert as_markdown(found).count("no time left") == len(stages(True))


def test_all_stages_fit_the_time_of_the_run_when_each_uses_up_its_own() -> None:
    (minutes,) = (option.default for option in signature(command).parameters.values() if option.name == "minutes")
    assert sum(stage.limit for stage in stages(False)) <= 60 * minutes


def test_a_stage_may_use_what_those_before_it_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(gpu, "stages", lambda rehearse: [Stage(str(n), ("step",), 100) for n in range(3)])
    monkeypatch.setattr(gpu, "_run", lambda stage, limit: given.append(limit) or {"seconds": 0.0})
    measure(tmp_path, seconds=250, rehearse=True, say=lambda text: None)
    assert given == pytest.approx([100, 200, 250], abs=5)


def arms_of(stage: Stage) -> list[RunConfig]:
    """What a `step` stage compares; the first is the base."""
    settings, arms, words = [], [], iter(stage.command[1:])
    for word in words:
        if word == "--arm":
            arms.append(next(words).split())
        elif word.startswith("--"):
            next(words)
        else:
            settings.append(word)
    return [compose([*settings, *arm]) for arm in arms]


@pytest.mark.slow
def test_steps_are_timed_as_the_protocol_asks_at_the_shape_of_6b_both_ways() -> None:
    rows = {"step, GQA and KHA": True, "step, unsplit rows": False}
    rows |= {"the whole 6.1B model": True, "the whole, unsplit rows": False}
    whole = compose(["model=moe_6b"]).model
    for stage in (stage for stage in stages(False) if stage.command[0] == "step"):
        told = dict(pairwise(stage.command))
        arms = arms_of(stage)
        assert int(told["--blocks"]) >= 15 and int(told["--warmup"]) >= (5 if "whole" in stage.name else 10)
        assert len(arms) == 1 or int(told["--blocks"]) * int(told["--steps"]) >= 30
        assert all(arm.model.layers == (whole.layers if "whole" in stage.name else 3) for arm in arms)
        assert rows.pop(stage.name, arms[0].data.isolate_documents) == arms[0].data.isolate_documents
    assert not rows


def test_arms_that_are_held_at_once_fit_in_80_gb() -> None:
    for stage in (stage for stage in stages(False) if stage.command[0] == "step" and "whole" not in stage.name):
        plans = [plan_memory(replace(arm, cluster=replace(arm.cluster, devices=1))) for arm in arms_of(stage)]
        # Models, gradients and optimisers of all lie there at once; what a step needs besides, of one at a time.
        kept = [sum(plan.terms[term] for term in ("parameters", "gradients", "optimizer")) for plan in plans]
        if "--against" in stage.command:
            # Two of its expert implementations are tried side by side, with fp32 gradients beside the bf16 ones.
            kept += 2 * [kept[0] + 4 * count_parameters(arms_of(stage)[0]).total]
        peak = sum(kept) + max(plan.total - own for plan, own in zip(plans, kept, strict=False))
        assert peak < 0.95 * 80e9


def test_the_steps_are_those_that_decide_what_runs_by_default() -> None:
    steps = {stage.name: arms_of(stage) for stage in stages(False) if stage.command[0] == "step"}
    for arms in steps.values():
        assert all(arm.attention.backend == ("varlen" if arm.data.isolate_documents else "cudnn") for arm in arms)
        assert {arm.model.hidden_size for arm in arms} == {compose(["model=moe_6b"]).model.hidden_size}
    without, with_kernels = steps["step, kernels"]
    assert (without.engine.kernels, with_kernels.engine.kernels) == ("torch", "triton")
    assert without.attention == with_kernels.attention and without.attention.name == "kha_mlp"
    for name in ("step, GQA and KHA", "step, unsplit rows"):
        assert [arm.attention.name for arm in steps[name]][:2] == ["gqa", "kha_mlp"]
