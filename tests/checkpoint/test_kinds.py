"""A checkpoint stores the states that the optimiser names: those of AdamW without names, all others by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kha_train.checkpoint.compare import compare
from kha_train.checkpoint.manifest import KINDS, Contents, Kinds, Manifest, parse_contents, parse_manifest
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import Checkpoint, verify
from kha_train.checkpoint.rewrite import rewritten
from kha_train.checkpoint.writer import Save, encode_on_main
from kha_train.distributed import World
from kha_train.errors import CheckpointError, FormatError
from kha_train.variants.optimizer import AdamWOptions

ONE_STATE = ("master", "velocity")


def save(folder: Path, kinds: tuple[str, ...], brought: tuple[str, ...] = ()) -> Checkpoint:
    """A checkpoint of six numbers, written in two pieces of each kind."""
    world = World.single()
    written = Save(folder, 1, world, encode_on_main(world, {}), kinds=Kinds(kinds))
    written.prepare()
    values = torch.arange(6.0)
    pieces = [
        Piece("w", kind, (2, 3), start, values[start : start + 3] + place)
        for place, kind in enumerate(brought or kinds)
        for start in (0, 3)
    ]
    written.write_share(pieces, {})
    written.publish()
    return Checkpoint(written.path, verify(written.path))


def test_adamw_keeps_what_a_manifest_without_names_holds() -> None:
    assert AdamWOptions.kinds() == KINDS


def test_other_states_are_named_in_a_manifest_of_their_own_format_and_read_back(tmp_path: Path) -> None:
    found = save(tmp_path, ONE_STATE)
    assert found.kinds == ONE_STATE and found.read("w", "velocity", 1, 4).tolist() == [2.0, 3.0, 4.0, 5.0]
    plain = json.loads((found.path / "manifest.json").read_text())
    assert (plain["format"], plain["kinds"]) == (2, ["master", "velocity"])
    with pytest.raises(CheckpointError, match="no such kind"):
        found.read("w", "exp_avg")


def test_the_states_of_adamw_are_written_as_ever(tmp_path: Path) -> None:
    plain = json.loads((save(tmp_path, KINDS).path / "manifest.json").read_text())
    assert plain["format"] == 1 and "kinds" not in plain
    assert set(plain["parameters"]["w"]) == {"shape", *KINDS}


def test_a_state_that_is_announced_and_not_brought_fails_the_save(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="velocity of w is not covered"):
        save(tmp_path, ONE_STATE, brought=("master",))


def test_checkpoints_of_two_optimisers_are_compared_by_what_both_hold(tmp_path: Path) -> None:
    found = compare(save(tmp_path / "adamw", KINDS), save(tmp_path / "other", ONE_STATE))
    assert found.only_first == ["every exp_avg", "every exp_avg_sq"] and found.only_second == ["every velocity"]
    assert found.tensors == {} and not found.equal


@pytest.mark.parametrize(
    "kinds",
    [
        [],
        "master",
        ["velocity", "master"],
        ["master", "master"],
        ["master", "shape"],
        ["master", "../x"],
        ["master", 1],
        ["master", "V"],
        ["master", *(f"s{number}" for number in range(16))],
    ],
    ids=str,
)
def test_names_of_kinds_are_read_as_untrusted_input(kinds: Any, tmp_path: Path) -> None:
    contents = save(tmp_path, ONE_STATE).manifest.contents.to_plain()
    with pytest.raises(CheckpointError):
        parse_contents(contents | {"kinds": kinds}, "manifest.json")


def sealed(change: Callable[[Contents], Contents], found: Checkpoint) -> bytes:
    return Manifest(1, "tool", change(found.manifest.contents)).encode()


def test_a_manifest_says_its_kinds_in_one_way_alone(tmp_path: Path) -> None:
    """Named kinds belong to format 2, and AdamW's are not named: every checkpoint has one form."""
    raw = sealed(lambda contents: contents, save(tmp_path, ONE_STATE))
    assert parse_manifest(raw).encode() == raw
    with pytest.raises(CheckpointError) as caught:
        parse_manifest(raw.replace(b'"format": 2', b'"format": 1'))
    assert not isinstance(caught.value, FormatError), "its SHA-256 is not right: damage"
    listed = save(tmp_path / "adamw", KINDS).manifest.contents.to_plain() | {"kinds": list(KINDS)}
    assert parse_contents(listed, "rank-00000.json").to_plain().keys() == {"files", "parameters", "buffers"}


def test_states_that_only_some_parameters_have_are_stored_of_these_alone(tmp_path: Path) -> None:
    kinds, world = ("master", "exp_avg", "momentum"), World.single()
    written = Save(tmp_path, 1, world, encode_on_main(world, {}), kinds=Kinds(kinds, of_some=True))
    written.prepare()
    values = torch.arange(6.0)
    held = (("w", "master"), ("w", "momentum"), ("v", "master"), ("v", "exp_avg"))
    written.write_share([Piece(name, kind, (6,), 0, values) for name, kind in held], {})
    written.publish()
    found = Checkpoint(written.path, verify(written.path))
    assert found.kinds == kinds and json.loads((found.path / "manifest.json").read_text())["format"] == 3
    assert (found.kinds_of("w"), found.kinds_of("v")) == (("master", "momentum"), ("master", "exp_avg"))
    assert torch.equal(found.read("w", "momentum"), values)
    with pytest.raises(CheckpointError, match="no such kind of v"):
        found.read("v", "momentum")
    raw = (found.path / "manifest.json").read_bytes()
    assert parse_manifest(raw).encode() == raw
    plain = found.manifest.contents.to_plain()
    for damaged in ({"some_kinds": False}, {"some_kinds": 1}):
        with pytest.raises(CheckpointError):
            parse_contents(plain | damaged, "manifest.json")
    del plain["parameters"]["v"]["master"]
    with pytest.raises(CheckpointError, match="wrong keys"):
        parse_contents(plain, "manifest.json")
    assert not compare(found, found).tensors
    copy = rewritten(found, tmp_path / "copy", lambda name, kind, values_P: values_P + (kind == "exp_avg"))
    again = compare(found, Checkpoint(copy, verify(copy)))
    assert again.tensors.keys() == {"v exp_avg"} and not again.only_first and not again.only_second


def test_a_state_that_some_ranks_did_not_bring_fails_the_save(tmp_path: Path) -> None:
    world = World.single()
    written = Save(tmp_path, 1, world, encode_on_main(world, {}), kinds=Kinds(("master", "momentum"), of_some=True))
    written.prepare()
    written.write_share(
        [Piece("w", "master", (6,), 0, torch.zeros(6)), Piece("w", "momentum", (6,), 0, torch.zeros(3))], {}
    )
    with pytest.raises(CheckpointError, match="momentum of w is not covered"):
        written.publish()


def test_a_state_that_one_checkpoint_has_of_more_parameters_is_told(tmp_path: Path) -> None:
    def written(folder: str, *others: str) -> Checkpoint:
        world, kinds = World.single(), ("master", "exp_avg", "momentum")
        save = Save(tmp_path / folder, 1, world, encode_on_main(world, {}), kinds=Kinds(kinds, of_some=True))
        save.prepare()
        held = ("w master", "w momentum", "v master", *others)
        save.write_share([Piece(*name.split(), (6,), 0, torch.zeros(6)) for name in held], {})
        save.publish()
        return Checkpoint(save.path, verify(save.path))

    first, second = written("first", "v exp_avg"), written("second", "v exp_avg", "v momentum")
    assert compare(first, first).equal
    found = compare(first, second)
    assert (found.only_first, found.only_second, found.tensors) == ([], ["v momentum"], {})
