"""Adapters of peers are found outside the package, and a wrong name says what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from kha_train.bench.loaders import open_loader
from kha_train.bench.peers import Shape, load_adapters, load_loaders
from kha_train.errors import ConfigError

PEERS = Path(__file__).resolve().parents[1] / "peers"

LOADER = """
import torch
from kha_train.bench.peers import LoaderPeer, Opened

def write(ours, directory, shape):
    (directory / "made").write_text("once")

def open(directory, shape):
    return Opened(iter([torch.zeros(shape.B, shape.L, dtype=torch.int64)]), None)

PEERS = {"zeros": LoaderPeer(write, open)}
PACKAGES = [("nothing",)]
"""


def test_the_adapters_of_a_checkout_load_without_their_packages() -> None:
    assert load_adapters(PEERS, ["transformers"]).keys() == {"transformers"}
    loaders = load_loaders(PEERS)
    assert "litdata" in loaders.PEERS and ("grain",) in loaders.PACKAGES


def test_a_peer_without_a_folder_is_refused_with_the_option_that_names_one() -> None:
    with pytest.raises(ConfigError) as caught:
        load_adapters(None, ["transformers"])
    (fix,) = caught.value.typed_fixes
    option, folder = fix.typed.split()
    assert option == "--peers" and load_adapters(PEERS.parents[1] / folder, ["transformers"])
    assert load_adapters(None, []) == {}


def test_a_name_without_an_adapter_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(ConfigError) as caught:
        load_adapters(tmp_path, ["yours"])
    assert caught.value.value == "yours" and caught.value.allowed == "mine"


def test_a_loader_of_ones_own_is_one_file_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "loaders.py").write_text(LOADER)
    (tmp_path / "root" / "ours").mkdir(parents=True)
    for _ in range(2):
        opened = open_loader("zeros", tmp_path / "root", Shape(2, 3, 10), {}, tmp_path)
        assert next(opened.batches).shape == (2, 3)
    assert (tmp_path / "root" / "zeros" / "made").read_text() == "once"
