"""A planted cause is named by replays: the control is bit-equal, and each arm differs from it in one thing."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kha_train.analysis.causes import Verdict, read_verdicts
from kha_train.analysis.runs import load_run
from kha_train.config.build import flatten, to_plain
from kha_train.config.compose import compose, from_plain
from kha_train.config.validate import validate
from kha_train.data.stream import open_stream
from kha_train.errors import CheckpointError, ConfigError, MachineError
from kha_train.estimate.counts import count_parameters
from kha_train.model.device import resolve_on
from kha_train.operate.arms import ARMS, ArmKind, Case, Change, changes
from kha_train.operate.capsule import CapsuleFile, Excerpt, _on_a_cpu, batch_of, rows_of, smallest, write_capsule
from kha_train.operate.causes import Replaying, chosen, event_of, open_case, place_of, replay_event
from kha_train.operate.reproduce import reproduce
from kha_train.operate.stretch import in_this_process
from kha_train.record import read_events, read_metrics
from kha_train.stability.events import SpikeEvent
from tests.conftest import Kha
from tests.operate.planted import BEGIN, IDS, NO_SINGLE_CAUSE, PLANTS, POISONED, USUAL_IDS, planted_event
from tests.operate.planted import replayed as judged

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SpikeEvent]:
    return planted_event(PLANTS[0], tmp_path_factory.mktemp("planted"), 0)


def replayed(
    run_dir: Path, event: SpikeEvent, *arms: str, place: Path | None = None, told: list[str] | None = None
) -> Verdict:
    run = load_run(run_dir)
    tell = (told if told is not None else []).append
    bar = lambda what, total: nullcontext(lambda done: None)
    return replay_event(run, event, Replaying(arms, place or place_of(run, event), tell, bar, 1, 5, in_this_process))


def test_poisoned_rows_are_named_and_the_verdict_is_kept_with_the_run(poisoned: tuple[Path, SpikeEvent]) -> None:
    run_dir, event = poisoned
    assert event.start_step == POISONED
    before = {path: path.read_bytes() for path in (run_dir / "metrics.jsonl", run_dir / "run.json")}
    found = replayed(run_dir, event, "without_batch", "without_previous", "half_rate", "rounding", "fp32_router")
    assert found.differences == () and found.cause == "data"
    assert found.answer.startswith(f"the batch of step {POISONED} (samples {8 * POISONED - 8} to {8 * POISONED - 1})")
    # Without the batch before it, the event only comes a step earlier.
    assert [(arm.name, arm.removes) for arm in found.arms[:4]] == [
        ("without_batch", True), ("without_previous", False), ("half_rate", False), ("rounding", False),
    ]  # fmt: skip
    assert found.arms[4].reason == "the router is fp32 already"
    assert all(path.read_bytes() == content for path, content in before.items())
    assert [one["answer"] for one in read_verdicts(run_dir)] == [found.answer]
    [told] = [one for one in read_events(run_dir) if one["kind"] == "replayed"]
    assert (told["step"], told["cause"], told["answer"]) == (POISONED, "data", found.answer)

    # The replays are runs like any other: they compare, and they read other samples exactly where they should.
    assert found.first == POISONED - 1 and Path(found.source).parents[1].name == "ring"
    control, without = (
        load_run(place_of(load_run(run_dir), event) / name / "run") for name in ("control", "without_batch")
    )
    assert control.begun_after == without.begun_after == found.first - 1 and control.label == "control"
    recorded = [line for line in read_metrics(run_dir) if found.first <= line["step"] <= found.last]
    assert [line["train/loss"] for line in read_metrics(control.path)] == [line["train/loss"] for line in recorded]
    at = [line["samples_first"] for line in read_metrics(without.path)]
    assert at == [line["samples_first"] + 8 * (line["step"] >= POISONED) for line in recorded]

    # A second call trains nothing again.
    times = [(run.path / "metrics.jsonl").stat().st_mtime_ns for run in (control, without)]
    assert replayed(run_dir, event, "without_batch").cause == "data"
    assert times == [(run.path / "metrics.jsonl").stat().st_mtime_ns for run in (control, without)]


def test_a_control_that_differs_ends_it_with_the_column_and_the_step(
    poisoned: tuple[Path, SpikeEvent], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(poisoned[0], run_dir, ignore=shutil.ignore_patterns("replay"))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines[POISONED - 1]["moe/maxvio"] += 1e-9
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = (run_dir / "events.jsonl").read_bytes()
    found = replayed(run_dir, poisoned[1], "without_batch", place=tmp_path / "out")
    assert found.cause is None and found.arms == () and f"step {POISONED}: moe/maxvio is" in found.answer
    # Outside the run, nothing of the run is written.
    assert (run_dir / "events.jsonl").read_bytes() == before

    about = json.loads((run_dir / "run.json").read_text())
    about["attempts"][0]["world_size"] = 4096
    (run_dir / "run.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="they were computed by 4096 processes, and this machine has"):
        replayed(run_dir, poisoned[1], "without_batch", place=tmp_path / "out")


def test_every_arm_changes_one_thing_and_says_why_where_it_cannot(poisoned: tuple[Path, SpikeEvent]) -> None:
    run = load_run(poisoned[0])
    case = open_case(run, poisoned[1], run.path / "replay")
    moe = replace(case.config.moe, router_precision="bf16", routing_warmup_steps=1000)
    wider = replace(case, config=replace(case.config, moe=moe), event=replace(case.event, end_step=POISONED + 1))
    before, found = flatten(to_plain(wider.config)), dict[str, Any]()
    for name, _, change in changes(wider, ARMS, 2):
        if isinstance(change, Change):
            now = [flatten(to_plain(config)) for config in change.configs]
            found[name] = sorted({key for one in now for key in one.keys() | before if one.get(key) != before.get(key)})
            assert len({json.dumps(one, sort_keys=True) for one in now}) == len(now)
            if name in ("without_batch", "without_previous"):
                first = 8 * (POISONED - 1 - (name == "without_previous"))
                assert change.configs[0].data.skip_windows == ((first, first + 8),)
    interaction = [key for key in found.pop("kha_inserted") if not key.startswith("attention.interaction.")]
    assert interaction == []
    assert found == {
        "without_batch": ["data.skip_windows"], "without_previous": ["data.skip_windows"],
        "without_window": ["data.skip_windows"], "other_order": ["data.seed"],
        "half_rate": ["optim.lr"], "tenth_rate": ["optim.lr"], "tighter_clip": ["optim.grad_clip"],
        "fp32_router": ["moe.router_precision"],
        "fp32_everywhere": ["engine.precision", "moe.router_precision"],
        "frozen_biases": ["moe.bias_update_rate"], "warmup_seed": ["moe.routing_seed"],
        "rounding": ["model.loss_chunk_tokens"],
    }  # fmt: skip
    assert set(ARMS) - {*found, "kha_inserted"} == {"kha_removed", "usual_scale"}
    with pytest.raises(ConfigError, match=r"no such arm.*half_rate"):
        chosen(["half_rat"])


def test_an_arm_that_cannot_be_made_says_why_and_the_others_are_made(poisoned: tuple[Path, SpikeEvent]) -> None:
    run = load_run(poisoned[0])
    case = open_case(run, poisoned[1], run.path / "replay")

    def refused(case: Case, replays: int) -> str:
        raise CheckpointError("no room for a copy", field="disk")

    def invalid(case: Case, replays: int) -> Change:
        optim = replace(case.config.optim, grad_clip=-1.0)
        return Change("with no clip", "the clip", (replace(case.config, optim=optim),))

    made = {"a": ArmKind("x", refused), "b": ArmKind("y", invalid), "rounding": ARMS["rounding"]}
    (_, _, first), (_, _, second), (_, _, third) = changes(case, made, 3)
    assert isinstance(first, str) and "no room for a copy" in first
    assert isinstance(second, str) and "optim.grad_clip" in second
    # Chance is involved in rounding, so it has several replays. A replay needs no ring.
    assert isinstance(third, Change) and len(third.configs) == 3
    assert case.config.checkpoint.ring_steps == 0


def test_a_step_stands_for_the_event_that_holds_it(poisoned: tuple[Path, SpikeEvent]) -> None:
    run = load_run(poisoned[0])
    assert event_of(run, None, POISONED) == event_of(run, 1, None) == poisoned[1]
    with pytest.raises(ConfigError, match=rf"no event holds this step; allowed: a step of an event: {POISONED}\.\."):
        event_of(run, None, 3)

    # One that only the record has; an older record may lack its numbers, a damaged one ends it before it begins.
    opened = {"kind": "spike_opened", "step": 50, "samples_first": 8 * 49}
    closed = {"kind": "spike_closed", "step": 60, "start_step": 50, "end_step": 7}
    numbers = {"loss": 5.0, "baseline": 3.0, "z": 16.0}
    found = event_of(replace(run, events=[{**opened, **numbers}, {**closed, "end_step": 52}]), None, 51)
    assert (found.start_step, found.end_step, found.samples_last, found.scale) == (50, 52, 8 * 52 - 1, 0.125)
    found = event_of(replace(run, events=[opened, closed]), None, 50)
    assert (found.end_step, found.samples_last) == (50, 8 * 50 - 1) and math.isnan(found.scale)


def test_a_replay_that_was_stopped_on_the_way_is_not_done(
    poisoned: tuple[Path, SpikeEvent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stop").touch()
    with monkeypatch.context() as patched, pytest.raises(MachineError, match=f"stopped after step {POISONED - 1} of"):
        patched.setenv("KHA_STOP_FILE", str(tmp_path / "stop"))
        replayed(poisoned[0], poisoned[1], "rounding", place=tmp_path / "out")
    assert not (tmp_path / "out" / "control" / "arm.json").exists()
    # A second call goes on with it.
    assert replayed(poisoned[0], poisoned[1], "rounding", place=tmp_path / "out").differences == ()


def test_the_command_replays_in_processes_of_their_own(
    poisoned: tuple[Path, SpikeEvent], tmp_path: Path, kha: Kha
) -> None:
    arguments = ("replay", str(poisoned[0]), "--event", "1", "--arms", "without_batch", "--steps", "1")
    code, told, _ = kha(*arguments, "--out", str(tmp_path / "out"), "--json")
    found = json.loads(told)
    assert code == 0 and found["cause"] == "data" and found["differences"] == [] and Path(found["verdict"]).is_file()


def test_a_capsule_reproduces_the_event_by_its_own_command_and_is_small(
    poisoned: tuple[Path, SpikeEvent], tmp_path: Path
) -> None:
    run = load_run(poisoned[0])
    out = tmp_path / "made"
    made = write_capsule(run, open_case(run, poisoned[1], tmp_path / "work"), out, lambda text: None, in_this_process)
    assert "the optimiser's moments" in made["left_out"] and len(made["losses"]) == 2
    steps = json.loads((out / "samples.json").read_text())["steps"]
    # One of the poisoned rows shows the event; the step before it has the row at the same place.
    assert [len(rows) for rows in steps] == [1, 1]
    assert max(steps[0][0]["ids"][:-1]) < USUAL_IDS <= min(steps[1][0]["ids"][:-2])
    shutil.move(out, tmp_path / "elsewhere")
    readme = (tmp_path / "elsewhere" / "README.md").read_text()
    command_line = readme.split("```")[1].strip()
    shutil.rmtree(tmp_path / "work", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-c", "from kha_train.cli.main import run; run()", *shlex.split(command_line)[1:], "--json"],
        cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["equal"] and found["shows"], done.stderr
    assert found["losses"][0] < found["threshold"] <= found["losses"][1]
    config = from_plain(made["config"])
    whole = count_parameters(config).total * 4 * len(config.optim.kinds())
    size = sum(file.stat().st_size for file in (tmp_path / "elsewhere").rglob("*") if file.is_file())
    assert size <= 1.1 * whole + 10**6 and found["bytes"] == size
    weights = sum(file.stat().st_size for file in (tmp_path / "elsewhere").rglob("*.safetensors"))
    assert weights < 1.1 * whole / 3 + 10**4

    # An event that opened with a loss that is not finite has no scale: then only such losses stand out.
    content = json.loads((tmp_path / "elsewhere" / "capsule.json").read_text())
    (tmp_path / "elsewhere" / "capsule.json").write_text(json.dumps({**content, "scale": "nan"}))
    assert not reproduce(tmp_path / "elsewhere")["shows"]

    # It may come from other hands: it is checked before a model is built.
    for file, key, value, problem in (
        ("samples", "steps", [[{**row, "ids": [IDS, *row["ids"][1:]]} for row in rows] for rows in steps], "rows of"),
        ("samples", "steps", [[{**row, "borders": [0, 10**6]} for row in rows] for rows in steps], "rows of"),
        ("samples", "steps", steps[:1], "1 steps, 2 rates"),
        ("capsule", "scale", 0.0, "scale 0.0"),
        ("capsule", "config", config_with(made, "model", vocab_size=2**40), "larger than its weights"),
        ("capsule", "config", config_with(made, "model", hidden_size=16), "other parameters than its weights"),
        ("capsule", "config", config_with(made, "engine", name="deepspeed"), "engine.name=deepspeed"),
    ):
        damaged = tmp_path / "damaged"
        shutil.copytree(tmp_path / "elsewhere", damaged)
        content = json.loads((damaged / f"{file}.json").read_text())
        (damaged / f"{file}.json").write_text(json.dumps({**content, key: value}))
        with pytest.raises(CheckpointError, match=f"the capsule is damaged: .*{problem}"):
            reproduce(damaged)
        shutil.rmtree(damaged)


def config_with(made: CapsuleFile, section: str, **values: Any) -> dict[str, Any]:
    return {**made["config"], section: {**made["config"][section], **values}}


def test_a_capsule_can_leave_out_all_layers_with_experts_even_if_ranks_shared_them() -> None:
    layers = ["moe.dense_layers=1", "moe.dense_width=64", "engine.expert_parallel=2", "engine.context_parallel=2"]
    case: Any = SimpleNamespace(config=compose(layers), precision="")
    nowhere: Any = None
    excerpt = Excerpt(nowhere, _on_a_cpu(case), (), (), 0, layers=(0,), rows=(0,))
    validate(excerpt.small_config, to_train=False)
    assert excerpt.small_config.engine.context_parallel == 1


@pytest.mark.parametrize(
    ("chosen_there", "computes"),
    [
        (["attention=linear"], "chunked"), (["attention=talking_heads"], "eager"), (["attention=gqa"], "sdpa"),
        (["attention=gqa", "attention.backend=flash_attn"], "sdpa"),
        (["attention=kha_mlp", "attention.interaction.impl=triton"], "sdpa"),
    ],
)  # fmt: skip
def test_a_capsule_takes_what_a_cpu_has_for_every_attention(chosen_there: list[str], computes: str) -> None:
    case: Any = SimpleNamespace(config=compose(chosen_there), precision="fp32")
    config = _on_a_cpu(case)
    validate(config, to_train=False)
    assert resolve_on(config, torch.device("cpu")).backend.name == computes


def test_layers_with_settings_of_their_own_are_not_left_out() -> None:
    by_layer = "attention.interaction.component_heads_by_layer=[2,1]"
    case: Any = SimpleNamespace(config=compose(["attention=mea", "model.layers=2", by_layer]), precision="fp32")
    nowhere: Any = None
    excerpt = Excerpt(nowhere, _on_a_cpu(case), (), (), 0, layers=(0,), rows=(0,))
    with pytest.raises(ConfigError, match="has 2 numbers for 1 layers"):
        excerpt.losses()


def test_nothing_can_be_left_out_of_what_delta_debugging_keeps() -> None:
    for needed in ({3}, {0, 7}, {1, 2, 5}, set(range(8))):
        tried: list[tuple[int, ...]] = []

        def still(items: tuple[int, ...], needed: set[int] = needed, tried: list[tuple[int, ...]] = tried) -> bool:
            tried.append(items)
            return needed <= {*items}

        assert smallest(tuple(range(8)), still) == tuple(sorted(needed))
        assert all(tried)


def test_an_event_of_two_causes_is_called_one_without_a_single_cause(tmp_path: Path) -> None:
    run_dir, event = planted_event(NO_SINGLE_CAUSE, tmp_path, 0)
    assert event.start_step == BEGIN + 1
    found = replayed(run_dir, event, "without_batch", "other_order", "half_rate", "usual_scale", "rounding")
    assert found.differences == () and found.cause is None and found.answer.startswith(NO_SINGLE_CAUSE.accuses)
    assert [arm.removes for arm in found.arms] == [False] * 5
    # Each of the two takes away a part.
    left = {arm.name: arm.left[0] for arm in found.arms}
    assert left["usual_scale"] < left["half_rate"] and left["without_batch"] < 1

    # A second call makes no other copy of the checkpoint.
    [copy] = place_of(load_run(run_dir), event).glob("checkpoints/*/manifest.json")
    before = copy.stat()
    assert replayed(run_dir, event, "usual_scale").arms[0].left == (left["usual_scale"],)
    assert copy.stat().st_ino == before.st_ino


def test_a_run_that_was_moved_replays_when_it_is_told_where_its_data_are(
    poisoned: tuple[Path, SpikeEvent], tmp_path: Path, kha: Kha
) -> None:
    """As one from other hands, whose paths are those of another machine."""
    theirs, moved = poisoned[0].parent / "bad data", tmp_path / "moved"
    shutil.copytree(poisoned[0], moved / "their run", ignore=shutil.ignore_patterns("replay"))
    hidden = theirs.rename(moved / "data")
    arguments = ("replay", str(moved / "their run"), "--event", "1", "--arms", "without_batch", "--steps", "1")
    try:
        code, _, told = kha(*arguments, "--json")
        assert code == 2 and f"their data are not here: {theirs}/train" in told
        assert f"fix: say where they are: --data '{theirs}/train'=DIRECTORY" in told
        code, told, _ = kha(*arguments, "--data", f"{theirs}={hidden}", "--json")
    finally:
        hidden.rename(theirs)
    found = json.loads(told)
    assert code == 0 and found["cause"] == "data" and found["differences"] == []
    assert Path(found["verdict"]).is_relative_to(moved) and Path(found["source"]).is_relative_to(moved)


def test_options_that_would_have_no_effect_are_refused(
    poisoned: tuple[Path, SpikeEvent], tmp_path: Path, kha: Kha
) -> None:
    for option, value in (("--arms", "half_rate"), ("--replays", "2")):
        code, _, told = kha("replay", str(poisoned[0]), "--event", "1", "--capsule", str(tmp_path / "c"), option, value)
        assert code == 2 and f"{option} = " in told and f"leave out {option}" in told
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "capsule.json").write_text("{}")
    for option, value in (("--event", "1"), ("--capsule", "x"), ("--out", "x"), ("--data", "a=b"), ("--steps", "1")):
        code, _, told = kha("replay", str(tmp_path / "made"), option, value)
        assert code == 2 and f"{option} = " in told and "is a capsule, which is trained as it is" in told
    code, _, told = kha("replay", str(poisoned[0]), "--event", "1", "--data", "nowhere")
    assert code == 2 and "--data = 'nowhere'" in told and "OLD=NEW" in told


def test_rows_of_a_batch_make_the_batch_again(poisoned: tuple[Path, SpikeEvent], padded: list[str]) -> None:
    case = open_case(load_run(poisoned[0]), poisoned[1], poisoned[0] / "replay")
    for config in (compose([*padded, "data.global_batch_size=4"]), case.config):
        batch = next(open_stream(config))
        again = batch_of(rows_of(batch))
        for name in ("tokens_BT", "labels_BT", "positions_BT", "cu_seqlens_S", "real_R"):
            before, now = getattr(batch, name), getattr(again, name)
            assert now is None if before is None else torch.equal(before, now), name
        assert (again.samples_B == batch.samples_B).all() and again.token_count == batch.token_count


@pytest.mark.soak
def test_at_least_18_of_20_planted_causes_are_named_from_bit_equal_controls(tmp_path: Path) -> None:
    right = 0
    for seed in range(4):
        for plant in PLANTS:
            found = judged(plant, tmp_path / str(seed), seed)
            named = found.cause == plant.family and found.answer.startswith(plant.accuses)
            print(f"{plant.kind}, seed {seed}: {'right' if named else 'WRONG'}: {found.answer}")
            assert found.differences == ()
            right += named
    assert right >= 18
