"""The manifest is untrusted input: whatever it says, parsing ends in a checked manifest or one clear error."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.checkpoint.manifest import (
    KINDS,
    BufferEntry,
    Contents,
    FileEntry,
    Manifest,
    ParameterEntry,
    PieceEntry,
    parse_contents,
    parse_manifest,
)
from kha_train.errors import CheckpointError

MODEL, OPTIMIZER = "model-00000.safetensors", "optimizer-00000.safetensors"


def example() -> Manifest:
    pieces = {
        kind: tuple(
            PieceEntry(MODEL if kind == "master" else OPTIMIZER, f"{kind}:w:{start}", start, length)
            for start, length in ((0, 4), (4, 2))
        )
        for kind in KINDS
    }
    files = {name: FileEntry(1000, "0" * 64) for name in (MODEL, OPTIMIZER, "trainer.json")}
    buffers = {"bias": BufferEntry(MODEL, "buffer:bias", "F32", (4,))}
    return Manifest(12, "kha_train 0", Contents(files, {"w": ParameterEntry((2, 3), pieces)}, buffers))


def sections() -> dict[str, Any]:
    return copy.deepcopy(example().contents.sections())


def edited(*path: Any, value: Any) -> dict[str, Any]:
    """The example's sections with one entry set to `value`."""
    found = sections()
    place = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return found


def paths(found: Any, prefix: tuple = ()) -> list[tuple]:
    children = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    return [prefix] * bool(prefix) + [path for key, child in children for path in paths(child, (*prefix, key))]


def test_a_manifest_reads_back_as_it_was() -> None:
    assert parse_manifest(example().encode()) == example()
    assert json.loads(example().encode())["step"] == 12


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/../../b",
        "model-00000.safetensors/..",
        "C:\\model-00000.safetensors",
        "model-00000.safetensors\0",
        "model-00000.safetensors\n",
        "model-٠٠٠٠٠.safetensors",
        "․․/x",
        "manifest.json",
        "model-00000.bin",
        "MODEL-00000.safetensors",
        "",
    ],
)
def test_security_no_file_name_but_our_own_is_accepted(name) -> None:
    found = sections()
    found["files"][name] = {"size": 1, "sha256": "0" * 64}
    with pytest.raises(CheckpointError, match="not a file name"):
        parse_contents(found, "manifest.json")
    with pytest.raises(CheckpointError):
        parse_contents(edited("parameters", "w", "master", 0, 0, value=name), "manifest.json")


@pytest.mark.parametrize("count", [-1, 2**63, 10**40, 1.0, True, None, "1", [1], float("nan")])
@pytest.mark.parametrize(
    "path", [("files", MODEL, "size"), ("parameters", "w", "shape", 0), ("parameters", "w", "master", 0, 2)]
)
def test_security_a_count_that_is_negative_huge_or_no_integer_is_refused(path, count) -> None:
    with pytest.raises(CheckpointError, match="manifest.json"):
        parse_contents(edited(*path, value=count), "manifest.json")


@pytest.mark.parametrize("dtype", ["O", "object", "<f4", "f32", "F128", "", 4, None])
def test_security_a_dtype_outside_the_list_is_refused(dtype) -> None:
    with pytest.raises(CheckpointError):
        parse_contents(edited("buffers", "bias", "dtype", value=dtype), "manifest.json")


def test_security_shapes_whose_product_overflows_are_refused() -> None:
    with pytest.raises(CheckpointError, match="too large"):
        parse_contents(edited("parameters", "w", "shape", value=[2**40, 2**40]), "manifest.json")
    with pytest.raises(CheckpointError, match="too large"):
        parse_contents(edited("parameters", "w", "shape", value=[1] * 17), "manifest.json")


def test_security_a_file_smaller_than_its_tensors_is_refused_before_anything_is_allocated() -> None:
    with pytest.raises(CheckpointError, match="too small"):
        parse_contents(edited("files", MODEL, "size", value=39), "manifest.json")
    parse_contents(edited("files", MODEL, "size", value=40), "manifest.json")


def test_a_tensor_used_twice_is_refused() -> None:
    found = sections()
    found["parameters"]["w"]["master"][1][1] = found["parameters"]["w"]["master"][0][1]
    with pytest.raises(CheckpointError, match="twice"):
        parse_contents(found, "manifest.json")


@pytest.mark.parametrize(
    ("spans", "trouble"),
    [
        ([(0, 4)], "not covered"),
        ([], "not covered"),
        ([(0, 4), (5, 1)], "a gap"),
        ([(1, 5)], "a gap"),
        ([(0, 4), (3, 3)], "an overlap"),
        ([(0, 4), (0, 4)], "an overlap"),
        ([(0, 4), (4, 3)], "not covered"),
        ([(4, 2), (0, 4)], "a gap"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_that_do_not_tile_a_parameter_are_refused(kind, spans, trouble) -> None:
    manifest = example()
    entries = tuple(PieceEntry(MODEL, f"other:{i}", start, length) for i, (start, length) in enumerate(spans))
    manifest.contents.parameters["w"].pieces[kind] = entries
    with pytest.raises(CheckpointError, match=trouble) as caught:
        parse_manifest(manifest.encode())
    assert kind in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(paths(sections())), json_values)
def test_security_any_value_anywhere_is_accepted_whole_or_refused_with_the_manifest_named(path, value) -> None:
    found = edited(*path, value=value)
    try:
        contents = parse_contents(found, "manifest.json")
    except CheckpointError as error:
        assert "manifest.json" in str(error) and len(str(error)) < 2000
    else:
        assert contents.sections() == found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(paths(sections())))
def test_security_any_entry_removed_is_refused_or_leaves_what_is_left(path) -> None:
    found = sections()
    place = found
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    try:
        contents = parse_contents(found, "manifest.json")
    except CheckpointError as error:
        assert "manifest.json" in str(error)
    else:
        assert contents.sections() == found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | json_values.map(json.dumps).map(str.encode))
def test_security_bytes_that_are_no_manifest_are_refused_in_one_way(raw) -> None:
    with pytest.raises(CheckpointError):
        parse_manifest(raw)


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"null", b"[" * 100_000, b'{"format":' + b"9" * 5000 + b"}", b"\xff\xfe", b"NaN"]
)
def test_security_known_parser_traps_are_refused(raw) -> None:
    with pytest.raises(CheckpointError):
        parse_manifest(raw)


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda raw: raw + b" ",
        lambda raw: raw.replace(b'"format": 1', b'"format":  1'),
        lambda raw: raw.replace(b'"format": 1,', b'"format": 1,\n"format": 1,'),
        lambda raw: raw.replace(b'"step": 12', b'"step": 13'),
        lambda raw: raw.replace(b'"format": 1', b'"format": 2'),
        lambda raw: raw.replace(b'"tool"', b'"extra": 1,\n"tool"'),
        lambda raw: json.dumps(json.loads(raw)).encode(),
    ],
)
def test_bytes_other_than_those_written_are_refused_even_when_they_mean_the_same(rewrite) -> None:
    raw = example().encode()
    assert rewrite(raw) != raw
    with pytest.raises(CheckpointError):
        parse_manifest(rewrite(raw))


def test_ten_thousand_files_and_pieces_are_read() -> None:
    count = 10_000
    files = {f"model-{rank:05d}.safetensors": FileEntry(1000, "a" * 64) for rank in range(count)} | {
        "trainer.json": FileEntry(1, "b" * 64)
    }
    pieces = {
        kind: tuple(PieceEntry(f"model-{i:05d}.safetensors", f"{kind}:{i}", i, 1) for i in range(count))
        for kind in KINDS
    }
    manifest = Manifest(1, "t", Contents(files, {"w": ParameterEntry((count,), pieces)}, {}))
    assert parse_manifest(manifest.encode()) == manifest
