"""F20, F19: fifty faults in one run directory end with the clean curve; two thousand steps need no more than fifty."""

from __future__ import annotations

import random
from pathlib import Path
from typing import get_args

import pytest

from kha_train.checkpoint.layout import candidates
from kha_train.checkpoint.writer import Stage

FAULTS = 50
STEPS = 160


def a_fault(source: random.Random, step: int) -> list[dict]:
    """One random fault near `step`, of those that leave the curve as it is."""
    rank, save = source.randrange(2), step + step % 2
    point = source.choice(
        [*(stage for stage in get_args(Stage) if stage != "between_renames"), "before_prune", "mid_prune"]
    )
    return source.choice(
        [
            [{"at": f"step:{step}", "do": "kill_all"}],
            [{"at": f"step:{step}", "do": "kill", "rank": rank}],
            [{"at": f"save:{save}:{point}", "do": "kill_all"}],
            [{"at": f"save:{save}:first_shard", "do": "kill", "rank": rank}],
            [
                {"at": f"save:{save}:mid_shard", "do": "enospc", "rank": rank},
                {"at": f"step:{save + 3}", "do": "kill_all"},
            ],
            [{"at": f"batch:{step}", "do": source.choice(["term", "usr2"]), "rank": rank}],
            [{"at": f"batch:{step}", "do": "data", "rank": rank}],
            [{"at": f"step:{step}", "do": "clock", "rank": rank}, {"at": f"step:{step + 2}", "do": "kill_all"}],
        ]
    )


def damage_newest(source: random.Random, run_dir: Path) -> None:
    """Flip a bit, cut or remove a file of the newest checkpoint, if an older one can take its place."""
    found = candidates(run_dir / "checkpoints")
    if len(found) < 2:
        return
    path = source.choice(sorted(path for path in found[0][1].iterdir() if path.name != "manifest.json"))
    content = bytearray(path.read_bytes())
    content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    path.write_bytes(content)


@pytest.mark.soak
def test_fifty_random_faults_end_with_the_clean_curve(make_run, straight) -> None:
    """Kills of one rank or all, between steps and inside saves, full disks, signals, bad reads, clocks, damage."""
    settings = ("attention=kha_mlp", "engine=zero2", "validation.every_steps=0", "checkpoint.keep_last=3")
    twin, run = straight(*settings, steps=STEPS, ranks=2), make_run(*settings, steps=STEPS)
    source, at = random.Random(6), 0
    for number in range(FAULTS):
        run.start(*a_fault(source, at + source.randint(3, 8)), ranks=2)
        at = min(run.starts()[-1], STEPS - 12) if run.run_dir.joinpath("run.json").exists() else 0
        if number % 7 == 6:
            damage_newest(source, run.run_dir)
    run.to_the_end(ranks=2)
    assert run.curve() == twin.curve()
    assert run.final_state() == twin.final_state()
    assert len(run.starts()) > 0.9 * FAULTS


@pytest.mark.soak
def test_two_thousand_steps_need_no_more_memory_files_or_threads_than_the_first_hundreds(run_ranks, small) -> None:
    _hold_flat(run_ranks, small, steps=2000, warm=400, every=100)


@pytest.mark.slow
def test_hundreds_of_steps_need_no_more_files_or_threads_than_the_first(run_ranks, small) -> None:
    _hold_flat(run_ranks, small, steps=300, warm=100, every=50)


def _hold_flat(run_ranks, small: list[str], steps: int, warm: int, every: int) -> None:
    tiny = ["model.layers=1", "model.hidden_size=32", "model.seq_len=16", "moe.expert_width=32"]
    overrides = [*small, *tiny, f"run.steps={steps}", "checkpoint.every_steps=20", "validation.every_steps=0"]
    worker = Path(__file__).parent / "leak_worker.py"
    (samples,) = run_ranks(worker, 1, fresh=True, overrides=overrides, every=every)
    settled = [sample for sample in samples if sample["step"] >= warm]
    assert len(settled) >= 4
    first, last = settled[0], settled[-1]
    assert abs(last["files"] - first["files"]) <= 2 and last["threads"] <= first["threads"] + 1
    assert last["mib"] - first["mib"] < 16, samples
