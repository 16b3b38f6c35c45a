"""Whatever was written reads back bit for bit, whoever wrote it and whoever reads it."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from kha_train.checkpoint.background import write
from kha_train.checkpoint.manifest import ELEMENT_BYTES, KINDS
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import Checkpoint, find_newest, verify
from kha_train.distributed import World
from kha_train.errors import CheckpointError


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.flatten().view(torch.int32).tolist()


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, dict[str, tuple[int, ...]], dict, int]:
    """World size, shapes, random uneven cuts of every (name, kind) with an owner for each piece, and a part size."""
    size = draw(st.integers(1, 4))
    shapes = draw(
        st.dictionaries(
            st.sampled_from(["a.weight", "b", "c.ж/é"]), st.lists(st.integers(0, 6), max_size=3).map(tuple), min_size=1
        )
    )
    cuts = {}
    for name, shape in shapes.items():
        elements = torch.Size(shape).numel()
        for kind in KINDS:
            inner = draw(st.lists(st.integers(0, elements), max_size=5)) if elements else []
            bounds = sorted({0, *inner, elements})
            spans = list(pairwise(bounds)) or [(0, 0)]
            cuts[name, kind] = [(a, b, draw(st.integers(0, size - 1))) for a, b in draw(st.permutations(spans))]
    return size, shapes, cuts, draw(st.sampled_from([1, 64, 2**20]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layouts(), st.data())
def test_any_uneven_cut_by_any_world_size_reads_back_bit_exact_by_any_slicing(run_ranks, layout, data) -> None:
    size, shapes, cuts, part_bytes = layout
    generator = torch.Generator().manual_seed(size)
    # random bit patterns: NaNs with payloads, infinities and subnormals included
    state = {
        (name, kind): torch.randint(-(2**31), 2**31, (torch.Size(shapes[name]).numel(),), generator=generator)
        .to(torch.int32)
        .view(torch.float32)
        for name, kind in cuts
    }

    def body(world: World) -> Path:
        own = (
            Piece(name, kind, shapes[name], a, state[name, kind][a:b])
            for (name, kind), spans in cuts.items()
            for a, b, owner in spans
            if owner == world.rank
        )
        return write(Path(folder), 3, world, own, {}, {}, part_bytes=part_bytes)

    with tempfile.TemporaryDirectory() as folder:
        for outcome in run_ranks(size, body):
            assert outcome == Path(folder) / "checkpoints" / "step-00000003", outcome
        readers = run_ranks(data.draw(st.integers(1, 4)), lambda world: find_newest(Path(folder), world, pytest.fail))
        for checkpoint in readers:
            assert checkpoint.step == 3 and checkpoint.names() == shapes
        for (name, kind), values in state.items():
            start = data.draw(st.integers(0, len(values)))
            length = data.draw(st.integers(0, len(values) - start))
            assert bits(checkpoint.read(name, kind)) == bits(values)
            assert bits(checkpoint.read(name, kind, start, length)) == bits(values[start : start + length])


def test_buffers_of_every_dtype_survive(tmp_path) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    dtypes += [torch.int8, torch.uint8, torch.bool]
    buffers = {str(dtype): (torch.arange(6).reshape(2, 3) % 2).to(dtype) for dtype in dtypes}
    buffers |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "strided": torch.arange(6.0).reshape(2, 3).T}
    path = write(tmp_path, 1, World.single(), [], buffers, {})
    raw = (path / "model-00000.safetensors").read_bytes()
    data = 8 + int.from_bytes(raw[:8], "little")
    for entry in json.loads(raw[8:data]).values():
        assert (data + entry["data_offsets"][0]) % ELEMENT_BYTES[entry["dtype"]] == 0, "aligned for memory mapping"
    found = Checkpoint(path, verify(path)).buffers()
    assert found.keys() == buffers.keys()
    for name, buffer in buffers.items():
        assert found[name].dtype == buffer.dtype and torch.equal(found[name], buffer), name


def test_the_safetensors_library_reads_every_file(tmp_path, save, make_state) -> None:
    path = save(tmp_path, 5, size=3)
    manifest = json.loads((path / "manifest.json").read_bytes())
    files = {name: load_file(path / name) for name in manifest["files"] if name.endswith(".safetensors")}
    for (name, kind), tensor in make_state(5).items():
        pieces = [files[file][key] for file, key, _, _ in manifest["parameters"][name][kind]]
        assert torch.equal(torch.cat(pieces).reshape(manifest["parameters"][name]["shape"]), tensor)


def test_a_rank_splits_what_exceeds_the_part_size_into_numbered_files(tmp_path, save, holds) -> None:
    path = save(tmp_path, 2, part_bytes=250)
    # 35 x 4 + 5 x 4 bytes and a 16-byte buffer fit into 250; the last parameter, 60 x 4, needs a file of its own
    assert {file.name for file in path.glob("model-*")} == {"model-00000.safetensors", "model-00000.001.safetensors"}
    assert holds(Checkpoint(path, verify(path)), 2)


def test_reading_a_slice_opens_only_the_files_that_hold_it(tmp_path, save) -> None:
    path = save(tmp_path, 4, size=2)
    checkpoint = Checkpoint(path, verify(path))
    (path / "model-00001.safetensors").unlink()
    assert len(checkpoint.read("embedding.weight", "master", 0, 18)) == 18
    with pytest.raises(CheckpointError, match="model-00001"):
        checkpoint.read("embedding.weight", "master", 17, 2)


def test_pieces_are_drawn_one_part_at_a_time(tmp_path) -> None:
    on_disk_when_drawn = []

    def pieces():
        for index in range(4):
            for kind in KINDS:
                on_disk_when_drawn.append(len(list(tmp_path.glob("checkpoints/.step*/model-*"))))
                yield Piece(f"p{index}", kind, (100,), 0, torch.zeros(100))

    write(tmp_path, 1, World.single(), pieces(), {}, {}, part_bytes=400)
    assert on_disk_when_drawn[-1] == 3


@pytest.mark.parametrize("trouble", ["gap", "overlap", "missing kind", "two shapes", "twice"])
def test_pieces_that_do_not_tile_are_refused_on_every_rank_and_leave_nothing(tmp_path, run_ranks, trouble) -> None:
    def body(world: World) -> Path:
        spans = {0: (0, 5), 1: {"gap": (6, 10), "overlap": (4, 10), "twice": (0, 5)}.get(trouble, (5, 10))}
        start, end = spans[world.rank]
        shape = (2, 5) if trouble == "two shapes" and world.rank else (10,)
        kinds = KINDS[:2] if trouble == "missing kind" else KINDS
        return write(tmp_path, 1, world, [Piece("p", k, shape, start, torch.zeros(end - start)) for k in kinds], {}, {})

    for outcome in run_ranks(2, body):
        assert isinstance(outcome, CheckpointError), outcome
    assert list((tmp_path / "checkpoints").iterdir()) == []
