"""docs/errors.md is the catalogue of common errors: each entry is provoked here, and its fix is applied."""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb

from kha_train.checkpoint.reader import directory_of
from kha_train.config.compose import compose
from kha_train.config.resolve import Device, resolve
from kha_train.config.validate_ranks import validate_batch
from kha_train.data.format.manifest import TokenizerEntry
from kha_train.data.format.writer import prepare, publish_dataset, write_shard
from kha_train.data.stream import open_stream
from kha_train.distributed import World
from kha_train.errors import KhaError
from kha_train.record.lock import RunLock
from kha_train.stability.events import Observation
from kha_train.telemetry.wandb import WandbMirror
from kha_train.train.memory import explained_when_out_of_memory
from kha_train.train.preempt import time_warning
from kha_train.train.run import train
from kha_train.train.watch import Watch

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
ENTRIES = dict(re.findall(r"^## (E\d\d): .*\n\n((?:- .*\n?)+)", PAGE, flags=re.MULTILINE))


class Place:
    """Settings of a small run, and a folder of the case."""

    def __init__(self, small: list[str], folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.small, self.folder, self.patch = small, folder, patch

    def compose(self, *overrides: str) -> Any:
        return compose([*self.small, f"run.dir={self.folder}/run", *overrides])


def typed(error: KhaError, number: int = 0) -> list[str]:
    """The settings that a fix of the error types."""
    return error.typed_fixes[number].typed.split()


def refused(act: Callable[[], object]) -> KhaError:
    with pytest.raises(KhaError) as raised:
        act()
    return raised.value


def e01(at: Place) -> KhaError:
    real = Path(at.compose().data.train)
    error = refused(lambda: open_stream(at.compose(f"data.train={real.parent}/trian")))
    open_stream(at.compose(f"data.train={re.search('did you mean (.*)[?]', str(error.fix))[1]}"))
    (at.folder / "binaries").mkdir()
    for name in ("a.bin", "b.bin"):
        (at.folder / "binaries" / name).touch()
    foreign = refused(lambda: open_stream(at.compose(f"data.train={at.folder}/binaries")))
    assert "2 files named *.bin" in str(foreign) and "kha data import" in str(foreign) and foreign.code == "E01"
    return error


def by_settings(*overrides: str, act: Callable[[Any], object] = lambda config: None) -> Callable[[Place], KhaError]:
    """A refused setting, and the settings that the error offers instead."""

    def case(at: Place) -> KhaError:
        error = refused(lambda: act(at.compose(*overrides)))
        for number in range(len(error.typed_fixes)):
            fix = typed(error, number)
            keys = {text.partition("=")[0] for text in fix}
            act(at.compose(*(text for text in overrides if text.partition("=")[0] not in keys), *fix))
        assert error.typed_fixes
        return error

    return case


def e05(at: Place) -> KhaError:
    error = refused(lambda: at.compose("attention=mla", "interaction@attention.interaction=knocking_mlp"))
    for fix in (["attention=mla", "interaction@attention.interaction=knocking_linear"], ["attention=kha_mlp"]):
        assert f"`{fix[-1]}`" in ENTRIES["E05"] and at.compose(*fix)
    return error


def e06(at: Place) -> str:
    costly = at.compose("attention=kha_mlp", "attention.interaction.projections=[q,v]").attention.interaction
    assert (
        at.compose("attention=kha_mlp", "attention.interaction.projections=[v]").attention.interaction.warnings() == []
    )
    (warning,) = costly.warnings()
    return warning


def e08(at: Place) -> KhaError:
    settings = ["engine.name=plain", "model.layers=1", "run.steps=1", "checkpoint.background=false"]
    train(at.compose(*settings))
    error = refused(lambda: train(at.compose(*settings, "model.rope_theta=500.0")))
    assert "model.rope_theta" in str(error) and "10000.0 -> 500.0" in str(error)
    train(at.compose(*settings))
    train(compose([*at.small, *settings, "model.rope_theta=500.0", f"run.dir={at.folder}/other"]))
    return error


def e09(at: Place) -> KhaError:
    (at.folder / "foreign" / "global_step10").mkdir(parents=True)
    (at.folder / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    directory_of(at.folder / "run" / "checkpoints" / "step-00000001")
    return refused(lambda: directory_of(at.folder / "foreign"))


def e11(at: Place) -> KhaError:
    def step() -> None:
        with explained_when_out_of_memory(config, World.single(), lambda: False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    config = at.compose("engine.micro_batch_size=8")
    error = refused(step)
    offered = re.search(r"engine\.micro_batch_size=(\d+)", str(error.fix))
    assert offered and at.compose(offered[0]).engine.micro_batch_size < 8
    return error


def e12(at: Place) -> str:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        at.patch.delenv(name, raising=False)
    at.patch.setenv("NETRC", str(at.folder / "none"))
    at.patch.setattr(wandb, "init", lambda **given: SimpleNamespace(define_metric=lambda *a, **b: None))
    said: list[str] = []
    for mode in ("auto", "offline"):
        WandbMirror(at.compose(f"telemetry.wandb.mode={mode}"), at.folder, "id", warn=said.append)
    assert len(said) == 1, "offline was asked for, so it is no news"
    return said[0]


HOLD = """
import sys, pathlib, kha_train.record.lock as lock
held = lock.RunLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def e13(at: Place) -> KhaError:
    (at.folder / "run").mkdir()
    command = [sys.executable, "-c", HOLD, str(at.folder / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline()
        error = refused(lambda: RunLock(at.folder / "run"))
        other.kill()
    assert f"process {other.pid}" in str(error) and re.search(r"heard of \d+ s ago", str(error))
    RunLock(at.folder / "run").close()
    return error


def e14(at: Place) -> KhaError:
    watch = Watch(at.compose("stability.max_nonfinite_steps=1"))
    watch.judge(Observation(1, math.nan, math.nan, samples_first=0))
    calm = Watch(at.compose("stability.max_nonfinite_steps=1"))
    calm.judge(Observation(1, 2.0, 1.0, samples_first=0))
    calm.check()
    return refused(watch.check)


def e15(at: Place) -> KhaError:
    error = refused(lambda: at.compose("model.hiden_size=64"))
    at.compose(f"{error.typed_fixes[0].typed}=64")
    return error


def tokenizer_case(content: bytes | None) -> Callable[[Place], KhaError]:
    def case(at: Place) -> KhaError:
        folder = at.folder / "shards"
        prepare(folder)
        shard = write_shard(folder, 0, [(np.arange(1, 200), 1)] * 9, vocab_size=256, dtype="uint16")
        digest = hashlib.sha256(b"the right one").hexdigest()
        entry = TokenizerEntry("single", 256, digest, "tokenizer.model", {"eos": 0}, (0, *[1] * 255))
        (folder / "tokenizer.model").write_bytes(b"the right one")
        publish_dataset(folder, [shard], entry, dtype="uint16", corpus={})
        file = folder / "tokenizer.model"
        file.unlink() if content is None else file.write_bytes(content)
        config = at.compose(f"data.train={folder}")
        error = refused(lambda: open_stream(config))
        file.write_bytes(b"the right one")
        open_stream(config)
        return error

    return case


def e18(at: Place) -> KhaError:
    error = refused(lambda: open_stream(at.compose("model.seq_len=10000000")))
    most = re.search(r"at most (\d+)", error.allowed or "")
    assert most and open_stream(at.compose(f"model.seq_len={most[1]}"))
    return error


def e19(at: Place) -> KhaError:
    World.from_environment({})
    World.from_environment({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    return refused(lambda: World.from_environment({"RANK": "0", "LOCAL_RANK": "0"}))


def e21(at: Place) -> str:
    config = at.compose("checkpoint.every_minutes=60", "run.max_minutes=30")
    warning = time_warning(config, {})
    fix = re.search(r"fix: checkpoint.every_minutes=(\d+)", warning)
    assert (
        fix
        and time_warning(replace(config, checkpoint=replace(config.checkpoint, every_minutes=int(fix[1]))), {}) == ""
    )
    by_slurm = time_warning(at.compose("checkpoint.every_minutes=60"), {"SLURM_JOB_END_TIME": "4000"}, now=1000.0)
    assert "50 minutes are left" in by_slurm
    never = at.compose("run.max_minutes=30", "run.steps=1000", "checkpoint.every_steps=1000")
    assert "= 0 (never): 30 minutes are left" in time_warning(never, {})
    assert time_warning(replace(never, checkpoint=replace(never.checkpoint, every_steps=999)), {}) == ""
    return warning


def lacking(name: str) -> str | None:
    return "not installed"


CASES: dict[str, Callable[[Place], KhaError | str]] = {
    "E01": e01,
    "E02": by_settings("model.vocab_size=512", act=open_stream),
    "E03": by_settings("model.kv_heads=3"),
    "E04": by_settings("model.head_dim=31"),
    "E05": e05,
    "E06": e06,
    "E07": by_settings(
        "data.global_batch_size=18", "engine.micro_batch_size=4", act=lambda config: validate_batch(config, 1)
    ),
    "E08": e08,
    "E09": e09,
    "E10": by_settings(
        "attention.backend=flash_attn", act=lambda config: resolve(config, Device("cuda", (9, 0), lacks=lacking))
    ),
    "E11": e11,
    "E12": e12,
    "E13": e13,
    "E14": e14,
    "E15": e15,
    "E16": tokenizer_case(None),
    "E17": tokenizer_case(b"another"),
    "E18": e18,
    "E19": e19,
    "E20": by_settings("engine.precision=bf16", act=lambda config: resolve(config, Device("cuda", (7, 5)))),
    "E21": e21,
}  # fmt: skip


def test_every_code_has_an_entry_a_case_and_a_place_in_the_code() -> None:
    assert list(ENTRIES) == list(CASES) == [f"E{number:02}" for number in range(1, 22)]
    for code, text in ENTRIES.items():
        assert [line.partition(":")[0] for line in text.splitlines()] == [
            "- exit code",
            "- where",
            "- likely",
            "- type",
        ]
        assert "`" in text.splitlines()[3], f"{code} says what to type"
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "kha_train").rglob("*.py")]
    used = {code for text in sources for code in re.findall(r"\bE\d\d(?=[\"'\]])", text)}
    assert used == set(CASES)


@pytest.mark.parametrize("code", CASES)
def test_an_entry_happens_as_the_page_says_and_its_fix_works(
    code: str, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    found = CASES[code](Place(small, tmp_path, monkeypatch))
    exits = re.findall(r"\d+", ENTRIES[code].splitlines()[0].removeprefix("- exit code:"))
    if isinstance(found, str):
        assert not exits and found.endswith(f"[{code}]") and found.count("\n") == 0
        return
    assert found.code == code and str(found.exit_code) in exits
    line = found.line()
    assert line.endswith(f" [{code}]") and line.startswith(f"{found.kind} error: ")
    assert found.fix or found.allowed or "; take " in line or "could not be absorbed" in line, line


def ranks(*arguments: str, folder: Path) -> tuple[int, str]:
    command = [sys.executable, "-c", "from kha_train.cli.main import run; run()", "train", "--ranks", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=280, check=False)
    return done.returncode, done.stderr


def said_by(error: str) -> Sequence[str]:
    return [line for line in error.splitlines() if " error: " in line]


def test_a_setting_that_no_rank_can_use_is_refused_before_any_rank_starts(small: list[str], tmp_path: Path) -> None:
    code, err = ranks(*small, "data.global_batch_size=9", folder=tmp_path)
    assert code == 2 and len(said_by(err)) == 1 and err.count("\n") == 1 and err.rstrip().endswith("[E07]")


@pytest.mark.slow
def test_several_ranks_say_one_line_and_nothing_of_the_launcher_stands_below_it(
    small: list[str], tmp_path: Path
) -> None:
    code, err = ranks(*small, "model.vocab_size=512", f"run.dir={tmp_path}/run", folder=tmp_path)
    assert code == 2 and len(said_by(err)) == 1
    assert "Traceback" not in err and "torch.distributed" not in err and "ChildFailed" not in err
    assert err.rstrip().splitlines()[-1].endswith("[E02]")
