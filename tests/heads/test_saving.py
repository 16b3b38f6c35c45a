"""What was inserted is saved as data, and a directory from anybody is read as data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kha_train.heads import HeadsError, insert, load, save


@pytest.fixture
def saved(tiny, moved, tmp_path: Path) -> Path:
    save(moved(tiny("kha_mlp")), tmp_path)
    return tmp_path


@pytest.mark.parametrize("interaction, options", [("kha_mlp", {"share": "none"}), ("kha_linear", {}), ("mea", {})])
def test_a_loaded_model_is_bit_equal_to_the_saved_one(interaction, options, tiny, moved, x_BTD, tmp_path: Path) -> None:
    model = moved(tiny(interaction, **options))
    save(model, tmp_path / "new")
    save(model, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["kha_heads.json", "kha_heads.safetensors"]
    loaded = load(tiny(), tmp_path / "new")
    assert torch.equal(loaded(x_BTD), model(x_BTD))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(HeadsError, match="already inserted"):
        load(loaded, tmp_path / "new")


def test_parameters_are_loaded_in_the_dtype_of_the_model_and_onto_the_cpu_for_meta(tiny, saved: Path) -> None:
    assert load(tiny().bfloat16(), saved).layers[0].kha.v.up.dtype == torch.bfloat16
    assert load(tiny().bfloat16(), saved, dtype=torch.float32).layers[0].kha.v.up.dtype == torch.float32
    with torch.device("meta"):
        model = tiny()
    up = load(model, saved).layers[1].kha.v.up
    assert up.device.type == "cpu" and torch.equal(up, load(tiny(), saved).layers[1].kha.v.up)


def test_a_share_of_a_parameter_is_not_saved(tiny, tmp_path: Path) -> None:
    model = tiny("kha_mlp")
    model.layers[1].kha.v.gate.data = torch.empty(0)
    with pytest.raises(HeadsError, match=r"layers\.1\.kha\.v\.gate is not a whole tensor"):
        save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def settings(**changed: Any) -> Callable[[Path], None]:
    """Other settings; a value of None is left out."""

    def spoil(folder: Path) -> None:
        path = folder / "kha_heads.json"
        values = json.loads(path.read_text()) | changed
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return spoil


def text(raw: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "kha_heads.json").write_bytes(raw)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Other tensors, with the hash that belongs to them."""

    def spoil(folder: Path) -> None:
        path = folder / "kha_heads.safetensors"
        values = load_file(path)
        change(values)
        save_file(values, path)
        rehash(folder)

    return spoil


def raw_tensors(raw: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "kha_heads.safetensors").write_bytes(raw)
        rehash(folder)

    return spoil


def rehash(folder: Path) -> None:
    settings(sha256=hashlib.sha256((folder / "kha_heads.safetensors").read_bytes()).hexdigest())(folder)


def a_fifo(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def a_truncated_file(folder: Path) -> None:
    path = folder / "kha_heads.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


UP = "layers.0.kha.v.up"
HUGE = b'{"layers.0.kha.v.up":{"dtype":"F32","shape":[1000000,1000000,1000],"data_offsets":[0,4]}}'
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no settings": (lambda folder: (folder / "kha_heads.json").unlink(), "cannot read"),
    "no tensors": (lambda folder: (folder / "kha_heads.safetensors").unlink(), "cannot read"),
    "a fifo as settings": (a_fifo("kha_heads.json"), "not a regular file"),
    "a fifo as tensors": (a_fifo("kha_heads.safetensors"), "not a regular file"),
    "binary settings": (text(b"\x80\x02}q\x00."), "is not JSON"),
    "deep settings": (text(b"[" * 100_000), "is not JSON"),
    "long settings": (text(b'"' + b"a" * 2**21 + b'"'), "is not JSON"),
    "settings larger than the memory": (lambda folder: os.truncate(folder / "kha_heads.json", 2**40), "is not JSON"),
    "settings of another kind": (text(b"[]"), "exactly the keys"),
    "a key more": (settings(auto_map={"AutoModel": "evil.Model"}), "exactly the keys"),
    "a key less": (settings(options=None), "exactly the keys"),
    "a truth as version": (settings(version=True), "exactly the keys"),
    "a later version": (settings(version=2), "version 1"),
    "another interaction": (settings(interaction="os.system"), "one of kha_linear"),
    "another option": (settings(options={"projections": ["v"], "__class__": "x"}), "no option '__class__'"),
    "an option of another type": (settings(options={"projections": [["v"]], "share": "heads"}), "a choice of q, k, v"),
    "another layout": (settings(layouts={"TinyAttention": "../../x"}), "one of transformers"),
    "a layout that is no name": (settings(layouts={"TinyAttention": ["x"]}), "names of layouts"),
    "a class that is not there": (settings(layouts={"LlamaAttention": "transformers"}), "no known attention"),
    "a hash of other tensors": (settings(sha256="0" * 64), "SHA-256 differs"),
    "a truncated file": (a_truncated_file, "SHA-256 differs"),
    "a pickle as tensors": (raw_tensors(b"\x80\x04\x95\x00cos\nsystem\n."), "not a whole safetensors file"),
    "a shape beyond the file": (raw_tensors(len(HUGE).to_bytes(8, "little") + HUGE + b"\0" * 4), "not a whole"),
    "a tensor more": (tensors(lambda t: t.update({"lm_head.weight": torch.ones(2)})), "lm_head.weight is only in one"),
    "a tensor less": (tensors(lambda t: t.pop(UP)), f"{UP} is only in one"),
    "another shape": (tensors(lambda t: t.update({UP: torch.ones(6, 5)})), r"is \[6, 5\], not \[6, 6\]"),
    "integers": (tensors(lambda t: t.update({UP: torch.ones(6, 6, dtype=torch.int32)})), "torch.int32"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_or_damaged_directory_is_refused_in_one_line(case: str, tiny, saved: Path, x_BTD) -> None:
    spoil, told = HOSTILE[case]
    spoil(saved)
    model = tiny()
    with pytest.raises(HeadsError, match=told) as caught:
        load(model, saved)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert list(model.state_dict()) == list(tiny().state_dict()) and torch.equal(model(x_BTD), tiny()(x_BTD))


def test_what_is_saved_for_one_model_is_refused_by_another(tiny, saved: Path) -> None:
    model = tiny()
    model.layers = model.layers[:1]
    with pytest.raises(HeadsError, match=r"layers\.1\.kha.* is only in one of them"):
        load(model, saved)
    insert(model, "kha_mlp", layouts={"TinyAttention": "transformers"})
