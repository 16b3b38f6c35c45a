"""A job of 64 ranks in one process: its arithmetic, data and checkpoint, and the errors it would have had in the
queue.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kha_train import compose
from kha_train.cli.main import run
from kha_train.errors import ConfigError, ResumeError
from kha_train.operate.rehearse import Layout, rehearse
from kha_train.train.run import train

ROOT = Path(__file__).resolve().parents[2]
RANKS = 64


@pytest.fixture(scope="module")
def job(small: list[str]) -> list[str]:
    return [*small, "data.global_batch_size=128", "engine.micro_batch_size=1", "run.steps=300"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "attention", "frozen"),
    # Of q, k and v a matrix of 32 x 32 in each of two layers.
    [(1, [], 0), (3, ["attention=kha_linear", "attention.interaction.train=false"], 2 * 3 * 32**2)],
)
def test_a_rehearsal_of_64_ranks_is_the_arithmetic_of_the_job(
    stage: int,
    attention: list[str],
    frozen: int,
    job: list[str],
    clean_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    settings = [*job, *attention, f"engine=zero{stage}", f"world_size={RANKS}"]
    said = _rehearse(settings, clean_environment, tmp_path)
    rows, tokens = 128, 128 * 64
    assert said["batch"] == {
        "rows_a_step": rows,
        "rows_a_rank": 2,
        "micro_batches_a_step": 2,
        "tokens_a_step": tokens,
        "tokens": tokens * 300,
    }
    assert said["data"]["slices_first_step"] == [[2 * rank, 2 * rank + 1] for rank in range(RANKS)]
    parameters = said["model"]["parameters"]
    # A master and two moments in fp32 of every parameter, dealt out evenly but for what makes shares equally long. Rank
    # 0 also writes the matrices that are not trained, in fp32.
    assert said["checkpoint"]["gib"] * 2**30 == pytest.approx(12 * parameters + 4 * frozen)
    assert said["rank_0"]["built"] is True
    further = said["rank_0"]["checkpoint_bytes"] - 12 * parameters / RANKS - 4 * frozen
    assert 0 <= further < 12 * RANKS * said["model"]["tensors"]
    assert said["launch"]["nodes"] == 8 and "--nodes=8 --gpus-per-node=8" in said["launch"]["command"]
    assert list(tmp_path.iterdir()) == [], "a rehearsal leaves nothing behind"


def test_a_rehearsal_of_a_batch_that_grows_tells_the_largest_step_and_all_tokens(job: list[str]) -> None:
    config = compose([*job, "model.layers=1", "data.batch_schedule=[{start_step: 101, global_batch_size: 256}]"])
    said = rehearse(config, [], Layout(2, 2))
    assert said["batch"]["rows_a_step"] == 256 and said["batch"]["micro_batches_a_step"] == 128
    assert said["batch"]["tokens"] == (100 * 128 + 200 * 256) * 64
    assert said["data"]["slices_first_step"] == [[0, 63], [64, 127]]


@pytest.mark.parametrize(
    "settings, word",
    [
        (["world_size=48"], "data.global_batch_size"),
        (["--ranks=48"], "data.global_batch_size"),
        (["world_size=4", "--ranks-per-node=3"], "ranks"),
        (["world_size=many"], "world_size"),
        (["world_size=64", "data.train=/nowhere"], "/nowhere"),
    ],
)
def test_what_would_fail_after_the_queue_fails_now(
    settings: list[str], word: str, job: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["train", "--dry-run", *job, *settings])
    assert ended.value.code == 2
    assert word in capsys.readouterr().err


def _rehearse(settings: list[str], environment: dict[str, str], folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", "from kha_train.cli.main import run; run()", "train", "--dry-run", "--json"]
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, *settings], env=environment, capture_output=True, text=True, cwd=folder, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_backend_of_the_job_that_this_cpu_lacks_is_no_mistake_and_one_that_the_job_lacks_is(job: list[str]) -> None:
    overrides = [*job, "attention.backend=varlen"]
    layout = Layout(2, 2)
    said = rehearse(compose([*overrides, "cluster=h100_1x8"]), overrides, layout)
    assert said["rank_0"]["built"] is False and "needs a CUDA device" in said["rank_0"]["why"]
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        rehearse(compose([*overrides, "cluster=cpu"]), overrides, layout)


def test_a_branch_is_rehearsed_against_its_parent(job: list[str], tmp_path: Path) -> None:
    settings = [*job, "cluster=cpu", "data.global_batch_size=2", "run.steps=1"]
    train(compose([*settings, f"run.dir={tmp_path / 'parent'}"]))
    branch = [*settings, "run.steps=2", f"run.branch_from={tmp_path / 'parent'}", f"run.dir={tmp_path / 'branch'}"]
    said = rehearse(compose([*branch, "optim.lr=1e-5"]), branch, Layout(1, 1))
    assert said["branch"]["step"] == 1 and said["data"]["slices_first_step"] == [[2, 3]]
    assert [change.partition(" ")[0] for change in said["branch"]["changes"]] == ["optim.lr", "run.steps"]
    with pytest.raises(ResumeError, match="optim.weight_decay"):
        rehearse(compose([*branch, "optim.weight_decay=0"]), branch, Layout(1, 1))
    assert not (tmp_path / "branch").exists()
