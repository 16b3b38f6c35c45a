"""F12: other world sizes and ZeRO stages continue with the same samples and the same fp32 state, bit for bit; so does a
branch on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kha_train.analysis.heads.analyze import inspect
from kha_train.analysis.heads.probe_rows import open_probe
from kha_train.checkpoint.manifest import TRAINER_FILE
from kha_train.checkpoint.reader import open_verified
from kha_train.config.compose import compose
from kha_train.decode.generate import materialise
from kha_train.distributed import World

pytestmark = pytest.mark.slow

STEPS = 21
EXPERTS, ROWS = ("engine.expert_parallel=2",), ("engine.context_parallel=2",)
LAYOUTS: dict[str, list[tuple[int, int, tuple[str, ...]]]] = {
    "1 -> 2 -> 1 ranks, ZeRO 1 -> 3 -> 2": [(1, 1, ()), (2, 3, ()), (1, 2, ())],
    "2 -> 1 -> 2 ranks, ZeRO 3 -> 2 -> 1": [(2, 3, ()), (1, 2, ()), (2, 1, ())],
    "2 -> 2 -> 2 ranks, ZeRO 1 -> 3 -> 2, EP 2 -> 1 -> 2": [(2, 1, EXPERTS), (2, 3, ()), (2, 2, EXPERTS)],
    "2 -> 1 -> 2 ranks, ZeRO 1 -> 2 -> 3, CP 2 -> 1 -> 2": [(2, 1, ROWS), (1, 2, ()), (2, 3, ROWS)],
}
"""Ranks, ZeRO stage, and what ranks share."""


@pytest.mark.parametrize(
    ("layouts", "variant"),
    [
        pytest.param("1 -> 2 -> 1 ranks, ZeRO 1 -> 3 -> 2", "gqa", marks=pytest.mark.quick),
        ("1 -> 2 -> 1 ranks, ZeRO 1 -> 3 -> 2", "kha_mlp"),
        ("2 -> 1 -> 2 ranks, ZeRO 3 -> 2 -> 1", "gqa"),
        ("2 -> 1 -> 2 ranks, ZeRO 3 -> 2 -> 1", "kha_mlp"),
        pytest.param("2 -> 2 -> 2 ranks, ZeRO 1 -> 3 -> 2, EP 2 -> 1 -> 2", "kha_mlp", marks=pytest.mark.soak),
        ("2 -> 1 -> 2 ranks, ZeRO 1 -> 2 -> 3, CP 2 -> 1 -> 2", "kha_mlp"),
    ],
)
def test_a_run_that_changes_ranks_and_stage_follows_the_straight_curve(
    layouts: str, variant: str, make_run: Callable, straight: Callable
) -> None:
    twin = straight(f"attention={variant}", steps=STEPS)
    run = make_run(f"attention={variant}", steps=STEPS)
    for number, (ranks, zero, shared) in enumerate(LAYOUTS[layouts], start=1):
        faults = [{"at": f"batch:{7 * number}", "do": "term", "rank": ranks - 1}] if number < 3 else []
        layout = (f"engine=zero{zero}", *shared)
        codes = run.start(*faults, ranks=ranks, overrides=layout)
        assert codes == [0] * ranks, run.log.read_text()
    assert run.starts() == [0, 7, 14]
    moved, kept = run.curve(), twin.curve()
    for key in ("step", "samples_first", "samples_last", "tokens", "train/lr"):
        assert [line[key] for line in moved] == [line[key] for line in kept], key
    assert max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(moved, kept, strict=True)) < 1e-5


GROWS = ("data.batch_schedule=[{start_step: 3, global_batch_size: 16}, {start_step: 5, global_batch_size: 12}]",)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_batch_that_changes_is_that_of_runs_whose_batch_was_changed_by_hand(
    zero: int, make_run: Callable, straight: Callable
) -> None:
    """On two ranks, whose micro-batches per step change with it: 4, 8 and 6."""
    settings = ("attention=kha_mlp", f"engine=zero{zero}", "engine.micro_batch_size=1")
    grown, by_hand = straight(*settings, *GROWS, ranks=2), make_run(*settings)
    for step, rows in ((2, 8), (4, 16), (6, 12)):
        changed = (f"data.global_batch_size={rows}", "resume.allow_changes=[data.global_batch_size]")
        faults = [{"at": f"batch:{step}", "do": "term"}] if step < 6 else []
        assert by_hand.start(*faults, ranks=2, overrides=changed) == [0, 0], by_hand.log.read_text()
    assert by_hand.starts() == [0, 2, 4]
    assert [line["samples_last"] + 1 for line in grown.curve()] == [8, 16, 32, 48, 60, 72]
    # The attempts have other settings, and so has trainer.json.
    mine, theirs = ([line | {"attempt": 1} for line in run.curve()] for run in (grown, by_hand))
    assert mine == theirs
    ended, expected = grown.final_state(), by_hand.final_state()
    assert ended.pop(TRAINER_FILE) != expected.pop(TRAINER_FILE)
    assert ended == expected


def test_a_run_with_a_schedule_that_changes_ranks_stage_and_groups_follows_the_straight_curve(
    make_run: Callable, straight: Callable
) -> None:
    settings = ("attention=kha_mlp", "engine.micro_batch_size=2", *GROWS)
    twin, run = straight(*settings), make_run(*settings)
    layouts: list[tuple[int, int, tuple[str, ...]]] = [(2, 1, ROWS), (1, 3, ()), (2, 2, EXPERTS)]
    for number, (ranks, zero, shared) in enumerate(layouts, start=1):
        faults = [{"at": f"batch:{2 * number + 1}", "do": "term"}] if number < 3 else []
        assert run.start(*faults, ranks=ranks, overrides=(f"engine=zero{zero}", *shared)) == [0] * ranks
    assert run.starts() == [0, 3, 5]
    moved, kept = run.curve(), twin.curve()
    for key in ("step", "samples_first", "samples_last", "tokens", "train/lr"):
        assert [line[key] for line in moved] == [line[key] for line in kept], key
    assert max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(moved, kept, strict=True)) < 1e-5


@pytest.mark.parametrize("layout", [("engine=zero3",), ("engine=zero1", *EXPERTS)], ids=["ZeRO 3", "EP 2"])
def test_a_branch_on_two_ranks_continues_bit_equal_to_its_parent(
    layout: tuple[str, ...], make_run: Callable, straight: Callable
) -> None:
    settings = ("attention=kha_mlp", *layout)
    parent = straight(*settings, ranks=2)
    branch = make_run(*settings, f"run.branch_from={parent.run_dir}/checkpoints/step-00000004")
    branch.to_the_end(ranks=2)
    assert branch.starts() == [4] and branch.curve() == parent.curve()[4:]
    ended, expected = branch.final_state(), parent.final_state()
    # The trainer's state names the parent of a branch.
    assert ended.pop(TRAINER_FILE) != expected.pop(TRAINER_FILE)
    assert ended == expected and len(ended) == 4


@pytest.fixture(scope="module")
def written(straight: Callable) -> Path:
    """A run directory with a trained checkpoint."""
    return straight("attention=kha_mlp", steps=6).run_dir


@pytest.fixture(scope="module")
def written_by_two(straight: Callable) -> Path:
    """As `written`, by two ranks that shared the experts."""
    settings = ("attention=kha_mlp", "engine=zero1", "engine.expert_parallel=2")
    return straight(*settings, steps=6, ranks=2).run_dir


@pytest.mark.soak
@pytest.mark.parametrize(("ranks", "zero", "shared"), [(4, 2, 4), (4, 1, 2), (3, 3, 1), (1, 3, 1)])
def test_a_state_written_by_ranks_that_shared_the_experts_fits_every_layout(
    written_by_two: Path, ranks: int, zero: int, shared: int, run_ranks: Callable, small: list[str], tmp_path: Path
) -> None:
    check_handed_over(written_by_two, (ranks, zero, shared), run_ranks, small, tmp_path)


@pytest.mark.parametrize(("ranks", "zero", "shared"), [(1, 3, 1), (2, 1, 1), (2, 2, 1), (2, 3, 1), (2, 1, 2)])
def test_every_layout_takes_over_the_same_state_bit_for_bit_and_reads_only_its_share(
    written: Path, ranks: int, zero: int, shared: int, run_ranks: Callable, small: list[str], tmp_path: Path
) -> None:
    check_handed_over(written, (ranks, zero, shared), run_ranks, small, tmp_path)


def check_handed_over(
    written: Path, layout: tuple[int, int, int], run_ranks: Callable, small: list[str], tmp_path: Path
) -> None:
    """Ranks of another layout read the checkpoint in `written`, and write it again: bit for bit the same."""
    ranks, zero, shared = layout
    overrides = [*small, "attention=kha_mlp", f"engine=zero{zero}", f"engine.expert_parallel={shared}"]
    overrides += ["run.dir=unused", "run.steps=6", "data.global_batch_size=24", "engine.micro_batch_size=1"]
    worker = Path(__file__).parent / "elastic_worker.py"
    answers = run_ranks(worker, ranks, source=str(written), target=str(tmp_path), overrides=overrides)
    before, after = (open_verified(path, World.single()) for path in (written, tmp_path))
    assert before.names() == after.names()
    for name in before.names():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(before.read(name, kind), after.read(name, kind)), (name, kind)
    biases, again = before.buffers(), after.buffers()
    assert biases.keys() == again.keys()
    assert all(torch.equal(biases[name], again[name]) for name in biases)
    assert any(bias.abs().max() > 0 for bias in biases.values())
    for field in ("progress", "optimizer_steps"):
        assert before.trainer_state[field] == after.trainer_state[field]
    # What `kha analyze` sees does not depend on who wrote a checkpoint.
    config = compose(overrides)
    rows = open_probe(config, 128)
    seen = [
        inspect(materialise(config, one, torch.device("cpu")), one.step, "", rows, True, lambda count: None)
        for one in (before, after)
    ]
    assert seen[0] == seen[1] and len(seen[0].layers) == config.model.layers

    kept = sum(buffer.nbytes for buffer in biases.values())
    assert sum(answer["owned"] for answer in answers) == 3 * sum(shape.numel() for shape in _shapes(before))
    assert all(answer["read"] <= 1.1 * 4 * answer["owned"] + kept for answer in answers)
    assert all(answer["largest"] <= 1024 for answer in answers)


def _shapes(checkpoint) -> list[torch.Size]:
    return [torch.Size(shape) for shape in checkpoint.names().values()]
