"""A branch continues the whole state of another run: bit-equal where nothing differs; a list says what may differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from safetensors.torch import load_file

from kha_train.analysis.compare import compare_runs
from kha_train.analysis.spikes import read_curve, score_curve
from kha_train.checkpoint.hold import alone
from kha_train.checkpoint.reader import Checkpoint, verify
from kha_train.config.build import build, flatten, to_plain
from kha_train.config.compose import compose, shipped
from kha_train.config.constants import FREE_TO_CHANGE, MAY_BRANCH, may_differ
from kha_train.config.schema import RunConfig
from kha_train.data.stream import open_stream
from kha_train.distributed import World
from kha_train.engine.plain import Engine as PlainEngine
from kha_train.errors import ConfigError, KhaError, ResumeError
from kha_train.operate.status import run_status
from kha_train.record import read_discarded, read_events, read_metrics, read_run, timing_keys
from kha_train.record.goodput import goodput_of
from kha_train.record.totals import totals_of
from kha_train.train import run as train_run
from kha_train.train.branch import Branch
from kha_train.train.resume import check_belongs
from kha_train.train.run import train
from kha_train.train.step import StepGivenUp
from kha_train.train.watch import Watch

STEPS, SPLIT = 6, 2
SMALL = [
    "model.layers=1", "model.hidden_size=32", "model.head_dim=16", "moe.expert_width=32",
    "data.global_batch_size=4", "engine.micro_batch_size=2", "optim.lr=1e-2", f"run.steps={STEPS}",
    f"checkpoint.every_steps={SPLIT}", "checkpoint.keep_last=9", "validation.every_steps=0", "validation.rows=2",
]  # fmt: skip
LINEAR = ["attention=kha_linear", "attention.interaction.projections=[k,v]"]
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def parent(trained: Train) -> Path:
    return trained()


@pytest.fixture(scope="module")
def linear(trained: Train) -> Path:
    """A parent whose interaction can be absorbed."""
    return trained(*LINEAR)


def at(run_dir: Path, step: int = SPLIT) -> Checkpoint:
    path = run_dir / "checkpoints" / f"step-{step:08d}"
    return Checkpoint(path, verify(path))


def from_(run_dir: Path, step: int = SPLIT) -> str:
    return f"run.branch_from={at(run_dir, step).path}"


def tensors(run_dir: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}/{name}": tensor
        for path in sorted(at(run_dir, step).path.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def lines(run_dir: Path, after: int = 0) -> list[dict[str, Any]]:
    """The record but timings and the number of the attempt, from the step `after` on."""
    timed = {*timing_keys(read_run(run_dir)), "attempt"}
    return [
        {key: value for key, value in line.items() if key not in timed}
        for line in read_metrics(run_dir)
        if line["step"] > after
    ]


def assert_same_end(one: Path, other: Path, after: int = SPLIT) -> None:
    """Both runs are equal bit for bit from the step `after` on."""
    before, now = tensors(one), tensors(other)
    assert before.keys() == now.keys()
    assert [name for name in before if not before[name].equal(now[name])] == []
    assert lines(one, after) == lines(other, after)


CASES = {
    "zero1": ["moe.routing_warmup_steps=4", "moe.auxiliary_loss.weight=0.1",
              "moe.auxiliary_loss.scope=previous_step", "stability=skip", "data.skip_windows=[[6,9],[14,15]]"],
    "zero2": ["engine.zero_stage=2", "attention=kha_mlp", "engine.precision=bf16", "engine.moment_dtype=bf16",
              "data.shuffle=block", "data.prefetch=2"],
    "zero3": ["engine.zero_stage=3", "attention=mea", "stability.zclip=true", "optim.schedule.name=wsd",
              "data.packing=best_fit", "data.cache_dir={tmp}"],
}  # fmt: skip


@pytest.mark.parametrize(
    "case", ["zero1", *(pytest.param(case, marks=pytest.mark.slow) for case in ("zero2", "zero3"))]
)
def test_a_branch_in_which_nothing_differs_continues_bit_equal_to_its_parent(
    case: str, trained: Train, tmp_path: Path
) -> None:
    settings = [setting.replace("{tmp}", str(tmp_path)) for setting in CASES[case]]
    whole = trained(*settings)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in whole.rglob("*")}
    branch = trained(*settings, from_(whole))
    assert [line["step"] for line in read_metrics(branch)] == list(range(SPLIT + 1, STEPS + 1))
    assert_same_end(whole, branch)
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in whole.rglob("*")}


def test_a_branch_of_a_branch_is_the_same_run_still_and_names_them_all(trained: Train, parent: Path) -> None:
    child = trained(from_(parent))
    grandchild = trained(from_(child, 4))
    assert_same_end(parent, grandchild, after=4)
    ids = [read_run(run)["run_id"] for run in (parent, child, grandchild)]
    named = read_run(grandchild)["parent"]
    assert (named["run_id"], named["step"], named["ancestors"]) == (
        ids[1],
        4,
        [(ids[0], SPLIT, read_run(child)["parent"]["manifest"])],
    )
    assert named["checkpoint"] == str(at(child, 4).path) and len(set(ids)) == 3
    assert at(grandchild, STEPS).trainer_state["branch"]["manifest"] == named["manifest"]
    (event,) = [event for event in read_events(grandchild) if event["kind"] == "branched"]
    assert (event["step"], event["parent"], event["changes"]) == (4, ids[1], [])


def test_a_run_directory_stands_for_its_newest_checkpoint(trained: Train, parent: Path) -> None:
    longer = trained(f"run.branch_from={parent}", f"run.steps={STEPS + 1}")
    assert [line["step"] for line in read_metrics(longer)] == [STEPS + 1]
    assert read_run(longer)["parent"]["step"] == STEPS


@pytest.mark.slow
def test_later_starts_of_a_branch_resume_it_and_need_no_parent(
    trained: Train, parent: Path, small: list[str], tmp_path: Path
) -> None:
    copy = tmp_path / "parent"
    shutil.copytree(parent, copy)
    branch = trained(from_(copy), "run.steps=4", "optim.schedule.name=wsd", "optim.schedule.decay=0")
    shutil.rmtree(copy)
    longer = ["optim.schedule.name=wsd", "optim.schedule.decay=0", "resume.allow_changes=[run.steps,optim]"]
    train(compose([*small, *SMALL, *longer, from_(parent), f"run.dir={branch}"]))
    assert [line["step"] for line in read_metrics(branch)] == [3, 4, 5, 6]
    assert at(branch, STEPS).trainer_state["branch"] == at(branch, 4).trainer_state["branch"]
    assert [event["kind"] for event in read_events(branch)].count("branched") == 1


@pytest.mark.slow
def test_a_branch_that_was_killed_before_its_first_save_begins_anew(
    trained: Train, parent: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = compose([*small, *SMALL, from_(parent), f"run.dir={tmp_path / 'run'}", "checkpoint.every_steps=100"])
    real, calls = train_run.train_step, []

    def dies(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_run, "train_step", dies)
        train(settings)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [3, 4]
    train(settings)
    assert_same_end(parent, tmp_path / "run")
    assert [line["step"] for line in read_discarded(tmp_path / "run")] == [3, 4]
    assert "lines_missing" not in {event["kind"] for event in read_events(tmp_path / "run")}


def test_a_branch_that_stopped_within_its_first_step_saves_nothing_and_begins_anew(
    parent: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, expected = tmp_path / "run", []
    short = ["model.rope_theta=500", f"run.steps={SPLIT + 1}"]
    settings = compose([*small, *SMALL, from_(parent), f"run.dir={run_dir}", *short])
    monkeypatch.setattr(Watch, "expect_change", lambda watch: expected.append(watch))

    def stops(*given: Any) -> Any:
        raise StepGivenUp("after micro-batch 1 of 2")

    with monkeypatch.context() as patch:
        patch.setattr(train_run, "train_step", stops)
        assert not train(settings).finished
    assert not list(run_dir.glob("checkpoints/step-*")) and len(expected) == 1
    assert train(settings).finished and len(expected) == 2
    assert [line["step"] for line in read_metrics(run_dir)] == [SPLIT + 1]


# What may differ.

REFUSED = {
    "run.seed": "names the initial values; data.seed and moe.routing_seed may differ",
    "model.layers": "parameters", "model.hidden_size": "parameters", "model.query_heads": "parameters",
    "model.kv_heads": "parameters", "model.head_dim": "parameters", "model.vocab_size": "parameters",
    "model.tie_embeddings": "parameters", "model.norm_eps": "another function", "model.init_std": "initial values",
    "model.scale_residual_init": "initial values", "attention.base.": "parameters or another function",
    "attention.interaction.": "inserted or absorbed whole", "attention.qk_norm": "parameters",
    "attention.positions": "another function", "moe.experts": "parameters", "moe.expert_width": "parameters",
    "moe.shared_experts": "parameters", "moe.dense_layers": "parameters", "moe.dense_width": "parameters",
    "data.isolate_documents": "the identity of a run", "optim.name": "states", "optim.weight_decay": "not listed",
    "optim.interaction_decay": "not listed", "optim.betas": "meaning of the moments", "optim.eps": "not listed",
    "stability.policy": "what acts on steps", "stability.max_nonfinite_steps": "what acts on steps",
    "stability.max_skips": "what acts on steps", "stability.rewind.": "what acts on steps",
}  # fmt: skip
"""Why a field, or a section of them, is on no list. A new field must go on one or come here."""


def test_every_field_is_free_or_listed_or_refused_for_a_reason() -> None:
    presets = sorted(path.stem for path in (shipped("configs") / "attention").glob("*.yaml"))
    for key in {key for preset in presets for key in flatten(to_plain(compose([f"attention={preset}"])))}:
        lists = [may_differ(key, FREE_TO_CHANGE), may_differ(key, MAY_BRANCH), may_differ(key, REFUSED)]
        free_too = key.startswith("checkpoint.") or key in ("attention.interaction.impl", "run.branch_from")
        assert sum(lists) == 1 or (free_too and lists[0]), (key, lists)
    leaves = {key for preset in presets for key in flatten(to_plain(compose([f"attention={preset}"])))}
    assert all(any(may_differ(key, [name]) for key in leaves) for name in (*MAY_BRANCH, *REFUSED))
    page = (Path(__file__).parents[2] / "docs" / "resume.md").read_text(encoding="utf-8")
    assert [name for name in MAY_BRANCH if f"`{name}{'*' * name.endswith('.')}`" not in page] == []


ALLOWED = {
    "run.steps": 9, "optim.lr": 1e-3, "optim.interaction_lr_scale": 0.5, "optim.schedule.warmup": 0.5,
    "optim.schedule.name": "wsd", "optim.schedule.decay": 0.1, "optim.schedule.final": 0.0, "optim.grad_clip": 0.1,
    "optim.schedule.surge.factor": 2.0, "optim.schedule.surge.start": 0.5, "optim.schedule.surge.length": 0.1,
    "data.batch_schedule": [{"start_step": 5, "global_batch_size": 8}],
    "stability.zclip": True, "engine.precision": "bf16", "engine.grad_accum_dtype": "bf16",
    "engine.moment_dtype": "bf16", "data.global_batch_size": 6, "data.seed": 9, "data.shuffle": "block",
    "data.packing": "best_fit", "data.skip_windows": [[8, 10]], "moe.top_k": 1, "moe.score": "softmax",
    "moe.router_precision": "bf16",
    "moe.renormalize": False, "moe.routed_scaling": 1.0, "moe.expert_groups": 2, "moe.top_groups": 2,
    "moe.bias_update": "sign", "moe.bias_update_rate": 0.1, "moe.auxiliary_loss.weight": 0.1,
    "moe.auxiliary_loss.scope": "previous_step", "moe.z_loss_weight": 0.1, "moe.routing_warmup_steps": 9,
    "moe.routing_seed": 4, "model.seq_len": 32, "model.rope_theta": 100.0, "model.partial_rotary_factor": 0.5,
    "model.rope_scaling": "linear", "model.rope_factor": 2.0, "model.rope_original_seq_len": 64,
    "model.rope_beta_fast": 16.0, "model.rope_beta_slow": 2.0, "model.rope_attention_factor": 1.0,
    "checkpoint.keep_last": 3,
}  # fmt: skip
ELSEWHERE = ("data.sources", "data.phases")
"""Tried by a test of their own."""


def changed(config: RunConfig, **values: Any) -> RunConfig:
    """`config` with other values at dotted keys, whether they make sense together or not."""
    plain = to_plain(config)
    for key, value in values.items():
        *path, last = key.split(".")
        section = plain
        for name in path:
            section = section[name]
        section[last] = value
    return build(RunConfig, plain)


def test_each_setting_on_the_list_may_differ_and_is_named(parent: Path, small: list[str]) -> None:
    listed = {key for key in flatten(to_plain(compose([]))) if may_differ(key, MAY_BRANCH)}
    assert {key for key in listed if not key.startswith("checkpoint.")} <= ALLOWED.keys() | {*ELSEWHERE}
    checkpoint, base = at(parent), compose([*small, *SMALL])
    for key, value in ALLOWED.items():
        if key == "moe.top_groups":
            continue
        branch = Branch(changed(base, **{key: value}), checkpoint, {})
        assert [name for name, _, _ in branch.changes] == ([key] if key != "checkpoint.keep_last" else []), key


MEANT = {
    "model.norm_eps": 1e-5, "optim.betas": [0.8, 0.9], "optim.eps": 1e-5, "optim.weight_decay": 0.0, "run.seed": 1,
    "stability.policy": "skip", "data.isolate_documents": False, "model.init_std": 0.5,
    "optim.interaction_decay": "none",
}  # fmt: skip


def test_any_other_setting_is_refused_with_both_values_and_fixes_that_work(parent: Path, small: list[str]) -> None:
    checkpoint, base = at(parent), compose([*small, *SMALL])
    for key, value in MEANT.items():
        with pytest.raises(ResumeError) as refused:
            Branch(changed(base, **{key: value}), checkpoint, {})
        error, before = refused.value, flatten(to_plain(base))[key]
        assert (error.field, error.value) == (key, value) and repr(before) in error.allowed
        assert f"{before!r} -> {value!r}" in error.problem
        typed = [f"{key}={str(value).lower().replace(' ', '')}"]
        for way in error.typed_fixes:
            Branch(compose([*small, *SMALL, *typed, way.typed.strip("'")]), checkpoint, {})
    assert len(error.typed_fixes) == 2


@pytest.mark.parametrize("overrides", [["model.layers=2"], ["attention=mha"], ["moe.shared_experts=1"]])
def test_a_model_of_other_parameters_is_refused(parent: Path, small: list[str], overrides: list[str]) -> None:
    with pytest.raises(ResumeError) as refused:
        Branch(compose([*small, *SMALL, *overrides]), at(parent), {})
    assert refused.value.fix and "allow_changes" not in refused.value.fix


def test_another_optimiser_is_refused_with_fixes_that_work(trained: Train, small: list[str]) -> None:
    """Its fields come with its preset, and no permission makes room for other states."""
    checkpoint, typed = at(trained("optim=muon", "optim.iterations=4")), [*small, *SMALL, "optim=adamw"]
    with pytest.raises(ResumeError) as refused:
        Branch(compose(typed), checkpoint, {})
    restored, weights = (way.typed for way in refused.value.typed_fixes)
    assert {"optim=muon", "optim.iterations=4"} <= {*restored.split()}
    Branch(compose([*typed, *restored.split()]), checkpoint, {})
    assert weights == f"run.branch_from='' run.init_from={checkpoint.path}"
    with pytest.raises(ResumeError) as refused:
        check_belongs(compose([*typed, f"run.dir={checkpoint.path.parents[1]}"]), checkpoint, {})
    assert f"run.init_from={checkpoint.path}" in refused.value.fix and "allow_changes" not in refused.value.fix


def test_other_data_are_refused_unless_they_are_meant(parent: Path, small: list[str]) -> None:
    config, other = compose([*small, *SMALL]), {"data_content_id": "c0ffee" * 10}
    with pytest.raises(ResumeError, match="data_content_id"):
        Branch(config, at(parent), other)
    meant = compose([*small, *SMALL, "resume.allow_changes=[data_content_id]"])
    assert [key for key, _, _ in Branch(meant, at(parent), other).changes] == ["data_content_id"]


def test_a_refused_branch_leaves_no_directory(parent: Path, small: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "new"
    with pytest.raises(ResumeError):
        train(compose([*small, *SMALL, from_(parent), "model.layers=2", f"run.dir={run_dir}"]))
    with pytest.raises(ConfigError, match="no step is left") as refused:
        train(compose([*small, *SMALL, from_(parent), f"run.steps={SPLIT}", f"run.dir={run_dir}"]))
    assert refused.value.field == "run.steps" and not run_dir.exists()


def test_weights_and_whole_state_exclude_each_other(parent: Path, small: list[str]) -> None:
    both = [*small, from_(parent), f"run.init_from={parent}"]
    with pytest.raises(ConfigError) as refused:
        compose(both)
    for way in refused.value.typed_fixes:
        compose([*both, way.typed])


def test_a_branch_has_a_directory_of_its_own(parent: Path, small: list[str], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(parent)
    for own in (parent, tmp_path / "link"):
        for source in (parent, at(parent).path):
            with pytest.raises(ConfigError) as refused:
                compose([*small, f"run.dir={own}", f"run.branch_from={source}"])
            compose([*small, f"run.branch_from={source}", refused.value.typed_fixes[0].typed])
    assert compose([from_(parent)]).run.dir != compose([]).run.dir != compose([from_(parent, 4)]).run.dir


def test_longer_rows_go_on_with_the_samples_and_count_their_own_tokens(
    trained: Train, parent: Path, small: list[str]
) -> None:
    longer = ["model.seq_len=128", "model.rope_scaling=yarn", "model.rope_factor=2", "model.rope_original_seq_len=64"]
    branch = trained(from_(parent), *longer)
    own, before = read_metrics(branch), read_metrics(parent)
    assert [line["samples_first"] for line in own] == [line["samples_first"] for line in before[SPLIT:]]
    assert [line["tokens"] for line in own] == [SPLIT * 4 * 64 + count * 4 * 128 for count in range(1, 5)]
    train(compose([*small, *SMALL, *longer, f"run.dir={branch}", from_(parent)]))
    with pytest.raises(ResumeError, match="model.rope_factor"):
        train(compose([*small, *SMALL, *longer, "model.rope_factor=4", f"run.dir={branch}", from_(parent)]))
    stream = open_stream(compose([*small, *SMALL, "model.seq_len=128"]), samples_seen=own[0]["samples_first"])
    assert next(stream).tokens_BT.shape == (4, 128)


@pytest.mark.slow
def test_another_batch_size_goes_on_after_the_last_sample(trained: Train, parent: Path) -> None:
    branch = trained(from_(parent), "data.global_batch_size=6", "engine.micro_batch_size=3")
    ranges = [(line["samples_first"], line["samples_last"]) for line in read_metrics(branch)]
    assert ranges == [(8, 13), (14, 19), (20, 25), (26, 31)]


@pytest.mark.slow
def test_a_mixture_may_change_its_weights_and_its_phases(small: list[str], trained: Train, dataset: Path) -> None:
    def mixed(first: float, *more: str) -> list[str]:
        sources = ", ".join(
            f"{{name: {name}, path: {dataset}/{split}, weight: {weight}}}"
            for name, split, weight in (("a", "train", first), ("b", "validation", 1.0))
        )
        return ["data.train=''", f"data.sources=[{sources}]", *more]

    whole = trained(*mixed(1.0), "run.steps=4")
    phases = "data.phases=[{start_sample: 1024, weights: [1.0, 9.0]}]"
    branch = Branch(compose([*small, *SMALL, *mixed(3.0, phases)]), at(whole), {})
    assert {key for key, _, _ in branch.changes} == {"data.sources", "data.phases", "run.steps"}
    assert branch.changes_the_loss


def test_a_router_that_counts_more_begins_its_counts_where_the_run_stands(parent: Path, small: list[str]) -> None:
    auxiliary = ["moe.auxiliary_loss.weight=0.1", "moe.auxiliary_loss.scope=previous_step"]
    config = compose([*small, *SMALL, "moe.routing_warmup_steps=9", *auxiliary])
    engine, _ = opened(config, at(parent))
    buffers = engine.buffers()
    saved = at(parent).buffers()
    for name, buffer in buffers.items():
        expected = saved.get(name, torch.full_like(buffer, SPLIT if name.endswith("steps_done") else 1.0))
        assert torch.equal(buffer, expected), name


def test_a_jump_of_the_rate_is_told_and_recorded(
    trained: Train, parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    branch = trained(from_(parent), "optim.lr=0.1")
    (event,) = [event for event in read_events(branch) if event["kind"] == "learning_rate_changed"]
    assert event["now"] == pytest.approx(10 * event["planned"])
    assert "note: the learning rate of step 3" in capsys.readouterr().out


# Interactions.


def opened(config: RunConfig, checkpoint: Checkpoint) -> tuple[PlainEngine, Branch]:
    """An engine filled by a branch, in this process alone."""
    branch = Branch(config, checkpoint, {})
    engine = PlainEngine(config, World.single(), branch)
    branch.restore(engine)
    return engine, branch


def loss(engine: PlainEngine) -> float:
    batch = next(next(open_stream(engine.config, samples_seen=40)).micro_batches(4))
    return engine.evaluate(batch).loss_sum.item()


@pytest.mark.parametrize(
    "interaction",
    [["attention=kha_mlp"], ["attention=kha_linear"], ["attention=mea", "attention.interaction.head_norm=false"]],
)
def test_an_interaction_is_inserted_as_the_identity_with_moments_of_zero(
    parent: Path, small: list[str], interaction: list[str]
) -> None:
    before, _ = opened(compose([*small, *SMALL]), at(parent))
    after, branch = opened(compose([*small, *SMALL, *interaction]), at(parent))
    assert loss(after) == pytest.approx(loss(before), rel=1e-6) and loss(before) != 0
    assert branch.inserted and all(".interaction." in name for name in branch.inserted)
    for part in after.fragments():
        for kind, view in part.views.items():
            if part.name in branch.inserted:
                assert kind == "master" or not view.count_nonzero(), part.name
            else:
                assert torch.equal(view, at(parent).read(part.name, kind)), (part.name, kind)


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        (["attention=mea"], "attention.interaction.head_norm=false"),
        (["attention=kha_mlp", "attention.interaction.init.kind=random"], "attention.interaction.init.kind=identity"),
    ],
)
def test_what_does_not_begin_as_the_identity_is_not_inserted(
    parent: Path, small: list[str], settings: list[str], fix: str
) -> None:
    with pytest.raises(ResumeError, match="does not begin as the identity") as refused:
        Branch(compose([*small, *SMALL, *settings]), at(parent), {})
    (way,) = refused.value.typed_fixes
    assert fix in way.typed
    Branch(compose([*small, *SMALL, *settings, *way.typed.split()]), at(parent), {})


def test_a_linear_interaction_is_absorbed_into_its_projections(linear: Path, small: list[str]) -> None:
    checkpoint = at(linear)
    before, _ = opened(compose([*small, *SMALL, *LINEAR]), checkpoint)
    after, branch = opened(compose([*small, *SMALL]), checkpoint)
    assert loss(after) == pytest.approx(loss(before), rel=1e-6)
    assert branch.absorbed == {f"blocks.0.attention.{name}.weight" for name in ("key", "value")}
    shapes = checkpoint.names()
    for part in after.fragments():
        for kind, view in part.views.items():
            saved = checkpoint.read(part.name, kind)
            if part.name not in branch.absorbed:
                assert torch.equal(view, saved), (part.name, kind)
            elif kind != "master":
                assert not view.count_nonzero(), (part.name, kind)
            else:
                kind_of = {"key": "k", "value": "v"}[part.name.split(".")[-2]]
                (name,) = [name for name in shapes if f".interaction.maps.{kind_of}." in name]
                matrix = checkpoint.read(name, "master").view(shapes[name]).double().numpy()
                weight = saved.view(shapes[part.name]).double().numpy().reshape(-1, len(matrix), shapes[part.name][1])
                expected = np.einsum("hdi,de->hei", weight, matrix).reshape(shapes[part.name])
                assert not np.allclose(expected, saved.view(shapes[part.name]), atol=1e-5)
                np.testing.assert_allclose(view.view(shapes[part.name]), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("components", [1, 4])
def test_a_composition_of_another_number_of_heads_is_absorbed_into_projections_of_all(
    components: int, trained: Train, small: list[str]
) -> None:
    """MEA with h' != G: the parent projects h' heads of keys and values, and the branch two."""
    mea = [
        "attention=mea", "attention.interaction.head_norm=false", f"attention.interaction.component_heads={components}",
    ]  # fmt: skip
    checkpoint = at(trained(*mea, f"run.steps={SPLIT}"))
    before, _ = opened(compose([*small, *SMALL, *mea]), checkpoint)
    after, branch = opened(compose([*small, *SMALL]), checkpoint)
    assert loss(after) == pytest.approx(loss(before), rel=1e-6)
    assert branch.absorbed == {f"blocks.0.attention.{name}.weight" for name in ("key", "value")}
    for part in after.fragments():
        moments = [view for kind, view in part.views.items() if kind != "master"]
        assert any(view.count_nonzero() for view in moments) == (part.name not in branch.absorbed)
    for settings in (["model.head_dim=8"], ["model.hidden_size=48"]):
        with pytest.raises(ResumeError) as refused:
            Branch(compose([*small, *SMALL, *settings]), checkpoint, {})
        assert "init_from" not in str(refused.value.fix).partition("run.branch_from")[0]


@pytest.mark.slow
def test_what_acts_on_activations_is_not_absorbed(trained: Train, small: list[str]) -> None:
    source = trained("attention=kha_mlp", "run.steps=2")
    with pytest.raises(ResumeError) as refused:
        Branch(compose([*small, *SMALL]), at(source), {})
    assert str(refused.value.field).startswith("attention.interaction.")
    assert "run.init_from=" in str(refused.value.fix)


@pytest.mark.slow
def test_an_absorbed_run_trains_on_under_every_stage(trained: Train, linear: Path) -> None:
    ends = [trained(from_(linear), f"engine.zero_stage={stage}") for stage in (1, 3)]
    losses = [[line["train/loss"] for line in read_metrics(run)] for run in ends]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] == pytest.approx(read_metrics(linear)[SPLIT]["train/loss"], rel=1e-5)


# What others see of it.


def test_a_checkpoint_is_held_until_the_engine_is_filled(
    trained: Train, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = Branch.restore

    def restore(branch: Branch, engine: Any) -> Any:
        with alone(branch.checkpoint.path) as free:
            seen.append(free)
        return real(branch, engine)

    monkeypatch.setattr(Branch, "restore", restore)
    trained(from_(parent))
    with alone(at(parent).path) as free:
        assert (seen, free) == ([False], True)


def test_comparison_status_spikes_and_goodput_know_a_branch(trained: Train, parent: Path) -> None:
    same, faster = trained(from_(parent)), trained(from_(parent), "optim.lr=0.02")
    comparison = compare_runs([parent, same])
    (pair,) = comparison.pairs
    assert pair.caveats == () and pair.same_data and (pair.first_step, pair.last_step) == (5, STEPS)
    assert pair.difference is not None and pair.difference.mean == 0.0
    assert "until step 2 both are one run" in pair.notes
    assert comparison.summaries[1].honesty["missing"] == 0 == comparison.summaries[0].honesty["missing"]
    assert comparison.summaries[1].told["parent"] == str(at(parent).path)
    assert json.dumps(comparison.to_dict(), allow_nan=False)
    (unfair,) = compare_runs([parent, faster]).pairs
    assert [confounder.partition(" ")[0] for confounder in unfair.confounders] == ["optim.lr"]
    siblings = compare_runs([same, faster]).pairs[0]
    assert "until step 2 both are one run" in siblings.notes
    status = run_status(same)
    assert (status.step, status.steps, status.state) == (STEPS, STEPS, "done")
    assert [point.step for point in score_curve(read_curve(same)).curve.points] == [3, 4, 5, 6]
    spent = goodput_of(totals_of(same), read_run(same)["attempts"])
    assert spent is not None and 0 < spent.share < 1


@pytest.mark.slow
def test_branches_that_left_at_different_steps_are_no_fair_pair(trained: Train, parent: Path) -> None:
    early, late = trained(from_(parent)), trained(from_(parent, 4))
    (pair,) = compare_runs([early, late]).pairs
    assert pair.confounders == ("their states before step 5: one run until step 2 alone",)
    other = trained("optim.lr=0.02")
    (unrelated,) = compare_runs([other, late]).pairs
    assert any("run.branch_from" in confounder for confounder in unrelated.confounders)


@pytest.mark.slow
def test_wandb_shows_the_parent(trained: Train, parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened_with: list[dict[str, Any]] = []

    def init(**given: Any) -> Any:
        opened_with.append(given)
        raise RuntimeError("seen")

    monkeypatch.setattr(wandb, "init", init)
    branch = trained(from_(parent), "telemetry.wandb.mode=offline")
    shown = opened_with[0]["config"]["parent"]
    assert (shown["run_id"], shown["step"]) == (read_run(parent)["run_id"], SPLIT)
    assert shown["manifest"] == read_run(branch)["parent"]["manifest"]
    assert "parent" not in to_plain(compose([]))


def test_a_missing_parent_is_named(small: list[str], tmp_path: Path) -> None:
    with pytest.raises(KhaError, match="no such directory"):
        train(compose([*small, f"run.branch_from={tmp_path}/none", f"run.dir={tmp_path}/run"]))
