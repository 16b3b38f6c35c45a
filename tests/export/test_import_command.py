"""`kha import`, and what people type next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kha_train.checkpoint.reader import find_newest
from kha_train.cli.main import run
from kha_train.distributed import World
from kha_train.train.progress import read_state

pytestmark = pytest.mark.slow


@pytest.fixture
def kha(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`kha(*arguments)` in an empty directory: exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(arguments)
        said = capfd.readouterr()
        return ended.value.code or 0, said.out, said.err

    return call


def test_the_printed_command_is_planned_rehearsed_and_trained_with_and_without_an_interaction(
    kha: Callable[..., Any], save_model: Callable[..., Any], dataset: Path
) -> None:
    save_model("glm4_moe", Path("stock"))
    code, out, err = kha("import", "stock", "--out", "base", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["class"] == "glm4_moe" and answer["interaction"] == "none" and answer["tokenizer"] is None
    Path("base/shards").symlink_to(dataset)
    command = [*shlex.split(answer["train"])[1:], "engine.micro_batch_size=2", "data.global_batch_size=2"]
    command += ["telemetry.wandb.mode=disabled", "validation.rows=2", "run.steps=1", "telemetry.peak_tflops=0.1"]
    for verb, further in ((("plan",), []), (("train", "--dry-run"), []), (("train",), ["attention=kha_mlp"])):
        code, out, err = kha(*verb, *command[1:], *further)
        assert code == 0, err
    inherited = find_newest(Path("base-trained"), World.single(), print)
    assert any(".interaction." in name for name in inherited.names())
    code, out, err = kha("generate", "base-trained", "--ids", "1,2,3", "--tokens", "4", "--json")
    assert code == 0 and len(json.loads(out)["ids"][0]) <= 4, err


def test_an_imported_run_is_a_run_with_one_whole_checkpoint_that_cannot_be_resumed(
    kha: Callable[..., Any], save_model: Callable[..., Any], dataset: Path
) -> None:
    save_model("deepseek_v3", Path("stock"))
    code, out, err = kha("import", "stock", "--out", "base", "interaction@attention.interaction=knocking_linear")
    assert code == 0 and "deepseek_v3 of" in out, err
    assert kha("checkpoint", "verify", "base")[0] == 0
    assert read_state(find_newest(Path("base"), World.single(), print)).progress.step == 0
    typed = next(line for line in out.splitlines() if "kha train" in line)
    command = [*shlex.split(typed)[2:], "run.dir=base", "run.init_from=''", "telemetry.wandb.mode=disabled"]
    Path("base/shards").symlink_to(dataset)
    code, out, err = kha("train", *command, "run.steps=1", "model.seq_len=64")
    assert code == 3 and "run.init_from=" in err and "Traceback" not in err, err
    assert kha("import", "stock", "--out", "base")[0] == 2
