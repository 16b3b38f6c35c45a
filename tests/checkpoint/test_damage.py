"""Damage of any kind is detected, named, set aside and survived; nothing in a checkpoint is ever executed."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from kha_train.checkpoint import reader
from kha_train.checkpoint.manifest import Manifest, parse_manifest
from kha_train.checkpoint.reader import Checkpoint, check_sizes, find_newest, verify
from kha_train.checkpoint.retention import Keep, prune
from kha_train.distributed import World
from kha_train.errors import CheckpointError, FormatError, MachineError

FILES = ["manifest.json", "trainer.json", "model-00001.safetensors", "optimizer-00000.safetensors"]


def falls_back(run_dir: Path, save, run_ranks, damage, size: int = 2) -> str:
    """Save steps 1 and 2, damage 2; all ranks must then settle on 1. Returns rank 0's one report."""
    save(run_dir, 1, size=2)
    damage(save(run_dir, 2, size=2))
    reports: list[list[str]] = [[] for _ in range(size)]
    found = run_ranks(size, lambda world: find_newest(run_dir, world, reports[world.rank].append))
    assert [checkpoint.step for checkpoint in found] == [1] * size, found
    assert [len(lines) for lines in reports] == [1] * size, reports
    assert not (run_dir / "checkpoints" / "step-00000002").exists()
    return reports[0][0]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit_is_found_named_and_set_aside(tmp_path, save, run_ranks, file, size) -> None:
    def flip(path: Path) -> None:
        content = bytearray((path / file).read_bytes())
        content[random.Random(file).randrange(len(content))] ^= 1 << random.Random(size).randrange(8)
        (path / file).write_bytes(content)

    report = falls_back(tmp_path, save, run_ranks, flip, size)
    assert file in report and "step-00000002.corrupt" in report, report
    assert (tmp_path / "checkpoints" / "step-00000002.corrupt" / file).exists()


def test_every_single_bit_of_a_manifest_matters(tmp_path, save) -> None:
    raw = (save(tmp_path, 1) / "manifest.json").read_bytes()
    parse_manifest(raw)
    for position in range(len(raw)):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << (position % 8)
        with pytest.raises(CheckpointError) as raised:
            parse_manifest(bytes(flipped))
        assert not isinstance(raised.value, FormatError), "damage is not another version"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("trouble", ["truncated", "empty", "missing", "longer", "link", "directory"])
def test_a_file_that_is_not_as_written_is_found(tmp_path, save, run_ranks, file, trouble) -> None:
    def damage(path: Path) -> None:
        target = path / file
        content = target.read_bytes()
        target.unlink()
        if trouble == "link":
            (tmp_path / "elsewhere").write_bytes(content)
            target.symlink_to(tmp_path / "elsewhere")
        elif trouble == "directory":
            target.mkdir()
        elif trouble != "missing":
            target.write_bytes({"truncated": content[:-1], "empty": b"", "longer": content + b"\n"}[trouble])

    assert file in falls_back(tmp_path, save, run_ranks, damage)


@pytest.mark.parametrize("extra", ["model-00009.safetensors", "notes.txt", ".hidden", "rank-00000.json"])
def test_security_a_file_the_manifest_does_not_list_is_found(tmp_path, save, run_ranks, extra) -> None:
    assert extra in falls_back(tmp_path, save, run_ranks, lambda path: (path / extra).write_bytes(b""))


def test_security_a_step_directory_that_is_a_link_is_refused(tmp_path, save, run_ranks) -> None:
    def damage(path: Path) -> None:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")

    assert "symbolic link" in falls_back(tmp_path, save, run_ranks, damage)


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path, save) -> None:
    path = save(tmp_path, 7)
    os.rename(path, path.with_name("step-00000008"))
    reports: list[str] = []
    assert find_newest(tmp_path, World.single(), reports.append) is None
    assert "its step differs" in reports[0]


def test_damage_in_all_checkpoints_ends_with_none_and_every_one_kept(tmp_path, save) -> None:
    for step in (1, 2, 3):
        (save(tmp_path, step) / "trainer.json").write_bytes(b"{}")
    reports: list[str] = []
    assert find_newest(tmp_path, World.single(), reports.append) is None
    assert len(reports) == 3
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-0000000{step}.corrupt" for step in (1, 2, 3)]


def test_a_second_damaged_checkpoint_of_a_step_does_not_overwrite_the_first(tmp_path, save) -> None:
    for _ in range(2):
        (save(tmp_path, 1) / "trainer.json").unlink()
        assert find_newest(tmp_path, World.single(), lambda line: None) is None
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "step-00000001.corrupt",
        "step-00000001.corrupt-1",
    }


def test_a_damaged_checkpoint_that_cannot_be_renamed_is_passed_over(tmp_path, save, monkeypatch) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "trainer.json").unlink()

    def refuse(*names: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "rename", refuse)
    reports: list[str] = []
    assert find_newest(tmp_path, World.single(), reports.append).step == 1
    assert "Read-only file system" in reports[0]


def test_a_checkpoint_that_the_disk_does_not_give_is_not_given_up_and_the_error_says_how_to_go_on(
    tmp_path, save, monkeypatch
) -> None:
    save(tmp_path, 1)
    lost = save(tmp_path, 2)
    verify = reader.verify

    def unreadable(directory: Path, world: World) -> Manifest:
        if directory == lost:
            raise OSError(5, "Input/output error")
        return verify(directory, world)

    monkeypatch.setattr(reader, "verify", unreadable)
    with pytest.raises(MachineError, match=f"Input/output error; fix: .*move {lost} aside"):
        find_newest(tmp_path, World.single(), pytest.fail)
    lost.rename(tmp_path / "aside")
    assert find_newest(tmp_path, World.single(), pytest.fail).step == 1


def test_a_run_without_checkpoints_has_none(tmp_path) -> None:
    assert find_newest(tmp_path, World.single(), pytest.fail) is None
    (tmp_path / "checkpoints" / "unrelated").mkdir(parents=True)
    assert find_newest(tmp_path, World.single(), pytest.fail) is None


class Canary:
    """Unpickling one creates the file it names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
@pytest.mark.parametrize("file", FILES)
def test_security_a_pickle_under_a_checkpoints_name_is_never_executed(tmp_path, save, file, writer) -> None:
    canary = tmp_path / "executed"
    path = save(tmp_path, 1, size=2)
    checkpoint = Checkpoint(path, verify(path))
    evil = path / file
    if writer == "pickle":
        evil.write_bytes(pickle.dumps(Canary(canary)))
    else:
        torch.save({"x": Canary(canary)}, evil)

    def use() -> None:
        for name in checkpoint.names():
            for kind in ("master", "exp_avg"):
                checkpoint.read(name, kind)
        checkpoint.buffers()
        assert checkpoint.trainer_state is not None
        check_sizes(path)

    with pytest.raises(CheckpointError):
        use()
    assert find_newest(tmp_path, World.single(), lambda line: None) is None
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "the canary itself must work"


def test_a_manifest_that_points_at_a_tensor_of_another_shape_is_refused_when_read(tmp_path, save) -> None:
    path, other = save(tmp_path, 1), save(tmp_path, 2, size=2)
    checkpoint = Checkpoint(path, verify(path))
    shutil.copyfile(other / "model-00000.safetensors", path / "model-00000.safetensors")
    with pytest.raises(CheckpointError, match="allowed: F32"):
        checkpoint.read("embedding.weight", "master")
    with pytest.raises(CheckpointError, match="no such parameter"):
        checkpoint.read("embedding.weigth", "master")


def test_security_no_file_of_a_checkpoint_is_a_pickle(tmp_path, save) -> None:
    for file in save(tmp_path, 1, size=2).iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError, AttributeError)):
            pickle.loads(file.read_bytes())


def of_another_format(manifest: Path) -> None:
    """As a later version would write it: intact, with a correct SHA-256."""
    body = manifest.read_bytes().rpartition(b',\n"sha256"')[0].replace(b'"format": 1', b'"format": 2')
    manifest.write_bytes(body + f',\n"sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode())


def test_a_checkpoint_of_an_unknown_format_is_refused_plainly_and_left_untouched(tmp_path, save) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    newest = tmp_path / "checkpoints" / "step-00000020"
    of_another_format(newest / "manifest.json")
    with pytest.raises(FormatError, match="another version.*use the version that wrote it"):
        find_newest(tmp_path, World.single(), pytest.fail)
    assert newest.is_dir() and FormatError.exit_code == 3
    prune(tmp_path, Keep(1))
    assert newest.is_dir(), "what is not understood is not deleted"


def test_a_flipped_bit_in_the_format_is_damage_and_no_other_format(tmp_path, save, holds) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    manifest = tmp_path / "checkpoints" / "step-00000020" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"format": 1', b'"format": 3'))
    told: list[str] = []
    assert holds(find_newest(tmp_path, World.single(), told.append), 10)
    assert "unknown format" in told[0]
