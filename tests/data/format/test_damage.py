"""Every damage to a dataset ends a run of two ranks: both with exit 4, none waiting, the fault named in the record."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_tools.synthetic import write_dataset
from kha_train.data.format import manifest as manifests

WORKER = Path(__file__).parent / "damage_worker.py"
pytestmark = pytest.mark.slow


def edit(directory: Path, change: Callable[[dict], None], *, forge: bool) -> None:
    """Change the manifest; forged, its content id fits again."""
    path = directory / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps({**raw, "content_id": manifests.content_id_of(raw)} if forge else raw))


def truncated(train: Path) -> None:
    os.truncate(train / "shard-00001.tok", 100)


def missing(train: Path) -> None:
    (train / "shard-00001.tok").unlink()


def swapped(train: Path) -> None:
    first, second = train / "shard-00000.tok", train / "shard-00001.tok"
    data = first.read_bytes()
    first.write_bytes(np.roll(np.frombuffer(data, dtype="<u2"), 7).tobytes())
    assert first.stat().st_size == len(data) and second.exists()


def random_bytes(train: Path) -> None:
    path = train / "shard-00001.tok"
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def beyond_the_vocabulary(train: Path) -> None:
    path = train / "shard-00001.tok"
    ids = np.fromfile(path, dtype="<u2")
    ids[:] = 60_000
    ids.tofile(path)


def damaged_ends(train: Path) -> None:
    path = train / "shard-00001.doc"
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


def edited(train: Path) -> None:
    edit(train, lambda raw: raw["corpus"].update(key=99), forge=False)


def climbing(train: Path) -> None:
    edit(train, lambda raw: raw["shards"][0]["tok"].update(file="../validation/shard-00000.tok"), forge=True)


def another_tokenizer(train: Path) -> None:
    (train / "tokenizer.model").write_bytes(b"not the one")
    edit(train, lambda raw: raw["tokenizer"].update(file="tokenizer.model"), forge=True)


CASES = {
    truncated: "shard-00001.tok.*expected .* bytes, found 100",
    missing: "shard-00001.tok.*cannot be read",
    swapped: "shard-00000.tok.*expected CRC-32 .*, found",
    random_bytes: "shard-00001.tok.*expected CRC-32 .*, found",
    beyond_the_vocabulary: "shard-00001.tok.*expected CRC-32 .*, found",
    damaged_ends: "shard-00001.doc.*expected CRC-32 .*, found",
    edited: "content_id",
    climbing: "bare file name",
    another_tokenizer: "not the tokenizer.*expected SHA-256 .*, found",
}


AT_A_URL = {
    swapped: "file://.*shard-00000.tok.*expected CRC-32 .*, found",
    missing: "file://.*shard-00001.tok.*no such file",
}


@pytest.mark.parametrize("damage", AT_A_URL, ids=lambda damage: damage.__name__)
def test_two_ranks_that_read_a_url_end_together_too(
    damage: Callable[[Path], None], small: list[str], tmp_path: Path, run_ranks: Callable[..., list[int]]
) -> None:
    write_dataset(tmp_path / "data", vocab_size=256, documents=120, seed=1, documents_per_shard=60)
    damage(tmp_path / "data" / "train")
    overrides = [*small, f"run.dir={tmp_path}/run", "run.steps=200", f"data.train=file://{tmp_path}/data/train"]
    overrides += [f"data.validation=file://{tmp_path}/data/validation", "data.global_batch_size=16"]
    assert run_ranks(WORKER, 2, overrides=[*overrides, f"data.cache_dir={tmp_path}/cache"]) == [4, 4]
    assert re.search(AT_A_URL[damage], (tmp_path / "run" / "FATAL").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("damage", CASES, ids=lambda damage: damage.__name__)
def test_two_ranks_end_together_with_exit_4_and_say_what_is_wrong(
    damage: Callable[[Path], None], small: list[str], tmp_path: Path, run_ranks: Callable[..., list[int]]
) -> None:
    write_dataset(tmp_path / "data", vocab_size=256, documents=120, seed=1, documents_per_shard=60)
    damage(tmp_path / "data" / "train")
    overrides = [*small, f"run.dir={tmp_path}/run", "run.steps=200", f"data.train={tmp_path}/data/train"]
    overrides += [f"data.validation={tmp_path}/data/validation", "data.global_batch_size=16"]
    assert run_ranks(WORKER, 2, overrides=overrides) == [4, 4]
    (fatal,) = (tmp_path / "run").glob("FATAL")
    assert re.search(CASES[damage], fatal.read_text(), flags=re.DOTALL)
